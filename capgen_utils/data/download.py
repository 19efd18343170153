"""Getting Flickr8k without an account, way after way; and where to put what cannot be fetched."""

import importlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from capgen_utils.common.files import CapGenError, atomic_path, explain_os_errors, require_space
from capgen_utils.common.paths import data_dir
from capgen_utils.data.fetching import DamagedArchiveError, fetch, safe_extract
from capgen_utils.data.layouts import FLICKR8K_IMAGES, official_split, read_flickr8k
from capgen_utils.data.reading import folders

__all__ = ["download_flickr8k", "fetch", "find_flickr8k", "locate", "safe_extract"]


KAGGLE_INPUT = Path("/kaggle/input")
HANDLE = "adityajn105/flickr8k"
RELEASE = "https://github.com/jbrownlee/Datasets/releases/download/Flickr8k"
ARCHIVES = ("Flickr8k_text.zip", "Flickr8k_Dataset.zip")
MIN_IMAGES = 7_990  # of the 8,000 with a split: one or two may be missing from a copy, not more
SPACE = 2_500_000_000  # archive and unpacked images at the same time
STALE = 3600  # seconds; unpacking takes minutes, so an older half-made folder is what a kill left behind


def find_flickr8k(root: Path | None = None, kaggle_input: Path = KAGGLE_INPUT) -> Path | None:
    """Return the folder of a Flickr8k that is here already, or ``None``.

    Looked for in this order: ``root``; the environment variable CAPGEN_FLICKR8K; data sets attached
    to a Kaggle notebook; the data folder's ``flickr8k``.

    Raises:
        CapGenError: ``root`` or CAPGEN_FLICKR8K is given but is not a folder.
    """
    named = root or os.environ.get("CAPGEN_FLICKR8K")
    if named:
        folder = Path(named).expanduser()
        if not folder.is_dir():
            origin = "the folder given" if root else "CAPGEN_FLICKR8K"
            raise CapGenError(
                f"{origin}, {folder}, does not exist",
                "name the folder that holds Flickr8k's Images",
            )
        return folder
    attached = next(_attached(kaggle_input), None) if kaggle_input.is_dir() else None
    own = data_dir() / "flickr8k"
    return attached or (own if _has_content(own) else None)


