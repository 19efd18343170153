"""The tokenizer interface, and the vocabulary of whole words (notebook 01)."""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import takewhile
from typing import Any

from capgen_utils.common.files import CapGenError
from capgen_utils.text.ptb import join_words, tokenise


class Tokenizer(ABC):
    """From captions to token ids and back.

    Attributes:
        kind: names this kind of tokenizer in ``tokenizer.json``.
        pad_id, start_id, end_id: ids of the special tokens. Padding differs from the other two.
            Start and end are the same token if the model only has one between texts (GPT-2).
        banned_ids: ids that decoding never generates: padding, ``<unk>``, and start unless it is
            the end token.
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
        """Return ids with start and end token; a caption that is too long loses its last words."""

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ``ids`` up to the end token, without special tokens."""

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """Return the content of a bundle's ``tokenizer.json``."""

    def words(self, ids: Iterable[int]) -> list[str]:
        """Return one string per token without the special ones, as labels of attention maps."""
        return [self.decode([i]) for i in ids if i not in (self.pad_id, self.start_id, self.end_id)]


class WordTokenizer(Tokenizer):
    """A vocabulary of whole words; ``<unk>`` replaces rare words and is never generated."""

    kind = "word"
    specials = ("<pad>", "<start>", "<end>", "<unk>")

    def __init__(self, words: Sequence[str]) -> None:
        self.vocabulary = [*self.specials, *words]
        if len(set(self.vocabulary)) != len(self.vocabulary):
            raise CapGenError(
                "a word occurs twice in the vocabulary",
                "the tokenizer file is damaged: get the bundle again",
            )
        # without the special tokens: a caption that spells one holds an unknown word
        self._ids = {word: i for i, word in enumerate(words, len(self.specials))}
        self.pad_id, self.start_id, self.end_id, self.unk_id = range(len(self.specials))
        self.banned_ids = (self.pad_id, self.start_id, self.unk_id)

    @classmethod
    def fit(cls, captions: Iterable[str], min_count: int = 5) -> "WordTokenizer":
        """Build the vocabulary from the words that occur at least ``min_count`` times.

        Words are sorted by falling frequency, then by spelling, so ids do not depend on the order
        of the captions.

        Raises:
            CapGenError: no word is frequent enough.
        """
        counts = Counter(word for caption in captions for word in tokenise(caption))
        frequent = {word for word, count in counts.items() if count >= min_count}
        kept = sorted(frequent - set(cls.specials), key=lambda word: (-counts[word], word))
        if not kept:
            raise CapGenError(
                f"no word occurs {min_count} times in the training captions",
                "lower min_count (--min-count), or check that the captions file is the right one",
            )
        return cls(kept)

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
        shown = takewhile(lambda i: i != self.end_id, ids)
        hidden = (self.pad_id, self.start_id)
        return join_words([self.vocabulary[i] for i in shown if i not in hidden])

    def to_json(self) -> dict[str, Any]:
        """See ``Tokenizer.to_json``."""
        return {"kind": self.kind, "words": self.vocabulary[len(self.specials) :]}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "WordTokenizer":
        """Rebuild a vocabulary from ``to_json``.

        Raises:
            CapGenError: there is no list of words, or a word occurs twice.
        """
        words = value.get("words")
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise CapGenError(
                "tokenizer.json does not hold a list of words", "get the bundle again"
            )
        return cls(words)
