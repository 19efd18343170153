"""Attention laid over photographs. Notebooks 04 and 10 use it."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from PIL import Image

from capgen_utils.common.files import CapGenError
from capgen_utils.data.images import ImageLike, open_image
from capgen_utils.decoding.captions import NextWord
from capgen_utils.show.plots.style import HEAT, PALETTE, new_figure
from capgen_utils.vision.preprocessing import Preprocessing, seen_box, upsample

SCALE = "attention, 1 = even over the image"
_LONGEST = 640  # pixels of a drawn photograph; no panel is larger on paper


def _maps(weights: Any, words: int) -> np.ndarray:
    """Return weights as (words, N), heads averaged, in multiples of even attention (1/N)."""
    values = np.asarray(weights, dtype=np.float32)
    values = values.mean(1) if values.ndim == 3 else values  # (words, heads, N) -> (words, N)
    if len(values) != words or values.ndim != 2:
        raise CapGenError(
            f"{words} words do not belong to weights {np.shape(weights)}",
            "pass one row of weights per word",
        )
    return values * values.shape[1]


def scale_top(maps: Any) -> float:
    """Return the top of a colour scale for maps (words, N), in multiples of even attention.

    It is the median of the words' peaks, so that a single word that looks at a single cell does not
    darken the others. Higher values get the last colour.
    """
    values = np.asarray(maps, dtype=np.float32)
    return max(1.5, float(np.median(values.max(-1))))


def overlay(
    image: ImageLike, weights: Any, preprocessing: Preprocessing | None = None, top: float = 1
) -> np.ndarray:
    """Return a grey photograph with attention smoothly laid over it: (H, W, 3), uint8.

    The more attention, the brighter and the less transparent. The region of a cropped photograph
    that the encoder did not see is faded to white.

    Args:
        image: before preprocessing.
        weights: (N,) over a square grid.
        preprocessing: the encoder's: the region of the image that the grid covers; ``None`` for all
            of it.
        top: the weight that gets the last colour.
    """
    picture = open_image(image)
    level = np.clip(upsample(weights, picture.size, preprocessing) / top, 0, 1)  # (H, W)
    grey = 0.08 + 0.55 * np.asarray(picture.convert("L"), dtype=np.float32)[..., None] / 255
    share = 0.15 + 0.6 * level[..., None]  # (H, W, 1)
    shown = share * mpl.colormaps[HEAT](level)[..., :3] + (1 - share) * grey  # (H, W, 3)
    left, upper, right, lower = seen_box(picture.size, preprocessing)
    faded = np.ones(level.shape, dtype=bool)
    faded[upper:lower, left:right] = False
    shown[faded] = 0.75 + 0.25 * np.broadcast_to(grey, shown.shape)[faded]
    return (255 * shown).round().astype(np.uint8)


def _small(image: ImageLike) -> Image.Image:
    picture = open_image(image)
    picture.thumbnail((_LONGEST, _LONGEST))
    return picture


def _add_scale(figure: Figure, axes: Sequence[Axes], top: float) -> None:
    colours = ScalarMappable(Normalize(0, top), HEAT)
    size: Any = {"shrink": 0.8, "fraction": 0.05, "pad": 0.01}
    bar = figure.colorbar(colours, ax=list(axes), extend="max", **size)
    bar.set_label(SCALE, fontsize=8)
    bar.ax.tick_params(labelsize=8)


def _bare(ax: Axes) -> None:
    """Strip an axis of all but its picture, title and label."""
    ax.set(xticks=[], yticks=[])
    ax.grid(visible=False)
    ax.spines[:].set_visible(False)


def attention_panel(
    image: ImageLike,
    words: Sequence[str],
    weights: Any,
    preprocessing: Preprocessing | None = None,
    columns: int = 6,
    size: float = 1.9,
) -> Figure:
    """Draw the attention for each word over the photograph, all in one colour scale.

    Args:
        image: before preprocessing.
        words: one per step.
        weights: (words, N), or (words, heads, N), whose heads are averaged; rows sum to 1.
        preprocessing: the encoder's: the region of the image that the grid covers.
        columns: pictures in a row.
        size: inches per picture.

    Raises:
        CapGenError: the numbers of words and rows of weights differ.
    """
    values, picture = _maps(weights, len(words)), _small(image)
    top, (width, height) = scale_top(values), picture.size
    columns = min(columns, len(words) + 1)
    rows = -(-(len(words) + 1) // columns)
    inches = size * min(1.6, height / width) + 0.3
    figure, axes = new_figure(rows, columns, (size * columns + 0.7, rows * inches))
    for ax in axes:
        ax.axis("off")
    axes[0].imshow(picture)
    axes[0].set_title("the image", loc="center")
    for ax, word, row in zip(axes[1:], words, values, strict=False):
        ax.imshow(overlay(picture, row, preprocessing, top))
        ax.set_title(word, loc="center", fontweight="bold")
    _add_scale(figure, axes, top)
    return figure


def attention_layers(
    image: ImageLike,
    words: Sequence[str],
    layers: Mapping[str, Any],
    preprocessing: Preprocessing | None = None,
    size: float = 1.25,
) -> Figure:
    """Draw one row per map (a layer, a head, their mean, rollout) and one column per word.

    Args:
        image: before preprocessing.
        words: one per step.
        layers: name -> weights (words, N), or (words, heads, N), whose heads are averaged.
        preprocessing: the encoder's.
        size: inches per picture.

    Raises:
        CapGenError: the numbers of words and rows of weights differ.
    """
    maps = {name: _maps(weights, len(words)) for name, weights in layers.items()}
    picture = _small(image)
    top = scale_top(np.concatenate(list(maps.values())))  # (layers words, N)
    inches = size * min(1.6, picture.size[1] / picture.size[0]) + 0.1
    shape = (size * len(words) + 1.1, len(layers) * inches + 0.3)
    figure, axes = new_figure(len(layers), len(words), shape)
    for ax, weights in zip(axes, np.concatenate(list(maps.values())), strict=True):
        ax.imshow(overlay(picture, weights, preprocessing, top))
        _bare(ax)
    for ax, word in zip(axes, words, strict=False):
        ax.set_title(word, loc="center", fontsize=9)
    for ax, name in zip(axes[:: len(words)], maps, strict=True):
        ax.set_ylabel(name, fontsize=9)
    _add_scale(figure, axes, top)
    return figure


def attention_step(
    image: ImageLike,
    weights: Any,
    top: float,
    likely: Sequence[NextWord],
    word: str,
    preprocessing: Preprocessing | None = None,
) -> Figure:
    """Draw one step of a caption: the attention, and beside it the probabilities of the next word.

    Args:
        image: before preprocessing.
        weights: (N,) of this step; sums to 1.
        top: the top of the colour scale, in multiples of even attention; the same for all steps,
            see ``scale_top``.
        likely: possible next words, the likeliest first; the bar of the actual one stands out.
        word: the actual word.
        preprocessing: the encoder's.
    """
    picture, values = _small(image), np.asarray(weights, dtype=np.float32)
    figure, (left, right) = new_figure(1, 2, (7.6, 3.1))
    left.imshow(overlay(picture, values * len(values), preprocessing, top))
    _bare(left)
    left.set_title(word, loc="center", fontweight="bold")
    _add_scale(figure, [left], top)
    colours = [PALETTE[1] if each.said else PALETTE[0] for each in likely]
    percent = [100 * each.probability for each in likely]
    bars = right.barh(range(len(likely)), percent, color=colours)
    right.bar_label(bars, fmt="%.0f %%", padding=3, fontsize=8)
    right.set_yticks(range(len(likely)), [each.text for each in likely])
    right.invert_yaxis()
    right.grid(axis="y", visible=False)
    right.set(xlabel="probability of the next word (%)", xlim=(0, 115))
    return figure
