"""A vocabulary from the training captions, and a file that cannot hurt."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capgen_utils.common.files import CapGenError
from capgen_utils.text.ptb import join_words, tokenise
from capgen_utils.text.vocabulary import tokenizer_from_json
from capgen_utils.text.words import WordTokenizer

CAPTIONS = ["A dog runs .", "A dog , a cat .", "the dog sleeps"]


@settings(max_examples=300)
@given(st.text(max_size=60))
def test_any_text_is_read_and_written_again(text: str) -> None:
    words = tokenise(text)
    tokenizer = WordTokenizer(sorted(set(words)))
    ids = tokenizer.encode(text)
    assert ids[0] == tokenizer.start_id and ids[-1] == tokenizer.end_id
    assert len(ids) == len(words) + 2 and tokenizer.unk_id not in ids
    assert tokenizer.decode(ids) == join_words(words)


# --- the vocabulary


def test_rare_words_are_read_but_never_said() -> None:
    tokenizer = WordTokenizer.fit(CAPTIONS, min_count=2)
    assert tokenizer.vocabulary == ["<pad>", "<start>", "<end>", "<unk>", "a", "dog"]
    assert len(tokenizer) == 6
    ids = tokenizer.encode("A zebra dog")
    assert ids == [tokenizer.start_id, 4, tokenizer.unk_id, 5, tokenizer.end_id]
    assert tokenizer.decode(ids) == "a <unk> dog", "readable where it was read"
    assert set(tokenizer.banned_ids) == {tokenizer.pad_id, tokenizer.start_id, tokenizer.unk_id}
    assert tokenizer.end_id not in tokenizer.banned_ids


def test_the_order_of_captions_does_not_matter() -> None:
    assert (
        WordTokenizer.fit(CAPTIONS, 1).vocabulary
        == WordTokenizer.fit(reversed(CAPTIONS), 1).vocabulary
    )
    assert WordTokenizer.fit(CAPTIONS, 1).vocabulary[4:] == [
        "a",
        "dog",
        "cat",
        "runs",
        "sleeps",
        "the",
    ]


def test_special_tokens_are_all_different() -> None:
    tokenizer = WordTokenizer(["a"])
    assert len({tokenizer.pad_id, tokenizer.start_id, tokenizer.end_id, tokenizer.unk_id}) == 4


def test_a_caption_cannot_spell_a_special_token() -> None:
    tokenizer = WordTokenizer.fit(["a <end> <pad> <start> <unk>"], 1)
    assert tokenizer.vocabulary[4:] == ["a"]
    ids = tokenizer.encode("<start> <end> <pad>")
    assert ids == [tokenizer.start_id, *[tokenizer.unk_id] * 3, tokenizer.end_id]


@pytest.mark.parametrize("length", [2, 3, 5, 6, 50])
def test_a_long_caption_loses_words_never_its_end(length: int) -> None:
    tokenizer = WordTokenizer.fit(CAPTIONS, 1)
    ids = tokenizer.encode("a dog a cat", length)
    assert len(ids) == min(length, 6)
    assert ids[0] == tokenizer.start_id and ids[-1] == tokenizer.end_id
    assert tokenizer.end_id not in ids[:-1]


def test_decoding_stops_at_the_end_and_names_words() -> None:
    tokenizer = WordTokenizer.fit(CAPTIONS, 1)
    a, dog = (tokenizer.encode(word)[1] for word in ("a", "dog"))
    assert (
        tokenizer.decode([tokenizer.start_id, a, tokenizer.pad_id, dog, tokenizer.end_id, a])
        == "a dog"
    )
    assert tokenizer.words([tokenizer.start_id, a, dog, tokenizer.end_id]) == ["a", "dog"]


def test_no_word_is_frequent_enough() -> None:
    for captions, count in ((CAPTIONS, 100), ([], 1), ([". ,"], 1)):
        with pytest.raises(CapGenError, match="min_count"):
            WordTokenizer.fit(captions, count)


# --- the file


def test_the_file_gives_the_same_tokenizer_back() -> None:
    tokenizer = WordTokenizer.fit([*CAPTIONS, "犬が走る", "कुत्ता كلب"], 1)
    again = tokenizer_from_json(json.loads(json.dumps(tokenizer.to_json())))
    assert again.to_json() == tokenizer.to_json()
    assert again.encode("a dog 犬 كلب") == tokenizer.encode("a dog 犬 كلب")
    assert again.banned_ids == tokenizer.banned_ids


@pytest.mark.parametrize(
    "value",
    [
        None,
        [],
        "word",
        5,
        {},
        {"kind": "word"},
        {"kind": "bytes", "words": []},
        {"kind": "word", "words": "abc"},
        {"kind": "word", "words": [1]},
        {"kind": "word", "words": [None]},
        {"kind": "word", "words": {"a": 1}},
        {"kind": "word", "words": ["a", "a"]},
        {"kind": "word", "words": ["<end>"]},
        {"kind": ["word"], "words": []},
    ],
    ids=str,
)
def test_a_file_that_is_no_tokenizer_is_refused(value: Any) -> None:
    with pytest.raises(CapGenError):
        tokenizer_from_json(value)
