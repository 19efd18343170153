"""Captions to words: equal to the COCO caption evaluation's, in every script, and back to text."""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest
from coco_reference import PIECES, generated_captions, need_reference, tokenise_by_reference
from hypothesis import given, settings
from hypothesis import strategies as st

from capgen_utils.data.reading import read_kaggle_captions
from capgen_utils.text.ptb import join_words, tokenise

# What the reference made of these captions: SHA-256 of all words, one caption a line.
GENERATED = (5_000, 8, "e4ab40f61a40ffa2b3a9278f0582e86fc098771806b79d1aaccafce95a2afee2")
FLICKR8K = (40_455, "d66a8335d27096582d29470bb96178f02c62ebabd20dff73869dbca43ce7c9d5")


def digest(rows: Iterable[Sequence[str]]) -> str:
    return hashlib.sha256("\n".join(" ".join(words) for words in rows).encode()).hexdigest()


@pytest.fixture
def captions(flickr8k: Path) -> list[str]:
    """Every usable caption of Flickr8k."""
    path = flickr8k / "captions.txt"
    if not path.is_file():
        pytest.skip("this copy of Flickr8k has its captions in another layout")
    return [caption for _, caption in read_kaggle_captions(path)]


# --- the reference


@pytest.mark.flickr8k
def test_every_caption_of_flickr8k_becomes_the_references_words(captions: list[str]) -> None:
    count, expected = FLICKR8K
    assert len(captions) == count
    assert digest(sorted(map(tokenise, captions))) == expected


@pytest.mark.flickr8k
def test_the_reference_says_the_same_of_flickr8k_now(captions: list[str], tmp_path: Path) -> None:
    need_reference()
    theirs = tokenise_by_reference(captions, tmp_path)
    assert [c for c, words in zip(captions, theirs, strict=True) if tokenise(c) != words] == []


def test_generated_strings_become_the_references_words() -> None:
    count, seed, expected = GENERATED
    assert digest(map(tokenise, generated_captions(count, seed))) == expected


def test_the_reference_says_the_same_of_other_generated_strings(tmp_path: Path) -> None:
    need_reference()
    strings = [*PIECES, *generated_captions(5_000, seed=1)]
    theirs = tokenise_by_reference(strings, tmp_path)
    assert [
        (s, tokenise(s), w) for s, w in zip(strings, theirs, strict=True) if tokenise(s) != w
    ] == []


# --- by hand: each of these is also what the reference makes of it


@pytest.mark.parametrize(
    ("caption", "words"),
    [
        ("A Dog, running!", "a dog running"),
        ("it's a man's dog; the dogs' ball", "it 's a man 's dog the dogs ball"),
        ("they don't, can\u2019t, shouldn't've", "they do n't ca n't should n't 've"),
        ("We cannot see her; Cannot be", "we can not see her can not be"),
        ("gonna gotta wanna 'tis", "gon na got ta wan na 't is"),
        ("cannot-do cannots cannot's", "cannot-do cannots cannot 's"),
        ("a t-shirt in the U.S.", "a t-shirt in the u.s."),
        ("Mr. Smith, Jr. in Washington D.C.", "mr. smith jr. in washington d.c."),
        ("the letter P. is big. The end.", "the letter p. is big the end"),
        ("U. Miami and I. The dog", "u. miami and i the dog"),
        ("an Ill. man is ill. No. 5, no. I said", "an ill. man is ill no. 5 no i said"),
        (
            "1,000 dogs at 5.30, 10-year-old 4x4 4-wheeler",
            "1,000 dogs at 5.30 10-year-old 4x4 4-wheeler",
        ),
        ("# 28 and #28 (7) & at&t AT&T", "# 28 and # 28 -lrb- 7 -rrb- & at & t at&t"),
        ("50% of $5, 5pm and 12:30pm", "50 % of $ 5 5pm and 12:30 pm"),
        ("o'clock rock'n'roll slip 'n' slide", "o'clock rock 'n' roll slip 'n' slide"),
        ("\"P.\" 'hello' ``x''", "p. hello x"),
        ("colour centre travelling grey", "colour centre travelling grey"),
        ("caf\xe9 \xbd \xa35", "caf\xe9 1/2 # 5"),
        ("wow!! what?! hm... -- yes", "wow !! what ?! hm yes"),
        ("<unk> <b> < 5", "<unk> <b> < 5"),
        ("a [b] {c} :)", "a -lsb- b -rsb- -lcb- c -rcb- :-rrb-"),
        ("-- . , ''", ""),
        ("", ""),
    ],
)
def test_english(caption: str, words: str) -> None:
    assert tokenise(caption) == words.split()


