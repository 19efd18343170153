"""Captions that need no model, and what people reach."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capgen_utils.common.files import CapGenError
from capgen_utils.evaluation import baselines
from capgen_utils.evaluation.baselines import (
    beside_people,
    best_constant,
    constant_captions,
    human_choices,
    human_row,
    nearest_captions,
    random_captions,
)
from capgen_utils.evaluation.metrics import bleu, score
from capgen_utils.text.ptb import tokenise

TRAINING = {
    "1.jpg": ["A dog runs on the grass .", "The brown dog runs ."],
    "2.jpg": ["A dog plays on the grass .", "A dog is on a field ."],
    "3.jpg": ["Two men ride bikes .", "A man rides a bike on the road ."],
}
REFERENCES = {
    "a.jpg": ["a dog runs on the green grass", "the dog is running on grass", "one dog outside"],
    "b.jpg": ["a man on a red bike rides", "someone rides a bike", "a cyclist on the road"],
}


def test_the_best_constant_is_the_one_that_trying_all_finds() -> None:
    candidates = [caption for captions in TRAINING.values() for caption in captions]
    tried = {c: bleu(constant_captions(TRAINING, c), TRAINING)["BLEU-4"] for c in candidates}
    highest = max(tried.values())
    equal = [caption for caption, value in tried.items() if value == pytest.approx(highest)]
    assert len(equal) == 2 and best_constant(TRAINING) == min(equal)


WORDS = st.lists(st.sampled_from(["red", "dog", "cat", "the", "on"]), max_size=7).map(" ".join)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(WORDS, min_size=1, max_size=3), min_size=1, max_size=5))
def test_the_best_constant_is_the_best_of_any_captions(captions: list[list[str]]) -> None:
    training = {str(i): each for i, each in enumerate(captions)}
    candidates = [caption for each in captions for caption in each if caption]
    if not candidates:
        with pytest.raises(CapGenError):
            best_constant(training)
        return
    best = max(bleu(constant_captions(training, c), training)["BLEU-4"] for c in candidates)
    assert bleu(constant_captions(training, best_constant(training)), training)[
        "BLEU-4"
    ] == pytest.approx(best)


def test_the_constant_does_not_depend_on_the_order_and_is_as_it_was_written() -> None:
    shuffled = {image: list(captions) for image, captions in reversed(TRAINING.items())}
    assert best_constant(shuffled) == best_constant(TRAINING)
    assert best_constant({"1": ["A Dog, runs!"]}) == "A Dog, runs!"
    assert set(constant_captions(["x", "y"], "a dog").values()) == {"a dog"}
    with pytest.raises(CapGenError):
        best_constant({"1": [" . "]})


def test_random_captions_are_training_captions_and_repeatable() -> None:
    images = [f"{i}.jpg" for i in range(200)]
    drawn = random_captions(images, TRAINING, seed=1)
    assert drawn == random_captions(reversed(images), dict(reversed(TRAINING.items())), seed=1)
    assert drawn != random_captions(images, TRAINING, seed=2)
    every = {caption for captions in TRAINING.values() for caption in captions}
    assert set(drawn.values()) == every and set(drawn) == set(images)
    counts = np.unique(list(drawn.values()), return_counts=True)[1]
    assert counts.min() > 200 / 6 / 2
    with pytest.raises(CapGenError):
        random_captions(images, {})


@pytest.mark.parametrize("at_once", [1, 2, 1024])
def test_the_nearest_image_is_the_one_of_the_smallest_angle(
    monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    monkeypatch.setattr(baselines, "_AT_ONCE", at_once)
    features = np.array([[10.0, 1.0], [0.0, 3.0], [-1.0, -1.0]])
    training = np.array([[1.0, 0.0], [0.1, 0.5], [-5.0, -5.0]])
    found = nearest_captions(["a", "b", "c"], features, list(TRAINING), training, TRAINING)
    assert found == {
        "a": "A dog runs on the grass .",
        "b": "A dog plays on the grass .",
        "c": "Two men ride bikes .",
    }


def test_features_that_do_not_fit_are_refused() -> None:
    good = np.eye(3)
    names = list(TRAINING)
    nearest_captions(names, good, names, good, TRAINING)
    for images, features in (
        (names[:2], good),
        (names, np.ones(3)),
        ([], np.ones((0, 3))),
        (names, good * np.nan),
    ):
        with pytest.raises(CapGenError, match="one finite vector"):
            nearest_captions(images, features, names, good, TRAINING)
    with pytest.raises(CapGenError, match="do not compare"):
        nearest_captions(names, np.ones((3, 4)), names, good, TRAINING)
    with pytest.raises(CapGenError, match="has no caption"):
        nearest_captions(names, good, names, good, TRAINING | {"2.jpg": []})


# --- people


def test_each_human_is_scored_against_the_others() -> None:
    choices = list(human_choices(REFERENCES))
    assert len(choices) == 3
    said, others = choices[1]
    assert said["a.jpg"] == "the dog is running on grass"
    assert others["a.jpg"] == ["a dog runs on the green grass", "one dog outside"]


def test_the_human_row_is_the_mean_of_the_choices() -> None:
    each = [score(said, others) for said, others in human_choices(REFERENCES)]
    row = human_row(REFERENCES, resamples=20)
    for name, interval in row.items():
        assert interval.value == pytest.approx(np.mean([scores[name] for scores in each]))
        assert interval.low <= interval.high


def test_a_system_beside_people_has_as_many_references() -> None:
    said = {"a.jpg": "a dog runs on grass", "b.jpg": "a man rides a bike"}
    each = [score(said, others) for _, others in human_choices(REFERENCES)]
    row = beside_people(said, REFERENCES, resamples=20)
    assert row["BLEU-1"].value == pytest.approx(np.mean([scores["BLEU-1"] for scores in each]))
    assert row["BLEU-1"].value < score(said, REFERENCES)["BLEU-1"]
    people = {name: captions[0] for name, captions in REFERENCES.items()}
    assert (
        beside_people(people, REFERENCES, resamples=20)["ROUGE-L"].value
        > human_row(REFERENCES, resamples=20)["ROUGE-L"].value
    )


def test_more_metrics_join_the_row() -> None:
    def length(said: dict[str, str], written: dict[str, list[str]]) -> dict[str, dict[str, float]]:
        assert all(len(captions) == 2 for captions in written.values())
        return {"length": {name: float(len(tokenise(caption))) for name, caption in said.items()}}

    expected = np.mean([len(tokenise(c)) for captions in REFERENCES.values() for c in captions])
    assert human_row(REFERENCES, length, resamples=5)["length"].value == pytest.approx(expected)


def test_images_with_fewer_captions_limit_the_choices_and_one_is_too_few() -> None:
    uneven = REFERENCES | {"b.jpg": REFERENCES["b.jpg"][:2]}
    assert [len(others["a.jpg"]) for _, others in human_choices(uneven)] == [2, 2]
    for captions in ({}, {"a": ["x"]}, {"a": ["x", "y"], "b": ["z"]}):
        with pytest.raises(CapGenError, match="fewer than two"):
            human_row(captions)


@pytest.mark.flickr8k
def test_floors_and_people_on_flickr8k(flickr8k: object) -> None:
    """Measured beforehand: people 64.7 / 21.4 / 82.0 (49.5 ROUGE-L), a random caption 30.3 / 1.5 /
    3.2."""
    from capgen_utils.data.datasets import load_dataset

    manifest = load_dataset("flickr8k", flickr8k)  # type: ignore[arg-type]
    test, train = (
        {i.image: i.captions for i in manifest.split(name).items} for name in ("test", "train")
    )
    people = human_row(test)
    expected = {"BLEU-1": 64.7, "BLEU-4": 21.4, "ROUGE-L": 49.5, "CIDEr-D": 82.0}
    assert {name: round(people[name].value, 1) for name in expected} == expected
    assert 0.5 < people["BLEU-4"].value - people["BLEU-4"].low < 1.5
    drawn = score(random_captions(test, train), test)
    assert drawn["BLEU-1"] == pytest.approx(30.3, abs=1) and drawn["CIDEr-D"] == pytest.approx(
        3.2, abs=0.8
    )
    constant = score(constant_captions(test, best_constant(train)), test)
    assert 6.6 < constant["BLEU-4"] < 11 and constant["CIDEr-D"] < 10
