"""What is wrong with a system's captions, by name: collapse, truncation, looping, copying."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from capgen_utils.common.files import CapGenError
from capgen_utils.evaluation.metrics.formats import FEWEST, REPEATED, most_repeated
from capgen_utils.evaluation.metrics.ngrams import ORDERS
from capgen_utils.evaluation.metrics.scores import bleu
from capgen_utils.text.ptb import tokenise

CUT = 0.03  # share of captions without an end above which they count as truncated
LOOPING = 0.02
COPIED = 0.5
USUAL = 2.0  # times what people copy, unknowingly, where there are few ways to say a thing


# No caption ends with one of these; people's do once in a thousand.
_NEVER_LAST = {
    "a",
    "an",
    "the",
    "of",
    "with",
    "and",
    "or",
    "but",
    "from",
    "his",
    "her",
    "their",
    "its",
    "is",
    "are",
    "into",
    "to",
    "at",
    "by",
    "as",
}


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        name: ``collapse``, ``truncation``, ``looping`` or ``copying``.
        share: of the captions, in percent.
        text: what was seen, with an example.
        remedy: where the cause usually lies.
    """

    name: str
    share: float
    text: str
    remedy: str


def diagnose(
    captions: Mapping[str, str],
    ended: Mapping[str, bool] | None = None,
    training: Iterable[str] | None = None,
    references: Mapping[str, Sequence[str]] | None = None,
) -> list[Finding]:
    """Name what is wrong with captions.

    Args:
        captions: image -> generated caption.
        ended: image -> whether the caption came to its end token; without it, captions that stop at
            a word that ends no sentence ("a", "with") are taken for cut off.
        training: every training caption; without them copying is not looked for.
        references: human captions of the same images: up to twice as many training captions as
            among those are no fault.

    Returns:
        One finding for each thing that concerns too many captions; empty if all is well.
    """
    words = {image: tokenise(caption) for image, caption in captions.items()}
    found = [_collapse(captions), _truncation(words, ended), _looping(words)]
    if training is not None:
        found.append(
            _copying(
                words, training, [text for each in (references or {}).values() for text in each]
            )
        )
    return [finding for finding in found if finding is not None]


def _collapse(captions: Mapping[str, str]) -> Finding | None:
    caption, count = most_repeated(captions)
    if count < FEWEST or count <= REPEATED * len(captions):
        return None
    return Finding(
        "collapse",
        100 * count / len(captions),
        f"{caption[:80]!r} is said of {count:,} of {len(captions):,} images",
        "the captioner does not see its images: compare its preprocessing in training and now, and the scores of the "
        "same captions on the wrong images; or it was trained too short",
    )


def _truncation(
    words: Mapping[str, Sequence[str]], ended: Mapping[str, bool] | None
) -> Finding | None:
    if ended is None:
        cut = [image for image, caption in words.items() if caption and caption[-1] in _NEVER_LAST]
    else:
        cut = [image for image in words if not ended.get(image, True)]
    if len(cut) <= CUT * len(words):
        return None
    return Finding(
        "truncation",
        100 * len(cut) / len(words),
        f"{len(cut):,} of {len(words):,} captions stop before their end: {_shown(words[cut[0]])}",
        "let decoding write more words; if the end token never comes, look whether the loss leaves it out",
    )


def _looping(words: Mapping[str, Sequence[str]]) -> Finding | None:
    loops = [image for image, caption in words.items() if any(_loops(caption))]
    if len(loops) <= LOOPING * len(words):
        return None
    return Finding(
        "looping",
        100 * len(loops) / len(words),
        f"{len(loops):,} of {len(words):,} captions say the same twice in a row: {_shown(words[loops[0]])}",
        "forbid repeated n-grams while decoding, or train longer",
    )


def _loops(caption: Sequence[str]) -> Iterator[bool]:
    """Yield for each place whether one to four words from there are said again at once."""
    for size in (1, 2, 3, 4):
        for i in range(len(caption) - 2 * size + 1):
            yield caption[i : i + size] == caption[i + size : i + 2 * size]


def _copying(
    words: Mapping[str, Sequence[str]], training: Iterable[str], human: Sequence[str]
) -> Finding | None:
    read = {tuple(tokenise(caption)) for caption in training}
    copied = [image for image, caption in words.items() if tuple(caption) in read]
    usual = sum(tuple(tokenise(caption)) in read for caption in human) / max(1, len(human))
    if len(copied) <= max(COPIED, USUAL * usual) * len(words):
        return None
    return Finding(
        "copying",
        100 * len(copied) / len(words),
        f"{len(copied):,} of {len(words):,} captions are word for word training captions: {_shown(words[copied[0]])}",
        "the captioner recites: train it shorter, or on more captions, or with more dropout",
    )


def _shown(caption: Sequence[str]) -> str:
    return repr(" ".join(caption)[:80])


def diversity(hypotheses: Mapping[str, str]) -> dict[str, float]:
    """Return how varied the captions are: distinct captions, words used, mean length in words,
    ``<unk>`` count."""
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
        In percent: ``distinct_ratio``, different captions among all; ``copied``, captions that are
            word for word a
        training caption; ``novel_1`` to ``novel_4``, n-grams, each counted as often as it is said,
        that no training caption holds.
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
    """Return mBLEU-1 to mBLEU-4 of several captions of the same images, times 100; 100 means that
    all are equal.

    Each caption of an image is scored against the others (corpus BLEU), and the scores of the
    choices are averaged.

    Args:
        samples: image -> its sampled captions, as many for each image, two or more.

    Raises:
        CapGenError: an image has fewer than two, or another number than the rest.
    """
    sizes = {len(captions) for captions in samples.values()}
    if len(sizes) != 1 or min(sizes) < 2:
        raise CapGenError(
            f"mBLEU cannot compare {sorted(sizes)} samples of an image",
            "sample each image as often, twice or more",
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
