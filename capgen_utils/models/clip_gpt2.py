"""CLIP + GPT-2: a GPT-2 that looks at the image through cross-attention injected into each of its
layers, between the self-attention, which stays frozen, and the MLP. The gates are Flamingo's (arXiv
2204.14198)."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from capgen_utils.common.compat import import_torchvision
from capgen_utils.common.files import CapGenError
from capgen_utils.common.sinusoids import grid_sinusoids
from capgen_utils.config import ClipGpt2Config
from capgen_utils.models.base import CaptionModel, Grouping, KeyValues, SharedState
from capgen_utils.models.layers import attend, attend_images, dropout, hide_words
from capgen_utils.models.transformer import TransformerMemory


def gpt2_config(config: ClipGpt2Config, vocabulary_size: int, **more: Any) -> Any:
    """Return the library's ``GPT2Config``; ``more`` are fields of it, such as ``eos_token_id``."""
    import_torchvision()
    from transformers import GPT2Config

    fields = {key: getattr(config, key) for key in ("n_embd", "n_layer", "n_head", "n_positions")}
    fields |= {"bos_token_id": None, "eos_token_id": None} | more
    return GPT2Config(vocab_size=vocabulary_size, **fields)


def project(layer: Any, x: Tensor) -> Tensor:
    """Apply one of GPT-2's ``Conv1D`` layers: (..., in) -> (..., out).

    A module's call and the look-ups in it take a tenth of the time of a small product; decoding
    makes thousands.
    """
    return torch.addmm(layer.bias, x.flatten(0, -2), layer.weight).view(*x.shape[:-1], -1)


