"""Charts: what captions are made of, how training went, and scores with their intervals."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from capgen_utils.common.files import CapGenError
from capgen_utils.show.plots.style import PALETTE, new_figure

_ON_LINES: Any = {
    "facecolor": "white",
    "edgecolor": "none",
    "alpha": 0.85,
    "pad": 1,
}  # keeps text legible on a line


# --- distributions


def length_histogram(lengths: Sequence[int], limit: int | None = None) -> Figure:
    """Draw how many captions have how many words; marks the mean, and ``limit``, the longest that
    training keeps."""
    figure, (ax,) = new_figure()
    values = np.asarray(lengths)
    counts = np.bincount(values)
    ax.bar(range(len(counts)), counts, color=PALETTE[0], width=0.85)
    ax.axvline(float(values.mean()), color=PALETTE[1], label=f"mean {values.mean():.1f} words")
    if limit is not None:
        cut = float((values > limit).mean())
        ax.axvline(
            limit + 0.5,
            color=PALETTE[6],
            linestyle="--",
            label=f"longest kept: {limit}; {cut:.1%} are longer",
        )
    ax.set_ylim(0, 1.3 * counts.max())  # room for the legend
    ax.set(xlabel="words in a caption", ylabel="captions", title="How long are captions?")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.legend(edgecolor="none", framealpha=0.9)  # the line of ``limit`` may lie under it
    return figure


def word_frequencies(counts: Mapping[str, int], top: int = 20) -> Figure:
    """Draw the ``top`` words, and how often each word occurs against its rank, both axes
    logarithmic."""
    ranked = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
    figure, (left, right) = new_figure(1, 2, (9.0, max(3.2, 0.19 * min(top, len(ranked)) + 0.8)))
    words = ranked[:top]
    left.barh([word for word, _ in words], [count for _, count in words], color=PALETTE[0])
    left.invert_yaxis()
    left.grid(axis="y", visible=False)
    left.set(xlabel="occurrences", ylabel="word", title=f"The {len(words)} most frequent words")
    right.loglog(
        range(1, len(ranked) + 1),
        [count for _, count in ranked],
        marker=".",
        markersize=4,
        linewidth=1,
    )
    right.set(
        xlabel="rank of the word", ylabel="occurrences", title=f"All {len(ranked):,} words by rank"
    )
    return figure


def bars(
    values: Mapping[str, float],
    xlabel: str,
    title: str = "",
    decimals: int = 1,
    reference: str = "",
) -> Figure:
    """Draw one horizontal bar a name with its value written beside it; the bar named ``reference``
    is set off."""
    figure, (ax,) = new_figure(size=(6.4, 0.34 * len(values) + 1.1))
    colours = [PALETTE[1] if name == reference else PALETTE[0] for name in values]
    drawn = ax.barh(list(values), list(values.values()), color=colours)
    ax.bar_label(drawn, fmt=f"%.{decimals}f", padding=3)
    ax.invert_yaxis()
    ax.margins(x=0.12)
    ax.grid(axis="y", visible=False)
    ax.set(xlabel=xlabel, title=title)
    return figure


def interval_bars(
    rows: Mapping[str, Mapping[str, tuple[float, float, float]]],
    metrics: Sequence[str] | None = None,
    xlabel: str = "",
    chance: Mapping[str, float] | float | None = None,
) -> Figure:
    """Draw one panel a metric, one bar a row, with its interval and its value beside it.

    Args:
        rows: row -> metric -> value and the ends of its interval; a row may lack a metric.
        metrics: the panels; by default all that the first row has.
        xlabel: what the values are; by default the metric's name stands there, and no title above.
        chance: what guessing scores, a dashed line: one for all panels, or metric -> value.
    """
    metrics = list(metrics or next(iter(rows.values())))
    figure, axes = new_figure(1, len(metrics), (3.0 + 3.1 * len(metrics), 0.34 * len(rows) + 1.35))
    for place, (ax, metric) in enumerate(zip(axes, metrics, strict=True)):
        values = np.array([rows[name].get(metric, (np.nan,) * 3) for name in rows])  # (rows, 3)
        middle, low, high = values.T
        errors = np.stack([middle - low, high - middle]).clip(min=0)  # (2, rows)
        ax.barh(
            list(rows),
            middle,
            xerr=errors,
            color=PALETTE[0],
            error_kw={"ecolor": "#444444", "capsize": 2},
        )
        for row, (value, _, end) in enumerate(values):
            if np.isfinite(value):
                shown = f"{value:.2f}" if np.nanmax(np.abs(values)) < 10 else f"{value:.1f}"
                ax.annotate(
                    shown,
                    (max(end, value, 0), row),
                    (4, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=9,
                )
        line = chance.get(metric) if isinstance(chance, Mapping) else chance
        if line is not None:
            ax.axvline(line, color=PALETTE[1], linestyle="--")
        ax.invert_yaxis()
        ax.margins(x=0.2)
        ax.grid(axis="y", visible=False)
        label = (xlabel or metric) + (f"\n(dashed: chance {line:.2g})" if line is not None else "")
        ax.set(xlabel=label, title=metric if xlabel else "")
        if place:
            ax.set_yticks(range(len(rows)), [""] * len(rows))
    return figure


# --- training


def read_log(run: Path) -> list[dict[str, Any]]:
    """Read ``log.jsonl`` of a run folder: one entry an epoch, the newest where an epoch was logged
    twice.

    Raises:
        CapGenError: there is no log, or it is damaged.
    """
    path = Path(run) / "log.jsonl"
    try:
        entries = [
            json.loads(line)
            for line in path.read_text(encoding="utf-8").splitlines()
            if line.strip()
        ]
        by_epoch = {int(entry["epoch"]): entry for entry in entries}
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
    """Draw loss and dev BLEU-4 of one or several runs, epoch by epoch.

    Args:
        runs: label -> run folder with ``log.jsonl``.
    """
    figure, (loss, score) = new_figure(1, 2, (9.0, 3.2))
    for (name, run), colour in zip(
        runs.items(), PALETTE * (1 + len(runs) // len(PALETTE)), strict=False
    ):
        log = read_log(run)
        epochs = [entry["epoch"] for entry in log]
        loss.plot(
            epochs,
            [entry["train_loss"] for entry in log],
            "--",
            color=colour,
            label=f"{name}, train",
        )
        judged = [entry for entry in log if "dev_loss" in entry]
        seen = [entry["epoch"] for entry in judged]
        loss.plot(
            seen,
            [entry["dev_loss"] for entry in judged],
            "-",
            marker=".",
            color=colour,
            label=f"{name}, dev",
        )
        points = [entry["BLEU-4"] for entry in judged]
        score.plot(seen, points, "-", marker=".", color=colour, label=name)
        if points:
            best = int(np.argmax(points))
            at = (seen[best], points[best])
            score.annotate(
                f"{points[best]:.1f}",
                at,
                (0, 6),
                textcoords="offset points",
                ha="center",
                bbox=_ON_LINES,
            )
    loss.set(xlabel="epoch", ylabel="loss (nats a token)", title="Loss")
    score.set(xlabel="epoch", ylabel="BLEU-4", title="BLEU-4 of greedy captions, dev images")
    score.margins(y=0.15)
    for ax in (loss, score):
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.legend(frameon=False)
    return figure
