"""Training of captioners, encoders, the small CLIP and the language model."""

from capgen_utils.common.moved import moved_names

__getattr__ = moved_names(__name__)  # for notebooks of earlier copies
