"""Notebooks run from the first cell to the last, read well, and show what their code computes."""

import ast
import re
from pathlib import Path

import nbformat
import pytest
from conftest import FULL_TRAINING, TRAINING_LIMIT, train_on_shapes
from helpers import ROOT, need
from nbformat import NotebookNode

from capgen_utils.apps.authoring.course import code_hash, run_notebook
from capgen_utils.captioner import DEFAULT_BUNDLE

NUMBERED = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
SOLUTIONS = sorted((ROOT / "notebooks" / "solutions").glob("[0-9][0-9]_solutions.ipynb"))
ALL = NUMBERED + SOLUTIONS
MAX_LINES = 25  # of a cell
MAX_COLUMNS = 100
MAX_IMPORTS = 8  # statements that import from the package, outside the first cell
MAX_BYTES = 600_000
MACHINE_PATH = re.compile(r"(?<![\w.])/(?:home|root|Users|tmp|mnt|opt|srv|work)/[\w./-]+")
SIZES = re.compile(r"#.*\(\w[^)]*\)")  # a comment such as "# (batch, words, width)"


def named(path: Path) -> str:
    return path.stem


def read(path: Path) -> NotebookNode:
    return nbformat.read(path, as_version=4)


def code_cells(path: Path) -> list[NotebookNode]:
    return [cell for cell in read(path).cells if cell.cell_type == "code"]


def prose(path: Path) -> str:
    return "\n".join(cell.source for cell in read(path).cells if cell.cell_type == "markdown")


# --- as they are written


def test_every_notebook_has_its_solutions_and_no_solution_is_left_over() -> None:
    assert [path.name[:2] for path in NUMBERED] == [path.name[:2] for path in SOLUTIONS]
    assert {"00", "01", "02", "05"} <= {path.name[:2] for path in NUMBERED}


