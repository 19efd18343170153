"""Bundles written small, and captioners that ship in the place of training."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import PHOTOS, save_tiny_bundle, tiny_config, tiny_dual, tiny_model, tiny_trainer
from safetensors.torch import load_file, save_file
from torch import nn

from capgen_utils import bootstrap
from capgen_utils.apps.authoring.ship import ship
from capgen_utils.apps.cli.main import main
from capgen_utils.apps.export.bundles import write_small
from capgen_utils.bundle import load_bundle, save_bundle
from capgen_utils.captioner import Captioner
from capgen_utils.common.files import CapGenError
from capgen_utils.common.paths import APART, data_dir, own_data_dir
from capgen_utils.common.tensors import SCALE, compact, read_tensors, round_to_bytes, save_tensors
from capgen_utils.config import Recipe
from capgen_utils.presets import PRESETS, Preset
from capgen_utils.training.shipped import SHIPPED, take_shipped
from capgen_utils.vision.dual_encoder import DualEncoder

# --- eight bits a weight


@pytest.fixture
def module() -> nn.Module:
    made = nn.ModuleDict(
        {"conv": nn.Conv2d(3, 8, 3), "linear": nn.Linear(40, 30), "norm": nn.LayerNorm(30)}
    )
    with torch.no_grad():
        made["linear"].weight[3] = 0.0  # a row without a scale
        made["linear"].weight[4] *= 1e-6  # and one with a very small one
    return made


def test_rounding_is_close_and_rounding_twice_is_rounding_once(module: nn.Module) -> None:
    before = {key: value.clone() for key, value in module.state_dict().items()}
    round_to_bytes(module)
    once = {key: value.clone() for key, value in module.state_dict().items()}
    round_to_bytes(module)
    for key, value in module.state_dict().items():
        assert torch.equal(value, once[key]), key
        rows = before[key].flatten(1) if value.ndim > 1 else before[key][None]
        error = (value.flatten(1) if value.ndim > 1 else value[None]) - rows
        assert (error.abs().amax(1) <= 0.51 / 127 * rows.abs().amax(1) + 4e-6).all(), (
            key
        )  # half of the smallest scale
    assert not torch.equal(once["linear.weight"], before["linear.weight"])
    assert (once["linear.weight"][3] == 0).all()


def test_what_was_rounded_is_stored_in_bytes_and_comes_back_exactly(
    module: nn.Module, tmp_path: Path
) -> None:
    round_to_bytes(module)
    own = module.state_dict()
    save_tensors(tmp_path / "w.safetensors", compact(own))
    stored = load_file(tmp_path / "w.safetensors")
    assert stored["linear.weight"].dtype == torch.int8 and stored[
        "linear.weight" + SCALE
    ].shape == (30,)
    assert (
        stored["conv.weight"].shape == (8, 3, 3, 3) and stored["norm.bias"].dtype == torch.float16
    )
    back = read_tensors(
        tmp_path / "w.safetensors", {key: value.shape for key, value in own.items()}, "again"
    )
    assert all(torch.equal(back[key].float(), own[key]) for key in own)


def test_what_was_not_rounded_loses_nothing(tmp_path: Path) -> None:
    weights = {
        "a": torch.randn(5, 7),
        "b": torch.randn(5, 7).half().float(),
        "n": torch.arange(6).view(2, 3),
    }
    packed = compact(weights)
    assert {key: value.dtype for key, value in packed.items()} == {
        "a": torch.float32,
        "b": torch.float16,
        "n": torch.int64,
    }
    assert all(torch.equal(packed[key].to(weights[key].dtype), weights[key]) for key in weights)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"w" + SCALE: torch.ones(4)}, "does not fit"),
        ({"w": torch.ones(3, 2)}, "does not fit"),
        ({"v" + SCALE: torch.ones(3)}, "does not fit"),
        ({"w" + SCALE: torch.tensor([1.0, float("nan"), 1.0])}, "not finite"),
    ],
)
def test_bytes_with_wrong_scales_are_refused(
    tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    good = {"w": torch.ones(3, 2, dtype=torch.int8), "w" + SCALE: torch.ones(3).half()}
    save_file(good, tmp_path / "w.safetensors")
    assert (
        read_tensors(tmp_path / "w.safetensors", {"w": torch.Size((3, 2))}, "again")["w"].dtype
        == torch.float32
    )
    save_file(good | change, tmp_path / "w.safetensors")
    with pytest.raises(CapGenError, match=said):
        read_tensors(tmp_path / "w.safetensors", {"w": torch.Size((3, 2))}, "again")


# --- small bundles


def test_a_small_bundle_is_half_the_size_and_says_nearly_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = tmp_path / "bundle"
    save_tiny_bundle(bundle, d_model=64, fc_dim=256)
    assert (
        main(
            [
                "export",
                "--format",
                "small",
                "--bundle",
                str(bundle),
                "--output",
                str(tmp_path / "small"),
            ]
        )
        == 0
    )
    assert "MB of weights became" in capsys.readouterr().out
    sizes = [
        (folder / "model.safetensors").stat().st_size for folder in (bundle, tmp_path / "small")
    ]
    assert sizes[1] < 0.7 * sizes[0]
    one, other = load_bundle(bundle), load_bundle(tmp_path / "small")
    assert {k: v for k, v in one.info.items() if k != "encoder"} == {
        k: v for k, v in other.info.items() if k != "encoder"
    }
    assert one.build_encoder().weights_hash() != other.build_encoder().weights_hash()
    for key, value in one.model.state_dict().items():
        torch.testing.assert_close(
            other.model.state_dict()[key], value, rtol=0, atol=0.005 * float(value.abs().max())
        )
    photos = sorted(PHOTOS.glob("*.jpg"))[:2]
    assert Captioner.from_bundle(tmp_path / "small", "cpu").caption(photos)[0].text


def test_a_small_bundle_keeps_its_clip_as_encoder_and_scorer(tmp_path: Path) -> None:
    dual = tiny_dual()
    bundle = save_tiny_bundle(tmp_path / "other")
    bundle.model = tiny_model("clip_prefix", shape=(24,))
    bundle.info |= {
        "model": "clip_prefix",
        "architecture": vars(bundle.model.config),
        "encoder": dual.images.describe(),
        "feature": {"output": "embedding", "shape": [24]},
    }
    save_bundle(tmp_path / "b", bundle, dual.images, scorer=dual)
    write_small(tmp_path / "b", tmp_path / "small")
    small = load_bundle(tmp_path / "small")
    assert not (tmp_path / "small" / "scorer").exists(), "one CLIP is both"
    encoder, scorer = small.build_encoder(), small.build_scorer()
    assert (
        scorer is not None
        and scorer.images.weights_hash() == encoder.weights_hash() != dual.images.weights_hash()
    )
    photo = sorted(PHOTOS.glob("*.jpg"))[0]
    cosine = float(
        (
            scorer.embed_images(photo)
            * DualEncoder.load(tmp_path / "b" / "encoder").embed_images(photo)
        ).sum()
    )
    assert cosine > 0.99


# --- in the place of training


@pytest.fixture
def shipped_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a run folder that holds only what ships: a small bundle and the log."""
    tiny_trainer(tmp_path, run=tmp_path / "made").train()
    write_small(tmp_path / "made" / "bundle", tmp_path / "taken" / "bundle")
    shutil.copyfile(tmp_path / "made" / "log.jsonl", tmp_path / "taken" / "log.jsonl")
    monkeypatch.setenv("CAPGEN_TRAIN", "0")
    return tmp_path / "taken"


