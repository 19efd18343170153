"""CLIP prefix: the image's CLIP embedding stands where the start token would, and self-attention
does the rest (as ClipCap, arXiv 2111.09734, with a decoder trained from scratch)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from capgen_utils.common.compat import import_torchvision
from capgen_utils.common.files import CapGenError
from capgen_utils.common.sinusoids import sinusoids
from capgen_utils.config import ClipPrefixConfig
from capgen_utils.models.base import CaptionModel, KeyValues, Memory, SharedState
from capgen_utils.models.layers import DecoderLayer, attend, dropout, hide_words


@dataclass
class PrefixMemory(Memory):
    """What stands in the first place of each image's captions: (B, d_model)."""

    prefix: Tensor


def transformer_of(text_model: Any) -> Any:
    """Return the library's text transformer, which some of its versions wrap once more."""
    return getattr(text_model, "text_model", text_model)


class TextTower(nn.Module):
    """CLIP's text transformer, frozen and read causally: token ids in, hidden states out.

    It holds the library's own ``CLIPTextModel``, so a published text tower loads into it; its
    layers are run here, with a cache, so that a new word costs one position.
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
        # Places are passed in; the library's own, which no file holds, would stay unmade where a
        # bundle is loaded.
        transformer_of(self.clip).embeddings.register_buffer("position_ids", None, persistent=False)
        self.requires_grad_(False)

    def train(self, mode: bool = True) -> "TextTower":
        """Stay in eval mode: the tower is frozen."""
        return super().train(False)

    def load(self, text: Any, table: Tensor) -> None:
        """Take the weights of the library's ``text`` tower, with ``table`` (V, width) as its token
        embedding.

        Raises:
            CapGenError: it has other sizes.
        """
        own = transformer_of(self.clip)
        weights = text.state_dict() | {"embeddings.token_embedding.weight": table}
        sizes = {key: value.shape for key, value in own.state_dict().items()}
        if {key: value.shape for key, value in weights.items() if key in sizes} != sizes:
            raise CapGenError(
                "CLIP's text tower has other sizes than the captioner's", "set tower_* to its sizes"
            )
        own.load_state_dict({key: weights[key] for key in sizes})

    def forward(
        self, tokens: Tensor, keys: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Read tokens (M, T) after those in the cache.

        Args:
            keys, values: (layers, M, heads, earlier, width); either ``earlier`` is 0 or T is 1.

        Returns:
            Hidden states (M, T, tower_width), and keys and values with the new tokens.
        """
        text = transformer_of(self.clip)
        earlier = keys.shape[3]
        places = torch.arange(earlier, earlier + tokens.shape[1], device=tokens.device)
        x = text.embeddings(input_ids=tokens, position_ids=places[None])
        all_keys, all_values = [], []
        for i, layer in enumerate(text.encoder.layers):
            normed, own = layer.layer_norm1(x), layer.self_attn
            query, key, value = (
                project(normed).unflatten(-1, (self.heads, -1)).transpose(1, 2)
                for project in (own.q_proj, own.k_proj, own.v_proj)
            )
            all_keys.append(torch.cat([keys[i], key], 2))
            all_values.append(torch.cat([values[i], value], 2))
            attended = attend(query, all_keys[i], all_values[i], causal=not earlier)
            x = x + own.out_proj(attended.transpose(1, 2).flatten(2))
            x = x + layer.mlp(layer.layer_norm2(x))
        return text.final_layer_norm(x), torch.stack(all_keys), torch.stack(all_values)


