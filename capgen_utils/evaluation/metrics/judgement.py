"""Agreement of metrics with people (Kendall's tau-c), and CLIPScore. See notebook 09.

``ExpertAnnotations.txt`` (Hodosh, Young and Hockenmaier 2013) holds one pair per line: an image, a
caption written for this or another image, and three experts' ratings from 1 to 4. The protocol is
that of the CLIPScore paper (arXiv 2104.08718): pairs whose candidate is one of the image's own
references are left out, every rating counts separately, and Kendall's tau-c, times 100, allows for
the many ties.

The same paper defines CLIPScore and RefCLIPScore of embeddings:

    CLIPScore(c, v)       = 2.5 max(cos(c, v), 0)
    RefCLIPScore(c, R, v) = harmonic mean of CLIPScore(c, v) and max(0, max over r in R cos(c, r))

It embeds "A photo depicts " + caption with CLIP ViT-B/32. With another dual encoder, or without the
prefix, state both beside the number: it cannot be compared with published ones.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.stats import kendalltau

from capgen_utils.common.files import CapGenError
from capgen_utils.evaluation.metrics.scores import BLEU_NAMES, Statistics, bleu_of_sums

FILE = "ExpertAnnotations.txt"
_LINE = re.compile(r"([^\t]+)\t([^\t]*#[^\t]*)((?:\t *[1-4] *)+)")  # image, caption id, ratings
WEIGHT = 2.5
_REMEDY = f"take {FILE} unchanged from Flickr8k_text.zip"


@dataclass(frozen=True)
class Judgement:
    """The experts' ratings of one caption for one image.

    Attributes:
        image: file name.
        candidate: the caption's id, ``<image it was written for>#<number>``.
        ratings: one per expert, from 1 (unrelated) to 4 (describes the image).
    """

    image: str
    candidate: str
    ratings: tuple[int, ...]

    @property
    def is_own(self) -> bool:
        """Whether the candidate was written for this image."""
        return self.candidate.rpartition("#")[0] == self.image

    @property
    def pair(self) -> str:
        """The name of the pair of image and candidate."""
        return f"{self.image} {self.candidate}"


def read_judgements(path: Path) -> list[Judgement]:
    """Read ``ExpertAnnotations.txt``: image, caption id and ratings per line, separated by tabs.

    Raises:
        CapGenError: the file is missing, or a line has another form.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise CapGenError(f"cannot read {path}: {error}", _REMEDY) from error
    judgements = []
    for number, line in ((i, line) for i, line in enumerate(lines, 1) if line.strip()):
        match = _LINE.fullmatch(line.strip())
        if match is None:
            raise CapGenError(
                f"{path}, line {number}: {line[:80]!r} is not image, caption id and ratings "
                "from 1 to 4",
                _REMEDY,
            )
        image, candidate, ratings = match.groups()
        judgements.append(Judgement(image, candidate, tuple(map(int, ratings.split()))))
    if not judgements:
        raise CapGenError(f"{path} holds no judgement", _REMEDY)
    return judgements


def judged_pairs(
    judgements: Iterable[Judgement],
    captions: Mapping[str, str],
    references: Mapping[str, Sequence[str]],
) -> tuple[list[Judgement], dict[str, str], dict[str, Sequence[str]]]:
    """Return the judgements that count, and their pairs as hypotheses and references for a metric.

    Args:
        judgements: of all pairs.
        captions: caption id -> caption.
        references: image -> its human captions.

    Raises:
        CapGenError: a caption or an image is unknown, a pair occurs twice, or no pair is left.
    """
    kept = [judgement for judgement in judgements if not judgement.is_own]
    unknown = [j.pair for j in kept if j.candidate not in captions or j.image not in references]
    if not kept or unknown or len({j.pair for j in kept}) < len(kept):
        raise CapGenError(
            f"{len(kept)} judged pairs, {len(unknown)} of them with an unknown caption or image "
            f"{unknown[:1]}",
            "give the captions and references of all of Flickr8k; each pair may occur once",
        )
    return (
        kept,
        {j.pair: captions[j.candidate] for j in kept},
        {j.pair: references[j.image] for j in kept},
    )


