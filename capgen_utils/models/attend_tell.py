"""ResNet + MLP attention + LSTM: "Show, Attend and Tell", arXiv 1502.03044 (notebook 04)."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from capgen_utils.common.tensors import grid_sinusoids
from capgen_utils.config import RECIPES, AttendTellConfig
from capgen_utils.models.base import IGNORED, CaptionModel, Memory, SharedState, caption_loss


@dataclass
class AttendTellMemory(Memory):
    """What is computed once for each of B images.

    Attributes:
        values: (B, N, hidden), the grid vectors; the context is their weighted mean.
        keys: (B, N, attention), their contribution to the attention's hidden layer.
        hidden, cell: (B, hidden), the LSTM's first state, from the mean grid vector.
    """

    values: Tensor
    keys: Tensor
    hidden: Tensor
    cell: Tensor


class AttendTellCaptioner(CaptionModel):
    """An LSTM that reads, at every step, the last word and the attended part of the image.

    Args:
        config: hyperparameters.
        vocabulary_size: V.
        feature_shape: (N, D) of the encoder's grid.
        unk_id: the id that word dropout replaces words by.
    """

    name = "attend_tell"
    feature = "grid"
    Config = AttendTellConfig
    recipe = RECIPES[name]
    chunks = (
        2  # each LSTM step has a fixed cost, so few long chunks are faster than many short ones
    )

    def __init__(
        self,
        config: AttendTellConfig,
        vocabulary_size: int,
        feature_shape: tuple[int, ...],
        unk_id: int,
    ) -> None:
        super().__init__()
        self.config, self.unk_id, self.teacher_forcing = config, unk_id, 1.0
        positions, depth = feature_shape
        words, width = config.embed_size, config.hidden_size
        self.image_projection = nn.Linear(depth, width)
        self.image_norm = nn.LayerNorm(width)
        self.image_position = nn.Parameter(grid_sinusoids(positions, width))
        self.first_hidden, self.first_cell = nn.Linear(width, width), nn.Linear(width, width)
        self.key = nn.Linear(width, config.attention_size)
        self.query = nn.Linear(width, config.attention_size, bias=False)
        self.score = nn.Parameter(torch.randn(config.attention_size) * config.attention_size**-0.5)
        self.gate = nn.Linear(width, width)
        self.embedding = nn.Embedding(vocabulary_size, words)
        self.word_gates = nn.Linear(words, 4 * width)
        self.gates = nn.Linear(2 * width, 4 * width, bias=False)
        self.output = nn.Linear(2 * width + words, words)
        self.output_bias = nn.Parameter(torch.zeros(vocabulary_size))
        nn.init.normal_(self.embedding.weight, std=words**-0.5)

    def encode(self, features: Tensor) -> AttendTellMemory:
        """(B, N, D) grid features -> values, keys and the first state."""
        values = self.image_norm(self.image_projection(features)) + self.image_position
        values = self.drop(values)  # (B, N, hidden)
        mean = values.mean(1)  # (B, hidden)
        return AttendTellMemory(
            values,
            self.key(values),
            torch.tanh(self.first_hidden(mean)),
            torch.tanh(self.first_cell(mean)),
        )

    def look(self, hidden: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Additive attention (arXiv 1409.0473): the softmax over the grid of v . tanh(key + query).

        It runs in fp32 even under autocast: on a CPU, tanh is several times slower in bf16.

        Args:
            hidden: (M, hidden), the LSTM's state for each caption.
            keys, values: (M, N, attention) and (M, N, hidden), of the caption's image.

        Returns:
            The gated context (M, hidden), and the weights (M, N).
        """
        query = self.query(hidden)  # (M, attention)
        with torch.autocast(hidden.device.type, enabled=False):
            scores = torch.tanh(keys.float() + query.float()[:, None]) @ self.score  # (M, N)
            weights = scores.softmax(-1)  # (M, N)
            context = (weights[:, None] @ values.float())[:, 0]  # (M, hidden)
        return torch.sigmoid(self.gate(hidden)) * context, weights

    def advance_lstm(
        self, gates: Tensor, context: Tensor, hidden: Tensor, cell: Tensor
    ) -> tuple[Tensor, Tensor]:
        """One LSTM step (Hochreiter and Schmidhuber 1997).

        Args:
            gates: (M, 4 x hidden), the word's contribution to the gates, computed for all words of
                a caption at once.
            context, hidden, cell: (M, hidden).
        """
        gates = (gates + self.gates(torch.cat([context, hidden], -1))).float()  # (M, 4 x hidden)
        enter, keep, show, new = gates.chunk(4, -1)
        cell = torch.sigmoid(keep) * cell + torch.sigmoid(enter) * torch.tanh(new)
        return torch.sigmoid(show) * torch.tanh(cell), cell

    def embed(self, tokens: Tensor) -> Tensor:
        """Token ids (...) -> (..., embed), scaled to unit size; the output shares the matrix."""
        return self.drop(self.embedding(tokens) * self.config.embed_size**0.5)

    def logits(self, x: Tensor) -> Tensor:
        """(..., 2 x hidden + embed) -> (..., V); the output matrix is the embedding."""
        x = torch.tanh(self.output(self.drop(x)))  # (..., embed)
        return F.linear(self.drop(x), self.embedding.weight, self.output_bias)

    def unroll(
        self, memory: AttendTellMemory, tokens: Tensor, image: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Read whole captions; return logits (M, T, V) and attention weights (M, T, N)."""
        keys, values = memory.keys[image], memory.values[image]  # (M, N, attention), (M, N, hidden)
        hidden, cell = memory.hidden[image], memory.cell[image]  # (M, hidden)
        words = self.embed(self.hide_words(tokens))
        gates = self.word_gates(words)  # (M, T, 4 x hidden)
        outputs: list[Tensor] = []
        weights: list[Tensor] = []
        for t in range(tokens.shape[1]):
            word, word_gates = words[:, t], gates[:, t]  # (M, embed), (M, 4 x hidden)
            if t and self.training and self.teacher_forcing < 1:
                word = self._sometimes_predicted(word, outputs[-1])
                word_gates = self.word_gates(word)
            context, looked = self.look(hidden, keys, values)
            hidden, cell = self.advance_lstm(word_gates, context, hidden, cell)
            outputs.append(torch.cat([hidden, context, word], -1))
            weights.append(looked)
        return self.logits(torch.stack(outputs, 1)), torch.stack(weights, 1)

    def _sometimes_predicted(self, true: Tensor, output: Tensor) -> Tensor:
        """Scheduled sampling: some captions read a word sampled from the model (M, embed)."""
        predicted = torch.rand(len(true), 1, device=true.device) >= self.teacher_forcing
        with torch.no_grad():
            scores = torch.distributions.Categorical(logits=self.logits(output).float())
            tokens = scores.sample()  # (M,)
        return torch.where(predicted, self.embed(tokens), true)

    def advance(self, share: float) -> None:
        """Reduce the share of true words linearly; see ``CaptionModel.advance``."""
        self.teacher_forcing = 1 + share * (self.config.teacher_forcing - 1)

    def forward(self, memory: AttendTellMemory, tokens: Tensor, image: Tensor) -> Tensor:
        """Logits (M, T, V) of the next token at every position; see ``CaptionModel.forward``."""
        return self.unroll(memory, tokens, image)[0]

    def loss(
        self,
        memory: AttendTellMemory,
        tokens: Tensor,
        image: Tensor,
        targets: Tensor,
        label_smoothing: float = 0.0,
    ) -> Tensor:
        """Cross-entropy; while training also the doubly stochastic penalty.

        The penalty draws the summed attention of a caption to 1 at each grid position: the mean
        over positions of (1 - sum of the weights over steps)^2, times the caption's tokens, so that
        the total of a batch can be divided by the number of tokens.
        """
        logits, weights = self.unroll(memory, tokens, image)
        total = caption_loss(logits, targets, label_smoothing)
        if not self.training or not self.config.doubly_stochastic:
            return total
        real = targets != IGNORED  # (M, T)
        seen = (weights * real[..., None]).sum(1)  # (M, N)
        penalty = ((1 - seen) ** 2).mean(1) * real.sum(1)  # (M,)
        return total + self.config.doubly_stochastic * penalty.sum()

    def start(self, memory: AttendTellMemory) -> SharedState:
        """The state before the first token, one hypothesis per image."""
        return SharedState.new(memory, memory.hidden[None], memory.cell[None])

    def step(
        self, tokens: Tensor, state: SharedState, attention: bool = False
    ) -> tuple[Tensor, SharedState, Mapping[str, Tensor]]:
        """One token; see ``CaptionModel.step``. The weights are named ``attention``, one head."""
        memory, image, word = state.memory, state.image, self.embed(tokens)
        hidden, cell = state.cache[0][0], state.cache[1][0]
        context, weights = self.look(hidden, memory.keys[image], memory.values[image])
        hidden, cell = self.advance_lstm(self.word_gates(word), context, hidden, cell)
        logits = self.logits(torch.cat([hidden, context, word], -1))  # (M, V)
        looked = {"attention": weights[:, None]}  # (M, 1, N)
        return logits, state.after(hidden[None], cell[None]), looked if attention else {}
