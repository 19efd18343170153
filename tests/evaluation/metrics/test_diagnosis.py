"""Faults of captions are named; diversity and originality by hand."""

from typing import Any

import pytest
from caption_helpers import NOUNS, proper

from capgen_utils.common.files import CapGenError
from capgen_utils.evaluation.baselines import human_choices
from capgen_utils.evaluation.metrics import (
    bleu,
    diagnose,
    diversity,
    mutual_bleu,
    originality,
)


def names(*arguments: Any, **more: Any) -> list[str]:
    return [finding.name for finding in diagnose(*arguments, **more)]


def test_healthy_captions_have_no_finding() -> None:
    said, _ = proper()
    assert diagnose(said, ended=dict.fromkeys(said, True), training=list(said.values())[:5]) == []
    assert diagnose({}) == [] and diagnose({"1": "a dog"}) == []


def test_a_collapse_is_found_whatever_the_punctuation() -> None:
    said, _ = proper()
    collapsed = {name: "A dog runs." if i % 2 else "a dog runs" for i, name in enumerate(said)}
    (finding,) = diagnose(collapsed)
    assert finding.name == "collapse" and finding.share == 100
    assert (
        "24 of 24" in finding.text and "a dog runs" in finding.text and "images" in finding.remedy
    )


def test_captions_without_an_end_are_found() -> None:
    said, _ = proper()
    assert names(said, ended={name: i > 3 for i, name in enumerate(said)}) == ["truncation"]
    cut = {name: caption.rpartition(" ")[0] for name, caption in said.items()}
    (finding,) = diagnose(cut)
    assert finding.name == "truncation" and finding.share == 100 and "beside the" in finding.text
    assert names(cut, ended=dict.fromkeys(said, True)) == [], (
        "what is known counts more than what it looks like"
    )


@pytest.mark.parametrize(
    "tail",
    ["dog dog", "and white and white", "on a big red on a big red", "the hill of a the hill of a"],
)
def test_loops_of_one_to_four_words_are_found(tail: str) -> None:
    said, _ = proper()
    looping = said | {name: f"{NOUNS[i]} {tail} x" for i, name in enumerate(list(said)[:3])}
    (finding,) = diagnose(looping)
    assert finding.name == "looping" and finding.share == pytest.approx(12.5)


def test_a_word_said_again_later_is_no_loop() -> None:
    said, _ = proper()
    assert names(said | dict.fromkeys(["0.jpg", "1.jpg"], "a black and white and black dog")) == []


def test_copying_is_found_only_where_training_captions_are_given() -> None:
    said, _ = proper()
    training = [caption.upper() + " ." for caption in said.values()]
    assert names(said) == []
    (finding,) = diagnose(said, training=training)
    assert finding.name == "copying" and finding.share == 100
    assert names(said, training=training[:8]) == []


def test_several_things_are_named_at_once() -> None:
    said, _ = proper()
    assert set(names(dict.fromkeys(said, "a a dog with the"), training=["a a dog with the"])) == {
        "collapse",
        "truncation",
        "looping",
        "copying",
    }


# --- diversity and originality


def test_diversity_by_hand() -> None:
    counted = diversity({"1": "A dog .", "2": "a dog", "3": "a <unk> cat"})
    assert counted == {
        "distinct": 2,
        "words_used": 4,
        "mean_length": pytest.approx(7 / 3),
        "unk": 1,
    }
    assert diversity({})["mean_length"] == 0


def test_originality_by_hand() -> None:
    said = {"1": "A red dog .", "2": "a red dog", "3": "a blue dog runs", "4": "a cat"}
    found = originality(said, ["a red dog", "The dog runs", "a blue car"])
    assert found["distinct_ratio"] == 75 and found["copied"] == 50
    assert found["novel_1"] == pytest.approx(100 / 12)  # cat
    assert found["novel_2"] == pytest.approx(100 * 2 / 8)  # blue dog, a cat
    assert found["novel_3"] == pytest.approx(100 * 2 / 4)
    assert found["novel_4"] == 100
    assert originality({}, ["a dog"])["copied"] == 0


def test_mutual_bleu_is_100_for_equal_samples_and_less_for_others() -> None:
    equal = {"1": ["a big red dog runs"] * 3, "2": ["two cats sit on it"] * 3}
    assert mutual_bleu(equal)["mBLEU-4"] == pytest.approx(100)
    various = {"1": ["a big red dog runs", "a big blue cat sits"], "2": ["two cats sit", "one dog"]}
    expected = [bleu(chosen, others)["BLEU-1"] for chosen, others in human_choices(various)]
    assert (
        mutual_bleu(various)["mBLEU-1"] == pytest.approx(sum(expected) / 2)
        and sum(expected) / 2 < 60
    )
    for wrong in ({}, {"1": ["a"]}, {"1": ["a", "b"], "2": ["a", "b", "c"]}):
        with pytest.raises(CapGenError, match="mBLEU"):
            mutual_bleu(wrong)
