"""An encoder and a captioner trained as one, so that a small encoder can be pre-trained from image-caption pairs."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from capgen_utils.encoders import Encoder
from capgen_utils.models.base import CaptionModel, State

SHIFT = 4  # pixels; what is left of, or above, something stays so


def shifted(pixels: Tensor, furthest: int = SHIFT) -> Tensor:
    """Move each image (B, H, W, C) by up to ``furthest`` pixels along both axes; its edge is repeated."""
    height, width = pixels.shape[1:3]
    moves = torch.randint(-furthest, furthest + 1, (len(pixels), 2)).tolist()
    rows = [(torch.arange(height) + down).clamp(0, height - 1) for down, _ in moves]
    columns = [(torch.arange(width) + right).clamp(0, width - 1) for _, right in moves]
    return torch.stack([image[r][:, c] for image, r, c in zip(pixels, rows, columns, strict=True)])


class JointCaptioner(CaptionModel):
    """Reads pixels: ``encode`` runs the encoder's network, then the captioner's own ``encode``.

    Args:
        encoder: its ``trunk`` learns here; on its own it is frozen.
        captioner: any captioner that reads one of the encoder's outputs.
    """

    name = "joint"
    feature = "pixels"

    def __init__(self, encoder: Encoder, captioner: CaptionModel) -> None:
        super().__init__()
        self.encoder, self.captioner, self.config = encoder, captioner, captioner.config
        self.chunks = captioner.chunks
        encoder.trunk.requires_grad_(True)

    def encode(self, features: Tensor) -> Any:
        """``features`` are pixels (B, size, size, 3), 0 to 255; while training, each image is shifted a little.

        So the encoder meets every drawing in many places and learns shapes rather than drawings.
        """
        features = shifted(features) if self.training else features
        return self.captioner.encode(self.encoder(features)[self.captioner.feature])

    def forward(self, memory: Any, tokens: Tensor, image: Tensor) -> Tensor:
        """See ``CaptionModel.forward``."""
        return self.captioner(memory, tokens, image)

    def loss(self, memory: Any, tokens: Tensor, image: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """See ``CaptionModel.loss``."""
        return self.captioner.loss(memory, tokens, image, targets, label_smoothing)

    def advance(self, share: float) -> None:
        """See ``CaptionModel.advance``."""
        self.captioner.advance(share)

    def start(self, memory: Any) -> State:
        """See ``CaptionModel.start``."""
        return self.captioner.start(memory)

    def step(self, tokens: Tensor, state: Any, attention: bool = False) -> tuple[Tensor, Any, Mapping[str, Tensor]]:
        """See ``CaptionModel.step``."""
        return self.captioner.step(tokens, state, attention)
