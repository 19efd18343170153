"""Charts of words, training runs, and scores with their intervals. See notebooks 01, 03 and 09."""

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from capgen_utils.common.files import CapGenError
from capgen_utils.show.plots.style import PALETTE, horizontal, new_figure

# --- distributions and scores


def length_histogram(lengths: Sequence[int], limit: int | None = None) -> Figure:
    """Draw a histogram of caption lengths in words, with the mean and the longest one kept.

    Args:
        lengths: one per caption.
        limit: the longest caption that training keeps, if there is a limit.
    """
    figure, (ax,) = new_figure()
    values = np.asarray(lengths)
    counts = np.bincount(values)
    ax.bar(range(len(counts)), counts, color=PALETTE[0], width=0.85)
    ax.axvline(float(values.mean()), color=PALETTE[1], label=f"mean {values.mean():.1f} words")
    if limit is not None:
        ax.axvline(
            limit + 0.5,
            color=PALETTE[6],
            linestyle="--",
            label=f"longest kept: {limit}; {(values > limit).mean():.1%} are longer",
        )
    ax.set_ylim(0, 1.3 * counts.max())  # room for the legend
    ax.set(xlabel="words in a caption", ylabel="captions", title="How long are captions?")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.legend(edgecolor="none", framealpha=0.9)  # the line of ``limit`` may be behind it
    return figure


def word_frequencies(counts: Mapping[str, int], top: int = 20) -> Figure:
    """Draw the ``top`` words, and the frequency of every word over its rank, both logarithmic."""
    ranked = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
    words, frequencies = zip(*ranked, strict=True)
    figure, (left, right) = new_figure(1, 2, (9.0, max(3.2, 0.19 * min(top, len(ranked)) + 0.8)))
    horizontal(left).barh(words[:top], frequencies[:top], color=PALETTE[0])
    left.set(
        xlabel="occurrences",
        ylabel="word",
        title=f"The {len(words[:top])} most frequent words",
    )
    right.loglog(range(1, len(ranked) + 1), frequencies, marker=".", markersize=4, linewidth=1)
    right.set(
        xlabel="rank of the word",
        ylabel="occurrences",
        title=f"All {len(ranked):,} words by rank",
    )
    return figure


def bars(
    values: Mapping[str, float],
    xlabel: str,
    title: str = "",
    decimals: int = 1,
    reference: str = "",
) -> Figure:
    """Draw one horizontal bar per name with its value; the bar named ``reference`` stands out."""
    figure, (ax,) = new_figure(size=(6.4, 0.34 * len(values) + 1.1))
    colours = [PALETTE[1] if name == reference else PALETTE[0] for name in values]
    drawn = horizontal(ax).barh(list(values), list(values.values()), color=colours)
    ax.bar_label(drawn, fmt=f"%.{decimals}f", padding=3)
    ax.margins(x=0.12)
    ax.set(xlabel=xlabel, title=title)
    return figure


def interval_bars(
    rows: Mapping[str, Mapping[str, tuple[float, float, float]]],
    metrics: Sequence[str] | None = None,
    xlabel: str = "",
    chance: Mapping[str, float] | float | None = None,
) -> Figure:
    """Draw one panel per metric, in it one bar per row with its interval and its value.

    Args:
        rows: row -> metric -> value and the ends of its interval; a row may lack a metric.
        metrics: the panels; by default all metrics of the first row.
        xlabel: the unit of the values; by default the metric's name, which is then not the title.
        chance: the score of guessing, a dashed line: one for all panels, or metric -> value.
    """
    metrics = list(metrics or next(iter(rows.values())))
    figure, axes = new_figure(1, len(metrics), (3.0 + 3.1 * len(metrics), 0.34 * len(rows) + 1.35))
    ends = {"ecolor": "#444444", "capsize": 2}
    beside: Any = {"textcoords": "offset points", "va": "center", "fontsize": 9}
    for ax, metric in zip(axes, metrics, strict=True):
        values = np.array([rows[name].get(metric, (np.nan,) * 3) for name in rows])  # (rows, 3)
        middle, low, high = values.T
        errors = np.stack([middle - low, high - middle]).clip(min=0)  # (2, rows)
        horizontal(ax).barh(list(rows), middle, xerr=errors, color=PALETTE[0], error_kw=ends)
        decimals = 2 if np.nanmax(np.abs(values)) < 10 else 1
        for row, (value, _, end) in enumerate(values):
            if np.isfinite(value):
                ax.annotate(f"{value:.{decimals}f}", (max(end, value, 0), row), (4, 0), **beside)
        ax.set(xlabel=xlabel or metric, title=metric if xlabel else "")
        line = chance.get(metric) if isinstance(chance, Mapping) else chance
        if line is not None:
            ax.axvline(line, color=PALETTE[1], linestyle="--")
            ax.set_xlabel(f"{xlabel or metric}\n(dashed: chance {line:.2g})")
        ax.margins(x=0.2)
    for ax in axes[1:]:
        ax.set_yticks(range(len(rows)), [""] * len(rows))
    return figure


# --- training


def read_log(run: Path) -> list[dict[str, Any]]:
    """Read ``log.jsonl`` of a run folder: one entry per epoch, the newest if there are several.

    Raises:
        CapGenError: there is no log, or it is damaged.
    """
    path = Path(run) / "log.jsonl"
    try:
        lines = filter(str.strip, path.read_text(encoding="utf-8").splitlines())
        by_epoch = {int(entry["epoch"]): entry for entry in map(json.loads, lines)}
    except OSError as error:
        raise CapGenError(
            f"cannot read {path}: {error.strerror}", "name the folder of a run"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise CapGenError(
            f"{path} is damaged ({error})", "train again in another folder"
        ) from error
    return [by_epoch[epoch] for epoch in sorted(by_epoch)]


def learning_curves(runs: Mapping[str, Path]) -> Figure:
    """Draw the loss and the dev BLEU-4 of one or several runs, epoch by epoch.

    Args:
        runs: label -> run folder with ``log.jsonl``.
    """
    figure, (loss, score) = new_figure(1, 2, (9.0, 3.2))
    box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1}  # legible on a line
    text: Any = {"textcoords": "offset points", "ha": "center", "bbox": box}
    for (name, run), colour in zip(runs.items(), itertools.cycle(PALETTE), strict=False):
        log = read_log(run)
        for ax, key, line, label in (
            (loss, "train_loss", "--", f"{name}, train"),
            (loss, "dev_loss", ".-", f"{name}, dev"),
            (score, "BLEU-4", ".-", name),
        ):
            points = [(entry["epoch"], entry[key]) for entry in log if key in entry]
            ax.plot(*np.reshape(points, (-1, 2)).T, line, color=colour, label=label)
        if points:  # of BLEU-4
            best = max(points, key=lambda point: point[1])
            score.annotate(f"{best[1]:.1f}", best, (0, 6), **text)
    loss.set(xlabel="epoch", ylabel="loss (nats per token)", title="Loss")
    score.set(xlabel="epoch", ylabel="BLEU-4", title="BLEU-4 of greedy captions, dev images")
    score.margins(y=0.15)
    for ax in (loss, score):
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.legend(frameon=False)
    return figure
