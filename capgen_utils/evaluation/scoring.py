"""The full table of a system's captions: scores with intervals, what they have to be held against,
what is wrong.

Beside the scores stand, on the same images: one caption for all, a random and the nearest training
caption; and one human caption against the others of its image, next to the system's own scores
against the same references.
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
    MeteorJava,
    Statistics,
    Summed,
    bleu,
    diagnose,
    diversity,
    find_wordnet,
    intervals,
    labels,
    load_captions,
    load_references,
    meteor_nltk,
    originality,
    paired_bootstrap,
)
from capgen_utils.evaluation.metrics.resampling import INTERVALS
from capgen_utils.evaluation.metrics.scores import Extra
from capgen_utils.vision.features import FeatureCache

METEOR_NLTK, METEOR_JAVA = "METEOR (nltk)", "METEOR 1.5"


CONSTANT, RANDOM, NEAREST = "constant caption", "random training caption", "nearest neighbour"


WRONG_IMAGES = "BLEU-4 on the wrong images"
_AT_ONCE = 256  # images whose grids are averaged at a time


Captions = Mapping[str, str]


References = Mapping[str, Sequence[str]]


class MoreMetrics:
    """The metrics that need more than this package: nltk's METEOR, where its WordNet is on this
    machine; METEOR 1.5.

    One object serves one evaluation: for nltk's METEOR every pair of captions is compared once,
    however many rows ask for it, and Java starts once.

    Args:
        java: compute METEOR 1.5 too.

    Raises:
        CapGenError: Java or pycocoevalcap is missing.
    """

    def __init__(self, java: bool = False) -> None:
        self._reader, self._java = find_wordnet(), MeteorJava() if java else None
        self._known: dict[tuple[str, str], float] = {}
        self.protocol: dict[str, str] = {}

    def __call__(self, hypotheses: Captions, references: References) -> Extra:
        """Return what ``Statistics.of`` takes."""
        result: dict[str, Mapping[str, float] | Summed] = {}
        if self._reader is not None:
            found = meteor_nltk(hypotheses, references, self._reader, self._known)
            self.protocol[METEOR_NLTK], result[METEOR_NLTK] = found.label, found.images
        if self._java is not None:
            found = self._java(hypotheses, references)
            self.protocol[METEOR_JAVA], result[METEOR_JAVA] = (
                found.label,
                found.summed or found.images,
            )
        return result


def assess(
    captions: Captions,
    manifest: Manifest,
    split: str,
    features: FeatureCache | None = None,
    ended: Mapping[str, bool] | None = None,
    java: bool = False,
) -> dict[str, Any]:
    """Return everything that a results file says of captions.

    Args:
        captions: image -> generated caption.
        manifest: the whole dataset; floors are made of its training captions.
        split: whose images are captioned.
        features: of the whole dataset, by the captioner's encoder; without them there is no nearest
            neighbour.
        ended: image -> whether its caption came to its end token, where that is known.
        java: compute METEOR 1.5 too; Java and pycocoevalcap have to be there.

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
    return {
        "scores": scores(captions, references, manifest, statistics),
        "intervals": _ends(intervals(statistics)),
        "floors": floors(references, manifest, features, more),
        "people": people(captions, references, more),
        "warnings": labels(captions, references, whole, training),
        "findings": [
            asdict(finding)
            for finding in diagnose(captions, ended, _texts(training) or None, references)
        ],
        "protocol": metric_protocol() | more.protocol,
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
            f"{len(strange)} of {len(captions)} captions are of images that are not in {manifest.name}/{split} "
            f"{strange[:2]}",
            "score captions on the split that they were made for",
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
        manifest: the whole dataset: what is copied is looked up in its training captions, and where
            it is drawn, captions are compared with what is in the scenes.
        statistics: of the captions, where they are there already.

    Returns:
        Metrics times 100; BLEU-4 of the same captions on the wrong images; diversity; shares of
        what is copied and new, in percent; the truth of captions on drawn scenes, 0 to 1.
    """
    names = sorted(captions)
    wrong = {name: captions[names[(i + 1) % len(names)]] for i, name in enumerate(names)}
    if statistics is None:
        statistics = Statistics.of(captions, references, MoreMetrics()(captions, references))
    result = statistics.scores()
    result[WRONG_IMAGES] = bleu(wrong, references)["BLEU-4"]
    result |= diversity(captions)
    training = _texts(_training(manifest))
    result |= originality(captions, training) if training else {}
    return _rounded(result | _truth(captions, manifest))


def _truth(captions: Captions, manifest: Manifest) -> dict[str, float]:
    """Return how many captions are true, where the images are drawn scenes."""
    if not scenes_file(manifest.root).is_file():
        return {}
    scenes = load_scenes(manifest.root)
    return judge(captions, {Path(name).name: scenes[Path(name).name] for name in captions})


def metric_protocol() -> dict[str, str]:
    """Return how each metric is computed, and what the intervals are."""
    return {**PROTOCOLS, "tokenisation": TOKENISATION, "intervals": f"{INTERVALS}, seed 0"}


# --- what scores are held against


def floors(
    references: References, manifest: Manifest, features: FeatureCache | None, more: MoreMetrics
) -> dict[str, dict[str, Any]]:
    """Score captions that need no model, all made of training captions, on the same images.

    Returns:
        Row -> ``rule``, ``scores`` and ``intervals``. The constant caption is named by its hash,
        since the captions of a dataset are not ours to print. Without training captions there is no
        row, and without the features of all images no nearest neighbour.
    """
    training = _training(manifest)
    if not training:
        return {}
    images = list(references)
    constant = best_constant(training)
    said = {
        CONSTANT: (CONSTANT_RULE, constant_captions(images, constant)),
        RANDOM: (f"{RANDOM_RULE}, seed 0", random_captions(images, training)),
    }
    if features is not None and all(_has(features, name) for name in images):
        known = [name for name in training if _has(features, name)]
        vectors, others = mean_features(features, images), mean_features(features, known)
        said[NEAREST] = (NEAREST_RULE, nearest_captions(images, vectors, known, others, training))
    rows = {
        name: {"rule": rule} | _row(captions, references, manifest, more)
        for name, (rule, captions) in said.items()
    }
    rows[CONSTANT]["sha256"] = hashlib.sha256(constant.encode()).hexdigest()
    return rows


def _has(features: FeatureCache, name: str) -> bool:
    return name in features.index and name not in features.failed


def mean_features(features: FeatureCache, names: Sequence[str]) -> np.ndarray:
    """Return one vector (N, D) for each image: a grid's mean over its places, anything else as it
    is."""
    parts = []
    for start in range(0, len(names), _AT_ONCE):
        rows = features.rows(names[start : start + _AT_ONCE]).float()
        parts.append((rows.mean(dim=1) if rows.ndim == 3 else rows.flatten(1)).numpy())
    return np.concatenate(parts)


def _row(
    captions: Captions, references: References, manifest: Manifest, more: MoreMetrics
) -> dict[str, Any]:
    statistics = Statistics.of(captions, references, more(captions, references))
    flat = statistics.scores() | diversity(captions) | _truth(captions, manifest)
    return {"scores": _rounded(flat), "intervals": _ends(intervals(statistics))}


def people(captions: Captions, references: References, more: MoreMetrics) -> dict[str, Any] | None:
    """Return what people reach against each other, and the system against the same references.

    Returns:
        ``rule``, ``references`` (how many are left), and ``human`` and ``system`` with ``scores``
        and ``intervals``; ``None`` where an image has a single caption.
    """
    fewest = min(map(len, references.values()))
    if fewest < 2:
        return None
    both = {
        "human": human_row(references, more),
        "system": beside_people(captions, references, more),
    }
    rows = {
        name: {
            "scores": _rounded({key: one.value for key, one in row.items()}),
            "intervals": _ends(row),
        }
        for name, row in both.items()
    }
    return {"rule": HUMAN_RULE, "references": fewest - 1, **rows}


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


def _ends(found: Mapping[str, Interval]) -> dict[str, list[float]]:
    return {name: [round(one.low, 4), round(one.high, 4)] for name, one in found.items()}


# --- anyone's files


@dataclass(frozen=True)
class FileScores:
    """What ``score_files`` finds.

    Attributes:
        scores: metric -> value; metrics times 100, ``copied`` and ``novel_n`` in percent.
        intervals: metric -> value and the ends of its 95 % interval, of those that have one.
        warnings: short name -> what has to be said beside the scores.
        findings: what is wrong with the captions.
        protocol: how each metric is computed.
        differences: metric -> how far these captions are ahead of others, where there are others.
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
    """Score anyone's captions: COCO's formats, or plain mappings; see ``load_captions`` and
    ``load_references``.

    Args:
        predictions: generated captions.
        references: human captions of the same images.
        training: human captions of the training images: what was copied from them is counted, and
            training images among the scored ones are named.
        against: another system's captions, compared by a paired bootstrap.
        java: compute METEOR 1.5 too.

    Raises:
        CapGenError: a file cannot be read or has another form; the files name different images;
            Java is missing.
    """
    said, written = load_captions(predictions), load_references(references)
    read = load_references(training) if training is not None else {}
    more = MoreMetrics(java)
    statistics = Statistics.of(said, written, more(said, written))
    flat = statistics.scores() | diversity(said) | (originality(said, _texts(read)) if read else {})
    differences = {}
    if against is not None:
        other = load_captions(against)
        differences = paired_bootstrap(
            statistics, Statistics.of(other, written, more(other, written))
        )
    return FileScores(
        flat,
        intervals(statistics),
        labels(said, written, training_images=read),
        diagnose(said, training=_texts(read) or None, references=written),
        metric_protocol() | more.protocol,
        differences,
    )


def as_lines(found: Iterable[tuple[str, float, Sequence[float] | None]]) -> list[str]:
    """Return name, value and interval, where there is one, as lines of text in columns."""
    lines = []
    for name, value, ends in found:
        shown = f"{value:10.0f}" if float(value).is_integer() and value >= 100 else f"{value:10.2f}"
        lines.append(
            f"  {name:28s} {shown}" + (f"   [{ends[0]:.2f}, {ends[1]:.2f}]" if ends else "")
        )
    return lines
