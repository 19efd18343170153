"""ResNet + transformer: a decoder that looks at the image grid through cross-attention ("Attention is all you need",
arXiv 1706.03762, in its pre-norm form, arXiv 2002.04745)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from capgen_utils.config import TransformerConfig
from capgen_utils.files import CapGenError
from capgen_utils.models.base import CaptionModel, Grouping
from capgen_utils.models.layers import attend, dropout


@dataclass
class TransformerMemory:
    """Projected keys and values of B images for every layer: (layers, B, heads, N, width)."""

    keys: Tensor
    values: Tensor


@dataclass
class TransformerState:
    """What decoding carries: the images' memory, shared, and each hypothesis's own keys and values.

    Attributes:
        memory: of B images; never copied.
        image: (M,), the row of ``memory`` of each hypothesis.
        keys, values: (layers, M, heads, T, width) of the tokens read so far.
        grouping: of ``image``, kept while the set of hypotheses stays the same.
    """

    memory: TransformerMemory
    image: Tensor
    keys: Tensor
    values: Tensor
    grouping: Grouping

    def select(self, rows: Tensor) -> "TransformerState":
        """Return the state of hypotheses ``rows`` (M',).

        The images' memory is not copied, but for this: once half of the images have no hypothesis
        left, the rest move together, so that finished captions cost nothing.
        """
        image, memory = self.image[rows], self.memory
        present = torch.unique(image)
        if 2 * len(present) <= memory.keys.shape[1]:
            memory = TransformerMemory(memory.keys[:, present], memory.values[:, present])
            image = torch.searchsorted(present, image)
        same = memory is self.memory and torch.equal(image, self.image)
        grouping = self.grouping if same else Grouping(image, memory.keys.shape[1])
        return TransformerState(memory, image, self.keys[:, rows], self.values[:, rows], grouping)


def sinusoids(places: Tensor, width: int) -> Tensor:
    """Sines and cosines of ``places`` (N,) at wavelengths from 2 pi to 10000 x 2 pi: (N, width)."""
    rates = 10000 ** (-torch.arange(0, width, 2) / width)
    angles = places[:, None] * rates  # (N, width / 2)
    return torch.cat([angles.sin(), angles.cos()], dim=1)[:, :width]


def grid_sinusoids(positions: int, width: int) -> Tensor:
    """Sines and cosines of row and column, half of the width each, for a square grid; one axis for any other."""
    side = math.isqrt(positions)
    if side * side != positions:
        return sinusoids(torch.arange(positions), width)
    row, column = torch.arange(positions) // side, torch.arange(positions) % side
    return torch.cat([sinusoids(row, width // 2), sinusoids(column, width - width // 2)], dim=1)


class DecoderLayer(nn.Module):
    """Self-attention, cross-attention and feed-forward, each behind a layer norm and beside a residual."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        width, self.heads, self.dropout = config.d_model, config.n_head, config.dropout
        self.norm_self, self.norm_cross, self.norm_feed = (nn.LayerNorm(width) for _ in range(3))
        self.self_qkv = nn.Linear(width, 3 * width)
        self.self_out = nn.Linear(width, width)
        self.cross_query = nn.Linear(width, width)
        self.cross_out = nn.Linear(width, width)
        self.feed = nn.Sequential(nn.Linear(width, config.fc_dim), nn.GELU(), nn.Linear(config.fc_dim, width))

    def last_linears(self) -> list[nn.Linear]:
        """The three linear maps whose results are added to the residual stream."""
        return [m for m in (self.self_out, self.cross_out, self.feed[-1]) if isinstance(m, nn.Linear)]

    def split_heads(self, x: Tensor) -> Tensor:
        """(M, T, D) -> (M, heads, T, D / heads)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def project_self(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of self-attention: (M, T, D) -> three (M, heads, T, D / heads)."""
        query, key, value = self.self_qkv(self.norm_self(x)).chunk(3, dim=-1)
        return self.split_heads(query), self.split_heads(key), self.split_heads(value)

    def add_self(self, x: Tensor, query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Tensor:
        """Add self-attention to ``x`` (M, T, D)."""
        attended = attend(query, key, value, causal)
        return x + self.drop(self.self_out(attended.transpose(1, 2).flatten(2)))

    def add_cross(
        self, x: Tensor, keys: Tensor, values: Tensor, grouping: Grouping, attention: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Add attention over the image to ``x`` (M, T, D).

        Args:
            keys, values: (B, heads, N, D / heads), one entry an image, shared by all of its captions.
            grouping: which captions belong to which image.
            attention: also return the weights (M, heads, T, N).
        """
        query = self.split_heads(self.cross_query(self.norm_cross(x)))  # (M, heads, T, width)
        length = query.shape[2]
        grouped = grouping.gather(query).transpose(1, 2).flatten(2, 3)  # (B, heads, S * T, width)
        weights = None
        if attention:
            scores = grouped @ keys.transpose(-1, -2) * grouped.shape[-1] ** -0.5
            weights = scores.softmax(-1)  # (B, heads, S * T, N)
            attended = weights @ values
            weights = grouping.scatter(weights.unflatten(2, (-1, length)).transpose(1, 2))
        else:
            attended = attend(grouped, keys, values)
        attended = grouping.scatter(attended.unflatten(2, (-1, length)).transpose(1, 2))  # (M, heads, T, width)
        return x + self.drop(self.cross_out(attended.transpose(1, 2).flatten(2))), weights

    def add_feed(self, x: Tensor) -> Tensor:
        """Add the feed-forward network to ``x`` (M, T, D)."""
        return x + self.drop(self.feed(self.norm_feed(x)))

    def drop(self, x: Tensor) -> Tensor:
        """Dropout while training."""
        return dropout(x, self.dropout, self.training)


class TransformerCaptioner(CaptionModel):
    """Grid features -> projected keys and values once an image -> words, one at a time.

    Args:
        config: hyperparameters.
        vocabulary_size: V.
        feature_shape: (N, D) of the encoder's grid.
        unk_id: the id that word dropout writes over hidden words.
    """

    name = "transformer"
    feature = "grid"

    def __init__(
        self, config: TransformerConfig, vocabulary_size: int, feature_shape: tuple[int, ...], unk_id: int
    ) -> None:
        super().__init__()
        if config.d_model % config.n_head:
            raise CapGenError(
                f"d_model {config.d_model} is no multiple of n_head {config.n_head}", "choose widths that divide"
            )
        self.config, self.unk_id = config, unk_id
        positions, depth = feature_shape
        width = config.d_model
        self.image_projection = nn.Linear(depth, width)
        self.image_position = nn.Parameter(torch.empty(positions, width))
        self.image_norm = nn.LayerNorm(width)
        self.cross_keys_values = nn.Linear(width, 2 * config.n_decode * width)
        self.embedding = nn.Embedding(vocabulary_size, width)
        self.position = nn.Parameter(torch.empty(config.seq_len, width))
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.n_decode))
        self.norm = nn.LayerNorm(width)
        self.output_bias = nn.Parameter(torch.zeros(vocabulary_size))
        self._initialise()

    def _initialise(self) -> None:
        """Every signal starts at about unit size: words, their places, image vectors, and their places too."""
        width = self.config.d_model
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
                nn.init.zeros_(module.bias)
        for layer in self.decoder_layers():
            for last in layer.last_linears():  # so that the sum of all layers stays small
                nn.init.normal_(last.weight, std=(3 * self.config.n_decode * last.in_features) ** -0.5)
        nn.init.normal_(self.embedding.weight, std=width**-0.5)
        with torch.no_grad():
            self.position.copy_(sinusoids(torch.arange(self.config.seq_len), width))
            self.image_position.copy_(grid_sinusoids(len(self.image_position), width))

    def decoder_layers(self) -> list[DecoderLayer]:
        """Return the layers from the first to the last."""
        return [layer for layer in self.layers if isinstance(layer, DecoderLayer)]

    def encode(self, features: Tensor) -> TransformerMemory:
        """(B, N, D) grid features -> keys and values of every layer."""
        x = self.image_projection(features)
        x = self.image_norm(x) + self.image_position  # (B, N, d_model)
        x = dropout(x, self.config.dropout, self.training)
        keys_values = self.cross_keys_values(x)  # (B, N, 2 * layers * d_model)
        keys_values = keys_values.unflatten(-1, (2, self.config.n_decode, self.config.n_head, -1))
        keys, values = keys_values.permute(2, 3, 0, 4, 1, 5)  # each (layers, B, heads, N, width)
        return TransformerMemory(keys, values)

    def forward(self, memory: TransformerMemory, tokens: Tensor, image: Tensor) -> Tensor:
        """Logits (M, T, V) of the next token at every position; see ``CaptionModel.forward``."""
        if self.training and self.config.word_dropout:
            hidden = torch.rand(tokens.shape, device=tokens.device) < self.config.word_dropout
            hidden[:, 0] = False  # the start token is no word
            tokens = tokens.masked_fill(hidden, self.unk_id)
        grouping = Grouping(image, memory.keys.shape[1])
        x = self.embed(tokens) + self.position[: tokens.shape[1]]  # (M, T, d_model)
        x = dropout(x, self.config.dropout, self.training)
        for i, layer in enumerate(self.decoder_layers()):
            x = layer.add_self(x, *layer.project_self(x), causal=True)
            x, _ = layer.add_cross(x, memory.keys[i], memory.values[i], grouping)
            x = layer.add_feed(x)
        return self.logits(x)

    def embed(self, tokens: Tensor) -> Tensor:
        """Token ids (...) -> (..., d_model), scaled to unit size: the same matrix also scores the output."""
        return self.embedding(tokens) * self.config.d_model**0.5

    def logits(self, x: Tensor) -> Tensor:
        """(..., d_model) -> (..., V); the output matrix is the embedding (arXiv 1608.05859)."""
        return F.linear(self.norm(x), self.embedding.weight, self.output_bias)

    def start(self, memory: TransformerMemory) -> TransformerState:
        """The state before the first token, one hypothesis an image."""
        layers, images, heads, _, width = memory.keys.shape
        empty = memory.keys.new_zeros(layers, images, heads, 0, width)
        image = torch.arange(images, device=memory.keys.device)
        return TransformerState(memory, image, empty, empty, Grouping(image, images))

    def step(
        self, tokens: Tensor, state: TransformerState, attention: bool = False
    ) -> tuple[Tensor, TransformerState, Mapping[str, Tensor]]:
        """One position, earlier keys and values cached; see ``CaptionModel.step``. Weights are named ``layer0`` ..."""
        at = state.keys.shape[3]
        x = self.embed(tokens)[:, None] + self.position[at]  # (M, 1, d_model)
        keys, values, weights = [], [], {}
        for i, layer in enumerate(self.decoder_layers()):
            query, key, value = layer.project_self(x)
            keys.append(torch.cat([state.keys[i], key], dim=2))
            values.append(torch.cat([state.values[i], value], dim=2))
            x = layer.add_self(x, query, keys[i], values[i], causal=False)
            x, looked = layer.add_cross(x, state.memory.keys[i], state.memory.values[i], state.grouping, attention)
            x = layer.add_feed(x)
            if looked is not None:
                weights[f"layer{i}"] = looked[:, :, 0]
        state = replace(state, keys=torch.stack(keys), values=torch.stack(values))
        return self.logits(x[:, 0]), state, weights
