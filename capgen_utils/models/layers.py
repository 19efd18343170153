"""Parts that captioners share: attention, dropout and the transformer layer (notebook 05)."""

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from capgen_utils.models.base import Grouping, Memory


@dataclass
class TransformerMemory(Memory):
    """Projected keys and values of B images for every layer: (layers, B, heads, N, width)."""

    axis: ClassVar[int] = 1
    keys: Tensor
    values: Tensor


def attend(query: Tensor, keys: Tensor, values: Tensor, causal: bool = False) -> Tensor:
    """Scaled dot-product attention; (..., T, width), (..., N, width) -> (..., T, width).

    On a CPU it runs in fp32 even under autocast: for heads as small as a captioner's the bf16
    kernels are several times slower.
    """
    if query.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
        return F.scaled_dot_product_attention(query, keys, values, is_causal=causal)
    with torch.autocast("cpu", enabled=False):
        return F.scaled_dot_product_attention(
            query.float(), keys.float(), values.float(), is_causal=causal
        )


def attend_images(
    query: Tensor, keys: Tensor, values: Tensor, grouping: Grouping, attention: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Attention of captions over their images, without copying the images.

    Args:
        query: (M, heads, T, width).
        keys, values: (B, heads, N, width), one entry per image, shared by all of its captions.
        grouping: which captions belong to which image.
        attention: also return the weights.

    Returns:
        The attended values (M, heads, T, width), and the weights (M, heads, T, N) if asked for.
    """
    length = query.shape[2]
    grouped = grouping.gather(query).transpose(1, 2).flatten(2, 3)  # (B, heads, S * T, width)
    weights = None
    if attention:
        scores = grouped @ keys.transpose(-1, -2) * grouped.shape[-1] ** -0.5
        weights = scores.softmax(-1)  # (B, heads, S * T, N)
        attended = weights @ values  # (B, heads, S * T, width)
        weights = grouping.scatter(weights.unflatten(2, (-1, length)).transpose(1, 2))
    else:
        attended = attend(grouped, keys, values)
    return grouping.scatter(attended.unflatten(2, (-1, length)).transpose(1, 2)), weights


def dropout(x: Tensor, probability: float, training: bool) -> Tensor:
    """Zero each element with ``probability`` while training and scale the others up.

    On a CPU, torch draws one random number per element on one core, which can take a third of a
    training step. Here, eight elements share the bytes of one 64-bit number instead; the
    probability is rounded to 1/256.
    """
    if not training or not probability:
        return x
    if x.device.type != "cpu":
        return F.dropout(x, probability)
    dropped = min(255, max(1, round(probability * 256)))
    numbers = torch.empty(-(-x.numel() // 8), dtype=torch.int64).random_(-(2**63), None)
    keep = numbers.view(torch.uint8)[: x.numel()].view(x.shape) >= dropped
    return x * (keep.to(x.dtype) * (256 / (256 - dropped)))


def hide_words(tokens: Tensor, probability: float, unk_id: int, training: bool) -> Tensor:
    """Replace words of ``tokens`` (M, T) by ``unk_id`` with ``probability`` while training.

    The decoder then has to look at the image instead of completing the sentence from memory. The
    start token is kept.
    """
    if not training or not probability:
        return tokens
    hidden = torch.rand(tokens.shape, device=tokens.device) < probability
    hidden[:, 0] = False
    return tokens.masked_fill(hidden, unk_id)


class Dropout(nn.Module):
    """``dropout`` as a module."""

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` with elements dropped while training."""
        return dropout(x, self.probability, self.training)


def causal_weights(query: Tensor, key: Tensor) -> Tensor:
    """Return the weights (M, heads, T, T) of self-attention over earlier tokens and the token
    itself.

    Args:
        query, key: (M, heads, T, width).
    """
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5  # (M, heads, T, T)
    later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)  # (T, T)
    return scores.masked_fill(later, -torch.inf).softmax(-1)


class DecoderSizes(Protocol):
    """The hyperparameters that a decoder layer needs."""

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        ...

    @property
    def n_head(self) -> int:
        """Attention heads; divides ``d_model``."""
        ...

    @property
    def fc_dim(self) -> int:
        """Width of the feed-forward network."""
        ...

    @property
    def dropout(self) -> float:
        """Probability."""
        ...


class DecoderLayer(nn.Module):
    """Self-attention, cross-attention and feed-forward, each with a layer norm and a residual.

    Args:
        config: sizes.
        cross: include cross-attention to an image; without it the layer is GPT-2's.
    """

    def __init__(self, config: DecoderSizes, cross: bool = True) -> None:
        super().__init__()
        width = config.d_model
        self.heads, self.dropout, self.cross = config.n_head, config.dropout, cross
        self.norm_self = nn.LayerNorm(width)
        if cross:
            self.norm_cross = nn.LayerNorm(width)
        self.norm_feed = nn.LayerNorm(width)
        self.self_qkv = nn.Linear(width, 3 * width)
        self.self_out = nn.Linear(width, width)
        if cross:
            self.cross_query = nn.Linear(width, width)
            self.cross_out = nn.Linear(width, width)
        self.feed = nn.Sequential(
            nn.Linear(width, config.fc_dim), nn.GELU(), nn.Linear(config.fc_dim, width)
        )

    def last_linears(self) -> list[nn.Linear]:
        """The linear maps whose results are added to the residual stream."""
        last = [self.self_out, *([self.cross_out] if self.cross else []), self.feed[-1]]
        return [m for m in last if isinstance(m, nn.Linear)]

    def split_heads(self, x: Tensor) -> Tensor:
        """(M, T, D) -> (M, heads, T, D / heads)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def project_self(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Self-attention's query, key, value: (M, T, D) -> three (M, heads, T, D / heads)."""
        query, key, value = self.self_qkv(self.norm_self(x)).chunk(3, dim=-1)
        return self.split_heads(query), self.split_heads(key), self.split_heads(value)

    def add_self(
        self, x: Tensor, query: Tensor, key: Tensor, value: Tensor, causal: bool
    ) -> Tensor:
        """Add self-attention to ``x`` (M, T, D)."""
        attended = attend(query, key, value, causal)  # (M, heads, T, D / heads)
        return x + self.drop(self.self_out(attended.transpose(1, 2).flatten(2)))

    def add_cross(
        self, x: Tensor, keys: Tensor, values: Tensor, grouping: Grouping, attention: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Add attention over the image to ``x`` (M, T, D).

        Args:
            keys, values: (B, heads, N, D / heads), one entry per image, shared by its captions.
            grouping: which captions belong to which image.
            attention: also return the weights (M, heads, T, N).
        """
        query = self.split_heads(self.cross_query(self.norm_cross(x)))  # (M, heads, T, width)
        attended, weights = attend_images(query, keys, values, grouping, attention)
        return x + self.drop(self.cross_out(attended.transpose(1, 2).flatten(2))), weights

    def add_feed(self, x: Tensor) -> Tensor:
        """Add the feed-forward network to ``x`` (M, T, D)."""
        return x + self.drop(self.feed(self.norm_feed(x)))

    def drop(self, x: Tensor) -> Tensor:
        """Dropout while training."""
        return dropout(x, self.dropout, self.training)
