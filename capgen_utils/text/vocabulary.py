"""Every tokenizer by its kind: fit one on captions, or load it from a bundle."""

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
        captions: of the training split.
        min_count: occurrences a word needs to enter a vocabulary of words.

    Raises:
        CapGenError: no such kind, or no captions to learn from.
    """
    if kind == WordTokenizer.kind:
        return WordTokenizer.fit(captions, min_count)
    return BpeTokenizer.fit(captions, kind)


def token_rows(kept: Tokenizer, wanted: Tokenizer) -> list[int] | None:
    """Return the row in the vocabulary ``kept`` of each token of ``wanted``; ``None`` where it is
    no part of it."""
    if kept.to_json() == wanted.to_json():
        return list(range(len(kept)))
    if (
        isinstance(kept, BpeTokenizer)
        and isinstance(wanted, BpeTokenizer)
        and kept.family == wanted.family
    ):
        rows = {original: row for row, original in enumerate(kept.original_ids)}
        if rows.keys() >= set(wanted.original_ids):
            return [rows[original] for original in wanted.original_ids]
    return None
