"""From captions to token ids and back: one tokenisation for training and scoring, one interface for
vocabularies."""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from capgen_utils.common.files import CapGenError
from capgen_utils.text.ptb import join_words, tokenise


class Tokenizer(ABC):
    """What a captioner needs to know of a vocabulary.

    Attributes:
        kind: what ``tokenizer.json`` calls this sort of tokenizer.
        pad_id, start_id, end_id: ids of the special tokens. Padding differs from both others; start
            may equal end, where the model only knows a token between texts (GPT-2).
        banned_ids: ids that decoding never emits (padding, ``<unk>``, and start where it is not the
            end token).
    """

    kind: str
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
        """Return one string a token, special tokens left out: what an attention map is labelled
        with."""
        return [self.decode([i]) for i in ids if i not in (self.pad_id, self.start_id, self.end_id)]


class WordTokenizer(Tokenizer):
    """A vocabulary of whole words. ``<unk>`` stands for rare words while reading and is never
    generated."""

    kind = "word"
    specials = ("<pad>", "<start>", "<end>", "<unk>")

    def __init__(self, words: Sequence[str]) -> None:
        self.vocabulary = [*self.specials, *words]
        if len(set(self.vocabulary)) != len(self.vocabulary):
            raise CapGenError(
                "the vocabulary holds a word twice",
                "the tokenizer file is damaged: get the bundle again",
            )
        # Special tokens are not in it: a caption that spells one holds an unknown word.
        self._ids = {word: i for i, word in enumerate(words, len(self.specials))}
        self.pad_id, self.start_id, self.end_id, self.unk_id = range(len(self.specials))
        self.banned_ids = (self.pad_id, self.start_id, self.unk_id)

    @classmethod
    def fit(cls, captions: Iterable[str], min_count: int = 5) -> "WordTokenizer":
        """Build the vocabulary from training captions: every word that occurs ``min_count`` times
        or more.

        Words are sorted by falling frequency, then by spelling, so the ids do not depend on caption
        order.

        Raises:
            CapGenError: no word is frequent enough.
        """
        counts = Counter(word for caption in captions for word in tokenise(caption))
        kept = [
            (-n, word) for word, n in counts.items() if n >= min_count and word not in cls.specials
        ]
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

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "WordTokenizer":
        """Rebuild a vocabulary from ``to_json``.

        Raises:
            CapGenError: the words are none, or one stands twice.
        """
        words = value.get("words")
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise CapGenError(
                "tokenizer.json does not hold a list of words", "get the bundle again"
            )
        return cls(words)
