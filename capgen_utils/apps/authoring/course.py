"""The course as one command: run the notebooks, write offline pages, list the captioners."""

import hashlib
import os
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError
from nbformat import NotebookNode
from tqdm.auto import tqdm

from capgen_utils.bootstrap import without_training
from capgen_utils.common.files import CapGenError, write_text
from capgen_utils.common.paths import REPOSITORY, data_dir
from capgen_utils.presets import get_preset
from capgen_utils.show.plots import read_log

NOTEBOOKS = REPOSITORY / "notebooks"
NUMBERED = "[0-9][0-9]_*.ipynb"
KERNEL = {"name": "python3", "display_name": "Python 3 (ipykernel)", "language": "python"}
LAUNCHER = ("-m", "ipykernel_launcher", "-f", "{connection_file}", "--log-level=ERROR")
WIDGET = "application/vnd.jupyter.widget-view+json"  # a progress bar, empty without a kernel

# JupyterLab's look without scripts (formulas are plain text), and with the alternative texts that
# ``plots.alt`` stores beside images.
TEMPLATE = """
{%- extends 'index.html.j2' -%}
{%- block html_head_js -%}{%- endblock -%}
{%- block html_head_js_mathjax -%}{%- endblock -%}
{%- block html_head_js_mermaidjs -%}{%- endblock -%}
{%- block jupyter_widgets -%}{%- endblock -%}
{%- macro described(image, text) -%}
{{ image if text is none else image | replace('<img', '<img alt="' ~ (text | e) ~ '"', 1) }}
{%- endmacro -%}
{%- block data_png scoped -%}
{{ described(super(), output | get_metadata('alt', 'image/png')) }}
{%- endblock -%}
{%- block data_jpg scoped -%}
{{ described(super(), output | get_metadata('alt', 'image/jpeg')) }}
{%- endblock -%}
"""


@dataclass(frozen=True)
class Outcome:
    """The result of one notebook: its page, its running time, and the error that ended it."""

    title: str
    page: Path
    seconds: float
    error: str = ""


class OwnKernel(AsyncKernelManager):
    """Starts kernels with the Python that runs this program, whichever kernels are installed."""

    @property
    def kernel_spec(self) -> KernelSpec:
        """The only specification."""
        return KernelSpec(
            argv=[sys.executable, *LAUNCHER],
            display_name=KERNEL["display_name"],
            language=KERNEL["language"],
        )


def run_course(
    preset: str, output: Path, only: str | None = None, keep: bool = False, train: bool = True
) -> int:
    """Execute the numbered notebooks in order and write each as an HTML page, with an index.

    Training that an earlier run finished is not repeated.

    Args:
        preset: the preset of the notebooks: ``auto``, ``shapes``, ``flickr8k`` ...
        output: folder of the pages.
        only: the number of a single notebook, such as ``05``.
        keep: also store the outputs in ``notebooks/``, and run the solutions too.
        train: train what has not been trained; else use the captioners that ship.

    Returns:
        0, or 1 if a notebook failed; its page shows the cells before the error.

    Raises:
        CapGenError: there is no such preset, or no notebook of that number.
    """
    name, notebooks = get_preset(preset).name, find_notebooks(only, solutions=keep)
    if not train:
        print(without_training(name))
    outcomes = []
    for path in notebooks:
        outcome = run_notebook(path, name, output, keep, train)
        outcomes.append(outcome)
        print(f"{'FAILED' if outcome.error else 'ok':6s} {outcome.seconds:7.1f} s  {path.name}")
        if outcome.error:
            print(f"  {outcome.error}\n  the page up to the error: {outcome.page}")
    write_text(output / "index.html", index_page(outcomes, name))
    print(f"\nthe pages are in {output / 'index.html'}")
    print(captioners_table())
    return int(any(outcome.error for outcome in outcomes))


def find_notebooks(only: str | None = None, solutions: bool = False) -> list[Path]:
    """Return the numbered notebooks in order, each followed by its solutions if asked for.

    Raises:
        CapGenError: there is none, or none with the number ``only``.
    """
    numbered = sorted(NOTEBOOKS.glob(NUMBERED))
    paths = [path for path in numbered if only is None or path.name.startswith(f"{only.zfill(2)}_")]
    if not paths:
        have = ", ".join(path.name[:2] for path in numbered)
        raise CapGenError(
            f"there is no notebook {only or NUMBERED} in {NOTEBOOKS}",
            f"choose one of {have or 'none'}",
        )
    if not solutions:
        return paths
    folder = NOTEBOOKS / "solutions"
    pairs = [(path, folder / f"{path.name[:2]}_solutions.ipynb") for path in paths]
    return [path for pair in pairs for path in pair if path.exists()]


def run_notebook(
    path: Path, preset: str, output: Path | None = None, keep: bool = False, train: bool = True
) -> Outcome:
    """Execute one notebook in a fresh kernel of this Python.

    Args:
        path: the notebook; it runs in its own folder.
        preset: the value of ``CAPGEN_PRESET``.
        output: folder for its page; ``None`` writes none.
        keep: store the outputs in the notebook itself, unless it fails.
        train: whether ``CAPGEN_TRAIN`` is 1.
    """
    notebook = nbformat.read(path, as_version=4)
    started = time.perf_counter()
    error = execute(notebook, path, preset, train)
    seconds = time.perf_counter() - started
    clean(notebook, keep_messages=bool(error))
    page = (output or Path()) / f"{path.stem}.html"
    if output is not None:
        write_text(page, html_page(notebook, path.stem))
    if keep and not error:
        write_text(path, nbformat.writes(notebook) + "\n")
    return Outcome(title_of(notebook), page, seconds, error)


