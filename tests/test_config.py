"""Presets, values from JSON, the data folder, and the choice of device and dtype."""

import re
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from capgen_utils import presets
from capgen_utils.common import device as devices
from capgen_utils.common.device import choose_device, choose_dtype
from capgen_utils.common.files import CapGenError, from_dict
from capgen_utils.common.paths import REPOSITORY, data_dir
from capgen_utils.config import (
    SMALL_CLIP,
    DecodingConfig,
    Recipe,
    TrainingConfig,
    TransformerConfig,
)
from capgen_utils.data.datasets import DATASETS
from capgen_utils.models import MODELS
from capgen_utils.presets import PRESETS, Preset, get_preset
from capgen_utils.vision.encoders import ENCODERS


@pytest.mark.parametrize("name", PRESETS)
def test_presets_name_things_that_exist_and_fit_together(name: str) -> None:
    preset = get_preset(name)
    assert preset.name == name and preset.dataset in DATASETS and preset.encoder in ENCODERS
    assert set(preset.models) == set(MODELS), "every captioner, in every preset"
    for model in preset.models:
        recipe = preset.recipe(model)
        assert isinstance(recipe.config, MODELS[model].Config)
        assert recipe.encoder in {*ENCODERS, SMALL_CLIP} and recipe.tokenizer in (
            "word",
            "clip",
            "gpt2",
        )
        assert recipe.decoding and recipe.training
        assert recipe.decoding.max_length <= recipe.config.seq_len - 1, (
            "more than the model can say"
        )
        assert from_dict(TrainingConfig, asdict(recipe.training)) == recipe.training
    assert {preset.clip.dataset or preset.dataset, preset.judge.dataset or preset.dataset} <= set(
        DATASETS
    )
    for training in filter(None, (preset.pretraining, preset.language)):
        assert from_dict(TrainingConfig, asdict(training)) == training


def test_a_recipe_keeps_what_it_says_and_takes_the_rest_from_the_preset() -> None:
    own = TrainingConfig(epochs=3)
    preset = replace(
        PRESETS["shapes"],
        models={
            "transformer": Recipe(TransformerConfig()),
            "show_tell": Recipe(1, "resnet18", "clip", own),
        },
    )
    plain, given = preset.recipe("transformer"), preset.recipe("show_tell")
    assert (plain.encoder, plain.training, plain.decoding) == (
        preset.encoder,
        preset.training,
        preset.decoding,
    )
    assert (given.encoder, given.training, given.tokenizer) == ("resnet18", own, "clip")
    with pytest.raises(CapGenError, match="lstm9000") as error:
        preset.recipe("lstm9000")
    assert "show_tell" in error.value.remedy


def test_another_encoder_for_one_model() -> None:
    preset = PRESETS["flickr8k"]
    changed = preset.with_encoder("attend_tell", "resnet50")
    assert changed.recipe("attend_tell").encoder == "resnet50"
    assert changed.recipe("attend_tell").config.cnn_backbone == "resnet50"
    assert changed.recipe("transformer") == preset.recipe("transformer")


def test_auto_is_shapes_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for device, name in (("cpu", "shapes"), ("cuda", "flickr8k"), ("mps", "flickr8k")):
        monkeypatch.setattr(presets, "choose_device", lambda device=device: torch.device(device))
        assert get_preset("auto").name == name


def test_an_unknown_preset_lists_those_there_are() -> None:
    with pytest.raises(CapGenError) as error:
        get_preset("flickr9k")
    assert all(name in error.value.remedy for name in ("auto", *PRESETS))


@pytest.mark.parametrize("kind", [TransformerConfig, TrainingConfig, DecodingConfig])
def test_values_survive_json_and_missing_ones_have_defaults(kind: type) -> None:
    assert from_dict(kind, {}) == kind()
    assert from_dict(kind, asdict(kind())) == kind()


WRONG: list[tuple[type, str, Any]] = [
    (TransformerConfig, "d_model", value)
    for value in ("256", None, 256.0, True, [256], {}, float("nan"))
] + [
    (TransformerConfig, "cnn_backbone", 5),
    (TransformerConfig, "cnn_backbone", None),
    (TransformerConfig, "dropout", "0.1"),
    (TransformerConfig, "dropout", None),
    (TransformerConfig, "dropout", True),
    (TransformerConfig, "dropout", float("nan")),
    (TransformerConfig, "dropout", float("inf")),
    (TrainingConfig, "dev_images", "all"),
    (TrainingConfig, "dtype", None),
]


@pytest.mark.parametrize(("kind", "key", "value"), WRONG, ids=str)
def test_values_of_the_wrong_type_are_named(kind: type, key: str, value: Any) -> None:
    with pytest.raises(CapGenError, match=key):
        from_dict(kind, {key: value})


def test_what_is_allowed() -> None:
    assert from_dict(TransformerConfig, {"dropout": 0}).dropout == 0
    assert from_dict(TrainingConfig, {"dev_images": 5}).dev_images == 5
    assert from_dict(TrainingConfig, {"dev_images": None}).dev_images is None
    with pytest.raises(CapGenError, match="surprise"):
        from_dict(TrainingConfig, {"surprise": 1})


def test_every_hyperparameter_is_described() -> None:
    kinds = [model.Config for model in MODELS.values()]
    for kind in (*kinds, TrainingConfig, DecodingConfig, Preset, Recipe):
        text = kind.__doc__ or ""
        assert [f.name for f in fields(kind) if not re.search(rf"\b{f.name}\b[^\n]*:", text)] == []


def test_configurations_cannot_be_changed_in_place() -> None:
    with pytest.raises(AttributeError):
        TrainingConfig().epochs = 5  # type: ignore[misc]
    assert replace(TrainingConfig(), epochs=5).epochs == 5


def test_the_data_folder_is_named_by_a_variable(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CAPGEN_DATA", str(tmp_path))
    assert data_dir() == tmp_path
    monkeypatch.setenv("CAPGEN_DATA", "~/x")
    assert data_dir() == Path.home() / "x"
    for unset in (
        lambda: monkeypatch.setenv("CAPGEN_DATA", ""),
        lambda: monkeypatch.delenv("CAPGEN_DATA"),
    ):
        unset()
        assert data_dir() == REPOSITORY / "data"


@pytest.mark.parametrize("name", ["gpu", "", "cuda:99", "tpu"])
def test_a_device_that_is_not_there_is_named(name: str) -> None:
    with pytest.raises(CapGenError, match="device"):
        choose_device(name)
    assert choose_device("cpu").type == "cpu"


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [
        ((6, 0), torch.float16),
        ((7, 5), torch.float16),
        ((8, 0), torch.bfloat16),
        ((9, 0), torch.bfloat16),
    ],
)
def test_bf16_only_where_the_card_has_it(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], dtype: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    assert choose_dtype(torch.device("cuda")) == dtype
    assert choose_dtype(torch.device("cuda"), "fp32") == torch.float32


def test_dtypes_of_other_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    for has, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(devices, "cpu_has_bf16", lambda has=has: has)
        assert choose_dtype(torch.device("cpu")) == dtype
    assert choose_dtype(torch.device("mps")) == torch.float32
    with pytest.raises(CapGenError, match="fp64"):
        choose_dtype(torch.device("cpu"), "fp64")