@pytest.fixture(autouse=True)
def known_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let bundles of the tests' own public encoder load."""
    from helpers import tiny_encoder

    from capgen_utils.vision import encoders

    monkeypatch.setitem(encoders.ENCODERS, "tiny", lambda weights=None: tiny_encoder())


def test_a_bundle_stands_in_for_its_run(
    shipped_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (shipped_run / "bundle" / "model.safetensors").read_bytes()
    trainer = tiny_trainer(tmp_path, run=shipped_run)
    progress = trainer.train()
    made = json.loads((tmp_path / "made" / "bundle" / "config.json").read_text())
    assert (
        progress.done
        and progress.epoch == 3
        and progress.best_epoch + 1 == made["training_run"]["best_epoch"]
    )
    assert progress.best == made["dev"]["BLEU-4"] and len(progress.history) == 3
    stored = load_bundle(shipped_run / "bundle").model.state_dict()
    assert all(torch.equal(value, stored[key]) for key, value in trainer.model.state_dict().items())
    assert (shipped_run / "bundle" / "model.safetensors").read_bytes() == before
    assert not (shipped_run / "checkpoint.safetensors").exists()
    assert "nothing to train" in "".join(capsys.readouterr())


def test_who_wants_to_train_trains(
    shipped_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CAPGEN_TRAIN")
    tiny_trainer(tmp_path, run=shipped_run).train()
    assert (shipped_run / "checkpoint.safetensors").is_file()


def test_a_bundle_of_other_settings_does_not_stand_in(shipped_run: Path, tmp_path: Path) -> None:
    with pytest.raises(CapGenError, match="other settings, or on another encoder"):
        tiny_trainer(tmp_path, run=shipped_run, epochs=4).train()


def test_a_run_that_was_stopped_is_trained_to_its_end(shipped_run: Path, tmp_path: Path) -> None:
    path = shipped_run / "bundle" / "config.json"
    info = json.loads(path.read_text())
    path.write_text(
        json.dumps({key: value for key, value in info.items() if key != "training_run"})
    )
    assert tiny_trainer(tmp_path, run=shipped_run).train().done
    assert (shipped_run / "checkpoint.safetensors").is_file()


def test_finished_runs_are_shipped_and_what_was_shipped_is_not_shipped_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    preset = Preset(
        "tiny",
        "tiny",
        "tiny",
        models={"transformer": Recipe(tiny_config()), "show_tell": Recipe(None)},
    )
    monkeypatch.setenv("CAPGEN_DATA", str(tmp_path / "here"))
    run = tmp_path / "here" / "runs" / "tiny_transformer"
    tiny_trainer(tmp_path, run=run).train()
    assert ship(preset, tmp_path / "bundles") == [tmp_path / "bundles" / "tiny_transformer"]
    monkeypatch.setenv("CAPGEN_DATA", str(tmp_path / "there"))
    assert take_shipped(preset, tmp_path / "bundles") == ["transformer"]
    other = tmp_path / "there" / "runs" / "tiny_transformer"
    assert (other / "log.jsonl").read_bytes() == (run / "log.jsonl").read_bytes()
    assert ship(preset, tmp_path / "again") == []
    monkeypatch.setenv("CAPGEN_TRAIN", "0")
    assert tiny_trainer(tmp_path, run=other).train().done


# --- what ships


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CAPGEN_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("CAPGEN_TRAIN", "1")  # what the first cell sets ends with the test
    return tmp_path / "data"


def test_all_five_shapes_captioners_ship_and_are_small() -> None:
    for model in PRESETS["shapes"].models:
        files = [path for path in (SHIPPED / f"shapes_{model}").rglob("*") if path.is_file()]
        assert files and sum(path.stat().st_size for path in files) <= 3_000_000, model


def test_what_ships_is_put_where_training_would_put_it(data: Path) -> None:
    shapes = PRESETS["shapes"]
    bootstrap.announce("shapes", train=False)
    for model in shapes.models:
        run = data / "runs" / f"shapes_{model}"
        assert load_bundle(run / "bundle").info["model"] == model and (run / "log.jsonl").is_file()
        assert not (run / "bundle" / "log.jsonl").exists()
    assert {path.name for path in (data / "encoders").iterdir()} == {"shapes_cnn", "shapes_clip"}
    language = data / "language_models"
    assert (language / "shapes_gpt2_mini" / "config.json").is_file()
    assert (language / "shapes_gpt2_mini-run" / "log.jsonl").is_file()
    mine = data / "runs" / "shapes_transformer" / "bundle" / "config.json"
    mine.write_text(mine.read_text() + " ")
    assert take_shipped(shapes) == list(shapes.models)
    assert mine.read_text().endswith(" "), "what is there stays"


def _another_encoder(data: Path) -> None:
    take_shipped(PRESETS["shapes"])
    path = data / "encoders" / "shapes_cnn" / "config.json"
    path.write_text(
        path.read_text().replace(json.loads(path.read_text())["weights_hash"], "0" * 16)
    )


def test_what_ships_lies_apart_where_another_encoder_was_trained(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _another_encoder(data)
    shutil.rmtree(data / "runs" / "shapes_transformer")
    before = {path: path.stat().st_mtime_ns for path in data.rglob("*") if path.is_file()}
    for _ in range(2):  # the cell may be run again
        bootstrap.announce("shapes", train=False)
        assert f"another encoder, are in {data / APART}" in capsys.readouterr().out
        assert data_dir() == data / APART and own_data_dir() == data
    assert (data_dir() / "runs" / "shapes_transformer" / "bundle" / "config.json").is_file()
    assert (
        load_bundle(data_dir() / "runs" / "shapes_attend_tell" / "bundle").info["encoder"]["name"]
        == "shapes_cnn"
    )
    assert {path: path.stat().st_mtime_ns for path in before} == before, (
        "what was trained here stays as it is"
    )
    bootstrap.announce("shapes")
    assert data_dir() == data and "CAPGEN_TRAIN" not in os.environ


def test_who_has_trained_all_captioners_needs_nothing_that_ships(data: Path) -> None:
    _another_encoder(data)
    assert take_shipped(PRESETS["shapes"]) == list(PRESETS["shapes"].models)
    assert data_dir() == data and not (data / APART).exists()


def test_what_does_not_ship_is_named(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert take_shipped(PRESETS["shapes"], tmp_path / "nothing") == [] and not data.exists()
    bootstrap.announce("folder", train=False)
    assert "no captioner ships for folder: show_tell" in capsys.readouterr().out
