"""Captions and references from other people's files: COCO's formats, or plain mappings."""

import json
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from capgen_utils.common.files import CapGenError
from capgen_utils.evaluation.metrics.ngrams import check_images
from capgen_utils.text.ptb import tokenise

_CAPTIONS = 'give a list of {"image_id": …, "caption": …} (COCO results), or a mapping from image to caption'


_REFERENCES = (
    'give COCO annotations ({"annotations": [{"image_id": …, "caption": …}, …]}), or a mapping from image to a list of '
    "captions"
)


def load_captions(path: Path) -> dict[str, str]:
    """Read generated captions: COCO's results format, or a JSON mapping image -> caption.

    Raises:
        CapGenError: unreadable, of another form, or an image comes twice.
    """
    value = _load(path, _CAPTIONS)
    pairs = (
        _pairs(path, value, _CAPTIONS)
        if isinstance(value, list)
        else _items(path, value, _CAPTIONS)
    )
    captions: dict[str, str] = {}
    for image, given in pairs:
        caption = given[0] if isinstance(given, list) and len(given) == 1 else given
        if not isinstance(caption, str):
            raise CapGenError(
                f"{path}: {image!r} has {str(given)[:60]!r} where a caption should be", _CAPTIONS
            )
        if image in captions:
            raise CapGenError(
                f"{path} holds two captions of {image!r}", "keep one caption for each image"
            )
        captions[image] = caption
    return captions


def load_references(path: Path) -> dict[str, list[str]]:
    """Read human captions: COCO's annotations, or a JSON mapping image -> list of captions.

    Raises:
        CapGenError: unreadable, or of another form.
    """
    value = _load(path, _REFERENCES)
    rows = value.get("annotations") if isinstance(value, dict) and "annotations" in value else value
    references: dict[str, list[str]] = {}
    if isinstance(rows, list):
        for image, caption in _pairs(path, rows, _REFERENCES):
            references.setdefault(image, []).append(caption)
    else:
        references = {image: captions for image, captions in _items(path, rows, _REFERENCES)}
    for image, captions in references.items():
        if (
            not isinstance(captions, list)
            or not captions
            or not all(isinstance(c, str) for c in captions)
        ):
            raise CapGenError(f"{path}: {image!r} has no list of captions", _REFERENCES)
    return references


def _load(path: Path, remedy: str) -> Any:
    """Read JSON; a key that comes twice, of which JSON readers silently drop one, is an error."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        if len(set(keys)) < len(keys):
            twice = next(key for key in keys if keys.count(key) > 1)
            raise CapGenError(f"{path} holds {twice[:80]!r} twice", "keep one entry for each image")
        return dict(pairs)

    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"), object_pairs_hook=unique)
    except OSError as error:
        raise CapGenError(f"cannot read {path}: {error.strerror or error}", remedy) from error
    except (ValueError, RecursionError) as error:
        raise CapGenError(f"{path} is not valid JSON ({error})", remedy) from error


def _pairs(path: Path, rows: list[Any], remedy: str) -> Iterable[tuple[str, Any]]:
    """Yield image and caption of each row in COCO's format; an id is the same as number and as
    text."""
    for row in rows:
        image = row.get("image_id") if isinstance(row, dict) else None
        if not isinstance(image, str | int) or isinstance(image, bool) or "caption" not in row:
            raise CapGenError(f"{path}: {str(row)[:80]!r} has no image_id and caption", remedy)
        yield str(image), row["caption"]


def _items(path: Path, value: Any, remedy: str) -> Iterable[tuple[str, Any]]:
    if not isinstance(value, dict):
        raise CapGenError(f"{path} holds neither a list nor a mapping", remedy)
    return value.items()


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
    """Return what has to be said beside the scores of these captions; nothing for a proper
    evaluation.

    Args:
        hypotheses: image -> generated caption.
        references: image -> its human captions.
        split_images: every image of the split that was to be scored.
        training_images: every image that the system may have been trained on.

    Returns:
        Short name -> sentence. The names: ``subset``, ``training images``, ``few references``,
        ``<unk> in references``, ``special tokens``, ``empty captions``, ``repeated caption``.

    Raises:
        CapGenError: captions and references name different images; such scores are refused
            altogether.
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
    count = sum(
        "<unk>" in caption.lower() for captions in references.values() for caption in captions
    )
    return (
        f"{count:,} references hold <unk>: rare words were replaced, so that <unk> can match <unk>"
        if count
        else ""
    )


def _special(hypotheses: Mapping[str, str]) -> str:
    count = sum(
        any(token in caption.lower() for token in _SPECIAL) for caption in hypotheses.values()
    )
    return (
        f"{count:,} captions hold special tokens such as <end>, which count as words"
        if count
        else ""
    )


def _empty(hypotheses: Mapping[str, str]) -> str:
    count = sum(not tokenise(caption) for caption in hypotheses.values())
    return f"{count:,} of {len(hypotheses):,} captions hold no word" if count else ""


def _repeated(hypotheses: Mapping[str, str]) -> str:
    caption, count = most_repeated(hypotheses)
    if count < FEWEST or count <= REPEATED * len(hypotheses):
        return ""
    return f"one caption is said of {count:,} of {len(hypotheses):,} images: {caption[:100]!r}"
