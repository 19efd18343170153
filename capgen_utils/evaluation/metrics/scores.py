"""BLEU, ROUGE-L, CIDEr and CIDEr-D from per-image statistics, equal to those of the COCO caption
evaluation.

Every score is times 100: 100 is the best of BLEU and ROUGE-L, 1,000 that of CIDEr and CIDEr-D. What
COCO's tools print as "CIDEr" is CIDEr-D.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy import sparse

from capgen_utils.common.files import CapGenError
from capgen_utils.evaluation.metrics.ngrams import ORDERS, Compared, highest

Captions = Mapping[str, str]


References = Mapping[str, Sequence[str]]


TOKENISATION = "Penn Treebank as in the COCO caption evaluation: lower case, punctuation dropped, contractions split"


BLEU_PROTOCOL = (
    f"corpus level, {TOKENISATION}; references raw (no <unk>), closest reference length, end token not counted, "
    "no smoothing"
)


PROTOCOLS = {
    "BLEU": BLEU_PROTOCOL,
    "ROUGE-L": "beta 1.2, best precision and best recall over the references, mean over images, times 100",
    "CIDEr": "tf-idf cosine, mean over images, times 100; document frequencies of the evaluated references",
    "CIDEr-D": "CIDEr with clipped counts and a penalty for length (sigma 6), times 100; COCO's tools call it CIDEr",
}


BLEU_NAMES = tuple(f"BLEU-{n}" for n in ORDERS)
_BETA = 1.2
_SIGMA = 6.0


# The reference implementation's guards against division by zero; with them the two agree where
# nothing matches.
_TINY, _SMALL = 1e-15, 1e-9


@dataclass(frozen=True)
class Summed:
    """A metric that is no mean over images, but follows from sums over them, as BLEU does.

    Attributes:
        rows: image -> K numbers that are added up over images.
        score: sums (..., K) -> scores (...), times 100.
    """

    rows: Mapping[str, Sequence[float]]
    score: Callable[[np.ndarray], np.ndarray]


Extra = Mapping[str, Mapping[str, float] | Summed]


@dataclass(frozen=True)
class Statistics:
    """What a system's scores are made of, image by image; a score of any sample of images follows
    from it.

    Attributes:
        images: names of the I images, sorted.
        bleu: (I, 10): words said, words of the reference closest in length, matches and n-grams
            said for n = 1 to 4.
        means: name -> (I,): scores whose corpus value is the mean over images, times 100.
        sums: name -> (I, K) and what turns its sums into a score.
    """

    images: list[str]
    bleu: np.ndarray
    means: dict[str, np.ndarray]
    sums: dict[str, tuple[np.ndarray, Callable[[np.ndarray], np.ndarray]]] = field(
        default_factory=dict
    )

    @classmethod
    def of(
        cls, hypotheses: Captions, references: References, extra: Extra | None = None
    ) -> "Statistics":
        """Compare captions with references.

        Args:
            hypotheses: image -> generated caption.
            references: image -> its human captions, as they were written.
            extra: name -> image -> score times 100, of more metrics that are means over images
                (nltk's METEOR, CLIPScore); or a ``Summed`` (METEOR 1.5).

        Raises:
            CapGenError: the captions name other images than the references or ``extra``, or there
                is nothing to score.
        """
        compared = Compared.of(hypotheses, references)
        cider_d, cider = _cider(compared)
        means = {"ROUGE-L": _rouge_l(compared), "CIDEr-D": cider_d, "CIDEr": cider}
        sums = {}
        for name, found in (extra or {}).items():
            rows = found.rows if isinstance(found, Summed) else found
            if set(rows) != set(hypotheses):
                raise CapGenError(
                    f"{name} was computed for other images",
                    "compute it for the captions that are scored",
                )
            values = np.array([rows[image] for image in compared.images])
            if isinstance(found, Summed):
                sums[name] = (values, found.score)
            else:
                means[name] = values
        return cls(compared.images, _bleu(compared), means, sums)

    def scores(self) -> dict[str, float]:
        """Return the scores over all images."""
        return {
            name: float(value[0])
            for name, value in self.of_samples(np.ones((1, len(self.images)))).items()
        }

    def of_samples(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        """Return the scores of samples of the images.

        Args:
            weights: (B, I), how often each image is in each of B samples.

        Returns:
            name -> (B,).
        """
        bleu = bleu_of_sums(weights @ self.bleu)
        result = {name: bleu[:, i] for i, name in enumerate(BLEU_NAMES)}
        total = weights.sum(axis=1)
        result |= {name: weights @ values / total for name, values in self.means.items()}
        return result | {name: score(weights @ rows) for name, (rows, score) in self.sums.items()}


def bleu(hypotheses: Captions, references: References) -> dict[str, float]:
    """Return corpus BLEU-1 to BLEU-4, times 100 (Papineni et al. 2002).

    Args:
        hypotheses: image -> generated caption.
        references: image -> its human captions, as they were written.

    Raises:
        CapGenError: the two name different images, or there is nothing to score.
    """
    values = bleu_of_sums(_bleu(Compared.of(hypotheses, references)).sum(axis=0))
    return {name: float(value) for name, value in zip(BLEU_NAMES, values, strict=True)}


def rouge_l(hypotheses: Captions, references: References) -> dict[str, float]:
    """Return ROUGE-L, times 100 (Lin 2004): longest common subsequences, mean over images; see
    ``bleu``."""
    return {"ROUGE-L": float(_rouge_l(Compared.of(hypotheses, references)).mean())}


def cider(hypotheses: Captions, references: References) -> dict[str, float]:
    """Return CIDEr, times 100 (Vedantam et al. 2015, arXiv 1411.5726, equation 3); see ``bleu``.

    Document frequencies are those of ``references``, so scores of different sets of images cannot
    be compared.
    """
    return {"CIDEr": float(_cider(Compared.of(hypotheses, references))[1].mean())}


def cider_d(hypotheses: Captions, references: References) -> dict[str, float]:
    """Return CIDEr-D, times 100 (arXiv 1411.5726, equation 4), which COCO's tools print as "CIDEr";
    see ``cider``."""
    return {"CIDEr-D": float(_cider(Compared.of(hypotheses, references))[0].mean())}


def score(
    hypotheses: Captions, references: References, extra: Extra | None = None
) -> dict[str, float]:
    """Return BLEU-1 to BLEU-4, ROUGE-L, CIDEr-D and CIDEr, and the means of ``extra``, all times
    100.

    Args:
        hypotheses: image -> generated caption.
        references: image -> its human captions, as they were written.
        extra: see ``Statistics.of``.

    Raises:
        CapGenError: see ``Statistics.of``.
    """
    return Statistics.of(hypotheses, references, extra).scores()


# --- BLEU


def _bleu(compared: Compared) -> np.ndarray:
    """Return (I, 10): words said, words of the reference closest in length, matches and n-grams
    said for n = 1 to 4."""
    said = np.array([len(words) for words in compared.hypotheses])
    closest = [
        closest_length(len(words), map(len, captions))
        for words, captions in zip(compared.hypotheses, compared.references, strict=True)
    ]
    matches = []
    for spoken, human in zip(compared.spoken, compared.human, strict=True):
        matches.append(spoken.minimum(highest(human)).sum(axis=1))
    guesses = [np.maximum(0, said - n + 1) for n in ORDERS]
    return np.stack([said, np.array(closest), *matches, *guesses], axis=1).astype(np.float64)


def closest_length(length: int, others: Iterable[int]) -> int:
    """Return which of ``others`` is closest to ``length``; of two equally close ones the shorter."""
    return min(others, key=lambda other: (abs(other - length), other))


def bleu_of_sums(sums: np.ndarray) -> np.ndarray:
    """Return BLEU-1 to BLEU-4 (..., 4), times 100, from sums over images (..., 10) of the columns
    of ``Statistics``."""
    said, reference, matches, guesses = sums[..., 0], sums[..., 1], sums[..., 2:6], sums[..., 6:10]
    precisions = (matches + _TINY) / (guesses + _SMALL)
    means = np.cumprod(precisions, axis=-1) ** (1 / np.array(ORDERS))
    ratio = (said + _TINY) / (reference + _SMALL)
    brevity = np.exp(np.minimum(0, 1 - 1 / ratio))
    return 100 * means * brevity[..., None]


# --- ROUGE-L


def _rouge_l(compared: Compared) -> np.ndarray:
    """Return (I,): the F-measure, recall weighing more, of the best precision and the best recall."""
    values = []
    for words, captions in zip(compared.hypotheses, compared.references, strict=True):
        common = common_lengths(words, captions)
        precision = max(common) / max(1, len(words))
        recall = max(
            length / max(1, len(caption)) for length, caption in zip(common, captions, strict=True)
        )
        both = recall + _BETA**2 * precision
        values.append((1 + _BETA**2) * precision * recall / both if both else 0.0)
    return 100 * np.array(values)


def common_lengths(words: Sequence[str], captions: Sequence[Sequence[str]]) -> list[int]:
    """Return the length of the longest common subsequence of ``words`` with each caption.

    Bit-parallel (Hyyrö 2004, "Bit-parallel LCS-length computation revisited"): bit i of ``row`` is
    cleared where the i-th word makes the subsequence longer.
    """
    places: dict[str, int] = {}
    for i, word in enumerate(words):
        places[word] = places.get(word, 0) | 1 << i
    whole = (1 << len(words)) - 1
    lengths = []
    for caption in captions:
        row = whole
        for word in caption:
            hits = row & places.get(word, 0)
            row = (row + hits | row - hits) & whole
        lengths.append(len(words) - row.bit_count())
    return lengths


# --- CIDEr


def _cider(compared: Compared) -> tuple[np.ndarray, np.ndarray]:
    """Return CIDEr-D and CIDEr of each image, (I,) each: the mean over references and over n = 1 to
    4."""
    size = len(compared.images)
    penalties = _length_penalties(compared)
    clipped, plain = np.zeros(size), np.zeros(size)
    for spoken, human in zip(compared.spoken, compared.human, strict=True):
        documents = (sum(counts > 0 for counts in human) > 0).sum(axis=0)
        weights = np.log(size) - np.log(np.maximum(1, documents))
        said, said_norm = _weighted(spoken, weights)
        for counts, penalty in zip(human, penalties, strict=True):
            written, norm = _weighted(counts, weights)
            norms = said_norm * norm
            scale = np.divide(1, norms, out=np.zeros(size), where=norms > 0)
            plain += said.multiply(written).sum(axis=1) * scale
            clipped += said.minimum(written).multiply(written).sum(axis=1) * scale * penalty
    references = np.array([len(captions) for captions in compared.references])
    factor = 1000 / (
        len(ORDERS) * references
    )  # the measure is times 10 by definition, and times 100 as all scores
    return clipped * factor, plain * factor


def _length_penalties(compared: Compared) -> list[np.ndarray]:
    """Return for each k the factor (I,) by which a caption as long as this loses against the k-th
    reference."""
    # As in the reference implementation a caption is as long as it has bigrams.
    said = np.array([max(1, len(words)) for words in compared.hypotheses])
    result = []
    for k in range(len(compared.human[0])):
        length = [
            max(1, len(captions[k])) if k < len(captions) else 0 for captions in compared.references
        ]
        result.append(np.exp(-((said - np.array(length)) ** 2) / (2 * _SIGMA**2)))
    return result


def _weighted(counts: sparse.csr_array, weights: np.ndarray) -> tuple[sparse.csr_array, np.ndarray]:
    """Return counts (I, G) times the weights of the n-grams (G,), and the length of each row's
    vector (I,)."""
    vectors = (counts @ sparse.diags_array(weights)).tocsr()
    return vectors, np.sqrt(vectors.multiply(vectors).sum(axis=1))
