"""Photographs: contact sheets, an encoder's grid, similarities, and attention laid over them.

Notebooks 01, 02, 04, 06 and 10 use them.
"""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.offsetbox import AnnotationBbox, OffsetImage
from PIL import Image

from capgen_utils.common.files import CapGenError
from capgen_utils.data.images import ImageLike, open_image
from capgen_utils.decoding.captions import NextWord
from capgen_utils.show.plots.style import COLOUR_MAP, HEAT, PALETTE, horizontal, new_figure
from capgen_utils.vision.preprocessing import Preprocessing, grid_side, seen_box, upsample

SCALE = "attention, 1 = even over the image"
_LONGEST = 640  # pixels of a photograph under attention; no panel is larger on paper


def _sheet(
    pictures: Sequence[Any],
    titles: Sequence[str],
    columns: int,
    size: tuple[float, float],
    margin: tuple[float, float],
    interpolation: str | None = None,
    **style: Any,
) -> tuple[Figure, list[Axes]]:
    """Return a figure of pictures in rows; ``size`` of each and ``margin`` of all in inches."""
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    figure, axes = new_figure(
        rows, columns, (columns * size[0] + margin[0], rows * size[1] + margin[1])
    )
    for ax in axes:
        ax.axis("off")
    for ax, picture, title in zip(axes, pictures, titles, strict=False):
        ax.imshow(picture, interpolation=interpolation)
        ax.set_title(title, loc="center", **style)
    return figure, axes


def show_images(
    images: Sequence[ImageLike],
    titles: Sequence[str] | None = None,
    columns: int = 5,
    size: float = 2.0,
    title_width: int | None = None,
) -> Figure:
    """Draw images in rows, each under its title, for example a contact sheet with captions.

    Args:
        images: anything that ``open_image`` takes.
        titles: one per image; long ones are wrapped.
        columns: images in a row.
        size: inches per image.
        title_width: characters per line of a title; by default as many as fit.

    Raises:
        CapGenError: there are no images, or the numbers of titles and images differ.
    """
    if not len(images) or (titles is not None and len(titles) != len(images)):
        raise CapGenError(
            f"{len(images)} images cannot be shown with {len(titles or ())} titles",
            "pass one title per image",
        )
    width = title_width or int(11 * size)
    wrapped = ["\n".join(textwrap.wrap(title, width)) for title in titles or [""] * len(images)]
    pictures = [open_image(image) for image in images]
    lines = max(text.count("\n") + 1 if text else 0 for text in wrapped)
    height = size * min(1, max(picture.height / picture.width for picture in pictures))
    shape = (size, height + 0.2 * lines)
    return _sheet(pictures, wrapped, columns, shape, (0, 0.15), "nearest", fontsize=9)[0]


