"""Byte pairs: the published tables token by token, the part of them that captions use, and files
that cannot hurt."""

import functools
import hashlib
import json
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import run_python
from hypothesis import given, settings
from hypothesis import strategies as st

from capgen_utils.common.files import CapGenError, sha256_file, write_json
from capgen_utils.data.datasets import load_dataset
from capgen_utils.text.bpe import (
    FAMILIES,
    TABLES,
    BpeTokenizer,
    byte_symbols,
    require_published,
)
from capgen_utils.text.ptb import join_words, tokenise
from capgen_utils.text.vocabulary import tokenizer_from_json
from capgen_utils.text.words import WordTokenizer

BOTH = pytest.mark.parametrize("family", list(FAMILIES))
CAPTIONS = [
    "A brown dog runs through the tall grass .",
    "Two men in T-shirts are playing football , and a girl's watching them .",
    "They don't mind the rain; it's only 2 o'clock .",
    "The 22nd runner is wearing number 1,000 and a blue & white cap .",
    "Skateboarders at the skatepark .",
]
UNSEEN = [
    "a zebra photographs 3 photographers",
    "Ångström naïve façade",
    "犬が走る",
    "एक कुत्ता दौड़ रहा है",
    "",
    "x" * 300,
    "🐕\u200d🦺 runs 👩\u200d👩\u200d👧",
    "I've, you'll, we're, he'd, I'm, can't, 'tis, rock'n'roll",
    "</w> <|end|>",
    "  many   spaces\tand\nlines  ",
]
# What a tokenizer has to get right, more often than random characters show it.
PIECES = [
    "dog",
    " ",
    "  ",
    "'s",
    "n't",
    "'LL",
    "2024",
    "1/2",
    "é",
    "e\u0301",
    "İ",
    "J\u030c",
    "ß",
    "犬",
    "🐕",
    "\n",
    "\x00",
    "\u00a0",
    "\u200d",
    "!?",
    "...",
    "</w>",
    "-",
    "ﬁ",
    "\U0010ffff",
    "²",
]
TEXTS = st.one_of(st.text(max_size=40), st.lists(st.sampled_from(PIECES), max_size=12).map("".join))


@functools.cache
def full(family: str, clean: bool = True) -> BpeTokenizer:
    return BpeTokenizer.full(family, clean=clean)


@functools.cache
def trimmed(family: str, clean: bool = True) -> BpeTokenizer:
    return BpeTokenizer.fit(CAPTIONS, family, clean=clean)


@functools.cache
def theirs(family: str) -> Any:
    """Return transformers' own tokenizer of the published table."""
    from capgen_utils.common.hub import import_torchvision

    import_torchvision()
    from transformers import CLIPTokenizerFast, GPT2TokenizerFast

    vocabulary = {token: i for i, token in enumerate(full(family).tokens)}
    kind, more = (
        (CLIPTokenizerFast, {})
        if family == "clip"
        else (GPT2TokenizerFast, {"add_prefix_space": True})
    )
    return kind(vocab=vocabulary, merges=FAMILIES[family].merges, **more)


def their_ids(family: str, text: str) -> list[int]:
    ids = theirs(family)(text)["input_ids"]
    return list(ids[1:-1] if family == "clip" else ids)


def strings(tokenizer: BpeTokenizer, text: str) -> list[str]:
    return [tokenizer.tokens[row] for row in tokenizer.encode(text)]


def squeeze(text: str) -> str:
    return "".join(text.split())


# --- the published tables


def test_the_tables_have_their_published_sizes_and_special_ids() -> None:
    clip, gpt2 = full("clip"), full("gpt2")
    assert (len(clip), clip.start_id, clip.end_id) == (49_408, 49_406, 49_407)
    assert (len(gpt2), gpt2.start_id, gpt2.end_id) == (50_257, 50_256, 50_256)
    for tokenizer in (clip, gpt2):
        assert tokenizer.original_ids == list(range(len(tokenizer)))
        assert tokenizer.tokens[tokenizer.pad_id] == byte_symbols()[0xFF]
        assert tokenizer.pad_id not in (tokenizer.start_id, tokenizer.end_id)
        assert (
            tokenizer.pad_id in tokenizer.banned_ids
            and tokenizer.end_id not in tokenizer.banned_ids
        )
    assert clip.start_id in clip.banned_ids


