"""Tables of all results files, in Markdown: scores, people, cost; each line says how its numbers
were made."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from capgen_utils.common.files import CapGenError, read_json
from capgen_utils.evaluation.results import read_result, ways_of
from capgen_utils.evaluation.scoring import METEOR_JAVA, METEOR_NLTK, NEAREST

Result = Mapping[str, Any]


METRICS = ("BLEU-1", "BLEU-4", METEOR_NLTK, METEOR_JAVA, "ROUGE-L", "CIDEr-D", "CIDEr")
WITH_INTERVALS = ("BLEU-4", "CIDEr-D")  # in tables; results files hold those of all metrics


TRUTH = {
    "true": "true",
    "true_shuffled": "true of another scene",
    "true_novel": "true, unseen pairs",
    "relation_right": "relation right",
}


def read_results(folder: Path) -> dict[str, Result]:
    """Return the evaluations in a folder: name of the file -> result, in the order of the names.

    Raises:
        CapGenError: there is none, or a file is damaged.
    """
    found: dict[str, Result] = {}
    for path in sorted(Path(folder).glob("*.json")):
        value = read_json(path, "delete it, or evaluate again")
        if isinstance(value, dict) and value.get("kind") == "evaluation":
            found[path.stem] = read_result(path)
    if not found:
        raise CapGenError(
            f"{folder} holds no results of an evaluation",
            "make some: capgen evaluate --bundle FOLDER",
        )
    return found


def leaderboard(folder: Path) -> str:
    """Return all tables of the results files in ``folder``: scores and people for each dataset and
    split, then cost.

    Raises:
        CapGenError: see ``read_results``.
    """
    results = read_results(folder)
    parts = ["# Leaderboard"]
    for (dataset, split), found in by_split(results).items():
        tables = [scores_table(found), protocol_lines(found), people_table(found)]
        parts += [f"## {dataset}, {split} split", *filter(None, tables)]
    parts += ["## Cost", cost_table(results)]
    return "\n\n".join(parts) + "\n"


def by_split(results: Mapping[str, Result]) -> dict[tuple[str, str], dict[str, Result]]:
    """Return results by dataset and split, in the order of the names."""
    groups: dict[tuple[str, str], dict[str, Result]] = {}
    for name, result in results.items():
        place = (result["protocol"]["dataset"], result["protocol"]["split"])
        groups.setdefault(place, {})[name] = result
    return dict(sorted(groups.items()))


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


# --- scores


def chief(results: Mapping[str, Result]) -> str:
    """Return what results are sorted by: truth where all know it, else BLEU-4."""
    return "true" if all("true" in result["scores"] for result in results.values()) else "BLEU-4"


def scores_table(results: Mapping[str, Result]) -> str:
    """Return the scores of one dataset and split: systems and floors, the best first.

    Args:
        results: of one split; see ``by_split``.
    """
    rows = sorted(
        [*_systems(results), *_floors(results)],
        key=lambda row: -row[1]["scores"].get(chief(results), 0),
    )
    metrics = [name for name in METRICS if any(name in each["scores"] for _, each, _ in rows)]
    metrics = [name for name in metrics if name != "CIDEr"] if "CIDEr-D" in metrics else metrics
    truth = [name for name in TRUTH if any(name in each["scores"] for _, each, _ in rows)]
    head = [
        "captions",
        "encoder",
        "decoding",
        "images",
        *truth_names(truth),
        *metrics,
        "distinct",
        "copied",
    ]
    lines = []
    for name, each, facts in rows:
        cells: list[str] = [percent(each["scores"].get(key), 100) for key in truth]
        cells += [number(each, key) for key in metrics]
        cells += [f"{each['scores']['distinct']:.0f}", percent(each["scores"].get("copied"))]
        lines.append([name, *facts, *cells])
    return table(head, lines)


def truth_names(names: Sequence[str]) -> list[str]:
    """Return what columns of truth are called."""
    return [TRUTH[name] for name in names]


def number(row: Result, name: str) -> str:
    """Return a score with its interval, where the tables show one."""
    if name not in row["scores"]:
        return "-"
    low, high = row.get("intervals", {}).get(name, (None, None))
    value = f"{row['scores'][name]:.1f}"
    return (
        f"{value} [{low:.1f}, {high:.1f}]" if name in WITH_INTERVALS and low is not None else value
    )


def percent(value: float | None, factor: float = 1) -> str:
    """Return a share in percent."""
    return "-" if value is None else f"{factor * value:.1f} %"


def _systems(results: Mapping[str, Result]) -> list[tuple[str, Result, list[object]]]:
    """Return name, scores, and encoder, decoding and images of each system."""
    rows = []
    for result in results.values():
        rules = result["protocol"]
        images = (
            rules["images"]
            if rules["images"] == rules["images_in_split"]
            else f"only {rules['images']}"
        )
        rows.append((f"`{result['model']}`", result, [rules["encoder"], ways_of(rules), images]))
    return rows


def _floors(results: Mapping[str, Result]) -> list[tuple[str, Result, list[object]]]:
    """Return the rows that need no model, each once: several results hold the same."""
    rows: dict[str, tuple[str, Result, list[object]]] = {}
    for result in results.values():
        rules = result["protocol"]
        for name, row in result.get("floors", {}).items():
            encoder = rules["encoder"] if name == NEAREST else "-"
            rows[f"{name} {encoder} {row['scores']}"] = (
                f"*{name}*",
                row,
                [encoder, "-", rules["images"]],
            )
    return list(rows.values())


def protocol_lines(results: Mapping[str, Result], definitions: bool = True) -> str:
    """Return under which protocol the scores of one split were made, and what has to be said of
    single systems.

    Args:
        results: of one split.
        definitions: say how each metric is computed.
    """
    rules = [result["protocol"] for result in results.values()]
    first = rules[-1]
    references = " or ".join(sorted({f"{each['references']:,}" for each in rules}))
    said = [
        f"Protocol: {first['dataset']}, {first['split']} split of {first['images_in_split']:,} images, "
        f"{references} references."
    ]
    if definitions:
        said += [f"BLEU: {first['BLEU']}.".replace("<unk>", "`<unk>`")]
        known = {name: each[name] for each in rules for name in METRICS if name in each}
        said += [f"{name}: {known[name]}." for name in METRICS if name in known]
    if "intervals" in first:
        said += [f"Brackets: {first['intervals']}."]
    seeds, revisions = ({str(each.get(key)) for each in rules} for key in ("seed", "revision"))
    said += [f"Training seeds: {', '.join(sorted(seeds))}; code: {', '.join(sorted(revisions))}."]
    notes = [
        f"- `{result['model']}`: {name}: {sentence}"
        for result in results.values()
        for name, sentence in (result.get("warnings") or {}).items()
    ]
    return "\n".join([" ".join(said), *([""] + notes if notes else [])])


def people_table(results: Mapping[str, Result]) -> str:
    """Return what people reach, and each system against the same, smaller number of references;
    empty without people.

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
    """Return what each captioner costs: parameters, training, milliseconds, memory.

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
        spent, run, rate = (
            result.get("cost") or {},
            result.get("training_run"),
            result.get("captions_per_second"),
        )
        megabytes = [spent.get(f"{part}_megabytes") for part in ("captioner", "encoder")]
        lines.append(
            [
                f"`{result['model']}`",
                result["protocol"]["dataset"],
                f"{result['parameters'] / 1e6:.1f} M",
                f"{run['minutes']:.1f} min" if run else "-",
                milliseconds(spent.get("decoding_ms")),
                milliseconds(1000 / rate if rate else None),
                milliseconds(spent.get("encoding_ms")),
                " + ".join(f"{size:.0f}" for size in megabytes) + " MB" if all(megabytes) else "-",
                setting(result["machine"]),
            ]
        )
    return table(head, lines)


def milliseconds(value: float | None) -> str:
    """Return a time."""
    return "-" if value is None else f"{value:.1f} ms"


def setting(facts: Mapping[str, Any]) -> str:
    """Say on what machine something was measured, and how busy that was."""
    where = facts["accelerator"] or f"{facts['cpu']}, {facts['threads']} of {facts['cores']} cores"
    return f"{where}, load {facts['load']}"
