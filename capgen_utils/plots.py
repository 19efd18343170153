"""Figures in one style: photographs, distributions, learning curves, and where a captioner looks.

Every function returns a matplotlib ``Figure`` that no window and no global state knows of; ``alt`` shows it in a
notebook together with a text for those who cannot see it.
"""

import inspect
import io
import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from capgen_utils.attention import grid_side as grid_side
from capgen_utils.attention import upsample as upsample
from capgen_utils.encoders import Preprocessing
from capgen_utils.files import CapGenError
from capgen_utils.images import ImageLike, open_image

# Okabe and Ito's colours: told apart with every common kind of colour blindness.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
COLOUR_MAP = "cividis"
DPI = 80
LARGE = 60_000  # bytes of PNG above which a figure is stored as JPEG
STYLE: Any = {
    "axes.prop_cycle": cycler(color=PALETTE),
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "figure.dpi": DPI,
    "figure.facecolor": "white",
    "font.size": 10,
    "grid.color": "#DDDDDD",
    "image.cmap": COLOUR_MAP,
    "savefig.dpi": DPI,
}


def use_style() -> None:
    """Make CapGen's style the default of this process, for figures that a notebook draws itself too."""
    mpl.rcParams.update(STYLE)


def new_figure(rows: int = 1, columns: int = 1, size: tuple[float, float] = (6.0, 3.2)) -> tuple[Figure, list[Axes]]:
    """Return an empty figure in the course's style and its axes, row by row; ``size`` in inches, of the whole."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False)
    return figure, list(axes.flat)


def alt(figure: Figure, text: str) -> Any:
    """Return ``figure`` as an image that a notebook displays, with ``text`` for screen readers."""
    from IPython.display import Image as Display

    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=DPI)
    if len(stream.getvalue()) < LARGE:
        return Display(data=stream.getvalue(), format="png", alt=text)
    small = io.BytesIO()  # photographs: a fifth of the size
    Image.open(stream).convert("RGB").save(small, format="JPEG", quality=88)
    return Display(data=small.getvalue(), format="jpeg", alt=text)


def show_source(thing: Any) -> Any:
    """Return the package's real source of a function or class, as a notebook displays it.

    What a text discusses is thereby what the package runs; the two cannot drift apart.
    """
    from IPython.display import Markdown

    source = textwrap.dedent(inspect.getsource(thing)).rstrip()
    return Markdown(f"`{thing.__module__}`:\n\n```python\n{source}\n```")


# --- photographs ----------------------------------------------------------------------------------------------------


def show_images(
    images: Sequence[ImageLike],
    titles: Sequence[str] | None = None,
    columns: int = 5,
    size: float = 2.0,
    title_width: int | None = None,
) -> Figure:
    """Lay images out in rows, each under its title, long titles wrapped: also a contact sheet with captions.

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
            f"{len(images)} images cannot be shown with {len(titles or ())} titles", "pass one title an image"
        )
    width = title_width or int(11 * size)
    wrapped = ["\n".join(textwrap.wrap(title, width)) for title in titles or [""] * len(images)]
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    lines = max(text.count("\n") + 1 if text else 0 for text in wrapped)
    figure, axes = new_figure(rows, columns, (columns * size, rows * (size + 0.2 * lines) + 0.15))
    for ax in axes:
        ax.axis("off")
    for ax, image, text in zip(axes, images, wrapped, strict=False):
        ax.imshow(open_image(image), interpolation="nearest")
        ax.set_title(text, fontsize=9, loc="center")
    return figure


def draw_grid(image: ImageLike, preprocessing: Preprocessing, cells: int, number: bool = True) -> Figure:
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


# --- distributions --------------------------------------------------------------------------------------------------


def length_histogram(lengths: Sequence[int], limit: int | None = None) -> Figure:
    """Draw how many captions have how many words; marks the mean, and ``limit``, the longest that training keeps."""
    figure, (ax,) = new_figure()
    values = np.asarray(lengths)
    counts = np.bincount(values)
    ax.bar(range(len(counts)), counts, color=PALETTE[0], width=0.85)
    ax.axvline(float(values.mean()), color=PALETTE[1], label=f"mean {values.mean():.1f} words")
    if limit is not None:
        cut = float((values > limit).mean())
        ax.axvline(limit + 0.5, color=PALETTE[6], linestyle="--", label=f"longest kept: {limit}; {cut:.1%} are longer")
    ax.set_ylim(0, 1.3 * counts.max())  # room for the legend
    ax.set(xlabel="words in a caption", ylabel="captions", title="How long are captions?")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.legend(frameon=False)
    return figure