@BOTH
def test_the_shipped_tables_are_the_published_files(family: str) -> None:
    published = {
        "clip": "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a",
        "gpt2": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    }
    assert sha256_file(TABLES / FAMILIES[family].file) == published[family]
    assert "Permission is hereby granted" in (TABLES / f"LICENSE.{family}").read_text()


def test_gpt2_numbers_its_tokens_as_published() -> None:
    by_id = "\n".join(full("gpt2").tokens).encode()  # of the published encoder.json
    published = "e35a33a0b2250c932ffdafc4c3a3552aef0cc7af7a11e9ebfddf1d2a6517371f"
    assert hashlib.sha256(by_id).hexdigest() == published


@BOTH
def test_well_known_ids(family: str) -> None:
    known = {  # as the models' own documentation prints them
        "clip": ("a photo of a cat", [49406, 320, 1125, 539, 320, 2368, 49407]),
        "gpt2": ("Hello world", [50256, 18435, 995, 50256]),
    }
    text, ids = known[family]
    assert full(family, False).encode(text) == ids


@BOTH
@pytest.mark.parametrize("text", CAPTIONS + UNSEEN)
def test_the_same_ids_as_the_library(family: str, text: str) -> None:
    assert full(family, False).encode(text)[1:-1] == their_ids(family, text)


@BOTH
@settings(max_examples=150, deadline=None)
@given(text=TEXTS)
def test_the_same_ids_as_the_library_on_any_text(family: str, text: str) -> None:
    assert full(family, False).encode(text)[1:-1] == their_ids(family, text)


@BOTH
def test_the_first_word_gets_the_token_that_it_has_inside_a_sentence(family: str) -> None:
    for tokenizer in (full(family), trimmed(family)):
        first, second = tokenizer.encode("dog dog")[1:-1]
        assert first == second


# --- text comes back


@BOTH
@pytest.mark.parametrize("clean", [True, False])
@settings(max_examples=100, deadline=None)
@given(text=TEXTS)
def test_no_character_is_lost(family: str, clean: bool, text: str) -> None:
    for tokenizer in (full(family, clean), trimmed(family, clean)):
        ids = tokenizer.encode(text)
        assert ids[0] == tokenizer.start_id and ids[-1] == tokenizer.end_id
        assert not {tokenizer.pad_id, tokenizer.start_id, tokenizer.end_id} & set(ids[1:-1])
        assert not set(tokenizer.banned_ids) & set(ids[1:-1])
        decoded, kept = tokenizer.decode(ids), tokenizer.normalise(text)
        if family == "gpt2":
            assert decoded == kept.strip()
        assert squeeze(decoded) == squeeze(kept)
        assert len(tokenizer.words(ids)) == len(ids) - 2 and all(tokenizer.words(ids))


@settings(max_examples=100, deadline=None)
@given(text=st.text(string.printable, max_size=40))
def test_what_clip_wrote_is_encoded_into_the_same_tokens(text: str) -> None:
    once = full("clip", False).encode(text)
    assert full("clip", False).encode(full("clip", False).decode(once)) == once


@BOTH
@pytest.mark.parametrize(
    "caption",
    [
        "they don't know it's a girl's t-shirt",
        "a jump at 5.30 o'clock",
        "the 22nd of 1,000 runners",
        "a black & white dog",
        "both and/or neither",
        "the 1960s in the u.s",
        "we're sure i'd say they've and you'll",
        "a black-and-white mr. potato head",
        "they can't say where it isn't",
        "a sign of flickr.com ( red )",
    ],
)
def test_captions_are_written_as_people_write_them(family: str, caption: str) -> None:
    assert join_words(tokenise(caption)) == caption
    for tokenizer in (full(family), trimmed(family)):
        assert tokenizer.decode(tokenizer.encode(caption)) == caption


