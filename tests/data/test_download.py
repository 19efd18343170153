"""Downloads that break off, hostile archives, and the order of the ways to Flickr8k."""

import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
import zipfile
from collections import namedtuple
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from capgen_utils.common.files import CapGenError, sha256_file
from capgen_utils.data import download, layouts
from capgen_utils.data.datasets import download_dataset, load_dataset
from capgen_utils.data.download import download_flickr8k, fetch, find_flickr8k, safe_extract

BODY = bytes(range(256)) * 4000  # 1 MB
OFFICIAL = layouts.official_split()
NAMES = [
    next(name for name, s in OFFICIAL.items() if s == split) for split in ("train", "dev", "test")
]
Usage = namedtuple("Usage", "total used free")


class Server:
    """A web server on this machine whose faults the test chooses."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {"/file.bin": BODY}
        self.cuts: list[int] = []  # bytes after which the next answers break off
        self.statuses: list[int] = []  # what the next answers are instead
        self.requests = 0
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.answer(self)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/file.bin"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        self.requests += 1
        body = self.files.get(handler.path)
        if self.statuses or body is None:
            handler.send_error(self.statuses.pop(0) if self.statuses else 404)
            return
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body[: self.cuts.pop(0)] if self.cuts else body)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


@pytest.fixture(autouse=True)
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No pauses, no keys, no data from outside; returns the data folder."""
    monkeypatch.setattr("pooch.core.time", SimpleNamespace(sleep=lambda _: None))
    for name in ("CAPGEN_FLICKR8K", "KAGGLE_USERNAME", "KAGGLE_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("KAGGLE_CONFIG_DIR", str(tmp_path / "no-keys"))
    monkeypatch.setenv("CAPGEN_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(download, "MIN_IMAGES", len(NAMES))
    monkeypatch.setattr(download, "KAGGLE_INPUT", tmp_path / "no-kaggle")
    return tmp_path / "data"


# --- fetch


def test_fetch_writes_the_file_and_nothing_else(server: Server, tmp_path: Path) -> None:
    target = tmp_path / "new" / "file.bin"
    assert fetch(server.url, target) == target
    assert target.read_bytes() == BODY and list(target.parent.iterdir()) == [target]
    digest = sha256_file(target)
    fetch(server.url, target, digest)
    assert server.requests == 1, "a file with the known hash was downloaded again"
    target.write_bytes(b"altered")
    fetch(server.url, target, digest)
    assert target.read_bytes() == BODY


def test_fetch_starts_over_after_broken_connections(server: Server, tmp_path: Path) -> None:
    server.cuts = [100_000] * (download.ATTEMPTS - 1)
    fetch(server.url, tmp_path / "file.bin")
    assert (tmp_path / "file.bin").read_bytes() == BODY and server.requests == download.ATTEMPTS


@pytest.mark.parametrize("status", [429, 500, 503])
def test_fetch_tries_again_when_the_server_is_busy(
    server: Server, tmp_path: Path, status: int
) -> None:
    server.statuses = [status, status]
    fetch(server.url, tmp_path / "file.bin")
    assert server.requests == 3


@pytest.mark.parametrize("status", [401, 403, 404, 410])
def test_fetch_gives_up_at_once_when_refused(server: Server, tmp_path: Path, status: int) -> None:
    server.statuses = [status]
    with pytest.raises(CapGenError, match=str(status)):
        fetch(server.url, tmp_path / "file.bin")
    assert server.requests == 1 and list(tmp_path.iterdir()) == []


def test_fetch_that_never_gets_it_all_leaves_nothing(server: Server, tmp_path: Path) -> None:
    server.cuts = [1000] * download.ATTEMPTS
    with pytest.raises(CapGenError, match=f"{download.ATTEMPTS} attempts"):
        fetch(server.url, tmp_path / "file.bin")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("known_hash", ["0" * 64, "md5:" + "0" * 32])
def test_fetch_refuses_a_wrong_hash(server: Server, tmp_path: Path, known_hash: str) -> None:
    with pytest.raises(CapGenError, match="known hash"):
        fetch(server.url, tmp_path / "file.bin", known_hash)
    assert list(tmp_path.iterdir()) == []


def test_fetch_without_a_server(tmp_path: Path) -> None:
    server = Server()
    server.http.shutdown()
    server.http.server_close()
    with pytest.raises(CapGenError, match="check the network"):
        fetch(server.url, tmp_path / "file.bin")
    assert list(tmp_path.iterdir()) == []


def test_fetch_says_that_the_disk_is_full(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(download.pooch.HTTPDownloader, "__call__", full)
    with pytest.raises(CapGenError, match="No space left"):
        fetch(server.url, tmp_path / "file.bin")
    assert list(tmp_path.iterdir()) == []


# --- safe_extract


def archive_of(path: Path, **files: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def test_extract_unpacks_and_skips_what_mac_os_adds(tmp_path: Path) -> None:
    files = {
        "a.txt": b"1",
        "sub/b.txt": b"2",
        "sub/._b.txt": b"3",
        "__MACOSX/sub/c": b"4",
        "empty/": b"",
    }
    safe_extract(archive_of(tmp_path / "z.zip", **files), tmp_path / "out")
    found = {
        p.relative_to(tmp_path / "out").as_posix(): p.read_bytes()
        for p in (tmp_path / "out").rglob("*.txt")
    }
    assert found == {"a.txt": b"1", "sub/b.txt": b"2"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "z.zip"]


@pytest.mark.parametrize(
    "name",
    [
        "../evil",
        "a/../../evil",
        "/evil",
        "..\\evil",
        "C:/evil",
        "a/..",
        "a\nb",
        "./../evil",
        "a\\..\\..\\b",
    ],
)
def test_extract_refuses_names_that_lead_out(tmp_path: Path, name: str) -> None:
    archive = archive_of(tmp_path / "in" / "z.zip", **{"fine.txt": b"fine", name: b"evil"})
    with pytest.raises(CapGenError, match="not a file name inside"):
        safe_extract(archive, tmp_path / "in" / "out")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["in", "z.zip"]


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR])
def test_extract_refuses_links_and_devices(tmp_path: Path, kind: int) -> None:
    entry = zipfile.ZipInfo("link")
    entry.create_system, entry.external_attr = 3, (kind | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as archive:
        archive.writestr(entry, "/etc/passwd")
    with pytest.raises(CapGenError, match="is a link"):
        safe_extract(tmp_path / "z.zip", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_extract_refuses_bombs_by_ratio_and_by_size(tmp_path: Path) -> None:
    bomb = archive_of(tmp_path / "bomb.zip", zeros=bytes(20_000_000))
    with pytest.raises(CapGenError, match="unpack to 0.02 GB"):
        safe_extract(bomb, tmp_path / "out")
    many = archive_of(tmp_path / "many.zip", a=os.urandom(6000), b=os.urandom(6000))
    with pytest.raises(CapGenError, match="unpack to"):
        safe_extract(many, tmp_path / "out", limit=10_000)
    assert not (tmp_path / "out").exists()


def test_extract_stops_at_the_announced_size(tmp_path: Path) -> None:
    bomb = archive_of(tmp_path / "liar.zip", zeros=bytes(20_000_000))
    raw = bomb.read_bytes().replace((20_000_000).to_bytes(4, "little"), (10).to_bytes(4, "little"))
    bomb.write_bytes(raw)
    with pytest.raises(CapGenError, match="damaged"):
        safe_extract(bomb, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["liar.zip"]


def test_extract_refuses_damaged_archives(tmp_path: Path) -> None:
    archive = archive_of(tmp_path / "z.zip", a=os.urandom(50_000))
    content = bytearray(archive.read_bytes())
    content[20_000] ^= 0xFF
    for damaged in (content, content[:30_000], b"", b"<html>not found</html>"):
        archive.write_bytes(damaged)
        with pytest.raises(download.DamagedArchiveError, match="damaged or not a zip"):
            safe_extract(archive, tmp_path / "out")
        assert [p.name for p in tmp_path.iterdir()] == ["z.zip"]
    with pytest.raises(CapGenError, match="No such file"):
        safe_extract(tmp_path / "missing.zip", tmp_path / "out")


def test_extract_refuses_an_entry_twice(tmp_path: Path) -> None:
    with (
        zipfile.ZipFile(tmp_path / "z.zip", "w") as archive,
        pytest.warns(UserWarning, match="Duplicate"),
    ):
        archive.writestr("a", "1")
        archive.writestr("a", "2")
    with pytest.raises(CapGenError, match="'a' twice"):
        safe_extract(tmp_path / "z.zip", tmp_path / "out")


@pytest.mark.parametrize("other", [" x.jpg", "x.jpg ", ".//x.jpg"])
def test_extract_refuses_two_entries_that_become_one_file(tmp_path: Path, other: str) -> None:
    archive = archive_of(tmp_path / "z.zip", **{"x.jpg": b"1", other: b"2"})
    with pytest.raises(CapGenError, match="'x.jpg' twice.*\n.*do not unpack it"):
        safe_extract(archive, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["z.zip"]


def test_extract_on_a_full_disk_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = archive_of(tmp_path / "z.zip", a=os.urandom(1000), b=os.urandom(1000))

    def full(source: object, out: object, length: int = 0) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfileobj", full)
        with pytest.raises(CapGenError, match="No space left"):
            safe_extract(archive, tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: Usage(10, 9, 1))
        with pytest.raises(CapGenError, match="are free"):
            safe_extract(archive, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["z.zip"]


KILLED = """
import sys, time
from pathlib import Path
from capgen_utils.data import download
def hang(source, out, length):
    out.write(b"half"); out.flush()
    print("writing", flush=True)
    time.sleep(60)
download.shutil.copyfileobj = hang
download.safe_extract(Path(sys.argv[1]), Path(sys.argv[2]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGKILL")
def test_a_kill_while_unpacking_leaves_nothing_that_looks_complete(
    quick: Path, tmp_path: Path
) -> None:
    archive = archive_of(tmp_path / "z.zip", **flickr8k_files())
    command = [sys.executable, "-c", KILLED, str(archive), str(quick / "flickr8k")]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert child.stdout is not None and child.stdout.readline() == b"writing\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    assert (
        not (quick / "flickr8k").exists() and find_flickr8k(kaggle_input=tmp_path / "none") is None
    )
    (leftover,) = quick.iterdir()
    assert leftover.name.endswith(".partial")
    (quick / "downloads").mkdir()
    half = quick / "downloads" / "tmp123"
    half.write_bytes(b"half an archive")
    download._clean_up(quick / "flickr8k")
    assert leftover.exists() and half.exists(), "they may belong to a download that still runs"
    for path in (leftover, half):
        os.utime(path, (1, 1))
    download._clean_up(quick / "flickr8k")
    assert not leftover.exists() and not half.exists()


# --- the ways to Flickr8k


def flickr8k_files() -> dict[str, bytes]:
    rows = "".join(f"{name},A dog runs .\n" for name in NAMES)
    return {
        "captions.txt": b"image,caption\n" + rows.encode(),
        **{f"Images/{name}": b"image" for name in NAMES},
    }


def lay_out(folder: Path) -> Path:
    for name, content in flickr8k_files().items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def fake_module(monkeypatch: pytest.MonkeyPatch, name: str, **members: object) -> None:
    module = ModuleType(name)
    module.__dict__.update(members)
    monkeypatch.setitem(sys.modules, name, module)


def refuse(reason: str) -> Callable[..., Path]:
    def way(*_: object, **__: object) -> Path:
        raise RuntimeError(reason)

    return way


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_module(monkeypatch, "kagglehub", dataset_download=refuse("kagglehub is down"))
    monkeypatch.setattr(download, "fetch", refuse("GitHub is down"))


def test_what_is_here_is_found_in_order(
    quick: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kaggle = tmp_path / "kaggle"
    assert find_flickr8k(kaggle_input=kaggle) is None
    (quick / "flickr8k").mkdir(parents=True)
    assert find_flickr8k(kaggle_input=kaggle) is None, "an empty folder is no data set"
    own = lay_out(quick / "flickr8k")
    assert find_flickr8k(kaggle_input=kaggle) == own
    attached = lay_out(kaggle / "datasets" / "someone" / "flickr8k")
    assert find_flickr8k(kaggle_input=kaggle) == attached
    named = lay_out(tmp_path / "named")
    monkeypatch.setenv("CAPGEN_FLICKR8K", str(named))
    assert find_flickr8k(kaggle_input=kaggle) == named
    assert find_flickr8k(own, kaggle_input=kaggle) == own
    assert load_dataset("flickr8k").root == named / "Images"
    assert download_dataset("flickr8k") == named


def test_another_data_set_of_the_same_layout_is_not_taken(tmp_path: Path) -> None:
    folder = tmp_path / "kaggle" / "flickr30k"
    (folder / "Images").mkdir(parents=True)
    (folder / "Images" / "1000092795.jpg").write_bytes(b"image")
    (folder / "captions.txt").write_text("image,caption\n1000092795.jpg,Two men .\n")
    assert find_flickr8k(kaggle_input=tmp_path / "kaggle") is None


def test_a_named_folder_that_is_missing_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(CapGenError, match="the folder given"):
        load_dataset("flickr8k", tmp_path / "missing")
    monkeypatch.setenv("CAPGEN_FLICKR8K", str(tmp_path / "gone"))
    with pytest.raises(CapGenError, match="CAPGEN_FLICKR8K.*gone"):
        load_dataset("flickr8k")


def test_loading_never_downloads(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_module(
        monkeypatch,
        "kagglehub",
        dataset_download=lambda _: pytest.fail("load_dataset used the network"),
    )
    with pytest.raises(CapGenError, match="capgen download flickr8k"):
        load_dataset("flickr8k")


@pytest.mark.parametrize("links", [True, False])
def test_kagglehub_comes_first(
    quick: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    cached, asked = lay_out(tmp_path / "cache"), []
    fake_module(
        monkeypatch,
        "kagglehub",
        dataset_download=lambda handle: asked.append(handle) or str(cached),
    )
    monkeypatch.setattr(download, "fetch", refuse("not needed"))
    if not links:

        def forbidden(*_: object, **__: object) -> None:
            raise OSError(1, "Operation not permitted")

        monkeypatch.setattr(Path, "symlink_to", forbidden)
    folder = download_dataset("flickr8k")
    assert asked == ["adityajn105/flickr8k"] and folder == quick / "flickr8k"
    assert len(load_dataset("flickr8k")) == len(NAMES)
    assert download_dataset("flickr8k") == folder and len(asked) == 1
    shutil.rmtree(cached)
    if links:  # the cache was emptied: the dead link is replaced
        lay_out(cached := tmp_path / "cache2")
        fake_module(monkeypatch, "kagglehub", dataset_download=lambda _: str(cached))
        assert len(load_dataset("flickr8k", download_dataset("flickr8k"))) == len(NAMES)
    else:
        assert len(load_dataset("flickr8k")) == len(NAMES)


@pytest.fixture
def release(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the test server stand in for GitHub, with archives of other hashes."""
    monkeypatch.setattr(download, "RELEASE", server.url.removesuffix("/file.bin"))
    monkeypatch.setattr(download, "ARCHIVES", dict.fromkeys(download.ARCHIVES))


def github_archives(server: Server, tmp_path: Path, names: list[str] = NAMES) -> None:
    token = "".join(f"{name}#0\tA dog runs .\n" for name in NAMES).encode()
    text = archive_of(tmp_path / "zips" / "t.zip", **{"Flickr8k.token.txt": token})
    images = {f"Flicker8k_Dataset/{name}": b"image" for name in names} | {"__MACOSX/x": b""}
    pictures = archive_of(tmp_path / "zips" / "d.zip", **images)
    server.files = {
        "/Flickr8k_text.zip": text.read_bytes(),
        "/Flickr8k_Dataset.zip": pictures.read_bytes(),
    }


@pytest.mark.usefixtures("release")
def test_github_comes_second(
    quick: Path, tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_module(monkeypatch, "kagglehub", dataset_download=refuse("no network"))
    github_archives(server, tmp_path)
    folder = download_dataset("flickr8k")
    assert len(load_dataset("flickr8k")) == len(NAMES)
    assert folder == quick / "flickr8k" and list((quick / "downloads").iterdir()) == []


@pytest.mark.usefixtures("release")
def test_an_incomplete_download_never_becomes_the_data_set(
    quick: Path, tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_module(monkeypatch, "kagglehub", dataset_download=lambda _: str(tmp_path))
    github_archives(server, tmp_path, NAMES[:2])
    with pytest.raises(CapGenError, match="holds only 2"):
        download_dataset("flickr8k")
    assert [p.name for p in quick.iterdir()] == ["downloads"]
    server.files["/Flickr8k_Dataset.zip"] = b"PK\x03\x04 damaged on the way"
    shutil.rmtree(quick / "downloads")
    with pytest.raises(CapGenError, match="damaged"):
        download_dataset("flickr8k")
    assert [p.name for p in (quick / "downloads").iterdir()] == ["Flickr8k_text.zip"], (
        "it would be used again"
    )
    github_archives(server, tmp_path)
    assert len(load_dataset("flickr8k", download_dataset("flickr8k"))) == len(NAMES)


@pytest.mark.usefixtures("offline")
def test_the_kaggle_client_is_imported_only_with_a_key(
    quick: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def download_files(handle: str, path: str, quiet: bool) -> None:
        calls.append(handle)
        archive_of(Path(path) / "flickr8k.zip", **flickr8k_files())

    fake_module(monkeypatch, "kaggle", api=SimpleNamespace(dataset_download_files=download_files))
    with pytest.raises(CapGenError, match="no Kaggle key"):
        download_dataset("flickr8k")
    assert calls == []
    monkeypatch.setenv("KAGGLE_USERNAME", "someone")
    monkeypatch.setenv("KAGGLE_KEY", "not a key")
    assert len(load_dataset("flickr8k", download_dataset("flickr8k"))) == len(NAMES)
    assert calls == ["adityajn105/flickr8k"] and list((quick / "downloads").iterdir()) == []


@pytest.mark.usefixtures("offline")
def test_a_client_that_exits_does_not_end_the_program(
    quick: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def leave(*_: object, **__: object) -> None:
        raise SystemExit(1)

    config = quick.parent / "keys"
    config.mkdir()
    (config / "kaggle.json").write_text("{}")
    monkeypatch.setenv("KAGGLE_CONFIG_DIR", str(config))
    fake_module(monkeypatch, "kaggle", api=SimpleNamespace(dataset_download_files=leave))
    with pytest.raises(CapGenError) as error:
        download_dataset("flickr8k")
    for reason in ("kagglehub is down", "GitHub is down", "Kaggle client: SystemExit"):
        assert reason in error.value.problem
    for remedy in ("CAPGEN_FLICKR8K", "on Kaggle", "capgen download flickr8k"):
        assert remedy in error.value.remedy
    assert not (quick / "flickr8k").exists()


@pytest.mark.usefixtures("offline")
def test_flickr8k_asks_for_room_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10, 9, 1))
    with pytest.raises(CapGenError, match="Flickr8k needs"):
        download_dataset("flickr8k")


def test_a_folder_of_something_else_is_not_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "WAYS", {})
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(CapGenError, match="is not Flickr8k"):
        download_flickr8k(tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"


def test_an_interrupt_is_not_swallowed(quick: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: str) -> str:
        raise KeyboardInterrupt

    fake_module(monkeypatch, "kagglehub", dataset_download=interrupted)
    with pytest.raises(KeyboardInterrupt):
        download_dataset("flickr8k")
    assert not (quick / "flickr8k").exists()
