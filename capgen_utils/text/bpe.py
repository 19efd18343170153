"""CLIP's and GPT-2's byte-level byte-pair tokenizers, whole or trimmed (notebooks 06 and 07)."""

import functools
import gzip
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import regex
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers

from capgen_utils.common.files import CapGenError, read_json
from capgen_utils.text.ptb import join_words, tokenise
from capgen_utils.text.words import Tokenizer

TABLES = Path(__file__).parent / "tables"
MAX_BYTES = 20_000_000  # the largest published file holds 3 MB
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


Merge = tuple[str, str]


def byte_symbols() -> dict[int, str]:
    """Return the printable character that stands for each byte, in the order of the published ids.

    Bytes that Latin-1 prints stand for themselves. The others, in rising order, are written from
    U+0100 on.
    """
    printed = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1)]
    printed += range(ord("®"), ord("ÿ") + 1)
    others = sorted(set(range(256)) - set(printed))
    symbols = [*map(chr, printed), *(chr(256 + i) for i in range(len(others)))]
    return dict(zip([*printed, *others], symbols, strict=True))


@dataclass(frozen=True)
class Family:
    """A published byte-pair encoding (arXiv 1508.07909, on bytes as in the GPT-2 paper).

    The merges define the whole table: ids number the single symbols, then the merges by rank, then
    the special tokens.

    Attributes:
        title: used in messages.
        file: the merges in ``TABLES``; the file may hold unused ones at its end.
        size: number of merges.
        specials: the tokens before and after a text, by id. GPT-2 has only one, which separates
            documents.
        suffix: marks the last symbol of a word; empty if a leading space marks the first instead.
    """

    title: str
    file: str
    size: int
    specials: tuple[str, ...]
    suffix: str

    @functools.cached_property
    def merges(self) -> list[Merge]:
        """The merges by rank."""
        content = (TABLES / self.file).read_bytes()
        text = (gzip.decompress(content) if self.file.endswith(".gz") else content).decode()
        lines = text.split("\n")[1 : self.size + 1]  # without "#version"
        return [(first, second) for first, second in map(str.split, lines)]

    @functools.cached_property
    def singles(self) -> list[str]:
        """The tokens of one byte by id: without the suffix, then with it if there is one."""
        ends = ("", self.suffix) if self.suffix else ("",)
        return [symbol + end for end in ends for symbol in byte_symbols().values()]

    @functools.cached_property
    def tokens(self) -> list[str]:
        """All tokens by id."""
        return [*self.singles, *map("".join, self.merges), *self.specials]


FAMILIES = {
    "clip": Family("CLIP", "clip.txt.gz", 48_894, ("<|startoftext|>", "<|endoftext|>"), "</w>"),
    "gpt2": Family("GPT-2", "gpt2.bpe", 50_000, ("<|endoftext|>",), ""),
}


