"""``make readme``: writes the figures of results/*.json into the marked blocks of README.md; a test
compares them."""

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = REPOSITORY / "results"
PICTURED = "dog_panting.jpg"
BLOCK = re.compile(r"(<!-- figures: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def read(name: str) -> Any:
    """Return the results file ``results/NAME.json``."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def setting(facts: Mapping[str, Any]) -> str:
    """Say on what machine and with which versions something was measured."""
    versions = facts["versions"]
    where = facts["accelerator"] or f"{facts['cpu']}, {facts['cores']} cores"
    return f"{where}, torch {versions['torch']}, Python {facts['python']}"


def results(dataset: str | None = None) -> dict[str, Any]:
    """Return the evaluations of ``dataset``'s test split, or of everything, by the names of their
    files."""
    from capgen_utils.evaluation.leaderboard import by_split, read_results

    found = read_results(RESULTS)
    return found if dataset is None else by_split(found)[dataset, "test"]


def scored(dataset: str, definitions: bool = True) -> str:
    """Scores beside floors and people, with their protocol; ``definitions`` of the metrics stand on
    the page once."""
    from capgen_utils.evaluation.leaderboard import people_table, protocol_lines, scores_table

    found = results(dataset)
    tables = [scores_table(found), people_table(found), protocol_lines(found, definitions)]
    wrong = [result["scores"]["BLEU-4 on the wrong images"] for result in found.values()]
    tables[-1] += (
        f"\n\nThe same captions on the wrong images score {min(wrong):.1f}"
        + (f" to {max(wrong):.1f}" if len(wrong) > 1 else "")
        + " BLEU-4."
    )
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
    minutes = f"{run['minutes']:.1f} min"
    return f"{scored('shapes', definitions=False)} Pre-training of the encoder, once for all: {minutes}."


def cost() -> str:
    """What each captioner costs."""
    from capgen_utils.evaluation.leaderboard import cost_table

    return cost_table(results())


def reranking() -> str:
    """What CLIP's choice among candidates does to the scores, and what a CLIP thinks of it that had
    no part in it."""
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
        "judge's CLIPScore",
    ]
    return table([*head, "of a human caption", "true"], rows)


def attention() -> str:
    """Whether attention is where the thing is, and whether it matters: pointing game and deletion
    test."""
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
        "where it looked",
        "random patch",
        "another's place",
    ]
    other += ["further than random", "further than another's"]
    rules = found[0]["protocol"]
    protocol = (
        f"Hidden: {rules['share']:.0%} of the cells, under the {rules['fill']}; {rules['draws']} random patches a "
        f"word; the first images of the test split. Brackets: {rules['intervals']}."
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
            "protocol": f"official split, {result['protocol']['images']:,} images, five references; equal to the COCO "
            f"caption evaluation's tools, METEOR 1.5; {ways_of(result['protocol'])}",
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
            f"features of {extraction['images']} photographs, JPEG decoding included ({extraction['encoder']})",
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
        "": "captions end by themselves",
        "_fixed_length": "all of one length",
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
    return f"{shown}\n\nBatch {part['batch']}, {part['dtype']}, {part['threads']} threads, load before {load}."


def under_load(part: Mapping[str, Any]) -> str:
    """The service with one client and with many."""
    from capgen_utils.evaluation.leaderboard import table

    lines = []
    for search, text in {"greedy": "greedy", "default": "the captioner's own"}.items():
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
        f"{table(head, lines)}\n\nClients share the machine with the service; {many['seconds']:.0f} s with many, "
        f"load before {load}. Batching gains {part['greedy']['ratio']} and {part['default']['ratio']} times over one "
        "request at a time."
    )


FIGURES = {
    "flickr8k": flickr8k,
    "published": published,
    "shapes": shapes,
    "cost": cost,
    "speed": speed,
    "reranking": reranking,
    "attention": attention,
}


def fill(text: str) -> str:
    """Return ``text`` with every marked block made anew from the results files."""
    return BLOCK.sub(lambda block: f"{block[1]}{FIGURES[block[2]]()}\n{block[3]}", text)


def picture() -> None:
    """Draw a sample photograph, its caption, and where the captioner looked for each word, into
    results/caption.png."""
    from capgen_utils import Captioner
    from capgen_utils.show.plots import attention_panel

    captioner = Captioner.from_bundle()
    photo = REPOSITORY / "data" / "photos" / PICTURED
    caption, looked = captioner.attention(photo)
    last = list(looked)[-1]
    columns = -(-(len(caption.words) + 1) // 2)
    figure = attention_panel(
        photo, caption.words, looked[last], captioner.encoder.preprocessing, columns
    )
    figure.suptitle(caption.text, fontsize=14)
    figure.savefig(REPOSITORY / "results" / "caption.png", dpi=80)


if __name__ == "__main__":
    sys.path.insert(0, str(REPOSITORY))
    from capgen_utils.common.files import write_text

    picture()

    readme = REPOSITORY / "README.md"
    write_text(readme, fill(readme.read_text(encoding="utf-8")))
