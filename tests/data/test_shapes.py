"""The generated data set: scenes, true captions, and a judge that tells true from false."""

import csv
import json
import random
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capgen_utils.common.files import CapGenError
from capgen_utils.data import shapes
from capgen_utils.data.shapes import (
    COLOURS,
    HELD_OUT,
    SHAPES,
    Scene,
    ShapeObject,
    describe,
    draw,
    is_true,
    judge,
    make_scene,
    relation_is_right,
)
from capgen_utils.text.ptb import tokenise

seeds = st.integers(0, 2**32)
many = settings(max_examples=60, deadline=None, derandomize=True)

RED_CIRCLE = ShapeObject("red", "circle", "small", (4, 20, 20, 36))
BLUE_SQUARE = ShapeObject("blue", "square", "large", (34, 20, 60, 46))
GREEN_STAR = ShapeObject("green", "star", "small", (4, 46, 20, 62))
ONE, PAIR = Scene((RED_CIRCLE,)), Scene((RED_CIRCLE, BLUE_SQUARE))
THREE = Scene((RED_CIRCLE, BLUE_SQUARE, GREEN_STAR))


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "shapes"
    shapes.generate(folder, count=120, seed=3)
    return folder


def scene_of(seed: int, novel: bool = False) -> Scene:
    return make_scene(random.Random(seed), novel)


def rows_of(folder: Path) -> list[list[str]]:
    with open(folder / "captions.txt", encoding="utf-8", newline="") as stream:
        return list(csv.reader(stream))


@many
@given(seeds)
def test_every_caption_is_true_of_its_scene_also_after_tokenising(seed: int) -> None:
    scene = scene_of(seed, novel=seed % 5 == 0)
    captions = describe(scene, random.Random(seed))
    assert len(captions) == 5 == len(set(captions))
    for caption in captions:
        assert is_true(caption, scene), caption
        assert is_true(" ".join(tokenise(caption)), scene), caption
        assert is_true(caption.capitalize() + " .", scene), caption


@many
@given(seeds)
def test_a_caption_with_another_colour_or_shape_is_false(seed: int) -> None:
    scene = scene_of(seed)
    absent_colour = next(c for c in COLOURS if all(o.colour != c for o in scene.objects))
    absent_shape = next(s for s in SHAPES if all(o.shape != s for o in scene.objects))
    for caption in describe(scene, random.Random(seed)):
        thing = next(o for o in scene.objects if o.colour in caption.split())
        assert not is_true(caption.replace(thing.colour, absent_colour), scene)
        shape = next(o.shape for o in scene.objects if o.shape in caption.split())
        assert not is_true(caption.replace(shape, absent_shape), scene)


@many
@given(seeds)
def test_a_caption_with_the_opposite_relation_is_false(seed: int) -> None:
    scene = scene_of(seed)
    opposite = {"left": "right", "right": "left", "above": "below", "below": "above"}
    for caption in describe(scene, random.Random(seed)):
        inverted = " ".join(opposite.get(word, word) for word in tokenise(caption))
        stated = relation_is_right(caption, scene)
        assert stated is (True if len(scene.objects) > 1 else None)
        assert (inverted == " ".join(tokenise(caption))) is (stated is None)
        if stated:
            assert not is_true(inverted, scene)
            assert relation_is_right(inverted, scene) is False


@many
@given(seeds)
def test_a_wrong_size_makes_a_caption_false(seed: int) -> None:
    scene = scene_of(seed)
    other = {"small": "large", "large": "small"}
    sized = [c for c in describe(scene, random.Random(seed)) if set(c.split()) & set(other)]
    for caption in sized:
        assert not is_true(" ".join(other.get(word, word) for word in caption.split()), scene)


@many
@given(seeds)
def test_scenes_are_unambiguous_and_inside_the_image(seed: int) -> None:
    scene = scene_of(seed)
    for thing in scene.objects:
        x0, y0, x1, y1 = thing.box
        low, high = shapes.SIZES[thing.size]
        assert 0 <= x0 < x1 <= 64 and 0 <= y0 < y1 <= 64
        assert x1 - x0 == y1 - y0 and 12 <= low <= x1 - x0 <= high
    for first, second in combinations(scene.objects, 2):
        assert (first.colour, first.shape) != (second.colour, second.shape)
        across, along = sorted(abs(a - b) for a, b in zip(first.centre, second.centre, strict=True))
        assert along >= 1.5 * across


