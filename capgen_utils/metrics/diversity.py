"""What scores hide: how varied captions are, and how much of them was taken from the training captions."""

from collections.abc import Iterable, Mapping, Sequence

from capgen_utils.files import CapGenError
from capgen_utils.metrics.ngrams import ORDERS
from capgen_utils.metrics.scores import bleu
from capgen_utils.text import tokenise


def diversity(hypotheses: Mapping[str, str]) -> dict[str, float]:
    """Return how varied the captions are: distinct captions, words used, mean length in words, ``<unk>`` count."""
    words = [tokenise(caption) for caption in hypotheses.values()]
    return {
        "distinct": len({" ".join(w) for w in words}),
        "words_used": len({word for caption in words for word in caption}),
        "mean_length": sum(map(len, words)) / max(1, len(words)),
        "unk": sum(caption.count("<unk>") for caption in hypotheses.values()),
    }


def originality(hypotheses: Mapping[str, str], training: Iterable[str]) -> dict[str, float]:
    """Return what of the captions is new.

    Args:
        hypotheses: image -> generated caption.
        training: every caption that the system was trained on.

    Returns:
        In percent: ``distinct_ratio``, different captions among all; ``copied``, captions that are word for word a
        training caption; ``novel_1`` to ``novel_4``, n-grams, each counted as often as it is said, that no training
        caption holds.
    """
    said = [tuple(tokenise(caption)) for caption in hypotheses.values()]
    read = {tuple(tokenise(caption)) for caption in training}
    result = {
        "distinct_ratio": _percent(len(set(said)), len(said)),
        "copied": _percent(sum(caption in read for caption in said), len(said)),
    }
    for n in ORDERS:
        spoken = [ngram for caption in said for ngram in _ngrams(caption, n)]
        unknown = set(spoken)
        for caption in read:
            unknown.difference_update(_ngrams(caption, n))
        result[f"novel_{n}"] = _percent(sum(ngram in unknown for ngram in spoken), len(spoken))
    return result


def mutual_bleu(samples: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """Return mBLEU-1 to mBLEU-4 of several captions of the same images, times 100; 100 means that all are equal.

    Each caption of an image is scored against the others (corpus BLEU), and the scores of the choices are averaged.

    Args:
        samples: image -> its sampled captions, as many for each image, two or more.

    Raises:
        CapGenError: an image has fewer than two, or another number than the rest.
    """
    sizes = {len(captions) for captions in samples.values()}
    if len(sizes) != 1 or min(sizes) < 2:
        raise CapGenError(
            f"mBLEU cannot compare {sorted(sizes)} samples of an image", "sample each image as often, twice or more"
        )
    rounds = []
    for k in range(min(sizes)):
        others = {image: [*captions[:k], *captions[k + 1 :]] for image, captions in samples.items()}
        rounds.append(bleu({image: captions[k] for image, captions in samples.items()}, others))
    return {f"m{name}": sum(scores[name] for scores in rounds) / len(rounds) for name in rounds[0]}


def _ngrams(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def _percent(part: int, whole: int) -> float:
    return 100 * part / max(1, whole)
