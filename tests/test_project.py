"""Rules of the repository: dependencies, structure, docstrings, licences and the set-up."""

import ast
import functools
import os
import re
import shutil
import stat
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import load_benchmark, repository_files
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "capgen_utils"
PHOTOS = ROOT / "data" / "photos"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

MAX_LINES = 40  # of a function, without its docstring
MAX_CHAIN = 14  # modules in the longest path of imports, those inside functions included
MAX_MODULES = 12  # in a folder
MAX_TOP_LEVEL = 8  # the seven modules, and py.typed
MAX_USED_ONCE = 0.085  # of all functions: private ones that are used in one line only
TEXT_SUFFIXES = {"", ".cfg", ".ipynb", ".json", ".md", ".py", ".toml", ".txt", ".yaml", ".yml"}
MACHINE_PATH = re.compile(r"(?<![\w.])/(?:home|root|Users|tmp|mnt|opt|srv|work)/[\w./-]+")
# Files that may hold a path of that kind: file -> why. Paths inside a container are no one's
# machine.
PATHS_ALLOWED: dict[str, str] = {"Dockerfile": "inside the image"}
PICKLING = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve"}


def text_files() -> Iterator[tuple[str, str]]:
    """Yield name and content of the text files that the repository holds."""
    for path in repository_files():
        if path.suffix in TEXT_SUFFIXES and path.stat().st_size < 5_000_000:
            yield (
                path.relative_to(ROOT).as_posix(),
                path.read_text(encoding="utf-8", errors="replace"),
            )


@functools.cache
def trees() -> dict[Path, ast.Module]:
    """The package's modules, parsed."""
    return {
        path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.rglob("*.py"))
    }


def definitions(node: ast.AST, public: bool = True) -> Iterator[tuple[ast.AST, bool]]:
    """Yield functions and classes, and whether each is public: it and all that it stands in."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef):
            shown = public and not child.name.startswith("_")
            yield child, shown
            yield from definitions(child, shown)
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield child, public and not child.name.startswith("_")
            yield from definitions(child, False)
        else:
            yield from definitions(child, public)


def requirement_lines(name: str) -> list[str]:
    lines = (
        line.split("#")[0].strip()
        for line in (ROOT / name).read_text(encoding="utf-8").splitlines()
    )
    return [line for line in lines if line]


def pins() -> dict[str, str]:
    pairs = (line.split("==") for line in requirement_lines("constraints.txt"))
    return {canonicalize_name(name): version for name, version in pairs}


# --- dependencies


EXTRAS = PROJECT["optional-dependencies"]
OWN = "capgen-utils[demo,onnx,serve]"  # what makes `dev` hold the other extras too


@pytest.mark.parametrize(
    "line",
    [*requirement_lines("requirements.txt"), *sorted({*sum(EXTRAS.values(), [])} - {OWN})],
)
def test_requirements_have_lower_bounds_only_and_a_pin_that_meets_them(line: str) -> None:
    requirement = Requirement(line)
    assert [s.operator for s in requirement.specifier] == [">="], (
        "Colab and Kaggle keep their own versions"
    )
    assert requirement.marker is None and requirement.url is None
    pinned = pins().get(canonicalize_name(requirement.name))
    assert pinned, f"constraints.txt does not pin {requirement.name}"
    assert pinned in requirement.specifier


def test_constraints_are_exact_plain_versions() -> None:
    for line in requirement_lines("constraints.txt"):
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9A-Za-z.]*", line), (
            f"{line}: no local part, no file, no marker"
        )
    assert pins()["torch"] == "2.13.0"
    assert pins()["torchvision"] == "0.28.0"
    assert "capgen-utils" not in pins()


def test_the_package_names_its_dependencies_once() -> None:
    assert PROJECT["dynamic"] == ["dependencies"]
    assert PROJECT["scripts"]["capgen"] == "capgen_utils.apps.cli.main:main"


def test_only_the_extra_holds_what_only_the_service_needs() -> None:
    course = {Requirement(line).name for line in requirement_lines("requirements.txt")}
    service = {Requirement(line).name for line in EXTRAS["serve"]}
    assert service >= {"fastapi", "uvicorn"} and not service & course
    assert OWN in EXTRAS["dev"], "`make setup` and the wheelhouse install every extra"


def test_every_link_to_the_repository_is_made_from_the_one_address() -> None:
    own = PROJECT["urls"]["Repository"].removeprefix("https://github.com/")
    link = re.compile(
        r"(?:github\.com|githubusercontent\.com|colab\.research\.google\.com/github)"
        r"/([\w.-]+/capgen)\b"
    )
    for name, text in text_files():
        assert set(link.findall(text)) <= {own}, name


# --- the structure

structure = load_benchmark("structure")


def test_the_longest_chain_of_imports_is_short() -> None:
    chain = structure.longest_chain()
    assert len(chain) <= MAX_CHAIN, " > ".join(chain)


def test_folders_are_small_and_the_top_level_holds_seven_modules() -> None:
    assert len([path for path in PACKAGE.iterdir() if path.is_file()]) <= MAX_TOP_LEVEL
    folders = {path.parent for path in trees()}
    sizes = {f.relative_to(PACKAGE).as_posix(): len(list(f.glob("[!_]*.py"))) for f in folders}
    assert {name: size for name, size in sizes.items() if size > MAX_MODULES} == {}


def test_lines_are_short() -> None:
    assert structure.long_lines() == []


def test_few_private_functions_are_used_only_once() -> None:
    once, count = structure.named_once()
    assert len(once) <= MAX_USED_ONCE * count, sorted(once)


def test_the_structure_command_counts_imports_inside_functions(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tmp_path / "capgen_utils"
    (folder / "b").mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    (folder / "b" / "__init__.py").write_text("")
    (folder / "a.py").write_text("def f():\n    from capgen_utils.b import c\n")
    (folder / "b" / "c.py").write_text("from capgen_utils.d import _once\n")
    (folder / "d.py").write_text("def _once(): ...\n_once()\n")
    parsed = {path: ast.parse(path.read_text()) for path in sorted(folder.rglob("*.py"))}
    monkeypatch.setattr(structure, "REPOSITORY", tmp_path)
    monkeypatch.setattr(structure, "trees", lambda: parsed)
    assert structure.longest_chain() == ["capgen_utils.a", "capgen_utils.b.c", "capgen_utils.d"]
    assert dict(structure.functions(folder)) == {"a.py:1 f": 2, "d.py:1 _once": 1}


# --- the code


@pytest.mark.parametrize("path", trees(), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_public_names_have_docstrings_and_functions_are_short(path: Path) -> None:
    problems = []
    assert ast.get_docstring(trees()[path]), f"{path.name} says nothing about itself"
    for node, public in definitions(trees()[path]):
        assert isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        documented = ast.get_docstring(node) is not None
        if public and not documented:
            problems.append(f"{path.name}:{node.lineno} {node.name} has no docstring")
        first = node.body[0]
        lines = (node.end_lineno or 0) - node.lineno + 1
        lines -= (first.end_lineno or 0) - first.lineno + 1 if documented else 0
        if not isinstance(node, ast.ClassDef) and lines > MAX_LINES:
            problems.append(f"{path.name}:{node.lineno} {node.name} has {lines} lines")
    assert problems == []


def pickle_uses(tree: ast.Module) -> Iterator[str]:
    """Yield each way in which a module could read or write pickles."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (
                f"{node.lineno}: import {a.name}"
                for a in node.names
                if a.name.split(".")[0] in PICKLING
            )
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in PICKLING:
            yield f"{node.lineno}: from {node.module}"
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
            if called in ("torch.save", "joblib.dump") or called.endswith(
                (".save_state", ".load_state")
            ):
                yield f"{node.lineno}: {called}"
            if called == "torch.load" and keywords.get("weights_only") != "True":
                yield f"{node.lineno}: torch.load without weights_only=True"
            if keywords.get("allow_pickle", "False") != "False":
                yield f"{node.lineno}: {called} with allow_pickle"


