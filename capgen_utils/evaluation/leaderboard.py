"""Markdown tables of all results files: scores, people and cost, with their protocols.

Notebook 09 explains how to read them.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from capgen_utils.common.files import CapGenError, read_json
from capgen_utils.evaluation.results import read_result, ways_of
from capgen_utils.evaluation.scoring import METEOR_JAVA, METEOR_NLTK, NEAREST

Result = Mapping[str, Any]

METRICS = ("BLEU-1", "BLEU-4", METEOR_NLTK, METEOR_JAVA, "ROUGE-L", "CIDEr-D", "CIDEr")
WITH_INTERVALS = ("BLEU-4", "CIDEr-D")  # in tables; results files hold the intervals of all metrics
TRUTH = {
    "true": "true",
    "true_shuffled": "true of another scene",
    "true_novel": "true, unseen pairs",
    "relation_right": "relation right",
}


def read_results(folder: Path) -> dict[str, Result]:
    """Return the evaluations in a folder, sorted: file name without suffix -> result.

    Raises:
        CapGenError: no file holds an evaluation, or one is damaged.
    """
    results: dict[str, Result] = {}
    for path in sorted(Path(folder).glob("*.json")):
        value = read_json(path, "delete it, or evaluate again")
        if isinstance(value, dict) and value.get("kind") == "evaluation":
            results[path.stem] = read_result(path)
    if not results:
        raise CapGenError(
            f"{folder} holds no results of an evaluation",
            "make some: capgen evaluate --bundle FOLDER",
        )
    return results


def leaderboard(folder: Path) -> str:
    """Return all tables of a folder: scores and people for each dataset and split, then cost.

    Raises:
        CapGenError: see ``read_results``.
    """
    results = read_results(folder)
    sections = ["# Leaderboard"]
    for (dataset, split), group in by_split(results).items():
        tables = [scores_table(group), protocol_lines(group), people_table(group)]
        sections += [f"## {dataset}, {split} split", *filter(None, tables)]
    sections += ["## Cost", cost_table(results)]
    return "\n\n".join(sections) + "\n"


def by_split(results: Mapping[str, Result]) -> dict[tuple[str, str], dict[str, Result]]:
    """Return the results grouped by dataset and split, sorted."""
    groups: dict[tuple[str, str], dict[str, Result]] = {}
    for name, result in results.items():
        key = (result["protocol"]["dataset"], result["protocol"]["split"])
        groups.setdefault(key, {})[name] = result
    return dict(sorted(groups.items()))


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


# --- scores


def scores_table(results: Mapping[str, Result]) -> str:
    """Return the scores of one dataset and split: systems and baselines, best first.

    Rows are sorted by truth if all results have it, else by BLEU-4.

    Args:
        results: of one split; see ``by_split``.
    """
    key = "true" if all("true" in r["scores"] for r in results.values()) else "BLEU-4"
    rows = sorted(_rows(results), key=lambda row: -row[1]["scores"].get(key, 0))
    present = {name for _, row, _ in rows for name in row["scores"]}
    present -= {"CIDEr"} if "CIDEr-D" in present else set()
    metrics = [name for name in METRICS if name in present]
    truth = [name for name in TRUTH if name in present]
    head = ["captions", "encoder", "decoding", "images", *(TRUTH[name] for name in truth)]
    lines = [
        [
            title,
            *facts,
            *(with_unit(row["scores"].get(name), factor=100) for name in truth),
            *(number(row, name) for name in metrics),
            f"{row['scores']['distinct']:.0f}",
            with_unit(row["scores"].get("copied")),
        ]
        for title, row, facts in rows
    ]
    return table([*head, *metrics, "distinct", "copied"], lines)


def _rows(results: Mapping[str, Result]) -> list[tuple[str, Result, list[object]]]:
    """Return title, scores, and encoder, decoding and images of all systems and baselines."""
    systems, baselines = [], {}
    for result in results.values():
        rules = result["protocol"]
        encoder, images = rules["encoder"], rules["images"]
        for name, row in result.get("floors", {}).items():  # the same in several results
            facts = [encoder if name == NEAREST else "-", "-", images]
            baselines[f"{name} {facts[0]} {row['scores']}"] = (f"*{name}*", row, facts)
        shown = images if images == rules["images_in_split"] else f"only {images}"
        systems.append((f"`{result['model']}`", result, [encoder, ways_of(rules), shown]))
    return [*systems, *baselines.values()]


def number(row: Result, name: str) -> str:
    """Return a score, with its interval if tables show it."""
    if name not in row["scores"]:
        return "-"
    value, ends = f"{row['scores'][name]:.1f}", row.get("intervals", {}).get(name)
    if ends is None or name not in WITH_INTERVALS:
        return value
    return f"{value} [{ends[0]:.1f}, {ends[1]:.1f}]"


def with_unit(value: float | None, unit: str = "%", factor: float = 1) -> str:
    """Return ``factor`` times a number with its unit, or a dash without one."""
    return "-" if value is None else f"{factor * value:.1f} {unit}"


def protocol_lines(results: Mapping[str, Result], definitions: bool = True) -> str:
    """Return the protocol of one split's scores, and the warnings of single systems.

    Args:
        results: of one split.
        definitions: state how each metric is computed.
    """
    rules = [result["protocol"] for result in results.values()]
    last = rules[-1]
    references = " or ".join(sorted({f"{each['references']:,}" for each in rules}))
    sentences = [
        f"Protocol: {last['dataset']}, {last['split']} split of {last['images_in_split']:,} "
        f"images, {references} references."
    ]
    if definitions:
        sentences.append(f"BLEU: {last['BLEU']}.".replace("<unk>", "`<unk>`"))
        known = {name: each[name] for each in rules for name in METRICS if name in each}
        sentences += [f"{name}: {known[name]}." for name in METRICS if name in known]
    if "intervals" in last:
        sentences.append(f"Brackets: {last['intervals']}.")
    seeds, revisions = ({str(each.get(key)) for each in rules} for key in ("seed", "revision"))
    sentences.append(
        f"Training seeds: {', '.join(sorted(seeds))}; code: {', '.join(sorted(revisions))}."
    )
    notes = [
        f"- `{result['model']}`: {name}: {sentence}"
        for result in results.values()
        for name, sentence in (result.get("warnings") or {}).items()
    ]
    return "\n".join([" ".join(sentences), *([""] + notes if notes else [])])


def people_table(results: Mapping[str, Result]) -> str:
    """Return the human row and the systems against as many references; empty without people.

    Args:
        results: of one split.
    """
    with_people = [result for result in results.values() if result.get("people")]
    if not with_people:
        return ""
    left = with_people[0]["people"]["references"]
    rows = [("*one human*", with_people[0]["people"]["human"])]
    rows += [(f"`{result['model']}`", result["people"]["system"]) for result in with_people]
    metrics = [name for name in METRICS if any(name in row["scores"] for _, row in rows)]
    rows.sort(key=lambda row: -row[1]["scores"]["BLEU-4"])
    return table(
        [f"against {left} references", *metrics],
        [[name, *(number(row, m) for m in metrics)] for name, row in rows],
    )


# --- cost


def cost_table(results: Mapping[str, Result]) -> str:
    """Return the cost of each captioner: parameters, training, milliseconds, memory.

    Args:
        results: of any datasets.
    """
    head = [
        "captioner",
        "dataset",
        "parameters",
        "training",
        "one caption",
        "a caption in a batch",
        "photograph to features",
        "weights: captioner + encoder",
        "measured on",
    ]
    lines = []
    for result in sorted(
        results.values(), key=lambda r: (r["protocol"]["dataset"], r["parameters"])
    ):
        cost, machine = result.get("cost") or {}, result["machine"]
        run, rate = result.get("training_run"), result.get("captions_per_second")
        sizes = [cost.get(f"{module}_megabytes") for module in ("captioner", "encoder")]
        cores = f"{machine['cpu']}, {machine['threads']} of {machine['cores']} cores"
        lines.append(
            [
                f"`{result['model']}`",
                result["protocol"]["dataset"],
                f"{result['parameters'] / 1e6:.1f} M",
                f"{run['minutes']:.1f} min" if run else "-",
                with_unit(cost.get("decoding_ms"), "ms"),
                with_unit(1000 / rate if rate else None, "ms"),
                with_unit(cost.get("encoding_ms"), "ms"),
                " + ".join(f"{size:.0f}" for size in sizes) + " MB" if all(sizes) else "-",
                f"{machine['accelerator'] or cores}, load {machine['load']}",
            ]
        )
    return table(head, lines)
