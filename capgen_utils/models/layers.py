"""Parts that captioners share: attention, the transformer layer and a stack of them
(notebook 05)."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from capgen_utils.common.files import CapGenError
from capgen_utils.common.tensors import sinusoids
from capgen_utils.config import ClipPrefixConfig, TransformerConfig
from capgen_utils.models.base import CaptionModel, Grouping, KeyValues, Memory, SharedState


@dataclass
class TransformerMemory(Memory):
    """Projected keys and values of B images for every layer: (layers, B, heads, N, width)."""

    axis: ClassVar[int] = 1
    keys: Tensor
    values: Tensor

    @classmethod
    def split(cls, projected: Tensor, layers: Sequence[Any]) -> Self:
        """Split what one linear map returned for all ``layers``: (B, N, 2 * layers * width)."""
        parts = projected.unflatten(-1, (2, len(layers), layers[0].heads, -1))
        keys, values = parts.permute(2, 3, 0, 4, 1, 5)  # each (layers, B, heads, N, width)
        return cls(keys, values)


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


class DecoderLayer(nn.Module):
    """Self-attention, cross-attention and feed-forward, each with a layer norm and a residual.

    Args:
        config: sizes.
        cross: include cross-attention to an image; without it the layer is GPT-2's.

    Attributes:
        heads, width: attention heads, and the width of each.

    Raises:
        CapGenError: the heads do not divide the width.
    """

    def __init__(self, config: TransformerConfig | ClipPrefixConfig, cross: bool = True) -> None:
        super().__init__()
        width = config.d_model
        if width % config.n_head:
            raise CapGenError(
                f"d_model {width} is not a multiple of n_head {config.n_head}",
                "choose another width or number of heads",
            )
        self.heads, self.width = config.n_head, width // config.n_head
        self.norm_self = nn.LayerNorm(width)
        if cross:
            self.norm_cross = nn.LayerNorm(width)
        self.norm_feed = nn.LayerNorm(width)
        self.self_qkv, self.self_out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        if cross:
            self.cross_query, self.cross_out = nn.Linear(width, width), nn.Linear(width, width)
        self.feed: Any = nn.Sequential(
            nn.Linear(width, config.fc_dim), nn.GELU(), nn.Linear(config.fc_dim, width)
        )

    def split_heads(self, x: Tensor) -> Tensor:
        """(M, T, D) -> (M, heads, T, D / heads)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def project_self(self, x: Tensor) -> list[Tensor]:
        """Self-attention's query, key, value: (M, T, D) -> three (M, heads, T, D / heads)."""
        return [self.split_heads(part) for part in self.self_qkv(self.norm_self(x)).chunk(3, -1)]


