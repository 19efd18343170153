"""ResNet + transformer: a decoder with cross-attention to the image grid (notebook 05).

"Attention is all you need", arXiv 1706.03762, in its pre-norm form, arXiv 2002.04745.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from capgen_utils.common.files import CapGenError
from capgen_utils.common.sinusoids import grid_sinusoids, sinusoids
from capgen_utils.config import RECIPES, TransformerConfig
from capgen_utils.models.base import CaptionModel, Grouping, KeyValues, SharedState
from capgen_utils.models.layers import (
    DecoderLayer,
    TransformerMemory,
    causal_weights,
    dropout,
    hide_words,
)


class TransformerCaptioner(CaptionModel):
    """Grid features -> keys and values, once per image -> words, one at a time.

    Args:
        config: hyperparameters.
        vocabulary_size: V.
        feature_shape: (N, D) of the encoder's grid.
        unk_id: the id that word dropout replaces words by.
    """

    name = "transformer"
    feature = "grid"
    Config = TransformerConfig
    recipe = RECIPES[name]

    def __init__(
        self,
        config: TransformerConfig,
        vocabulary_size: int,
        feature_shape: tuple[int, ...],
        unk_id: int,
    ) -> None:
        super().__init__()
        if config.d_model % config.n_head:
            raise CapGenError(
                f"d_model {config.d_model} is not a multiple of n_head {config.n_head}",
                "choose another width or number of heads",
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
        """Let words, image vectors and their positions all start at about unit size."""
        width = self.config.d_model
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
                nn.init.zeros_(module.bias)
        for layer in self.decoder_layers():
            for last in layer.last_linears():  # small, so that the sum over layers stays small
                std = (3 * self.config.n_decode * last.in_features) ** -0.5
                nn.init.normal_(last.weight, std=std)
        nn.init.normal_(self.embedding.weight, std=width**-0.5)
        with torch.no_grad():
            self.position.copy_(sinusoids(torch.arange(self.config.seq_len), width))
            self.image_position.copy_(grid_sinusoids(len(self.image_position), width))

    def decoder_layers(self) -> list[DecoderLayer]:
        """Return the layers, first to last."""
        return [layer for layer in self.layers if isinstance(layer, DecoderLayer)]

    def encode(self, features: Tensor) -> TransformerMemory:
        """(B, N, D) grid features -> keys and values of every layer."""
        x = self.image_projection(features)  # (B, N, d_model)
        x = self.image_norm(x) + self.image_position  # (B, N, d_model)
        x = dropout(x, self.config.dropout, self.training)
        keys_values = self.cross_keys_values(x)  # (B, N, 2 * layers * d_model)
        keys_values = keys_values.unflatten(-1, (2, self.config.n_decode, self.config.n_head, -1))
        keys, values = keys_values.permute(2, 3, 0, 4, 1, 5)  # each (layers, B, heads, N, width)
        return TransformerMemory(keys, values)

    def forward(self, memory: TransformerMemory, tokens: Tensor, image: Tensor) -> Tensor:
        """Logits (M, T, V) of the next token at every position; see ``CaptionModel.forward``."""
        tokens = hide_words(tokens, self.config.word_dropout, self.unk_id, self.training)
        grouping = Grouping(image, memory.keys.shape[1])
        x = self.embed(tokens) + self.position[: tokens.shape[1]]  # (M, T, d_model)
        x = dropout(x, self.config.dropout, self.training)
        for i, layer in enumerate(self.decoder_layers()):
            x = layer.add_self(x, *layer.project_self(x), causal=True)
            x, _ = layer.add_cross(x, memory.keys[i], memory.values[i], grouping)
            x = layer.add_feed(x)
        return self.logits(x)

    def embed(self, tokens: Tensor) -> Tensor:
        """Token ids (...) -> (..., d_model), scaled to unit size; the output shares the matrix."""
        return self.embedding(tokens) * self.config.d_model**0.5

    def logits(self, x: Tensor) -> Tensor:
        """(..., d_model) -> (..., V); the output matrix is the embedding (arXiv 1608.05859)."""
        return F.linear(self.norm(x), self.embedding.weight, self.output_bias)

    def start(self, memory: TransformerMemory) -> SharedState:
        """The state before the first token, one hypothesis per image."""
        layers, images, heads, _, width = memory.keys.shape
        return SharedState.new(memory, KeyValues.new(memory.keys, layers, images, heads, width))

    def step(
        self, tokens: Tensor, state: SharedState, attention: bool = False
    ) -> tuple[Tensor, SharedState, Mapping[str, Tensor]]:
        """One position with a cache; see ``CaptionModel.step``. Weights are named ``layer0`` ..."""
        cache = state.cache[0].longer()
        x = self.embed(tokens)[:, None] + self.position[cache.length - 1]  # (M, 1, d_model)
        weights = {}
        for i, layer in enumerate(self.decoder_layers()):
            query, key, value = layer.project_self(x)
            keys, values = cache.put(i, key, value)
            x = layer.add_self(x, query, keys, values, causal=False)
            x, looked = layer.add_cross(
                x, state.memory.keys[i], state.memory.values[i], state.grouping, attention
            )
            x = layer.add_feed(x)
            if looked is not None:
                weights[f"layer{i}"] = looked[:, :, 0]  # (M, heads, N)
        return self.logits(x[:, 0]), state.after(cache), weights

    def attention_by_layer(self, memory: Any, tokens: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """See ``CaptionModel.attention_by_layer``."""
        grouping = Grouping(tokens.new_zeros(1), 1)
        x = self.embed(tokens) + self.position[: tokens.shape[1]]  # (1, T, d_model)
        for i, layer in enumerate(self.decoder_layers()):
            query, key, value = layer.project_self(x)  # (1, heads, T, width) each
            x = layer.add_self(x, query, key, value, causal=True)
            x, looked = layer.add_cross(x, memory.keys[i], memory.values[i], grouping, True)
            x = layer.add_feed(x)
            if looked is not None:
                yield looked, causal_weights(query, key)