class Gpt2Decoder(CaptionModel):
    """GPT-2 as the language half of a captioner; on its own it ignores the image.

    The library's modules hold the weights under the library's names; its layers are run here, with
    room for the image between self-attention and MLP, a cache that decoding can reorder, and
    attention that is fast on CPUs too.

    Args:
        config: hyperparameters.
        vocabulary_size: V.
        unk_id: the id that word dropout writes over hidden words.

    Raises:
        CapGenError: sizes that do not fit together.
    """

    looks = False  # at the image

    def __init__(self, config: ClipGpt2Config, vocabulary_size: int, unk_id: int) -> None:
        super().__init__()
        parts = config.n_head * config.reduction
        if parts < 1 or config.n_embd % parts:
            raise CapGenError(
                f"n_embd {config.n_embd} is no multiple of n_head {config.n_head} x reduction {config.reduction}",
                "choose widths that divide",
            )
        if config.seq_len > config.n_positions:
            raise CapGenError(
                f"seq_len {config.seq_len} is more than n_positions {config.n_positions}",
                "lower it",
            )
        settings = gpt2_config(config, vocabulary_size)
        from transformers import GPT2Model

        self.config, self.unk_id = config, unk_id
        self.gpt2: Any = GPT2Model(settings)
        self._blocks: tuple[Any, ...] = tuple(
            self.gpt2.h
        )  # looking them up by number takes as long as a small product
        for block in self._blocks:  # older releases keep causal masks, which nothing here reads
            block.attn._buffers.clear()

    def embed(self, tokens: Tensor, first: int = 0) -> Tensor:
        """Token ids (M, T) at the places from ``first`` on -> (M, T, n_embd)."""
        places = torch.arange(first, first + tokens.shape[1], device=tokens.device)
        return dropout(
            self.gpt2.wte(tokens) + self.gpt2.wpe(places), self.config.dropout, self.training
        )

    def project_self(self, i: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of layer i's self-attention: (M, T, n_embd) -> three (M, heads,
        T, width)."""
        block = self._blocks[i]
        together = project(block.attn.c_attn, block.ln_1(x)).unflatten(
            -1, (3, self.config.n_head, -1)
        )
        query, key, value = together.permute(2, 0, 3, 1, 4).unbind()
        return query, key, value

    def add_self(
        self, i: int, x: Tensor, query: Tensor, key: Tensor, value: Tensor, causal: bool
    ) -> Tensor:
        """Add layer i's self-attention to ``x`` (M, T, n_embd)."""
        attended = attend(query, key, value, causal).transpose(1, 2).flatten(2)
        return x + dropout(
            project(self._blocks[i].attn.c_proj, attended), self.config.dropout, self.training
        )

    def add_image(
        self, i: int, x: Tensor, memory: Any, grouping: Grouping | None, attention: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Add what layer i reads from the image to ``x`` (M, T, n_embd): here nothing.

        Returns:
            The sum, and the weights (M, heads, T, N) where asked for.
        """
        return x, None

    def add_feed(self, i: int, x: Tensor) -> Tensor:
        """Add layer i's MLP to ``x`` (M, T, n_embd)."""
        block = self._blocks[i]
        hidden = F.gelu(project(block.mlp.c_fc, block.ln_2(x)), approximate="tanh")
        return x + dropout(project(block.mlp.c_proj, hidden), self.config.dropout, self.training)

    def logits(self, x: Tensor) -> Tensor:
        """(..., n_embd) -> (..., V): the final norm, then the token embedding as the output matrix."""
        return F.linear(self.gpt2.ln_f(x), self.gpt2.wte.weight)

    def split_heads(self, x: Tensor) -> Tensor:
        """(M, T, D) -> (M, heads, T, D / heads)."""
        return x.unflatten(-1, (self.config.n_head, -1)).transpose(1, 2)

    def _layer(self, i: int, x: Tensor, memory: Any, grouping: Grouping) -> Tensor:
        x = self.add_self(i, x, *self.project_self(i, x), causal=True)
        x, _ = self.add_image(i, x, memory, grouping)
        return self.add_feed(i, x)

    def forward(self, memory: Any, tokens: Tensor, image: Tensor) -> Tensor:
        """Logits (M, T, V) of the next token at every position; see ``CaptionModel.forward``."""
        tokens = hide_words(tokens, self.config.word_dropout, self.unk_id, self.training)
        grouping = Grouping(image, memory.images)
        twice = self.config.gradient_checkpointing and torch.is_grad_enabled()
        x = self.embed(tokens)  # (M, T, n_embd)
        for i in range(self.config.n_layer):
            if twice:
                x = checkpoint(self._layer, i, x, memory, grouping, use_reentrant=False)
            else:
                x = self._layer(i, x, memory, grouping)
        return self.logits(x)

    def start(self, memory: Any) -> SharedState:
        """The state before the first token, one hypothesis an image."""
        heads, width = self.config.n_head, self.config.n_embd // self.config.n_head
        computed = next(
            iter(memory.tensors().values())
        )  # its device and dtype are those of the cache
        return SharedState.new(
            memory, KeyValues.new(computed, self.config.n_layer, memory.images, heads, width)
        )

    def step(
        self, tokens: Tensor, state: SharedState, attention: bool = False
    ) -> tuple[Tensor, SharedState, Mapping[str, Tensor]]:
        """One position, earlier keys and values cached; see ``CaptionModel.step``. Weights are
        named ``layer0`` ..."""
        cache = state.cache[0].longer()
        x = self.embed(tokens[:, None], cache.length - 1)  # (M, 1, n_embd)
        grouping = state.grouping if self.looks else None
        weights = {}
        for i in range(self.config.n_layer):
            query, key, value = self.project_self(i, x)
            keys, values = cache.put(i, key, value)
            x = self.add_self(i, x, query, keys, values, causal=False)
            x, looked = self.add_image(i, x, state.memory, grouping, attention)
            x = self.add_feed(i, x)
            if looked is not None:
                weights[f"layer{i}"] = looked[:, :, 0]
        return self.logits(x[:, 0]), state.after(cache), weights


class ImageAttention(nn.Module):
    """The caption's half of one injected cross-attention; the image's half is computed once for all
    layers.

    Args:
        config: hyperparameters. Without a gate the output starts small, so that the sum of all
            layers does too; with one it adds nothing until training opens the gate.
    """

    def __init__(self, config: ClipGpt2Config) -> None:
        super().__init__()
        width = config.n_embd // config.reduction
        self.norm = nn.LayerNorm(config.n_embd)
        self.query, self.out = nn.Linear(config.n_embd, width), nn.Linear(width, config.n_embd)
        self.gate = nn.Parameter(torch.zeros(())) if config.gate else None
        for linear in (self.query, self.out):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
            nn.init.zeros_(linear.bias)
        if not config.gate:
            nn.init.normal_(self.out.weight, std=(3 * config.n_layer * width) ** -0.5)

    def opened(self, x: Tensor) -> Tensor:
        """Multiply what was read by tanh(gate), where there is a gate."""
        return x if self.gate is None else x * torch.tanh(self.gate)


class ClipGpt2Captioner(Gpt2Decoder):
    """Image vectors -> keys and values of every layer, once an image -> words, one at a time.

    Layer: x = x + attn(ln_1(x)); x = x + tanh(gate) cross(norm(x), image); x = x + mlp(ln_2(x)).
    Trained are the cross-attentions with their norms, ln_2 and the MLPs, and the head; the rest of
    GPT-2 is frozen.

    Args:
        config: hyperparameters.
        vocabulary_size: V.
        feature_shape: (N, D) of the encoder's grid.
        unk_id: the id that word dropout writes over hidden words.
    """

    name = "clip_gpt2"
    feature = "grid"
    chunks = 2
    looks = True

    def __init__(
        self,
        config: ClipGpt2Config,
        vocabulary_size: int,
        feature_shape: tuple[int, ...],
        unk_id: int,
    ) -> None:
        super().__init__(config, vocabulary_size, unk_id)
        positions, depth = feature_shape
        if config.image_positions:
            self.image_projection, depth = nn.Linear(depth, config.n_embd), config.n_embd
            self.image_norm = nn.LayerNorm(depth)
            self.image_position = nn.Parameter(grid_sinusoids(positions, depth))
        self.cross = nn.ModuleList(ImageAttention(config) for _ in range(config.n_layer))
        self.cross_keys_values = nn.Linear(
            depth, 2 * config.n_layer * config.n_embd // config.reduction
        )
        nn.init.normal_(self.cross_keys_values.weight, std=depth**-0.5)
        nn.init.zeros_(self.cross_keys_values.bias)
        if not config.tied_head:
            self.head = nn.Linear(config.n_embd, vocabulary_size, bias=False)
        self.output_bias = nn.Parameter(torch.zeros(vocabulary_size))
        self.start_head()
        self._freeze()

    def _freeze(self) -> None:
        layers = [module for block in self.gpt2.h for module in (block.ln_1, block.attn)]
        for module in (self.gpt2.wte, self.gpt2.wpe, self.gpt2.ln_f, *layers):
            module.requires_grad_(False)

    @torch.no_grad()
    def start_head(self) -> None:
        """Let a head of its own begin as the token embedding, so that it scores words as GPT-2
        does."""
        if not self.config.tied_head:
            self.head.weight.copy_(self.gpt2.wte.weight)

    def encode(self, features: Tensor) -> TransformerMemory:
        """(B, N, D) grid features -> keys and values of every layer."""
        if self.config.image_positions:
            features = self.image_norm(self.image_projection(features)) + self.image_position
        keys_values = self.cross_keys_values(dropout(features, self.config.dropout, self.training))
        keys_values = keys_values.unflatten(-1, (2, self.config.n_layer, self.config.n_head, -1))
        keys, values = keys_values.permute(2, 3, 0, 4, 1, 5)  # each (layers, B, heads, N, width)
        return TransformerMemory(keys, values)

    def add_image(
        self, i: int, x: Tensor, memory: TransformerMemory, grouping: Any, attention: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Add layer i's attention over the image; see ``Gpt2Decoder.add_image``."""
        cross: Any = self.cross[i]
        query = self.split_heads(cross.query(cross.norm(x)))  # (M, heads, T, width)
        read, weights = attend_images(query, memory.keys[i], memory.values[i], grouping, attention)
        added = cross.opened(cross.out(read.transpose(1, 2).flatten(2)))
        return x + dropout(added, self.config.dropout, self.training), weights

    def logits(self, x: Tensor) -> Tensor:
        """(..., n_embd) -> (..., V): the final norm, then the head or, where tied, the frozen token
        embedding."""
        weight = self.gpt2.wte.weight if self.config.tied_head else self.head.weight
        return F.linear(self.gpt2.ln_f(x), weight, self.output_bias)
