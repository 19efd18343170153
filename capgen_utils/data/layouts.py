"""A reader for each layout of a data set on disk; all return a manifest (notebook 01)."""

import re
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from capgen_utils.common.files import CapGenError, read_json
from capgen_utils.common.paths import REPOSITORY
from capgen_utils.data.manifest import SPLITS, Manifest
from capgen_utils.data.reading import (
    assemble,
    find_file,
    find_images_folder,
    group,
    list_images,
    read_kaggle_captions,
    read_lines,
    read_table,
    read_token_captions,
    safe_name,
    seeded_split,
    tenths,
)

SPLIT_LISTS = REPOSITORY / "data" / "splits" / "flickr8k"
FLICKR8K_IMAGES = ("Images", "Flicker8k_Dataset", "Flickr8k_Dataset")
FLICKR30K_IMAGES = ("flickr30k_images", "flickr30k-images", "Images", "images")
ALIASES = {"val": "dev", "valid": "dev", "validation": "dev", "restval": "train"}


def official_split() -> dict[str, str]:
    """Return the official split of each of Flickr8k's 8,000 images; the lists ship with CapGen.

    Raises:
        CapGenError: a list is missing.
    """
    return {
        line.strip(): split
        for split in SPLITS
        for line in read_lines(SPLIT_LISTS / f"{split}.txt")
        if line.strip()
    }


def read_flickr8k(root: Path) -> Manifest:
    """Read Flickr8k in Kaggle's layout (captions.txt) or the original one (Flickr8k.token.txt).

    The files may be a level or two below ``root``. Splits are the official ones: 6,000 / 1,000 /
    1,000.

    Raises:
        CapGenError: captions or images are not found.
    """
    path = find_file(root, ("captions.txt", "Flickr8k.token.txt"))
    if path is None:
        raise CapGenError(
            f"{root} holds neither captions.txt nor Flickr8k.token.txt",
            "name the folder of Flickr8k's captions and images, or run: capgen download flickr8k",
        )
    images = find_images_folder(root, FLICKR8K_IMAGES)
    pairs = read_kaggle_captions(path) if path.name == "captions.txt" else read_token_captions(path)
    return assemble("flickr8k", images, list_images(images), group(pairs), official_split())


