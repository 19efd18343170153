"""What a score has to be held against: captions that need no model, and what people reach.

Arrays and captions in, captions out: one sentence for all images, a training caption drawn by
chance, the training caption of the most similar image, and one human caption scored against the
others.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from capgen_utils.common.files import CapGenError
from capgen_utils.evaluation.metrics.ngrams import ORDERS, count_both, highest
from capgen_utils.evaluation.metrics.resampling import RESAMPLES, Interval, intervals
from capgen_utils.evaluation.metrics.scores import (
    Captions,
    Extra,
    References,
    Statistics,
    bleu_of_sums,
    closest_length,
)
from capgen_utils.text.ptb import tokenise

CONSTANT_RULE = (
    "the training caption with the highest corpus BLEU-4 when it is said of every training image"
)


RANDOM_RULE = "for each image a training caption drawn by a seeded generator"
NEAREST_RULE = "the first caption of the training image whose features have the largest cosine with the image's"
HUMAN_RULE = "one human caption against the others of its image, mean over the choices of the one"
_AT_ONCE = 1024  # images whose similarities are held at a time


More = Callable[[Captions, References], Extra]


def best_constant(training: References) -> str:
    """Return the caption that, said of every image, has the highest corpus BLEU-4 against the
    training captions.

    All captions are tried, and of equal ones the first in the alphabet is taken. BLEU's sums follow
    from how many images hold an n-gram, so this takes seconds.

    Args:
        training: image -> its human captions. Never those of the split that is scored.

    Raises:
        CapGenError: there is no caption.
    """
    written = [[tokenise(caption) for caption in training[image]] for image in sorted(training)]
    spelled = {
        tuple(tokenise(c)): c
        for image in sorted(training, reverse=True)
        for c in reversed(training[image])
    }
    candidates = sorted(words for words in spelled if words)
    if not candidates:
        raise CapGenError("there is no training caption", "give the captions of the training split")
    sums = _sums_if_constant(candidates, written)
    return spelled[candidates[int(np.argmax(bleu_of_sums(sums)[:, 3]))]]


def _sums_if_constant(
    candidates: Sequence[Sequence[str]], written: Sequence[Sequence[Sequence[str]]]
) -> np.ndarray:
    """Return (C, 10): for each candidate the sums over all images that ``bleu_of_sums`` takes."""
    spoken, human = count_both(candidates, written)
    matches = []
    for said, counts in zip(spoken, human, strict=True):
        most = highest(counts)
        total = np.zeros(len(candidates))
        for times in range(
            1, int(said.max()) + 1 if said.nnz else 1
        ):  # the second "a" matches where there are two
            total += (said >= times) @ (most >= times).sum(axis=0).astype(np.float64)
        matches.append(total)
    lengths = np.array([len(words) for words in candidates])
    others = [list(map(len, captions)) for captions in written]
    closest = {n: sum(closest_length(n, each) for each in others) for n in set(lengths.tolist())}
    guesses = [np.maximum(0, lengths - n + 1) * len(written) for n in ORDERS]
    reference = np.array([closest[n] for n in lengths.tolist()])
    return np.stack([lengths * len(written), reference, *matches, *guesses], axis=1).astype(
        np.float64
    )


def constant_captions(images: Iterable[str], caption: str) -> dict[str, str]:
    """Return the same caption for every image."""
    return dict.fromkeys(images, caption)


def random_captions(images: Iterable[str], training: References, seed: int = 0) -> dict[str, str]:
    """Return for each image a training caption drawn with replacement; the order of the images does
    not matter.

    Raises:
        CapGenError: there is no training caption.
    """
    pool = [caption for image in sorted(training) for caption in training[image]]
    if not pool:
        raise CapGenError(
            "there is no training caption to draw from", "give the captions of the training split"
        )
    names = sorted(images)
    drawn = np.random.default_rng(seed).integers(len(pool), size=len(names))
    return {name: pool[int(i)] for name, i in zip(names, drawn, strict=True)}


def nearest_captions(
    images: Sequence[str],
    features: np.ndarray,
    training_images: Sequence[str],
    training_features: np.ndarray,
    training: References,
) -> dict[str, str]:
    """Return for each image the first caption of the training image that looks most like it
    (cosine).

    Args:
        images: N names.
        features: (N, D), one vector an image, of any encoder.
        training_images: M names.
        training_features: (M, D).
        training: training image -> its human captions.

    Raises:
        CapGenError: names and arrays do not fit, features are not finite, or a training image has
            no caption.
    """
    near = _nearest(_unit(features, images), _unit(training_features, training_images))
    chosen = [training_images[int(i)] for i in near]
    without = next((name for name in chosen if not training.get(name)), None)
    if without is not None:
        raise CapGenError(
            f"the training image {without} has no caption",
            "give the captions of all training images",
        )
    return {name: training[other][0] for name, other in zip(images, chosen, strict=True)}


def _nearest(features: np.ndarray, others: np.ndarray) -> np.ndarray:
    if features.shape[1] != others.shape[1]:
        raise CapGenError(
            f"features of {features.shape[1]} and {others.shape[1]} numbers do not compare",
            "use one encoder for both",
        )
    starts = range(0, len(features), _AT_ONCE)
    return np.concatenate(
        [np.argmax(features[i : i + _AT_ONCE] @ others.T, axis=1) for i in starts]
    )


def _unit(features: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """Return vectors (N, D) of length 1, zero where they were zero."""
    array = np.asarray(features, dtype=np.float32)
    if (
        array.ndim != 2
        or not len(names)
        or len(array) != len(names)
        or not np.isfinite(array).all()
    ):
        raise CapGenError(
            f"features of shape {array.shape} are not one finite vector for each of {len(names)} images",
            "give an array (images, size), in the order of the names",
        )
    return np.asarray(array / np.maximum(np.linalg.norm(array, axis=1, keepdims=True), 1e-12))


# --- people


def human_choices(references: References) -> Iterator[tuple[dict[str, str], dict[str, list[str]]]]:
    """Yield, for each choice of one human caption, the chosen captions and the others as their
    references.

    Where images have different numbers of captions there are as many choices as the smallest
    number.

    Raises:
        CapGenError: an image has fewer than two captions.
    """
    count = min(map(len, references.values()), default=0)
    if count < 2:
        raise CapGenError(
            "an image has fewer than two human captions",
            "a human row needs one to score and others to score it against",
        )
    for i in range(count):
        chosen = {image: captions[i] for image, captions in references.items()}
        yield (
            chosen,
            {image: [*captions[:i], *captions[i + 1 :]] for image, captions in references.items()},
        )


def human_row(
    references: References, more: More | None = None, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, Interval]:
    """Return what people reach: one human caption against the others, mean over the choices, with
    intervals.

    Args:
        references: image -> its human captions.
        more: hypotheses and references -> more metrics (METEOR), as ``Statistics.of`` takes them.
        resamples: how many samples of the images are drawn.
        seed: equal seeds draw equal samples.

    Raises:
        CapGenError: an image has fewer than two captions.
    """
    each = [_statistics(chosen, others, more) for chosen, others in human_choices(references)]
    return intervals(*each, resamples=resamples, seed=seed)


def beside_people(
    hypotheses: Captions,
    references: References,
    more: More | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, Interval]:
    """Return a system's scores by the protocol of ``human_row``: against each choice of all
    references but one.

    Only this row may be held against the human one: with one reference more every score is higher.

    Raises:
        CapGenError: see ``human_row``; or captions and references name different images.
    """
    each = [_statistics(hypotheses, others, more) for _, others in human_choices(references)]
    return intervals(*each, resamples=resamples, seed=seed)


def _statistics(hypotheses: Captions, references: References, more: More | None) -> Statistics:
    return Statistics.of(hypotheses, references, more(hypotheses, references) if more else None)