def _has_content(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


def _attached(kaggle_input: Path) -> Iterator[Path]:
    """Yield folders with captions.txt and images of Flickr8k; Flickr30k has the same layout, so a
    file decides."""
    probe = next(name for name, split in official_split().items() if split == "test")
    for folder in folders(kaggle_input, depth=4):
        captions = (folder / "captions.txt").is_file() or (folder / "Flickr8k.token.txt").is_file()
        if captions and any((folder / name / probe).is_file() for name in FLICKR8K_IMAGES):
            yield folder


def download_flickr8k(target: Path | None = None, kaggle_input: Path = KAGGLE_INPUT) -> Path:
    """Return the folder of Flickr8k; where it is not here yet, download it first (about 1.1 GB, no
    account).

    Tried in order: kagglehub's public download; the GitHub release of jbrownlee/Datasets; the
    kaggle client, where a key is found. The folder appears only after its images and captions were
    checked.

    Args:
        target: where it shall be, or is already; the data folder's ``flickr8k`` by default.
        kaggle_input: where Kaggle mounts data sets.

    Raises:
        CapGenError: every way failed; says why each did, and what to do.
    """
    found = find_flickr8k(kaggle_input=kaggle_input) if target is None else Path(target)
    if found is not None and _has_content(found):
        _check_found(found)
        return found
    target = Path(target) if target is not None else data_dir() / "flickr8k"
    _clean_up(target)
    require_space(target.parent, SPACE, "Flickr8k")
    failures = []
    for name, way in WAYS.items():
        try:
            way(target)
            return target
        except (
            Exception,
            SystemExit,
        ) as error:  # a library's sys.exit must not end the ways that are left
            problem = (
                error.problem
                if isinstance(error, CapGenError)
                else f"{type(error).__name__}: {error}"
            )
            failures.append(f"  {name}: {problem.strip()[:300]}")
    raise CapGenError(
        "Flickr8k could not be downloaded; tried\n" + "\n".join(failures),
        "(1) put a copy anywhere and set CAPGEN_FLICKR8K to its folder, which holds Images/ and captions.txt; or "
        "(2) on Kaggle, attach the data set adityajn105/flickr8k and switch the internet on; or "
        "(3) check the network and run `capgen download flickr8k` again: it goes on where it stopped",
    )


def _clean_up(target: Path) -> None:
    """Delete half-made folders that killed downloads left beside ``target``, and a link to a
    deleted cache."""
    if target.is_symlink() and not target.exists():
        target.unlink()
    for leftover in target.parent.glob(f".{target.name}.*.partial"):
        if time.time() - leftover.stat().st_mtime > STALE:
            shutil.rmtree(leftover, ignore_errors=True)


def _check_found(folder: Path) -> None:
    try:
        read_flickr8k(folder)
    except CapGenError as error:
        raise CapGenError(
            f"{folder} is there, but is no Flickr8k: {error.problem}",
            "move or delete that folder and run this again",
        ) from error


def _check(folder: Path) -> None:
    """Raise CapGenError unless ``folder`` holds practically all of Flickr8k."""
    manifest = read_flickr8k(folder)
    if len(manifest) < MIN_IMAGES:
        raise CapGenError(
            f"{folder} holds only {len(manifest):,} of the 8,000 images with captions",
            "delete it and download again",
        )


def _by_kagglehub(target: Path) -> None:
    """Use kagglehub's own cache: the target becomes a link to it, or a copy where links are not
    allowed."""
    kagglehub = importlib.import_module("kagglehub")
    cached = Path(kagglehub.dataset_download(HANDLE)).resolve()
    _check(cached)
    with atomic_path(target) as temporary:
        try:
            temporary.symlink_to(cached, target_is_directory=True)
        except OSError:
            require_space(target.parent, SPACE, "a copy of Flickr8k")
            shutil.copytree(cached, temporary)


def _by_github(target: Path) -> None:
    archives = [fetch(f"{RELEASE}/{name}", _downloads(target) / name) for name in ARCHIVES]
    _unpack(archives, target)


def _by_kaggle_client(target: Path) -> None:
    keys = Path(os.environ.get("KAGGLE_CONFIG_DIR") or Path.home() / ".kaggle") / "kaggle.json"
    if (
        not (os.environ.get("KAGGLE_USERNAME") and os.environ.get("KAGGLE_KEY"))
        and not keys.is_file()
    ):
        raise CapGenError("no Kaggle key was found", "set KAGGLE_USERNAME and KAGGLE_KEY")
    kaggle = importlib.import_module("kaggle")  # the import itself may exit where there is no key
    folder = _downloads(target)
    with explain_os_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    kaggle.api.dataset_download_files(HANDLE, path=str(folder), quiet=False)
    _unpack([folder / "flickr8k.zip"], target)


WAYS: dict[str, Callable[[Path], None]] = {
    "kagglehub": _by_kagglehub,
    "GitHub": _by_github,
    "kaggle client": _by_kaggle_client,
}


def _downloads(target: Path) -> Path:
    return target.parent / "downloads"


def _unpack(archives: list[Path], target: Path) -> None:
    """Unpack and check beside ``target``, rename, and only then delete the archives."""
    with atomic_path(target) as temporary:
        temporary.mkdir()
        for archive in archives:
            try:
                safe_extract(archive, temporary / archive.stem)
            except DamagedArchiveError:
                archive.unlink(missing_ok=True)  # so that the next attempt fetches it anew
                raise
        _check(temporary)
    for archive in archives:
        archive.unlink(missing_ok=True)


GUIDES = {
    "flickr30k": "get the images and dataset_flickr30k.json (or results.csv) from https://shannon.cs.illinois.edu/"
    "DenotationGraph/ or from Kaggle's hsankesara/flickr-image-dataset, and lay them out as {folder}/flickr30k_images/ "
    "and {folder}/dataset_flickr30k.json (or {folder}/results.csv)",
    "coco": "get train2017.zip, val2017.zip and annotations_trainval2017.zip from https://cocodataset.org/#download and"
    " unpack them as {folder}/train2017/, {folder}/val2017/ and {folder}/annotations/; or the 2014 images with "
    "Karpathy's dataset_coco.json as {folder}/train2014/, {folder}/val2014/ and {folder}/dataset_coco.json",
}


def locate(name: str, root: Path | None = None) -> Path:
    """Return the folder of a large data set that only the user can fetch: ``root``, or the data
    folder's ``name``.

    Raises:
        CapGenError: there is no such folder; says where to get the data and how to lay it out.
    """
    folder = Path(root) if root is not None else data_dir() / name
    if not folder.is_dir():
        raise CapGenError(f"{name} is not in {folder}", GUIDES[name].format(folder=folder))
    return folder
