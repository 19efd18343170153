"""CLIP's and GPT-2's byte-level byte-pair tokenizers, whole or trimmed (notebooks 06 and 07)."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import regex
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers

from capgen_utils.common.files import CapGenError
from capgen_utils.text.bpe_tables import (
    Family,
    Merge,
    byte_symbols,
    find_family,
    load_merges,
    published_tokens,
)
from capgen_utils.text.ptb import join_words, tokenise
from capgen_utils.text.words import Tokenizer

MAX_TOKEN_LENGTH = 256  # characters; the longest published token has 128
PAD_BYTE = 0xFF
_NO_TEXT = (0xC0, 0xC1, *range(0xF5, 0x100))  # bytes that no UTF-8 text contains
_CLIP_WORDS = tokenizers.Regex(r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+")

# Spaces between CLIP's tokens that a text does not have: in "don 't", and inside the words of
# ``tokenise``.
_CONTRACTED = r"(?<=n)[ ](?='t(?:[ ]|$))"
_GAPS = regex.compile(_CONTRACTED)
_INNER_GAPS = regex.compile(
    rf"""{_CONTRACTED}
      | [ ](?=[-/'.](?:[ ]|$)) | (?<=(?:^|[ ])[-/'])[ ]  # t-shirt, and/or, o'clock, mr.
      | (?<=\p{{N}})[ ](?=[,:][ ]\p{{N}}) | (?<=\p{{N}}[ ][.,:])[ ](?=\p{{N}})  # 1,000, 5.30
      | (?<=\p{{N}})[ ](?=\p{{N}}|(?:st|nd|rd|th|s)(?:[ ]|$))  # 22nd
      | (?<=(?:^|[ ])\p{{L}}[ ]\.)[ ](?=\p{{L}}(?:[ ]|$))  # u.s
      | (?<=[ ]\.)[ ](?=(?:com|net|org|edu)(?:[ ]|$))
    """,
    regex.VERBOSE,
)


class BpeTokenizer(Tokenizer):
    """A published byte-pair table, or the part of it that the training captions use.

    The special tokens are the published ones. Padding is the token of the byte 0xFF, which no UTF-8
    text contains, so that it has a row of its own in the published embeddings. The special tokens
    and the tokens of single bytes are always kept, so any text can be encoded: a token that was
    not kept is split into the two tokens that it was merged from, and so on.

    Args:
        family: ``clip`` or ``gpt2``.
        tokens: the kept tokens in the order of their published ids, written in byte symbols.
        original_ids: their published ids, rising.
        merges: by rank, those that lead to a kept token; each of these has exactly one.
        clean: encode the words of ``tokenise`` rather than the raw text.

    Attributes:
        family, clean, merges: see above.
        tokens: see above; a model has one row for each.
        original_ids: row -> published id, by which rows of published embeddings are copied.

    Raises:
        CapGenError: the values do not fit together.
    """

    kind = "bpe"

    def __init__(
        self,
        family: str,
        tokens: Sequence[str],
        original_ids: Sequence[int],
        merges: Sequence[Merge],
        clean: bool = True,
    ) -> None:
        table = find_family(family)
        _check_tokens(table, tokens, original_ids)
        _check_merges(table, tokens, merges)
        self._table, self.family, self.clean = table, family, clean
        self.tokens, self.original_ids, self.merges = list(tokens), list(original_ids), list(merges)
        rows = {token: row for row, token in enumerate(tokens)}
        symbols = byte_symbols()
        self.start_id, self.end_id = rows[table.start], rows[table.end]
        self.pad_id = rows[symbols[PAD_BYTE]]
        banned = {rows[symbols[byte] + end] for byte in _NO_TEXT for end in ("", table.suffix)}
        banned |= {self.pad_id, self.start_id} - {self.end_id}
        self.banned_ids = tuple(sorted(banned))
        self._split = _split_tokens(rows, merges)
        self._bpe = _library_tokenizer(table, rows, merges, self._split)
        byte_of = {symbol: byte for byte, symbol in symbols.items()}
        texts = ["" if t in table.specials else t.removesuffix(table.suffix) for t in tokens]
        self._bytes = [bytes(byte_of[symbol] for symbol in text) for text in texts]

    @classmethod
    def full(cls, family: str, folder: Path | None = None, clean: bool = True) -> "BpeTokenizer":
        """Return the whole published table: 49,408 tokens for ``clip``, 50,257 for ``gpt2``.

        Args:
            family: ``clip`` or ``gpt2``.
            folder: a model whose table must be the published one; see ``bpe_tables.load_merges``.
            clean: see ``BpeTokenizer``.

        Raises:
            CapGenError: there is no such family, or the folder holds another table.
        """
        table = find_family(family)
        merges = load_merges(table, folder)
        return cls(family, published_tokens(table, merges), range(table.size), merges, clean)

    @classmethod
    def fit(cls, captions: Iterable[str], family: str, clean: bool = True) -> "BpeTokenizer":
        """Return the part of the published table that the captions use; see ``trimmed``."""
        return cls.full(family, clean=clean).trimmed(captions)

    def trimmed(self, captions: Iterable[str]) -> "BpeTokenizer":
        """Keep the tokens that occur in ``captions``, the special tokens and the single bytes.

        The order of the ids stays. The captions are encoded into the same tokens as before; other
        text may be split into smaller ones.

        Raises:
            CapGenError: the captions hold no text.
        """
        used = {row for caption in captions for row in self.encode(caption)[1:-1]}
        if not used:
            raise CapGenError(
                "the training captions hold no text",
                "check that the captions file is the right one",
            )
        rows = sorted({*used, *range(len(self._table.singles)), self.start_id, self.end_id})
        tokens = [self.tokens[row] for row in rows]
        ids = [self.original_ids[row] for row in rows]
        return BpeTokenizer(self.family, tokens, ids, _needed(tokens, self.merges), self.clean)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "BpeTokenizer":
        """Rebuild a tokenizer from ``to_json`` alone.

        Raises:
            CapGenError: wrong types, or values that do not fit together.
        """
        kinds = {"tokens": str, "original_ids": int, "merges": str}
        for key, kind in kinds.items():
            items = value.get(key)
            # ``True`` is an int for isinstance
            if not isinstance(items, list) or any(type(item) is not kind for item in items):
                raise _refuse(f"{key} is missing, or of the wrong type")
        if not isinstance(value.get("clean"), bool) or not isinstance(value.get("family"), str):
            raise _refuse("family or clean are missing, or of the wrong type")
        merges = [line.split(" ") for line in value["merges"]]
        if any(len(merge) != 2 for merge in merges):
            raise _refuse("a merge does not have two parts")
        pairs = [(first, second) for first, second in merges]
        return cls(value["family"], value["tokens"], value["original_ids"], pairs, value["clean"])

    def __len__(self) -> int:
        """Return the number of kept tokens, special ones included."""
        return len(self.tokens)

    def normalise(self, caption: str) -> str:
        """Return the text that is encoded: words if ``clean``; for CLIP lower-case and NFC."""
        text = self._text(caption)
        return self._bpe.normalizer.normalize_str(text) if self._bpe.normalizer else text

    def _text(self, caption: str) -> str:
        text = caption.encode("utf-8", "replace").decode()  # a lone surrogate is not text
        return join_words(tokenise(text)) if self.clean else text

    def encode(self, caption: str, max_length: int | None = None) -> list[int]:
        """See ``Tokenizer.encode``; a longer caption loses tokens, so its last word may be cut."""
        rows: list[int] = []
        for i in self._bpe.encode(self._text(caption), add_special_tokens=False).ids:
            rows += self._split.get(i, [i])
        if max_length is not None:
            rows = rows[: max(max_length - 2, 0)]
        return [self.start_id, *rows, self.end_id]

    def decode(self, ids: Iterable[int]) -> str:
        """See ``Tokenizer.decode``; a leading start token is skipped, even if it equals the end.

        Bytes that are not UTF-8 become U+FFFD. GPT-2's tokens give the encoded text back, except
        outer spaces. CLIP's tokens do not say what was written together: contractions are joined
        again and, if ``clean``, the digits of numbers and the marks inside words; the rest is
        separated by spaces.
        """
        rows = [row for row in map(int, ids) if row != self.pad_id]
        if rows and rows[0] == self.start_id:
            rows = rows[1:]
        if self.end_id in rows:
            rows = rows[: rows.index(self.end_id)]
        suffix, words, word = self._table.suffix, [], b""
        for row in rows:
            word += self._bytes[row]
            if suffix and self.tokens[row].endswith(suffix):
                words.append(word.decode("utf-8", "replace"))
                word = b""
        rest = word.decode("utf-8", "replace")
        if not suffix:
            return rest.strip()
        gaps = _INNER_GAPS if self.clean else _GAPS
        return join_words(gaps.sub("", " ".join([*words, rest] if rest else words)).split(" "))

    def words(self, ids: Iterable[int]) -> list[str]:
        """See ``Tokenizer.words``; an incomplete character is written as bytes, ``\\xe7``."""
        specials = (self.pad_id, self.start_id, self.end_id)
        kept = [self._bytes[row] for row in ids if row not in specials]
        texts = [content.decode("utf-8", "backslashreplace") for content in kept]
        return [text.strip() or text for text in texts]

    def to_json(self) -> dict[str, Any]:
        """See ``Tokenizer.to_json``."""
        return {
            "kind": self.kind,
            "family": self.family,
            "clean": self.clean,
            "tokens": self.tokens,
            "original_ids": self.original_ids,
            "merges": [" ".join(merge) for merge in self.merges],
        }


# --- from tables to the library's tokenizer


def _needed(tokens: Iterable[str], merges: Sequence[Merge]) -> list[Merge]:
    """Return the merges that lead to ``tokens``, by rank.

    Each token has one merge, whose parts have lower ranks. So every merge that is applied to a text
    of these tokens is among them, and leaving out the others changes nothing.
    """
    wanted, needed = set(tokens), []
    for first, second in reversed(merges):
        if first + second in wanted:
            wanted |= {first, second}
            needed.append((first, second))
    return needed[::-1]


def _split_tokens(rows: Mapping[str, int], merges: Iterable[Merge]) -> dict[int, list[int]]:
    """Return the rows that replace each token that merges pass through but that was not kept.

    Their ids follow the rows, in the order of the merges.
    """
    parts = {token: [row] for token, row in rows.items()}
    split: dict[int, list[int]] = {}
    for first, second in merges:
        if first + second not in parts:
            parts[first + second] = parts[first] + parts[second]
            split[len(rows) + len(split)] = parts[first + second]
    return split


def _library_tokenizer(
    family: Family, rows: Mapping[str, int], merges: Sequence[Merge], split: Iterable[int]
) -> tokenizers.Tokenizer:
    """Return the library's tokenizer; it lacks the special tokens, so no caption can spell one."""
    passing = (token for token in map("".join, merges) if token not in rows)
    vocabulary = {token: row for token, row in rows.items() if token not in family.specials}
    vocabulary |= dict(zip(passing, split, strict=True))
    built = tokenizers.Tokenizer(
        models.BPE(vocab=vocabulary, merges=list(merges), end_of_word_suffix=family.suffix)
    )
    if not family.suffix:  # the first word gets the token that it has inside a sentence
        built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        return built
    space = normalizers.Replace(tokenizers.Regex(r"\s+"), " ")
    built.normalizer = normalizers.Sequence([normalizers.NFC(), space, normalizers.Lowercase()])
    words = pre_tokenizers.Split(_CLIP_WORDS, "removed", invert=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.pre_tokenizer = pre_tokenizers.Sequence([words, byte_level])
    return built


# --- checks of values from a file


def _refuse(problem: str) -> CapGenError:
    return CapGenError(
        f"this is no byte-pair tokenizer: {problem}",
        "the tokenizer file is damaged: get the bundle again",
    )


def _check_tokens(family: Family, tokens: Sequence[str], ids: Sequence[int]) -> None:
    """Refuse tokens other than the single bytes, some merged tokens, and the special tokens."""
    if len(tokens) != len(ids) or len(tokens) > family.size:
        raise _refuse(f"{len(tokens)} tokens and {len(ids)} ids, of at most {family.size}")
    longest = max(map(len, tokens), default=0)
    if len(set(tokens)) != len(tokens) or longest > MAX_TOKEN_LENGTH:
        raise _refuse("a token occurs twice, or is too long")
    first, last = len(family.singles), len(family.specials)
    published = [*range(first), *range(family.size - last, family.size)]
    if len(tokens) < first + last or (
        [*tokens[:first], *tokens[-last:]] != [*family.singles, *family.specials]
        or [*ids[:first], *ids[-last:]] != published
    ):
        raise _refuse("special tokens or single bytes are missing or misplaced")
    if any(low >= high for low, high in zip(ids, ids[1:], strict=False)):
        raise _refuse("the published ids do not rise")


def _check_merges(family: Family, tokens: Sequence[str], merges: Sequence[Merge]) -> None:
    """Refuse merges that do not build exactly the tokens, each once, from known parts."""
    if len(merges) > family.merges:
        raise _refuse(f"{len(merges)} merges, of at most {family.merges}")
    known = set(family.singles)
    for first, second in merges:
        if first not in known or second not in known:
            raise _refuse(f"the merge {first!r} {second!r} uses an unknown token")
        if first + second in known or len(first + second) > MAX_TOKEN_LENGTH:
            raise _refuse(f"the merge {first!r} {second!r} builds a token twice, or a too long one")
        known.add(first + second)
    built = tokens[len(family.singles) : len(tokens) - len(family.specials)]
    kept = set(built)
    if kept - known or len(_needed(built, merges)) != len(merges):
        raise _refuse("merges are missing, or lead to no token")
    if [token for token in map("".join, merges) if token in kept] != list(built):
        raise _refuse("merges and tokens are in different orders")
