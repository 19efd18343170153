"""Write the first cell and the badges of every notebook from one template and one address.

For maintainers: ``make first-cells`` after a change to the template, the address or the version;
``make first-cells TAG=v0.1.0`` for a release. Every notebook begins with this cell.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from capgen_utils.apps.authoring.course import NOTEBOOKS, find_notebooks
from capgen_utils.common.files import CapGenError, write_text
from capgen_utils.common.machine import VERSION
from capgen_utils.common.paths import REPOSITORY, repository_address

RELEASE_TAG = f"v{VERSION}"  # first cells clone it once it exists
BRANCH = "main"  # badges point here until a release stamps its tag

_FIRST_CELL = """\
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

if importlib.util.find_spec("capgen_utils") is None:  # not installed: find the clone, or make one
    clone = next((p for p in Path.cwd().parents if (p / "capgen_utils").is_dir()), Path("capgen"))
    if not clone.is_dir():  # on Kaggle, switch on Internet in the settings first
        address, tag = "{address}", "{tag}"
        released = subprocess.check_output(["git", "ls-remote", address, f"refs/tags/{{tag}}"])
        git = ["git", "clone", "-q", "--depth", "1", "-c", "advice.detachedHead=false"]
        subprocess.check_call([*git, *(["--branch", tag] if released else []), address, clone])
        print("CapGen", tag if released else f"from the default branch: {{tag}} is not released")
    sys.path.insert(0, str(clone.absolute()))

from capgen_utils import bootstrap

bootstrap.prepare(drive=False)  # Colab and Kaggle; drive=True keeps features and runs on Drive
PRESET = os.environ.get("CAPGEN_PRESET", "shapes")  # or "flickr8k", or "auto"
TRAIN = os.environ.get("CAPGEN_TRAIN", "1") != "0"  # False uses the captioners that ship
bootstrap.announce(PRESET, train=TRAIN)"""

_IMAGE = "https://colab.research.google.com/assets/colab-badge.svg"
_IMAGE_KAGGLE = "https://kaggle.com/static/images/open-in-kaggle.svg"


def first_cell() -> str:
    """Return the source of the first code cell of every notebook."""
    return _FIRST_CELL.format(address=repository_address(), tag=RELEASE_TAG)


def badges(name: str, ref: str = BRANCH) -> str:
    """Return the Colab and Kaggle badges of a notebook as one line of Markdown.

    Args:
        name: file name of the notebook without its suffix.
        ref: branch or tag that the badges open.
    """
    address = repository_address()
    path = f"{address.removeprefix('https://github.com/')}/blob/{ref}/notebooks/{name}.ipynb"
    kaggle = f"https://kaggle.com/kernels/welcome?src=https://github.com/{path}"
    return (
        f"[![Open in Colab]({_IMAGE})](https://colab.research.google.com/github/{path}) "
        f"[![Open in Kaggle]({_IMAGE_KAGGLE})]({kaggle})"
    )


def stamp(notebook: NotebookNode, name: str | None = None, ref: str = BRANCH) -> None:
    """Write the first code cell of ``notebook`` and, if it has a ``name``, its badges.

    Outputs are kept. If the cell has changed, they are stale until the notebook runs again.

    Raises:
        CapGenError: the notebook lacks a title or a cell that sets PRESET.
    """
    cells = notebook.cells
    code = next((cell for cell in cells if cell.cell_type == "code"), None)
    if code is None or "PRESET = " not in code.source or not cells[0].source.startswith("# "):
        raise CapGenError(
            f"notebook {name or ''} has no title or no first cell that sets PRESET",
            "begin with a Markdown title, then a code cell that sets PRESET",
        )
    code.source = first_cell()
    if name is not None:
        title, *lines = cells[0].source.split("\n")
        text = "\n".join(line for line in lines if not line.startswith("[![Open in Colab]"))
        cells[0].source = "\n\n".join(filter(None, [title, badges(name, ref), text.strip("\n")]))


def stamp_text(text: str, ref: str = BRANCH) -> str:
    """Return Markdown whose links to the repository's notebooks on GitHub point to ``ref``."""
    owner = repository_address().removeprefix("https://github.com/")
    return re.sub(rf"({re.escape(owner)}/blob/)[^/]+(/notebooks/)", rf"\g<1>{ref}\g<2>", text)


def main(arguments: Sequence[str] = ()) -> int:
    """Stamp the notebooks and the README.

    Args:
        arguments: notebooks (default: all, with their solutions), and ``--tag``.

    Returns:
        0.
    """
    parser = argparse.ArgumentParser(description="Write first cells and badges.")
    parser.add_argument("notebooks", nargs="*", type=Path, help="default: all and their solutions")
    parser.add_argument("--tag", default=BRANCH, help="what badges open (%(default)s)")
    options = parser.parse_args(arguments)
    for path in [p.absolute() for p in options.notebooks] or find_notebooks(solutions=True):
        notebook = nbformat.read(path, as_version=4)
        before = nbformat.writes(notebook)
        stamp(notebook, path.stem if path.parent == NOTEBOOKS else None, options.tag)
        if nbformat.writes(notebook) != before:
            write_text(path, nbformat.writes(notebook) + "\n")
            print(f"wrote {path.name}; run it again if its code changed (make notebooks)")
    readme = REPOSITORY / "README.md"
    before = readme.read_text(encoding="utf-8")
    after = stamp_text(before, options.tag)
    if after != before:
        write_text(readme, after)
        print("wrote README.md")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
