"""Running notebooks: this Python, offline pages, located errors, outputs without private paths."""

import os
import re
import sys
from pathlib import Path

import nbformat
import pytest
from bs4 import BeautifulSoup
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from capgen_utils.apps.authoring import course
from capgen_utils.common.files import CapGenError


def write_notebook(path: Path, *cells: str, title: str = "A small notebook") -> Path:
    """Write a notebook with a title and code cells."""
    path.parent.mkdir(parents=True, exist_ok=True)
    notebook = new_notebook(
        cells=[new_markdown_cell(f"# {title}\nText."), *map(new_code_cell, cells)]
    )
    nbformat.write(notebook, path)
    return path


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that stands in for notebooks/."""
    monkeypatch.setattr(course, "NOTEBOOKS", tmp_path / "notebooks")
    return tmp_path / "notebooks"


def test_the_kernel_is_this_python_with_the_preset_and_the_data_folder(
    folder: Path, tmp_path: Path
) -> None:
    path = write_notebook(
        folder / "00_a.ipynb",
        "import os, sys, pathlib\n"
        "print(sys.executable, os.environ['CAPGEN_PRESET'], pathlib.Path.cwd().name)",
        "from capgen_utils.config import data_dir\nprint(data_dir())",
    )
    outcome = course.run_notebook(path, "shapes", keep=True)
    assert not outcome.error and outcome.title == "A small notebook"
    first, second = (cell.outputs[0].text for cell in nbformat.read(path, 4).cells[1:])
    assert Path(first.split()[0]).name == Path(sys.executable).name
    assert first.split()[1:] == ["shapes", "notebooks"]
    assert second.strip() == "data", "the data folder of this machine is not written down"


@pytest.mark.parametrize(("train", "told"), [(True, "1"), (False, "0")])
def test_the_kernel_is_told_whether_to_train(
    folder: Path,
    tmp_path: Path,
    train: bool,
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("CAPGEN_DATA", str(tmp_path / "data"))
    path = write_notebook(folder / "00_a.ipynb", "import os\nprint(os.environ['CAPGEN_TRAIN'])")
    course.run_course("shapes", tmp_path / "pages", train=train)
    assert f"<pre>{told}" in (tmp_path / "pages" / "00_a.html").read_text()
    assert ("shapes_transformer" in capsys.readouterr().out) is not train, (
        "what ships is in the table at the end"
    )
    assert not nbformat.read(path, 4).cells[1].outputs


def test_kept_outputs_have_a_hash_and_no_trace_of_the_machine(folder: Path) -> None:
    path = write_notebook(
        folder / "00_a.ipynb",
        "import os, sys, pathlib\n"
        "print(pathlib.Path.home() / 'x', os.environ['CAPGEN_DATA'] + '/runs')",
        "print('noise', file=sys.stderr)\n"
        "from tqdm.auto import tqdm\nlist(tqdm(range(3), disable=False))",
    )
    course.run_notebook(path, "shapes", keep=True)
    text, notebook = path.read_text(), nbformat.read(path, 4)
    assert os.environ["CAPGEN_DATA"] not in text and str(Path.home() / "x") not in text
    assert notebook.cells[1].outputs[0].text == "~/x data/runs\n"
    assert "noise" not in text.replace("print('noise'", "") and "widget" not in text
    assert notebook.metadata.capgen.code_hash == course.code_hash(notebook)
    assert (
        "version" not in notebook.metadata.language_info
        and "execution" not in notebook.cells[1].metadata
    )


def test_the_hash_changes_with_code_and_not_with_text(folder: Path) -> None:
    one = nbformat.read(write_notebook(folder / "a.ipynb", "x = 1", title="One"), 4)
    other = nbformat.read(write_notebook(folder / "b.ipynb", "x = 1", title="Two"), 4)
    changed = nbformat.read(write_notebook(folder / "c.ipynb", "x = 2"), 4)
    assert course.code_hash(one) == course.code_hash(other) != course.code_hash(changed)


def test_a_failing_notebook_is_named_with_its_cell_and_its_page_is_written(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = write_notebook(folder / "00_good.ipynb", "print('fine')", title="Good & well")
    bad = write_notebook(folder / "01_bad.ipynb", "print('before')", "1 / 0", "print('never')")
    before = bad.read_text()
    assert course.run_course("shapes", tmp_path / "out", keep=True) == 1
    shown = capsys.readouterr().out
    assert re.search(r"FAILED +[\d.]+ s +01_bad.ipynb", shown)
    assert "cell 3: ZeroDivisionError: division by zero" in shown
    assert "ok" in shown.split("01_bad")[0]
    page = (tmp_path / "out" / "01_bad.html").read_text()
    assert "before" in page and "ZeroDivisionError" in page
    assert bad.read_text() == before, "a failed notebook is not overwritten"
    assert nbformat.read(good, 4).cells[1].outputs[0].text == "fine\n"
    index = (tmp_path / "out" / "index.html").read_text()
    assert (
        "Good &amp; well" in index and 'href="01_bad.html"' in index and index.count("failed") == 1
    )


def test_without_keep_the_notebook_stays_as_it_is(folder: Path, tmp_path: Path) -> None:
    path = write_notebook(folder / "00_a.ipynb", "print('hello')")
    before = path.read_bytes()
    assert course.run_course("shapes", tmp_path / "out") == 0
    assert path.read_bytes() == before
    assert "hello" in (tmp_path / "out" / "00_a.html").read_text()


def test_notebooks_come_in_order_and_solutions_follow_their_notebook(folder: Path) -> None:
    for name in ("05_b", "00_a", "draft", "solutions/00_solutions", "solutions/07_solutions"):
        write_notebook(folder / f"{name}.ipynb")
    assert [p.name for p in course.find_notebooks()] == ["00_a.ipynb", "05_b.ipynb"]
    assert [p.stem for p in course.find_notebooks(solutions=True)] == [
        "00_a",
        "00_solutions",
        "05_b",
    ]
    assert [p.stem for p in course.find_notebooks("5")] == ["05_b"]
    with pytest.raises(CapGenError, match="choose one of 00, 05"):
        course.find_notebooks("03")


def test_an_unknown_preset_is_refused_before_anything_runs(folder: Path, tmp_path: Path) -> None:
    write_notebook(folder / "00_a.ipynb", "1 / 0")
    with pytest.raises(CapGenError, match="no preset"):
        course.run_course("shape", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_pages_need_no_network_and_images_keep_their_text() -> None:
    badge = "[![Open](https://example.org/badge.svg)](https://example.org)"
    title = new_markdown_cell(f"# Title\n`code` {badge}")
    notebook = new_notebook(cells=[title, new_code_cell("draw()")])
    pixel = (
        "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAA"
        "DUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
    )
    metadata = {"image/png": {"alt": 'a "red" dot & more'}}
    notebook.cells[1].outputs = [
        new_output("display_data", {"image/png": pixel}, metadata=metadata)
    ]
    page = course.html_page(notebook, "name")
    images = BeautifulSoup(page, "html.parser").find_all("img")
    assert [image["alt"] for image in images] == ['a "red" dot & more']
    assert "<script" not in page and '<a href="https://example.org">Open</a>' in page
    assert not re.search(r"<link\b[^>]*\bhref=[\"']?(?:https?:)?//", page)
    assert not re.search(r"\bimport\b[^;]*[\"']https?://|@import|url\([\"']?https?:", page)


def test_the_table_lists_runs_with_their_best_score(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CAPGEN_DATA", str(tmp_path))
    assert "no captioner" in course.captioners_table()
    run = tmp_path / "runs" / "shapes_transformer"
    run.mkdir(parents=True)
    lines = ['{"epoch": 1, "train_loss": 1, "BLEU-4": 30.5, "seconds": 60}']
    lines.append('{"epoch": 2, "train_loss": 1, "BLEU-4": 20.0, "seconds": 150}')
    (run / "log.jsonl").write_text("\n".join(lines))
    assert re.search(r"shapes_transformer +2 +30\.50 +2\.5", course.captioners_table())
