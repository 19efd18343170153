"""The README says what the results files say, and its commands and links exist."""

import re
from pathlib import Path
from types import ModuleType

import pytest
from helpers import load_benchmark

from capgen_utils.apps.cli.main import main

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def readme() -> ModuleType:
    return load_benchmark("readme")


def test_figures_are_those_of_the_results_files(readme: ModuleType) -> None:
    assert set(readme.FIGURES) == set(re.findall(r"<!-- figures: (\w+) -->", README)), (
        "every block, and no other"
    )
    assert readme.fill(README) == README, "run: make readme"


def test_a_changed_figure_is_noticed(readme: ModuleType) -> None:
    score = f"{readme.read('flickr8k_transformer')['scores']['BLEU-4']:.1f}"
    assert score in README
    tampered = README.replace(score, "99.9")
    assert readme.fill(tampered) != tampered


def test_floors_people_intervals_and_costs_are_shown(readme: ModuleType) -> None:
    for dataset in ("flickr8k", "shapes"):
        block = readme.FIGURES[dataset]()
        for result in readme.results(dataset).values():
            low, high = result["intervals"]["BLEU-4"]
            assert f"{result['scores']['BLEU-4']:.1f} [{low:.1f}, {high:.1f}]" in block
            for row in (
                *result["floors"].values(),
                result["people"]["human"],
                result["people"]["system"],
            ):
                assert f"| {row['scores']['BLEU-4']:.1f} [" in block
        assert all(
            f"*{row}*" in block
            for row in ("constant caption", "random training caption", "nearest neighbour")
        )
        assert "*one human*" in block
    assert readme.FIGURES["cost"]().count("\n") == 1 + len(readme.results())


def test_published_figures_name_source_encoder_and_protocol(readme: ModuleType) -> None:
    block = readme.FIGURES["published"]()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in block.splitlines()[2:]]
    assert len(rows) >= 5 and all(row[0] and row[1] and row[2] and row[-1] for row in rows)
    assert {f"`{result['model']}`" for result in readme.results("flickr8k").values()} < {
        row[0] for row in rows
    }
    others = [row for row in rows if row[1] != "this course"]
    assert all("arXiv" in row[1] for row in others)


def test_benchmarks_that_are_there_are_shown(
    readme: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = readme.read("benchmarks")
    rate = {
        "captions_per_second": 90.5,
        "library_captions_per_second": 45.2,
        "ratio": 2.0,
        "equal_captions": "32 of 32",
    }
    machine = bench["extraction"]["machine"]
    bench["library"] = {
        search + kind: rate
        for search in ("greedy", "beam_5")
        for kind in ("", "_fixed_length", "_one_image")
    } | {"batch": 32, "dtype": "float32", "threads": 2, "machine": machine}
    bench["metrics"] = {
        "images": 1000,
        "resamples": 1000,
        "seconds": 0.7,
        "seconds_meteor": 4.5,
        "peak_anonymous_gigabytes": 0.3,
        "machine": machine,
    }
    monkeypatch.setattr(readme, "read", lambda name: bench)
    block = readme.speed()
    assert (
        "| 0.7 s; METEOR (nltk) 4.5 s |" in block
        and block.count("| 90.5 | 45.2 | 2.0 | 32 of 32 |") == 6
    )


def test_links_and_pictures_exist() -> None:
    targets = re.findall(r"\]\(([^)#]+)\)", README)
    local = [target for target in targets if "://" not in target]
    assert len(local) >= 5
    assert [target for target in local if not (ROOT / target).exists()] == []


@pytest.mark.parametrize(
    "line", sorted(set(re.findall(r"^capgen (\w+.*?)(?:\s*#.*)?$", README, re.MULTILINE)))
)
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


def test_the_twelve_errors_are_ones_that_occur() -> None:
    """Each message stands in the sources, but for those of other programs."""
    table = README.split("## Troubleshooting")[1].split("## Limits")[0]
    shown = [line.split(" | ")[0] for line in table.splitlines() if line.startswith("| `")]
    assert len(shown) == 12
    paths = [ROOT / "Makefile", *(ROOT / "capgen_utils").rglob("*.py")]
    sources = re.sub(
        r"\{[^{}]*\}", "…", "\n".join(path.read_text(encoding="utf-8") for path in paths)
    )
    others = {"operator torchvision::nms does not exist", "no kernel image is available"}
    examples = {
        "resnet50": "…",
        "openai/clip-…": "…",
        "nan at": "… at",
        "cannot write …: No space left on device": "cannot … …: …",
    }
    for message in (
        one for line in shown for one in re.findall(r"`([^`]+)`", line) if one not in others
    ):
        for example, general in examples.items():
            message = message.replace(example, general)
        assert message.strip("… ").removesuffix(":") in sources, message


def test_it_says_how_to_cite_and_what_may_be_done_with_what() -> None:
    last = README.split("## Licence and citation")[1]
    version = re.search(
        r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert version and f"version {version[1]}" in last and "@software{" in last
    for what in ("MIT", "Apache-2.0", "CC0", "Flickr8k", "EfficientNet-Lite0"):
        assert what in last
