"""From an image to an encoder's input, and from its square grid back to pixels (02 and 10)."""

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


def grid_side(cells: int) -> int:
    """Return the side of a square grid of ``cells`` cells.

    Raises:
        CapGenError: ``cells`` is not a square number.
    """
    side = round(cells**0.5)
    if side * side != cells:
        raise CapGenError(
            f"{cells} cells do not form a square grid",
            "pass the weights of one image over a square grid",
        )
    return side


def seen_box(
    size: tuple[int, int], preprocessing: Preprocessing | None = None
) -> tuple[int, int, int, int]:
    """Return the region of an image that its encoder sees: left, top, right, bottom in pixels.

    Args:
        size: (width, height) of the image.
        preprocessing: the encoder's; ``None`` for squash, which keeps everything.

    Returns:
        The right and bottom edges are exclusive.
    """
    width, height = size
    if preprocessing is None or preprocessing.resize != "crop":
        return 0, 0, width, height
    short = min(size)
    left, top = (width - short) // 2, (height - short) // 2
    return left, top, left + short, top + short


def upsample(
    weights: Any, size: tuple[int, int], preprocessing: Preprocessing | None = None
) -> np.ndarray:
    """Return attention over a grid as a smooth map over the image, (height, width).

    A squashed image fills the encoder's square, so the grid covers all of it. For a cropped image
    the grid covers the centred square, and the rest of the map is 0.

    Args:
        weights: (N,) over a square grid, row by row.
        size: (width, height) of the image in pixels.
        preprocessing: the encoder's; ``None`` for squash.

    Returns:
        Values of 0 or more; the largest is close to the largest of ``weights``.
    """
    values = np.asarray(weights, dtype=np.float32).reshape(-1)  # (N,)
    side = grid_side(len(values))
    grid = Image.fromarray(values.reshape(side, side))  # one float per cell
    left, top, right, bottom = seen_box(size, preprocessing)
    result = np.zeros((size[1], size[0]), dtype=np.float32)  # (height, width)
    box = grid.resize((right - left, bottom - top), Image.Resampling.BILINEAR)
    result[top:bottom, left:right] = np.asarray(box)
    return result