class BpeTokenizer(Tokenizer):
    """A published byte-pair table, or the part of it that the training captions use.

    The special tokens are the published ones. Padding is the token of the byte 0xFF, which no UTF-8
    text contains, so that it has a row of its own in the published embeddings. The special tokens
    and the tokens of single bytes are always kept, so any text can be encoded: a token that was
    not kept is split into the two tokens that it was merged from, and so on.

    Args:
        family: ``clip`` or ``gpt2``.
        original_ids: the published ids of the kept tokens, rising; by default all.
        clean: encode the words of ``tokenise`` rather than the raw text.

    Attributes:
        family, clean: see above.
        original_ids: row -> published id, by which rows of published embeddings are copied.
        tokens: the kept tokens in byte symbols; a model has one row for each.
        merges: by rank, those that lead to a kept token.

    Raises:
        CapGenError: there is no such family, or these are not the ids of such a table.
    """

    kind = "bpe"

    def __init__(
        self, family: str, original_ids: Iterable[int] | None = None, clean: bool = True
    ) -> None:
        if not isinstance(family, str) or family not in FAMILIES:
            raise CapGenError(
                f"there is no byte-pair family {family!r}", f"choose one of: {', '.join(FAMILIES)}"
            )
        self._table = table = FAMILIES[family]
        self.family, self.clean = family, bool(clean)
        every = range(len(table.tokens))
        self.original_ids = list(map(int, every if original_ids is None else original_ids))
        ids, always = set(self.original_ids), {*every[: len(table.singles)]}
        always |= {*every[-len(table.specials) :]}
        if self.original_ids != sorted(ids) or not always <= ids <= set(every):
            raise _damaged("ids do not rise, are unknown, or are missing")
        self.tokens = [table.tokens[i] for i in self.original_ids]
        self.merges = _needed(self.tokens, table.merges)
        rows = {token: row for row, token in enumerate(self.tokens)}
        symbols = byte_symbols()
        self.start_id, self.end_id = rows[table.specials[0]], rows[table.specials[-1]]
        self.pad_id = rows[symbols[PAD_BYTE]]
        banned = {rows[symbols[byte] + end] for byte in _NO_TEXT for end in ("", table.suffix)}
        banned |= {self.pad_id, self.start_id} - {self.end_id}
        self.banned_ids = tuple(sorted(banned))
        # token -> its row, or the rows of its parts if merges only pass through it
        self._rows = {token: [row] for token, row in rows.items() if token not in table.specials}
        for first, second in self.merges:
            self._rows.setdefault(first + second, self._rows[first] + self._rows[second])
        self._bpe = _library_tokenizer(table, self._rows, self.merges)
        byte_of = {symbol: byte for byte, symbol in symbols.items()}
        texts = ["" if t in table.specials else t.removesuffix(table.suffix) for t in self.tokens]
        self._bytes = [bytes(byte_of[symbol] for symbol in text) for text in texts]

    @classmethod
    def full(cls, family: str, folder: Path | None = None, clean: bool = True) -> "BpeTokenizer":
        """Return the whole published table: 49,408 tokens for ``clip``, 50,257 for ``gpt2``.

        Args:
            family: ``clip`` or ``gpt2``.
            folder: a model whose table must be the published one; see ``require_published``.
            clean: see ``BpeTokenizer``.

        Raises:
            CapGenError: there is no such family, or the folder holds another table.
        """
        tokenizer = cls(family, clean=clean)
        if folder is not None:
            require_published(FAMILIES[family], folder)
        return tokenizer

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
        always = {*range(len(self._table.singles)), self.start_id, self.end_id}
        ids = [self.original_ids[row] for row in sorted(used | always)]
        return BpeTokenizer(self.family, ids, self.clean)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "BpeTokenizer":
        """Rebuild a tokenizer from ``to_json``.

        Raises:
            CapGenError: the file holds anything but a part of a published table.
        """
        try:
            tokenizer = cls(value["family"], value["original_ids"], value["clean"])
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise _damaged(str(error)) from error
        # compared as text, because ``True == 1``
        if json.dumps(tokenizer.to_json(), sort_keys=True) != json.dumps(value, sort_keys=True):
            raise _damaged(f"its tokens or merges are not {tokenizer._table.title}'s")
        return tokenizer

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
        tokens = self._bpe.encode(self._text(caption), add_special_tokens=False).tokens
        rows = [row for token in tokens for row in self._rows[token]]
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


def _library_tokenizer(
    family: Family, known: Iterable[str], merges: Sequence[Merge]
) -> tokenizers.Tokenizer:
    """Return the library's tokenizer; it lacks the special tokens, so no caption can spell one."""
    vocabulary = {token: i for i, token in enumerate(known)}
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


def _damaged(problem: str) -> CapGenError:
    return CapGenError(
        f"this is no byte-pair tokenizer: {problem}",
        "the tokenizer file is damaged: get the bundle again",
    )


def require_published(family: Family, folder: Path) -> None:
    """Refuse a model's folder whose byte-pair table is not the published one.

    Args:
        family: the table.
        folder: in the hub's layout: merges.txt with vocab.json, or tokenizer.json.

    Raises:
        CapGenError: the folder holds no table, or another one.
    """
    paths = [folder / name for name in ("merges.txt", "vocab.json", "tokenizer.json")]
    merges, vocabulary, together = paths
    remedy = (
        f"use a folder with {family.title}'s own tokenizer files, or remove them: CapGen has it"
    )
    published = {token: i for i, token in enumerate(family.tokens)}
    try:
        if any(path.is_file() and path.stat().st_size > MAX_BYTES for path in paths):
            raise ValueError("a file is too large")
        if merges.is_file():
            lines: list[Any] = merges.read_text(encoding="utf-8").split("\n")
            lines = lines["#version" in lines[0] :]
            ids = read_json(vocabulary, remedy) if vocabulary.is_file() else published
        else:
            model = read_json(together, remedy)["model"]
            lines, ids = model["merges"], model.get("vocab", published)
        pairs = [tuple(m.split() if isinstance(m, str) else m) for m in lines[: family.size]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CapGenError(f"cannot read the tokenizer in {folder}: {error}", remedy) from error
    if pairs != family.merges or ids != published:
        raise CapGenError(
            f"{folder} does not hold the table that {family.title} was published with", remedy
        )
