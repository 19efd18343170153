"""Errors that say what to do, and files that are written completely or not at all."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from math import isfinite
from pathlib import Path
from typing import Any, TypeVar

Config = TypeVar("Config")  # a dataclass whose fields all have defaults


class CapGenError(Exception):
    """An error that a user can act on.

    Args:
        problem: one sentence that names the file or value.
        remedy: what the user can do now.
    """

    def __init__(self, problem: str, remedy: str) -> None:
        super().__init__(f"{problem}\n  -> {remedy}")
        self.problem = problem
        self.remedy = remedy


@contextmanager
def explain_os_errors(path: Path, action: str = "write") -> Iterator[None]:
    """Turn an ``OSError`` (such as a full disk) into a ``CapGenError`` that names ``path``."""
    try:
        yield
    except OSError as error:
        raise CapGenError(
            f"cannot {action} {path}: {error.strerror or error}",
            "free some disk space or choose a folder you may write to (CAPGEN_DATA names another "
            "data folder)",
        ) from error


@contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``target``; on success it becomes ``target`` in one rename.

    A failure or a kill leaves ``target`` unchanged. It may be a file or a folder; an existing
    folder is moved aside first and deleted after the rename.

    Raises:
        CapGenError: the folder cannot be written, or the disk is full.
    """
    target = Path(target)
    with explain_os_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        holder = Path(
            tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent)
        )
        temporary = holder / target.name
        try:
            yield temporary
            replaced = holder / "replaced"
            if temporary.is_dir() and target.exists():
                os.replace(target, replaced)
            try:
                os.replace(temporary, target)
            except OSError:
                if replaced.exists():
                    os.replace(replaced, target)
                raise
        finally:
            shutil.rmtree(holder, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8 to ``path`` in one atomic step."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON to ``path`` in one atomic step."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(
    path: Path, remedy: str, hook: Callable[[list[tuple[str, Any]]], Any] | None = None
) -> Any:
    """Read JSON from ``path``; ``hook`` turns the key and value pairs of an object into a value.

    Raises:
        CapGenError: the file is missing, unreadable or not JSON; ``remedy`` becomes the advice.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"), object_pairs_hook=hook)
    except OSError as error:
        raise CapGenError(f"cannot read {path}: {error.strerror or error}", remedy) from error
    except (ValueError, RecursionError) as error:
        raise CapGenError(f"{path} is not valid JSON ({error})", remedy) from error


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes as 64 hexadecimal digits."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def fingerprint(value: Any) -> str:
    """Return a stable hash (16 hexadecimal digits) of a value that JSON can hold."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def require_space(folder: Path, needed: int, purpose: str) -> None:
    """Refuse to start if the disk that holds ``folder`` has fewer than ``needed`` bytes free.

    Raises:
        CapGenError: too little space; says how much is needed and how much is free.
    """
    existing = Path(folder).absolute()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise CapGenError(
            f"{purpose} needs {needed / 1e9:.2f} GB in {folder}, "
            f"but only {free / 1e9:.2f} GB are free",
            "free some disk space, or set CAPGEN_DATA to a folder on a larger disk",
        )


def from_dict(kind: type[Config], values: Mapping[str, Any]) -> Config:
    """Build the dataclass ``kind`` from JSON values.

    Raises:
        CapGenError: a key that ``kind`` does not have, or a value of the wrong type.
    """
    defaults = asdict(kind())  # type: ignore[call-overload]
    unknown = sorted(set(values) - set(defaults))
    if unknown:
        raise CapGenError(
            f"{kind.__name__} does not know {', '.join(unknown)}",
            "the file was written by another version of CapGen: use that version, or train again",
        )
    for name, value in values.items():
        if not _fits(value, defaults[name]):
            raise CapGenError(
                f"{kind.__name__}.{name} cannot be {value!r}",
                f"use a value like {defaults[name]!r}",
            )
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def _fits(value: Any, default: Any) -> bool:
    """Return whether a JSON value has the type of a field's default; numbers must be finite."""
    if isinstance(default, tuple):
        return isinstance(value, list | tuple) and all(_fits(item, 0.0) for item in value)
    if default is None:  # an optional whole number
        return value is None or _fits(value, 0)
    if isinstance(value, bool) != isinstance(default, bool):
        return False
    kinds = (int, float) if isinstance(default, float) else type(default)
    return isinstance(value, kinds) and not (isinstance(value, float) and not isfinite(value))