class ClipPrefixCaptioner(CaptionModel):
    """One image token, then words, through causal self-attention; no cross-attention anywhere.

    Args:
        config: hyperparameters.
        vocabulary_size: V.
        feature_shape: (E,) of the encoder's embedding.
        unk_id: the id that word dropout writes over hidden words.
    """

    name = "clip_prefix"
    feature = "embedding"

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
                f"d_model {config.d_model} is no multiple of n_head {config.n_head}",
                "choose widths that divide",
            )
        self.config, self.unk_id = config, unk_id
        width = config.d_model
        # An embedding has length 1, so its numbers are small: the scale brings them to unit size,
        # and then learns.
        self.scale = nn.Parameter(torch.tensor(float(feature_shape[0]) ** 0.5))
        self.image_projection = nn.Linear(feature_shape[0], width)
        self.embedding = nn.Embedding(vocabulary_size, width)
        if config.text_inputs not in ("learned", "tower"):
            raise CapGenError(
                f"clip_prefix cannot read words as {config.text_inputs!r}", "use learned or tower"
            )
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
        """Every signal starts at about unit size: words, their places, and the image."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
                nn.init.zeros_(module.bias)
        for layer in self.decoder_layers():
            for last in layer.last_linears():  # so that the sum of all layers stays small
                nn.init.normal_(
                    last.weight, std=(2 * self.config.n_decode * last.in_features) ** -0.5
                )
        nn.init.normal_(self.embedding.weight, std=self.config.d_model**-0.5)

    def start_from(self, text_model: Any, rows: Sequence[int]) -> None:
        """Read words as a trained CLIP does: its token table becomes the embedding, and its tower
        the tower, if any.

        The table is brought to the size of an untrained embedding; into another width it is turned
        by a random orthonormal matrix, which keeps angles as well as that width allows.

        Args:
            text_model: the library's ``CLIPTextTransformer`` or ``CLIPTextModel``, of the tower's
                sizes.
            rows: for each token the row in its table.

        Raises:
            CapGenError: the tower has other sizes.
        """
        text = transformer_of(text_model)
        table = text.embeddings.token_embedding.weight.detach()[torch.tensor(rows)].float()
        if self.tower is not None:
            self.tower.load(text, table)
        if table.shape[1] != self.config.d_model:
            table = table @ nn.init.orthogonal_(
                table.new_empty(table.shape[1], self.config.d_model)
            )
        with torch.no_grad():
            self.embedding.weight.copy_(table / table.std() * self.config.d_model**-0.5)

    def decoder_layers(self) -> list[DecoderLayer]:
        """Return the layers from the first to the last."""
        return [layer for layer in self.layers if isinstance(layer, DecoderLayer)]

    def encode(self, features: Tensor) -> PrefixMemory:
        """Embeddings (B, E) -> the prefix (B, d_model)."""
        image = F.normalize(features, dim=-1) * self.scale
        if self.training and self.config.noise:
            image = image + self.config.noise * torch.randn_like(
                image
            )  # as in CapDec, arXiv 2211.00575
        return PrefixMemory(self.image_projection(image))

    def embed(self, tokens: Tensor, cache: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Token ids (M, T) -> (M, T, d_model), and the text tower's cache after them, where there
        is a tower.

        Learned embeddings are scaled to unit size: the same matrix also scores the output.
        """
        if self.tower is None:
            return self.embedding(tokens) * self.config.d_model**0.5, cache
        x, keys, values = self.tower(tokens, *cache)
        return self.tower_projection(x), (keys, values)

    def _empty(
        self, captions: int, like: Tensor, layers: int, heads: int, width: int
    ) -> tuple[Tensor, Tensor]:
        empty = like.new_zeros(layers, captions, heads, 0, width // heads)
        return empty, empty

    def _empty_tower(self, captions: int, like: Tensor) -> tuple[Tensor, ...]:
        c = self.config
        return (
            ()
            if self.tower is None
            else self._empty(captions, like, c.tower_layers, c.tower_heads, c.tower_width)
        )

    def logits(self, x: Tensor) -> Tensor:
        """(..., d_model) -> (..., V); the output matrix is the embedding (arXiv 1608.05859)."""
        return F.linear(self.norm(x), self.embedding.weight, self.output_bias)

    def forward(self, memory: PrefixMemory, tokens: Tensor, image: Tensor) -> Tensor:
        """Logits (M, T, V) of the next token at every position; see ``CaptionModel.forward``."""
        hidden = hide_words(tokens, self.config.word_dropout, self.unk_id, self.training)
        words, _ = self.embed(hidden, self._empty_tower(len(tokens), memory.prefix))
        x = torch.cat(
            [memory.prefix[image, None], words[:, 1:]], 1
        )  # the start token's place is taken
        x = dropout(
            x + self.position[: tokens.shape[1]], self.config.dropout, self.training
        )  # (M, T, d_model)
        for layer in self.decoder_layers():
            x = layer.add_self(x, *layer.project_self(x), causal=True)
            x = layer.add_feed(x)
        return self.logits(x)

    def start(self, memory: PrefixMemory) -> SharedState:
        """The state before the first token, one hypothesis an image."""
        c = self.config
        own = KeyValues.new(
            memory.prefix, c.n_decode, memory.images, c.n_head, c.d_model // c.n_head
        )
        return SharedState.new(memory, own, *self._empty_tower(memory.images, memory.prefix))

    def step(
        self, tokens: Tensor, state: SharedState, attention: bool = False
    ) -> tuple[Tensor, SharedState, Mapping[str, Tensor]]:
        """One position, earlier keys and values cached; see ``CaptionModel.step``. One image token:
        no weights."""
        cache, tower = state.cache[0].longer(), state.cache[1:]
        x, tower_cache = self.embed(tokens[:, None], tower)
        x = cache.at_first(
            state.memory.prefix[state.image, None], x
        )  # the start token's place is taken
        x = x + self.position[cache.length - 1]  # (M, 1, d_model)
        for i, layer in enumerate(self.decoder_layers()):
            query, key, value = layer.project_self(x)
            keys, values = cache.put(i, key, value)
            x = layer.add_self(x, query, keys, values, causal=False)
            x = layer.add_feed(x)
        return self.logits(x[:, 0]), state.after(cache, *tower_cache), {}
