"""Captions and references from files, and warnings about how they are scored. See notebook 09.

Files are COCO's formats or plain JSON mappings.
"""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from capgen_utils.common.files import CapGenError, read_json
from capgen_utils.evaluation.metrics.scores import check_images
from capgen_utils.text.ptb import tokenise

REPEATED = 0.1  # above this share of the images, one caption for many of them is not chance
FEWEST = 3  # images with the same caption before it counts as repeated
_CAPTIONS = (
    'give a list of {"image_id": …, "caption": …} (COCO results), '
    "or a mapping from image to caption"
)
_REFERENCES = (
    'give COCO annotations ({"annotations": [{"image_id": …, "caption": …}, …]}), '
    "or a mapping from image to a list of captions"
)
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

# --- files


def load_captions(path: Path) -> dict[str, str]:
    """Read generated captions: COCO's results format, or a JSON mapping image -> caption.

    Raises:
        CapGenError: the file is unreadable or has another form, or an image occurs twice.
    """
    captions: dict[str, str] = {}
    for image, value in _entries(path, _read_json(path, _CAPTIONS), _CAPTIONS):
        caption = value[0] if isinstance(value, list) and len(value) == 1 else value
        if not isinstance(caption, str):
            raise CapGenError(f"{path}: {str(value)[:60]!r} is no caption of {image!r}", _CAPTIONS)
        if image in captions:
            raise CapGenError(
                f"{path} holds two captions of {image!r}", "keep one caption for each image"
            )
        captions[image] = caption
    return captions


def load_references(path: Path) -> dict[str, list[str]]:
    """Read human captions: COCO's annotations, or a JSON mapping image -> list of captions.

    Raises:
        CapGenError: the file is unreadable or has another form.
    """
    value = _read_json(path, _REFERENCES)
    rows = value["annotations"] if isinstance(value, dict) and "annotations" in value else value
    references: dict[str, Any] = {}
    for image, caption in _entries(path, rows, _REFERENCES):
        if isinstance(rows, list):
            references.setdefault(image, []).append(caption)
        else:
            references[image] = caption
    for image, captions in references.items():
        texts = captions if isinstance(captions, list) else []
        if not texts or not all(isinstance(text, str) for text in texts):
            raise CapGenError(f"{path}: {image!r} has no list of captions", _REFERENCES)
    return references


def _read_json(path: Path, remedy: str) -> Any:
    """Read JSON and refuse duplicate keys, of which JSON readers silently drop all but the last."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        key, count = Counter(key for key, _ in pairs).most_common(1)[0] if pairs else ("", 0)
        if count > 1:
            raise CapGenError(f"{path} holds {key[:80]!r} twice", "keep one entry for each image")
        return dict(pairs)

    return read_json(path, remedy, unique)


def _entries(path: Path, value: Any, remedy: str) -> Iterator[tuple[str, Any]]:
    """Yield each image, its id as text, and its entry from COCO's rows or from a mapping."""
    if isinstance(value, dict):
        yield from value.items()
        return
    if not isinstance(value, list):
        raise CapGenError(f"{path} holds neither a list nor a mapping", remedy)
    for row in value:
        image = row.get("image_id") if isinstance(row, dict) else None
        if not isinstance(image, str | int) or isinstance(image, bool) or "caption" not in row:
            raise CapGenError(f"{path}: {str(row)[:80]!r} has no image_id and caption", remedy)
        yield str(image), row["caption"]


# --- warnings


def labels(
    hypotheses: Mapping[str, str],
    references: Mapping[str, Sequence[str]],
    split_images: Collection[str] | None = None,
    training_images: Collection[str] = (),
) -> dict[str, str]:
    """Return the warnings that must accompany these scores; empty for a proper evaluation.

    Args:
        hypotheses: image -> generated caption.
        references: image -> its human captions.
        split_images: every image of the split that was to be scored.
        training_images: every image that the system may have been trained on.

    Returns:
        Short name -> sentence. The names: ``subset``, ``training images``, ``few references``,
        ``<unk> in references``, ``special tokens``, ``empty captions``, ``repeated caption``.

    Raises:
        CapGenError: captions and references name different images; such scores are refused.
    """
    check_images(hypotheses, references)
    total, split = len(hypotheses), set(split_images or ())
    missing = len(split - set(hypotheses))
    seen = len(set(hypotheses) & set(training_images))
    sizes = sorted({len(captions) for captions in references.values()})
    number = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
    unknown = sum("<unk>" in text.lower() for texts in references.values() for text in texts)
    special = sum(any(s in caption.lower() for s in _SPECIAL) for caption in hypotheses.values())
    empty = sum(not tokenise(caption) for caption in hypotheses.values())
    caption, repeats = repeated_caption(hypotheses)
    warnings = {  # name -> whether it applies, sentence
        "subset": (
            missing,
            f"only {len(split) - missing:,} of the split's {len(split):,} images were scored: "
            "with a hundred images BLEU-4 is off by points, and CIDEr takes its weights from them",
        ),
        "training images": (seen, f"{seen:,} of {total:,} images are training images"),
        "few references": (
            len(sizes) > 1 or sizes[0] < 4,
            f"{number} references per image: compare only with scores against as many (usual: 5)",
        ),
        "<unk> in references": (unknown, f"{unknown:,} references hold <unk>, which <unk> matches"),
        "special tokens": (
            special,
            f"{special:,} captions hold special tokens, which count as words",
        ),
        "empty captions": (empty, f"{empty:,} of {total:,} captions hold no word"),
        "repeated caption": (
            repeats,
            f"the same caption describes {repeats:,} of {total:,} images: {caption[:100]!r}",
        ),
    }
    return {name: sentence for name, (applies, sentence) in warnings.items() if applies}


def repeated_caption(hypotheses: Mapping[str, str]) -> tuple[str, int]:
    """Return the caption of suspiciously many images, as words, and their number; else 0."""
    counts = Counter(" ".join(tokenise(caption)) for caption in hypotheses.values())
    caption, count = min(counts.items(), key=lambda pair: (-pair[1], pair[0]), default=("", 0))
    too_often = count >= FEWEST and count > REPEATED * len(hypotheses)
    return (caption, count) if too_often else ("", 0)
