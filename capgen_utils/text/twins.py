"""False twins of captions: two colours swapped, or a relation reversed (notebook 06).

A caption and its twin hold almost the same words, so a model can only tell them apart if it binds
words to positions and objects: "a red circle left of a blue square" and "a blue circle left of a
red square". They serve as hard negatives in training and evaluation (arXiv 2210.01936).
"""

from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import NamedTuple

import regex

COLOURS = frozenset(
    (
        "red",
        "orange",
        "yellow",
        "green",
        "cyan",
        "turquoise",
        "teal",
        "blue",
        "purple",
        "violet",
        "pink",
        "brown",
        "tan",
        "beige",
        "black",
        "white",
        "grey",
        "gray",
        "golden",
        "silver",
        "maroon",
    )
)

_OPPOSITES = (
    ("left", "right"),
    ("above", "below"),
    ("over", "under"),
    ("inside", "outside"),
    ("top", "bottom"),
    ("into", "out of"),
    ("in front of", "behind"),
    ("up", "down"),
    ("indoors", "outdoors"),
    ("large", "small"),
    ("big", "little"),
    ("huge", "tiny"),
    ("young", "old"),
    ("wet", "dry"),
    ("empty", "full"),
    ("man", "woman"),
    ("men", "women"),
    ("boy", "girl"),
    ("boys", "girls"),
    ("two", "three"),
)

OPPOSITE = {a: b for pair in _OPPOSITES for a, b in (pair, pair[::-1])}
_PHRASES = "|".join(words for words in OPPOSITE if " " in words)
_WORD = regex.compile(rf"\b(?:{_PHRASES})\b|[\p{{L}}\p{{N}}]+(?:[-'][\p{{L}}]+)*", regex.IGNORECASE)
_ARTICLE = regex.compile(r"\b(a)n?(\s+)$", regex.IGNORECASE)

# After a colour these do not name an object, so it is unclear what has the colour.
_NO_OBJECT = frozenset(
    (
        "a",
        "an",
        "and",
        "are",
        "as",
        "at",
        "behind",
        "below",
        "by",
        "colored",
        "coloured",
        "for",
        "from",
        "has",
        "have",
        "holding",
        "in",
        "is",
        "it",
        "its",
        "of",
        "on",
        "or",
        "over",
        "that",
        "the",
        "this",
        "to",
        "under",
        "wearing",
        "while",
        "with",
    )
)

# Words with a second sense are replaced only if a word before or after them shows the first sense:
# "right next to" names no side, and in "all over" nothing is above.
_DETERMINERS = frozenset(("the", "a", "an", "his", "her", "its", "their", "this", "some"))

_SENSE: dict[str, tuple[frozenset[str], frozenset[str]]] = {
    "left": (
        frozenset(("the", "its", "his", "her", "their", "far")),
        frozenset(("of", "side", "hand", "foot", "leg", "corner", "edge")),
    ),
    "up": (frozenset(), _DETERMINERS),
    "over": (frozenset(), _DETERMINERS),
}

_SAME_SENSE = {"right": "left", "down": "up"}


class _Word(NamedTuple):
    """A word of a caption, in lower case, with its position."""

    text: str
    start: int
    end: int


def hard_negatives(caption: str) -> list[str]:
    """Return the false twins of ``caption``, each with one change; often the list is empty.

    - Two different colours are swapped if each describes an object of its own: not in "a black and
      white dog", and not in "a black dog and a brown dog", whose twin would mean the same. In
      another twin the two objects are swapped.
    - One word becomes its opposite: left and right, above and below, large and small, man and woman
      ...
    """
    words = [_Word(m.group().lower(), *m.span()) for m in _WORD.finditer(caption)]
    return list(dict.fromkeys([*_swapped(caption, words), *_reversed(caption, words)]))


def _swapped(caption: str, words: Sequence[_Word]) -> Iterator[str]:
    """Yield twins with two colours or two objects swapped."""
    objects = {}  # index of a colour -> the object after it, singular
    for index, (word, following) in enumerate(zip(words, words[1:], strict=False)):
        singular = following.text.removesuffix("s")
        adjacent = caption[word.end : following.start].isspace()
        is_object = not {following.text, singular} & (COLOURS | _NO_OBJECT)
        if word.text in COLOURS and adjacent and is_object:
            objects[index] = singular
    for i, j in combinations(objects, 2):
        if words[i].text == words[j].text or objects[i] == objects[j]:
            continue
        pairs = [(words[i], words[j])]
        if words[i + 1].text.endswith("s") == words[j + 1].text.endswith("s"):
            pairs.append((words[i + 1], words[j + 1]))  # "two black dogs" stay plural
        for first, second in pairs:
            yield _replace(caption, (first, second.text), (second, first.text))


def _reversed(caption: str, words: Sequence[_Word]) -> Iterator[str]:
    """Yield twins with one word replaced by its opposite."""
    texts = ["", *(word.text for word in words), ""]
    for word, before, after in zip(words, texts, texts[2:], strict=False):
        if word.text in OPPOSITE:
            senses = _SENSE.get(_SAME_SENSE.get(word.text, word.text))
            if senses is None or before in senses[0] or after in senses[1]:
                yield _replace(caption, (word, OPPOSITE[word.text]))


def _replace(caption: str, *changes: tuple[_Word, str]) -> str:
    """Return ``caption`` with words replaced; capitals stay, and "a" and "an" fit the new words."""
    # from the end, so that the positions before stay right
    for word, text in sorted(changes, key=lambda change: -change[0].start):
        before, after = caption[: word.start], caption[word.end :]
        if caption[word.start].isupper():
            text = text[0].upper() + text[1:]
        before = _ARTICLE.sub(r"\1n\2" if text[0].lower() in "aeiou" else r"\1\2", before)
        caption = before + text + after
    return caption
