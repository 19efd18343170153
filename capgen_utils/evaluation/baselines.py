"""Baselines that need no model, and the human row. Notebook 09 teaches them.

One caption for all images, a random training caption, the training caption of the most similar
image; and one human caption scored against the others of its image.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from capgen_utils.common.files import CapGenError
from capgen_utils.evaluation.metrics.resampling import RESAMPLES, Interval, intervals
from capgen_utils.evaluation.metrics.scores import (
    ORDERS,
    Captions,
    Extra,
    References,
    Statistics,
    bleu_of_sums,
    closest_length,
    count_both,
    highest,
)
from capgen_utils.text.ptb import tokenise

CONSTANT_RULE = (
    "the training caption with the highest corpus BLEU-4 when it is said of every training image"
)
RANDOM_RULE = "for each image a training caption drawn by a seeded generator"
NEAREST_RULE = (
    "the first caption of the training image whose features have the largest cosine with the "
    "image's"
)
HUMAN_RULE = "one human caption against the others of its image, mean over the choices of the one"
_AT_ONCE = 1024  # images whose similarities are held in memory at a time

More = Callable[[Captions, References], Extra]


def best_constant(training: References) -> str:
    """Return the training caption with the highest corpus BLEU-4 if it describes every image.

    All captions are tried; of equal ones the alphabetically first wins. BLEU's sums follow from the
    number of images that hold an n-gram, so this takes seconds.

    Args:
        training: image -> its human captions; never those of the split that is scored.

    Raises:
        CapGenError: there is no caption.
    """
    images = sorted(training)
    written = [[tokenise(caption) for caption in training[image]] for image in images]
    spelled: dict[tuple[str, ...], str] = {}  # words -> the first caption that has them
    for image, captions in zip(images, written, strict=True):
        for caption, words in zip(training[image], captions, strict=True):
            spelled.setdefault(tuple(words), caption)
    candidates = sorted(words for words in spelled if words)
    if not candidates:
        raise CapGenError("there is no training caption", "give the captions of the training split")
    spoken, human = count_both(candidates, written)
    matches = []
    for counts, references in zip(spoken, human, strict=True):
        most, total = highest(references), np.zeros(len(candidates))  # (I, G), (C,)
        for times in range(1, int(counts.max()) + 1 if counts.nnz else 1):
            # The second "a" matches in images with a reference that holds two.
            total += (counts >= times) @ (most >= times).sum(axis=0).astype(np.float64)
        matches.append(total)
    lengths = np.array([len(words) for words in candidates])  # (C,)
    human_lengths = [[len(words) for words in captions] for captions in written]
    closest = {
        n: sum(closest_length(n, those) for those in human_lengths) for n in set(lengths.tolist())
    }
    reference = [closest[n] for n in lengths.tolist()]
    guesses = [np.maximum(0, lengths - n + 1) * len(written) for n in ORDERS]
    sums = np.stack([lengths * len(written), reference, *matches, *guesses], axis=1)  # (C, 10)
    return spelled[candidates[int(np.argmax(bleu_of_sums(sums.astype(np.float64))[:, 3]))]]


def constant_captions(images: Iterable[str], caption: str) -> dict[str, str]:
    """Return the same caption for every image."""
    return dict.fromkeys(images, caption)


def random_captions(images: Iterable[str], training: References, seed: int = 0) -> dict[str, str]:
    """Return a training caption for each image, drawn with replacement in any order of the images.

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
    """Return for each image the first caption of the most similar training image (cosine).

    Args:
        images: N names.
        features: (N, D), one vector per image, of any encoder.
        training_images: M names.
        training_features: (M, D).
        training: training image -> its human captions.

    Raises:
        CapGenError: names and arrays do not fit, features are not finite, or a training image has
            no caption.
    """
    vectors, others = _unit(features, images), _unit(training_features, training_images)
    if vectors.shape[1] != others.shape[1]:
        raise CapGenError(
            f"features of {vectors.shape[1]} and {others.shape[1]} numbers do not compare",
            "use one encoder for both",
        )
    captions = {}
    for start in range(0, len(images), _AT_ONCE):
        similarity = vectors[start : start + _AT_ONCE] @ others.T  # (at most _AT_ONCE, M)
        for name, i in zip(images[start:], similarity.argmax(axis=1), strict=False):
            nearest = training_images[int(i)]
            if not training.get(nearest):
                raise CapGenError(
                    f"the training image {nearest} has no caption",
                    "give the captions of all training images",
                )
            captions[name] = training[nearest][0]
    return captions


def _unit(features: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """Return vectors (N, D) of length 1; zero vectors stay zero."""
    array = np.asarray(features, dtype=np.float32)
    fits = array.ndim == 2 and len(array) == len(names) > 0
    if not fits or not np.isfinite(array).all():
        raise CapGenError(
            f"features of shape {array.shape} are not one finite vector for each of "
            f"{len(names)} images",
            "give an array (images, size), in the order of the names",
        )
    return np.asarray(array / np.maximum(np.linalg.norm(array, axis=1, keepdims=True), 1e-12))


# --- people


def human_choices(references: References) -> Iterator[tuple[dict[str, str], dict[str, list[str]]]]:
    """Yield one chosen human caption of each image, and the others as its references.

    There are as many choices as the image with the fewest captions has.

    Raises:
        CapGenError: some image has fewer than two captions.
    """
    count = min(map(len, references.values()), default=0)
    if count < 2:
        raise CapGenError(
            "some images have fewer than two human captions",
            "a human row needs one to score and others to score it against",
        )
    for i in range(count):
        chosen = {image: captions[i] for image, captions in references.items()}
        others = {image: [*texts[:i], *texts[i + 1 :]] for image, texts in references.items()}
        yield chosen, others


def human_row(
    references: References, more: More | None = None, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, Interval]:
    """Return the human row: one human caption scored against the others, mean over the choices.

    Args:
        references: image -> its human captions.
        more: hypotheses and references -> more metrics (METEOR), as ``Statistics.of`` takes them.
        resamples: the number of samples of the images.
        seed: equal seeds draw equal samples.

    Raises:
        CapGenError: some image has fewer than two captions.
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
    """Return a system's scores by the protocol of ``human_row``, with one reference less per image.

    Only this row may be compared with the human one: every further reference raises the scores.

    Raises:
        CapGenError: see ``human_row``; or captions and references name different images.
    """
    each = [_statistics(hypotheses, others, more) for _, others in human_choices(references)]
    return intervals(*each, resamples=resamples, seed=seed)


def _statistics(hypotheses: Captions, references: References, more: More | None) -> Statistics:
    return Statistics.of(hypotheses, references, more(hypotheses, references) if more else None)