class LayeredCaptioner(CaptionModel):
    """A captioner that is a stack of layers with self-attention over the words.

    Attributes:
        layers: each a ``DecoderLayer``, first to last.
    """

    layers: Any

    def build_words(self, config: Any, vocabulary_size: int, cross: bool) -> None:
        """Make all parts that read and score words; everything starts at about unit size."""
        width = config.d_model
        self.embedding = nn.Embedding(vocabulary_size, width)
        self.position = nn.Parameter(sinusoids(torch.arange(config.seq_len), width))
        self.layers = nn.ModuleList(DecoderLayer(config, cross) for _ in range(config.n_decode))
        self.norm = nn.LayerNorm(width)
        self.output_bias = nn.Parameter(torch.zeros(vocabulary_size))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
                nn.init.zeros_(module.bias)
        for layer in self.layers:  # what layers add starts small, so that the sum stays small
            added = [layer.self_out, *([layer.cross_out] if cross else []), layer.feed[-1]]
            for linear in added:
                std = (len(added) * config.n_decode * linear.in_features) ** -0.5
                nn.init.normal_(linear.weight, std=std)
        nn.init.normal_(self.embedding.weight, std=width**-0.5)

    def embed(self, tokens: Tensor) -> Tensor:
        """Token ids (...) -> (..., D), scaled to unit size; the output shares the matrix."""
        return self.embedding(tokens) * self.config.d_model**0.5

    def embed_words(self, tokens: Tensor, first: int = 0) -> Tensor:
        """Token ids (M, T) at positions ``first``, ... -> the first layer's input (M, T, D)."""
        return self.drop(self.embed(tokens) + self.position[first : first + tokens.shape[1]])

    def logits(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., V); the output matrix is the embedding (arXiv 1608.05859)."""
        return F.linear(self.norm(x), self.embedding.weight, self.output_bias)

    def add_image(
        self, i: int, x: Tensor, state: SharedState, attention: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Add layer i's attention over the image to ``x`` (M, T, D); by default nothing is added.

        Returns:
            The sum, and the weights (M, heads, T, N) if asked for.
        """
        return x, None

    def run_layer(
        self, i: int, x: Tensor, state: SharedState, cache: Any = None, attention: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Layer i: (M, T, D) -> (M, T, D), of whole captions, or of the newest token of ``cache``.

        Returns:
            The sum, and the weights over the image (M, heads, T, N) if asked for.
        """
        layer = self.layers[i]
        query, keys, values = layer.project_self(x)  # (M, heads, T, width) each
        if cache is not None:
            keys, values = cache.put(i, keys, values)  # of all tokens so far
        attended = attend(query, keys, values, causal=cache is None)  # (M, heads, T, width)
        x = x + self.drop(layer.self_out(attended.transpose(1, 2).flatten(2)))
        x, weights = self.add_image(i, x, state, attention)
        return x + self.drop(layer.feed(layer.norm_feed(x))), weights

    def forward(self, memory: Any, tokens: Tensor, image: Tensor) -> Tensor:
        """Logits (M, T, V) of the next token at every position; see ``CaptionModel.forward``."""
        state = SharedState(memory, image, ())
        x = self.embed_words(self.hide_words(tokens))  # (M, T, D)
        for i in range(len(self.layers)):  # self-attention, attention over the image, feed-forward
            x, _ = self.run_layer(i, x, state)
        return self.logits(x)

    def start(self, memory: Any) -> SharedState:
        """The state before the first token, one hypothesis per image."""
        like = next(iter(memory.tensors().values()))  # the cache takes its device and dtype
        count, layer = len(self.layers), self.layers[0]
        empty = KeyValues.new(like, count, memory.images, layer.heads, layer.width)
        return SharedState.new(memory, empty)

    def step(
        self, tokens: Tensor, state: SharedState, attention: bool = False
    ) -> tuple[Tensor, SharedState, Mapping[str, Tensor]]:
        """One position with a cache; see ``CaptionModel.step``. Weights are named ``layer0`` ..."""
        cache = state.cache[0].longer()
        x = self.embed_words(tokens[:, None], cache.length - 1)  # (M, 1, D)
        return self.finish_step(x, state, attention, cache)

    def finish_step(
        self, x: Tensor, state: SharedState, attention: bool, *cache: Any
    ) -> tuple[Tensor, SharedState, Mapping[str, Tensor]]:
        """Run all layers on the newest token (M, 1, D), with room for it in ``cache[0]``."""
        weights = {}
        for i in range(len(self.layers)):
            x, looked = self.run_layer(i, x, state, cache[0], attention)
            if looked is not None:
                weights[f"layer{i}"] = looked[:, :, 0]  # (M, heads, N)
        return self.logits(x[:, 0]), state.after(*cache), weights

    def attention_by_layer(self, memory: Any, tokens: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """See ``CaptionModel.attention_by_layer``."""
        state, x = SharedState(memory, tokens.new_zeros(1), ()), self.embed_words(tokens)
        later = tokens.new_ones(2 * [tokens.shape[1]]).triu(1).bool()  # (T, T)
        for i, layer in enumerate(self.layers):
            query, key, _ = layer.project_self(x)  # (1, heads, T, width) each
            scores = query @ key.transpose(-1, -2) * layer.width**-0.5  # (1, heads, T, T)
            x, looked = self.run_layer(i, x, state, attention=True)
            if looked is not None:
                yield looked, scores.masked_fill(later, -torch.inf).softmax(-1)
