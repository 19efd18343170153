"""All data sets by name, each as one manifest (notebook 01)."""

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from capgen_utils.common.files import CapGenError, explain_os_errors
from capgen_utils.common.paths import data_dir
from capgen_utils.data import layouts, shapes
from capgen_utils.data.download import download_flickr8k, find_flickr8k, locate
from capgen_utils.data.manifest import Manifest


@dataclass(frozen=True)
class Dataset:
    """How one data set is found, downloaded and read.

    Attributes:
        read: folder -> manifest.
        find: a folder, or ``None`` for the usual ones -> the folder of the data, offline.
        download: the same, but may use the network.
    """

    read: Callable[[Path], Manifest]
    find: Callable[[Path | None], Path]
    download: Callable[[Path | None], Path]


def _find_flickr8k(root: Path | None) -> Path:
    folder = find_flickr8k(root)
    if folder is None:
        raise CapGenError(
            f"Flickr8k is not in {data_dir() / 'flickr8k'}",
            "run: capgen download flickr8k (no account needed); or set CAPGEN_FLICKR8K to a folder "
            "that holds it",
        )
    return folder


def _find_shapes(root: Path | None, count: int = 3800, seed: int = 0) -> Path:
    """Return the folder of the generated data set; generate it if needed, which takes seconds."""
    default = data_dir() / f"shapes-{shapes.version(count, seed)}"
    target = Path(root) if root is not None else default
    if target.is_dir() and any(target.iterdir()):
        return target
    with explain_os_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".shapes.", dir=target.parent) as holder:
            shapes.generate(Path(holder) / "shapes", count, seed)
            try:
                os.rename(Path(holder) / "shapes", target)
            except OSError:
                if not target.is_dir():  # else another process was faster and generated the same
                    raise
    return target


def _need_folder(root: Path | None) -> Path:
    if root is None or not Path(root).is_dir():
        raise CapGenError(
            f"the folder {root} does not exist" if root else "the data set 'folder' needs a folder",
            "name a folder that holds images and captions.csv with the columns image,caption",
        )
    return Path(root)


# A CLIP is trained on many more images than a captioner, and on other scenes than those of shapes.
_find_many_shapes = partial(_find_shapes, count=15_000, seed=1)
_find_flickr30k, _find_coco = partial(locate, "flickr30k"), partial(locate, "coco")

DATASETS: dict[str, Dataset] = {
    "shapes": Dataset(layouts.read_shapes, _find_shapes, _find_shapes),
    "many_shapes": Dataset(layouts.read_shapes, _find_many_shapes, _find_many_shapes),
    "flickr8k": Dataset(layouts.read_flickr8k, _find_flickr8k, download_flickr8k),
    "flickr30k": Dataset(layouts.read_flickr30k, _find_flickr30k, _find_flickr30k),
    "coco": Dataset(layouts.read_coco, _find_coco, _find_coco),
    "folder": Dataset(layouts.read_folder, _need_folder, _need_folder),
}


def _get(name: str) -> Dataset:
    if name not in DATASETS:
        raise CapGenError(f"there is no data set {name!r}", f"choose one of {', '.join(DATASETS)}")
    return DATASETS[name]


def load_dataset(name: str, root: Path | None = None, limit: int | None = None) -> Manifest:
    """Return a data set as a manifest, offline; ``shapes`` is generated if it is missing.

    Args:
        name: a key of ``DATASETS``.
        root: the folder that holds the data; required for ``folder``, else the usual folders are
            searched.
        limit: keep only this many images of each split.

    Raises:
        CapGenError: there is no such data set, or it is not found or damaged; says what to do.
    """
    dataset = _get(name)
    return dataset.read(dataset.find(root)).limit(limit)


def download_dataset(name: str, root: Path | None = None) -> Path:
    """Return the folder of a data set; download or generate it first if needed.

    Args:
        name: a key of ``DATASETS``.
        root: the folder of the data set; by default in the data folder.

    Raises:
        CapGenError: it cannot be downloaded; says what to do.
    """
    return _get(name).download(root)
