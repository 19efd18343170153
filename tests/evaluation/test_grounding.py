"""The pointing game by hand, and the deletion test on captioners with known attention."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import CPU, save_tiny_bundle, tiny_encoder
from PIL import Image
from show_helpers import maps_of
from torch import Tensor

from capgen_utils.apps.cli.main import main
from capgen_utils.bundle import Bundle, load_bundle
from capgen_utils.captioner import Captioner
from capgen_utils.common.files import CapGenError, write_json
from capgen_utils.data.manifest import Item, Manifest
from capgen_utils.data.shapes import Scene, ShapeObject, draw
from capgen_utils.evaluation.attention import MEAN, CaptionMaps, caption_maps
from capgen_utils.evaluation.grounding import (
    Deletion,
    Pointing,
    content_words,
    deletion_test,
    deletions,
    hide,
    measure,
    moved,
    peak_share,
    pointing_game,
    pointings,
    summary,
    top_cells,
    word_log_probabilities,
)
from capgen_utils.evaluation.metrics import mean_interval
from capgen_utils.models.base import CaptionModel, Memory
from capgen_utils.text.words import WordTokenizer
from capgen_utils.vision.preprocessing import Preprocessing

RED = ShapeObject("red", "star", "small", (0, 0, 16, 16))
BLUE = ShapeObject("blue", "circle", "large", (32, 24, 64, 56))
SCENE = Scene((RED, BLUE))
WORDS = ["a", "red", "star", "is", "left", "of", "blue", "circle", "green"]


def looking_at(*cells: int, side: int = 8) -> Tensor:
    """One map per word, almost all of it on one cell."""
    weights = torch.full((len(cells), 1, side * side), 1e-4)
    weights[torch.arange(len(cells)), 0, torch.tensor(cells)] = 1
    return weights / weights.sum(-1, keepdim=True)


# --- the pointing game


def test_the_pointing_game_by_hand() -> None:
    text = "a red star is left of a blue circle"
    in_red, in_blue, nowhere = 0, 4 * 8 + 5, 63  # cells of 8 x 8 pixels
    layer = looking_at(
        nowhere, in_red, in_blue, nowhere, nowhere, nowhere, nowhere, in_blue, in_blue
    )
    tries = pointings([maps_of({"layer0": layer}, words=text)], [SCENE], (64, 64))
    assert [(one.kind, one.hits["layer0"], one.others) for one in tries] == [
        ("colour", 1, {"layer0": 0}),
        ("shape", 0, {"layer0": 1}),
        ("colour", 1, {"layer0": 0}),
        ("shape", 1, {"layer0": 0}),
    ]
    game = pointing_game(tries)
    areas = (16 * 16 / 4096 + 32 * 32 / 4096) / 2
    for kind, hits in (("colour", 2), ("shape", 1)):
        assert game[kind]["tries"] == 2 and game[kind]["images"] == 1
        assert game[kind]["chance"] == pytest.approx(areas, abs=1e-4)
        grown = (20 * 20 / 4096 + 36 * 40 / 4096) / 2  # by 4 pixels, cut at the edge of the image
        assert game[kind]["chance near"] == pytest.approx(grown, abs=1e-4)
        assert game[kind]["centre"] == 0.5, "the middle of the image is in the blue circle's box"
        assert (
            game[kind]["maps"]["layer0"]["hits"] == hits
            and game[kind]["maps"]["layer0"]["score"] == hits / 2
        )


def test_attention_belongs_to_the_generated_word() -> None:
    """The map of the next word would miss."""
    layer = looking_at(63, 0, 63)
    (colour, shape) = pointings(
        [maps_of({"layer0": layer}, words="a red star")], [Scene((RED,))], (64, 64)
    )
    assert (colour.kind, colour.hits["layer0"]) == ("colour", 1) and (
        shape.kind,
        shape.hits["layer0"],
    ) == ("shape", 0)
    assert colour.others is None, "there is no other object"


def test_half_a_cell_outside_the_box_is_near() -> None:
    beside, far = (
        2 * 8 + 1,
        3 * 8 + 1,
    )  # the first starts where the box ends, so its middle is 4 pixels below it
    maps = maps_of({"layer0": looking_at(far, beside, far)}, words="a red star")
    colour, shape = pointings([maps], [Scene((RED,))], (64, 64))
    assert (colour.hits["layer0"], colour.near["layer0"]) == (0, 0.5)
    assert (shape.hits["layer0"], shape.near["layer0"]) == (0, 0)


def test_false_captions_do_not_play() -> None:
    layer = looking_at(0, 0, 0)
    assert pointings([maps_of({"layer0": layer}, words="a green star")], [SCENE], (64, 64)) == []
    assert pointing_game([]) == {}


def test_a_map_without_a_peak_scores_chance() -> None:
    level = np.full((64, 64), 0.25)
    assert peak_share(level, [RED.box]) == 16 * 16 / 4096
    assert peak_share(level, [RED.box, BLUE.box]) == (16 * 16 + 32 * 32) / 4096
    assert peak_share(level, []) == 0
    flat = maps_of({"layer0": torch.full((3, 1, 64), 1 / 64)}, words="a red star")
    game = pointing_game(pointings([flat], [Scene((RED,))], (64, 64)))
    assert game["colour"]["maps"]["layer0"]["score"] == game["colour"]["chance"]


def test_intervals_resample_images_and_depend_on_the_seed() -> None:
    tries = [
        Pointing(i, "colour", {"mean": i * 37 % 97 / 97}, {"mean": 1.0}, None, 0.1, 0.2, 0.0)
        for i in range(40)
        for _ in range(3)
    ]
    first, again, other = (
        pointing_game(tries, seed)["colour"]["maps"]["mean"] for seed in (0, 0, 1)
    )
    assert first == again and first["interval"] != other["interval"]
    low, high = first["interval"]
    assert low < first["score"] < high and high - low > 0.14, "40 images, not 120 tries"
    assert first["another"] is None


def test_the_mean_with_different_numbers_of_values_per_image() -> None:
    found = mean_interval([3.0, 0.0, 1.0], [3, 0, 1])
    assert found == (1.0, 1.0, 1.0)
    value, low, high = mean_interval([4.0, 0.0] * 30, [4, 1] * 30)
    assert value == 0.8 and 0.6 < low < 0.8 < high < 0.95
    assert all(map(math.isnan, mean_interval([0.0], [0])))
    with pytest.raises(CapGenError, match="2 totals"):
        mean_interval([1.0, 2.0], [1])


# --- hiding


def test_the_cells_with_most_attention_are_chosen() -> None:
    weights = torch.tensor([0.1, 0.3, 0.05, 0.05, 0.2, 0.05, 0.05, 0.1, 0.1])
    assert np.flatnonzero(top_cells(weights, 0.2)).tolist() == [1, 4]
    assert np.flatnonzero(top_cells(weights, 0.001)).tolist() == [1], "at least one"


def test_a_moved_patch_keeps_its_size_and_shape() -> None:
    cells = np.zeros((4, 4), dtype=bool)
    cells[0, 0] = cells[0, 1] = cells[1, 0] = True
    seen = set()
    for seed in range(200):
        other = moved(cells, np.random.default_rng(seed))
        assert other.sum() == 3 and not np.array_equal(other, cells)
        back = [
            np.array_equal(np.roll(other, (y, x), (0, 1)), cells)
            for y in range(4)
            for x in range(4)
        ]
        assert sum(back) == 1
        seen.add(other.tobytes())
    assert len(seen) == 15, "every other place is drawn"


def test_hidden_cells_get_the_mean_colour() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    cells = np.zeros((3, 3), dtype=bool)
    cells[1, 2] = True
    hidden = hide(pixels, cells)
    assert (hidden[8:16, 16:24] == pixels.mean((0, 1)).round()).all()
    kept = np.ones((24, 24), dtype=bool)
    kept[8:16, 16:24] = False
    assert np.array_equal(hidden[kept], pixels[kept])


def test_function_words_are_not_tested() -> None:
    maps = maps_of({"layer0": looking_at(*range(9))}, words="A dog 's ball is in front of 7")
    assert [maps.texts[i] for i in content_words(maps)] == ["dog", "ball"]


# --- the deletion test on captioners of which the truth is known


@dataclass
class Seen(Memory):
    features: Tensor  # (B, N, D)


class Planted(CaptionModel):
    """The probability of each word is known: it hangs on one cell of the grid, or on nothing at
    all.

    Args:
        cell: that makes the words likely.
        looks: the cell that the attention says it looks at.
        blind: the words hang on nothing.
    """

    name, feature = "planted", "grid"

    def __init__(self, cell: int, looks: int, blind: bool = False) -> None:
        super().__init__()
        self.cell, self.looks, self.blind = cell, looks, blind
        self.unused = torch.nn.Parameter(torch.zeros(1))
        self.config = type("Config", (), {"seq_len": 16})()

    def encode(self, features: Tensor) -> Seen:
        return Seen(features)

    def scores(self, memory: Seen) -> Tensor:
        strength = memory.features[:, self.cell].abs().sum(-1) * (0 if self.blind else 1)
        logits = torch.zeros(len(strength), 4 + len(WORDS))
        logits[:, 4:] = strength[:, None]
        return logits

    def forward(self, memory: Seen, tokens: Tensor, image: Tensor) -> Tensor:
        return self.scores(memory)[image][:, None].repeat(1, tokens.shape[1], 1)

    def start(self, memory: Seen) -> Any:
        return Walk(memory, torch.arange(memory.images))

    def step(
        self, tokens: Tensor, state: Any, attention: bool = False
    ) -> tuple[Tensor, Any, Mapping[str, Tensor]]:
        weights = torch.full((len(tokens), 1, 9), 0.01)
        weights[:, :, self.looks] = 0.92
        return (
            self.scores(state.memory)[state.image],
            state,
            {"attention": weights} if attention else {},
        )


@dataclass
class Walk:
    memory: Seen
    image: Tensor

    def select(self, rows: Tensor) -> "Walk":
        return Walk(self.memory, self.image[rows])


def cells_encoder() -> Any:
    """An encoder whose grid vector of a cell is how much the cell's pixels differ from each other:
    0 once hidden."""
    encoder = tiny_encoder()

    def forward(pixels: Tensor) -> dict[str, Tensor]:
        cells = pixels.float().unflatten(1, (3, 8)).unflatten(3, (3, 8))  # (B, 3, 8, 3, 8, 3)
        spread = cells.std((2, 4)).flatten(1, 2) / 20
        return {"grid": spread, "pooled": spread.mean(1)}

    encoder.forward = forward  # type: ignore[method-assign]
    return encoder


def planted(cell: int, looks: int, blind: bool = False) -> Captioner:
    info = {"extraction_dtype": "float32", "decoding": {"beam": 1, "max_length": 8}}
    bundle = Bundle(Planted(cell, looks, blind).eval(), WordTokenizer(WORDS), info)
    return Captioner(bundle, cells_encoder(), CPU)


IMAGES = [np.random.default_rng(i).integers(0, 256, (24, 24, 3), dtype=np.uint8) for i in range(6)]
TEXTS = ["a red star", "a blue circle", "a green star", "red", "a blue star", "circle of blue"]


def test_attention_on_the_relevant_cell_always_wins() -> None:
    captioner = planted(cell=4, looks=4)
    found = deletions(captioner, IMAGES, caption_maps(captioner, IMAGES, TEXTS), share=0.1)
    assert len(found) == 11 and all(len(one.patches) == 4 for one in found)
    assert all(one.looked == pytest.approx(math.log(10 / 9), abs=1e-3) for one in found), (
        "9 words, or the end as well"
    )
    assert not any(abs(fall) > 1e-6 for one in found for fall in one.patches)
    result = deletion_test(found)
    assert result["over patch"]["more"] == 1 and result["over patch"]["more interval"] == [1, 1]
    assert result["over patch"]["interval"][0] > 0.1
    assert result["looked"] == pytest.approx(result["stranger"]), (
        "this captioner looks at one place in every image"
    )
    assert result["over stranger"]["more"] == 0.5


def test_attention_elsewhere_loses() -> None:
    captioner = planted(cell=4, looks=0)
    found = deletions(
        captioner, IMAGES, caption_maps(captioner, IMAGES, TEXTS), share=0.1, draws=30
    )
    result = deletion_test(found)
    assert result["looked"] == pytest.approx(0, abs=1e-4)
    assert result["over patch"]["difference"] < 0 and result["over patch"]["more"] == 0


def test_a_captioner_that_ignores_the_image_is_at_chance() -> None:
    captioner = planted(cell=4, looks=4, blind=True)
    result = deletion_test(deletions(captioner, IMAGES, caption_maps(captioner, IMAGES, TEXTS)))
    for over in ("over patch", "over stranger"):
        assert result[over] == {
            "difference": 0,
            "interval": [0, 0],
            "more": 0.5,
            "more interval": [0.5, 0.5],
        }


def test_random_patches_depend_on_the_seed_and_the_image() -> None:
    captioner = planted(cell=4, looks=0)
    maps = caption_maps(captioner, IMAGES, TEXTS)
    first, again, other = (deletions(captioner, IMAGES, maps, seed=seed) for seed in (3, 3, 4))
    assert first == again and [one.patches for one in first] != [one.patches for one in other]
    assert [one.looked for one in first] == [one.looked for one in other]
    (alone,) = deletions(captioner, IMAGES[3:4], maps[3:4], seed=3)
    assert alone.looked == next(one.looked for one in first if one.image == 3)


@pytest.mark.parametrize("options", [{"share": 0.0}, {"share": 1.0}, {"draws": 0}], ids=str)
def test_impossible_tests_are_refused(options: dict[str, Any]) -> None:
    captioner = planted(4, 4)
    with pytest.raises(CapGenError, match="not possible"):
        deletions(captioner, IMAGES[:1], caption_maps(captioner, IMAGES[:1], TEXTS[:1]), **options)
    with pytest.raises(CapGenError, match="no caption has a content word"):
        deletion_test([])


def test_a_word_is_the_sum_of_its_tokens_without_banned_ones() -> None:
    captioner = planted(cell=4, looks=4, blind=True)
    (maps,) = caption_maps(captioner, IMAGES[:1], ["a red star"])
    said = word_log_probabilities(captioner, IMAGES[:2], maps)
    assert said.shape == (2, 3)
    likely = -math.log(len(WORDS) + 1)  # all words and the end token
    torch.testing.assert_close(
        said, torch.full((2, 3), likely, dtype=torch.float64), atol=1e-5, rtol=0
    )
    joined = CaptionMaps(
        "x", (maps.words[0]._replace(last=3),), maps.tokens, {}, maps.rolled, Preprocessing()
    )
    assert word_log_probabilities(captioner, IMAGES[:1], joined).item() == pytest.approx(
        3 * likely, abs=1e-5
    )


def test_a_fall_is_the_lost_log_probability() -> None:
    captioner = planted(cell=4, looks=4)
    maps = caption_maps(captioner, IMAGES, TEXTS)
    (first, *_) = deletions(captioner, IMAGES, maps, share=0.1)
    hidden = hide(IMAGES[0], top_cells(maps[0].of(MEAN)[1], 0.1))
    said = word_log_probabilities(
        captioner, [Image.fromarray(IMAGES[0]), Image.fromarray(hidden)], maps[0]
    )
    assert first == Deletion(
        0, "red", pytest.approx(float(said[0, 1] - said[1, 1])), first.patches, first.stranger
    )


# --- results


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few drawn scenes as the package writes them."""
    folder = tmp_path_factory.mktemp("scenes")
    names = [f"{i}.png" for i in range(4)]
    for i, name in enumerate(names):
        draw(SCENE, i).save(folder / name)
    write_json(folder / "scenes.json", {name: SCENE.to_dict() for name in names})
    return folder


