"""CLIP prefix: the image's CLIP embedding takes the place of the start token (notebook 06).

As ClipCap, arXiv 2111.09734, but with a decoder trained from scratch.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from capgen_utils.common.files import CapGenError
from capgen_utils.common.hub import import_torchvision
from capgen_utils.config import RECIPES, ClipPrefixConfig
from capgen_utils.models.base import Memory, SharedState
from capgen_utils.models.layers import LayeredCaptioner, attend
from capgen_utils.text.vocabulary import token_rows
from capgen_utils.text.words import Tokenizer


@dataclass
class PrefixMemory(Memory):
    """The vector at the first position of each image's captions: (B, d_model)."""

    prefix: Tensor


def transformer_of(text_model: Any) -> Any:
    """Return the library's text transformer, which some of its versions wrap in another module."""
    return getattr(text_model, "text_model", text_model)


class TextTower(nn.Module):
    """CLIP's text transformer, frozen and read causally: token ids in, hidden states out.

    It holds the library's ``CLIPTextModel``, so a published text tower loads into it. Its layers
    are run here, with a cache, so that a new word costs one position.
    """

    def __init__(self, config: ClipPrefixConfig, vocabulary_size: int) -> None:
        super().__init__()
        import_torchvision()  # transformers imports it
        from transformers import CLIPTextConfig, CLIPTextModel

        self.heads = config.tower_heads
        self.clip = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=vocabulary_size,
                hidden_size=config.tower_width,
                intermediate_size=4 * config.tower_width,
                num_hidden_layers=config.tower_layers,
                num_attention_heads=config.tower_heads,
                max_position_embeddings=config.tower_positions,
                bos_token_id=None,
                eos_token_id=None,
                pad_token_id=None,
            )
        ).eval()
        # Positions are passed in. The library's buffer is in no file, so loading a bundle would
        # leave it uninitialised.
        transformer_of(self.clip).embeddings.register_buffer("position_ids", None, persistent=False)
        self.requires_grad_(False)

    def train(self, mode: bool = True) -> "TextTower":
        """Stay in eval mode: the tower is frozen."""
        return super().train(False)

    def load(self, text: Any, table: Tensor) -> None:
        """Copy the library's ``text`` tower, with ``table`` (V, width) as its token embedding.

        Raises:
            CapGenError: its sizes differ from the captioner's.
        """
        tower = transformer_of(self.clip)
        weights = text.state_dict() | {"embeddings.token_embedding.weight": table}
        sizes = {key: value.shape for key, value in tower.state_dict().items()}
        if {key: value.shape for key, value in weights.items() if key in sizes} != sizes:
            raise CapGenError(
                "CLIP's text tower has other sizes than the captioner's", "set tower_* to its sizes"
            )
        tower.load_state_dict({key: weights[key] for key in sizes})

    def forward(
        self, tokens: Tensor, keys: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Read tokens (M, T) after those in the cache.

        Args:
            keys, values: (layers, M, heads, earlier, width); ``earlier`` is 0, or T is 1.

        Returns:
            Hidden states (M, T, tower_width), and keys and values with the new tokens.
        """
        text = transformer_of(self.clip)
        earlier = keys.shape[3]
        positions = torch.arange(earlier, earlier + tokens.shape[1], device=tokens.device)
        x = text.embeddings(input_ids=tokens, position_ids=positions[None])  # (M, T, tower_width)
        all_keys, all_values = [], []
        for i, layer in enumerate(text.encoder.layers):
            normed, attention = layer.layer_norm1(x), layer.self_attn
            query, key, value = (  # (M, heads, T, width) each
                project(normed).unflatten(-1, (self.heads, -1)).transpose(1, 2)
                for project in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            all_keys.append(torch.cat([keys[i], key], 2))
            all_values.append(torch.cat([values[i], value], 2))
            attended = attend(query, all_keys[i], all_values[i], causal=not earlier)
            x = x + attention.out_proj(attended.transpose(1, 2).flatten(2))
            x = x + layer.mlp(layer.layer_norm2(x))
        return text.final_layer_norm(x), torch.stack(all_keys), torch.stack(all_values)


class ClipPrefixCaptioner(LayeredCaptioner):
    """One image token, then words, through causal self-attention; there is no cross-attention.

    Args:
        config: hyperparameters.
        vocabulary_size: V.
        feature_shape: (E,) of the encoder's embedding.
        unk_id: the id that word dropout replaces words by.
    """

    name = "clip_prefix"
    feature = "embedding"
    Config = ClipPrefixConfig
    recipe = RECIPES[name]

    def __init__(
        self,
        config: ClipPrefixConfig,
        vocabulary_size: int,
        feature_shape: tuple[int, ...],
        unk_id: int,
    ) -> None:
        super().__init__()
        if config.text_inputs not in ("learned", "tower"):
            raise CapGenError(
                f"clip_prefix cannot read words as {config.text_inputs!r}", "use learned or tower"
            )
        self.config, self.unk_id = config, unk_id
        width = config.d_model
        # An embedding has length 1, so its numbers are small; this learned scale starts by bringing
        # them to unit size.
        self.scale = nn.Parameter(torch.tensor(float(feature_shape[0]) ** 0.5))
        self.image_projection = nn.Linear(feature_shape[0], width)
        self.build_words(config, vocabulary_size, cross=False)
        self.tower: TextTower | None = None
        if config.text_inputs == "tower":
            self.tower = TextTower(config, vocabulary_size)
            self.tower_projection = nn.Linear(config.tower_width, width)

    @classmethod
    def fit_config(cls, config: ClipPrefixConfig, clip: Any = None) -> ClipPrefixConfig:
        """Return ``config`` with the sizes of CLIP's text tower, if words are read through it."""
        if clip is None or config.text_inputs != "tower":
            return config
        text = clip.clip.config.text_config
        return replace(
            config,
            tower_layers=text.num_hidden_layers,
            tower_width=text.hidden_size,
            tower_heads=text.num_attention_heads,
            tower_positions=text.max_position_embeddings,
        )

    def load_pretrained(
        self, tokenizer: Tokenizer, language_model: Callable[[], Path], clip: Any = None
    ) -> None:
        """Start from the word embeddings, and the text tower, of the CLIP that encodes the images.

        Raises:
            CapGenError: CLIP's vocabulary lacks tokens of the captioner, which reads its tower.
        """
        if clip is None:
            return
        rows = token_rows(clip.tokenizer, tokenizer)
        if rows is not None:
            self.start_from(clip.clip.text_model, rows)
        elif self.tower is not None:
            raise CapGenError(
                f"{clip.name} reads other tokens than the captioner",
                "read learned words (text_inputs), or train it again",
            )

    def start_from(self, text_model: Any, rows: Sequence[int]) -> None:
        """Copy a trained CLIP's token embedding, and its text tower if the captioner has one.

        The embedding is scaled to the size of an untrained one. If its width differs from
        ``d_model``, a random orthonormal matrix maps it, which preserves angles as far as possible.

        Args:
            text_model: the library's ``CLIPTextTransformer`` or ``CLIPTextModel``, of the tower's
                sizes.
            rows: for each token of the captioner the row in CLIP's embedding.

        Raises:
            CapGenError: the tower has other sizes.
        """
        text, width = transformer_of(text_model), self.config.d_model
        table = text.embeddings.token_embedding.weight.detach()[torch.tensor(rows)].float()
        if self.tower is not None:
            self.tower.load(text, table)
        if table.shape[1] != width:
            table = table @ nn.init.orthogonal_(table.new_empty(table.shape[1], width))
        with torch.no_grad():
            self.embedding.weight.copy_(table / table.std() * width**-0.5)

    def encode(self, features: Tensor) -> PrefixMemory:
        """Embeddings (B, E) -> the prefix (B, d_model)."""
        image = F.normalize(features, dim=-1) * self.scale  # (B, E)
        if self.training and self.config.noise:  # as in CapDec, arXiv 2211.00575
            image = image + self.config.noise * torch.randn_like(image)
        return PrefixMemory(self.image_projection(image))

    def read_tower(
        self, tokens: Tensor, cache: tuple[Tensor, ...]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Token ids (M, T) -> (M, T, d_model), and the text tower's cache, if there is a tower."""
        if self.tower is None:
            return self.embed(tokens), cache
        x, *cached = self.tower(tokens, *cache)  # x: (M, T, tower_width)
        return self.tower_projection(x), tuple(cached)

    def _empty_tower(self, captions: int, like: Tensor) -> tuple[Tensor, ...]:
        """Return keys and values (layers, M, heads, 0, width), or nothing without a tower."""
        if self.tower is None:
            return ()
        c = self.config
        width = c.tower_width // c.tower_heads
        empty = like.new_zeros(c.tower_layers, captions, c.tower_heads, 0, width)
        return empty, empty

    def forward(self, memory: PrefixMemory, tokens: Tensor, image: Tensor) -> Tensor:
        """Logits (M, T, V) of the next token at every position; see ``CaptionModel.forward``."""
        empty = self._empty_tower(len(tokens), memory.prefix)
        words, _ = self.read_tower(self.hide_words(tokens), empty)  # (M, T, d_model)
        # The prefix replaces the start token.
        x = torch.cat([memory.prefix[image, None], words[:, 1:]], 1)  # (M, T, d_model)
        x = self.drop(x + self.position[: tokens.shape[1]])
        for i in range(len(self.layers)):
            x, _ = self.run_layer(i, x, SharedState(memory, image, ()))
        return self.logits(x)

    def start(self, memory: PrefixMemory) -> SharedState:
        """The state before the first token, one hypothesis per image."""
        tower = self._empty_tower(memory.images, memory.prefix)
        return SharedState.new(memory, *super().start(memory).cache, *tower)

    def step(
        self, tokens: Tensor, state: SharedState, attention: bool = False
    ) -> tuple[Tensor, SharedState, Mapping[str, Tensor]]:
        """One position with a cache; see ``CaptionModel.step``. There are no attention weights."""
        cache = state.cache[0].longer()
        x, tower = self.read_tower(tokens[:, None], state.cache[1:])  # x: (M, 1, d_model)
        x = cache.at_first(state.memory.prefix[state.image, None], x)  # replaces the start token
        x = x + self.position[cache.length - 1]  # (M, 1, d_model)
        return self.finish_step(x, state, attention, cache, *tower)
