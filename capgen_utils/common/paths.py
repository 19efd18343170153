"""Folders of the project and of the reader: repository, data, requirements."""

import os
import tomllib
from importlib import metadata
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


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
    """Return the project's public address; ``pyproject.toml`` names it, or what was installed from
    it."""
    path = REPOSITORY / "pyproject.toml"
    if path.is_file():
        return str(tomllib.loads(path.read_text(encoding="utf-8"))["project"]["urls"]["Repository"])
    listed = metadata.metadata("capgen-utils").get_all("Project-URL") or []
    return next(line.split(", ", 1)[1] for line in listed if line.startswith("Repository, "))


# Inside the data folder: shipped captioners whose encoder differs from the one trained here.
APART = "shipped-models"


def data_dir() -> Path:
    """Return the folder for downloads, features and runs: ``CAPGEN_DATA``, or ``data/`` of the
    repository."""
    return Path(os.environ.get("CAPGEN_DATA") or REPOSITORY / "data").expanduser()


def own_data_dir() -> Path:
    """Return the reader's own data folder, also while ``data_dir`` is the one in it where what
    ships lies apart."""
    folder = data_dir()
    return folder.parent if folder.name == APART else folder


def train_anew() -> bool:
    """Whether what is not trained yet is trained: not where ``CAPGEN_TRAIN`` is 0 and a trained one
    ships."""
    return os.environ.get("CAPGEN_TRAIN", "1") != "0"
