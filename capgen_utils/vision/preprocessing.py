"""How an RGB image becomes an encoder's input, with and without torch (notebook 02)."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from capgen_utils.common.files import CapGenError, from_dict

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Preprocessing:
    """How an RGB image becomes the encoder's input; stored in every bundle.

    Attributes:
        size: side of the square in pixels.
        resize: ``squash`` (both sides to ``size``) or ``crop`` (short side to ``size``, centre
            kept).
        mean, std: per channel, for values from 0 to 1.
    """

    size: int = 224
    resize: str = "squash"
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def __call__(self, image: Image.Image, flip: bool = False) -> np.ndarray:
        """Return pixels as uint8 (size, size, 3); ``flip`` mirrors left and right."""
        target, bicubic = (self.size, self.size), Image.Resampling.BICUBIC
        if self.resize == "crop":
            side = min(image.size)
            left, top = ((length - side) / 2 for length in image.size)
            # only the centre is resized: a whole narrow strip would grow to gigabytes
            image = image.resize(target, bicubic, box=(left, top, left + side, top + side))
        elif image.size != target:
            image = image.resize(target, bicubic)
        pixels = np.asarray(image)
        return pixels[:, ::-1] if flip else pixels


def preprocessing_from_json(value: Any) -> Preprocessing:
    """Rebuild a ``Preprocessing`` that a bundle stored.

    Raises:
        CapGenError: unknown fields or impossible values.
    """
    value = value if isinstance(value, dict) else {}
    error = CapGenError(
        f"the bundle's preprocessing {value} is not possible", "get the bundle again"
    )
    pair = [value.get(key) for key in ("mean", "std")]
    mean, std = (tuple(v) if isinstance(v, list | tuple) else () for v in pair)
    numbers = all(type(x) in (int, float) and abs(x) <= 100 for x in mean + std)
    if len(mean) != 3 or len(std) != 3 or not numbers or min(std) < 1e-3:
        raise error
    result = from_dict(Preprocessing, {**value, "mean": mean, "std": std})
    if not 8 <= result.size <= 2048 or result.resize not in ("squash", "crop"):
        raise error
    return result