def manifest_of(folder: Path) -> Manifest:
    return Manifest(
        "scenes", folder, tuple(Item(f"{i}.png", "test", ("a red star",)) for i in range(4))
    )


def test_results_hold_both_tests_and_their_protocol(scenes: Path, tmp_path: Path) -> None:
    save_tiny_bundle(tmp_path / "b")
    captioner = Captioner(
        load_bundle(tmp_path / "b"), load_bundle(tmp_path / "b").build_encoder(), CPU
    )
    captioner.tokenizer = WordTokenizer(
        (WORDS + ["large", "small", "the"])[: len(captioner.tokenizer) - 4]
    )
    captioner.bundle.tokenizer = captioner.tokenizer
    result = json.loads(json.dumps(measure(captioner, manifest_of(scenes), images=3, draws=1)))
    rules = result["protocol"]
    assert (rules["dataset"], rules["split"], rules["images"], rules["images_in_split"]) == (
        "scenes",
        "test",
        3,
        4,
    )
    assert {
        "encoder",
        "encoder_weights",
        "revision",
        "seed",
        "draws",
        "share",
        "test_seed",
        "decoding",
    } <= set(rules)
    assert (
        result["kind"] == "attention"
        and result["machine"]["versions"]
        and result["class token"] == 0
    )
    assert list(result["deletion"]) == ["mean", "rollout"] and result["true captions"] >= 0
    text = summary(result)
    assert "deletion test, rollout" in text and "over stranger" in text


