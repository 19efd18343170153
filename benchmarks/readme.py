"""Write the generated parts of README.md, docs/results.md and docs/cli.md: ``make readme``.

Figures come from results/*.json, the command line from its parser. Tests compare the pages with
them. ``python benchmarks/readme.py --picture`` also draws results/readme.png, whose captions a
person judges in results/readme.json.
"""

import argparse
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = REPOSITORY / "results"
PAGES = ("README.md", "docs/results.md", "docs/cli.md")
BLOCK = re.compile(r"(<!-- figures: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def read(name: str) -> Any:
    """Return the results file ``results/NAME.json``."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def setting(facts: Mapping[str, Any]) -> str:
    """Return the machine and the versions of a measurement."""
    versions = facts["versions"]
    where = facts["accelerator"] or f"{facts['cpu']}, {facts['cores']} cores"
    return f"{where}, torch {versions['torch']}, Python {facts['python']}"


def results(dataset: str | None = None) -> dict[str, Any]:
    """Return the evaluations of a dataset's test split, or all of them, by file name."""
    from capgen_utils.evaluation.leaderboard import by_split, read_results

    everything = read_results(RESULTS)
    return everything if dataset is None else by_split(everything)[dataset, "test"]


def scores() -> str:
    """BLEU-4 and CIDEr-D of every captioner on Flickr8k beside the human row, for the README."""
    from capgen_utils.evaluation.leaderboard import number, table

    systems = sorted(
        results("flickr8k").values(), key=lambda each: -each["people"]["system"]["scores"]["BLEU-4"]
    )
    rows = [("*one human*", "-", systems[0]["people"]["human"])]
    rows += [(f"`{s['model']}`", s["protocol"]["encoder"], s["people"]["system"]) for s in systems]
    lines = [
        [name, eyes, number(row, "BLEU-4"), number(row, "CIDEr-D")] for name, eyes, row in rows
    ]
    return table(["captions", "encoder", "BLEU-4", "CIDEr-D"], lines)


def scored(dataset: str, definitions: bool = True) -> str:
    """Scores beside floors and people, with their protocol; define the metrics if wanted."""
    from capgen_utils.evaluation.leaderboard import people_table, protocol_lines, scores_table

    evaluations = results(dataset)
    wrong = [each["scores"]["BLEU-4 on the wrong images"] for each in evaluations.values()]
    tables = [
        scores_table(evaluations),
        people_table(evaluations),
        protocol_lines(evaluations, definitions),
        f"Paired with the wrong images, the same captions score {min(wrong):.1f} to "
        f"{max(wrong):.1f} BLEU-4.",
    ]
    return "\n\n".join(filter(None, tables))


def flickr8k() -> str:
    """The scores on real photographs."""
    return scored("flickr8k")


def shapes() -> str:
    """The truth of captions on drawn scenes."""
    from capgen_utils.presets import PRESETS

    encoder = PRESETS["shapes"].encoder  # and not the small CLIP on top of it
    run = next(
        r["pretraining_run"]
        for r in results("shapes").values()
        if r["protocol"]["encoder"] == encoder
    )
    return (
        f"{scored('shapes', definitions=False)} Pre-training their encoder takes "
        f"{run['minutes']:.1f} min, once."
    )


def cost() -> str:
    """What each captioner costs."""
    from capgen_utils.evaluation.leaderboard import cost_table

    return cost_table(results())


def reranking() -> str:
    """How re-ranking by CLIP changes the scores, and the CLIPScore of an independent CLIP."""
    from capgen_utils.evaluation.leaderboard import table

    def moved(
        chosen: Mapping[str, Any],
        scores: Mapping[str, Any],
        key: str,
        times: int = 1,
        unit: str = "",
    ) -> str:
        before = chosen["scores without"] | {"CLIPScore": chosen.get("CLIPScore without")}
        after = scores | {"CLIPScore": chosen.get("CLIPScore")}
        return (
            f"{times * before[key]:.1f} → {times * after[key]:.1f}{unit}"
            if before.get(key) is not None
            else "-"
        )

    rows = [
        [
            result["protocol"]["dataset"],
            f"`{result['model']}`",
            chosen["candidates"],
            f"{100 * chosen['changed']:.0f} %",
            *(moved(chosen, result["scores"], key) for key in ("BLEU-4", "CIDEr-D", "CLIPScore")),
            f"{chosen['CLIPScore of a human caption']:.1f}" if "CLIPScore" in chosen else "-",
            moved(chosen, result["scores"], "true", 100, " %"),
        ]
        for result in results().values()
        for chosen in [result.get("reranking") or {}]
        if "scores without" in chosen
    ]
    head = [
        "dataset",
        "captioner",
        "candidates",
        "changed",
        "BLEU-4",
        "CIDEr-D",
        "CLIPScore, independent CLIP",
    ]
    return table([*head, "of a human caption", "true"], rows)


def attention() -> str:
    """Pointing game and deletion test: is attention on the object, and does it matter?"""
    from capgen_utils.evaluation.leaderboard import table

    found = [
        json.loads(path.read_text(encoding="utf-8"))
        for path in sorted(RESULTS.glob("*_attention.json"))
    ]
    pointed = [
        [
            f"`{result['model']}`",
            choice,
            *(_share(games[kind]["maps"][choice]) for kind in games),
            *(f"{100 * games[kind]['chance']:.1f} %" for kind in games),
            *(f"{100 * games[kind]['maps'][choice]['near']:.1f} %" for kind in games),
        ]
        for result in found
        if "pointing" in result
        for games in [result["pointing"]]
        for choice in result["deletion"]
    ]
    hidden = [
        [
            result["protocol"]["dataset"],
            f"`{result['model']}`",
            choice,
            result["protocol"]["images"],
            row["words"],
            *(f"{row[key]:.2f}" for key in ("looked", "patch", "stranger")),
            *(_more(row[over]) for over in ("over patch", "over stranger")),
        ]
        for result in found
        for choice, row in result["deletion"].items()
    ]
    head = ["captioner", "map", "colour words", "shape words", "chance, colour", "chance, shape"]
    head += ["colour, half a cell wider", "shape, half a cell wider"]
    other = [
        "dataset",
        "captioner",
        "map",
        "images",
        "words",
        "own map",
        "random patch",
        "another word's map",
    ]
    other += ["more than random", "more than another word's"]
    rules = found[0]["protocol"]
    protocol = (
        f"Deletion: {rules['share']:.0%} of the cells are replaced by the {rules['fill']}; "
        f"{rules['draws']} random patches per word; the first images of the test split. "
        f"Brackets: {rules['intervals']}."
    )
    return f"{table(head, pointed)}\n\n{table(other, hidden)}\n\n{protocol}"


def _share(one: Mapping[str, Any]) -> str:
    low, high = one["interval"]
    return f"{100 * one['score']:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"


def _more(one: Mapping[str, Any]) -> str:
    low, high = one["more interval"]
    return f"{100 * one['more']:.0f} % [{100 * low:.0f}, {100 * high:.0f}]"


def published() -> str:
    """Figures that others published on the same split, beside ours; each with its protocol."""
    from capgen_utils.evaluation.leaderboard import table
    from capgen_utils.evaluation.results import ways_of
    from capgen_utils.evaluation.scoring import METEOR_JAVA

    metrics = ("BLEU-1", "BLEU-4", "METEOR", "ROUGE-L", "CIDEr-D")
    rows = json.loads((REPOSITORY / "benchmarks" / "published.json").read_text(encoding="utf-8"))
    rows += [
        {
            "system": f"`{result['model']}`",
            "source": "this course",
            "encoder": result["protocol"]["encoder"],
            "scores": result["scores"] | {"METEOR": result["scores"].get(METEOR_JAVA)},
            "protocol": f"official split, {result['protocol']['images']:,} images, 5 references; "
            "equal to the COCO caption evaluation's tools, METEOR 1.5; "
            f"{ways_of(result['protocol'])}",
        }
        for result in results("flickr8k").values()
    ]
    rows.sort(key=lambda each: -each["scores"].get("BLEU-4", 0))
    lines = []
    for each in rows:
        values = (each["scores"].get(name) for name in metrics)
        shown = ("-" if value is None else f"{value:.1f}" for value in values)
        lines.append([each["system"], each["source"], each["encoder"], *shown, each["protocol"]])
    return table(["system", "source", "encoder", *metrics, "protocol"], lines)


def speed() -> str:
    """Rates and memory."""
    from capgen_utils.evaluation.leaderboard import table

    bench = read("benchmarks")
    extraction, training, decoding = bench["extraction"], bench["training"], bench["decoding"]
    greedy, beam = (f"{decoding[f'captions_per_second_beam_{width}']}" for width in (1, 5))
    rates = [
        (
            f"features of {extraction['images']} photographs, JPEG decoding included "
            f"({extraction['encoder']})",
            f"{extraction['images_per_second']} images/s",
            extraction,
        ),
        (
            f"training the transformer ({training['parameters'] / 1e6:.1f} M parameters)",
            f"{training['tokens_per_second']} tokens/s",
            training,
        ),
        (
            "captions from cached features, greedy / beam 5",
            f"{greedy} / {beam} captions/s",
            decoding,
        ),
    ]
    if "metrics" in bench:
        rates.append((*scoring_rate(bench["metrics"]), bench["metrics"]))
    lines = [
        [
            work,
            rate,
            part.get("dtype", "-"),
            f"{part['peak_anonymous_gigabytes']} GB",
            part["machine"]["load"],
        ]
        for work, rate, part in rates
    ]
    parts = [table(["work", "rate", "dtype", "peak anonymous memory", "load before"], lines)]
    parts.append(f"Measured on: {setting(extraction['machine'])}.")
    if "library" in bench:
        parts.append(beside_library(bench["library"]))
    if "service" in bench:
        parts.append(under_load(bench["service"]))
    return "\n\n".join(parts)


def scoring_rate(part: Mapping[str, Any]) -> tuple[str, str]:
    """What was scored, and the seconds that it took."""
    meteor = f"; METEOR (nltk) {part['seconds_meteor']} s" if part.get("seconds_meteor") else ""
    work = (
        f"all scores of {part['images']:,} captions with {part['resamples']:,} bootstrap resamples"
    )
    return work, f"{part['seconds']} s{meteor}"


def beside_library(part: Mapping[str, Any]) -> str:
    """Our decoder beside the library's ``generate``."""
    from capgen_utils.evaluation.leaderboard import table

    kinds = {
        "": "until the end token",
        "_fixed_length": "fixed length",
        "_one_image": "one image",
    }
    lines = []
    for search in ("greedy", "beam_5"):
        for kind, text in kinds.items():
            each = part[search + kind]
            rates = (
                each["captions_per_second"],
                each["library_captions_per_second"],
                each["ratio"],
            )
            lines.append([f"{search.replace('_', ' ')}, {text}", *rates, each["equal_captions"]])
    shown = table(
        ["decoding, GPT-2 of 4 layers", "captions/s", "`generate`", "ratio", "equal captions"],
        lines,
    )
    load = part["machine"]["load"]
    setting = f"Batch {part['batch']}, {part['dtype']}, {part['threads']} threads"
    return f"{shown}\n\n{setting}, load before {load}."


def under_load(part: Mapping[str, Any]) -> str:
    """The service with one client and with many."""
    from capgen_utils.evaluation.leaderboard import table

    lines = []
    for search, text in {"greedy": "greedy", "default": "the bundle's default"}.items():
        for kind in ("one_client", "many_clients"):
            each = part[search][kind]
            times = (f"{each[f'{p}_milliseconds']} ms" for p in ("p50", "p95", "p99"))
            wrong = each["crossed"] + each["lost"]
            lines.append(
                [
                    text,
                    each["clients"],
                    each["captions_per_second"],
                    *times,
                    wrong,
                    each["resident_megabytes"][1],
                ]
            )
    head = [
        "`capgen serve`, decoding",
        "clients",
        "captions/s",
        "p50",
        "p95",
        "p99",
        "wrong or lost",
        "resident MB",
    ]
    many, load = part["default"]["many_clients"], part["machine"]["load"]
    return (
        f"{table(head, lines)}\n\nClients run on the same machine, {many['seconds']:.0f} s with 24 "
        f"of them; load before {load}. Batching is {part['greedy']['ratio']} and "
        f"{part['default']['ratio']} times as fast as one request at a time."
    )


def commands() -> str:
    """Every command of the command line with its arguments, from the parser."""
    from capgen_utils.apps.cli.main import make_parser, subparsers

    sections = []
    for name, parser in subparsers(make_parser()).items():
        lines = [f"## capgen {name}", "", parser.description or "", ""]
        rows = [action for action in parser._actions if action.dest != "help"]
        if rows:
            lines += ["| argument | meaning |", "| --- | --- |"]
        for action in rows:
            value = "\\|".join(map(str, action.choices or ())) or action.metavar
            value = value or (action.dest.upper() if action.option_strings else action.dest)
            names = [f"{option} {value}" for option in action.option_strings or [""]]
            if action.nargs == 0:
                names = action.option_strings
            text = parser._get_formatter()._expand_help(action).replace("|", "\\|")
            lines.append(f"| {', '.join(f'`{name.strip()}`' for name in names)} | {text} |")
        sections.append("\n".join(lines).rstrip())
    return "\n\n".join(sections)


FIGURES = {
    "scores": scores,
    "flickr8k": flickr8k,
    "published": published,
    "shapes": shapes,
    "cost": cost,
    "speed": speed,
    "reranking": reranking,
    "attention": attention,
    "commands": commands,
}


def fill(text: str) -> str:
    """Return ``text`` with every marked block generated again."""
    return BLOCK.sub(lambda block: f"{block[1]}{FIGURES[block[2]]()}\n{block[3]}", text)


COLOURS = {"right": "#1a7f37", "nearly right": "#9a6700", "wrong": "#b42318"}


def picture(path: Path = RESULTS / "readme.png") -> None:
    """Draw three photographs, each with its caption, a person's verdict and attention over words.

    results/readme.json names bundle, photographs, captions and verdicts. The captions are made
    again, so that a verdict on another caption is an error.
    """
    import matplotlib.pyplot as plt

    from capgen_utils import Captioner
    from capgen_utils.show.plots.photographs import overlay, scale_top

    judged = read("readme")
    captioner = Captioner.from_bundle(REPOSITORY / judged["bundle"])
    preprocessing = captioner.encoder.preprocessing
    figure = plt.figure(figsize=(10, 6.3), layout="constrained")
    for row, entry in zip(figure.subfigures(3), judged["photographs"], strict=True):
        photo = REPOSITORY / "data" / "photos" / entry["photograph"]
        caption, maps = captioner.attention(photo, **judged["decoding"])
        if caption.text != entry["caption"]:
            raise SystemExit(f"{photo.name}: nobody has judged {caption.text!r}")
        steps = [caption.words.index(word) for word in entry["words"]]
        weights = maps[list(maps)[-1]].mean(1)[steps]  # (4, heads, N) -> (4, N)
        values = weights * weights.shape[1]  # in multiples of even attention
        first, *axes = row.subplots(1, 5)
        first.imshow(plt.imread(photo))
        for ax, word, value in zip(axes, entry["words"], values, strict=True):
            ax.imshow(overlay(photo, value, preprocessing, scale_top(values)))
            ax.set_title(word, fontsize=11)
        for ax in (first, *axes):
            ax.axis("off")
        title = f"{entry['verdict']}: {caption.text}"
        colour = COLOURS[entry["verdict"]]
        row.suptitle(title, color=colour, x=0.01, ha="left", fontsize=14, fontweight="bold")
    figure.savefig(path, dpi=80)


def main() -> int:
    """Write the pages, and the picture if asked."""
    parser = argparse.ArgumentParser(description="Write the generated parts of the pages.")
    parser.add_argument("--picture", action="store_true", help="also draw results/readme.png")
    if parser.parse_args().picture:
        picture()
    for name in PAGES:
        page = REPOSITORY / name
        page.write_text(fill(page.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
