"""Where a captioner looks, laid over the photograph that it looked at."""

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
from capgen_utils.vision.grid import seen_box, upsample
from capgen_utils.vision.preprocessing import Preprocessing

SCALE = "attention, 1 = even over the image"
_LONGEST = 640  # pixels of a photograph that is drawn: a panel of it is no larger on paper


def _maps(weights: Any, words: int) -> np.ndarray:
    """Return weights as (words, N), heads averaged, in multiples of an even look: 1 where a map has
    no preference."""
    values = np.asarray(weights, dtype=np.float32)
    values = values.mean(1) if values.ndim == 3 else values
    if len(values) != words or values.ndim != 2:
        raise CapGenError(
            f"{words} words do not belong to weights {np.shape(weights)}",
            "pass one row of weights a word",
        )
    return values * values.shape[1]


def scale_top(maps: Any) -> float:
    """Return where the colours of maps (words, N) end, in multiples of an even look, for all of
    them alike.

    It is the median of the words' peaks: a single word that looks at a single cell does not leave
    the others in the dark. What is above has the last colour.
    """
    values = np.asarray(maps, dtype=np.float32)
    return max(1.5, float(np.median(values.max(-1))))


def overlay(
    image: ImageLike, weights: Any, preprocessing: Preprocessing | None = None, top: float = 1
) -> np.ndarray:
    """Return a photograph in grey with attention laid over it, smoothly: (H, W, 3), uint8.

    The more attention, the brighter and the less transparent. What the encoder did not see of a
    cropped photograph is faded to white.

    Args:
        image: before preprocessing.
        weights: (N,) over a square grid.
        preprocessing: of the encoder; says which part of the image the grid covers. ``None`` for
            all of it.
        top: the weight that gets the last colour.
    """
    picture = open_image(image)
    level = np.clip(upsample(weights, picture.size, preprocessing) / top, 0, 1)  # (H, W)
    grey = 0.08 + 0.55 * np.asarray(picture.convert("L"), dtype=np.float32)[..., None] / 255
    share = 0.15 + 0.6 * level[..., None]
    shown = share * mpl.colormaps[HEAT](level)[..., :3] + (1 - share) * grey
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
    bar = figure.colorbar(
        ScalarMappable(Normalize(0, top), HEAT),
        ax=list(axes),
        extend="max",
        shrink=0.8,
        fraction=0.05,
        pad=0.01,
    )
    bar.set_label(SCALE, fontsize=8)
    bar.ax.tick_params(labelsize=8)


def _bare(ax: Axes) -> None:
    """Leave an axis nothing but its picture, its title and its label."""
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
    """Draw where a captioner looked for each word, laid over the photograph, in one colour scale.

    Args:
        image: before preprocessing.
        words: one a step.
        weights: (words, N), or (words, heads, N), of which the heads are averaged; rows sum to 1.
        preprocessing: of the encoder; says which part of the image the grid covers.
        columns: pictures in a row.
        size: inches a picture.

    Raises:
        CapGenError: there are not as many rows of weights as words.
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
    """Draw one row a map (a layer, a head, their mean, rollout) and one column a word, in one
    colour scale.

    Args:
        image: before preprocessing.
        words: one a step.
        layers: name -> weights (words, N), or (words, heads, N), of which the heads are averaged.
        preprocessing: of the encoder.
        size: inches a picture.

    Raises:
        CapGenError: there are not as many rows of weights as words.
    """
    maps, picture = (
        {name: _maps(weights, len(words)) for name, weights in layers.items()},
        _small(image),
    )
    top = scale_top(np.concatenate(list(maps.values())))
    inches = size * min(1.6, picture.size[1] / picture.size[0]) + 0.1
    shape = (size * len(words) + 1.1, len(layers) * inches + 0.3)
    figure, axes = new_figure(len(layers), len(words), shape)
    for row, (name, values) in enumerate(maps.items()):
        for column, word in enumerate(words):
            ax = axes[row * len(words) + column]
            ax.imshow(overlay(picture, values[column], preprocessing, top))
            _bare(ax)
            if row == 0:
                ax.set_title(word, loc="center", fontsize=9)
            if column == 0:
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
    """Draw one step of a caption: where the captioner looked, and beside it how likely it held
    which next word.

    Args:
        image: before preprocessing.
        weights: (N,) of this step; sums to 1.
        top: where the colours end, in multiples of an even look; the same for all steps, see
            ``scale_top``.
        likely: what might have come, the likeliest first; the bar of what did come is set off.
        word: that was said.
        preprocessing: of the encoder.
    """
    picture, values = _small(image), np.asarray(weights, dtype=np.float32)
    figure, (left, right) = new_figure(1, 2, (7.6, 3.1))
    left.imshow(overlay(picture, values * len(values), preprocessing, top))
    _bare(left)
    left.set_title(word, loc="center", fontweight="bold")
    _add_scale(figure, [left], top)
    colours = [PALETTE[1] if each.said else PALETTE[0] for each in likely]
    bars = right.barh(
        range(len(likely)), [100 * each.probability for each in likely], color=colours
    )
    right.bar_label(bars, fmt="%.0f %%", padding=3, fontsize=8)
    right.set_yticks(range(len(likely)), [each.text for each in likely])
    right.invert_yaxis()
    right.grid(axis="y", visible=False)
    right.set(xlabel="probability of the next word (%)", xlim=(0, 115))
    return figure
