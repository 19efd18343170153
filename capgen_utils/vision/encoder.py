"""What every image encoder is to the rest of the package (notebook 02)."""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from capgen_utils.common.files import CapGenError
from capgen_utils.vision.preprocessing import Preprocessing

FOLDER_REMEDY = "train the encoder again (capgen pretrain), or get the bundle again"


class Encoder(nn.Module):
    """A frozen network with its preprocessing.

    Attributes:
        name: key in ``ENCODERS``; what results call it.
        preprocessing: of the images.
        outputs: shape of each named output for one image, such as ``{"grid": (49, 1280), "pooled":
            (1280,)}``.
        settings: what it takes to build the network again, for encoders that are not public.
        public: the weights can be had by name; else a bundle carries them.
        training_run: minutes, epochs and machine of its pre-training, for an encoder that was
            trained here.
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
        """How images become input; setting it also sets the mean and deviation that ``forward``
        applies."""
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
        """Stay in eval mode whatever is asked: BatchNorm statistics of a frozen encoder must not
        drift."""
        return super().train(False)

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """Encode ``pixels`` (B, size, size, 3), values 0 to 255, into ``grid`` (B, N, D) and
        ``pooled`` (B, D)."""
        images = (
            pixels.permute(0, 3, 1, 2).float() / 255
        )  # (B, 3, size, size), channels last in memory
        maps = self.trunk((images - self.mean) / self.std)  # (B, D, h, w)
        return {"grid": maps.flatten(2).transpose(1, 2), "pooled": maps.mean((2, 3))}

    def from_stem(self, grid: Tensor) -> dict[str, Tensor]:
        """Encode the ``grid`` (B, N, D) of the stem, for encoders that have one: what ``forward``
        makes of images."""
        raise NotImplementedError(f"{self.name} reads pixels")

    def weights_hash(self) -> str:
        """Return a hash (16 hexadecimal digits) of all weights and buffers of the network, its
        stem's included."""
        return hash_tensors(
            self.trunk.state_dict(), self.stem.weights_hash() if self.stem is not None else ""
        )

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
            tensors = torch.load(
                path, map_location="cpu", weights_only=True
            )  # tensors only: runs no code
    except Exception as error:
        raise CapGenError(f"cannot load weights from {path}: {str(error)[:300]}", remedy) from error
    if not isinstance(tensors, dict) or not all(
        isinstance(tensor, Tensor) for tensor in tensors.values()
    ):
        raise CapGenError(f"{path} holds something else than named tensors", remedy)
    return tensors


class Pixels(Encoder):
    """Not a network: hands the pixels on, so that an encoder can be trained by the loop that reads
    cached features."""

    def __init__(self, preprocessing: Preprocessing) -> None:
        shape = (preprocessing.size, preprocessing.size, 3)
        super().__init__("pixels", nn.Identity(), preprocessing, {"pixels": shape}, public=False)

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """Return ``pixels`` (B, size, size, 3) unchanged; values up to 255 are exact in float16."""
        return {"pixels": pixels.float()}
