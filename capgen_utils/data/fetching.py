"""Files from the network and from archives: resumed, checked, and never trusted."""

import os
import shutil
import stat
import time
import zipfile
import zlib
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import requests
from tqdm.auto import tqdm

from capgen_utils.common.files import (
    CapGenError,
    atomic_path,
    explain_os_errors,
    require_space,
    sha256_file,
)

ATTEMPTS = 5  # in a row that bring nothing new
PAUSE = 1.0  # seconds before the second attempt; doubled each time
TIMEOUT = (15, 60)  # seconds to connect, and between two pieces of data
PIECE = 1 << 16  # bytes at a time; a piece that breaks off is lost, so it is small
MAX_DOWNLOAD = 50 * 10**9
MAX_UNPACKED = 40 * 10**9


MAX_RATIO = (
    100  # photographs hardly shrink and captions shrink to a third: a hundredfold archive is a bomb
)


AGAIN = "check the network and run the command again: it goes on where it stopped"


class DamagedArchiveError(CapGenError):
    """An archive that another download may mend."""


class _Retry(Exception):
    """A failure that another attempt may mend."""


def fetch(
    url: str, target: Path, sha256: str | None = None, expected_size: int | None = None
) -> Path:
    """Download ``url`` to ``target``, with a progress bar.

    Data gathers in ``target``'s name plus ``.part``, from where a later call goes on; ``target``
    appears, in one rename, only when all of it is there. A ``target`` that passes the checks is not
    fetched again.

    Args:
        url: http or https.
        target: the file to write.
        sha256: 64 hexadecimal digits that the content must have.
        expected_size: bytes that it must have.

    Raises:
        CapGenError: refused by the server, no connection after several attempts, wrong size or
            checksum, or no room on the disk.
    """
    target = Path(target)
    if target.is_file() and _passes(target, sha256, expected_size):
        return target
    partial = target.with_name(target.name + ".part")
    with explain_os_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    reason, failures, most = "", 0, _size(partial)
    while failures < ATTEMPTS:
        try:
            _fetch_once(url, partial, expected_size)
            if not _passes(partial, sha256, expected_size):
                partial.unlink()
                raise _Retry("what came has the wrong checksum or size")
            os.replace(partial, target)
            return target
        except (_Retry, requests.RequestException) as error:
            reason = str(error)
        # A long download over a bad line may break any number of times, as long as it gets on.
        failures = 0 if _size(partial) > most else failures + 1
        most = max(most, _size(partial))
        time.sleep(PAUSE * 2**failures if failures < ATTEMPTS else 0)
    raise CapGenError(
        f"cannot download {url} after {ATTEMPTS} attempts in vain: {reason[:300]}", AGAIN
    )


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _passes(path: Path, sha256: str | None, expected_size: int | None) -> bool:
    if expected_size is not None and path.stat().st_size != expected_size:
        return False
    return sha256 is None or sha256_file(path) == sha256.lower()


def _fetch_once(url: str, partial: Path, expected_size: int | None) -> None:
    """Fetch what ``partial`` lacks; returns only when the server's whole file is there."""
    have = _size(partial)
    # "identity": a compressed transfer would make the server's length and ours two different
    # things.
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
        if response.status_code == 416:
            if response.headers.get("Content-Range", "") == f"bytes */{have}":
                return  # nothing is missing
            partial.unlink(missing_ok=True)
            raise _Retry("the file on the server has changed: starting over")
        _check_status(url, response.status_code)
        start = f"bytes {have}-"
        resumed = response.status_code == 206 and response.headers.get(
            "Content-Range", ""
        ).startswith(start)
        if response.status_code == 206 and not resumed:
            partial.unlink(missing_ok=True)
            raise _Retry("the server sent another part than the one asked for: starting over")
        done = have if resumed else 0
        length = response.headers.get("Content-Length", "")
        total = done + int(length) if length.isdigit() else None
        if expected_size is not None and total is not None and total != expected_size:
            partial.unlink(missing_ok=True)
            raise CapGenError(
                f"{url} has {total:,} bytes instead of {expected_size:,}",
                "the file has changed: get it elsewhere",
            )
        require_space(
            partial.parent, (total or expected_size or done) - done, f"downloading {partial.stem}"
        )
        _append(response, partial, done, total or expected_size)
    if total is not None and partial.stat().st_size != total:
        raise _Retry(f"the connection ended after {partial.stat().st_size:,} of {total:,} bytes")


