"""Scores of generated captions, and what they hide."""

from capgen_utils.metrics.diversity import diversity
from capgen_utils.metrics.scores import BLEU_PROTOCOL, PROTOCOLS, Statistics, bleu, cider, cider_d, rouge_l, score

__all__ = ["BLEU_PROTOCOL", "PROTOCOLS", "Statistics", "bleu", "cider", "cider_d", "diversity", "rouge_l", "score"]
