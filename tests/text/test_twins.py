"""False twins: always false where scenes can tell, and none where words do not say enough."""

import random

import pytest

from capgen_utils.data import shapes
from capgen_utils.data.shapes import describe, is_true, make_scene
from capgen_utils.text import twins
from capgen_utils.text.twins import OPPOSITE, hard_negatives


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        (
            "a red circle left of a blue square",
            {
                "a blue circle left of a red square",
                "a red square left of a blue circle",
                "a red circle right of a blue square",
            },
        ),
        (
            "a small red circle with a large blue star below it, and there is a green square",
            {
                "a small blue circle with a large red star below it, and there is a green square",
                "a small green circle with a large blue star below it, and there is a red square",
                "a small red circle with a large green star below it, and there is a blue square",
                "a small red star with a large blue circle below it, and there is a green square",
                "a small red square with a large blue star below it, and there is a green circle",
                "a small red circle with a large blue square below it, and there is a green star",
                "a large red circle with a large blue star below it, and there is a green square",
                "a small red circle with a small blue star below it, and there is a green square",
                "a small red circle with a large blue star above it, and there is a green square",
            },
        ),
        (
            "A black dog bites a white cat .",
            {"A white dog bites a black cat .", "A black cat bites a white dog ."},
        ),
        (
            "Two black dogs and a white cat",
            {"Two white dogs and a black cat", "Three black dogs and a white cat"},
        ),
        (
            "An old man jumps into the water",
            {
                "A young man jumps into the water",
                "An old woman jumps into the water",
                "An old man jumps out of the water",
            },
        ),
        (
            "Two dogs in front of a house",
            {"Three dogs in front of a house", "Two dogs behind a house"},
        ),
        (
            "An orange hat and a blue shirt",
            {"A blue hat and an orange shirt", "An orange shirt and a blue hat"},
        ),
        ("the cat on the right", {"the cat on the left"}),
    ],
)
def test_twins_differ_in_one_swap_or_one_turn(caption: str, expected: set[str]) -> None:
    found = hard_negatives(caption)
    assert set(found) == expected and len(found) == len(expected)


@pytest.mark.parametrize(
    "caption",
    [
        "",
        "a dog runs",
        "a red circle",  # another colour might be true of another circle: nothing is guessed
        "a black and white dog",
        "a red, white and blue flag",
        "a black dog and a brown dog",  # swapped, it says the same
        "black dogs and a brown dog",
        "the dog is black and the cat is white",
        "a dog is right next to a cat",
        "a child left alone",
        "hair all over",
        "dogs look over there",
        "a woman's redwood mantle",  # no word of the table, only parts of words
    ],
)
def test_where_words_do_not_say_enough_there_is_no_twin(caption: str) -> None:
    assert hard_negatives(caption) == []


def test_opposites_go_both_ways() -> None:
    assert all(OPPOSITE[OPPOSITE[word]] == word for word in OPPOSITE)
    assert set(shapes.COLOURS) <= twins.COLOURS


def test_twins_of_true_captions_are_never_true() -> None:
    rng, judged = random.Random(3), 0
    for number in range(150):
        scene = make_scene(rng, novel=number % 5 == 0)
        for caption in describe(scene, rng):
            assert is_true(caption, scene)
            for twin in hard_negatives(caption):
                assert shapes.parse(twin) is not None, "still a sentence of the grammar, not noise"
                assert not is_true(twin, scene), (caption, twin)
                judged += 1
            statement = shapes.parse(caption)
            assert statement is not None
            if statement.relations:
                assert len(hard_negatives(caption)) >= 2, (
                    "colours or things swapped, and the relation turned round"
                )
    assert judged > 1000


def test_twins_of_twins_lead_back() -> None:
    for caption in ("a red circle above a blue square", "a small cyan star"):
        assert all(caption in hard_negatives(twin) for twin in hard_negatives(caption))
