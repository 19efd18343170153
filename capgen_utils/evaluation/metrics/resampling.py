"""Confidence intervals from resampled images, and paired comparisons of systems. See notebook 09.

Images are drawn with replacement: the bootstrap (Efron 1979; Koehn 2004 for translations). Every
score follows from per-image statistics, so nothing is counted again; CIDEr's document frequencies
stay those of all evaluated references.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from capgen_utils.common.files import CapGenError
from capgen_utils.evaluation.metrics.scores import Captions, Extra, References, Statistics

RESAMPLES = 1000
LEVEL = 0.95
INTERVALS = f"95 %, percentiles of {RESAMPLES:,} bootstrap resamples of the images"
_AT_ONCE = 200_000  # image weights that are held in memory at a time


class Interval(NamedTuple):
    """A score and the ends of its 95 % interval, all times 100."""

    value: float
    low: float
    high: float


class Difference(NamedTuple):
    """How far a first system is ahead of a second, times 100.

    Attributes:
        value: the first system's score minus the second's.
        low, high: the 95 % interval; if it excludes 0, the systems differ.
        wins: the share of resamples in which the first system is ahead.
    """

    value: float
    low: float
    high: float
    wins: float


def intervals(
    *statistics: Statistics, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, Interval]:
    """Return every score with its 95 % percentile interval.

    Args:
        statistics: of one system; or of one system under several choices of references, whose
            scores are averaged.
        resamples: the number of samples of the images.
        seed: equal seeds draw equal samples.

    Raises:
        CapGenError: the statistics belong to different images.
    """
    each = [system.scores() for system in statistics]
    return {
        name: Interval(float(np.mean([scores[name] for scores in each])), *_ends(samples))
        for name, samples in _resampled(statistics, resamples, seed).items()
    }


def score_with_intervals(
    hypotheses: Captions,
    references: References,
    resamples: int = RESAMPLES,
    seed: int = 0,
    extra: Extra | None = None,
) -> dict[str, Interval]:
    """Return the scores of ``score``, each with its 95 % interval.

    Args:
        hypotheses: image -> generated caption.
        references: image -> its human captions, as they were written.
        resamples: the number of samples of the images.
        seed: equal seeds draw equal samples.
        extra: see ``Statistics.of``.

    Raises:
        CapGenError: see ``Statistics.of``.
    """
    return intervals(Statistics.of(hypotheses, references, extra), resamples=resamples, seed=seed)


def paired_bootstrap(
    first: Statistics, second: Statistics, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, Difference]:
    """Compare two systems on the same samples of the same images (Koehn 2004).

    Raises:
        CapGenError: the statistics belong to different images.
    """
    _check_same_images([first, second])
    ours, theirs = first.scores(), second.scores()
    samples = _resampled([first], resamples, seed)
    others = _resampled([second], resamples, seed)
    ahead = {name: samples[name] - others[name] for name in ours if name in theirs}  # (B,) each
    return {
        name: Difference(ours[name] - theirs[name], *_ends(gaps), float((gaps > 0).mean()))
        for name, gaps in ahead.items()
    }


def mean_interval(
    totals: Sequence[float], counts: Sequence[float], resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """Return the mean of values, any number per image, with its 95 % interval over the images.

    Args:
        totals: the sum of the values of each image.
        counts: the number of values of each image.
        resamples: the number of samples of the images.
        seed: equal seeds draw equal samples.

    Returns:
        In the units of the values; NaN if there are no values at all.

    Raises:
        CapGenError: the numbers of totals and counts differ.
    """
    if len(totals) != len(counts):
        raise CapGenError(
            f"{len(totals)} totals do not belong to {len(counts)} counts", "pass one per image"
        )
    if not sum(counts):
        return Interval(float("nan"), float("nan"), float("nan"))
    rows = np.asarray([totals, counts], dtype=np.float64)  # (2, I)
    samples = _samples(rows.shape[1], resamples, seed)
    sums = np.concatenate([weights @ rows.T for weights in samples])  # (B, 2)
    sums = sums[sums[:, 1] > 0]  # a sample of images without any value has no mean
    return Interval(float(rows[0].sum() / rows[1].sum()), *_ends(sums[:, 0] / sums[:, 1]))


def _check_same_images(statistics: Sequence[Statistics]) -> None:
    if not statistics or any(system.images != statistics[0].images for system in statistics):
        raise CapGenError(
            "the systems were scored on different images", "score both on the same split"
        )


def _ends(samples: np.ndarray) -> tuple[float, float]:
    """Return the ends of the percentile interval of a score's resamples (B,)."""
    low, high = np.quantile(samples, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _resampled(
    statistics: Sequence[Statistics], resamples: int, seed: int
) -> dict[str, np.ndarray]:
    """Return every common score of all resamples, (B,) each, averaged over the statistics."""
    _check_same_images(statistics)
    chunks: dict[str, list[np.ndarray]] = {}
    for weights in _samples(len(statistics[0].images), resamples, seed):
        each = [system.of_samples(weights) for system in statistics]
        for name in (name for name in each[0] if all(name in scores for scores in each)):
            chunks.setdefault(name, []).append(np.mean([scores[name] for scores in each], axis=0))
    return {name: np.concatenate(values) for name, values in chunks.items()}


def _samples(images: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Yield how often each image is drawn, (b, I) at a time, ``resamples`` rows in all."""
    if resamples < 1:
        raise CapGenError(
            f"{resamples} resamples are not possible", "ask for 1 or more; 1,000 are usual"
        )
    generator = np.random.default_rng(seed)
    rows = max(1, _AT_ONCE // images)
    for start in range(0, resamples, rows):
        count = min(rows, resamples - start)
        drawn = generator.integers(images, size=(count, images))  # (b, I)
        drawn += images * np.arange(count)[:, None]  # each row counts in its own range
        counts = np.bincount(drawn.ravel(), minlength=count * images)
        yield counts.reshape(count, images).astype(np.float64)
