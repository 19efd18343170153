"""False twins of captions, made from their words alone: two colours swapped, a relation turned
round.

A caption and its twin hold almost the same words, so only who binds words to places and things can
tell them apart: "a red circle left of a blue square" and "a blue circle left of a red square". They
teach, and they measure (hard negatives as in arXiv 2210.01936).
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


# After a colour these name no thing, so nobody can say what has the colour.
_NO_THING = frozenset(
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


# Words with a second sense are turned round only where a word before or after them shows the first:
# in "right next to" there is no side, in "all over" nothing is above.
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
    """A word of a caption, in lower case, and where it stands."""

    text: str
    start: int
    end: int


def hard_negatives(caption: str) -> list[str]:
    """Return the false twins of ``caption``, each differing in one swap or one turn; often there
    are none.

    - Two different colours change places, where each stands before a thing of its own: not in "a
    black and white
      dog", and not in "a black dog and a brown dog", whose twin would say the same. And so do the
      two things.
    - One word becomes its opposite: left and right, above and below, large and small, man and woman
    ...
    """
    words = [_Word(m.group().lower(), *m.span()) for m in _WORD.finditer(caption)]
    return list(dict.fromkeys([*_swapped(caption, words), *_turned(caption, words)]))


def _swapped(caption: str, words: Sequence[_Word]) -> Iterator[str]:
    things = {}
    for place, (word, following) in enumerate(zip(words, words[1:], strict=False)):
        thing = following.text.removesuffix("s")
        apart = not caption[word.end : following.start].isspace()
        if (
            word.text in COLOURS
            and not apart
            and not {following.text, thing} & (COLOURS | _NO_THING)
        ):
            things[place] = thing
    for first, second in combinations(things, 2):
        if words[first].text == words[second].text or things[first] == things[second]:
            continue
        yield _exchanged(caption, words[first], words[second])
        one, two = words[first + 1], words[second + 1]
        if one.text.endswith("s") == two.text.endswith("s"):  # "two black dogs" stay plural
            yield _exchanged(caption, one, two)


def _exchanged(caption: str, one: _Word, two: _Word) -> str:
    return _replace(caption, (one, two.text), (two, one.text))


def _turned(caption: str, words: Sequence[_Word]) -> Iterator[str]:
    for place, word in enumerate(words):
        before = words[place - 1].text if place else ""
        after = words[place + 1].text if place + 1 < len(words) else ""
        if word.text in OPPOSITE and _is_meant(word.text, before, after):
            yield _replace(caption, (word, OPPOSITE[word.text]))


def _is_meant(word: str, before: str, after: str) -> bool:
    """Whether a word's neighbours show the sense that has the opposite."""
    shown_by = _SENSE.get(_SAME_SENSE.get(word, word))
    return shown_by is None or before in shown_by[0] or after in shown_by[1]


def _replace(caption: str, *changes: tuple[_Word, str]) -> str:
    """Return ``caption`` with other words in some places; capitals stay, and "a" and "an" fit the
    new words."""
    for word, text in sorted(
        changes, key=lambda change: -change[0].start
    ):  # from the end: the places before it stay right
        before, after = caption[: word.start], caption[word.end :]
        if caption[word.start].isupper():
            text = text[0].upper() + text[1:]
        before = _ARTICLE.sub(r"\1n\2" if text[0].lower() in "aeiou" else r"\1\2", before)
        caption = before + text + after
    return caption
