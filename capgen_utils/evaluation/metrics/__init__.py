"""Scores of generated captions, their intervals, and what they hide. Notebook 09 teaches it."""

from capgen_utils.evaluation.metrics.diagnosis import (
    Finding,
    diagnose,
    diversity,
    mutual_bleu,
    originality,
)
from capgen_utils.evaluation.metrics.formats import labels, load_captions, load_references
from capgen_utils.evaluation.metrics.judgement import (
    agreement,
    agreement_table,
    clip_score,
    judged_pairs,
    read_judgements,
    ref_clip_score,
)
from capgen_utils.evaluation.metrics.meteor import (
    Meteor,
    find_wordnet,
    has_meteor_java,
    java_program,
    meteor_java,
    meteor_nltk,
)
from capgen_utils.evaluation.metrics.resampling import (
    Difference,
    Interval,
    intervals,
    mean_interval,
    paired_bootstrap,
    score_with_intervals,
)
from capgen_utils.evaluation.metrics.scores import (
    BLEU_PROTOCOL,
    PROTOCOLS,
    TOKENISATION,
    Statistics,
    Summed,
    bleu,
    cider,
    cider_d,
    rouge_l,
    score,
)
