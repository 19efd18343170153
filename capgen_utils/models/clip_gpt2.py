"""CLIP + GPT-2: cross-attention to the image, injected into each GPT-2 layer (notebook 07).

It stands between the self-attention, which stays frozen, and the MLP. The gates are Flamingo's
(arXiv 2204.14198).
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from capgen_utils.common.files import CapGenError, read_json
from capgen_utils.common.hub import import_torchvision, load_pretrained, read_config
from capgen_utils.common.tensors import grid_sinusoids
from capgen_utils.config import MINI, RECIPES, ClipGpt2Config
from capgen_utils.models.base import SharedState
from capgen_utils.models.layers import (
    DecoderLayer,
    LayeredCaptioner,
    TransformerMemory,
    attend_images,
)
from capgen_utils.text.vocabulary import token_rows, tokenizer_from_json
from capgen_utils.text.words import Tokenizer

SIZES = ("n_embd", "n_layer", "n_head", "n_positions")
WAYS = (
    "provide a GPT-2 in one of three ways: (1) connect to the network once, to download the hub "
    "model; (2) name a local folder in the hub's layout (config.json and model.safetensors) as "
    f"language_model; (3) set language_model to {MINI}, which is pre-trained on the captions here"
)
# The GPT-2 that is computed here; a checkpoint with other settings is another model.
FORM = {
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
}


def gpt2_config(config: ClipGpt2Config, vocabulary_size: int, **more: Any) -> Any:
    """Return the library's ``GPT2Config``; ``more`` are fields of it, such as ``eos_token_id``."""
    import_torchvision()
    from transformers import GPT2Config

    fields = {key: getattr(config, key) for key in SIZES}
    fields |= {"bos_token_id": None, "eos_token_id": None} | more
    return GPT2Config(vocab_size=vocabulary_size, **fields)


def project(layer: Any, x: Tensor) -> Tensor:
    """Apply one of GPT-2's ``Conv1D`` layers: (..., in) -> (..., out).

    Calling the module would take a tenth of the time of a small product; decoding makes thousands.
    """
    return torch.addmm(layer.bias, x.flatten(0, -2), layer.weight).view(*x.shape[:-1], -1)


class Gpt2Layer(DecoderLayer):
    """A layer of GPT-2, computed as ``DecoderLayer``; the library's ``block`` holds the weights.

    It is not a submodule of the captioner, whose weights keep the library's names.
    """

    def __init__(self, block: Any, config: ClipGpt2Config) -> None:
        nn.Module.__init__(self)
        block.attn._buffers.clear()  # older releases store causal masks, which are not needed here
        product: Any = partial
        self.heads, self.width = config.n_head, config.n_embd // config.n_head
        self.norm_self, self.norm_feed, self.mlp = block.ln_1, block.ln_2, block.mlp
        self.self_qkv = product(project, block.attn.c_attn)
        self.self_out = product(project, block.attn.c_proj)
        self.feed = self.apply_mlp

    def apply_mlp(self, x: Tensor) -> Tensor:
        """(M, T, n_embd) -> the same."""
        hidden = F.gelu(project(self.mlp.c_fc, x), approximate="tanh")  # (M, T, 4 * n_embd)
        return project(self.mlp.c_proj, hidden)


