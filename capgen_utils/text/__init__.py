"""From captions to token ids: word tokens, byte pairs, vocabularies."""

from capgen_utils.common.moved import moved_names

__getattr__ = moved_names(__name__)  # for notebooks of earlier copies