def word_frequencies(counts: Mapping[str, int], top: int = 20) -> Figure:
    """Draw the ``top`` words, and how often each word occurs against its rank, both axes logarithmic."""
    ranked = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
    figure, (left, right) = new_figure(1, 2, (9.0, max(3.2, 0.19 * min(top, len(ranked)) + 0.8)))
    words = ranked[:top]
    left.barh([word for word, _ in words], [count for _, count in words], color=PALETTE[0])
    left.invert_yaxis()
    left.grid(axis="y", visible=False)
    left.set(xlabel="occurrences", ylabel="word", title=f"The {len(words)} most frequent words")
    right.loglog(range(1, len(ranked) + 1), [count for _, count in ranked], marker=".", markersize=4, linewidth=1)
    right.set(xlabel="rank of the word", ylabel="occurrences", title=f"All {len(ranked):,} words by rank")
    return figure


def bars(values: Mapping[str, float], xlabel: str, title: str = "", decimals: int = 1, reference: str = "") -> Figure:
    """Draw one horizontal bar a name with its value written beside it; the bar named ``reference`` is set off."""
    figure, (ax,) = new_figure(size=(6.4, 0.34 * len(values) + 1.1))
    colours = [PALETTE[1] if name == reference else PALETTE[0] for name in values]
    drawn = ax.barh(list(values), list(values.values()), color=colours)
    ax.bar_label(drawn, fmt=f"%.{decimals}f", padding=3)
    ax.invert_yaxis()
    ax.margins(x=0.12)
    ax.grid(axis="y", visible=False)
    ax.set(xlabel=xlabel, title=title)
    return figure


# --- training -------------------------------------------------------------------------------------------------------


def read_log(run: Path) -> list[dict[str, Any]]:
    """Read ``log.jsonl`` of a run folder: one entry an epoch, the newest where an epoch was logged twice.

    Raises:
        CapGenError: there is no log, or it is damaged.
    """
    path = Path(run) / "log.jsonl"
    try:
        entries = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        by_epoch = {int(entry["epoch"]): entry for entry in entries}
    except OSError as error:
        raise CapGenError(f"cannot read {path}: {error.strerror}", "name the folder of a run") from error
    except (ValueError, KeyError, TypeError) as error:
        raise CapGenError(f"{path} is damaged ({error})", "train again in another folder") from error
    return [by_epoch[epoch] for epoch in sorted(by_epoch)]


