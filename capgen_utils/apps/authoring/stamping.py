"""The first cell of every notebook and the badges that open it elsewhere, written from one template
and one address.

For maintainers: ``make first-cells``, after a change of the template, the address or the version.
"""

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

_FIRST_CELL = """\
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

if importlib.util.find_spec("capgen_utils") is None:  # not installed: use the clone that this notebook lies in
    clone = next((p for p in Path.cwd().parents if (p / "capgen_utils").is_dir()), Path("capgen").absolute())
    if not clone.is_dir():  # on Colab and Kaggle there is none yet (Kaggle: switch Internet on in the settings)
        address, tag = "{address}", "{tag}"
        git = ["git", "-c", "advice.detachedHead=false", "clone", "-q", "--depth", "1", "--branch", tag]
        subprocess.run([*git, address, str(clone)], check=True)
    sys.path.insert(0, str(clone))

from capgen_utils import bootstrap

bootstrap.prepare(drive=False)  # Colab, Kaggle: install what is missing; drive=True keeps features and runs on Drive
PRESET = os.environ.get("CAPGEN_PRESET", "shapes")  # change this one line: "shapes", "flickr8k" or "auto"
TRAIN = os.environ.get("CAPGEN_TRAIN", "1") != "0"  # False: nothing is trained where a trained captioner ships
bootstrap.announce(PRESET, train=TRAIN)"""


_IMAGE = "https://colab.research.google.com/assets/colab-badge.svg"
_IMAGE_KAGGLE = "https://kaggle.com/static/images/open-in-kaggle.svg"
_BLOCK = re.compile(r"(<!-- badges: (\w+) -->).*?(<!-- /badges -->)", re.DOTALL)


def tag() -> str:
    """Return the tag of this version, which badges and first cells name."""
    return f"v{VERSION}"


def first_cell() -> str:
    """Return the source of the first code cell of every notebook."""
    return _FIRST_CELL.format(address=repository_address(), tag=tag())


def badges(name: str) -> str:
    """Return the two badges of the notebook ``name``, a file name without its suffix, as one line
    of Markdown."""
    address = repository_address()
    path = f"{address.removeprefix('https://github.com/')}/blob/{tag()}/notebooks/{name}.ipynb"
    colab = f"[![Open in Colab]({_IMAGE})](https://colab.research.google.com/github/{path})"
    kaggle = f"[![Open in Kaggle]({_IMAGE_KAGGLE})](https://kaggle.com/kernels/welcome?src=https://github.com/{path})"
    return f"{colab} {kaggle}"


def stamp(notebook: NotebookNode, name: str | None = None) -> None:
    """Write the first code cell into ``notebook`` and, where it has a ``name``, the badges under
    its title.

    Outputs stay; they are stale where the cell has changed, until the notebook is run again.

    Raises:
        CapGenError: it does not begin with a title and hold a cell that chooses the preset.
    """
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    title = notebook.cells[0] if notebook.cells else None
    if (
        title is None
        or not title.source.startswith("# ")
        or not code
        or "PRESET = " not in code[0].source
    ):
        raise CapGenError(
            f"the notebook {name or ''} does not begin as the others do",
            "begin with a title, then choose PRESET",
        )
    code[0].source = first_cell()
    if name is not None:
        lines = [
            line for line in title.source.split("\n") if not line.startswith("[![Open in Colab]")
        ]
        rest = "\n".join(lines[1:]).strip("\n")
        title.source = f"{lines[0]}\n\n{badges(name)}\n\n{rest}".rstrip("\n")


def stamp_text(text: str) -> str:
    """Return ``text`` (Markdown) with each block between ``<!-- badges: NAME -->`` and ``<!--
    /badges -->`` written."""
    return _BLOCK.sub(lambda block: f"{block[1]}{badges(block[2])}{block[3]}", text)


def main(names: Sequence[str] = ()) -> int:
    """Stamp notebooks and README.

    Args:
        names: paths of notebooks; by default all, their solutions too.

    Returns:
        0.
    """
    paths = [Path(name).absolute() for name in names] or find_notebooks(solutions=True)
    for path in paths:
        notebook = nbformat.read(path, as_version=4)
        before = nbformat.writes(notebook)
        stamp(notebook, path.stem if path.parent == NOTEBOOKS else None)
        if nbformat.writes(notebook) != before:
            write_text(path, nbformat.writes(notebook) + "\n")
            print(f"written: {path.name}; run it again (make notebooks)")
    readme = REPOSITORY / "README.md"
    text = readme.read_text(encoding="utf-8")
    if stamp_text(text) != text:
        write_text(readme, stamp_text(text))
        print("written: README.md")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