@pytest.mark.parametrize("path", ALL, ids=named)
def test_cells_are_short_and_are_python(path: Path) -> None:
    lengths = [len(cell.source.splitlines()) for cell in code_cells(path)]
    assert max(lengths) <= MAX_LINES
    assert sorted(lengths)[len(lengths) // 2] <= 14
    for cell in code_cells(path):
        ast.parse(cell.source)


@pytest.mark.parametrize("path", ALL, ids=named)
def test_lines_of_code_fit_on_a_page(path: Path) -> None:
    lines = [line for cell in code_cells(path) for line in cell.source.splitlines()]
    assert [line for line in lines if len(line) > MAX_COLUMNS] == []


@pytest.mark.parametrize("path", ALL, ids=named)
def test_few_lines_import_from_the_package(path: Path) -> None:
    modules: list[str] = []
    for cell in code_cells(path)[1:]:
        for node in ast.walk(ast.parse(cell.source)):
            if isinstance(node, ast.Import):
                modules += [name.name for name in node.names]
            elif isinstance(node, ast.ImportFrom):
                modules.append(node.module or "")
    modules = [module for module in modules if module.split(".")[0] == "capgen_utils"]
    assert len(modules) <= MAX_IMPORTS, modules


@pytest.mark.parametrize("path", NUMBERED, ids=named)
def test_a_notebook_has_goals_times_warnings_glossary_and_exercises(path: Path) -> None:
    text = prose(path)
    assert text.startswith("# ")
    for part in (
        "**In this notebook you will**",
        "**Time:**",
        "> **What goes wrong:",
        "## Glossary",
        "## Exercises",
    ):
        assert part in text, part
    assert f"solutions/{path.name[:2]}_solutions.ipynb" in text
    exercises = text.split("## Exercises")[1]
    assert re.findall(r"^(\d)\. ", exercises, re.MULTILINE) == ["1", "2", "3"]
    glossary = text.split("## Glossary")[1].split("## Exercises")[0]
    terms = [line.split("|")[1].strip() for line in glossary.splitlines() if line.startswith("| ")][
        1:
    ]
    assert len(terms) >= 6 and terms == sorted(terms, key=str.lower)


@pytest.mark.parametrize("path", SOLUTIONS, ids=named)
def test_solutions_answer_all_three_and_check_themselves(path: Path) -> None:
    assert re.findall(r"^## (\d)\. ", prose(path), re.MULTILINE) == ["1", "2", "3"]
    parts = re.split(
        r"^## \d\. ", "\n".join(cell.source for cell in read(path).cells), flags=re.MULTILINE
    )[1:]
    assert all("assert" in part for part in parts)


@pytest.mark.parametrize("path", ALL, ids=named)
def test_the_preset_is_chosen_in_one_line_and_nothing_branches_on_its_name(path: Path) -> None:
    code = "\n".join(cell.source for cell in code_cells(path))
    assert 'PRESET = os.environ.get("CAPGEN_PRESET", "shapes")' in code_cells(path)[0].source
    assert not re.search(r"(?:PRESET|preset\.name)\s*(?:==|!=|in\b)", code)
    assert not re.search(r"(?:==|!=)\s*[\"'](?:shapes|flickr8k)", code)


@pytest.mark.parametrize("path", NUMBERED, ids=named)
def test_numbered_notebooks_check_what_they_build(path: Path) -> None:
    cells = code_cells(path)
    checks = sum(len(re.findall(r"\bassert", cell.source)) for cell in cells)
    assert checks >= 4 and checks / len(cells) > 0.2


@pytest.mark.parametrize(
    "path", [p for p in NUMBERED if p.name[:2] in ("02", "05", "06", "07", "10")], ids=named
)
def test_tensor_lines_say_their_shape(path: Path) -> None:
    lines = [line for cell in code_cells(path) for line in cell.source.splitlines()]
    operations = re.compile(
        r"\.(?:transpose|permute|flatten|unflatten|softmax|log_softmax|masked_fill|gather)\("
    )
    made = [line for line in lines if re.match(r"\s*\w+ = ", line) and operations.search(line)]
    assert made and [line for line in made if not SIZES.search(line)] == []


@pytest.mark.parametrize("path", ALL, ids=named)
def test_notebooks_hold_nothing_of_one_machine_and_stay_small(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert MACHINE_PATH.findall(text) == []
    assert len(text.encode()) < MAX_BYTES
    assert "$$" not in prose(path), "formulas are plain text: pages load no scripts"
    assert set(read(path).metadata) <= {"kernelspec", "language_info", "capgen"}


@pytest.mark.parametrize("path", ALL, ids=named)
def test_stored_outputs_are_clean_and_come_from_this_code(path: Path) -> None:
    outputs = [output for cell in code_cells(path) for output in cell.outputs]
    assert not any(o.output_type == "error" or o.get("name") == "stderr" for o in outputs)
    if outputs:
        assert read(path).metadata.capgen.code_hash == code_hash(read(path)), "run: make notebooks"
        assert all(cell.execution_count for cell in code_cells(path)), "run: make notebooks"
    for output in outputs:
        for kind in ("image/png", "image/jpeg"):
            assert kind not in output.get("data", {}) or output.metadata[kind]["alt"], (
                "a figure without a text"
            )


# --- as they run


TRAINED = {  # by number; the others need the transformer
    "03": ["show_tell"],
    "04": ["show_tell", "attend_tell"],
    "06": ["clip_prefix"],
    "07": ["clip_gpt2"],
    "10": ["attend_tell", "transformer", "clip_gpt2"],
    "11": ["transformer", "clip_prefix"],
}


@pytest.fixture(scope="module")
def data(reader_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with trained captioners in full training, else an empty one."""
    return reader_data if FULL_TRAINING else tmp_path_factory.mktemp("reader")


@pytest.mark.notebooks
@pytest.mark.slow
@pytest.mark.timeout(TRAINING_LIMIT)
@pytest.mark.parametrize("path", ALL, ids=named)
def test_runs_from_the_first_cell_to_the_last(
    path: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the captioners that ship; with ``CAPGEN_FULL_TRAINING=1``, with those trained here."""
    monkeypatch.setenv("CAPGEN_DATA", str(data))
    models = TRAINED.get(path.name[:2], ["transformer"]) if FULL_TRAINING else []
    runs = [train_on_shapes(data, model) for model in models]
    if "from_bundle()" in path.read_text(encoding="utf-8"):
        need("the trained captioner that ships", (DEFAULT_BUNDLE / "model.safetensors").is_file())
    before = path.read_bytes()
    logs = [(run.folder / "log.jsonl").read_bytes() for run in runs]
    outcome = run_notebook(path, "shapes", tmp_path, train=FULL_TRAINING)
    assert not outcome.error, outcome.error
    assert path.read_bytes() == before
    assert [(run.folder / "log.jsonl").read_bytes() for run in runs] == logs, (
        "a finished run was trained again"
    )
    assert FULL_TRAINING or not list(data.rglob("checkpoint.safetensors")), "trained"
    page = outcome.page.read_text(encoding="utf-8")
    assert str(data) not in page and str(ROOT) not in page
    assert len(page) < 2_000_000
