"""CLIP's image half as an encoder (notebook 06): a published one, or a small one trained here."""

import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import Tensor, autocast, nn
from torch.nn import functional as F

from capgen_utils.common.files import CapGenError, from_dict
from capgen_utils.common.hub import import_torchvision, load_pretrained
from capgen_utils.config import SMALL_CLIP, SmallClipConfig
from capgen_utils.vision.encoder import FOLDER_REMEDY, Encoder
from capgen_utils.vision.preprocessing import Preprocessing

CLIPS: dict[str, dict[str, tuple[int, ...]]] = {  # published ones -> shapes of their outputs
    "clip-vit-base-patch32": {"embedding": (512,), "grid": (50, 768)},
    "clip-vit-large-patch14": {"embedding": (768,), "grid": (257, 1024)},
}
CLIP_PREPROCESSING = Preprocessing(
    224, "crop", mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711)
)
CLIP_REMEDY = (
    "provide CLIP in one of three ways: (1) connect to the network once, so that it can be "
    "downloaded from the hub; (2) name a local folder in the hub's layout (--encoder-weights "
    "FOLDER); (3) use the small CLIP that is trained here (capgen pretrain): --encoder small_clip"
)
# transformers' fused attention is much slower on CPUs when it runs backwards in bfloat16.
ATTENTION = "eager"


