"""Download Flickr8k without an account, and say how to get what must be fetched by hand."""

import importlib
import os
import shutil
import stat
import time
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import pooch
import requests
from tqdm.auto import tqdm

from capgen_utils.common.files import CapGenError, atomic_path, explain_os_errors, require_space
from capgen_utils.common.paths import data_dir
from capgen_utils.data.layouts import FLICKR8K_IMAGES, official_split, read_flickr8k
from capgen_utils.data.reading import folders, safe_name

ATTEMPTS = 5
TIMEOUT = (15, 60)  # seconds to connect, and between two chunks of data
CHUNK = 1 << 16  # bytes
MAX_UNPACKED = 40 * 10**9  # bytes
MAX_RATIO = 100  # photographs hardly shrink, captions to a third: above this it is a zip bomb

KAGGLE_INPUT = Path("/kaggle/input")
HANDLE = "adityajn105/flickr8k"
RELEASE = "https://github.com/jbrownlee/Datasets/releases/download/Flickr8k"
ARCHIVES = {
    "Flickr8k_text.zip": "md5:bf6c1abcb8e4a833b7f922104de18627",
    "Flickr8k_Dataset.zip": "md5:f18a1e2920de5bd84dae7cf08ec78978",
}
MIN_IMAGES = 7_990  # of the 8,000 in the official splits: a copy may lack one or two, not more
SPACE = 2_500_000_000  # bytes for the archives and the unpacked images together
_HOSTILE = "do not unpack it, it is hostile or damaged; download it from a source that you trust"
STALE = 3600  # seconds after which a partial file or folder can only be left over from a kill


class DamagedArchiveError(CapGenError):
    """The archive is damaged; downloading it again may help."""


# --- one file


def _ask(url: str, *arguments: Any) -> Any:
    """Download with a progress bar; do not ask again if the server refuses to give the file."""
    try:
        return pooch.HTTPDownloader(True, CHUNK, timeout=TIMEOUT)(url, *arguments)
    except requests.HTTPError as error:
        status = getattr(error.response, "status_code", 500)
        if status == 429 or status >= 500:
            raise
        raise CapGenError(
            f"cannot download {url}: the server answered {status}", "check the address in a browser"
        ) from error


def fetch(url: str, target: Path, known_hash: str | None = None) -> Path:
    """Download ``url`` to ``target``; a target that has the known hash is not downloaded again.

    A download that breaks off starts over, up to ``ATTEMPTS`` times. ``target`` only appears once
    the download is complete and its hash is right.

    Args:
        url: http or https.
        target: the file to write.
        known_hash: hexadecimal SHA-256, or another algorithm's as ``md5:...``.

    Raises:
        CapGenError: the server refuses, every attempt failed, the hash is wrong, or the disk is
            full.
    """
    name = target.name
    source = pooch.Pooch(target.parent, "", {name: known_hash}, {name: url}, ATTEMPTS - 1)
    with explain_os_errors(target):
        try:
            source.fetch(name, downloader=_ask)
        except (requests.RequestException, ValueError) as error:  # ValueError: the hash is wrong
            raise CapGenError(
                f"cannot download {url} after {ATTEMPTS} attempts: {str(error)[:300]}",
                "check the network and run the command again",
            ) from error
    return target


# --- archives


def safe_extract(archive: Path, folder: Path, limit: int = MAX_UNPACKED) -> None:
    """Unpack a zip file to ``folder``, in one atomic step.

    Everything is checked before anything is written. Refused are names that lead out of the
    folder, links, devices, encrypted entries, and archives that unpack to more than ``limit`` bytes
    or to more than a hundred times their own size. Mac OS's ``__MACOSX`` and ``._`` files are
    skipped.

    Raises:
        DamagedArchiveError: not a zip file, or its content is damaged.
        CapGenError: refused, or the disk is full.
    """
    remedy = "delete it and download it again from a source that you trust"
    try:
        with zipfile.ZipFile(archive) as source:
            entries = [entry for entry in source.infolist() if _is_wanted(entry)]
            names = [safe_name(entry.filename, archive, _HOSTILE) for entry in entries]
            size = _checked_size(archive, entries, names, limit)
            require_space(folder.parent, size, f"unpacking {archive.name}")
            with atomic_path(folder) as temporary:
                temporary.mkdir()
                bar = tqdm(entries, desc=f"unpacking {archive.name}", unit="file")
                for entry, name in zip(bar, names, strict=True):
                    (temporary / name).parent.mkdir(parents=True, exist_ok=True)
                    # zipfile stops at the announced size and checks the CRC
                    with source.open(entry) as stream, open(temporary / name, "xb") as out:
                        shutil.copyfileobj(stream, out, CHUNK)
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        raise DamagedArchiveError(
            f"{archive} is damaged or not a zip file ({error})", remedy
        ) from error
    except OSError as error:
        raise CapGenError(f"cannot read {archive}: {error.strerror or error}", remedy) from error