def test_text_as_it_is_keeps_its_punctuation() -> None:
    text = "A dog, running: it doesn't stop!"
    assert full("gpt2", False).decode(full("gpt2", False).encode(text)) == text
    assert (
        full("clip", False).decode(full("clip", False).encode(text))
        == "a dog , running : it doesn't stop !"
    )
    for family in FAMILIES:
        assert full(family).decode(full(family).encode(text)) == "a dog running it doesn't stop"


@BOTH
def test_a_caption_cannot_spell_a_special_token(family: str) -> None:
    text = "<|startoftext|> <|endoftext|> <|ENDOFTEXT|> ÿ ÿÿ"
    for clean in (True, False):
        tokenizer = full(family, clean)
        inside = tokenizer.encode(text)[1:-1]
        assert inside and not {tokenizer.start_id, tokenizer.end_id, tokenizer.pad_id} & set(inside)
        assert "endoftext" in tokenizer.decode([tokenizer.start_id, *inside, tokenizer.end_id])


@BOTH
def test_half_a_character_is_no_text_and_no_error(family: str) -> None:
    tokenizer = full(family, False)
    assert tokenizer.decode(tokenizer.encode("dog \ud83d dog")) == "dog ? dog"
    part = next(row for row, token in enumerate(tokenizer.tokens) if token == byte_symbols()[0xE7])
    assert tokenizer.decode([tokenizer.start_id, part, tokenizer.end_id]) == "\ufffd"
    assert tokenizer.words([part]) == ["\\xe7"]


@BOTH
@pytest.mark.parametrize("length", [2, 3, 5, 8, 100])
def test_a_long_caption_loses_tokens_never_its_end(family: str, length: int) -> None:
    tokenizer = trimmed(family)
    whole = tokenizer.encode("a dog runs in the grass")
    ids = tokenizer.encode("a dog runs in the grass", length)
    assert ids == [*whole[: min(length, len(whole)) - 1], tokenizer.end_id]


@BOTH
def test_decoding_passes_over_start_and_padding_and_stops_at_the_end(family: str) -> None:
    tokenizer = trimmed(family)
    start, end, pad = tokenizer.start_id, tokenizer.end_id, tokenizer.pad_id
    a, dog = tokenizer.encode("a dog")[1:-1]
    for ids in (
        [a, dog],
        [start, a, dog],
        [pad, start, a, pad, dog, pad],
        [a, dog, end, a],
        [start, a, dog, end, pad, a],
    ):
        assert tokenizer.decode(ids) == "a dog"
        assert tokenizer.decode(torch.tensor(ids)) == "a dog"
    assert tokenizer.decode([]) == tokenizer.decode([start]) == tokenizer.decode([start, end]) == ""
    assert tokenizer.words([start, a, pad, dog, end]) == ["a", "dog"]


# --- the part that captions use


@BOTH
def test_a_trimmed_table_is_a_part_of_the_published_one_in_its_order(family: str) -> None:
    whole, part = full(family), trimmed(family)
    assert part.tokens == [whole.tokens[i] for i in part.original_ids]
    assert part.original_ids == sorted(set(part.original_ids)) and len(part) < 700
    assert set(FAMILIES[family].singles) <= set(part.tokens)
    assert part.tokens[part.end_id] == whole.tokens[whole.end_id]
    assert part.tokens[part.start_id] == whole.tokens[whole.start_id]
    assert part.tokens[part.pad_id] == whole.tokens[whole.pad_id]
    used = {token for caption in CAPTIONS for token in strings(whole, caption)}
    assert set(part.tokens) == used | set(FAMILIES[family].singles) | set(FAMILIES[family].specials)


@BOTH
@pytest.mark.parametrize("clean", [True, False])
def test_other_merges_may_go_without_changing_the_training_captions(
    family: str, clean: bool
) -> None:
    whole, part = full(family, clean), trimmed(family, clean)
    assert len(part.merges) < 0.01 * len(whole.merges)
    for caption in CAPTIONS:
        assert strings(part, caption) == strings(whole, caption)