@pytest.mark.parametrize(
    ("caption", "words"),
    [
        ("犬が走る", ["犬", "が", "走", "る"]),
        ("एक कुत्ता दौड़ रहा है।", ["एक", "कुत्ता", "दौड़", "रहा", "है"]),
        ("كلبٌ يَجري على العُشب", ["كلبٌ", "يَجري", "على", "العُشب"]),
        ("Ein Mädchen läuft über die Straße", ["ein", "mädchen", "läuft", "über", "die", "straße"]),
        ("a 🐕 dog, a dog🐕", ["a", "dog", "a", "dog"]),
        ("a \u2764\ufe0f \x00 \u2028 dog", ["a", "\u2764", "dog"]),
        ("soft\xadhyphen \xad", ["softhyphen"]),
    ],
)
def test_other_scripts_and_signs(caption: str, words: list[str]) -> None:
    assert tokenise(caption) == words
    assert tokenise(join_words(words)) == words


# --- properties

MARKS = {"'", '"', "''", "``", "`", ".", "?", "!", ",", ":", ";", "-", "--", "..."}


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=60))
def test_any_text_gives_lower_case_words_without_spaces_or_plain_punctuation(text: str) -> None:
    words = tokenise(text)
    assert all(word and word not in MARKS and not any(c.isspace() for c in word) for word in words)
    assert all(word == word.lower() or word.lower() != word.lower().lower() for word in words)


@settings(deadline=None)
@given(st.lists(st.from_regex(r"[a-z]{2,8}", fullmatch=True), max_size=12), st.data())
def test_capitals_and_punctuation_change_nothing(words: list[str], data: st.DataObject) -> None:
    plain = [word for word in words if tokenise(word) == [word]]
    marks = data.draw(
        st.lists(
            st.sampled_from([",", ";", ":", " .", " !", "?", '"', " ..."]),
            min_size=len(plain),
            max_size=len(plain),
        )
    )
    capital = [word.capitalize() if i % 2 else word.upper() for i, word in enumerate(plain)]
    assert tokenise(" ".join(w + m for w, m in zip(capital, marks, strict=True))) == plain


@settings(deadline=None)
@given(
    st.lists(
        st.sampled_from([p for p in PIECES if not p.endswith(".") and not p.startswith("<")]),
        max_size=8,
    )
)
def test_words_do_not_depend_on_their_neighbours(pieces: list[str]) -> None:
    assert tokenise("  ".join(pieces)) == [word for piece in pieces for word in tokenise(piece)]


@pytest.mark.parametrize(
    "part", ["a", "a@", "<!", "<a b='", "a'", "1,", "x-", "(", "www.", "é", "犬", "&amp;"]
)
def test_a_hostile_string_takes_no_time_that_grows_with_its_square(part: str) -> None:
    assert len(tokenise(part * 20_000)) <= 80_000


# --- back to text


@pytest.mark.parametrize(
    "text",
    [
        "it's a dog",
        "they don't",
        "we've seen",
        "slip 'n' slide",
        "a t-shirt",
        "犬が走る",
        "a 4-wheeler # 5",
        "d.c. is big",
    ],
)
def test_words_are_written_as_people_write_them(text: str) -> None:
    assert join_words(tokenise(text)) == text


def test_brackets_are_written_as_brackets() -> None:
    assert join_words(tokenise("a dog (brown)")) == "a dog ( brown )"
    assert tokenise(join_words(tokenise("a dog (brown)"))) == tokenise("a dog (brown)")


JOINED = [p for p in PIECES if p.isalpha() and tokenise(p) == [p]] + [
    "'s",
    "n't",
    "'re",
    "1,000",
    "d.c.",
    "犬",
    "が",
    "über",
]


@settings(deadline=None)
@given(st.lists(st.sampled_from(JOINED), max_size=12))
def test_joined_words_are_the_same_words_again(words: list[str]) -> None:
    once = tokenise(join_words(words))
    assert tokenise(join_words(once)) == once
    if not any("'" in word for word in words):
        assert once == words
