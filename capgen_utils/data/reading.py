"""Helpers of all layouts: find files, read rows, check names, assemble a manifest (notebook 01)."""

import csv
import hashlib
import io
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath

from capgen_utils.common.files import CapGenError
from capgen_utils.data.images import SUFFIXES
from capgen_utils.data.manifest import SPLITS, Item, Manifest
from capgen_utils.text.ptb import tokenise

MISSING_IMAGES = "captions of an image that does not exist"
NO_CAPTIONS = "images without captions"
NO_SPLIT = "images in no split list"
EMPTY_CAPTIONS = "empty captions"
SHORT_CAPTIONS = "captions under three words (kept)"


def safe_name(
    name: str,
    source: Path,
    remedy: str = "give the image's name relative to the folder of images",
) -> str:
    """Return a name from a captions file or an archive as a relative path with forward slashes.

    Raises:
        CapGenError: it is empty, absolute, or leads out of the folder; names ``source``.
    """
    name = name.strip()
    parts = PurePosixPath(name.replace("\\", "/")).parts
    absolute = not parts or parts[0] == "/" or re.match(r"[A-Za-z]:", name)
    if absolute or ".." in parts or not name.isprintable():
        raise CapGenError(
            f"{source} holds {name[:100]!r}, which is not a file name inside the folder",
            remedy,
        )
    return "/".join(parts)


def folders(root: Path, depth: int = 2) -> list[Path]:
    """Return ``root`` and the folders below it, nearest first, each level sorted by name.

    Raises:
        CapGenError: ``root`` is not a folder that can be read.
    """
    level = nested = [Path(root)]
    try:
        for _ in range(depth):
            level = sorted(
                Path(entry.path)
                for folder in level
                for entry in os.scandir(folder)
                if entry.is_dir() and not entry.name.startswith((".", "__MACOSX"))
            )
            nested = nested + level
    except OSError as error:
        raise CapGenError(
            f"cannot read the folder {root}: {error.strerror}",
            "check the path; it is the data set's folder",
        ) from error
    return nested


def find_file(root: Path, names: Iterable[str]) -> Path | None:
    """Return the file nearest to ``root`` that has one of ``names``, the first name preferred."""
    inside = folders(root)
    return next((f / name for name in names for f in inside if (f / name).is_file()), None)


def find_images_folder(root: Path, names: Collection[str]) -> Path:
    """Return the folder called one of ``names`` that holds image files.

    Raises:
        CapGenError: ``root`` contains no such folder.
    """
    for folder in folders(root, depth=3):
        if folder.name in names and list_images(folder):
            return folder
    raise CapGenError(
        f"{root} has no folder of images",
        f"it should hold a folder called {' or '.join(names)} with the image files",
    )


def list_images(folder: Path, depth: int = 0) -> set[str]:
    """Return the image files in ``folder`` and ``depth`` levels below, as names relative to it."""
    names = set()
    for inside in folders(folder, depth):
        prefix = "" if inside == folder else inside.relative_to(folder).as_posix() + "/"
        with os.scandir(inside) as entries:
            files = [entry.name for entry in entries if entry.is_file()]
        shown = [name for name in files if not name.startswith(".")]
        names |= {prefix + name for name in shown if name.lower().endswith(SUFFIXES)}
    return names


def read_lines(path: Path) -> list[str]:
    """Return the lines of a UTF-8 text file, a byte-order mark removed.

    Raises:
        CapGenError: the file cannot be read, or is not UTF-8.
    """
    try:
        return Path(path).read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise CapGenError(
            f"cannot read {path}: {error.strerror}", "check the path and its permissions"
        ) from error
    except UnicodeDecodeError as error:
        raise CapGenError(
            f"{path} is not UTF-8 text ({error})", "save it as 'CSV UTF-8' or plain UTF-8"
        ) from error


def read_kaggle_captions(path: Path) -> Iterator[tuple[str, str]]:
    """Yield (image, caption) of Kaggle's ``image,caption`` lines.

    Read line by line, not by a CSV parser: if some captions quote their commas and others do not,
    one stray quotation mark would swallow all rows up to the next.
    """
    for number, line in enumerate(read_lines(path)):
        image, _, caption = line.strip().partition(",")
        if (number == 0 and image.strip().lower() == "image") or not line.strip():
            continue
        caption = caption.strip()
        if len(caption) > 1 and caption.startswith('"') and caption.endswith('"'):
            caption = caption[1:-1].replace('""', '"')
        yield safe_name(image, path), caption