def test_nothing_in_the_package_pickles() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{use}"
        for path, tree in trees().items()
        for use in pickle_uses(tree)
    ]
    assert found == []


def test_the_pickle_rule_sees_what_it_should() -> None:
    bad = "import pickle\nfrom joblib import dump\ntorch.save(x, f)\ntorch.load(f)\n"
    bad += "np.load(f, allow_pickle=True)\n"
    good = "torch.load(f, weights_only=True)\nnp.load(f, allow_pickle=False)\nsave_file(x, f)\n"
    assert len(list(pickle_uses(ast.parse(bad)))) == 5
    assert list(pickle_uses(ast.parse(good))) == []


def test_no_text_holds_a_path_of_one_machine() -> None:
    found = [
        f"{name}: {match.group(0)[:60]}"
        for name, text in text_files()
        if name not in PATHS_ALLOWED
        for match in MACHINE_PATH.finditer(text)
    ]
    assert found == []


# --- what ships


@pytest.mark.parametrize(
    "name", ["LICENSE", "README.md", "data/README.md", "data/photos/SOURCES.md"]
)
def test_a_reader_finds(name: str) -> None:
    assert (ROOT / name).read_text(encoding="utf-8").strip()


def test_every_photo_opens_is_small_and_has_a_source_and_the_other_way_round() -> None:
    sources = (PHOTOS / "SOURCES.md").read_text(encoding="utf-8")
    rows = {row.split("`")[1]: row for row in sources.splitlines() if row.startswith("| `")}
    photos = {
        path.name for path in PHOTOS.iterdir() if path.name not in ("SOURCES.md", ".DS_Store")
    }
    assert photos == set(rows)
    assert 6 <= len(photos) <= 10
    for name, row in rows.items():
        assert "CC0" in row or "public domain" in row, name
        assert row.count("|") == 6, f"{name}: file, what it shows, package, author, licence"
        with Image.open(PHOTOS / name) as photo:
            photo.load()
            assert max(photo.size) <= 640 and photo.mode == "RGB"
            assert not photo.getexif() and "icc_profile" not in photo.info, (
                f"{name} carries metadata"
            )