class ClipVision(Encoder):
    """CLIP's image half (arXiv 2103.00020): a vision transformer with a projected class token.

    It reads pixels, or like the small CLIP that is trained here the grid of a frozen stem. For
    transformers that grid is an image, of 7 x 7 pixels with 1280 channels for example, which is cut
    into patches.

    Outputs: ``embedding`` (E,) of length 1, and ``grid`` (1 + N, D), the last hidden states with
    the class token first.
    """

    def __init__(
        self,
        name: str,
        vision_model: nn.Module,
        projection: nn.Linear,
        preprocessing: Preprocessing,
        settings: Mapping[str, Any] | None = None,
        stem: Encoder | None = None,
    ) -> None:
        config: Any = vision_model.config
        tokens = (config.image_size // config.patch_size) ** 2 + 1
        outputs = {"embedding": (projection.out_features,), "grid": (tokens, config.hidden_size)}
        trunk = nn.ModuleDict({"vision_model": vision_model, "visual_projection": projection})
        super().__init__(
            name, trunk, preprocessing, outputs, settings, public=stem is None, stem=stem
        )

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """Encode ``pixels`` (B, size, size, 3), values 0 to 255."""
        if self.stem is not None:
            return self.from_stem(self.stem(pixels)["grid"])
        return self.look(self.normalise(pixels))

    def from_stem(self, grid: Tensor) -> dict[str, Tensor]:
        """Encode the stem's ``grid`` (B, N, D), just computed or read from a cache.

        Both give the same result: the grid is rounded to float16, as in a cache, and the rest is
        computed in float32.
        """
        with autocast(grid.device.type, enabled=False):
            return self.look(as_picture(grid.half().float()))

    def look(self, picture: Tensor) -> dict[str, Tensor]:
        """Encode ``picture`` (B, channels, side, side): normalised pixels, or the stem's grid."""
        trunk: Any = self.trunk
        states = trunk["vision_model"](pixel_values=picture)
        embedding = trunk["visual_projection"](states.pooler_output)  # (B, E)
        return {
            "embedding": F.normalize(embedding.float(), dim=-1),
            "grid": states.last_hidden_state,
        }


def as_picture(grid: Tensor) -> Tensor:
    """(B, N, D) -> (B, D, side, side) for a square grid of N = side * side vectors."""
    side = math.isqrt(grid.shape[1])
    return grid.transpose(1, 2).unflatten(2, (side, side))


# --- a published CLIP


def clip_vision(name: str, weights: Path | None = None) -> Encoder:
    """Return the image half of a published CLIP.

    Args:
        name: a key of ``CLIPS``.
        weights: a local folder in the hub's layout; by default the model is taken from the hub.

    Raises:
        CapGenError: the weights can be neither found nor downloaded; names the three ways to
            provide them.
    """
    source = weights or f"openai/{name}"
    encoder = published_clip(load_pretrained("CLIPModel", source, CLIP_REMEDY), name)
    require_clip(encoder, name, source)
    return encoder


def published_clip(clip: Any, name: str) -> ClipVision:
    """Return the image half of ``clip``, a ``CLIPModel`` of transformers, as an encoder."""
    preprocessing = replace(CLIP_PREPROCESSING, size=clip.config.vision_config.image_size)
    return ClipVision(name, clip.vision_model, clip.visual_projection, preprocessing)


def require_clip(encoder: Encoder, name: str, source: str | Path | None) -> None:
    """Refuse any other CLIP than the published one ``name``.

    Raises:
        CapGenError: the model from ``source`` has other outputs.
    """
    if encoder.outputs != CLIPS[name]:
        raise CapGenError(f"{source} is a CLIP, but not {name}", CLIP_REMEDY)


# --- the small CLIP that is trained here


def small_clip_config(settings: Any) -> SmallClipConfig:
    """Rebuild the sizes of a small CLIP from JSON.

    Raises:
        CapGenError: unknown or impossible values.
    """
    sizes = from_dict(
        SmallClipConfig, settings if isinstance(settings, dict) else {"settings": settings}
    )
    possible = 0 < sizes.embed_size <= 4096 and 2 < sizes.seq_len <= 1024
    for width, heads, layers in (
        (sizes.vision_width, sizes.vision_heads, sizes.vision_layers),
        (sizes.text_width, sizes.text_heads, sizes.text_layers),
    ):
        possible &= 0 < heads <= width <= 4096 and width % heads == 0 and 0 < layers <= 64
    if not possible:
        raise CapGenError(f"a small CLIP of {sizes} is not possible", FOLDER_REMEDY)
    return sizes


def small_vision_config(sizes: SmallClipConfig, stem: Encoder) -> dict[str, Any]:
    """Return transformers' configuration of a vision tower that reads the stem's grid.

    Raises:
        CapGenError: the stem's grid is not square, or cannot be cut into such patches.
    """
    cells, channels = stem.outputs.get("grid", (0, 0))
    side = math.isqrt(cells)
    if not cells or side * side != cells or not 0 < sizes.patch <= side or side % sizes.patch:
        raise CapGenError(
            f"{stem.name} has no square grid that can be cut into patches of {sizes.patch}",
            "choose another encoder",
        )
    return {
        "hidden_size": sizes.vision_width,
        "intermediate_size": 4 * sizes.vision_width,
        "num_hidden_layers": sizes.vision_layers,
        "num_attention_heads": sizes.vision_heads,
        "projection_dim": sizes.embed_size,
        "num_channels": channels,
        "image_size": side,
        "patch_size": sizes.patch,
    }


def new_small_clip(sizes: SmallClipConfig, stem: Encoder) -> ClipVision:
    """Return the untrained image half of a small CLIP on ``stem``."""
    import_torchvision()
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    settings = small_vision_config(sizes, stem) | {"attn_implementation": ATTENTION}
    return small_clip(CLIPVisionModelWithProjection(CLIPVisionConfig(**settings)), sizes, stem)


def small_clip(clip: Any, sizes: SmallClipConfig, stem: Encoder) -> ClipVision:
    """Return the image half of ``clip``, a CLIP of transformers, as an encoder on ``stem``.

    Its name tells the stem: "small_clip on efficientnet_lite0".
    """
    return ClipVision(
        f"{SMALL_CLIP} on {stem.name}",
        clip.vision_model,
        clip.visual_projection,
        stem.preprocessing,
        asdict(sizes),
        stem,
    )
