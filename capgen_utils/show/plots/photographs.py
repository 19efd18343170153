"""Photographs in rows, under the grid of an encoder, and by what their vectors say of them."""

import textwrap
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.offsetbox import AnnotationBbox, OffsetImage

from capgen_utils.common.files import CapGenError
from capgen_utils.data.images import ImageLike, open_image
from capgen_utils.show.plots.style import COLOUR_MAP, PALETTE, STYLE, new_figure
from capgen_utils.vision.grid import grid_side
from capgen_utils.vision.preprocessing import Preprocessing


def show_images(
    images: Sequence[ImageLike],
    titles: Sequence[str] | None = None,
    columns: int = 5,
    size: float = 2.0,
    title_width: int | None = None,
) -> Figure:
    """Lay images out in rows, each under its title, long titles wrapped: also a contact sheet with
    captions.

    Args:
        images: anything ``images.open_image`` takes.
        titles: one an image.
        columns: images in a row.
        size: inches an image.
        title_width: characters in a line of a title; by default what fits.

    Raises:
        CapGenError: no images, or not as many titles as images.
    """
    if not len(images) or (titles is not None and len(titles) != len(images)):
        raise CapGenError(
            f"{len(images)} images cannot be shown with {len(titles or ())} titles",
            "pass one title an image",
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
    """Draw the cells that an encoder describes over the square that it sees.

    Args:
        image: before preprocessing.
        preprocessing: of the encoder.
        cells: N of the encoder's grid; a square number.
        number: write each cell's index into it.
    """
    side = grid_side(cells)
    pixels = preprocessing(open_image(image))
    step = len(pixels) / side
    figure, (before, after) = new_figure(1, 2, (7.2, 3.6))
    before.imshow(open_image(image))
    before.set_title("the image")
    after.imshow(pixels, extent=(0, len(pixels), len(pixels), 0))
    after.set_title(f"{len(pixels)} x {len(pixels)} pixels, {side} x {side} cells")
    for ax in (before, after):
        ax.axis("off")
    for i in range(side + 1):
        after.plot([i * step] * 2, [0, len(pixels)], color="white", linewidth=0.8)
        after.plot([0, len(pixels)], [i * step] * 2, color="white", linewidth=0.8)
    for i in range(cells if number else 0):
        x, y = (i % side + 0.5) * step, (i // side + 0.5) * step
        box = {"boxstyle": "round,pad=0.1", "facecolor": "black", "alpha": 0.45, "linewidth": 0}
        after.text(x, y, str(i), color="white", fontsize=6, ha="center", va="center", bbox=box)
    return figure


def similarity_matrix(features: Any, images: Sequence[ImageLike], size: float = 6.0) -> Figure:
    """Draw the cosine similarity of every two images, with the images themselves along both edges.

    Args:
        features: (images, D), array or tensor.
        images: as many, in the same order.
        size: inches of the figure.
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
    for i in range(count):
        for j in range(count):
            colour = "black" if (similarity[i, j] - low) / (1 - low) > 0.6 else "white"
            main.text(
                j, i, f"{similarity[i, j]:.2f}", ha="center", va="center", color=colour, fontsize=8
            )
    figure.colorbar(drawn, ax=axes, shrink=0.7, label="cosine similarity")
    return figure


def caption_similarity(
    similarity: Any, images: Sequence[ImageLike], captions: Sequence[str]
) -> Figure:
    """Draw how well images and captions fit by CLIP: a row a caption, a column an image, which
    stands above it.

    Args:
        similarity: (images, captions), cosines.
        images: as many, in the same order.
        captions: as many, in the same order.

    Raises:
        CapGenError: the three do not belong together.
    """
    values = np.asarray(similarity, dtype=np.float32)
    if values.shape != (len(images), len(captions)) or not values.size:
        raise CapGenError(
            f"similarities {values.shape} do not belong to {len(images)} images and {len(captions)} captions",
            "pass one row an image and one column a caption",
        )
    size = (3.4 + 0.75 * len(images), 1.3 + 0.42 * len(captions))
    figure, (ax,) = new_figure(size=size)
    drawn = ax.imshow(values.T, aspect="auto")
    ax.set_yticks(
        range(len(captions)), ["\n".join(textwrap.wrap(text, 34)) for text in captions], fontsize=8
    )
    ax.set(xticks=[], ylim=(len(captions) - 0.5, -0.5))
    ax.grid(visible=False)
    middle = (float(values.max()) + float(values.min())) / 2
    for (i, j), value in np.ndenumerate(values):
        ax.text(
            i,
            j,
            f"{value:.2f}",
            ha="center",
            va="center",
            fontsize=8,
            color="black" if value > middle else "white",
        )
    for i, image in enumerate(images):
        picture = OffsetImage(np.asarray(open_image(image).resize((64, 64))), zoom=0.62)
        ax.add_artist(
            AnnotationBbox(picture, (i, -0.5), (0, 24), boxcoords="offset points", frameon=False)
        )
    ax.set_title(" ", pad=36)  # room for the images
    figure.colorbar(drawn, label="cosine")
    return figure


def best_and_worst(
    images: Sequence[ImageLike],
    captions: Sequence[str],
    scores: Sequence[float],
    count: int = 5,
    name: str = "score",
) -> Figure:
    """Draw a contact sheet: the images whose captions scored highest, and below them the lowest
    ones.

    Args:
        images, captions, scores: as many of each, in the same order.
        count: images a row.
        name: of the score.

    Raises:
        CapGenError: there are not as many of each, or none.
    """
    if not len(images) or not len(images) == len(captions) == len(scores):
        raise CapGenError(
            f"{len(images)} images, {len(captions)} captions and {len(scores)} scores do not belong together",
            "pass one caption and one score an image",
        )
    order = sorted(range(len(images)), key=lambda i: -scores[i])
    count = min(count, -(-len(order) // 2))
    shown = order[:count] + order[max(count, len(order) - count) :]
    titles = [f"{name} {scores[i]:.0f}: {captions[i]}" for i in shown]
    return show_images([images[i] for i in shown], titles, columns=count)


def embedding_map(
    image_vectors: Any, text_vectors: Any, images: Sequence[ImageLike], captions: Sequence[str]
) -> Figure:
    """Draw images and captions where their vectors lie: the two directions in which the images vary
    most.

    Each half is centred on its own mean: CLIP's images and texts lie apart, and that gap says
    nothing of the contents.

    Args:
        image_vectors: (images, E).
        text_vectors: (captions, E), in the same space.
        images, captions: what the vectors are of.

    Raises:
        CapGenError: there are fewer than three images, or they do not belong to the vectors.
    """
    seen, read = (np.asarray(part, dtype=np.float64) for part in (image_vectors, text_vectors))
    if len(seen) < 3 or len(seen) != len(images) or len(read) != len(captions):
        raise CapGenError(
            f"{len(images)} images and {len(captions)} captions do not belong to vectors {seen.shape} and {read.shape}",
            "pass one vector each, and three images or more",
        )
    seen, read = seen - seen.mean(0), read - read.mean(0)
    _, strengths, directions = np.linalg.svd(seen, full_matrices=False)
    places, words = seen @ directions[:2].T, read @ directions[:2].T  # (images, 2), (captions, 2)
    share = strengths[:2] ** 2 / (strengths**2).sum()
    figure, (ax,) = new_figure(size=(8.4, 6.0))
    ax.scatter(places[:, 0], places[:, 1], s=1, color="white")
    for place, image in zip(places, images, strict=True):
        picture = OffsetImage(np.asarray(open_image(image).resize((40, 40))), zoom=0.8)
        ax.add_artist(AnnotationBbox(picture, tuple(place), pad=0.05))
    ax.scatter(words[:, 0], words[:, 1], s=18, color=PALETTE[1], zorder=4)
    box = {"boxstyle": "round,pad=0.15", "facecolor": "white", "alpha": 0.8, "linewidth": 0}
    for place, text in zip(words, captions, strict=True):
        ax.annotate(
            "\n".join(textwrap.wrap(text, 24)),
            place,
            (5, 4),
            textcoords="offset points",
            fontsize=8,
            zorder=5,
            bbox=box,
        )
    names = [
        f"direction {i + 1} ({part:.0%} of the variance of the images)"
        for i, part in enumerate(share)
    ]
    ax.set(xlabel=names[0], ylabel=names[1])
    ax.margins(0.12)
    return figure
