"""ResNet + LSTM: "Show and Tell", arXiv 1411.4555 (notebook 03)."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from capgen_utils.common.files import CapGenError
from capgen_utils.common.tensors import grid_sinusoids
from capgen_utils.config import RECIPES, ShowTellConfig
from capgen_utils.models.base import CaptionModel, Memory, SharedState


@dataclass
class ShowTellMemory(Memory):
    """The LSTM's state after it has read each of B images: (B, layers, hidden)."""

    hidden: Tensor
    cell: Tensor


class ShowTellCaptioner(CaptionModel):
    """An LSTM that reads the image vectors, then generates the words.

    Args:
        config: hyperparameters.
        vocabulary_size: V.
        feature_shape: (N, D) of the encoder's grid, or (D,) of its pooled vector.
        unk_id: the id that word dropout replaces words by.
    """

    name = "show_tell"
    feature = "grid"
    Config = ShowTellConfig
    recipe = RECIPES[name]

    def __init__(
        self,
        config: ShowTellConfig,
        vocabulary_size: int,
        feature_shape: tuple[int, ...],
        unk_id: int,
    ) -> None:
        super().__init__()
        self.config, self.unk_id, self.feature = config, unk_id, self.feature_of(config)
        width = config.embed_size
        self.image_projection = nn.Linear(feature_shape[-1], width)
        self.image_norm = nn.LayerNorm(width)
        if config.image == "sequence":
            self.image_position = nn.Parameter(grid_sinusoids(feature_shape[0], width))
        self.embedding = nn.Embedding(vocabulary_size, width)
        self.lstm = nn.ModuleList(
            nn.LSTM(config.hidden_size if layer else width, config.hidden_size, batch_first=True)
            for layer in range(config.num_layers)
        )
        self.output = nn.Linear(config.hidden_size, width)
        self.output_bias = nn.Parameter(torch.zeros(vocabulary_size))
        nn.init.normal_(self.embedding.weight, std=width**-0.5)
        self._remember(feature_shape[0] if config.image == "sequence" else 1)

    @torch.no_grad()
    def _remember(self, steps: int) -> None:
        """Let the LSTM remember for 1 to ``steps`` steps (chrono initialisation, arXiv 1804.11188).

        With torch's default biases half of the memory is lost in every step: nothing of the first
        image vectors would reach the words, and no gradient would flow back.
        """
        size = self.config.hidden_size
        for lstm in self.lstm:
            lasting = torch.empty(size).uniform_(1, max(2, steps)).log()
            for name, bias in lstm.named_parameters():
                if name.startswith(
                    "bias"
                ):  # there are two, which add up; gates: input, forget, ...
                    bias[: 2 * size] = torch.cat([-lasting, lasting]) / 2

    @classmethod
    def feature_of(cls, config: ShowTellConfig) -> str:
        """Return ``grid`` or ``pooled``."""
        if config.image not in ("sequence", "pooled"):
            raise CapGenError(
                f"show_tell cannot read its image as {config.image!r}", "use sequence or pooled"
            )
        return "grid" if config.image == "sequence" else "pooled"

    def encode(self, features: Tensor) -> ShowTellMemory:
        """Features (B, N, D) or (B, D) -> the LSTM's state after the image."""
        x = self.image_norm(self.image_projection(features))
        x = x + self.image_position if self.config.image == "sequence" else x[:, None]
        # x: (B, N, embed)
        empty = x.new_zeros(self.config.num_layers, x.shape[0], self.config.hidden_size)
        _, hidden, cell = self._read(x, empty, empty)
        return ShowTellMemory(hidden.transpose(0, 1), cell.transpose(0, 1))

    def _read(self, x: Tensor, hidden: Tensor, cell: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs (M, T, embed), states (layers, M, hidden) -> outputs (M, T, hidden), states."""
        last = []
        for i, lstm in enumerate(self.lstm):
            x = self.drop(x)
            x, state = lstm(x, (hidden[i : i + 1].to(x.dtype), cell[i : i + 1].to(x.dtype)))
            # x: (M, T, hidden)
            last.append(state)
        return x, torch.cat([h for h, _ in last]), torch.cat([c for _, c in last])

    def embed(self, tokens: Tensor) -> Tensor:
        """Token ids (...) -> (..., embed), scaled to unit size; the output shares the matrix."""
        return self.embedding(tokens) * self.config.embed_size**0.5

    def logits(self, x: Tensor) -> Tensor:
        """(..., hidden) -> (..., V); the output matrix is the embedding (arXiv 1608.05859)."""
        x = self.drop(x)
        return F.linear(self.output(x), self.embedding.weight, self.output_bias)

    def forward(self, memory: ShowTellMemory, tokens: Tensor, image: Tensor) -> Tensor:
        """Logits (M, T, V) of the next token at every position; see ``CaptionModel.forward``."""
        # (layers, M, hidden) each
        states = (part[image].transpose(0, 1) for part in (memory.hidden, memory.cell))
        x, _, _ = self._read(self.embed(self.hide_words(tokens)), *states)  # (M, T, hidden)
        return self.logits(x)

    def start(self, memory: ShowTellMemory) -> SharedState:
        """The state before the first token: the LSTM's after the image."""
        return SharedState.new(memory, memory.hidden.transpose(0, 1), memory.cell.transpose(0, 1))

    def step(
        self, tokens: Tensor, state: SharedState, attention: bool = False
    ) -> tuple[Tensor, SharedState, Mapping[str, Tensor]]:
        """One token; see ``CaptionModel.step``. There are no attention weights."""
        x, hidden, cell = self._read(self.embed(tokens)[:, None], *state.cache)
        return self.logits(x[:, 0]), state.after(hidden, cell), {}
