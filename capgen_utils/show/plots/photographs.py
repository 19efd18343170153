"""Photographs: contact sheets, an encoder's grid, similarities. See notebooks 01, 02 and 06."""

import textwrap
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.offsetbox import AnnotationBbox, OffsetImage

from capgen_utils.common.files import CapGenError
from capgen_utils.data.images import ImageLike, open_image
from capgen_utils.show.plots.style import COLOUR_MAP, PALETTE, STYLE, new_figure
from capgen_utils.vision.preprocessing import Preprocessing, grid_side


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
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    lines = max(text.count("\n") + 1 if text else 0 for text in wrapped)
    height = size * min(1, max(picture.height / picture.width for picture in pictures))
    figure, axes = new_figure(rows, columns, (columns * size, rows * (height + 0.2 * lines) + 0.15))
    for ax in axes:
        ax.axis("off")
    for ax, picture, text in zip(axes, pictures, wrapped, strict=False):
        ax.imshow(picture, interpolation="nearest")
        ax.set_title(text, fontsize=9, loc="center")
    return figure


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
    style: Any = {"color": "white", "fontsize": 6, "ha": "center", "va": "center", "bbox": box}
    for i in range(cells if number else 0):
        after.text((i % side + 0.5) * step, (i // side + 0.5) * step, str(i), **style)
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
    count = len(images)
    figure, _ = new_figure(size=(size, size * 0.9))
    figure.clear()
    with mpl.rc_context(STYLE):
        axes = figure.subplots(
            count + 1, count + 1, squeeze=False, gridspec_kw={"wspace": 0.02, "hspace": 0.02}
        )
        main = figure.add_subplot(axes[0, 0].get_gridspec()[1:, 1:])
    for ax in axes.flat:
        ax.axis("off")
    for i, image in enumerate(images):
        thumbnail = open_image(image).resize((64, 64))
        axes[0, i + 1].imshow(thumbnail)
        axes[i + 1, 0].imshow(thumbnail)
    low = min(0.0, float(similarity.min()))
    drawn = main.imshow(similarity, vmin=low, vmax=1, aspect="auto", cmap=COLOUR_MAP)
    main.axis("off")
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
        CapGenError: their numbers differ, or there are none.
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
    first, second = strengths[:2] ** 2 / (strengths**2).sum()
    ax.set_xlabel(f"direction 1 ({first:.0%} of the variance of the images)")
    ax.set_ylabel(f"direction 2 ({second:.0%} of the variance of the images)")
    ax.margins(0.12)
    return figure
