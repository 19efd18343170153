"""Two operations every captioner uses, written for CPUs too: attention and dropout."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def attend(query: Tensor, keys: Tensor, values: Tensor, causal: bool = False) -> Tensor:
    """Scaled dot-product attention; (..., T, width), (..., N, width) -> (..., T, width).

    On a CPU it runs in fp32 also under autocast: a captioner's heads are so small that the bf16 kernels take
    several times as long there.
    """
    if query.device.type != "cpu":
        return F.scaled_dot_product_attention(query, keys, values, is_causal=causal)
    with torch.autocast("cpu", enabled=False):
        return F.scaled_dot_product_attention(query.float(), keys.float(), values.float(), is_causal=causal)


def dropout(x: Tensor, probability: float, training: bool) -> Tensor:
    """Zero each element with ``probability`` while training and scale the others up.

    torch draws one random number an element, on one core, which can take a third of a training step on a CPU.
    There, eight elements share the bytes of one 64-bit number instead; the probability is rounded to 1/256.
    """
    if not training or not probability or x.device.type != "cpu":
        return F.dropout(x, probability, training)
    dropped = min(255, max(1, round(probability * 256)))
    numbers = torch.empty(-(-x.numel() // 8), dtype=torch.int64).random_(-(2**63), None)
    keep = numbers.view(torch.uint8)[: x.numel()].view(x.shape) >= dropped
    return x * (keep.to(x.dtype) * (256 / (256 - dropped)))


class Dropout(nn.Module):
    """``dropout`` as a module."""

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` with elements dropped while training."""
        return dropout(x, self.probability, self.training)
