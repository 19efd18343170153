"""The README says what the results files say, and its commands and links exist."""

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from capgen_utils.cli import main

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def readme() -> ModuleType:
    spec = importlib.util.spec_from_file_location("readme_figures", ROOT / "benchmarks" / "readme.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["readme_figures"] = module
    spec.loader.exec_module(module)
    return module


def test_figures_are_those_of_the_results_files(readme: ModuleType) -> None:
    assert set(readme.FIGURES) == set(re.findall(r"<!-- figures: (\w+) -->", README)), "every block, and no other"
    assert readme.fill(README) == README, "run: make readme"


def test_a_changed_figure_is_noticed(readme: ModuleType) -> None:
    score = f"{readme.read('flickr8k_transformer')['scores']['BLEU-4']:.1f}"
    assert score in README
    tampered = README.replace(score, "99.9")
    assert readme.fill(tampered) != tampered


def test_links_and_pictures_exist() -> None:
    targets = re.findall(r"\]\(([^)#]+)\)", README)
    local = [target for target in targets if "://" not in target]
    assert len(local) >= 5
    assert [target for target in local if not (ROOT / target).exists()] == []


@pytest.mark.parametrize("line", sorted(set(re.findall(r"^capgen (\w+.*?)(?:\s*#.*)?$", README, re.MULTILINE))))
def test_commands_are_understood(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The options of every command shown are options that it has."""
    command, *rest = line.split()
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    usage = capsys.readouterr().out
    assert [word for word in rest if word.startswith("--") and word not in usage] == []


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"`?make ([a-z]+)\b", README)) - {"and"}:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
