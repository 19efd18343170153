"""The course as one command: run the notebooks, write them as pages that can be read offline, say
what was learned."""

import hashlib
import html
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


WIDGET = (
    "application/vnd.jupyter.widget-view+json"  # progress bars; without a kernel they show nothing
)


KERNEL = {"name": "python3", "display_name": "Python 3 (ipykernel)", "language": "python"}


@dataclass(frozen=True)
class Outcome:
    """What came of one notebook: where its page is, how long it took, and the error that ended it,
    if one did."""

    title: str
    page: Path
    seconds: float
    error: str = ""


class OwnKernel(AsyncKernelManager):
    """Starts kernels with the Python that runs this program, whatever kernel specifications are
    installed."""

    @property
    def kernel_spec(self) -> KernelSpec:
        """The one specification there is."""
        command = [
            sys.executable,
            "-m",
            "ipykernel_launcher",
            "-f",
            "{connection_file}",
            "--log-level=ERROR",
        ]
        return KernelSpec(
            argv=command, display_name=KERNEL["display_name"], language=KERNEL["language"]
        )


def run_course(
    preset: str, output: Path, only: str | None = None, keep: bool = False, train: bool = True
) -> int:
    """Execute the numbered notebooks in their order and write each as an HTML page, with an index.

    Training that an earlier run finished is found and not done again.

    Args:
        preset: what the notebooks run on: ``auto``, ``shapes``, ``flickr8k`` ...
        output: folder of the pages.
        only: the number of one notebook, such as ``05``.
        keep: also store the outputs in ``notebooks/``, and run the solutions too.
        train: train what has not been trained; else take the captioners that ship.

    Returns:
        0, or 1 when a notebook failed; its page is written as far as it came.

    Raises:
        CapGenError: no such preset, or no notebook of that number.
    """
    chosen, notebooks = get_preset(preset).name, find_notebooks(only, solutions=keep)
    if not train:
        print(without_training(chosen))
    outcomes = []
    for path in notebooks:
        outcome = run_notebook(path, chosen, output, keep, train)
        outcomes.append(outcome)
        print(f"{'FAILED' if outcome.error else 'ok':6s} {outcome.seconds:7.1f} s  {path.name}")
        if outcome.error:
            print(f"  {outcome.error}\n  as far as it came: {outcome.page}")
    write_text(output / "index.html", index_page(outcomes, chosen))
    print(f"\nthe pages are in {output / 'index.html'}")
    print(captioners_table())
    return int(any(outcome.error for outcome in outcomes))


def find_notebooks(only: str | None = None, solutions: bool = False) -> list[Path]:
    """Return the numbered notebooks in order, each followed by its solutions where they are asked
    for.

    Raises:
        CapGenError: there is none, or none of the number ``only``.
    """
    numbered = sorted(NOTEBOOKS.glob(NUMBERED))
    found = [path for path in numbered if only is None or path.name.startswith(f"{only.zfill(2)}_")]
    if not found:
        have = ", ".join(path.name[:2] for path in numbered)
        raise CapGenError(
            f"there is no notebook {only or NUMBERED} in {NOTEBOOKS}",
            f"choose one of {have or 'none'}",
        )
    if solutions:
        pairs = [
            (path, NOTEBOOKS / "solutions" / f"{path.name[:2]}_solutions.ipynb") for path in found
        ]
        found = [path for pair in pairs for path in pair if path.exists()]
    return found


def run_notebook(
    path: Path, preset: str, output: Path | None = None, keep: bool = False, train: bool = True
) -> Outcome:
    """Execute one notebook in a fresh kernel of this Python.

    Args:
        path: the notebook; it runs in its own folder.
        preset: what it finds in ``CAPGEN_PRESET``.
        output: folder for its page; ``None`` writes none.
        keep: store the outputs in the notebook itself, if all went well.
        train: whether it finds ``CAPGEN_TRAIN`` set to 1.
    """
    notebook = nbformat.read(path, as_version=4)
    name = f"{path.stem}.html"
    started = time.perf_counter()
    error = _execute(notebook, path, preset, train)
    seconds = time.perf_counter() - started
    _clean(notebook, keep_messages=bool(error))
    page = (output or Path()) / name
    if output is not None:
        write_text(page, html_page(notebook, path.stem))
    if keep and not error:
        write_text(path, nbformat.writes(notebook) + "\n")
    return Outcome(title_of(notebook), page, seconds, error)