def draw_grid(
    image: ImageLike, preprocessing: Preprocessing, cells: int, number: bool = True
) -> Figure:
    """Draw the cells of an encoder's grid over the square that the encoder sees.

    Args:
        image: before preprocessing.
        preprocessing: the encoder's.
        cells: N of the encoder's grid; a square number.
        number: write each cell's index into it.
    """
    side = grid_side(cells)
    pixels = preprocessing(open_image(image))  # (size, size, 3)
    step = len(pixels) / side
    figure, (before, after) = new_figure(1, 2, (7.2, 3.6))
    before.imshow(open_image(image))
    before.set_title("the image")
    after.imshow(pixels, extent=(0, len(pixels), len(pixels), 0))
    after.set_title(f"{len(pixels)} x {len(pixels)} pixels, {side} x {side} cells")
    for ax in (before, after):
        ax.axis("off")
    for i in range(side + 1):
        after.axvline(i * step, color="white", linewidth=0.8)
        after.axhline(i * step, color="white", linewidth=0.8)
    box = {"boxstyle": "round,pad=0.1", "facecolor": "black", "alpha": 0.45, "linewidth": 0}
    for i in range(cells if number else 0):
        x, y = (i % side + 0.5) * step, (i // side + 0.5) * step
        after.text(x, y, str(i), color="white", fontsize=6, ha="center", va="center", bbox=box)
    return figure


def similarity_matrix(features: Any, images: Sequence[ImageLike], size: float = 6.0) -> Figure:
    """Draw the cosine similarity of all pairs of images, with the images along both edges.

    Args:
        features: (images, D), array or tensor.
        images: in the same order.
        size: width of the figure in inches.
    """
    values = np.asarray(features, dtype=np.float32)
    values = values / np.linalg.norm(values, axis=1, keepdims=True)
    similarity = values @ values.T  # (images, images)
    side = len(images) + 1
    gaps = {"wspace": 0.02, "hspace": 0.02}
    figure, axes = new_figure(side, side, (size, size * 0.9), gridspec_kw=gaps)
    main = figure.add_subplot(axes[0].get_gridspec()[1:, 1:])  # type: ignore[union-attr,index]
    for ax in figure.axes:
        ax.axis("off")
    for image, above, beside in zip(images, axes[1:], axes[side::side], strict=False):
        thumbnail = open_image(image).resize((64, 64))
        above.imshow(thumbnail)
        beside.imshow(thumbnail)
    low = min(0.0, float(similarity.min()))
    drawn = main.imshow(similarity, vmin=low, vmax=1, aspect="auto", cmap=COLOUR_MAP)
    _write_values(main, similarity, low + 0.6 * (1 - low))
    figure.colorbar(drawn, ax=axes, shrink=0.7, label="cosine similarity")
    return figure


def caption_similarity(
    similarity: Any, images: Sequence[ImageLike], captions: Sequence[str]
) -> Figure:
    """Draw CLIP's similarities: a row per caption, a column per image, which stands above it.

    Args:
        similarity: (images, captions), cosines.
        images, captions: in the same order.

    Raises:
        CapGenError: the three do not belong together.
    """
    values = np.asarray(similarity, dtype=np.float32)
    if values.shape != (len(images), len(captions)) or not values.size:
        raise CapGenError(
            f"similarities {values.shape} do not belong to {len(images)} images and "
            f"{len(captions)} captions",
            "pass one row per image and one column per caption",
        )
    figure, (ax,) = new_figure(size=(3.4 + 0.75 * len(images), 1.3 + 0.42 * len(captions)))
    drawn = ax.imshow(values.T, aspect="auto")
    labels = ["\n".join(textwrap.wrap(text, 34)) for text in captions]
    ax.set_yticks(range(len(captions)), labels, fontsize=8)
    ax.set(xticks=[], ylim=(len(captions) - 0.5, -0.5))
    ax.grid(visible=False)
    _write_values(ax, values.T, (float(values.max()) + float(values.min())) / 2)
    for i, image in enumerate(images):
        _add_thumbnail(ax, image, (i, -0.5), 64, 0.62, (0, 24), frameon=False)
    ax.set_title(" ", pad=36)  # room for the images
    figure.colorbar(drawn, label="cosine")
    return figure


def _write_values(ax: Axes, values: np.ndarray, threshold: float) -> None:
    """Write each value of a picture (rows, columns) into it, black above the threshold."""
    for (row, column), value in np.ndenumerate(values):
        colour = "black" if value > threshold else "white"
        ax.text(column, row, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=8)


def _add_thumbnail(
    ax: Axes,
    image: ImageLike,
    xy: tuple[float, float],
    side: int,
    zoom: float,
    offset: tuple[float, float] = (0, 0),
    **style: Any,
) -> None:
    picture = OffsetImage(np.asarray(open_image(image).resize((side, side))), zoom=zoom)
    ax.add_artist(AnnotationBbox(picture, xy, offset, boxcoords="offset points", **style))


def best_and_worst(
    images: Sequence[ImageLike],
    captions: Sequence[str],
    scores: Sequence[float],
    count: int = 5,
    name: str = "score",
) -> Figure:
    """Draw the images whose captions scored highest, and below them the lowest.

    Args:
        images, captions, scores: in the same order.
        count: images in a row.
        name: of the score.

    Raises:
        CapGenError: their numbers differ, or there is no image.
    """
    if not len(images) or not len(images) == len(captions) == len(scores):
        raise CapGenError(
            f"{len(images)} images, {len(captions)} captions and {len(scores)} scores do not "
            "belong together",
            "pass one caption and one score per image",
        )
    order = sorted(range(len(images)), key=lambda i: -scores[i])
    count = min(count, -(-len(order) // 2))
    shown = order[:count] + order[max(count, len(order) - count) :]
    titles = [f"{name} {scores[i]:.0f}: {captions[i]}" for i in shown]
    return show_images([images[i] for i in shown], titles, columns=count)


def embedding_map(
    image_vectors: Any, text_vectors: Any, images: Sequence[ImageLike], captions: Sequence[str]
) -> Figure:
    """Draw images and captions by their vectors, in the two directions of most image variance.

    Images and captions are centred separately: CLIP's image and text vectors lie apart, and that
    gap says nothing about their content.

    Args:
        image_vectors: (images, E).
        text_vectors: (captions, E), in the same space.
        images, captions: in the same order.

    Raises:
        CapGenError: there are fewer than three images, or they do not belong to the vectors.
    """
    seen, read = (np.asarray(each, dtype=np.float64) for each in (image_vectors, text_vectors))
    if len(seen) < 3 or len(seen) != len(images) or len(read) != len(captions):
        raise CapGenError(
            f"{len(images)} images and {len(captions)} captions do not belong to vectors "
            f"{seen.shape} and {read.shape}",
            "pass one vector each, and three images or more",
        )
    seen, read = seen - seen.mean(0), read - read.mean(0)
    _, strengths, directions = np.linalg.svd(seen, full_matrices=False)
    points, words = seen @ directions[:2].T, read @ directions[:2].T  # (images, 2), (captions, 2)
    figure, (ax,) = new_figure(size=(8.4, 6.0))
    ax.scatter(points[:, 0], points[:, 1], s=1, color="white")
    for (x, y), image in zip(points, images, strict=True):
        _add_thumbnail(ax, image, (x, y), 40, 0.8, pad=0.05)
    ax.scatter(words[:, 0], words[:, 1], s=18, color=PALETTE[1], zorder=4)
    box = {"boxstyle": "round,pad=0.15", "facecolor": "white", "alpha": 0.8, "linewidth": 0}
    style: Any = {"textcoords": "offset points", "fontsize": 8, "zorder": 5, "bbox": box}
    for point, text in zip(words, captions, strict=True):
        ax.annotate("\n".join(textwrap.wrap(text, 24)), point, (5, 4), **style)
    first, second = (
        f"direction {number} ({share:.0%} of the variance of the images)"
        for number, share in enumerate(strengths[:2] ** 2 / (strengths**2).sum(), 1)
    )
    ax.set(xlabel=first, ylabel=second)
    ax.margins(0.12)
    return figure


# --- attention


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
    bar = figure.colorbar(colours, ax=list(axes), extend="max", shrink=0.8, fraction=0.05, pad=0.01)
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
    top = scale_top(values)
    pictures = [picture, *(overlay(picture, row, preprocessing, top) for row in values)]
    inches = size * min(1.6, picture.height / picture.width) + 0.3
    figure, axes = _sheet(pictures, ["the image", *words], columns, (size, inches), (0.7, 0))
    for ax in axes[1:]:
        ax.title.set_fontweight("bold")
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
    maps = np.concatenate([_maps(each, len(words)) for each in layers.values()])  # (pictures, N)
    picture, top = _small(image), scale_top(maps)
    inches = size * min(1.6, picture.height / picture.width) + 0.1
    shape = (size * len(words) + 1.1, len(layers) * inches + 0.3)
    figure, axes = new_figure(len(layers), len(words), shape)
    for ax, weights in zip(axes, maps, strict=True):
        ax.imshow(overlay(picture, weights, preprocessing, top))
        _bare(ax)
    for ax, word in zip(axes, words, strict=False):
        ax.set_title(word, loc="center", fontsize=9)
    for ax, name in zip(axes[:: len(words)], layers, strict=True):
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
    drawn = horizontal(right).barh(range(len(likely)), percent, color=colours)
    right.bar_label(drawn, fmt="%.0f %%", padding=3, fontsize=8)
    right.set_yticks(range(len(likely)), [each.text for each in likely])
    right.set(xlabel="probability of the next word (%)", xlim=(0, 115))
    return figure
