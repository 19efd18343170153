"""Every data set as one manifest: drawn, downloaded, or the reader's own folder."""

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from capgen_utils.common.files import CapGenError, explain_os_errors
from capgen_utils.common.paths import data_dir
from capgen_utils.data import download, layouts, shapes
from capgen_utils.data.manifest import SPLITS, Item, Manifest

__all__ = ["DATASETS", "SPLITS", "Dataset", "Item", "Manifest", "download_dataset", "load_dataset"]


@dataclass(frozen=True)
class Dataset:
    """How one data set is found, fetched and read.

    Attributes:
        read: folder -> manifest.
        find: given folder or ``None`` -> the folder that holds the data, without the network.
        fetch: given folder or ``None`` -> the folder that holds the data, by the network if need
            be.
    """

    read: Callable[[Path], Manifest]
    find: Callable[[Path | None], Path]
    fetch: Callable[[Path | None], Path]


def _find_flickr8k(root: Path | None) -> Path:
    folder = download.find_flickr8k(root)
    if folder is None:
        raise CapGenError(
            f"Flickr8k is not in {data_dir() / 'flickr8k'}",
            "run: capgen download flickr8k (no account needed); or set CAPGEN_FLICKR8K to a folder that holds it",
        )
    return folder


def _find_shapes(root: Path | None, count: int = 3800, seed: int = 0) -> Path:
    """Return the generated data set; draw it where it is not there yet, which takes seconds."""
    target = (
        Path(root) if root is not None else data_dir() / f"shapes-{shapes.version(count, seed)}"
    )
    if target.is_dir() and any(target.iterdir()):
        return target
    with explain_os_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".shapes.", dir=target.parent) as holder:
            shapes.generate(Path(holder) / "shapes", count, seed)
            try:
                os.rename(Path(holder) / "shapes", target)
            except OSError:
                if not target.is_dir():  # else another process was faster and drew the same
                    raise
    return target


def _need_folder(root: Path | None) -> Path:
    if root is None or not Path(root).is_dir():
        raise CapGenError(
            f"the folder {root} does not exist"
            if root
            else "the data set 'folder' needs to know which folder",
            "name a folder that holds images and captions.csv with the columns image,caption",
        )
    return Path(root)


# A CLIP sees many more pictures than the captioners that are built on it; these are other scenes
# than those of shapes.
_find_many_shapes = partial(_find_shapes, count=15_000, seed=1)


DATASETS: dict[str, Dataset] = {
    "shapes": Dataset(layouts.read_shapes, _find_shapes, _find_shapes),
    "many_shapes": Dataset(layouts.read_shapes, _find_many_shapes, _find_many_shapes),
    "flickr8k": Dataset(layouts.read_flickr8k, _find_flickr8k, download.download_flickr8k),
    "flickr30k": Dataset(
        layouts.read_flickr30k,
        partial(download.locate, "flickr30k"),
        partial(download.locate, "flickr30k"),
    ),
    "coco": Dataset(
        layouts.read_coco, partial(download.locate, "coco"), partial(download.locate, "coco")
    ),
    "folder": Dataset(layouts.read_folder, _need_folder, _need_folder),
}


def _get(name: str) -> Dataset:
    if name not in DATASETS:
        raise CapGenError(f"there is no data set {name!r}", f"choose one of {', '.join(DATASETS)}")
    return DATASETS[name]


def load_dataset(name: str, root: Path | None = None, limit: int | None = None) -> Manifest:
    """Return a data set as a manifest. Nothing is downloaded; ``shapes`` is drawn where it is
    missing.

    Args:
        name: a key of ``DATASETS``.
        root: the folder that holds the data; required for ``folder``, else the usual places are
            searched.
        limit: keep the first so many images of every split.

    Raises:
        CapGenError: no such data set, not found, or damaged; says what to do.
    """
    dataset = _get(name)
    return dataset.read(dataset.find(root)).limit(limit)


def download_dataset(name: str, root: Path | None = None) -> Path:
    """Return the folder of a data set; where it is not here yet, get it first.

    Args:
        name: a key of ``DATASETS``.
        root: where it is or shall be; by default the data folder.

    Raises:
        CapGenError: it cannot be had this way; says what to do.
    """
    return _get(name).fetch(root)