def read_token_captions(path: Path) -> Iterator[tuple[str, str]]:
    """Yield (image, caption) of the original ``image.jpg#0<tab>caption`` lines."""
    for line in read_lines(path):
        if line.strip():
            image, _, caption = line.partition("\t")
            yield safe_name(re.sub(r"#\d+\s*$", "", image), path), caption


def read_table(path: Path) -> list[dict[str, str]]:
    """Read a CSV file with a header, which tells the delimiter: comma, semicolon or tab.

    Raises:
        CapGenError: it is not UTF-8, or not a table.
    """
    lines = read_lines(path)
    text = io.StringIO("\n".join(lines), newline="")
    delimiter = max(",;\t", key=lines[0].count)
    try:
        rows = list(csv.reader(text, delimiter=delimiter, strict=True))
    except csv.Error as error:
        raise CapGenError(
            f"{path} is not a CSV table ({error})", "save it as CSV, one caption per row"
        ) from error
    if not rows:
        raise CapGenError(
            f"{path} is empty", "give it a header such as image,caption and one caption per row"
        )
    columns = [column.strip().lower() for column in rows[0]]
    for number, row in enumerate(rows, start=1):
        if len(row) > len(columns):
            raise CapGenError(
                f"{path}: row {number} has {len(row)} columns, the header has {len(columns)}",
                'put captions that contain a comma in quotation marks: "like, this"',
            )
    return [
        dict(zip(columns, row + [""] * len(columns), strict=False)) for row in rows[1:] if any(row)
    ]


def group(pairs: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """Gather (image, caption) pairs by image."""
    captions: dict[str, list[str]] = {}
    for image, caption in pairs:
        captions.setdefault(image, []).append(caption)
    return captions


def seeded_split(names: Iterable[str], dev: int, test: int, seed: int = 0) -> dict[str, str]:
    """Split images at random: the first in the order of a seeded hash are test, the next dev.

    The result depends neither on the order of ``names`` nor on the version of a random generator.
    """
    ranked = sorted(names, key=lambda name: hashlib.sha256(f"{seed}/{name}".encode()).digest())
    kinds = ["test"] * test + ["dev"] * dev + ["train"] * max(0, len(ranked) - test - dev)
    return dict(zip(ranked, kinds, strict=False))


def tenths(names: Collection[str]) -> dict[str, str]:
    """Split images 80/10/10 at random; of three or more, at least one is dev and one test."""
    count = max(1, len(names) // 10) if len(names) >= 3 else 0
    return seeded_split(names, dev=count, test=count)


def assemble(
    name: str,
    root: Path,
    files: Collection[str],
    captions: Mapping[str, list[str]],
    splits: Mapping[str, str],
) -> Manifest:
    """Join images, captions and splits to a manifest; mismatches are counted, not fatal.

    Args:
        root: the folder that all image names are relative to.
        files: the images that exist.
        splits: split by image; other images are left out.

    Raises:
        CapGenError: nothing is left.
    """
    report: Counter[str] = Counter()
    items, files = [], set(files)
    for image, raw in captions.items():
        cleaned = [" ".join(caption.split()) for caption in raw]
        kept = tuple(caption for caption in cleaned if caption)
        report[EMPTY_CAPTIONS] += len(cleaned) - len(kept)
        if image not in files:
            report[MISSING_IMAGES] += len(raw)
        elif splits.get(image) not in SPLITS:
            report[NO_SPLIT] += 1
        elif kept:
            # splitting at spaces is cheap and decides most captions
            few = [caption for caption in kept if len(caption.split()) < 8]
            report[SHORT_CAPTIONS] += sum(len(tokenise(caption)) < 3 for caption in few)
            items.append(Item(image, splits[image], kept))
        else:
            report[NO_CAPTIONS] += 1
    report[NO_CAPTIONS] += len(files - set(captions))
    left_out = {reason: count for reason, count in report.items() if count}
    if not items:
        counts = ", ".join(f"{reason}: {count}" for reason, count in left_out.items())
        raise CapGenError(
            f"{root} holds no image with both a caption and a split "
            f"({counts or 'no captions at all'})",
            "check that the captions file names the image files that are there",
        )
    items.sort(key=lambda item: (SPLITS.index(item.split), item.image))
    return Manifest(name, Path(root), tuple(items), left_out)
