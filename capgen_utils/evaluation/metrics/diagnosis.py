"""Faults of a system's captions by name, their diversity and their originality. See notebook 09."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from capgen_utils.common.files import CapGenError
from capgen_utils.evaluation.metrics.formats import REPEATED, repeated_caption
from capgen_utils.evaluation.metrics.scores import ORDERS, bleu
from capgen_utils.text.ptb import tokenise

# Shares of the captions above which a fault is reported.
CUT = 0.03
LOOPING = 0.02
COPIED = 0.5
USUAL = 2.0  # or this many times the share of human captions that equal a training caption
# No caption ends with one of these; human captions do once in a thousand.
_NEVER_LAST = frozenset(
    ("a", "an", "the", "of", "with", "and", "or", "but", "from", "his", "her", "their", "its")
    + ("is", "are", "into", "to", "at", "by", "as")
)
_REMEDIES = {
    "collapse": "the captioner does not see its images: compare its preprocessing in training and "
    "now, and the scores of the same captions on the wrong images; or it was trained too short",
    "truncation": "raise the maximum length; if the end token never comes, "
    "check whether the loss leaves it out",
    "looping": "forbid repeated n-grams while decoding, or train longer",
    "copying": "the captioner recites: train it shorter, on more captions, or with more dropout",
}


@dataclass(frozen=True)
class Finding:
    """One fault.

    Attributes:
        name: ``collapse``, ``truncation``, ``looping`` or ``copying``.
        share: of the captions, in percent.
        text: what was observed, with an example.
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
    """Return the faults that concern too many captions; empty if all is well.

    Args:
        captions: image -> generated caption.
        ended: image -> whether the caption reached its end token; without it, captions whose last
            word cannot end a sentence ("a", "with") count as cut off.
        training: every training caption; without them copying is not checked.
        references: human captions of the same images: up to twice their share of training captions
            is not a fault.
    """
    words = {image: tokenise(caption) for image, caption in captions.items()}
    repeated, repeats = repeated_caption(captions)
    same = [caption for caption in words.values() if repeats and " ".join(caption) == repeated]
    loops = [caption for caption in words.values() if _loops(caption)]
    if ended is None:
        cut = [caption for caption in words.values() if caption and caption[-1] in _NEVER_LAST]
    else:
        cut = [caption for image, caption in words.items() if not ended.get(image, True)]
    faults = {  # name -> the highest tolerated share, faulty captions, description
        "collapse": (REPEATED, same, "are the same"),
        "truncation": (CUT, cut, "stop before their end"),
        "looping": (LOOPING, loops, "repeat words immediately"),
    }
    if training is not None:
        known = {tuple(tokenise(caption)) for caption in training}
        copied = [caption for caption in words.values() if tuple(caption) in known]
        human = [tuple(tokenise(text)) for texts in (references or {}).values() for text in texts]
        usual = sum(caption in known for caption in human) / max(1, len(human))
        limit = max(COPIED, USUAL * usual)
        faults["copying"] = (limit, copied, "are training captions, word for word")
    total = len(words)
    return [
        Finding(
            name,
            100 * len(faulty) / total,
            f"{len(faulty):,} of {total:,} captions {what}: {' '.join(faulty[0])[:80]!r}",
            _REMEDIES[name],
        )
        for name, (limit, faulty, what) in faults.items()
        if len(faulty) > limit * total
    ]


def _loops(caption: Sequence[str]) -> bool:
    """Whether one to four words are repeated immediately anywhere in a caption."""
    return any(
        caption[i : i + n] == caption[i + n : i + 2 * n]
        for n in ORDERS
        for i in range(len(caption) - 2 * n + 1)
    )


def diversity(hypotheses: Mapping[str, str]) -> dict[str, float]:
    """Return counts of distinct captions, words and ``<unk>``, and the mean length in words."""
    words = [tokenise(caption) for caption in hypotheses.values()]
    return {
        "distinct": len({" ".join(caption) for caption in words}),
        "words_used": len({word for caption in words for word in caption}),
        "mean_length": sum(map(len, words)) / max(1, len(words)),
        "unk": sum(caption.count("<unk>") for caption in hypotheses.values()),
    }


def originality(hypotheses: Mapping[str, str], training: Iterable[str]) -> dict[str, float]:
    """Return how much of the captions is new.

    Args:
        hypotheses: image -> generated caption.
        training: every caption that the system was trained on.

    Returns:
        In percent: ``distinct_ratio``, different captions among all; ``copied``, captions that
        equal a training caption word for word; ``novel_1`` to ``novel_4``, n-grams, counted as
        often as they occur, that are in no training caption.
    """
    captions = [tuple(tokenise(caption)) for caption in hypotheses.values()]
    known = {tuple(tokenise(caption)) for caption in training}

    def percent(hits: Sequence[bool]) -> float:
        return 100 * sum(hits) / max(1, len(hits))

    result = {
        "distinct_ratio": 100 * len(set(captions)) / max(1, len(captions)),
        "copied": percent([caption in known for caption in captions]),
    }
    for n in ORDERS:
        said = [ngram for caption in captions for ngram in _ngrams(caption, n)]
        novel = set(said)
        for caption in known:
            novel.difference_update(_ngrams(caption, n))
        result[f"novel_{n}"] = percent([ngram in novel for ngram in said])
    return result


def mutual_bleu(samples: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """Return mBLEU-1 to mBLEU-4 of several captions per image, times 100; 100 if all are equal.

    Each caption of an image is scored against the others (corpus BLEU), and the scores of all
    choices are averaged (Zhu et al. 2018, "Texygen", arXiv 1802.01886: Self-BLEU).

    Args:
        samples: image -> its sampled captions; the same number for each image, two or more.

    Raises:
        CapGenError: some image has fewer than two, or another number than the rest.
    """
    sizes = {len(captions) for captions in samples.values()}
    if len(sizes) != 1 or min(sizes) < 2:
        raise CapGenError(
            f"mBLEU cannot compare {sorted(sizes)} samples per image",
            "draw the same number of samples for each image, two or more",
        )
    rounds = [
        bleu(
            {image: captions[k] for image, captions in samples.items()},
            {image: [*captions[:k], *captions[k + 1 :]] for image, captions in samples.items()},
        )
        for k in range(min(sizes))
    ]
    return {f"m{name}": sum(scores[name] for scores in rounds) / len(rounds) for name in rounds[0]}


def _ngrams(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