@pytest.mark.parametrize(
    ("caption", "scene"),
    [
        ("a red circle is left of a blue square", PAIR),
        ("a blue square to the right of a red circle", PAIR),
        ("The RED circle, to the left of the large blue square.", PAIR),
        ("to the left of a blue square is a small circle that is red", PAIR),
        ("a blue square with a red circle to its left", PAIR),
        ("a red circle and a blue square", PAIR),
        ("there is a blue square", PAIR),
        ("the circle is red", ONE),
        ("a red circle is left of a blue square and above a green star", THREE),
        ("a red circle above a green star, and there is a blue square", THREE),
    ],
)
def test_true_captions(caption: str, scene: Scene) -> None:
    assert is_true(caption, scene)


@pytest.mark.parametrize(
    ("caption", "scene"),
    [
        ("", PAIR),
        ("   ", PAIR),
        ("a red circle is", PAIR),
        ("red circle", PAIR),
        ("a red", PAIR),
        ("a red circle a blue square", PAIR),
        ("a red circle is left of", PAIR),
        ("left of a blue square", PAIR),
        ("a red circle is left of a blue square of a", PAIR),
        ("a red circle is left of a blue square a red circle", PAIR),
        ("a dog runs across the grass", PAIR),
        ("a red circle N", PAIR),
        ("a red circle is above a blue square", PAIR),
        ("a blue square is left of a red circle", PAIR),
        ("a red circle is left of a red circle", PAIR),
        ("a red circle and a red circle", PAIR),
        ("a large red circle", PAIR),
        ("a blue circle", PAIR),
        ("a red circle is left of a blue square and below a green star", THREE),
        ("a red circle is left of a blue square", ONE),
    ],
)
def test_captions_that_are_false_or_no_sentence(caption: str, scene: Scene) -> None:
    assert not is_true(caption, scene)


def test_relation_is_judged_apart_from_sizes_and_other_objects() -> None:
    assert relation_is_right("a large red circle left of a blue square", PAIR) is True
    assert relation_is_right("a red circle right of a blue square", PAIR) is False
    assert relation_is_right("a red star left of a blue square", PAIR) is False
    assert relation_is_right("a red circle", PAIR) is None
    assert relation_is_right("a red circle left of a blue square", ONE) is None
    assert relation_is_right("nonsense left of", PAIR) is None
    assert (
        relation_is_right("a red circle left of a blue square, and there is a purple star", THREE)
        is True
    )


def test_judge_by_hand() -> None:
    novel = Scene((ShapeObject("red", "star", "small", (4, 4, 20, 20)),), novel=True)
    scenes = {"a": ONE, "b": PAIR, "c": THREE, "d": novel}
    captions = {
        "a": "a red circle",  # true; of b and of c too
        "b": "a blue square",  # true, no relation; of a not, of c
        "c": "a red circle right of a blue square",  # false everywhere
        "d": "a red circle",
    }
    scores = judge(captions, scenes)
    assert scores["true"] == pytest.approx(2 / 3)
    assert scores["true_novel"] == 0.0
    assert scores["relation_right"] == 0.0
    assert scores["distinct"] == 3
    assert scores["true_shuffled"] == pytest.approx(
        3 / 6
    )  # shifts by 1 and 2: every other image once
    assert judge({"a": "a red circle"}, scenes) == {"true": 1.0, "distinct": 1.0}


@pytest.mark.parametrize("captions", [{}, {"unknown.png": "a red circle"}])
def test_judge_refuses_what_it_cannot_judge(captions: dict[str, str]) -> None:
    with pytest.raises(CapGenError):
        judge(captions, {"a": ONE})


def test_captions_say_little_about_other_images() -> None:
    scenes = {f"{i:04d}": scene_of(i) for i in range(600)}
    captions = {name: describe(scene, random.Random(name))[0] for name, scene in scenes.items()}
    scores = judge(captions, scenes)
    assert scores["true"] == 1.0 and scores["relation_right"] == 1.0
    assert scores["true_shuffled"] < 0.08
    counts = [len(scene.objects) for scene in scenes.values()]
    assert set(counts) == {1, 2, 3} and counts.count(3) < counts.count(1) < counts.count(2)


def test_drawing_shows_the_object_in_its_colour_inside_its_box_only() -> None:
    for colour, value in COLOURS.items():
        for shape in SHAPES:
            scene = Scene((ShapeObject(colour, shape, "large", (20, 10, 45, 35)),))
            with_object = np.asarray(draw(scene, seed=5), dtype=int)
            blank = np.asarray(draw(Scene(()), seed=5), dtype=int)
            assert with_object.shape == (64, 64, 3)
            # The noise is drawn after the object's shade, so only large differences count.
            rows, columns = np.nonzero(np.abs(with_object - blank).max(axis=2) > 45)
            assert (
                rows.min() >= 10 and rows.max() < 35 and columns.min() >= 20 and columns.max() < 45
            )
            assert (
                rows.min() <= 12
                and rows.max() >= 32
                and columns.min() <= 22
                and columns.max() >= 42
            )
            assert np.abs(with_object[22:25, 31:34].mean(axis=(0, 1)) - value).max() < 25