def _execute(notebook: NotebookNode, path: Path, preset: str, train: bool) -> str:
    """Run all cells; returns what went wrong, or an empty text."""
    count = sum(cell.cell_type == "code" for cell in notebook.cells)
    # Bars would be stored as outputs, and the default backend of a shell may want a window.
    quiet = {"TQDM_DISABLE": "1", "MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    folders = [str(REPOSITORY), os.environ.get("PYTHONPATH", "")]
    environment = (
        os.environ
        | quiet
        | {
            "CAPGEN_PRESET": preset,
            "CAPGEN_TRAIN": str(int(train)),
            "CAPGEN_DATA": str(data_dir().absolute()),
            "PYTHONPATH": os.pathsep.join(filter(None, folders)),
        }
    )
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
            return f"cell {_failed_cell(notebook)}: {error.ename}: {error.evalue}"
        except DeadKernelError:
            return "the kernel died: most often there was too little memory"
    return ""


def _failed_cell(notebook: NotebookNode) -> int:
    """Return the number of the cell that raised, counting all cells from 1."""
    raised = [
        number
        for number, cell in enumerate(notebook.cells, start=1)
        if any(output.output_type == "error" for output in cell.get("outputs", ()))
    ]
    return raised[0] if raised else 0


def _clean(notebook: NotebookNode, keep_messages: bool = False) -> None:
    """Leave nothing of the machine in a notebook: no folders, no timestamps, no progress bars."""
    notebook.metadata = NotebookNode(
        kernelspec=NotebookNode(KERNEL),
        language_info=NotebookNode(name="python"),
        capgen=NotebookNode(code_hash=code_hash(notebook)),
    )
    for cell in notebook.cells:
        cell.metadata = NotebookNode(
            {key: cell.metadata[key] for key in ("tags",) if key in cell.metadata}
        )
        if cell.cell_type != "code":
            continue
        outputs = [o for o in cell.outputs if keep_messages or o.get("name") != "stderr"]
        cell.outputs = [_without_folders(o) for o in outputs if WIDGET not in o.get("data", {})]


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
        return value
    if isinstance(value, list):
        return [_without_folders(part) for part in value]
    if isinstance(value, dict):
        kept = {
            key: part if key.startswith("image/") else _without_folders(part)
            for key, part in value.items()
        }
        return type(value)(kept)
    return value


def code_hash(notebook: NotebookNode) -> str:
    """Return a hash of a notebook's code: stored beside outputs, it shows when they came from other
    code."""
    code = "\n\0\n".join(cell.source.strip() for cell in notebook.cells if cell.cell_type == "code")
    return hashlib.sha256(code.encode()).hexdigest()[:16]


def title_of(notebook: NotebookNode) -> str:
    """Return the first heading."""
    lines = (
        line
        for cell in notebook.cells
        if cell.cell_type == "markdown"
        for line in cell.source.splitlines()
    )
    return next((line.removeprefix("# ").strip() for line in lines if line.startswith("# ")), "")


# --- pages


def html_page(notebook: NotebookNode, name: str) -> str:
    """Return a notebook as one HTML page in JupyterLab's looks that needs nothing from the network."""
    from nbconvert import HTMLExporter

    exporter = HTMLExporter(template_name="lab", embed_images=True)
    # Formulas are written as plain text and there are no widgets, so none of the scripts from
    # elsewhere is needed.
    exporter.mathjax_url = exporter.require_js_url = exporter.jquery_url = ""
    page, _ = exporter.from_notebook_node(notebook, resources={"metadata": {"name": name}})
    return offline(_describe_images(page, notebook))


def _describe_images(page: str, notebook: NotebookNode) -> str:
    """Give images the texts that ``plots.alt`` stored with them; nbconvert's lab template leaves
    them out."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    texts = {
        "".join(output.data[kind].split()): output.metadata[kind]["alt"]
        for output in outputs
        for kind in ("image/png", "image/jpeg")
        if "alt" in output.get("metadata", {}).get(kind, {})
    }

    def describe(match: re.Match[str]) -> str:
        text = texts.get("".join(match[2].split()))
        return match[0] if text is None else f'<img alt="{html.escape(text)}"{match[1]}'

    return re.sub(
        r'<img alt="[^"]*"([^>]*?src="data:image/(?:png|jpeg);base64,([^"]*)")', describe, page
    )


def offline(page: str) -> str:
    """Remove what a page would fetch from the network: scripts, style sheets and the pictures of
    badges."""
    page = re.sub(
        r'<img\b(?=[^>]*\bsrc="(?:https?:)?//)(?:[^>]*?\balt="([^"]*)")?[^>]*>', r"\1", page
    )
    page = re.sub(r"<script\b[^>]*>.*?</script>", _unless_from_elsewhere, page, flags=re.DOTALL)
    return re.sub(r"<link\b[^>]*\bhref=[\"'](?:https?:)?//[^>]*>", "", page)


def _unless_from_elsewhere(script: re.Match[str]) -> str:
    return (
        ""
        if re.search(r"<script\b[^>]*\ssrc=|[\"'](?:https?:)?//|MathJax", script[0])
        else script[0]
    )


def index_page(outcomes: Sequence[Outcome], preset: str) -> str:
    """Return the table of contents of the pages."""
    rows = "\n".join(
        f'<tr><td><a href="{html.escape(o.page.name)}">{html.escape(o.title)}</a></td>'
        f"<td>{o.seconds:.0f} s</td><td>{'failed' if o.error else 'ran to the end'}</td></tr>"
        for o in outcomes
    )
    return f"""<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><title>CapGen: the course</title>
<style>body {{ font-family: sans-serif; max-width: 48rem; margin: 3rem auto; padding: 0 1rem; line-height: 1.5 }}
td, th {{ text-align: left; padding: 0.3rem 1.5rem 0.3rem 0 }}</style></head>
<body><h1>CapGen: the course</h1><p>Preset: {html.escape(preset)}</p>
<table><thead><tr><th>notebook</th><th>time</th><th>result</th></tr></thead>
<tbody>
{rows}
</tbody></table></body>
</html>
"""


def captioners_table() -> str:
    """Return the captioners found in the data folder's ``runs``: best dev BLEU-4 and minutes of
    training."""
    lines = [f"{'captioner':28s} {'epochs':>6s} {'best dev BLEU-4':>15s} {'minutes':>8s}"]
    for log in sorted(data_dir().glob("runs/*/log.jsonl")):
        entries = read_log(log.parent)
        scores = [entry["BLEU-4"] for entry in entries if "BLEU-4" in entry]
        if scores:
            minutes = entries[-1].get("seconds", 0) / 60
            lines.append(
                f"{log.parent.name:28s} {len(entries):6d} {max(scores):15.2f} {minutes:8.1f}"
            )
    return "\n".join(lines) if len(lines) > 1 else "no captioner has been trained yet"
