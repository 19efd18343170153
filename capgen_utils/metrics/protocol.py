"""What makes a score mean something else than it seems to; each such thing is named beside the number."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence

from capgen_utils.metrics.ngrams import check_images
from capgen_utils.text import tokenise

REPEATED = 0.1  # of the images; above it one caption for many images is no chance any more
FEWEST = 3  # images that share a caption before it counts as repeated
_SPECIAL = (
    "<unk>",
    "<end>",
    "<start>",
    "<pad>",
    "<eos>",
    "<bos>",
    "</s>",
    "<s>",
    "<|endoftext|>",
    "startseq",
    "endseq",
)


def labels(
    hypotheses: Mapping[str, str],
    references: Mapping[str, Sequence[str]],
    split_images: Collection[str] | None = None,
    training_images: Collection[str] = (),
) -> dict[str, str]:
    """Return what has to be said beside the scores of these captions; nothing for a proper evaluation.

    Args:
        hypotheses: image -> generated caption.
        references: image -> its human captions.
        split_images: every image of the split that was to be scored.
        training_images: every image that the system may have been trained on.

    Returns:
        Short name -> sentence. The names: ``subset``, ``training images``, ``few references``, ``<unk> in
        references``, ``special tokens``, ``empty captions``, ``repeated caption``.

    Raises:
        CapGenError: captions and references name different images; such scores are refused altogether.
    """
    check_images(hypotheses, references)
    found = {
        "subset": _subset(hypotheses, split_images),
        "training images": _seen(hypotheses, training_images),
        "few references": _few(references),
        "<unk> in references": _unknown(references),
        "special tokens": _special(hypotheses),
        "empty captions": _empty(hypotheses),
        "repeated caption": _repeated(hypotheses),
    }
    return {name: sentence for name, sentence in found.items() if sentence}


def most_repeated(hypotheses: Mapping[str, str]) -> tuple[str, int]:
    """Return the caption that is said of most images, as words, and of how many."""
    counts = Counter(" ".join(tokenise(caption)) for caption in hypotheses.values())
    return min(counts.items(), key=lambda pair: (-pair[1], pair[0]), default=("", 0))


def _subset(hypotheses: Mapping[str, str], split_images: Collection[str] | None) -> str:
    missing = len(set(split_images or ()) - set(hypotheses))
    if not missing or split_images is None:
        return ""
    return (
        f"only {len(set(split_images)) - missing:,} of the split's {len(set(split_images)):,} images were scored: "
        "a hundred images move BLEU-4 by points, and CIDEr's weights come from the images that are scored"
    )


def _seen(hypotheses: Mapping[str, str], training_images: Collection[str]) -> str:
    seen = len(set(hypotheses) & set(training_images))
    return f"{seen:,} of {len(hypotheses):,} images are training images" if seen else ""


def _few(references: Mapping[str, Sequence[str]]) -> str:
    counts = {len(captions) for captions in references.values()}
    if len(counts) == 1 and min(counts) >= 4:
        return ""
    number = f"{min(counts)}" if len(counts) == 1 else f"{min(counts)} to {max(counts)}"
    return f"{number} references an image: scores compare only with those against as many (five are usual)"


def _unknown(references: Mapping[str, Sequence[str]]) -> str:
    count = sum("<unk>" in caption.lower() for captions in references.values() for caption in captions)
    return f"{count:,} references hold <unk>: rare words were replaced, so that <unk> can match <unk>" if count else ""


def _special(hypotheses: Mapping[str, str]) -> str:
    count = sum(any(token in caption.lower() for token in _SPECIAL) for caption in hypotheses.values())
    return f"{count:,} captions hold special tokens such as <end>, which count as words" if count else ""


def _empty(hypotheses: Mapping[str, str]) -> str:
    count = sum(not tokenise(caption) for caption in hypotheses.values())
    return f"{count:,} of {len(hypotheses):,} captions hold no word" if count else ""


def _repeated(hypotheses: Mapping[str, str]) -> str:
    caption, count = most_repeated(hypotheses)
    if count < FEWEST or count <= REPEATED * len(hypotheses):
        return ""
    return f"one caption is said of {count:,} of {len(hypotheses):,} images: {caption[:100]!r}"
