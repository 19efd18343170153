"""CLIP's and GPT-2's byte-level byte-pair tokenizers, with the published table or the part of it
that captions use."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard, TypeVar

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

T = TypeVar("T")
GET_AGAIN = "the tokenizer file is damaged: get the bundle again"
LONGEST = 256  # characters of a token; the longest published one has 128
PAD_BYTE = 0xFF
_NO_TEXT = (0xC0, 0xC1, *range(0xF5, 0x100))  # bytes that no UTF-8 text contains
_CLIP_WORDS = tokenizers.Regex(r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+")


# Spaces that stand between CLIP's tokens but not in a text: in "don 't"; and inside the words of
# ``tokenise``.
_CONTRACTED = r"(?<=n)[ ](?='t(?:[ ]|$))"
_GAPS = regex.compile(_CONTRACTED)


_INNER_GAPS = regex.compile(
    rf"""{_CONTRACTED}
      | [ ](?=[-/'.](?:[ ]|$)) | (?<=(?:^|[ ])[-/'])[ ]  # t-shirt, and/or, o'clock; the period of mr.
      | (?<=\p{{N}})[ ](?=[,:][ ]\p{{N}}) | (?<=\p{{N}}[ ][.,:])[ ](?=\p{{N}})  # 1,000, 5.30
      | (?<=\p{{N}})[ ](?=\p{{N}}|(?:st|nd|rd|th|s)(?:[ ]|$))  # 22nd
      | (?<=(?:^|[ ])\p{{L}}[ ]\.)[ ](?=\p{{L}}(?:[ ]|$))  # u.s
      | (?<=[ ]\.)[ ](?=(?:com|net|org|edu)(?:[ ]|$))
    """,
    regex.VERBOSE,
)


class BpeTokenizer(Tokenizer):
    """A published byte-pair table, or the rows of it that the training captions use.

    The special tokens are the published ones. Padding is the token of the byte 0xFF, which no UTF-8
    text contains: an id of its own without a row that the published embeddings lack. Kept are at
    least the specials and all tokens
    of one byte, so any text can be encoded: a token that was not kept is undone into the two tokens
    that it was merged from, and so on, down to single bytes where need be.

    Args:
        family: ``clip`` or ``gpt2``.
        tokens: the kept tokens in the order of their published ids, written in byte symbols.
        original_ids: their published ids, rising.
        merges: by rank, those that lead to a kept token, each of which has exactly one.
        clean: encode the words of ``tokenise`` rather than the text as it is.

    Attributes:
        family: ``clip`` or ``gpt2``.
        clean: see above.
        tokens: see above; a model has one row for each.
        original_ids: row -> published id, which is what published embedding rows are copied by.
        merges: see above.

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
        self._family = find_family(family)
        _check_tokens(self._family, tokens, original_ids)
        _check_merges(self._family, tokens, original_ids, merges)
        self.family, self.clean = self._family.name, clean
        self.tokens, self.original_ids, self.merges = list(tokens), list(original_ids), list(merges)
        rows = {token: row for row, token in enumerate(tokens)}
        self.start_id, self.end_id = rows[self._family.start], rows[self._family.end]
        self.pad_id = rows[byte_symbols()[PAD_BYTE]]
        banned = {
            rows[byte_symbols()[byte] + end]
            for byte in _NO_TEXT
            for end in ("", self._family.suffix)
        }
        banned |= {self.pad_id, self.start_id} - {self.end_id}
        self.banned_ids = tuple(sorted(banned))
        self._undone = _undo(rows, merges)
        self._bpe = _build(self._family, rows, merges, list(self._undone))
        self._content = _content(self._family, tokens)

    @classmethod
    def full(
        cls, family: str, source: str | Path | None = None, clean: bool = True
    ) -> "BpeTokenizer":
        """Return the whole published table: 49,408 tokens for ``clip``, 50,257 for ``gpt2``.

        Args:
            family: ``clip`` or ``gpt2``.
            source: a folder or file, or the name of a hub model; see ``bpe_files.load_merges``.
            clean: see ``BpeTokenizer``.

        Raises:
            CapGenError: the table cannot be had, or is not the published one.
        """
        found = find_family(family)
        merges = load_merges(found, source)
        return cls(family, published_tokens(found, merges), range(found.size), merges, clean)

    @classmethod
    def fit(
        cls,
        captions: Iterable[str],
        family: str,
        source: str | Path | None = None,
        clean: bool = True,
    ) -> "BpeTokenizer":
        """Return the part of the published table that the training captions use; see ``full`` and
        ``trimmed``."""
        return cls.full(family, source, clean).trimmed(captions)

    def trimmed(self, captions: Iterable[str]) -> "BpeTokenizer":
        """Keep the tokens that occur in ``captions``, the specials and the single bytes, in the
        order of their ids.

        The captions are encoded into the same tokens as before. Other text may be cut into smaller
        ones.

        Raises:
            CapGenError: the captions hold no text.
        """
        used = {row for caption in captions for row in self.encode(caption)[1:-1]}
        if not used:
            raise CapGenError(
                "the training captions hold no text",
                "check that the captions file is the right one",
            )
        rows = sorted({*used, *range(len(self._family.singles)), self.start_id, self.end_id})
        tokens = [self.tokens[row] for row in rows]
        ids = [self.original_ids[row] for row in rows]
        return BpeTokenizer(self.family, tokens, ids, _needed(tokens, self.merges), self.clean)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "BpeTokenizer":
        """Rebuild a tokenizer from ``to_json``; nothing else is needed, neither hub nor package.

        Raises:
            CapGenError: wrong types, or values that do not fit together.
        """
        tokens, ids, merges = value.get("tokens"), value.get("original_ids"), value.get("merges")
        if not (_is_list(tokens, str) and _is_list(ids, int) and _is_list(merges, str)):
            raise _refuse("tokens, original_ids or merges are missing, or of the wrong type")
        if not isinstance(value.get("clean"), bool) or not isinstance(value.get("family"), str):
            raise _refuse("family or clean are missing, or of the wrong type")
        return cls(value["family"], tokens, ids, [_pair(line) for line in merges], value["clean"])

    def __len__(self) -> int:
        """Return the number of kept tokens, special ones included."""
        return len(self.tokens)

    def normalise(self, caption: str) -> str:
        """Return what is encoded of ``caption``: its words where ``clean``; CLIP lower-cases and
        composes (NFC)."""
        text = self._text(caption)
        return self._bpe.normalizer.normalize_str(text) if self._bpe.normalizer else text

    def _text(self, caption: str) -> str:
        text = caption.encode("utf-8", "replace").decode()  # half of a surrogate pair is no text
        return join_words(tokenise(text)) if self.clean else text

    def encode(self, caption: str, max_length: int | None = None) -> list[int]:
        """See ``Tokenizer.encode``; a longer caption loses tokens, so its last word may be cut."""
        rows: list[int] = []
        for i in self._bpe.encode(self._text(caption), add_special_tokens=False).ids:
            if i < len(self.tokens):
                rows.append(i)
            else:
                rows += self._undone[i]
        if max_length is not None:
            rows = rows[: max(max_length - 2, 0)]
        return [self.start_id, *rows, self.end_id]

    def decode(self, ids: Iterable[int]) -> str:
        """See ``Tokenizer.decode``; a start token that stands first is passed over, also where it
        equals the end.

        Bytes that are no UTF-8 become U+FFFD. GPT-2: text that was encoded comes back, but for
        outer spaces. CLIP's
        tokens do not say what was written together: contractions are attached again and, where
            ``clean``, the
        digits of numbers and the marks inside words; all else stands between spaces.
        """
        words, word = [], b""
        for row in self._text_rows(ids):
            content, ends = self._content[row]
            word += content
            if ends:
                words.append(word.decode("utf-8", "replace"))
                word = b""
        rest = word.decode("utf-8", "replace")
        if not self._family.suffix:
            return rest.strip()
        gaps = _INNER_GAPS if self.clean else _GAPS
        return join_words(gaps.sub("", " ".join([*words, rest] if rest else words)).split(" "))

    def _text_rows(self, ids: Iterable[int]) -> list[int]:
        rows = [row for row in map(int, ids) if row != self.pad_id]
        if rows and rows[0] == self.start_id:
            rows = rows[1:]
        if self.end_id in rows:
            rows = rows[: rows.index(self.end_id)]
        return [row for row in rows if row != self.start_id]

    def words(self, ids: Iterable[int]) -> list[str]:
        """See ``Tokenizer.words``; a byte that is only part of a character is written as ``\\xe7``."""
        specials = (self.pad_id, self.start_id, self.end_id)
        texts = (
            self._content[row][0].decode("utf-8", "backslashreplace")
            for row in ids
            if row not in specials
        )
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

    Each token has one merge, and its parts have lower ranks. So every merge that is applied to a
    text of these tokens is among them, and leaving out the others, which are not applied to it,
    changes nothing.
    """
    wanted, needed = set(tokens), []
    for first, second in reversed(merges):
        if first + second in wanted:
            wanted |= {first, second}
            needed.append((first, second))
    return needed[::-1]


def _undo(rows: Mapping[str, int], merges: Iterable[Merge]) -> dict[int, list[int]]:
    """Number the tokens that merges pass through but that were not kept, and say which rows stand
    for each."""
    parts = {token: [row] for token, row in rows.items()}
    undone: dict[int, list[int]] = {}
    for first, second in merges:
        if first + second not in parts:
            parts[first + second] = parts[first] + parts[second]
            undone[len(rows) + len(undone)] = parts[first + second]
    return undone


def _build(
    family: Family, rows: Mapping[str, int], merges: Sequence[Merge], numbers: Sequence[int]
) -> tokenizers.Tokenizer:
    """Return the library's tokenizer; special tokens are none of its business, so no caption can
    spell one."""
    passing = (token for token in map("".join, merges) if token not in rows)
    vocabulary = {token: row for token, row in rows.items() if token not in family.specials}
    vocabulary |= dict(zip(passing, numbers, strict=True))
    built = tokenizers.Tokenizer(
        models.BPE(vocab=vocabulary, merges=list(merges), end_of_word_suffix=family.suffix)
    )
    if not family.suffix:  # the first word gets the token that it has inside a sentence
        built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        return built
    space = normalizers.Replace(tokenizers.Regex(r"\s+"), " ")
    built.normalizer = normalizers.Sequence([normalizers.NFC(), space, normalizers.Lowercase()])
    words = pre_tokenizers.Split(_CLIP_WORDS, "removed", invert=True)
    built.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return built


def _content(family: Family, tokens: Iterable[str]) -> list[tuple[bytes, bool]]:
    """Return for each row its bytes, and whether a word ends with it."""
    byte_of = {symbol: byte for byte, symbol in byte_symbols().items()}
    content = []
    for token in tokens:
        ends = bool(family.suffix) and token.endswith(family.suffix)
        text = "" if token in family.specials else token.removesuffix(family.suffix)
        content.append((bytes(byte_of[symbol] for symbol in text), ends))
    return content


# --- values from a file


def _is_list(value: Any, kind: type[T]) -> TypeGuard[list[T]]:
    return isinstance(value, list) and all(
        type(item) is kind for item in value
    )  # True is no int here


def _pair(line: str) -> Merge:
    first, space, second = line.partition(" ")
    if not space or " " in second:
        raise _refuse(f"the merge {line[:LONGEST]!r} is not of two tokens")
    return first, second


def _refuse(problem: str) -> CapGenError:
    return CapGenError(f"this is no byte-pair tokenizer: {problem}", GET_AGAIN)


def _check_tokens(family: Family, tokens: Sequence[str], ids: Sequence[int]) -> None:
    """Refuse tokens that are not a part of the published table with its single bytes and specials."""
    if len(tokens) != len(ids) or len(tokens) > family.size:
        raise _refuse(f"{len(tokens)} tokens and {len(ids)} ids, of at most {family.size}")
    if len(set(tokens)) != len(tokens) or max(map(len, tokens), default=0) > LONGEST:
        raise _refuse("a token stands twice, or is longer than any")
    singles, specials = family.singles, family.specials
    published = [*range(len(singles)), *range(family.size - len(specials), family.size)]
    own = [*range(len(singles)), *range(len(tokens) - len(specials), len(tokens))]
    if len(tokens) < len(own) or [(tokens[row], ids[row]) for row in own] != list(
        zip([*singles, *specials], published, strict=True)
    ):
        raise _refuse("special tokens or single bytes are missing or misplaced")
    if any(first >= second for first, second in zip(ids, ids[1:], strict=False)):
        raise _refuse("the published ids do not rise")


def _check_merges(
    family: Family, tokens: Sequence[str], ids: Sequence[int], merges: Sequence[Merge]
) -> None:
    """Refuse merges that do not build exactly the tokens, each once, from parts that are there
    before it."""
    if len(merges) > family.merges:
        raise _refuse(f"{len(merges)} merges, of at most {family.merges}")
    known = set(family.singles)
    for first, second in merges:
        if first not in known or second not in known:
            raise _refuse(f"the merge {first!r} {second!r} uses an unknown token")
        if first + second in known or len(first + second) > LONGEST:
            raise _refuse(
                f"the merge {first!r} {second!r} builds a token twice, or one longer than any"
            )
        known.add(first + second)
    built = tokens[len(family.singles) : len(tokens) - len(family.specials)]
    if set(built) - known or len(_needed(built, merges)) != len(merges):
        raise _refuse("merges are missing, or lead to no token")
    kept = set(built)
    if [token for token in map("".join, merges) if token in kept] != list(built):
        raise _refuse("merges and tokens are in different orders")
