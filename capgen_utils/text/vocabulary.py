"""Fit a tokenizer of any kind on captions, or load one from a bundle (notebooks 01, 06, 07)."""

from collections.abc import Iterable
from typing import Any

from capgen_utils.common.files import CapGenError
from capgen_utils.text.bpe import BpeTokenizer
from capgen_utils.text.words import Tokenizer, WordTokenizer

KINDS: dict[str, type[WordTokenizer] | type[BpeTokenizer]] = {
    kind.kind: kind for kind in (WordTokenizer, BpeTokenizer)
}


def tokenizer_from_json(value: Any) -> Tokenizer:
    """Rebuild a tokenizer of any kind from ``Tokenizer.to_json``.

    Raises:
        CapGenError: not a tokenizer of this version, or a damaged one.
    """
    kind = value.get("kind") if isinstance(value, dict) else None
    if not isinstance(kind, str) or kind not in KINDS:
        raise CapGenError(
            "tokenizer.json is not a tokenizer that this version knows", "get the bundle again"
        )
    return KINDS[kind].from_json(value)


def fit_tokenizer(kind: str, captions: Iterable[str], min_count: int = 5) -> Tokenizer:
    """Make a tokenizer from the training captions.

    Args:
        kind: ``word``, or a byte-pair family: ``clip`` or ``gpt2``.
        captions: those of the training split.
        min_count: occurrences that a word needs to enter a vocabulary of words.

    Raises:
        CapGenError: there is no such kind, or no text in the captions.
    """
    words = kind == WordTokenizer.kind
    return WordTokenizer.fit(captions, min_count) if words else BpeTokenizer.fit(captions, kind)


def token_rows(kept: Tokenizer, wanted: Tokenizer) -> list[int] | None:
    """Return the row in ``kept`` of each token of ``wanted``; ``None`` if ``kept`` lacks one."""
    if kept.to_json() == wanted.to_json():
        return list(range(len(kept)))
    if not (isinstance(kept, BpeTokenizer) and isinstance(wanted, BpeTokenizer)):
        return None
    rows = {original: row for row, original in enumerate(kept.original_ids)}
    if kept.family != wanted.family or not rows.keys() >= set(wanted.original_ids):
        return None
    return [rows[original] for original in wanted.original_ids]
