"""Files are whole or not there; errors say what to do."""

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from capgen_utils.common.files import (
    CapGenError,
    atomic_path,
    explain_os_errors,
    fingerprint,
    read_json,
    require_space,
    sha256_file,
    write_json,
    write_text,
)


def test_errors_hold_problem_and_remedy() -> None:
    error = CapGenError("the cup is empty", "fill it")
    assert (error.problem, error.remedy) == ("the cup is empty", "fill it")
    assert str(error) == "the cup is empty\n  -> fill it"


@pytest.mark.parametrize("folder", [False, True])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failure_leaves_what_was_there(
    tmp_path: Path, folder: bool, error: type[BaseException]
) -> None:
    target = tmp_path / "target"
    if folder:
        target.mkdir()
        (target / "old").write_text("old")
    else:
        target.write_text("old")
    with pytest.raises(error), atomic_path(target) as temporary:
        if folder:
            temporary.mkdir()
        (temporary / "new" if folder else temporary).write_text("half")
        raise error
    assert (target / "old" if folder else target).read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_success_replaces_and_makes_parents(tmp_path: Path) -> None:
    for text in ("one", "two"):
        write_text(tmp_path / "a" / "b" / "c.txt", text)
        assert (tmp_path / "a" / "b" / "c.txt").read_text() == text
    for name in ("x", "y"):
        with atomic_path(tmp_path / "folder") as temporary:
            temporary.mkdir()
            (temporary / name).touch()
        assert [p.name for p in (tmp_path / "folder").iterdir()] == [name]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "folder"]


def test_a_folder_that_cannot_take_its_place_is_put_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "old").touch()
    real, calls = os.replace, [0]

    def fail_second(*args: Any) -> None:
        calls[0] += 1
        if calls[0] == 2:
            raise OSError(errno.EIO, "Input/output error")
        real(*args)

    monkeypatch.setattr(os, "replace", fail_second)
    with pytest.raises(CapGenError, match="Input/output"), atomic_path(tmp_path / "t") as temporary:
        temporary.mkdir()
    assert [p.name for p in (tmp_path / "t").iterdir()] == ["old"]


def test_os_errors_name_the_path() -> None:
    with (
        pytest.raises(CapGenError, match=r"cannot write here/x: No space left"),
        explain_os_errors(Path("here/x")),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(CapGenError, match="weird"), explain_os_errors(Path("x")):
        raise OSError("weird")


def test_json_there_and_back(tmp_path: Path) -> None:
    value = {"a": [1, 2.5, None, True], "犬": "كلب"}
    write_json(tmp_path / "v.json", value)
    assert read_json(tmp_path / "v.json", "") == value
    assert "犬" in (tmp_path / "v.json").read_text(encoding="utf-8")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[" * 200_000])
def test_bad_json_is_named_with_the_given_remedy(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "v.json").write_bytes(content)
    with pytest.raises(CapGenError, match=r"v\.json") as error:
        read_json(tmp_path / "v.json", "do this")
    assert error.value.remedy == "do this"
    for missing in (tmp_path / "gone.json", tmp_path):
        with pytest.raises(CapGenError, match="cannot read"):
            read_json(missing, "do this")


def test_fingerprints_follow_values_not_their_order(tmp_path: Path) -> None:
    assert (
        fingerprint({"a": 1, "b": 2})
        == fingerprint({"b": 2, "a": 1})
        != fingerprint({"a": 2, "b": 1})
    )
    assert len(fingerprint([])) == 16
    (tmp_path / "f").write_bytes(b"abc")
    assert sha256_file(tmp_path / "f").startswith("ba7816bf8f01cfea")
    assert json.dumps(fingerprint("é")) == json.dumps(fingerprint("é"))


def test_space_is_asked_of_the_disk_that_will_hold_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Path] = []
    usage = shutil.disk_usage(tmp_path)._replace(free=5_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: asked.append(Path(path)) or usage)
    require_space(tmp_path / "not" / "yet", 5_000, "x")
    assert asked == [tmp_path]
    with pytest.raises(CapGenError, match="the cache needs"):
        require_space(tmp_path, 5_001, "the cache")