class Gpt2Decoder(LayeredCaptioner):
    """GPT-2 as the language half of a captioner; this class ignores the image.

    The library's modules hold the weights under the library's names. The layers are run here, with
    a hook for the image between self-attention and MLP, a cache that decoding can reorder, and
    attention that is fast on CPUs too.

    Args:
        config: hyperparameters.
        vocabulary_size: V.
        unk_id: the id that word dropout replaces words by.

    Raises:
        CapGenError: inconsistent sizes.
    """

    Config = ClipGpt2Config

    def __init__(self, config: ClipGpt2Config, vocabulary_size: int, unk_id: int) -> None:
        super().__init__()
        parts = config.n_head * config.reduction
        if parts < 1 or config.n_embd % parts:
            raise CapGenError(
                f"n_embd {config.n_embd} is not a multiple of n_head {config.n_head} x reduction "
                f"{config.reduction}",
                "choose another width, number of heads or reduction",
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
        # A tuple: looking a layer up in a ModuleList takes as long as a small product.
        self.layers = tuple(Gpt2Layer(block, config) for block in self.gpt2.h)

    def embed_words(self, tokens: Tensor, first: int = 0) -> Tensor:
        """Token ids (M, T) at positions ``first``, ... -> (M, T, n_embd)."""
        positions = torch.arange(first, first + tokens.shape[1], device=tokens.device)  # (T,)
        return self.drop(self.gpt2.wte(tokens) + self.gpt2.wpe(positions))

    def run_layer(self, *args: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
        """As ``LayeredCaptioner.run_layer``; with gradient checkpointing it runs again later."""
        if self.config.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(super().run_layer, *args, use_reentrant=False, **options)
        return super().run_layer(*args, **options)

    def logits(self, x: Tensor) -> Tensor:
        """(..., n_embd) -> (..., V): the final norm; the output matrix is the token embedding."""
        return F.linear(self.gpt2.ln_f(x), self.gpt2.wte.weight)


class ImageAttention(nn.Module):
    """The query side of one injected cross-attention; keys and values are computed per image.

    Args:
        config: hyperparameters. With a gate the layer adds nothing until training opens the gate;
            without one its output starts small, so that the sum over layers stays small.
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
        """Multiply ``x`` by tanh(gate), if there is a gate."""
        return x if self.gate is None else x * torch.tanh(self.gate)


class ClipGpt2Captioner(Gpt2Decoder):
    """Image vectors -> keys and values of every layer, once per image -> words, one at a time.

    Layer: x = x + attn(ln_1(x)); x = x + tanh(gate) cross(norm(x), image); x = x + mlp(ln_2(x)).
    Training updates the cross-attentions with their norms, ln_2, the MLPs and the head; the rest of
    GPT-2 is frozen.

    Args:
        config: hyperparameters.
        vocabulary_size: V.
        feature_shape: (N, D) of the encoder's grid.
        unk_id: the id that word dropout replaces words by.
    """

    name = "clip_gpt2"
    feature = "grid"
    recipe = RECIPES[name]
    chunks = 2

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
        frozen = [module for block in self.gpt2.h for module in (block.ln_1, block.attn)]
        for module in (self.gpt2.wte, self.gpt2.wpe, self.gpt2.ln_f, *frozen):
            module.requires_grad_(False)

    @classmethod
    def fit_config(cls, config: ClipGpt2Config, clip: Any = None) -> ClipGpt2Config:
        """Return ``config`` with the sizes of its published GPT-2, if any; positions may be fewer.

        Raises:
            CapGenError: there is no such GPT-2; names the three ways to provide one.
        """
        if config.language_model == MINI:
            return config
        published = read_config(config.language_model, WAYS)
        sizes: dict[str, Any] = {key: published.get(key) for key in SIZES}
        if not all(type(value) is int and value > 0 for value in sizes.values()):
            problem = f"the config.json of {config.language_model} is not that of a GPT-2"
            raise CapGenError(problem, WAYS)
        sizes["n_positions"] = min(config.n_positions, sizes["n_positions"])
        return replace(config, **sizes)

    def load_pretrained(
        self, tokenizer: Tokenizer, language_model: Callable[[], Path], clip: Any = None
    ) -> None:
        """Start from the language model that the hyperparameters name.

        Raises:
            CapGenError: it is not available, or does not fit.
        """
        name = self.config.language_model
        if name != MINI:
            load_language_model(self, name, getattr(tokenizer, "original_ids", None))
            return
        folder = language_model()
        remedy = f"delete {folder} and {folder}-run: the next training creates them again"
        known = tokenizer_from_json(read_json(folder / "tokenizer.json", remedy))
        rows = token_rows(known, tokenizer)
        if rows is None:
            raise CapGenError(
                f"the language model in {folder} was trained on another vocabulary", remedy
            )
        load_language_model(self, folder, rows)

    @torch.no_grad()
    def start_head(self) -> None:
        """Initialise an untied head with the token embedding, so that it scores words as GPT-2."""
        if not self.config.tied_head:
            self.head.weight.copy_(self.gpt2.wte.weight)

    def encode(self, features: Tensor) -> TransformerMemory:
        """(B, N, D) grid features -> keys and values of every layer."""
        if self.config.image_positions:
            features = self.image_norm(self.image_projection(features)) + self.image_position
        features = self.drop(features)  # (B, N, D or n_embd)
        return TransformerMemory.split(self.cross_keys_values(features), self.layers)

    def add_image(
        self, i: int, x: Tensor, state: SharedState, attention: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Add layer i's attention over the image; see ``LayeredCaptioner.add_image``."""
        cross: Any = self.cross[i]
        keys, values = state.memory.keys[i], state.memory.values[i]  # (B, heads, N, width) each
        query = self.layers[i].split_heads(cross.query(cross.norm(x)))  # (M, heads, T, width)
        read, weights = attend_images(query, keys, values, state.grouping, attention)
        added = cross.opened(cross.out(read.transpose(1, 2).flatten(2)))  # (M, T, n_embd)
        return x + self.drop(added), weights

    def logits(self, x: Tensor) -> Tensor:
        """(..., n_embd) -> (..., V): the final norm, then the head or the tied token embedding."""
        weight = self.gpt2.wte.weight if self.config.tied_head else self.head.weight
        return F.linear(self.gpt2.ln_f(x), weight, self.output_bias)


def load_language_model(
    captioner: ClipGpt2Captioner, source: str | Path, original_ids: Sequence[int] | None = None
) -> None:
    """Copy the weights of a published or local GPT-2 into ``captioner``.

    An untied head starts as the token embedding.

    Args:
        captioner: of the same sizes; it may have fewer positions.
        source: name on the hub, such as ``gpt2`` or ``distilgpt2``, or a local folder in the hub's
            layout.
        original_ids: for each of the captioner's tokens the row in the embedding of ``source``;
            ``None`` if the vocabularies are equal.

    Raises:
        CapGenError: there is no GPT-2 in ``source``, or it does not fit; names the three ways to
            provide one.
    """
    model = load_pretrained("GPT2LMHeadModel", source, WAYS)
    _check_form(model.config, captioner.config, source)
    weights = model.transformer.state_dict()
    table = weights["wte.weight"]  # (vocabulary of source, n_embd)
    ids = range(len(table)) if original_ids is None else original_ids
    if len(ids) != len(captioner.output_bias) or not all(0 <= i < len(table) for i in ids):
        raise CapGenError(
            f"the vocabulary of {source} ({len(table)} tokens) is not that of the captioner", WAYS
        )
    weights["wte.weight"] = table[torch.tensor(ids)]  # (V, n_embd)
    weights["wpe.weight"] = weights["wpe.weight"][: captioner.config.n_positions]
    captioner.gpt2.load_state_dict(weights)
    captioner.start_head()


def _check_form(published: Any, config: ClipGpt2Config, source: str | Path) -> None:
    expected = FORM | {key: getattr(config, key) for key in SIZES}
    odd = [key for key, value in expected.items() if getattr(published, key, value) != value]
    if "n_positions" in odd and published.n_positions > config.n_positions:
        odd.remove("n_positions")
    if published.n_inner not in (None, 4 * config.n_embd):
        odd.append("n_inner")
    if odd:
        values = ", ".join(f"{key} {getattr(published, key)}" for key in odd)
        raise CapGenError(f"the GPT-2 in {source} is not the captioner's: it has {values}", WAYS)
