"""A system's captions scored in full, beside baselines and people. Notebook 09 teaches it.

On the same images stand: one caption for all, a random and the nearest training caption; and one
human caption against the others of its image, next to the system's scores against the same
references.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from capgen_utils.common.files import CapGenError
from capgen_utils.data.manifest import Manifest
from capgen_utils.data.shapes import judge, load_scenes, scenes_file
from capgen_utils.evaluation.baselines import (
    CONSTANT_RULE,
    HUMAN_RULE,
    NEAREST_RULE,
    RANDOM_RULE,
    beside_people,
    best_constant,
    constant_captions,
    human_row,
    nearest_captions,
    random_captions,
)
from capgen_utils.evaluation.metrics import (
    PROTOCOLS,
    TOKENISATION,
    Difference,
    Finding,
    Interval,
    Statistics,
    bleu,
    diagnose,
    diversity,
    find_wordnet,
    intervals,
    java_program,
    labels,
    load_captions,
    load_references,
    meteor_java,
    meteor_nltk,
    originality,
    paired_bootstrap,
)
from capgen_utils.evaluation.metrics.resampling import INTERVALS
from capgen_utils.evaluation.metrics.scores import Captions, Extra, References
from capgen_utils.vision.features import FeatureCache

METEOR_NLTK, METEOR_JAVA = "METEOR (nltk)", "METEOR 1.5"
CONSTANT, RANDOM, NEAREST = "constant caption", "random training caption", "nearest neighbour"
WRONG_IMAGES = "BLEU-4 on the wrong images"
# How each metric and the intervals are computed.
METRIC_PROTOCOL = {**PROTOCOLS, "tokenisation": TOKENISATION, "intervals": f"{INTERVALS}, seed 0"}
_AT_ONCE = 256  # images whose grids are averaged at a time


class MoreMetrics:
    """The metrics that need other software: nltk's METEOR, if WordNet is installed; METEOR 1.5.

    One object serves one evaluation: nltk's METEOR compares every pair of captions once, however
    many rows contain it.

    Args:
        java: compute METEOR 1.5 too, by one Java process.

    Raises:
        CapGenError: Java or pycocoevalcap is missing.
    """

    def __init__(self, java: bool = False) -> None:
        self._reader, self._program = find_wordnet(), java_program() if java else None
        self._known: dict[tuple[str, str], float] = {}
        self.protocol: dict[str, str] = {}

    def __call__(self, hypotheses: Captions, references: References) -> Extra:
        """Return the metrics as ``Statistics.of`` takes them."""
        meteors = {}
        if self._reader is not None:
            meteors[METEOR_NLTK] = meteor_nltk(hypotheses, references, self._reader, self._known)
        if self._program is not None:
            meteors[METEOR_JAVA] = meteor_java(hypotheses, references, self._program)
        self.protocol |= {name: meteor.label for name, meteor in meteors.items()}
        return {name: meteor.summed or meteor.images for name, meteor in meteors.items()}


def assess(
    captions: Captions,
    manifest: Manifest,
    split: str,
    features: FeatureCache | None = None,
    ended: Mapping[str, bool] | None = None,
    java: bool = False,
) -> dict[str, Any]:
    """Return all that a results file holds about captions.

    Args:
        captions: image -> generated caption.
        manifest: the whole dataset; baselines are made of its training captions.
        split: the split of the captioned images.
        features: of the whole dataset, by the captioner's encoder; without them there is no nearest
            neighbour.
        ended: image -> whether its caption reached its end token, if that is known.
        java: compute METEOR 1.5 too; needs Java and pycocoevalcap.

    Returns:
        ``scores``, ``intervals``, ``floors``, ``people``, ``warnings``, ``findings`` and
        ``protocol``.

    Raises:
        CapGenError: there is no such split, or an image does not belong to it.
    """
    references, training = split_references(captions, manifest, split), _training(manifest)
    more = MoreMetrics(java)
    statistics = Statistics.of(captions, references, more(captions, references))
    whole = {item.image for item in manifest.split(split).items}
    findings = diagnose(captions, ended, _texts(training) or None, references)
    return {
        "scores": scores(captions, references, manifest, statistics),
        "intervals": _ends(intervals(statistics)),
        "floors": floors(references, manifest, features, more),
        "people": people(captions, references, more),
        "warnings": labels(captions, references, whole, training),
        "findings": [asdict(finding) for finding in findings],
        "protocol": METRIC_PROTOCOL | more.protocol,
    }


def split_references(
    captions: Captions, manifest: Manifest, split: str
) -> dict[str, tuple[str, ...]]:
    """Return the references of the images that have a caption.

    Raises:
        CapGenError: there is no such split, or an image does not belong to it.
    """
    references = {
        item.image: item.captions for item in manifest.split(split).items if item.image in captions
    }
    strange = sorted(set(captions) - set(references))
    if strange or not references:
        raise CapGenError(
            f"{len(strange)} of {len(captions)} captions describe images that are not in "
            f"{manifest.name}/{split} {strange[:2]}",
            "score captions on the split for which they were generated",
        )
    return references


def scores(
    captions: Captions,
    references: References,
    manifest: Manifest,
    statistics: Statistics | None = None,
) -> dict[str, float]:
    """Return one flat mapping of all scores.

    Args:
        captions: image -> generated caption.
        references: image -> its human captions.
        manifest: the whole dataset: its training captions show what was copied, and its scenes, if
            it is drawn, what is true.
        statistics: of the captions, if they have been computed.

    Returns:
        Metrics times 100; BLEU-4 of the same captions on the wrong images; diversity; copied and
        novel shares in percent; the truth of captions on drawn scenes, 0 to 1.
    """
    names = sorted(captions)
    wrong = {name: captions[names[(i + 1) % len(names)]] for i, name in enumerate(names)}
    if statistics is None:
        statistics = Statistics.of(captions, references, MoreMetrics()(captions, references))
    training = _texts(_training(manifest))
    return _rounded(
        statistics.scores()
        | {WRONG_IMAGES: bleu(wrong, references)["BLEU-4"]}
        | diversity(captions)
        | (originality(captions, training) if training else {})
        | _truth(captions, manifest)
    )


def _truth(captions: Captions, manifest: Manifest) -> dict[str, float]:
    """Return the shares of true captions if the images are drawn scenes."""
    if not scenes_file(manifest.root).is_file():
        return {}
    scenes = load_scenes(manifest.root)
    return judge(captions, {Path(name).name: scenes[Path(name).name] for name in captions})


# --- baselines and people


def floors(
    references: References, manifest: Manifest, features: FeatureCache | None, more: MoreMetrics
) -> dict[str, dict[str, Any]]:
    """Score baselines made of training captions on the same images.

    Returns:
        Row -> ``rule``, ``scores`` and ``intervals``. The constant caption is identified by its
        hash, since a dataset's captions are not ours to publish. Without training captions there
        are no rows, and without the features of all images no nearest neighbour.
    """
    training = _training(manifest)
    if not training:
        return {}
    images, constant = list(references), best_constant(training)
    baselines = {
        CONSTANT: (CONSTANT_RULE, constant_captions(images, constant)),
        RANDOM: (f"{RANDOM_RULE}, seed 0", random_captions(images, training)),
    }
    usable = set(features.index) - set(features.failed) if features is not None else set()
    if features is not None and usable.issuperset(images):
        known = [name for name in training if name in usable]
        vectors, others = mean_features(features, images), mean_features(features, known)
        nearest = nearest_captions(images, vectors, known, others, training)
        baselines[NEAREST] = (NEAREST_RULE, nearest)
    rows: dict[str, dict[str, Any]] = {}
    for name, (rule, captions) in baselines.items():
        statistics = Statistics.of(captions, references, more(captions, references))
        flat = statistics.scores() | diversity(captions) | _truth(captions, manifest)
        ends = _ends(intervals(statistics))
        rows[name] = {"rule": rule, "scores": _rounded(flat), "intervals": ends}
    rows[CONSTANT]["sha256"] = hashlib.sha256(constant.encode()).hexdigest()
    return rows


def mean_features(features: FeatureCache, names: Sequence[str]) -> np.ndarray:
    """Return one vector per image (N, D): the mean of a grid's cells, or the pooled features."""
    batches = (names[start : start + _AT_ONCE] for start in range(0, len(names), _AT_ONCE))
    rows = (features.rows(batch).float() for batch in batches)  # (B, N, D) or (B, D) each
    return np.concatenate([(r.mean(dim=1) if r.ndim == 3 else r.flatten(1)).numpy() for r in rows])