def test_drawing_repeats_with_its_seed() -> None:
    assert draw(PAIR, 1).tobytes() == draw(PAIR, 1).tobytes() != draw(PAIR, 2).tobytes()


def test_generated_folder_is_whole_and_consistent(generated: Path) -> None:
    scenes = shapes.load_scenes(generated)
    splits = json.loads((generated / "splits.json").read_text())
    assert {split: len(names) for split, names in splits.items()} == {
        "train": 96,
        "dev": 12,
        "test": 16,
    }
    assert (
        sorted(sum(splits.values(), []))
        == sorted(scenes)
        == sorted(p.name for p in (generated / "Images").iterdir())
    )
    header, *rows = rows_of(generated)
    assert header == ["image", "caption"]
    assert len(rows) == 5 * len(scenes) and all(
        is_true(caption, scenes[image]) for image, caption in rows
    )
    assert any("," in caption for _, caption in rows), "no caption exercises the quoting"
    assert sum(scene.novel for scene in scenes.values()) == 4


def test_held_out_pairs_occur_only_in_novel_test_images(generated: Path) -> None:
    scenes = shapes.load_scenes(generated)
    splits = json.loads((generated / "splits.json").read_text())
    seen: set[tuple[str, str]] = set()
    for name, scene in scenes.items():
        pairs = {(o.colour, o.shape) for o in scene.objects}
        assert bool(pairs & HELD_OUT) is scene.novel
        assert not scene.novel or name in splits["test"]
        seen |= pairs if name in splits["train"] else set()
    for colour, shape in HELD_OUT:
        assert colour in {c for c, _ in seen} and shape in {s for _, s in seen}


def test_generation_repeats_with_its_seed(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        shapes.generate(tmp_path / name, count=10, seed=seed)
    files = [
        p.relative_to(tmp_path / "a") for p in sorted((tmp_path / "a").rglob("*")) if p.is_file()
    ]
    assert len(files) == 3 + 11
    assert all(
        (tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files
    )
    assert (tmp_path / "a/captions.txt").read_bytes() != (tmp_path / "c/captions.txt").read_bytes()
    assert len({shapes.version(), shapes.version(seed=1), shapes.version(count=10)}) == 3


def test_generation_that_fails_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> tuple[str, ...]:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shapes, "describe", fail)
    with pytest.raises(CapGenError, match="No space left"):
        shapes.generate(tmp_path / "shapes", count=10)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(CapGenError, match="three"):
        shapes.generate(tmp_path / "shapes", count=9)


def test_scenes_survive_json() -> None:
    for seed in range(20):
        scene = scene_of(seed, novel=seed % 2 == 0)
        assert Scene.from_dict(json.loads(json.dumps(scene.to_dict()))) == scene


OBJECT = {"colour": "red", "shape": "circle", "size": "small", "box": [1, 1, 15, 15]}


@pytest.mark.parametrize(
    "scene",
    [
        [],
        {},
        {"objects": []},
        {"objects": [], "novel": False},
        {"objects": [OBJECT], "novel": "no"},
        {"objects": [OBJECT] * 4, "novel": False},
        {"objects": ["red circle"], "novel": False},
        {"objects": [{**OBJECT, "colour": "mauve"}], "novel": False},
        {"objects": [{**OBJECT, "colour": ["red"]}], "novel": False},
        {"objects": [{**OBJECT, "box": [1, 1, 15]}], "novel": False},
        {"objects": [{**OBJECT, "box": [1, 1, 15, 65]}], "novel": False},
        {"objects": [{**OBJECT, "box": [15, 1, 1, 15]}], "novel": False},
        {"objects": [{**OBJECT, "box": [1.0, 1, 15, 15]}], "novel": False},
        {"objects": [{**OBJECT, "extra": 1}], "novel": False},
    ],
)
def test_damaged_scenes_are_refused_by_name(tmp_path: Path, scene: object) -> None:
    (tmp_path / "scenes.json").write_text(json.dumps({"x.png": scene}))
    with pytest.raises(CapGenError, match=r"scenes\.json: x\.png"):
        shapes.load_scenes(tmp_path)


def test_scenes_are_found_from_the_images_folder(generated: Path, tmp_path: Path) -> None:
    assert shapes.load_scenes(generated / "Images") == shapes.load_scenes(generated)
    with pytest.raises(CapGenError, match="cannot read"):
        shapes.load_scenes(tmp_path)
    (tmp_path / "scenes.json").write_text("[1]")
    with pytest.raises(CapGenError, match="no scenes"):
        shapes.load_scenes(tmp_path)