def test_the_summary_shows_chance_beside_every_score() -> None:
    tries = [
        Pointing(i, "colour", {"mean": 1.0}, {"mean": 1.0}, {"mean": 0.0}, 0.12, 0.2, 0.0)
        for i in range(4)
    ]
    fall = deletion_test([Deletion(i, "dog", 1.0, (0.25,), 0.5) for i in range(3)])
    result = {
        "model": "m",
        "protocol": {"dataset": "d", "split": "test", "images": 4},
        "deletion": {"mean": fall},
    }
    text = summary(result | {"pointing": pointing_game(tries)})
    assert (
        "12.0%" in text
        and "100.0%   [100.0%, 100.0%]   near: 100.0%   another object's box: 0.0%" in text
    )
    assert "+1.000; a random patch +0.250; where a word of another caption looked +0.500" in text
    assert "over patch       +0.750 [+0.750, +0.750]   falls further for 100.0% of words" in text


def test_the_command_writes_a_results_file(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    scenes: Path,
) -> None:
    save_tiny_bundle(tmp_path / "b")
    monkeypatch.setattr(
        "capgen_utils.data.datasets.load_dataset", lambda name, folder: manifest_of(scenes)
    )
    monkeypatch.setattr(
        "capgen_utils.evaluation.grounding.content_words", lambda maps: [0]
    )  # this captioner says word0 to word11
    arguments = [
        "attention",
        "--bundle",
        tmp_path / "b",
        "--dataset",
        "shapes",
        "--images",
        2,
        "--output",
        tmp_path,
    ]
    assert main([str(a) for a in arguments]) == 0
    result = json.loads(
        (tmp_path / "scenes_transformer_attention.json").read_text(encoding="utf-8")
    )
    assert result["protocol"]["images"] == 2 and "deletion test" in capsys.readouterr().out