def learning_curves(runs: Mapping[str, Path]) -> Figure:
    """Draw loss and dev BLEU-4 of one or several runs, epoch by epoch.

    Args:
        runs: label -> run folder with ``log.jsonl``.
    """
    figure, (loss, score) = new_figure(1, 2, (9.0, 3.2))
    for (name, run), colour in zip(runs.items(), PALETTE * (1 + len(runs) // len(PALETTE)), strict=False):
        log = read_log(run)
        epochs = [entry["epoch"] for entry in log]
        loss.plot(epochs, [entry["train_loss"] for entry in log], "--", color=colour, label=f"{name}, train")
        judged = [entry for entry in log if "dev_loss" in entry]
        seen = [entry["epoch"] for entry in judged]
        loss.plot(seen, [entry["dev_loss"] for entry in judged], "-", marker=".", color=colour, label=f"{name}, dev")
        points = [entry["BLEU-4"] for entry in judged]
        score.plot(seen, points, "-", marker=".", color=colour, label=name)
        if points:
            best = int(np.argmax(points))
            at = (seen[best], points[best])
            score.annotate(f"{points[best]:.1f}", at, (0, 6), textcoords="offset points", ha="center")
    loss.set(xlabel="epoch", ylabel="loss (nats a token)", title="Loss")
    score.set(xlabel="epoch", ylabel="BLEU-4", title="BLEU-4 of greedy captions, dev images")
    score.margins(y=0.15)
    for ax in (loss, score):
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.legend(frameon=False)
    return figure


# --- features and attention -----------------------------------------------------------------------------------------


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
        axes = figure.subplots(count + 1, count + 1, squeeze=False, gridspec_kw={"wspace": 0.02, "hspace": 0.02})
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
            main.text(j, i, f"{similarity[i, j]:.2f}", ha="center", va="center", color=colour, fontsize=8)
    figure.colorbar(drawn, ax=axes, shrink=0.7, label="cosine similarity")
    return figure


def spotlight(image: ImageLike, weights: Any, preprocessing: Preprocessing | None = None) -> np.ndarray:
    """Return ``image`` (H, W, 3) lit where attention is high and dimmed where it is low; uint8."""
    picture = open_image(image)
    light = upsample(weights, picture.size, preprocessing)
    light = light / max(float(light.max()), 1e-9)
    shown = np.asarray(picture, dtype=np.float32) * (0.3 + 0.7 * light[..., None])
    return shown.round().astype(np.uint8)


def attention_panel(
    image: ImageLike,
    words: Sequence[str],
    weights: Any,
    preprocessing: Preprocessing | None = None,
    columns: int = 6,
    size: float = 1.9,
) -> Figure:
    """Draw where a captioner looked for each word, laid over the photograph.

    Args:
        image: before preprocessing.
        words: one a step.
        weights: (words, N), or (words, heads, N), of which the heads are averaged.
        preprocessing: of the encoder; says which part of the image the grid covers.
        columns: pictures in a row.
        size: inches a picture.

    Raises:
        CapGenError: there are not as many rows of weights as words.
    """
    values = np.asarray(weights, dtype=np.float32)
    values = values.mean(1) if values.ndim == 3 else values
    if len(values) != len(words) or values.ndim != 2:
        raise CapGenError(
            f"{len(words)} words do not belong to weights {np.shape(weights)}", "pass one row of weights a word"
        )
    picture = open_image(image)
    width, height = picture.size
    columns = min(columns, len(words) + 1)
    rows = -(-(len(words) + 1) // columns)
    inches = size * min(1.6, height / width) + 0.3
    figure, axes = new_figure(rows, columns, (size * columns, rows * inches))
    for ax in axes:
        ax.axis("off")
    axes[0].imshow(picture)
    axes[0].set_title("the image", loc="center")
    for ax, word, row in zip(axes[1:], words, values, strict=False):
        _draw_attention(ax, picture, row, preprocessing)
        ax.set_title(word, loc="center", fontweight="bold")
    return figure


def _draw_attention(ax: Axes, picture: Image.Image, weights: np.ndarray, preprocessing: Preprocessing | None) -> None:
    """The lit photograph, and a line around the part where attention is at least half of its peak."""
    ax.imshow(spotlight(picture, weights, preprocessing))
    level = upsample(weights, picture.size, preprocessing)
    if level.max() > level.min():
        half = float(level.max()) / 2
        ax.contour(level, levels=[half], colors="black", linewidths=2.0)
        ax.contour(level, levels=[half], colors=PALETTE[4], linewidths=1.0)


def attention_layers(
    image: ImageLike, words: Sequence[str], layers: Mapping[str, Any], preprocessing: Preprocessing | None = None
) -> Figure:
    """Draw one row a layer, one column a word, heads averaged.

    Args:
        image: before preprocessing.
        words: one a step.
        layers: name -> weights (words, heads, N) or (words, N).
        preprocessing: of the encoder.
    """
    picture = open_image(image)
    inches = 1.25 * min(1.6, picture.size[1] / picture.size[0]) + 0.1
    figure, axes = new_figure(len(layers), len(words), (1.25 * len(words) + 0.4, len(layers) * inches + 0.3))
    for row, (name, weights) in enumerate(layers.items()):
        values = np.asarray(weights, dtype=np.float32)
        values = values.mean(1) if values.ndim == 3 else values
        for column, word in enumerate(words):
            ax = axes[row * len(words) + column]
            _draw_attention(ax, picture, values[column], preprocessing)
            ax.set(xticks=[], yticks=[])
            ax.grid(visible=False)
            ax.spines[:].set_visible(False)
            if row == 0:
                ax.set_title(word, loc="center", fontsize=9)
            if column == 0:
                ax.set_ylabel(name)
    return figure
