"""README and docs agree with the results files and the parser; commands, links and code work."""

import re
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from helpers import ROOT, load_benchmark, run_python

from capgen_utils.apps.cli.main import main, make_parser, subparsers

PATHS = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in PATHS}
README, RESULTS = PAGES["README.md"], PAGES["docs/results.md"]


@pytest.fixture(scope="module")
def readme() -> ModuleType:
    return load_benchmark("readme")


def test_the_readme_is_short() -> None:
    assert len(README.encode()) <= 8192


def test_generated_parts_agree_with_results_and_parser(readme: ModuleType) -> None:
    blocks = re.findall(r"<!-- figures: (\w+) -->", "\n".join(PAGES.values()))
    assert sorted(blocks) == sorted(readme.FIGURES), "every block once, and no other"
    assert {name for name, text in PAGES.items() if "<!-- figures" in text} == set(readme.PAGES)
    for name in readme.PAGES:
        assert readme.fill(PAGES[name]) == PAGES[name], f"{name}: run make readme"


def test_a_changed_figure_is_noticed(readme: ModuleType) -> None:
    for page, result in [
        (RESULTS, readme.read("flickr8k_transformer")["scores"]),
        (README, readme.read("flickr8k_transformer")["people"]["system"]["scores"]),
    ]:
        score = f"{result['BLEU-4']:.1f}"
        assert score in page
        tampered = page.replace(score, "99.9")
        assert readme.fill(tampered) != tampered


def test_the_readme_scores_every_captioner_and_people_against_the_same_references(
    readme: ModuleType,
) -> None:
    systems = readme.results("flickr8k").values()
    assert {each["people"]["references"] for each in systems} == {4}
    rows = readme.scores().splitlines()[2:]
    assert len(rows) == 6 and rows[0].startswith("| *one human* |")
    for each in systems:
        scores = each["people"]["system"]["scores"]
        (row,) = [row for row in rows if f"| `{each['model']}` |" in row]
        assert f"| {scores['BLEU-4']:.1f} [" in row and f"| {scores['CIDEr-D']:.1f} [" in row


def test_the_example_prints_what_the_readme_shows(tmp_path: Path) -> None:
    code, output = re.findall(
        r"<!-- example -->\n```python\n(.*?)```\n\n```text\n(.*?)```", README, re.S
    )[0]
    done = run_python("-c", code, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout == output


def test_each_pictured_caption_was_judged_by_a_person(readme: ModuleType) -> None:
    judged = readme.read("readme")
    assert (ROOT / judged["bundle"] / "config.json").is_file() and judged["judge"]
    assert set(judged["rule"]) == set(readme.COLOURS)
    verdicts = [entry["verdict"] for entry in judged["photographs"]]
    assert verdicts == ["right", "nearly right", "wrong"]
    for entry in judged["photographs"]:
        assert (ROOT / "data" / "photos" / entry["photograph"]).is_file() and entry["reason"]
        assert len(entry["words"]) == 4 and set(entry["words"]) <= set(entry["caption"].split())
    assert (ROOT / "results" / "readme.png").is_file() and "results/readme.png" in README


def test_every_command_is_in_the_reference() -> None:
    for name, parser in subparsers(make_parser()).items():
        section = PAGES["docs/cli.md"].split(f"## capgen {name}\n")[1].split("\n## ")[0]
        for action in parser._actions[1:]:
            assert all(f"`{option}" in section for option in action.option_strings)


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


@pytest.mark.parametrize("name", PAGES)
def test_links_and_pictures_exist(name: str) -> None:
    targets = re.findall(r"\]\(([^)]+)\)", PAGES[name])
    for target, _, anchor in (each.partition("#") for each in targets if "://" not in each):
        path = (ROOT / name).parent / target
        assert path.exists(), target
        headings = (
            re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.M) if anchor else ()
        )
        slugs = {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in headings}
        assert not anchor or anchor in slugs, f"{target}#{anchor}"


@pytest.mark.parametrize(
    "line",
    sorted(
        set(re.findall(r"^capgen (\w+.*?)(?:\s*#.*)?$", "\n".join(PAGES.values()), re.MULTILINE))
    ),
)
def test_commands_are_understood(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The options of every command shown are options that it has."""
    command, *rest = line.split()
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    usage = capsys.readouterr().out
    assert [word for word in rest if word.startswith("--") and word not in usage] == []


@pytest.mark.parametrize("name", PAGES)
def test_make_targets_exist(name: str) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"(?:`|^)make ([a-z-]+)\b", PAGES[name], re.MULTILINE)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_the_twelve_errors_are_ones_that_occur() -> None:
    """Each message stands in the sources, but for those of other programs."""
    table = PAGES["docs/troubleshooting.md"].split("## Error messages")[1].split("\n## ")[0]
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


def test_licences_are_named_and_the_citation_has_the_version() -> None:
    last = README.split("## Licence and citation")[1]
    for what in ("MIT", "Apache-2.0", "CC0", "Flickr8k", "EfficientNet-Lite0"):
        assert what in last and what in PAGES["docs/data.md"].split("## Licences")[1]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert citation["version"] == project["version"]
    assert citation["repository-code"] == project["urls"]["Repository"]
