"""Encoders stay frozen, load only tensors, say where weights can be had, and really know what is in
a photograph."""

import os
import pickle
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import PHOTOS, tiny_encoder
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from capgen_utils.common.files import CapGenError
from capgen_utils.common.hub import import_torchvision
from capgen_utils.vision.encoder import Encoder, Pixels
from capgen_utils.vision.encoders import (
    ENCODERS,
    build_encoder,
    load_encoder_folder,
    new_shapes_cnn,
    resnet,
)
from capgen_utils.vision.features import encode_images
from capgen_utils.vision.preprocessing import Preprocessing, preprocessing_from_json

DOGS, CATS = range(151, 269), range(281, 286)  # ImageNet's classes


class Parent(nn.Module):
    """A model that holds an encoder and is trained."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(12, 2)


def test_an_encoder_stays_frozen_in_a_parent_that_trains() -> None:
    parent = Parent(tiny_encoder()).train()
    assert parent.training and not any(m.training for m in parent.encoder.modules())
    before = {k: v.clone() for k, v in parent.encoder.state_dict().items()}
    assert any("running_mean" in k for k in before)
    out = parent.encoder(torch.randint(0, 255, (8, 24, 24, 3)))
    assert all(torch.equal(v, before[k]) for k, v in parent.encoder.state_dict().items())
    assert not any(v.requires_grad for v in out.values())
    assert not any(p.requires_grad for p in parent.encoder.parameters())
    parent.encoder.train(True)
    assert not parent.encoder.trunk[1].training


def test_outputs_are_as_announced() -> None:
    encoder = tiny_encoder()
    out = encoder(torch.randint(0, 255, (5, 24, 24, 3)))
    assert {k: tuple(v.shape[1:]) for k, v in out.items()} == encoder.outputs
    torch.testing.assert_close(out["grid"].mean(1), out["pooled"], atol=1e-3, rtol=1e-3)


def test_the_grid_is_row_by_row() -> None:
    encoder = tiny_encoder()
    pixels = torch.zeros(1, 24, 24, 3)
    changed = pixels.clone()
    changed[:, :8, 16:] = 255  # first row, last column of 3 x 3
    difference = (encoder(changed)["grid"] - encoder(pixels)["grid"]).abs().sum(-1)[0]
    assert difference.nonzero().flatten().tolist() == [2]


def test_pixels_are_normalised_as_the_preprocessing_says() -> None:
    encoder = Encoder(
        "id", nn.Identity(), Preprocessing(8, mean=(0.5, 0.0, 0.25), std=(0.5, 1.0, 0.25)), {}
    )
    grid = encoder(torch.full((1, 8, 8, 3), 255, dtype=torch.uint8))["pooled"]
    torch.testing.assert_close(grid, torch.tensor([[1.0, 1.0, 3.0]]))
    encoder.preprocessing = replace(
        encoder.preprocessing, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)
    )
    grid = encoder(torch.full((1, 8, 8, 3), 255, dtype=torch.uint8))["pooled"]
    torch.testing.assert_close(grid, torch.ones(1, 3))


# --- preprocessing


def striped() -> Image.Image:
    """Return 300 x 100 pixels: red, green and blue thirds."""
    image = Image.new("RGB", (300, 100))
    for i, colour in enumerate(("red", "lime", "blue")):
        image.paste(Image.new("RGB", (100, 100), colour), (100 * i, 0))
    return image


def test_squash_keeps_all_and_crop_keeps_the_centre() -> None:
    squashed, cropped = (Preprocessing(64, resize=mode)(striped()) for mode in ("squash", "crop"))
    assert squashed.shape == cropped.shape == (64, 64, 3) and squashed.dtype == np.uint8
    assert squashed[32, 5].tolist() == [255, 0, 0] and squashed[32, 60].tolist() == [0, 0, 255]
    assert (cropped[:, 4:60] == [0, 255, 0]).all()
    tall = Preprocessing(64, resize="crop")(striped().transpose(Image.Transpose.ROTATE_90))
    assert (tall[4:60] == [0, 255, 0]).all()


@pytest.mark.parametrize("mode", ["squash", "crop"])
def test_flip_mirrors_left_and_right(mode: str) -> None:
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 255, (40, 60, 3), dtype=np.uint8))
    process = Preprocessing(32, resize=mode)
    assert np.array_equal(process(image, flip=True), process(image)[:, ::-1])


def test_a_narrow_strip_is_no_memory_bomb() -> None:
    """Its short side enlarged to 224 would make the long one 22 million pixels."""
    strip = Image.new("RGB", (1, 100_000), "red")
    assert Preprocessing(224, resize="crop")(strip).shape == (224, 224, 3)


@pytest.mark.parametrize(
    "change",
    [
        {"size": 0},
        {"size": 10**6},
        {"resize": "stretch"},
        {"std": [0, 1, 1]},
        {"mean": None},
        {"mean": "abc"},
        {"surprise": 1},
        {"std": [1, 1]},
        {"mean": [True] * 3},
    ],
    ids=str,
)
def test_impossible_preprocessing_is_refused(change: dict) -> None:
    stored = {"size": 64, "resize": "squash", "mean": [0.5] * 3, "std": [0.5] * 3}
    assert preprocessing_from_json(stored) == Preprocessing(64, "squash", (0.5,) * 3, (0.5,) * 3)
    with pytest.raises(CapGenError):
        preprocessing_from_json(stored | change)


def test_resize_can_be_chosen() -> None:
    assert build_encoder("efficientnet_lite0", resize="crop").preprocessing.resize == "crop"


# --- weights


def test_the_hash_follows_every_weight_and_buffer() -> None:
    encoder = tiny_encoder()
    first = encoder.weights_hash()
    assert first == tiny_encoder().weights_hash() != tiny_encoder(seed=1).weights_hash()
    encoder.trunk[1].running_var[3] += 1e-4
    assert encoder.weights_hash() != first


@pytest.fixture(scope="module")
def random_resnet(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("resnet")
    tensors = import_torchvision().models.resnet18(weights=None).state_dict()
    torch.save(tensors, folder / "resnet18.pth")
    save_file(tensors, folder / "resnet18.safetensors")
    torch.save({"state_dict": tensors}, folder / "wrapped.pth")
    return folder, tensors


@pytest.mark.parametrize("name", ["resnet18.pth", "resnet18.safetensors"])
def test_a_resnet_comes_from_a_local_file(random_resnet: tuple[Path, dict], name: str) -> None:
    folder, tensors = random_resnet
    encoder = build_encoder("resnet18", folder / name)
    assert torch.equal(encoder.trunk[0].weight, tensors["conv1.weight"])
    full = import_torchvision().models.resnet18(weights=None)
    full.load_state_dict(tensors)
    pixels = torch.randint(0, 255, (2, 224, 224, 3))
    out = encoder(pixels)
    assert out["grid"].shape == (2, 49, 512)
    inputs = (pixels.permute(0, 3, 1, 2) / 255 - encoder.mean) / encoder.std
    torch.testing.assert_close(full.fc(out["pooled"]), full.eval()(inputs), atol=1e-3, rtol=1e-3)


class Hostile:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.path,)


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path: Path) -> None:
    trap = tmp_path / "the code ran"
    torch.save({"conv1.weight": Hostile(str(trap))}, tmp_path / "evil.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Hostile(str(trap))))
    for name in ("evil.pth", "plain.pth"):
        for encoder in ("resnet18", "efficientnet_lite0"):
            with pytest.raises(CapGenError, match=name):
                build_encoder(encoder, tmp_path / name)
    assert not trap.exists()


@pytest.mark.parametrize("encoder", ["resnet18", "efficientnet_lite0", "shapes_cnn"])
@pytest.mark.parametrize(
    "name", ["other.safetensors", "other.pth", "text.pth", "wrapped.pth", "missing.pth", "list.pth"]
)
def test_the_wrong_file_is_named(
    random_resnet: tuple[Path, dict], tmp_path: Path, encoder: str, name: str
) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "other.safetensors")
    torch.save({"a": torch.ones(2)}, tmp_path / "other.pth")
    torch.save([torch.ones(2)], tmp_path / "list.pth")
    (tmp_path / "text.pth").write_text("no weights")
    folder = random_resnet[0] if name == "wrapped.pth" else tmp_path
    with pytest.raises(CapGenError, match=name.split(".")[0]) as error:
        build_encoder(encoder, folder / name)
    assert error.value.remedy


def test_without_a_network_three_ways_are_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OSError("Network is unreachable")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    with pytest.raises(CapGenError, match="resnet50 cannot be downloaded") as error:
        resnet("resnet50")
    assert all(
        way in error.value.remedy for way in ("network", "--encoder-weights", "efficientnet_lite0")
    )


def test_unknown_encoders_are_refused() -> None:
    with pytest.raises(CapGenError, match="resnet50"):
        build_encoder("resnet51")
    assert {"efficientnet_lite0", "shapes_cnn", "resnet50"} <= set(ENCODERS)


def test_shapes_cnn_says_that_it_has_to_be_trained(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CAPGEN_DATA", str(tmp_path))
    with pytest.raises(CapGenError, match="not been trained") as error:
        build_encoder("shapes_cnn")
    assert "capgen pretrain" in error.value.remedy


def test_pixels_hands_on_what_it_gets() -> None:
    array = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    out = encode_images(Pixels(new_shapes_cnn(32).preprocessing), [array], torch.float32)["pixels"]
    assert torch.equal(out[0], torch.from_numpy(array).half())


def test_an_encoder_folder_comes_back(tmp_path: Path) -> None:
    from capgen_utils.vision.encoders import save_encoder

    encoder = new_shapes_cnn(32)
    save_encoder(tmp_path / "e", encoder)
    again = load_encoder_folder(tmp_path / "e")
    assert again.describe() == encoder.describe() and not again.public


# --- the bundled one


@pytest.fixture(scope="module")
def lite0() -> Encoder:
    return build_encoder("efficientnet_lite0")


def test_lite0_is_there_without_a_network(lite0: Encoder) -> None:
    photos = sorted(PHOTOS.glob("*.jpg"))[:3]
    out = encode_images(lite0, photos, torch.float32)
    assert out["grid"].shape == (3, 49, 1280) and out["pooled"].shape == (3, 1280)
    assert torch.isfinite(out["grid"]).all()
    assert (out["pooled"][0] - out["pooled"][1]).abs().max() > 0.1
    assert lite0.preprocessing == Preprocessing(224, "squash", (0.5,) * 3, (0.5,) * 3)
    assert (
        lite0.public and lite0.weights_hash() == build_encoder("efficientnet_lite0").weights_hash()
    )


@pytest.mark.parametrize(
    ("photo", "classes"), [("dog_panting.jpg", DOGS), ("cat_on_deck.jpg", CATS)]
)
def test_lite0s_weights_are_in_their_places(lite0: Encoder, photo: str, classes: range) -> None:
    """Loaded by position: one pair swapped, and a dog would be no dog any more."""
    import timm

    from capgen_utils.vision.encoders import lite0_file

    full = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    tensors = torch.load(lite0_file(), map_location="cpu", weights_only=True)
    full.load_state_dict(dict(zip(full.state_dict(), tensors.values(), strict=True)))
    pooled = encode_images(lite0, [PHOTOS / photo], torch.float32)["pooled"].float()
    with torch.inference_mode():
        best = full.eval().classifier(pooled).argmax().item()
    assert best in classes
