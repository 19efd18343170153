"""``make demo-picture``: drives the demo in a browser, as an app of Voilà, and saves a screenshot.

The screenshot is results/demo.png. The tests drive JupyterLab with the same functions.
"""

import contextlib
import io
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
from PIL import Image

REPOSITORY = Path(__file__).resolve().parents[1]
NOTEBOOKS = REPOSITORY / "notebooks"
PICTURE = REPOSITORY / "results" / "demo.png"
QUIET = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
]
# The kernel of the notebook in front.
_KERNEL = "window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel"
START, ANSWER = 180, 300  # seconds for a server or a kernel to start, and for a caption
LARGEST = 200 * 1024 * 1024  # bytes of a message: uploads come as one; the default is 10 MB


def free_port() -> int:
    """Return a free port."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


@contextlib.contextmanager
def serving(command: list[str], folder: Path, **env: str) -> Iterator[str]:
    """Run a notebook server in ``folder`` and yield its address; it fills in ``{port}``.

    Raises:
        RuntimeError: the server ended or did not answer; with the end of its output.
    """
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    settings = {
        "JUPYTER_CONFIG_DIR": str(folder / "config"),
        "JUPYTER_RUNTIME_DIR": str(folder / "runtime"),
        "PYTHONPATH": str(REPOSITORY),
        "OMP_NUM_THREADS": "1",
        "TQDM_DISABLE": "1",
    }
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            [sys.executable, *(word.replace("{port}", str(port)) for word in command)],
            cwd=folder,
            env=os.environ | settings | env,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            for _ in range(2 * START):
                if process.poll() is not None or answers(address):
                    break
                time.sleep(0.5)
            if process.poll() is not None or not answers(address):
                output.seek(0)
                raise RuntimeError(f"the server did not start:\n{output.read()[-3000:]}")
            yield address
        finally:
            process.terminate()
            process.wait(60)


def answers(address: str) -> bool:
    """Whether a server answers at ``address``."""
    try:
        with urllib.request.urlopen(address, timeout=60):
            return True
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False


def lab(folder: Path) -> contextlib.AbstractContextManager[str]:
    """Serve ``folder`` in JupyterLab, on this machine only."""
    settings = [
        "--ServerApp.port={port}",
        "--ServerApp.ip=127.0.0.1",
        "--IdentityProvider.token=",
        "--no-browser",
        "--allow-root",
        "--LabApp.expose_app_in_browser=True",
        f"--ServerApp.root_dir={folder}",
    ]
    return serving(["-m", "jupyterlab", *settings], folder)


def voila(notebook: Path, folder: Path) -> contextlib.AbstractContextManager[str]:
    """Serve one notebook as an app."""
    settings = ["--port={port}", "--Voila.ip=127.0.0.1", "--no-browser", "--show_tracebacks=True"]
    settings.append(f"--Voila.tornado_settings={{'websocket_max_message_size': {LARGEST}}}")
    return serving(["-m", "voila", str(notebook), *settings], folder)


@contextlib.contextmanager
def browser_page(executable: str, **context: Any) -> Iterator[Any]:
    """Open a page in headless Chromium."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=QUIET)
        page = browser.new_context(**context).new_page()
        page.set_default_timeout(1000 * ANSWER)
        yield page
        browser.close()


def up_to(notebook: Path, text: str, target: Path) -> Path:
    """Write a notebook without outputs to ``target``, up to the first code cell with ``text``.

    Raises:
        ValueError: no cell holds it.
    """
    whole = nbformat.read(notebook, as_version=4)
    last = next(
        (i for i, c in enumerate(whole.cells) if c.cell_type == "code" and text in c.source), None
    )
    if last is None:
        raise ValueError(f"{notebook.name} has no cell with {text!r}")
    whole.cells = whole.cells[: last + 1]
    for cell in whole.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    nbformat.write(whole, target)
    return target


def run_in_lab(page: Any, address: str, name: str) -> None:
    """Open a notebook in JupyterLab, wait for its kernel and run all of its cells."""
    page.goto(f"{address}/lab/tree/{name}?reset")
    page.locator(".jp-NotebookPanel .jp-Cell").first.wait_for()
    page.wait_for_function(f"() => {_KERNEL}?.status === 'idle'")
    # The braces return nothing: the call does not wait for the cells.
    page.evaluate("() => { window.jupyterapp.commands.execute('notebook:run-all-cells'); }")


def choose_files(page: Any, *files: str | dict[str, Any]) -> None:
    """Upload files by the button and the file dialogue, as a reader does."""
    with page.expect_file_chooser() as waiting:
        page.locator(".widget-upload").click()
    waiting.value.set_files(list(files))
    page.locator(".widget-upload", has_text=f"({len(files)})").wait_for()


def caption(page: Any) -> str:
    """Press the button and return the first caption that appears."""
    page.locator(".capgen-go").click()
    page.locator(".capgen-status", has_text=" s").wait_for()
    return str(page.locator(".capgen-caption").first.inner_text()).strip()


def step(page: Any) -> tuple[str, str]:
    """Move the slider by one word; return the marked word and the picture's alternative text."""
    mark = page.locator(".capgen-steps mark").first
    picture = page.locator(".capgen-steps img").first
    before = picture.get_attribute("alt")
    handle = page.locator(".capgen-steps .noUi-handle").first
    handle.focus()
    handle.press("ArrowRight")
    for _ in range(10 * ANSWER):
        if picture.get_attribute("alt") != before:
            break
        page.wait_for_timeout(100)
    return str(mark.inner_text()), str(picture.get_attribute("alt"))


def keep(png: bytes, target: Path) -> None:
    """Store a screenshot with 256 colours: a quarter of the size, with no visible difference."""
    from capgen_utils.common.files import atomic_path

    with Image.open(io.BytesIO(png)) as image, atomic_path(target) as temporary:
        image.convert("RGB").quantize(256).save(temporary, "PNG", optimize=True)


def main() -> None:
    """Caption a photograph in the app, step to its second word, and save a screenshot."""
    sys.path.insert(0, str(REPOSITORY))
    sys.path.insert(0, str(REPOSITORY / "benchmarks"))
    from page import find_chromium

    executable = find_chromium()
    if executable is None:
        raise SystemExit("Chromium is missing: apt install chromium")
    with tempfile.TemporaryDirectory() as temporary:
        notebook = Path(shutil.copy(NOTEBOOKS / "demo.ipynb", temporary))
        size = {"width": 1000, "height": 1230}
        with (
            voila(notebook, Path(temporary)) as address,
            browser_page(executable, viewport=size) as page,
        ):
            page.goto(address)
            page.locator(".capgen-go").wait_for()
            choose_files(page, str(REPOSITORY / "data" / "photos" / "hikers_on_dune.jpg"))
            print("caption:", caption(page))
            print("step:", *step(page))
            keep(page.screenshot(), PICTURE)
    print(f"written: {PICTURE.relative_to(REPOSITORY)}, {PICTURE.stat().st_size // 1000} kB")


if __name__ == "__main__":
    main()
