"""ResNet + transformer: a decoder with cross-attention to the image grid (notebook 05).

"Attention is all you need", arXiv 1706.03762, in its pre-norm form, arXiv 2002.04745.
"""

from torch import Tensor, nn

from capgen_utils.common.tensors import grid_sinusoids
from capgen_utils.config import RECIPES, TransformerConfig
from capgen_utils.models.base import SharedState
from capgen_utils.models.layers import LayeredCaptioner, TransformerMemory, attend_images


class TransformerCaptioner(LayeredCaptioner):
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
        self.config, self.unk_id, width = config, unk_id, config.d_model
        positions, depth = feature_shape
        self.image_projection = nn.Linear(depth, width)
        self.image_position = nn.Parameter(grid_sinusoids(positions, width))
        self.image_norm = nn.LayerNorm(width)
        self.cross_keys_values = nn.Linear(width, 2 * config.n_decode * width)
        self.build_words(config, vocabulary_size, cross=True)

    def encode(self, features: Tensor) -> TransformerMemory:
        """(B, N, D) grid features -> keys and values of every layer."""
        x = self.image_norm(self.image_projection(features)) + self.image_position
        x = self.drop(x)  # (B, N, d_model)
        return TransformerMemory.split(self.cross_keys_values(x), self.layers)

    def add_image(
        self, i: int, x: Tensor, state: SharedState, attention: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Add layer i's cross-attention; see ``LayeredCaptioner.add_image``."""
        layer, memory = self.layers[i], state.memory
        query = layer.split_heads(layer.cross_query(layer.norm_cross(x)))  # (M, heads, T, width)
        attended, weights = attend_images(
            query, memory.keys[i], memory.values[i], state.grouping, attention
        )
        return x + self.drop(layer.cross_out(attended.transpose(1, 2).flatten(2))), weights