def agreement(
    judgements: Iterable[Judgement],
    captions: Mapping[str, str],
    references: Mapping[str, Sequence[str]],
    extra: Mapping[str, Mapping[str, float]] | None = None,
) -> dict[str, float]:
    """Return Kendall's tau-c, times 100, of every metric with the experts.

    Args:
        judgements: of all pairs; those of an image's own captions are left out.
        captions: caption id -> caption.
        references: image -> its human captions.
        extra: name -> pair (``Judgement.pair``) -> score, of more metrics on the pairs that
            ``judged_pairs`` returns.

    Raises:
        CapGenError: see ``judged_pairs``; or a metric lacks a pair.
    """
    kept, hypotheses, written = judged_pairs(judgements, captions, references)
    statistics = Statistics.of(hypotheses, written, extra)
    each = dict(zip(BLEU_NAMES, bleu_of_sums(statistics.bleu).T, strict=True)) | statistics.means
    row = {pair: i for i, pair in enumerate(statistics.images)}
    rows = np.array([row[j.pair] for j in kept for _ in j.ratings])  # one per rating
    ratings = np.array([rating for j in kept for rating in j.ratings])
    return {
        name: 100 * float(kendalltau(values[rows], ratings, variant="c").statistic)
        for name, values in each.items()
    }


def agreement_table(taus: Mapping[str, float]) -> str:
    """Return agreement as a table in Markdown, the best metric first."""
    lines = ["| metric | Kendall's tau-c with the experts, times 100 |", "|---|---|"]
    lines += [f"| {name} | {tau:.1f} |" for name, tau in sorted(taus.items(), key=lambda t: -t[1])]
    return "\n".join(lines)


# --- CLIPScore


def clip_score(images: np.ndarray, captions: np.ndarray) -> np.ndarray:
    """Return CLIPScore of each pair, times 100.

    Args:
        images: (N, E) embeddings; need not have length 1.
        captions: (N, E) embeddings of the captions, in the images' order.

    Returns:
        (N,), from 0 to 250.

    Raises:
        CapGenError: the shapes do not fit, or an embedding is zero or not finite.
    """
    if np.shape(images) != np.shape(captions):
        raise CapGenError(
            f"{np.shape(images)} image and {np.shape(captions)} caption embeddings do not pair up",
            "give one caption embedding for each image, from the same dual encoder",
        )
    return 100 * WEIGHT * np.maximum(0, (_unit(images) * _unit(captions)).sum(axis=1))


def ref_clip_score(
    images: np.ndarray, captions: np.ndarray, references: Sequence[np.ndarray]
) -> np.ndarray:
    """Return RefCLIPScore of each pair, times 100.

    Args:
        images: (N, E) embeddings.
        captions: (N, E) embeddings of the captions.
        references: for each image the embeddings (R, E) of its human captions.

    Returns:
        (N,).

    Raises:
        CapGenError: the shapes do not fit, or an embedding is zero or not finite.
    """
    with_image = clip_score(images, captions)  # (N,)
    shape = np.shape(images)
    if len(references) != shape[0] or any(np.shape(r)[1:] != shape[1:] for r in references):
        raise CapGenError(
            f"the embeddings of {len(references)} images' references do not fit those of "
            f"{shape[0]} captions",
            "give for each image an array (references, size) from the same dual encoder",
        )
    pairs = zip(references, _unit(captions), strict=True)
    closest = [max(0.0, float((_unit(texts) @ caption).max())) for texts, caption in pairs]
    with_references = 100 * np.array(closest)  # (N,)
    total = with_image + with_references
    both = 2 * with_image * with_references
    return np.divide(both, total, out=np.zeros(len(total)), where=total > 0)


def _unit(vectors: np.ndarray) -> np.ndarray:
    """Return vectors (N, E) with length 1."""
    array = np.asarray(vectors, dtype=np.float64)
    usable = array.ndim == 2 and array.size
    norms = np.linalg.norm(array, axis=-1, keepdims=True) if usable else np.zeros(1)  # (N, 1)
    if not np.isfinite(norms).all() or not (norms > 0).all():
        raise CapGenError(
            "an embedding is missing, zero or not finite",
            "embed every caption and every image again",
        )
    return np.asarray(array / norms)
