"""The interface of every image encoder (notebook 02): pixels in, feature vectors out."""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from capgen_utils.vision.preprocessing import Preprocessing

FOLDER_REMEDY = "train the encoder again (capgen pretrain), or get the bundle again"


class Encoder(nn.Module):
    """A frozen network with its preprocessing; always in eval mode.

    Attributes:
        name: key in ``encoders.ENCODERS``; used in results.
        outputs: shape of each output for one image: ``{"grid": (49, 1280), "pooled": (1280,)}``.
        settings: what is needed to build the network again, for encoders that are not public.
        public: the weights can be had by name; otherwise a bundle carries them.
        training_run: minutes, epochs and machine of its pre-training, if it was trained here.
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
        trunk.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.trunk: Any = trunk.eval()
        self.preprocessing = preprocessing
        self.requires_grad_(False)

    @property
    def preprocessing(self) -> Preprocessing:
        """How images become input; setting it also sets the mean and std that ``forward`` uses."""
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
        """Stay in eval mode: the BatchNorm statistics of a frozen encoder must not drift."""
        return super().train(False)

    def normalise(self, pixels: Tensor) -> Tensor:
        """(B, size, size, 3), values 0 to 255 -> (B, 3, size, size), channels last in memory."""
        return (pixels.permute(0, 3, 1, 2).float() / 255 - self.mean) / self.std

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """Encode ``pixels`` (B, size, size, 3), values 0 to 255.

        Returns:
            ``grid`` (B, N, D) and ``pooled`` (B, D).
        """
        maps = self.trunk(self.normalise(pixels))  # (B, D, h, w)
        return {"grid": maps.flatten(2).transpose(1, 2), "pooled": maps.mean((2, 3))}

    def from_stem(self, grid: Tensor) -> dict[str, Tensor]:
        """Encode the ``grid`` (B, N, D) of the stem, if there is one; see ``forward``."""
        raise NotImplementedError(f"{self.name} reads pixels")

    def weights_hash(self) -> str:
        """Return a hash (16 hexadecimal digits) of all weights and buffers, with the stem's."""
        stem = self.stem.weights_hash() if self.stem is not None else ""
        return hash_tensors(self.trunk.state_dict(), stem)

    def describe(self) -> dict[str, Any]:
        """Return the description that bundles and results hold."""
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


class Pixels(Encoder):
    """Not a network: passes the pixels on, so an encoder trains in the loop for cached features."""

    def __init__(self, preprocessing: Preprocessing) -> None:
        outputs = {"pixels": (preprocessing.size, preprocessing.size, 3)}
        super().__init__("pixels", nn.Identity(), preprocessing, outputs, public=False)

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """Return ``pixels`` (B, size, size, 3) unchanged; values up to 255 are exact in float16."""
        return {"pixels": pixels.float()}


def hash_tensors(tensors: Mapping[str, Tensor], start: str = "") -> str:
    """Return a hash (16 hexadecimal digits) of ``start`` and of the tensors' names and values."""
    digest = hashlib.sha256(start.encode())
    for key, tensor in sorted(tensors.items()):
        digest.update(key.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