def _check_status(url: str, status: int) -> None:
    if status in (200, 206):
        return
    if status == 429 or status >= 500:
        raise _Retry(f"the server answered {status}")
    raise CapGenError(
        f"cannot download {url}: the server answered {status}", "check the address in a browser"
    )


def _append(response: requests.Response, partial: Path, done: int, total: int | None) -> None:
    """Write the body behind the first ``done`` bytes of ``partial``; what is behind them is cut
    off."""
    bar = tqdm(total=total, initial=done, unit="B", unit_scale=True, desc=partial.stem)
    with bar, _open_partial(partial, done) as stream:
        for piece in response.iter_content(PIECE):
            done += len(piece)
            if done > (total or MAX_DOWNLOAD):
                raise _Retry("the server sent more than it announced")
            _write(stream, piece, partial)
            bar.update(len(piece))


def _open_partial(path: Path, keep: int) -> BinaryIO:
    """Open ``path`` for writing behind its first ``keep`` bytes."""
    with explain_os_errors(path):
        stream = open(path, "r+b" if keep else "wb")  # noqa: SIM115
        stream.truncate(keep)
        stream.seek(keep)
        return stream


def _write(stream: BinaryIO, piece: bytes, path: Path) -> None:
    with explain_os_errors(path):
        stream.write(piece)


# --- archives


def safe_extract(archive: Path, folder: Path, limit: int = MAX_UNPACKED) -> None:
    """Unpack a zip file to ``folder``, in one atomic step.

    Everything is checked before anything is written: names that lead out of the folder, links,
    devices and encrypted entries are refused, and so is an archive that unpacks to more than
    ``limit`` bytes or to more than a hundred times its own size. Mac OS's ``__MACOSX`` and hidden
    files are skipped.

    Raises:
        DamagedArchiveError: not a zip file, or bytes in it are wrong.
        CapGenError: refused, or no room on the disk.
    """
    archive, folder = Path(archive), Path(folder)
    remedy = "delete it and download it again from a source that you trust"
    try:
        with zipfile.ZipFile(archive) as source:
            entries = [entry for entry in source.infolist() if _wanted(entry)]
            _check_entries(archive, entries, limit)
            require_space(
                folder.parent,
                sum(entry.file_size for entry in entries),
                f"unpacking {archive.name}",
            )
            with atomic_path(folder) as temporary:
                temporary.mkdir()
                for entry in tqdm(entries, desc=f"unpacking {archive.name}", unit="file"):
                    _extract_entry(source, entry, temporary)
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        raise DamagedArchiveError(
            f"{archive} is damaged or not a zip file ({error})", remedy
        ) from error
    except OSError as error:
        raise CapGenError(f"cannot read {archive}: {error.strerror or error}", remedy) from error


def _wanted(entry: zipfile.ZipInfo) -> bool:
    parts = PurePosixPath(entry.filename).parts
    return (
        not entry.is_dir()
        and "__MACOSX" not in parts
        and not (parts and parts[-1].startswith("._"))
    )


def _check_entries(archive: Path, entries: list[zipfile.ZipInfo], limit: int) -> None:
    remedy = "do not unpack it: it was made to do harm, or damaged; download it from a source that you trust"
    seen: set[str] = set()
    for entry in entries:
        name = entry.filename
        parts = PurePosixPath(name).parts
        kind = stat.S_IFMT(entry.external_attr >> 16)
        if (
            not parts
            or name.startswith("/")
            or ".." in parts
            or "\\" in name
            or ":" in name
            or not name.isprintable()
        ):
            raise CapGenError(
                f"{archive} holds {name[:100]!r}, which leads out of the folder", remedy
            )
        if kind not in (0, stat.S_IFREG) or entry.flag_bits & 1:
            raise CapGenError(
                f"{archive} holds {name[:100]!r}, which is a link, a device or encrypted", remedy
            )
        if name in seen:
            raise CapGenError(f"{archive} holds {name[:100]!r} twice", remedy)
        seen.add(name)
    total = sum(entry.file_size for entry in entries)
    if total > limit or total > MAX_RATIO * max(archive.stat().st_size, 10_000):
        raise CapGenError(f"{archive} would unpack to {total / 1e9:.2f} GB", remedy)


def _extract_entry(source: zipfile.ZipFile, entry: zipfile.ZipInfo, folder: Path) -> None:
    """Write one entry; zipfile stops at the announced size and checks the CRC."""
    target = folder / entry.filename
    target.parent.mkdir(parents=True, exist_ok=True)
    with source.open(entry) as stream, open(target, "xb") as out:
        shutil.copyfileobj(stream, out, PIECE)