@BOTH
@settings(max_examples=25, deadline=None)
@given(captions=st.lists(TEXTS, min_size=1, max_size=8))
def test_any_training_captions_keep_their_tokens(family: str, captions: list[str]) -> None:
    whole = full(family, False)
    part = whole.trimmed([*captions, "dog"])
    again = part.trimmed([*captions, "dog"])
    assert again.to_json() == part.to_json()
    for caption in captions:
        assert strings(part, caption) == strings(whole, caption)


@BOTH
def test_a_word_that_was_not_kept_is_written_in_smaller_tokens(family: str) -> None:
    part = BpeTokenizer.fit(["unhappily"], family)
    assert strings(part, "unhappily") == strings(full(family), "unhappily")
    inside = part.encode("zebra")[1:-1]
    assert len(inside) > 1 and part.decode(inside) == "zebra"
    passed = {first + second for first, second in part.merges} - set(part.tokens)
    assert passed, "merges pass through tokens that no caption uses"
    for (
        token
    ) in passed:  # a word that is cut there is undone rather than given an id that has no row
        word = token.removeprefix(byte_symbols()[ord(" ")]).removesuffix("</w>")
        ids = part.encode(word)
        assert max(ids) < len(part) and part.decode(ids) == word


@BOTH
def test_captions_without_text_are_refused(family: str) -> None:
    for captions in ([], ["", " . , "]):
        with pytest.raises(CapGenError, match="no text"):
            full(family).trimmed(captions)


def test_an_unknown_family_is_refused() -> None:
    for family in ("bert", "", None, ["clip"]):
        with pytest.raises(CapGenError, match="clip, gpt2"):
            BpeTokenizer.full(family)  # type: ignore[arg-type]


# --- tokenizer.json

REBUILD = """
import json, sys
from capgen_utils.text.vocabulary import tokenizer_from_json
tokenizer = tokenizer_from_json(json.load(open(sys.argv[1])))
texts = json.load(open(sys.argv[2]))
ids = [tokenizer.encode(text) for text in texts]
texts = [tokenizer.decode(i) for i in ids]
print(json.dumps([ids, texts, list(tokenizer.banned_ids), tokenizer.clean]))
"""


@BOTH
def test_the_file_is_enough_for_a_new_process(family: str, tmp_path: Path) -> None:
    tokenizer = trimmed(family, clean=family == "clip")
    write_json(tmp_path / "tokenizer.json", tokenizer.to_json())
    write_json(tmp_path / "texts.json", CAPTIONS + UNSEEN)
    arguments = ("-c", REBUILD, str(tmp_path / "tokenizer.json"), str(tmp_path / "texts.json"))
    done = run_python(*arguments, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "empty"))
    assert done.returncode == 0, done.stderr
    ids = [tokenizer.encode(text) for text in CAPTIONS + UNSEEN]
    expected = [
        ids,
        [tokenizer.decode(i) for i in ids],
        list(tokenizer.banned_ids),
        tokenizer.clean,
    ]
    assert json.loads(done.stdout) == expected


@BOTH
def test_whole_tables_come_back_too(family: str) -> None:
    again = tokenizer_from_json(json.loads(json.dumps(full(family).to_json())))
    assert isinstance(again, BpeTokenizer)
    assert again.to_json() == full(family).to_json() and again.encode(CAPTIONS[1]) == full(
        family
    ).encode(CAPTIONS[1])


def test_both_kinds_are_known() -> None:
    assert isinstance(tokenizer_from_json(WordTokenizer(["a"]).to_json()), WordTokenizer)
    assert isinstance(tokenizer_from_json(trimmed("gpt2").to_json()), BpeTokenizer)


