"""CLIP prefix: the image's CLIP embedding takes the place of the start token (notebook 06).

As ClipCap, arXiv 2111.09734, but with a decoder trained from scratch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from capgen_utils.common.compat import import_torchvision
from capgen_utils.common.files import CapGenError
from capgen_utils.common.sinusoids import sinusoids
from capgen_utils.config import RECIPES, ClipPrefixConfig
from capgen_utils.models.base import CaptionModel, KeyValues, Memory, Pretrained, SharedState
from capgen_utils.models.layers import DecoderLayer, attend, dropout, hide_words
from capgen_utils.text.vocabulary import token_rows


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


class ClipPrefixCaptioner(CaptionModel):
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
        if config.d_model % config.n_head:
            raise CapGenError(
                f"d_model {config.d_model} is not a multiple of n_head {config.n_head}",
                "choose another width or number of heads",
            )
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
        self.embedding = nn.Embedding(vocabulary_size, width)
        self.position = nn.Parameter(sinusoids(torch.arange(config.seq_len), width))
        self.layers = nn.ModuleList(
            DecoderLayer(config, cross=False) for _ in range(config.n_decode)
        )
        self.norm = nn.LayerNorm(width)
        self.output_bias = nn.Parameter(torch.zeros(vocabulary_size))
        self._initialise()
        self.tower: TextTower | None = None
        if config.text_inputs == "tower":
            self.tower = TextTower(config, vocabulary_size)
            self.tower_projection = nn.Linear(config.tower_width, width)

    def _initialise(self) -> None:
        """Let words, their positions and the image all start at about unit size."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
                nn.init.zeros_(module.bias)
        for layer in self.decoder_layers():
            for last in layer.last_linears():  # small, so that the sum over layers stays small
                std = (2 * self.config.n_decode * last.in_features) ** -0.5
                nn.init.normal_(last.weight, std=std)
        nn.init.normal_(self.embedding.weight, std=self.config.d_model**-0.5)

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

    def load_pretrained(self, source: Pretrained) -> None:
        """Start from the word embeddings, and the text tower, of the CLIP that encodes the images.

        Raises:
            CapGenError: CLIP's vocabulary lacks tokens of the captioner, which reads its tower.
        """
        if source.clip is None:
            return
        rows = token_rows(source.clip.tokenizer, source.tokenizer)
        if rows is not None:
            self.start_from(source.clip.clip.text_model, rows)
        elif self.tower is not None:
            raise CapGenError(
                f"{source.clip.name} reads other tokens than the captioner",
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

    def decoder_layers(self) -> list[DecoderLayer]:
        """Return the layers, first to last."""
        return [layer for layer in self.layers if isinstance(layer, DecoderLayer)]

    def encode(self, features: Tensor) -> PrefixMemory:
        """Embeddings (B, E) -> the prefix (B, d_model)."""
        image = F.normalize(features, dim=-1) * self.scale  # (B, E)
        if self.training and self.config.noise:  # as in CapDec, arXiv 2211.00575
            image = image + self.config.noise * torch.randn_like(image)
        return PrefixMemory(self.image_projection(image))

    def embed(self, tokens: Tensor, cache: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Token ids (M, T) -> (M, T, d_model), and the text tower's cache, if there is a tower.

        Learned embeddings are scaled to unit size: the output shares the matrix.
        """
        if self.tower is None:
            return self.embedding(tokens) * self.config.d_model**0.5, cache
        x, keys, values = self.tower(tokens, *cache)  # x: (M, T, tower_width)
        return self.tower_projection(x), (keys, values)

    def _empty_tower(self, captions: int, like: Tensor) -> tuple[Tensor, ...]:
        """Return keys and values (layers, M, heads, 0, width), or nothing without a tower."""
        if self.tower is None:
            return ()
        c = self.config
        width = c.tower_width // c.tower_heads
        empty = like.new_zeros(c.tower_layers, captions, c.tower_heads, 0, width)
        return empty, empty

    def logits(self, x: Tensor) -> Tensor:
        """(..., d_model) -> (..., V); the output matrix is the embedding (arXiv 1608.05859)."""
        return F.linear(self.norm(x), self.embedding.weight, self.output_bias)

    def forward(self, memory: PrefixMemory, tokens: Tensor, image: Tensor) -> Tensor:
        """Logits (M, T, V) of the next token at every position; see ``CaptionModel.forward``."""
        hidden = hide_words(tokens, self.config.word_dropout, self.unk_id, self.training)
        words, _ = self.embed(hidden, self._empty_tower(len(tokens), memory.prefix))
        # The prefix replaces the start token.
        x = torch.cat([memory.prefix[image, None], words[:, 1:]], 1)  # (M, T, d_model)
        x = dropout(x + self.position[: tokens.shape[1]], self.config.dropout, self.training)
        for layer in self.decoder_layers():
            x = layer.add_self(x, *layer.project_self(x), causal=True)
            x = layer.add_feed(x)
        return self.logits(x)

    def start(self, memory: PrefixMemory) -> SharedState:
        """The state before the first token, one hypothesis per image."""
        c, images = self.config, memory.images
        cache = KeyValues.new(memory.prefix, c.n_decode, images, c.n_head, c.d_model // c.n_head)
        return SharedState.new(memory, cache, *self._empty_tower(images, memory.prefix))

    def step(
        self, tokens: Tensor, state: SharedState, attention: bool = False
    ) -> tuple[Tensor, SharedState, Mapping[str, Tensor]]:
        """One position with a cache; see ``CaptionModel.step``. There are no attention weights."""
        cache, tower = state.cache[0].longer(), state.cache[1:]
        x, tower_cache = self.embed(tokens[:, None], tower)  # x: (M, 1, d_model)
        x = cache.at_first(state.memory.prefix[state.image, None], x)  # replaces the start token
        x = x + self.position[cache.length - 1]  # (M, 1, d_model)
        for i, layer in enumerate(self.decoder_layers()):
            query, key, value = layer.project_self(x)
            keys, values = cache.put(i, key, value)
            x = layer.add_self(x, query, keys, values, causal=False)
            x = layer.add_feed(x)
        return self.logits(x[:, 0]), state.after(cache, *tower_cache), {}
