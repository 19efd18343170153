"""N-gram counts of captions as sparse matrices, one matrix for each n. Notebook 09 uses them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np
from scipy import sparse

from capgen_utils.common.files import CapGenError
from capgen_utils.text.ptb import tokenise

ORDERS = (1, 2, 3, 4)

Words = Sequence[Sequence[str]]


def check_images(hypotheses: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> None:
    """Refuse captions that cannot be scored against these references.

    Raises:
        CapGenError: there is nothing to score, the two name different images, or an image has no
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
    size, most = len(written), max(map(len, written))
    kth = [captions[k] if k < len(captions) else () for k in range(most) for captions in written]
    spoken, human = [], []
    for matrix in count_ngrams([*generated, *kth]):
        spoken.append(matrix[: len(generated)])
        rest = matrix[len(generated) :]  # (K I, G)
        human.append([rest[size * k : size * (k + 1)] for k in range(most)])
    return spoken, human


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
        shape = (len(captions), max(1, len(different)))
        counts = sparse.coo_array((np.ones(len(starts)), (rows[starts], ngrams[starts])), shape)
        matrices.append(counts.tocsr())  # adds up equal entries
    return matrices


def highest(counts: Sequence[sparse.csr_array]) -> sparse.csr_array:
    """Return (I, G): the largest count of each n-gram in any single reference of the image."""
    return reduce(lambda most, other: most.maximum(other), counts)