def read_flickr30k(root: Path) -> Manifest:
    """Read Flickr30k from Karpathy's JSON file with his split, else from its captions file.

    Kaggle's ``results.csv`` and the original ``results_20130124.token`` have no split: 1,000 images
    (a tenth, if there are fewer than 10,000) become dev and as many test, by a fixed seed.

    Raises:
        CapGenError: captions or images are not found, or are damaged.
    """
    path = find_file(root, ("dataset_flickr30k.json", "results.csv", "results_20130124.token"))
    if path is None:
        raise CapGenError(
            f"{root} holds neither dataset_flickr30k.json nor results.csv",
            "lay Flickr30k out as a folder flickr30k_images beside one of these two files",
        )
    images = find_images_folder(root, FLICKR30K_IMAGES)
    if path.suffix == ".json":
        captions, splits = _read_karpathy(path)
    else:
        read = read_results_csv if path.suffix == ".csv" else read_token_captions
        captions = group(read(path))
        count = min(1000, len(captions) // 10)
        splits = seeded_split(captions, dev=count, test=count)
    return assemble("flickr30k", images, list_images(images), captions, splits)


def read_results_csv(path: Path) -> Iterator[tuple[str, str]]:
    """Yield (image, caption) of ``image| number| caption``; one row lacks its second bar."""
    for number, line in enumerate(read_lines(path)):
        if number == 0 or not line.strip():
            continue
        image, _, rest = line.partition("|")
        match = re.fullmatch(r"\s*\d+\s*(?:\||\s)(.*)", rest.strip())
        if match is None and rest.strip() and not rest.strip().isdigit():
            raise CapGenError(
                f"{path}: line {number + 1} is not 'image| number| caption'",
                "unpack Flickr30k's results.csv again",
            )
        yield safe_name(image, path), match[1] if match else ""


def _read_karpathy(
    path: Path, with_folder: bool = False
) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Return captions and split by image from one of Karpathy's JSON files."""
    captions, splits = {}, {}
    with _explained(path):
        for entry in read_json(path, "download the file again")["images"]:
            folder = f"{entry['filepath']}/" if with_folder else ""
            image = safe_name(folder + entry["filename"], path)
            captions[image] = [str.strip(sentence["raw"]) for sentence in entry["sentences"]]
            splits[image] = ALIASES.get(entry["split"], entry["split"])
    return captions, splits


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn the errors of reading values of another form into one that names the file."""
    try:
        yield
    except (LookupError, TypeError, AttributeError) as error:
        raise CapGenError(
            f"{path} has another form than expected ({error!r})",
            "it is damaged or another file: download it again",
        ) from error


def read_coco(root: Path) -> Manifest:
    """Read COCO: 2014 with Karpathy's ``dataset_coco.json``, or 2017 with COCO's own annotations.

    COCO does not publish the captions of its test images. So for 2017, val2017 becomes test, and
    5,000 images of train2017 (a tenth, if there are fewer than 50,000) become dev, by a fixed seed.

    Raises:
        CapGenError: captions or images are not found, or are damaged.
    """
    path = find_file(root, ("dataset_coco.json",))
    if path is not None:
        captions, splits = _read_karpathy(path, with_folder=True)
        files = _coco_images(root, ("train2014", "val2014"))
        return assemble("coco", root, files, captions, splits)
    captions, splits = {}, {}
    for folder in ("train2017", "val2017"):
        annotations = find_file(root, (f"captions_{folder}.json",))
        annotated = _read_annotations(annotations, folder) if annotations else {}
        captions |= annotated
        if folder == "train2017":
            splits |= seeded_split(annotated, dev=min(5000, len(annotated) // 10), test=0)
        else:
            splits |= dict.fromkeys(annotated, "test")
    if not captions:
        raise CapGenError(
            f"{root} holds neither dataset_coco.json nor annotations/captions_train2017.json",
            "lay COCO out as train2014, val2014 and dataset_coco.json, or as train2017, val2017 "
            "and annotations",
        )
    return assemble("coco", root, _coco_images(root, ("train2017", "val2017")), captions, splits)


def _coco_images(root: Path, folders: tuple[str, ...]) -> set[str]:
    present = [folder for folder in folders if (root / folder).is_dir()]
    return {f"{folder}/{name}" for folder in present for name in list_images(root / folder)}


def _read_annotations(path: Path, folder: str) -> dict[str, list[str]]:
    """Return captions by ``folder/file`` from one of COCO's own annotation files."""
    with _explained(path):
        value = read_json(path, "download the file again")
        names = {i["id"]: safe_name(folder + "/" + i["file_name"], path) for i in value["images"]}
        unlisted = next((r for r in value["annotations"] if r["image_id"] not in names), None)
        if unlisted is not None:
            raise CapGenError(
                f"{path}: a caption belongs to the image {unlisted['image_id']!r}, which is not "
                "listed",
                "the file is damaged: download it again",
            )
        rows = [(names[row["image_id"]], str.strip(row["caption"])) for row in value["annotations"]]
    return group(rows)


def read_folder(root: Path) -> Manifest:
    """Read your own images: a folder with ``captions.csv`` and image files, in subfolders too.

    ``captions.csv`` is UTF-8 with the columns image and caption, and one caption per row. The
    column split (train, dev or test) is optional: without it the images are split 80/10/10 by a
    fixed seed.

    Raises:
        CapGenError: the table is missing or damaged, or an image is put into two splits.
    """
    root = Path(root)
    path = root / "captions.csv"
    if not path.is_file():
        raise CapGenError(
            f"there is no file {path}",
            "write one with the columns image,caption and one caption per row",
        )
    rows = read_table(path)
    if rows and not {"image", "caption"} <= set(rows[0]):
        raise CapGenError(
            f"{path} has the columns {', '.join(rows[0])}",
            "it needs image and caption in its first row",
        )
    files = list_images(root, depth=4)
    # a file name may contain é as one character or as two
    composed = {unicodedata.normalize("NFC", name): name for name in files}
    names = [safe_name(row["image"], path) for row in rows]
    images = [n if n in files else composed.get(unicodedata.normalize("NFC", n), n) for n in names]
    captions = group(zip(images, (row["caption"] for row in rows), strict=True))
    if rows and "split" in rows[0]:
        splits = _split_column(path, images, [row["split"] for row in rows])
    else:
        splits = tenths({name for name in files & set(captions) if "".join(captions[name]).strip()})
    return assemble(f"folder-{root.resolve().name}", root, files, captions, splits)


def _split_column(path: Path, images: list[str], column: list[str]) -> dict[str, str]:
    splits: dict[str, str] = {}
    for number, (image, value) in enumerate(zip(images, column, strict=True), start=2):
        split = ALIASES.get(value.strip().lower(), value.strip().lower())
        if split not in SPLITS:
            raise CapGenError(
                f"{path}: row {number} has the split {value!r}", f"write one of {', '.join(SPLITS)}"
            )
        if splits.setdefault(image, split) != split:
            raise CapGenError(
                f"{path}: row {number} puts {image} into {split}, an earlier row into "
                f"{splits[image]}",
                "put all captions of an image into one split, or test images are trained on",
            )
    return splits


def read_shapes(root: Path) -> Manifest:
    """Read a data set that ``shapes.generate`` wrote.

    Raises:
        CapGenError: a file of it is missing or damaged.
    """
    root = Path(root)
    remedy = f"delete {root} and generate it again"
    lists = read_json(root / "splits.json", remedy)
    if not isinstance(lists, dict) or any(not isinstance(names, list) for names in lists.values()):
        raise CapGenError(f"{root / 'splits.json'} is not a list of images for each split", remedy)
    splits: dict[str, str] = {}
    for split, names in lists.items():
        for name in names:
            if not isinstance(name, str) or splits.setdefault(name, split) != split:
                raise CapGenError(f"{root / 'splits.json'} puts {name!r} into two splits", remedy)
    images = find_images_folder(root, ("Images",))
    captions = group(read_kaggle_captions(root / "captions.txt"))
    return assemble("shapes", images, list_images(images), captions, splits)
