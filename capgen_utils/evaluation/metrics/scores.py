"""BLEU, ROUGE-L, CIDEr and CIDEr-D, equal to the COCO caption evaluation's. See notebook 09.

Scores follow from per-image statistics and are times 100: BLEU and ROUGE-L reach 100, CIDEr and
CIDEr-D 1,000. COCO's tools print CIDEr-D under the name "CIDEr".
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce

import numpy as np
from scipy import sparse

from capgen_utils.common.files import CapGenError
from capgen_utils.text.ptb import tokenise

ORDERS = (1, 2, 3, 4)  # n of the n-grams

Words = Sequence[Sequence[str]]
Captions = Mapping[str, str]
References = Mapping[str, Sequence[str]]

TOKENISATION = (
    "Penn Treebank as in the COCO caption evaluation: lower case, punctuation dropped, "
    "contractions split"
)
BLEU_PROTOCOL = (
    f"corpus level, {TOKENISATION}; references raw (no <unk>), closest reference length, "
    "end token not counted, no smoothing"
)
PROTOCOLS = {
    "BLEU": BLEU_PROTOCOL,
    "ROUGE-L": "beta 1.2, best precision and best recall over the references, mean over images, "
    "times 100",
    "CIDEr": "tf-idf cosine, mean over images, times 100; document frequencies of the evaluated "
    "references",
    "CIDEr-D": "CIDEr with clipped counts and a penalty for length (sigma 6), times 100; COCO's "
    "tools call it CIDEr",
}
BLEU_NAMES = tuple(f"BLEU-{n}" for n in ORDERS)
_BETA = 1.2
_SIGMA = 6.0
# The reference implementation's guards against division by zero: without them, scores would differ
# if nothing matches.
_TINY, _SMALL = 1e-15, 1e-9


# --- counting n-grams


def check_images(hypotheses: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> None:
    """Refuse captions that cannot be scored against these references.

    Raises:
        CapGenError: there is nothing to score, the two name different images, or some image has no
            reference.
    """
    if not hypotheses or set(hypotheses) != set(references):
        different = sorted(map(str, set(hypotheses) ^ set(references)))[:3]
        raise CapGenError(
            f"{len(hypotheses)} captions and {len(references)} reference sets do not name the same "
            f"images {different}",
            "score one caption for every image of the split",
        )
    without = [
        image for image, captions in references.items() if isinstance(captions, str) or not captions
    ]
    if without:
        raise CapGenError(
            f"{len(without)} images have no list of reference captions, for example {without[0]!r}",
            "give every image the list of its human captions",
        )


@dataclass(frozen=True)
class Compared:
    """Hypotheses and references of the same I images, as words and as n-gram counts.

    Images may have different numbers of references; K is the largest.

    Attributes:
        images: their names, sorted.
        hypotheses: the words of each generated caption.
        references: for each image the words of each human caption.
        spoken: for n = 1 to 4 counts (I, G) of the hypotheses.
        human: for n = 1 to 4 K matrices (I, G): counts of each image's k-th reference, zeros if
            it has fewer.
    """

    images: list[str]
    hypotheses: list[list[str]]
    references: list[list[list[str]]]
    spoken: list[sparse.csr_array]
    human: list[list[sparse.csr_array]]

    @classmethod
    def of(
        cls, hypotheses: Mapping[str, str], references: Mapping[str, Sequence[str]]
    ) -> "Compared":
        """Tokenise and count.

        Raises:
            CapGenError: see ``check_images``.
        """
        check_images(hypotheses, references)
        images = sorted(hypotheses)
        generated = [tokenise(hypotheses[image]) for image in images]
        written = [[tokenise(caption) for caption in references[image]] for image in images]
        return cls(images, generated, written, *count_both(generated, written))


def count_both(
    generated: Words, written: Sequence[Words]
) -> tuple[list[sparse.csr_array], list[list[sparse.csr_array]]]:
    """Count generated and human captions over the same n-grams.

    Args:
        generated: S captions as words.
        written: for each of I images its human captions as words; K is the largest number.

    Returns:
        For n = 1 to 4 counts (S, G) of the generated captions, and K matrices (I, G) of each
        image's k-th human caption.
    """
    most = max(map(len, written))
    kth = [captions[k] if k < len(captions) else () for k in range(most) for captions in written]
    matrices = count_ngrams([*generated, *kth])  # (S + K I, G) each
    starts = range(len(generated), len(generated) + len(kth), len(written))
    return [matrix[: len(generated)] for matrix in matrices], [
        [matrix[start : start + len(written)] for start in starts] for matrix in matrices
    ]


def count_ngrams(captions: Words) -> list[sparse.csr_array]:
    """Count the n-grams of captions.

    Args:
        captions: S captions as words.

    Returns:
        For n = 1 to 4 a matrix (S, G) of counts; each of its G columns is an n-gram that occurs.
    """
    lengths = np.array([len(words) for words in captions], dtype=np.int64)  # (S,)
    ids: dict[str, int] = {}
    tokens = np.array(
        [ids.setdefault(word, len(ids)) for words in captions for word in words], dtype=np.int64
    )
    rows = np.repeat(np.arange(len(captions)), lengths)  # the caption of each token
    # The number of words from each token to its caption's end.
    left = np.repeat(np.cumsum(lengths), lengths) - np.arange(len(tokens))
    ngrams = np.zeros(len(tokens), dtype=np.int64)  # the n-gram that starts at each token, numbered
    matrices = []
    for n in ORDERS:
        starts = np.flatnonzero(left >= n)
        # An n-gram is an (n-1)-gram and one more word; new numbers keep the product small.
        keys = ngrams[starts] * max(1, len(ids)) + tokens[starts + n - 1]
        different, ngrams[starts] = np.unique(keys, return_inverse=True)
        counts = sparse.coo_array(
            (np.ones(len(starts)), (rows[starts], ngrams[starts])),
            (len(captions), max(1, len(different))),
        )
        matrices.append(counts.tocsr())  # adds up equal entries
    return matrices


def highest(counts: Sequence[sparse.csr_array]) -> sparse.csr_array:
    """Return (I, G): the largest count of each n-gram in any single reference of the image."""
    return reduce(lambda most, other: most.maximum(other), counts)


# --- statistics and scores


@dataclass(frozen=True)
class Summed:
    """A metric that is not a mean over images but follows from sums over them, as BLEU does.

    Attributes:
        rows: image -> K numbers that are added up over images.
        score: sums (..., K) -> scores (...), times 100.
    """

    rows: Mapping[str, Sequence[float]]
    score: Callable[[np.ndarray], np.ndarray]


Extra = Mapping[str, Mapping[str, float] | Summed]


@dataclass(frozen=True)
class Statistics:
    """Per-image statistics of a system, from which its score on any sample of images follows.

    Attributes:
        images: names of the I images, sorted.
        bleu: (I, 10): hypothesis length, closest reference length, matches for n = 1 to 4, n-grams
            of the hypothesis for n = 1 to 4.
        means: name -> (I,): scores whose corpus value is the mean over images, times 100.
        sums: name -> (I, K) and the function that turns its sums into a score.
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
        for name, metric in (extra or {}).items():
            rows = metric.rows if isinstance(metric, Summed) else metric
            if set(rows) != set(hypotheses):
                raise CapGenError(
                    f"{name} was computed for other images",
                    "compute it for the captions that are scored",
                )
            values = np.array([rows[image] for image in compared.images])  # (I,) or (I, K)
            if isinstance(metric, Summed):
                sums[name] = (values, metric.score)
            else:
                means[name] = values
        return cls(compared.images, _bleu(compared), means, sums)

    def scores(self) -> dict[str, float]:
        """Return the scores over all images."""
        samples = self.of_samples(np.ones((1, len(self.images))))
        return {name: float(value[0]) for name, value in samples.items()}

    def of_samples(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        """Return the scores of samples of the images.

        Args:
            weights: (B, I), how often each image is in each of B samples.

        Returns:
            name -> (B,).
        """
        bleu = bleu_of_sums(weights @ self.bleu)  # (B, 4)
        total = weights.sum(axis=1)  # (B,)
        return (
            {name: bleu[:, i] for i, name in enumerate(BLEU_NAMES)}
            | {name: weights @ values / total for name, values in self.means.items()}
            | {name: score(weights @ rows) for name, (rows, score) in self.sums.items()}
        )


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
    """Return ROUGE-L, times 100, mean over images (Lin 2004); see ``bleu`` for the arguments."""
    return {"ROUGE-L": float(_rouge_l(Compared.of(hypotheses, references)).mean())}


def cider(hypotheses: Captions, references: References) -> dict[str, float]:
    """Return CIDEr, times 100 (Vedantam et al. 2015, arXiv 1411.5726, equation 3); see ``bleu``.

    Document frequencies are those of ``references``, so scores of different sets of images cannot
    be compared.
    """
    return {"CIDEr": float(_cider(Compared.of(hypotheses, references))[1].mean())}


def cider_d(hypotheses: Captions, references: References) -> dict[str, float]:
    """Return CIDEr-D, times 100 (arXiv 1411.5726, equation 4); see ``cider``."""
    return {"CIDEr-D": float(_cider(Compared.of(hypotheses, references))[0].mean())}


def score(
    hypotheses: Captions, references: References, extra: Extra | None = None
) -> dict[str, float]:
    """Return BLEU-1 to BLEU-4, ROUGE-L, CIDEr-D, CIDEr and the metrics of ``extra``, times 100.

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
    """Return the statistics (I, 10) of BLEU; ``Statistics`` names the columns."""
    lengths = np.array([len(words) for words in compared.hypotheses])  # (I,)
    closest = [
        closest_length(len(words), map(len, captions))
        for words, captions in zip(compared.hypotheses, compared.references, strict=True)
    ]
    matches = [
        spoken.minimum(highest(human)).sum(axis=1)
        for spoken, human in zip(compared.spoken, compared.human, strict=True)
    ]
    guesses = [np.maximum(0, lengths - n + 1) for n in ORDERS]
    return np.stack([lengths, closest, *matches, *guesses], axis=1).astype(np.float64)


def closest_length(length: int, others: Iterable[int]) -> int:
    """Return the length in ``others`` that is closest to ``length``, the shorter one of a tie."""
    return min(others, key=lambda other: (abs(other - length), other))


def bleu_of_sums(sums: np.ndarray) -> np.ndarray:
    """Return BLEU-1 to BLEU-4 (..., 4), times 100, from sums (..., 10) over ``Statistics.bleu``.

        BLEU-n = BP (p1 p2 ... pn)^(1/n),   BP = exp(min(0, 1 - reference length / length))

    p is the share of a hypothesis' n-grams that are in a reference (Papineni et al. 2002).
    """
    precisions = (sums[..., 2:6] + _TINY) / (sums[..., 6:10] + _SMALL)  # (..., 4)
    means = np.cumprod(precisions, axis=-1) ** (1 / np.array(ORDERS))
    ratio = (sums[..., 0] + _TINY) / (sums[..., 1] + _SMALL)  # length / reference length
    brevity = np.exp(np.minimum(0, 1 - 1 / ratio))
    return 100 * means * brevity[..., None]


# --- ROUGE-L


def _rouge_l(compared: Compared) -> np.ndarray:
    """Return ROUGE-L of each image (I,): (1 + b^2) P R / (R + b^2 P) with b = 1.2.

    P and R are the best precision and the best recall of the longest common subsequence over the
    references.
    """
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
    cleared if the i-th word makes the subsequence longer.
    """
    positions: dict[str, int] = {}
    for i, word in enumerate(words):
        positions[word] = positions.get(word, 0) | 1 << i
    whole = (1 << len(words)) - 1
    lengths = []
    for caption in captions:
        row = whole
        for word in caption:
            hits = row & positions.get(word, 0)
            row = (row + hits | row - hits) & whole
        lengths.append(len(words) - row.bit_count())
    return lengths


# --- CIDEr


def _cider(compared: Compared) -> tuple[np.ndarray, np.ndarray]:
    """Return CIDEr-D and CIDEr of each image, (I,) each: means over references and n = 1 to 4.

    The n-gram vectors g of hypothesis c and reference s are tf-idf weighted:

        CIDEr_n(c, s)   = g(c) g(s) / (|g(c)| |g(s)|)
        CIDEr-D_n(c, s) = exp(-(l(c) - l(s))^2 / (2 sigma^2)) min(g(c), g(s)) g(s) / (|g(c)| |g(s)|)
    """
    size, references = len(compared.images), compared.references
    # The reference implementation takes the number of bigrams for a caption's length l.
    lengths = np.array([max(1, len(words)) for words in compared.hypotheses])
    clipped, plain = np.zeros(size), np.zeros(size)
    for spoken, human in zip(compared.spoken, compared.human, strict=True):
        documents = (sum(counts > 0 for counts in human) > 0).sum(axis=0)  # (G,)
        weights = np.log(size) - np.log(np.maximum(1, documents))
        vectors, norms = _weighted(spoken, weights)  # (I, G), (I,)
        for k, counts in enumerate(human):
            written, written_norms = _weighted(counts, weights)
            products = norms * written_norms
            scale = np.divide(1, products, out=np.zeros(size), where=products > 0)
            kth = [max(1, len(each[k])) if k < len(each) else 0 for each in references]
            penalty = np.exp(-((lengths - np.array(kth)) ** 2) / (2 * _SIGMA**2))
            plain += vectors.multiply(written).sum(axis=1) * scale
            clipped += vectors.minimum(written).multiply(written).sum(axis=1) * scale * penalty
    # CIDEr is times 10 by definition, and times 100 like all scores here.
    factor = 1000 / (len(ORDERS) * np.array([len(captions) for captions in references]))
    return clipped * factor, plain * factor


def _weighted(counts: sparse.csr_array, weights: np.ndarray) -> tuple[sparse.csr_array, np.ndarray]:
    """Return counts (I, G) times the n-grams' weights (G,), and the norm of each row (I,)."""
    vectors = (counts @ sparse.diags_array(weights)).tocsr()
    return vectors, np.sqrt(vectors.multiply(vectors).sum(axis=1))
