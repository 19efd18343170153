"""From logits to captions: search, sampling and re-ranking."""

from capgen_utils.common.moved import moved_names

__getattr__ = moved_names(__name__)  # for notebooks of earlier copies
