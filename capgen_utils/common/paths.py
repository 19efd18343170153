"""Folders of the project and of the reader: repository, data, requirements."""

import os
import tomllib
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass
from typing import TYPE_CHECKING

if (
    TYPE_CHECKING
):  # functions import it themselves: what runs without torch reads configurations too
    pass


REPOSITORY = Path(__file__).resolve().parents[2]


def requirement_lines() -> list[str]:
    """Return the package's requirements as text: from the clone's file, else from the installed
    metadata."""
    listed = REPOSITORY / "requirements.txt"
    if listed.is_file():
        lines = listed.read_text(encoding="utf-8").splitlines()
    else:
        lines = [line for line in metadata.requires("capgen-utils") or [] if "extra ==" not in line]
    return [text for line in lines if (text := line.split("#")[0].strip())]


def repository_address() -> str:
    """Return the project's public address; ``pyproject.toml`` names it, or what was installed from
    it."""
    path = REPOSITORY / "pyproject.toml"
    if path.is_file():
        return str(tomllib.loads(path.read_text(encoding="utf-8"))["project"]["urls"]["Repository"])
    listed = metadata.metadata("capgen-utils").get_all("Project-URL") or []
    return next(line.split(", ", 1)[1] for line in listed if line.startswith("Repository, "))


APART = "shipped-models"  # a data folder in the data folder, for what ships where it does not fit what was trained


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
