"""Folders of the project and of the reader, and what the project says of itself (all notebooks)."""

import os
import tomllib
from importlib import metadata
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
APART = "shipped-models"  # a data folder within the data folder, for shipped models that would
# otherwise replace the reader's own


def data_dir() -> Path:
    """Return the folder for downloads, features and runs.

    It is ``CAPGEN_DATA`` if that is set, else ``data/`` of the repository.
    """
    return Path(os.environ.get("CAPGEN_DATA") or REPOSITORY / "data").expanduser()


def own_data_dir() -> Path:
    """Return the reader's own data folder, even while ``data_dir`` is ``APART`` within it."""
    folder = data_dir()
    return folder.parent if folder.name == APART else folder


def train_anew() -> bool:
    """Whether untrained models are trained; not if ``CAPGEN_TRAIN`` is 0 and trained ones ship."""
    return os.environ.get("CAPGEN_TRAIN", "1") != "0"


def requirement_lines(extra: str = "") -> list[str]:
    """Return the requirements of the package, or of one of its extras, such as ``serve``.

    They come from the clone's files; without a clone, from the installed metadata.
    """
    project, listed = REPOSITORY / "pyproject.toml", REPOSITORY / "requirements.txt"
    if extra and project.is_file():
        extras = tomllib.loads(project.read_text(encoding="utf-8"))["project"]
        return list(extras["optional-dependencies"][extra])
    if not extra and listed.is_file():
        lines = listed.read_text(encoding="utf-8").splitlines()
    else:
        marker = f'extra == "{extra}"' if extra else "extra =="
        lines = [
            line.split(";")[0]
            for line in metadata.requires("capgen-utils") or []
            if (marker in line) == bool(extra)
        ]
    return [text for line in lines if (text := line.split("#")[0].strip())]


def repository_address() -> str:
    """Return the project's public address: that of the clone, else of the installed package."""
    path = REPOSITORY / "pyproject.toml"
    if path.is_file():
        return str(tomllib.loads(path.read_text(encoding="utf-8"))["project"]["urls"]["Repository"])
    urls = metadata.metadata("capgen-utils").get_all("Project-URL") or []
    return next(line.split(", ", 1)[1] for line in urls if line.startswith("Repository, "))