def people(captions: Captions, references: References, more: MoreMetrics) -> dict[str, Any] | None:
    """Return the scores of people against each other, and the system's against as many references.

    Returns:
        ``rule``, ``references`` (their number), and ``human`` and ``system`` with ``scores`` and
        ``intervals``; ``None`` if some image has a single caption.
    """
    fewest = min(map(len, references.values()))
    if fewest < 2:
        return None
    human, system = human_row(references, more), beside_people(captions, references, more)
    return {"rule": HUMAN_RULE, "references": fewest - 1} | {
        name: {
            "scores": _rounded({metric: interval.value for metric, interval in row.items()}),
            "intervals": _ends(row),
        }
        for name, row in (("human", human), ("system", system))
    }


def _training(manifest: Manifest) -> dict[str, tuple[str, ...]]:
    return {
        item.image: item.captions
        for item in manifest.items
        if item.split == "train" and item.captions
    }


def _texts(references: References) -> list[str]:
    return [caption for captions in references.values() for caption in captions]


def _rounded(values: Mapping[str, float]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in values.items()}


def _ends(row: Mapping[str, Interval]) -> dict[str, list[float]]:
    return {name: [round(each.low, 4), round(each.high, 4)] for name, each in row.items()}


# --- files from any source


@dataclass(frozen=True)
class FileScores:
    """The result of ``score_files``.

    Attributes:
        scores: metric -> value; metrics times 100, ``copied`` and ``novel_n`` in percent.
        intervals: metric -> value and the ends of its 95 % interval, if it has one.
        warnings: short name -> sentence that must accompany the scores.
        findings: faults of the captions.
        protocol: how each metric is computed.
        differences: metric -> how far these captions are ahead of another system's, if compared.
    """

    scores: dict[str, float]
    intervals: dict[str, Interval]
    warnings: dict[str, str]
    findings: list[Finding]
    protocol: dict[str, str]
    differences: dict[str, Difference]


