"""From an encoder's square grid of cells to the pixels of an image. Notebook 10 teaches it."""

from typing import Any

import numpy as np
from PIL import Image

from capgen_utils.common.files import CapGenError
from capgen_utils.vision.preprocessing import Preprocessing


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
