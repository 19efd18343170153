"""Intervals and paired comparisons from resampled images."""

import math

import numpy as np
import pytest

from capgen_utils.common.files import CapGenError
from capgen_utils.evaluation.metrics import (
    Interval,
    Statistics,
    intervals,
    paired_bootstrap,
    score,
    score_with_intervals,
)


def many(seed: int = 0, count: int = 120) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Return random captions of a small vocabulary, and references that share about half of their
    words."""
    generator = np.random.default_rng(seed)
    words = np.array(["red", "blue", "dog", "cat", "runs", "sits", "big", "small", "man", "ball"])
    written = {
        f"{i:03d}": [" ".join(generator.choice(words, 7)) for _ in range(3)] for i in range(count)
    }
    said = {
        name: " ".join([*captions[0].split()[:4], *generator.choice(words, 3)])
        for name, captions in written.items()
    }
    return said, written


def test_a_sample_s_scores_are_those_of_the_sampled_captions() -> None:
    said, written = many(count=30)
    weights = np.bincount(np.random.default_rng(1).integers(30, size=30), minlength=30)
    names = [
        (name, copy)
        for name, times in zip(sorted(said), weights, strict=True)
        for copy in range(times)
    ]
    again = score(
        {f"{n} {c}": said[n] for n, c in names}, {f"{n} {c}": written[n] for n, c in names}
    )
    found = Statistics.of(said, written).of_samples(weights[None, :].astype(float))
    for name in ("BLEU-1", "BLEU-4", "ROUGE-L"):  # CIDEr's weights stay those of all references
        assert found[name][0] == pytest.approx(again[name])


def test_an_interval_is_as_wide_as_the_standard_error_says() -> None:
    said, written = many()
    statistics = Statistics.of(said, written)
    found = intervals(statistics, resamples=2000)
    for name, values in statistics.means.items():
        half = 1.96 * values.std() / math.sqrt(len(values))
        assert found[name].value == pytest.approx(values.mean())
        assert found[name].low == pytest.approx(values.mean() - half, abs=0.2 * half)
        assert found[name].high == pytest.approx(values.mean() + half, abs=0.2 * half)
    assert all(one.low < one.value < one.high for one in found.values())


def test_equal_seeds_give_equal_intervals() -> None:
    said, written = many()
    found = score_with_intervals(said, written, resamples=50, seed=3)
    assert found == score_with_intervals(said, written, resamples=50, seed=3)
    assert found != score_with_intervals(said, written, resamples=50, seed=4)
    assert {name: one.value for name, one in found.items()} == pytest.approx(score(said, written))
    with pytest.raises(CapGenError, match="resamples"):
        score_with_intervals(said, written, resamples=0)


def test_samples_are_drawn_in_parts_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    said, written = many()
    monkeypatch.setattr("capgen_utils.evaluation.metrics.resampling._AT_ONCE", 700)
    found = score_with_intervals(said, written, resamples=101)
    assert all(one.low < one.value < one.high for one in found.values())


def test_more_metrics_get_intervals_too() -> None:
    said, written = many()
    extra = {"METEOR": {name: float(i) for i, name in enumerate(sorted(said))}}
    found = score_with_intervals(said, written, extra=extra)["METEOR"]
    assert (
        isinstance(found, Interval)
        and found.value == pytest.approx(59.5)
        and found.low < 59.5 < found.high
    )
    assert score(said, written, extra)["METEOR"] == pytest.approx(59.5)
    with pytest.raises(CapGenError, match="METEOR"):
        score(said, written, {"METEOR": {"000": 1.0}})


def test_the_paired_bootstrap_knows_better_equal_and_worse() -> None:
    said, written = many()
    better = {name: captions[0] for name, captions in written.items()}
    ours, theirs = Statistics.of(better, written), Statistics.of(said, written)
    for name, found in paired_bootstrap(ours, theirs).items():
        assert 0 < found.low < found.value < found.high and found.wins == 1, name
    for found in paired_bootstrap(theirs, ours).values():
        assert found.high < 0 and found.wins == 0
    assert set(paired_bootstrap(ours, ours).values()) == {(0.0, 0.0, 0.0, 0.0)}


def test_pairing_sees_differences_that_single_intervals_hide() -> None:
    said, written = many()
    slightly = said | {name: written[name][0] for name in sorted(said)[:6]}
    ours, theirs = Statistics.of(slightly, written), Statistics.of(said, written)
    assert intervals(ours)["ROUGE-L"].low < intervals(theirs)["ROUGE-L"].high
    assert paired_bootstrap(ours, theirs)["ROUGE-L"].low > 0


def test_systems_scored_on_other_images_do_not_compare() -> None:
    first, second = Statistics.of(*many(count=10)), Statistics.of(*many(count=11))
    with pytest.raises(CapGenError, match="different images"):
        paired_bootstrap(first, second)
    with pytest.raises(CapGenError, match="different images"):
        intervals()