def score_files(
    predictions: Path,
    references: Path,
    training: Path | None = None,
    against: Path | None = None,
    java: bool = False,
) -> FileScores:
    """Score captions from any source; ``load_captions`` and ``load_references`` name the formats.

    Args:
        predictions: generated captions.
        references: human captions of the same images.
        training: human captions of the training images, to count what was copied from them and to
            name training images among the scored ones.
        against: another system's captions, for a paired bootstrap.
        java: compute METEOR 1.5 too.

    Raises:
        CapGenError: a file cannot be read or has another form; the files name different images;
            Java is missing.
    """
    captions, written = load_captions(predictions), load_references(references)
    known = load_references(training) if training is not None else {}
    more = MoreMetrics(java)
    statistics = Statistics.of(captions, written, more(captions, written))
    flat = statistics.scores() | diversity(captions)
    differences = {}
    if against is not None:
        other = load_captions(against)
        rival = Statistics.of(other, written, more(other, written))
        differences = paired_bootstrap(statistics, rival)
    return FileScores(
        flat | (originality(captions, _texts(known)) if known else {}),
        intervals(statistics),
        labels(captions, written, training_images=known),
        diagnose(captions, training=_texts(known) or None, references=written),
        METRIC_PROTOCOL | more.protocol,
        differences,
    )


def as_lines(rows: Iterable[tuple[str, float, Sequence[float] | None]]) -> list[str]:
    """Return (name, value, ends of the interval or ``None``) as aligned lines of text."""
    return [
        f"  {name:28s} "
        + (f"{value:10.0f}" if float(value).is_integer() and value >= 100 else f"{value:10.2f}")
        + (f"   [{ends[0]:.2f}, {ends[1]:.2f}]" if ends else "")
        for name, value, ends in rows
    ]
