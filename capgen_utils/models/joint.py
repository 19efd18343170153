"""An encoder and a captioner trained as one, so that a small encoder can be pre-trained from image-caption pairs."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from capgen_utils.encoders import Encoder
from capgen_utils.models.base import CaptionModel, State


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
        encoder.trunk.requires_grad_(True)

    def encode(self, features: Tensor) -> Any:
        """``features`` are pixels (B, size, size, 3), 0 to 255."""
        return self.captioner.encode(self.encoder(features)[self.captioner.feature])

    def forward(self, memory: Any, tokens: Tensor, image: Tensor) -> Tensor:
        """See ``CaptionModel.forward``."""
        return self.captioner(memory, tokens, image)

    def start(self, memory: Any) -> State:
        """See ``CaptionModel.start``."""
        return self.captioner.start(memory)

    def step(self, tokens: Tensor, state: Any, attention: bool = False) -> tuple[Tensor, Any, Mapping[str, Tensor]]:
        """See ``CaptionModel.step``."""
        return self.captioner.step(tokens, state, attention)
