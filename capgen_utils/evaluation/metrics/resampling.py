"""How sure a score is: intervals from resampled images, and whether one system beats another.

Images are drawn with replacement (Efron 1979; for captions and translations Koehn 2004). Every
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
_AT_ONCE = 200_000  # weights of images that are held at a time


class Interval(NamedTuple):
    """A score and the ends of its 95 % interval, all times 100."""

    value: float
    low: float
    high: float


class Difference(NamedTuple):
    """How much a first system is ahead of a second, times 100.

    Attributes:
        value: the first's score minus the second's.
        low, high: the 95 % interval; one that does not hold 0 says that the systems differ.
        wins: the share of resamples in which the first is ahead.
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
        resamples: how many samples of the images are drawn.
        seed: equal seeds draw equal samples.

    Raises:
        CapGenError: the statistics are of different images.
    """
    values = {
        name: np.mean([one.scores()[name] for one in statistics]) for name in _common(statistics)
    }
    drawn = _drawn(statistics, resamples, seed)
    tails = {name: np.quantile(drawn[name], [(1 - LEVEL) / 2, (1 + LEVEL) / 2]) for name in values}
    return {
        name: Interval(float(value), *map(float, tails[name])) for name, value in values.items()
    }


def score_with_intervals(
    hypotheses: Captions,
    references: References,
    resamples: int = RESAMPLES,
    seed: int = 0,
    extra: Extra | None = None,
) -> dict[str, Interval]:
    """Return what ``score`` does, each with its 95 % interval.

    Args:
        hypotheses: image -> generated caption.
        references: image -> its human captions, as they were written.
        resamples: how many samples of the images are drawn.
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
        CapGenError: the statistics are of different images.
    """
    names = _common([first, second])
    ours, theirs = first.scores(), second.scores()
    drawn, others = _drawn([first], resamples, seed), _drawn([second], resamples, seed)
    result = {}
    for name in names:
        ahead = drawn[name] - others[name]
        low, high = map(float, np.quantile(ahead, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]))
        result[name] = Difference(ours[name] - theirs[name], low, high, float((ahead > 0).mean()))
    return result


def mean_interval(
    totals: Sequence[float], counts: Sequence[float], resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """Return the mean of values of which every image has any number, with the 95 % interval over
    images.

    Args:
        totals: sum of the values of each image.
        counts: how many values each image has.
        resamples: how many samples of the images are drawn.
        seed: equal seeds draw equal samples.

    Returns:
        In the units of the values; NaN where there is none at all.

    Raises:
        CapGenError: not as many totals as counts.
    """
    if len(totals) != len(counts):
        raise CapGenError(
            f"{len(totals)} totals do not belong to {len(counts)} counts",
            "pass one of each an image",
        )
    if not sum(counts):
        return Interval(float("nan"), float("nan"), float("nan"))
    own = np.asarray([totals, counts], dtype=np.float64)  # (2, I)
    sums = np.concatenate(
        [weights @ own.T for weights in _samples(own.shape[1], resamples, seed)]
    )  # (B, 2)
    sums = sums[sums[:, 1] > 0]  # a sample of images without any value has no mean
    ends = np.quantile(sums[:, 0] / sums[:, 1], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(own[0].sum() / own[1].sum()), *map(float, ends))


def _common(statistics: Sequence[Statistics]) -> list[str]:
    """Return the scores that all have."""
    if not statistics or any(one.images != statistics[0].images for one in statistics):
        raise CapGenError(
            "the systems were scored on different images", "score both on the same split"
        )
    return [
        name for name in statistics[0].scores() if all(name in one.scores() for one in statistics)
    ]


def _drawn(statistics: Sequence[Statistics], resamples: int, seed: int) -> dict[str, np.ndarray]:
    """Return the scores of every resample, (B,) each, averaged over the statistics."""
    parts = []
    for weights in _samples(len(statistics[0].images), resamples, seed):
        each = [one.of_samples(weights) for one in statistics]
        parts.append(
            {
                name: np.mean([scores[name] for scores in each], axis=0)
                for name in _common(statistics)
            }
        )
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


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
        drawn = (
            generator.integers(images, size=(count, images)) + images * np.arange(count)[:, None]
        )
        yield (
            np.bincount(drawn.ravel(), minlength=count * images)
            .reshape(count, images)
            .astype(np.float64)
        )