def _set(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda data: data.__setitem__(key, value)


def _swap(key: str, first: int, second: int) -> Callable[[dict[str, Any]], None]:
    def swap(data: dict[str, Any]) -> None:
        data[key][first], data[key][second] = data[key][second], data[key][first]

    return swap


def _long(data: dict[str, Any]) -> None:
    """Merges that double a token: ten lines of JSON, a token of a thousand characters."""
    token, size = "a", len(FAMILIES["gpt2"].singles)
    doubled = []
    for i in range(10):
        doubled.append(f"{token} {token}")
        token += token
        data["tokens"].insert(size + i, token)
        data["original_ids"].insert(size + i, size + i)
    data["merges"] = doubled
    data["tokens"][size + 10 : -1], data["original_ids"][size + 10 : -1] = [], []


HOSTILE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no family": lambda d: d.pop("family"),
    "other family": _set("family", "clip"),
    "unknown family": _set("family", "bert"),
    "family is a list": _set("family", ["gpt2"]),
    "no clean": lambda d: d.pop("clean"),
    "clean is a number": _set("clean", 1),
    "no tokens": lambda d: d.pop("tokens"),
    "tokens are text": _set("tokens", "abc"),
    "tokens are numbers": lambda d: d["tokens"].__setitem__(300, 5),
    "tokens are empty": lambda d: d.update(tokens=[], original_ids=[], merges=[]),
    "no ids": lambda d: d.pop("original_ids"),
    "ids are text": lambda d: d["original_ids"].__setitem__(300, "300"),
    "ids are fractions": lambda d: d["original_ids"].__setitem__(300, 300.5),
    "ids are truth values": lambda d: d["original_ids"].__setitem__(1, True),
    "one id too few": lambda d: d["original_ids"].pop(),
    "an id twice": lambda d: d["original_ids"].__setitem__(300, d["original_ids"][299]),
    "ids fall": _swap("original_ids", 300, 301),
    "a negative id": lambda d: d["original_ids"].__setitem__(0, -1),
    "an id beyond the table": lambda d: d["original_ids"].__setitem__(-1, 10**9),
    "a token twice": lambda d: d["tokens"].__setitem__(300, d["tokens"][299]),
    "tokens in another order": _swap("tokens", 300, 301),
    "no byte 0xFF": lambda d: (d["tokens"].remove("ÿ"), d["original_ids"].remove(187)),
    "no end token": lambda d: (d["tokens"].pop(), d["original_ids"].pop()),
    "the end token in between": _swap("tokens", 300, -1),
    "an invented token": lambda d: d["tokens"].__setitem__(300, "invented"),
    "a special token of its own": lambda d: d["tokens"].__setitem__(300, "<|startoftext|>"),
    "no merges": lambda d: d.pop("merges"),
    "merges are pairs": lambda d: d["merges"].__setitem__(0, ["a", "b"]),
    "a merge of one": lambda d: d["merges"].__setitem__(0, "ab"),
    "a merge of three": lambda d: d["merges"].__setitem__(0, "a b c"),
    "a merge of nothing": lambda d: d["merges"].__setitem__(0, " a"),
    "a merge of unknown tokens": lambda d: d["merges"].append("foo bar"),
    "a merge that leads nowhere": lambda d: d["merges"].append("q x"),
    "a merge twice": lambda d: d["merges"].append(d["merges"][0]),
    "a merge is missing": lambda d: d["merges"].pop(),
    "merges in another order": lambda d: d["merges"].reverse(),
    "half a surrogate pair": lambda d: d["merges"].append("\ud800 a"),
    "absurd length": _set("tokens", [str(i) for i in range(60_000)]),
    "absurd ids": lambda d: d.update(
        tokens=d["tokens"] + ["x"] * 10**5, original_ids=list(range(10**5))
    ),
    "absurd merges": lambda d: d.update(merges=["a b"] * 60_000),
    "tokens that double": _long,
}


@pytest.mark.parametrize("damage", HOSTILE.values(), ids=HOSTILE)
def test_a_file_that_is_no_tokenizer_is_refused(damage: Callable[[dict[str, Any]], Any]) -> None:
    data = json.loads(json.dumps(trimmed("gpt2").to_json()))
    tokenizer_from_json(data)
    damage(data)
    with pytest.raises(CapGenError):
        tokenizer_from_json(data)


# --- the tables of a model folder