def test_downloads_are_ignored_and_small_data_is_not() -> None:
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        pytest.skip("not a git clone")

    def ignored(name: str) -> bool:
        return (
            subprocess.run(
                ["git", "check-ignore", "-q", "--no-index", name], cwd=ROOT, check=False
            ).returncode
            == 0
        )

    assert all(
        map(
            ignored,
            [
                "data/flickr8k/Images/1.jpg",
                "data/features/x.npy",
                ".venv/bin/python",
                "runs/a/b.json",
            ],
        )
    )
    assert ignored("course-output/report.html") and ignored("notebooks/.ipynb_checkpoints/a.ipynb")
    assert not any(
        map(ignored, ["data/README.md", "data/splits/a.txt", "data/photos/a.jpg", "results/a.json"])
    )
    assert not ignored("data/bundles/a/model.safetensors")


# --- the set-up

needs_make = pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")


def script(path: Path, body: str) -> Path:
    """Write an executable shell script."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def run_make(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    outer = {
        "MAKEFLAGS",
        "MAKELEVEL",
        "MFLAGS",
        "PYTHON",
    }  # of the make that may be running these tests
    env = {key: value for key, value in os.environ.items() if key not in outer}
    command = ["make", "--no-print-directory", "-f", str(ROOT / "Makefile"), *arguments]
    return subprocess.run(
        command, cwd=folder, env=env, capture_output=True, text=True, timeout=60, check=False
    )


@needs_make
def test_an_old_python_is_refused_with_its_version_and_a_remedy(tmp_path: Path) -> None:
    old = script(tmp_path / "an old" / "python", "echo 3.9")
    done = run_make(tmp_path, "check-python", f"PYTHON={old}")
    assert done.returncode != 0
    assert "needs Python 3.11 or newer" in done.stderr
    assert f"{old} is 3.9" in done.stderr
    assert "make PYTHON=" in done.stderr
    assert (
        "no Python that runs" in run_make(tmp_path, "check-python", "PYTHON=no-such-python").stderr
    )


@needs_make
@pytest.mark.parametrize(
    ("versions", "chosen"),
    [
        (["3.12", "3.11"], 0),
        (["3.9", "3.10", "3.13"], 2),
        (["3.15", "3.12"], 1),
        (["2.7", "3.14"], 1),
        (["3.100"], 0),
    ],
)
def test_the_first_suitable_python_is_chosen(
    tmp_path: Path, versions: list[str], chosen: int
) -> None:
    scripts = [
        script(tmp_path / f"python{i}", f"echo {version}") for i, version in enumerate(versions)
    ]
    broken = script(tmp_path / "broken", "exit 127")
    done = run_make(
        tmp_path, "check-python", f"CANDIDATES={' '.join(map(str, [broken, *scripts]))}"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] == str(scripts[chosen])


@needs_make
def test_the_python_of_these_tests_is_accepted(tmp_path: Path) -> None:
    assert run_make(tmp_path, "check-python", f"PYTHON={sys.executable}").returncode == 0


@needs_make
def test_a_set_up_that_fails_half_way_does_not_look_complete(tmp_path: Path) -> None:
    for name in ("requirements.txt", "constraints.txt", "pyproject.toml"):
        (tmp_path / name).touch()
    # This Python makes a .venv whose own Python answers but cannot install anything.
    answer = "'#!/bin/sh\\ncase $1 in -m) exit 1;; esac\\n'"
    inner = f"mkdir -p .venv/bin && printf {answer} > .venv/bin/python"
    fake = script(
        tmp_path / "python",
        f"case $1 in -c) echo 3.12;; *) {inner} && chmod +x .venv/bin/python;; esac",
    )
    for _ in range(2):
        done = run_make(tmp_path, "setup", f"PYTHON={fake}")
        assert done.returncode != 0
        assert (tmp_path / ".venv").is_dir() and not (tmp_path / ".venv" / ".complete").exists()


@needs_make
def test_make_alone_lists_the_targets(tmp_path: Path) -> None:
    shown = run_make(tmp_path).stdout
    for target in ("help", "course", "test", "lint", "bench", "lab", "notebooks", "clean"):
        assert re.search(rf"^  make {target}\s+\S", shown, re.MULTILINE), target


def test_continuous_integration_is_strict_and_calls_make_test() -> None:
    path = ROOT / ".ci" / "run"
    text = path.read_text(encoding="utf-8")
    assert os.access(path, os.X_OK)
    assert "CAPGEN_STRICT=1" in text and text.rstrip().endswith("make test")