def _is_wanted(entry: zipfile.ZipInfo) -> bool:
    path = PurePosixPath(entry.filename)
    return not (entry.is_dir() or "__MACOSX" in path.parts or path.name.startswith("._"))


def _checked_size(
    archive: Path, entries: list[zipfile.ZipInfo], names: list[str], limit: int
) -> int:
    """Return the size of all entries in bytes; refuse hostile ones. ``names`` will be written."""
    special = [
        name
        for entry, name in zip(entries, names, strict=True)
        if stat.S_IFMT(entry.external_attr >> 16) not in (0, stat.S_IFREG) or entry.flag_bits & 1
    ]
    twice = [name for name, times in Counter(names).items() if times > 1]
    size = sum(entry.file_size for entry in entries)
    problem = ""
    if special:
        problem = f"holds {special[0][:100]!r}, which is a link, a device or encrypted"
    elif twice:
        problem = f"holds {twice[0][:100]!r} twice"
    elif size > min(limit, MAX_RATIO * max(archive.stat().st_size, 10_000)):
        problem = f"would unpack to {size / 1e9:.2f} GB"
    if problem:
        raise CapGenError(f"{archive} {problem}", _HOSTILE)
    return size


# --- Flickr8k


def find_flickr8k(root: Path | None = None, kaggle_input: Path = KAGGLE_INPUT) -> Path | None:
    """Return the folder of a Flickr8k that is already on this machine, or ``None``.

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
    downloaded = data_dir() / "flickr8k"
    return attached or (downloaded if _has_content(downloaded) else None)


def _has_content(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


def _attached(kaggle_input: Path) -> Iterator[Path]:
    """Yield folders that hold Flickr8k.

    Flickr30k has the same layout, so one of Flickr8k's file names decides.
    """
    probe = next(name for name, split in official_split().items() if split == "test")
    for folder in folders(kaggle_input, depth=4):
        captions = (folder / "captions.txt").is_file() or (folder / "Flickr8k.token.txt").is_file()
        if captions and any((folder / name / probe).is_file() for name in FLICKR8K_IMAGES):
            yield folder


def download_flickr8k(target: Path | None = None, kaggle_input: Path = KAGGLE_INPUT) -> Path:
    """Return the folder of Flickr8k; download it first if needed (about 1.1 GB, no account).

    Tried in order: kagglehub's public download; the GitHub release of jbrownlee/Datasets; the
    Kaggle client, if there is a key. The folder appears only after its images and captions have
    been checked.

    Args:
        target: the folder of Flickr8k; the data folder's ``flickr8k`` by default.
        kaggle_input: the folder in which Kaggle mounts data sets.

    Raises:
        CapGenError: every way failed; says why each did, and what to do.
    """
    folder = find_flickr8k(kaggle_input=kaggle_input) if target is None else Path(target)
    if folder is not None and _has_content(folder):
        try:
            read_flickr8k(folder)
        except CapGenError as error:
            raise CapGenError(
                f"{folder} exists but is not Flickr8k: {error.problem}",
                "move or delete that folder and run this again",
            ) from error
        return folder
    target = Path(target) if target is not None else data_dir() / "flickr8k"
    _clean_up(target)
    require_space(target.parent, SPACE, "Flickr8k")
    failures = []
    for name, way in WAYS.items():
        try:
            way(target)
            return target
        except (Exception, SystemExit) as error:  # the Kaggle client exits if it finds no key
            problem = getattr(error, "problem", f"{type(error).__name__}: {error}")
            failures.append(f"  {name}: {problem.strip()[:300]}")
    raise CapGenError(
        "Flickr8k could not be downloaded; tried\n" + "\n".join(failures),
        "(1) put a copy anywhere and set CAPGEN_FLICKR8K to its folder, which holds Images/ and "
        "captions.txt; or (2) on Kaggle, attach the data set adityajn105/flickr8k and switch the "
        "internet on; or (3) check the network and run `capgen download flickr8k` again",
    )


def _clean_up(target: Path) -> None:
    """Delete what killed downloads left beside ``target``, and a link to a deleted cache."""
    if target.is_symlink() and not target.exists():
        target.unlink()
    leftovers = [
        *target.parent.glob(f".{target.name}.*.partial"),
        *_downloads(target).glob("tmp*"),  # pooch's temporary files
    ]
    for leftover in leftovers:
        if time.time() - leftover.stat().st_mtime > STALE:
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


def _check_complete(folder: Path) -> None:
    """Raise CapGenError unless ``folder`` holds practically all of Flickr8k."""
    count = len(read_flickr8k(folder))
    if count < MIN_IMAGES:
        raise CapGenError(
            f"{folder} holds only {count:,} of the 8,000 images with captions",
            "delete it and download again",
        )


def _by_kagglehub(target: Path) -> None:
    """Link ``target`` to kagglehub's own cache, or copy it if links are not allowed."""
    cached = Path(importlib.import_module("kagglehub").dataset_download(HANDLE)).resolve()
    _check_complete(cached)
    with atomic_path(target) as temporary:
        try:
            temporary.symlink_to(cached, target_is_directory=True)
        except OSError:
            require_space(target.parent, SPACE, "a copy of Flickr8k")
            shutil.copytree(cached, temporary)


