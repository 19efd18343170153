"""From captions to token ids and back: one tokenisation for training and scoring, one interface for vocabularies."""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import regex

from capgen_utils.files import CapGenError

# In the order of the alternatives: an ideograph or kana is a word by itself; a contraction's second half
# (n't, 's, 're …) is split off as the Penn Treebank does; hyphens, dots and apostrophes inside a word belong
# to it (t-shirt, u.s, o'clock), and so does a comma or a dot inside a number. Other punctuation is dropped.
_WORD = regex.compile(
    r"""[\p{Han}\p{Hiragana}\p{Katakana}]
      | \p{L}[\p{L}\p{M}]*?(?=n't\b)
      | n't\b
      | '(?:s|m|d|re|ve|ll)\b
      | \p{N}+(?:[.,]\p{N}+)*[\p{L}\p{M}]*
      | [\p{L}\p{M}\p{N}]+(?:(?:[-.&/](?=[\p{L}\p{N}])|'(?!(?:s|m|d|re|ve|ll)\b)(?=\p{L}))[\p{L}\p{M}\p{N}]+)*
    """,
    regex.VERBOSE,
)
_CJK_GAP = regex.compile(r"(?<=[\p{Han}\p{Hiragana}\p{Katakana}]) (?=[\p{Han}\p{Hiragana}\p{Katakana}])")


def tokenise(caption: str) -> list[str]:
    """Split a caption into lower-case words, punctuation dropped, contractions split ("it's" -> "it", "'s").

    The same function prepares training captions, hypotheses and references, so no score depends on how
    a caption happened to be punctuated.
    """
    return _WORD.findall(caption.lower().replace("\u2019", "'").replace("`", "'"))


def join_words(words: Sequence[str]) -> str:
    """Write words as a caption; what ``tokenise`` split off is attached again ("it", "'s" -> "it's")."""
    text = ""
    for word in words:
        text += word if not text or word.startswith("'") or word == "n't" else f" {word}"
    return _CJK_GAP.sub("", text)


class Tokenizer(ABC):
    """What a captioner needs to know of a vocabulary.

    Attributes:
        pad_id, start_id, end_id: ids of the special tokens; all different.
        banned_ids: ids that decoding never emits (padding, start, ``<unk>``).
    """

    pad_id: int
    start_id: int
    end_id: int
    banned_ids: tuple[int, ...]

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of tokens, special ones included."""

    @abstractmethod
    def encode(self, caption: str, max_length: int | None = None) -> list[int]:
        """Return ids with start and end token; a longer caption loses words, never its end token."""

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ``ids``; special tokens are left out and the end token ends it."""

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """Return what ``tokenizer.json`` of a bundle holds."""

    def words(self, ids: Iterable[int]) -> list[str]:
        """Return one string a token, special tokens left out: what an attention map is labelled with."""
        return [self.decode([i]) for i in ids if i not in (self.pad_id, self.start_id, self.end_id)]


class WordTokenizer(Tokenizer):
    """A vocabulary of whole words. ``<unk>`` stands for rare words while reading and is never generated."""

    kind = "word"
    specials = ("<pad>", "<start>", "<end>", "<unk>")

    def __init__(self, words: Sequence[str]) -> None:
        self.vocabulary = [*self.specials, *words]
        self._ids = {word: i for i, word in enumerate(self.vocabulary)}
        if len(self._ids) != len(self.vocabulary):
            raise CapGenError(
                "the vocabulary holds a word twice", "the tokenizer file is damaged: get the bundle again"
            )
        self.pad_id, self.start_id, self.end_id, self.unk_id = range(len(self.specials))
        self.banned_ids = (self.pad_id, self.start_id, self.unk_id)

    @classmethod
    def fit(cls, captions: Iterable[str], min_count: int = 5) -> "WordTokenizer":
        """Build the vocabulary from training captions: every word that occurs ``min_count`` times or more.

        Words are sorted by falling frequency, then by spelling, so the ids do not depend on caption order.

        Raises:
            CapGenError: no word is frequent enough.
        """
        counts = Counter(word for caption in captions for word in tokenise(caption))
        kept = [(-count, word) for word, count in counts.items() if count >= min_count]
        if not kept:
            raise CapGenError(
                f"no word occurs {min_count} times in the training captions",
                "lower min_count (--min-count), or check that the captions file is the right one",
            )
        return cls([word for _, word in sorted(kept)])

    def __len__(self) -> int:
        """Return the number of words and special tokens."""
        return len(self.vocabulary)

    def encode(self, caption: str, max_length: int | None = None) -> list[int]:
        """See ``Tokenizer.encode``; a word that is not in the vocabulary becomes ``<unk>``."""
        ids = [self._ids.get(word, self.unk_id) for word in tokenise(caption)]
        if max_length is not None:
            ids = ids[: max_length - 2]
        return [self.start_id, *ids, self.end_id]

    def decode(self, ids: Iterable[int]) -> str:
        """See ``Tokenizer.decode``."""
        words = []
        for i in ids:
            if i == self.end_id:
                break
            if i not in (self.pad_id, self.start_id):
                words.append(self.vocabulary[i])
        return join_words(words)

    def to_json(self) -> dict[str, Any]:
        """See ``Tokenizer.to_json``."""
        return {"kind": self.kind, "words": self.vocabulary[len(self.specials) :]}


def tokenizer_from_json(value: Any) -> Tokenizer:
    """Rebuild a tokenizer from ``Tokenizer.to_json``.

    Raises:
        CapGenError: not a tokenizer of this version.
    """
    words = value.get("words") if isinstance(value, dict) and value.get("kind") == WordTokenizer.kind else None
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise CapGenError("tokenizer.json is not a tokenizer that this version knows", "get the bundle again")
    return WordTokenizer(words)
