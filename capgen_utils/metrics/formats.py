"""Captions and references from other people's files: COCO's formats, or plain mappings."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from capgen_utils.files import CapGenError

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
    pairs = _pairs(path, value, _CAPTIONS) if isinstance(value, list) else _items(path, value, _CAPTIONS)
    captions: dict[str, str] = {}
    for image, given in pairs:
        caption = given[0] if isinstance(given, list) and len(given) == 1 else given
        if not isinstance(caption, str):
            raise CapGenError(f"{path}: {image!r} has {str(given)[:60]!r} where a caption should be", _CAPTIONS)
        if image in captions:
            raise CapGenError(f"{path} holds two captions of {image!r}", "keep one caption for each image")
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
        if not isinstance(captions, list) or not captions or not all(isinstance(c, str) for c in captions):
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
    """Yield image and caption of each row in COCO's format; an id is the same as number and as text."""
    for row in rows:
        image = row.get("image_id") if isinstance(row, dict) else None
        if not isinstance(image, str | int) or isinstance(image, bool) or "caption" not in row:
            raise CapGenError(f"{path}: {str(row)[:80]!r} has no image_id and caption", remedy)
        yield str(image), row["caption"]


def _items(path: Path, value: Any, remedy: str) -> Iterable[tuple[str, Any]]:
    if not isinstance(value, dict):
        raise CapGenError(f"{path} holds neither a list nor a mapping", remedy)
    return value.items()