def write_hub_layout(folder: Path, family: str) -> Path:
    """Write the table as hub models hold it."""
    folder.mkdir(parents=True, exist_ok=True)
    merges = FAMILIES[family].merges
    ids = {token: i for i, token in enumerate(FAMILIES[family].tokens)}
    (folder / "vocab.json").write_text(json.dumps(ids), encoding="utf-8")
    lines = ["#version: 0.2", *map(" ".join, merges), ""]
    (folder / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    return folder


@BOTH
def test_a_folder_in_the_hubs_layout(family: str, tmp_path: Path) -> None:
    folder = write_hub_layout(tmp_path / "model", family)
    assert BpeTokenizer.full(family, folder).tokens == full(family).tokens


@BOTH
def test_the_library_reads_the_same_folder_and_what_it_saves_is_read_here(
    family: str, tmp_path: Path
) -> None:
    folder = write_hub_layout(tmp_path / "model", family)
    library = type(theirs(family)).from_pretrained(folder)
    text = "A dog's 22 photographs, 犬 and 🐕."
    space = "" if family == "clip" else " "
    ids = library(space + text, add_special_tokens=False)["input_ids"]
    assert ids == full(family, False).encode(text)[1:-1]
    library.save_pretrained(tmp_path / "saved")
    require_published(FAMILIES[family], tmp_path / "saved")


def _rewrite(name: str, change: Callable[[str], str]) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        path = folder / name
        path.write_text(change(path.read_text(encoding="utf-8")), encoding="utf-8")

    return rewrite


@pytest.mark.parametrize(
    "damage",
    [
        _rewrite("merges.txt", lambda text: text.replace("Ġ t\nĠ a\n", "Ġ a\nĠ t\n")),
        _rewrite("merges.txt", lambda text: text[: len(text) // 2]),
        _rewrite("merges.txt", lambda text: ""),
        _rewrite("merges.txt", lambda text: text + "Ġa Ġdog\n" * 10**6 * 3),
        _rewrite(
            "vocab.json",
            lambda text: text.replace('"!": 0', '"!": 1').replace('"\\"": 1', '"\\"": 0'),
        ),
        _rewrite("vocab.json", lambda text: text[:1000]),
        _rewrite("vocab.json", lambda text: "[" * 10**6),
        _rewrite("vocab.json", lambda text: "[1, 2]"),
        lambda folder: (folder / "merges.txt").write_bytes(b"\xff\xfe\x00"),
    ],
)
def test_anything_but_the_published_table_is_refused(
    damage: Callable[[Path], Any], tmp_path: Path
) -> None:
    folder = write_hub_layout(tmp_path, "gpt2")
    damage(folder)
    with pytest.raises(CapGenError):
        require_published(FAMILIES["gpt2"], folder)


@pytest.mark.parametrize("value", ["[]", '{"model": []}', '{"model": {"merges": [["a"], 5, {}]}}'])
def test_a_tokenizer_file_without_the_table_is_refused(value: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(value)
    with pytest.raises(CapGenError):
        require_published(FAMILIES["gpt2"], tmp_path)


def test_the_table_of_the_other_family_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CapGenError, match="does not hold the table that CLIP was published with"):
        require_published(FAMILIES["clip"], write_hub_layout(tmp_path, "gpt2"))


def test_a_folder_without_a_table_is_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(CapGenError, match="CapGen has it"):
            require_published(FAMILIES["gpt2"], folder)


# --- the real captions


@pytest.mark.flickr8k
@BOTH
def test_flickr8k_uses_a_small_part_of_the_tables_and_loses_nothing(
    family: str, flickr8k: Path
) -> None:
    manifest = load_dataset("flickr8k", flickr8k)
    captions = [caption for item in manifest.split("train").items for caption in item.captions]
    assert len(full(family, False).trimmed(captions)) == {"clip": 7_660, "gpt2": 7_688}[family], (
        "of captions as they are"
    )
    whole = full(family)
    part = whole.trimmed(captions)
    assert len(part) == pytest.approx({"clip": 7_660, "gpt2": 7_060}[family], abs=20), (
        "of their words"
    )
    changed = 0
    for caption in captions:
        assert strings(part, caption) == strings(whole, caption)
        changed += part.decode(part.encode(caption)) != join_words(tokenise(caption))
    assert changed <= {"clip": 10, "gpt2": 0}[family], "CLIP's tokens of 4x4 are those of 4 x 4"
    for item in manifest.split("dev").items:
        for caption in item.captions:
            assert squeeze(part.decode(part.encode(caption))) == squeeze(part.normalise(caption))