def execute(notebook: NotebookNode, path: Path, preset: str, train: bool) -> str:
    """Run all cells; returns the error that ended the run, or an empty text."""
    count = sum(cell.cell_type == "code" for cell in notebook.cells)
    environment = os.environ | {
        "TQDM_DISABLE": "1",  # bars would be stored as outputs
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",  # a shell's may open windows
        "CAPGEN_PRESET": preset,
        "CAPGEN_TRAIN": str(int(train)),
        "CAPGEN_DATA": str(data_dir().absolute()),
        "PYTHONPATH": os.pathsep.join(
            filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
        ),
    }
    with tqdm(total=count, desc=path.stem, unit="cell") as bar:
        client = NotebookClient(
            notebook,
            timeout=None,
            kernel_manager_class=OwnKernel,
            record_timing=False,
            resources={"metadata": {"path": str(path.parent)}},
            on_cell_executed=lambda **_: bar.update(),
        )
        try:
            client.execute(env=environment)
        except CellExecutionError as error:
            raised = [
                "error" in [o.output_type for o in c.get("outputs", [])] for c in notebook.cells
            ]
            return f"cell {raised.index(True) + 1}: {error.ename}: {error.evalue}"
        except DeadKernelError:
            return "the kernel died, most likely for lack of memory"
    return ""


def clean(notebook: NotebookNode, keep_messages: bool = False) -> None:
    """Remove every trace of the machine from a notebook: folders, timestamps, progress bars."""
    notebook.metadata = NotebookNode(
        kernelspec=NotebookNode(KERNEL),
        language_info=NotebookNode(name="python"),
        capgen=NotebookNode(code_hash=code_hash(notebook)),
    )
    for cell in notebook.cells:
        tags = {"tags": cell.metadata.tags} if "tags" in cell.metadata else {}
        cell.metadata = NotebookNode(tags)
        if cell.cell_type == "code":
            cell.outputs = [
                _without_folders(o)
                for o in cell.outputs
                if (keep_messages or o.get("name") != "stderr") and WIDGET not in o.get("data", {})
            ]


def _without_folders(value: Any) -> Any:
    """Replace the folders of this machine in every text of an output."""
    if isinstance(value, str):
        names = {
            str(data_dir().absolute()): "data",
            str(REPOSITORY): "capgen",
            str(Path.home()): "~",
        }
        for folder in sorted((f for f in names if len(f) > 1), key=len, reverse=True):
            value = re.sub(rf"{re.escape(folder)}(?![\w.-])", names[folder], value)
    elif isinstance(value, list):
        value = [_without_folders(item) for item in value]
    elif isinstance(value, dict):
        value.update(
            {k: _without_folders(v) for k, v in value.items() if not k.startswith("image/")}
        )
    return value


def code_hash(notebook: NotebookNode) -> str:
    """Return a hash of a notebook's code; beside outputs, it reveals that the code has changed."""
    code = "\n\0\n".join(cell.source.strip() for cell in notebook.cells if cell.cell_type == "code")
    return hashlib.sha256(code.encode()).hexdigest()[:16]


def title_of(notebook: NotebookNode) -> str:
    """Return the first heading."""
    texts = (cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    heading = re.search(r"^# (.*)", "\n".join(texts), re.MULTILINE)
    return heading[1].strip() if heading else ""


# --- pages


def html_page(notebook: NotebookNode, name: str) -> str:
    """Return a notebook as one HTML page in JupyterLab's look that needs no network."""
    from nbconvert import HTMLExporter

    exporter = HTMLExporter(template_name="lab", raw_template=TEMPLATE, embed_images=True)
    page, _ = exporter.from_notebook_node(notebook, resources={"metadata": {"name": name}})
    return offline(page)


def offline(page: str) -> str:
    """Replace images that a page would fetch from the network, such as badges, by their texts."""
    image = r'<img\b(?=[^>]*\bsrc="(?:https?:)?//)(?:[^>]*?\balt="([^"]*)")?[^>]*>'
    return re.sub(image, r"\1", page)


def index_page(outcomes: Sequence[Outcome], preset: str) -> str:
    """Return the table of contents of the pages."""
    lines = ["# CapGen: the course", f"Preset: {preset}", "", "| notebook | time | result |"]
    lines.append("|---|---|---|")
    for outcome in outcomes:
        title = outcome.title.replace("|", r"\|")
        link = f"[{title}]({outcome.page.name})"
        result = "failed" if outcome.error else "ok"
        lines.append(f"| {link} | {outcome.seconds:.0f} s | {result} |")
    return html_page(
        nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("\n".join(lines))]),
        "CapGen: the course",
    )


def captioners_table() -> str:
    """Return best dev BLEU-4 and training time of the captioners in the data folder's ``runs``."""
    lines = [f"{'captioner':28s} {'epochs':>6s} {'best dev BLEU-4':>15s} {'minutes':>8s}"]
    for log in sorted(data_dir().glob("runs/*/log.jsonl")):
        entries = read_log(log.parent)
        scores = [entry["BLEU-4"] for entry in entries if "BLEU-4" in entry]
        if scores:
            minutes = entries[-1].get("seconds", 0) / 60
            figures = f"{len(entries):6d} {max(scores):15.2f} {minutes:8.1f}"
            lines.append(f"{log.parent.name:28s} {figures}")
    return "\n".join(lines) if len(lines) > 1 else "no captioner has been trained yet"