def _downloads(target: Path) -> Path:
    return target.parent / "downloads"


def _by_github(target: Path) -> None:
    folder = _downloads(target)
    archives = [fetch(f"{RELEASE}/{name}", folder / name, md5) for name, md5 in ARCHIVES.items()]
    _unpack(archives, target)


def _by_kaggle_client(target: Path) -> None:
    keys = Path(os.environ.get("KAGGLE_CONFIG_DIR") or Path.home() / ".kaggle") / "kaggle.json"
    in_environment = os.environ.get("KAGGLE_USERNAME") and os.environ.get("KAGGLE_KEY")
    if not in_environment and not keys.is_file():
        raise CapGenError("no Kaggle key was found", "set KAGGLE_USERNAME and KAGGLE_KEY")
    kaggle = importlib.import_module("kaggle")  # exits on import if it finds no key
    folder = _downloads(target)
    with explain_os_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    kaggle.api.dataset_download_files(HANDLE, path=str(folder), quiet=False)
    _unpack([folder / "flickr8k.zip"], target)


WAYS: dict[str, Callable[[Path], None]] = {
    "kagglehub": _by_kagglehub,
    "GitHub": _by_github,
    "Kaggle client": _by_kaggle_client,
}


def _unpack(archives: list[Path], target: Path) -> None:
    """Unpack and check beside ``target``, rename, and only then delete the archives."""
    with atomic_path(target) as temporary:
        temporary.mkdir()
        for archive in archives:
            try:
                safe_extract(archive, temporary / archive.stem)
            except DamagedArchiveError:
                archive.unlink(missing_ok=True)  # so that the next attempt downloads it again
                raise
        _check_complete(temporary)
    for archive in archives:
        archive.unlink(missing_ok=True)


# --- data sets that must be fetched by hand

GUIDES = {
    "flickr30k": "get the images and dataset_flickr30k.json (or results.csv) from "
    "https://shannon.cs.illinois.edu/DenotationGraph/ or from Kaggle's "
    "hsankesara/flickr-image-dataset, and lay them out as {folder}/flickr30k_images/ and "
    "{folder}/dataset_flickr30k.json (or {folder}/results.csv)",
    "coco": "get train2017.zip, val2017.zip and annotations_trainval2017.zip from "
    "https://cocodataset.org/#download and unpack them as {folder}/train2017/, {folder}/val2017/ "
    "and {folder}/annotations/; or the 2014 images with Karpathy's dataset_coco.json as "
    "{folder}/train2014/, {folder}/val2014/ and {folder}/dataset_coco.json",
}


def locate(name: str, root: Path | None = None) -> Path:
    """Return the folder of a large data set: ``root``, or the data folder's ``name``.

    Raises:
        CapGenError: there is no such folder; says where to get the data and how to lay it out.
    """
    folder = Path(root) if root is not None else data_dir() / name
    if not folder.is_dir():
        raise CapGenError(f"{name} is not in {folder}", GUIDES[name].format(folder=folder))
    return folder
