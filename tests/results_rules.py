"""What every results file must hold: those of the repository and those that tests write."""

import json
import re
from pathlib import Path
from typing import Any

METRICS = {"BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "CIDEr", "CIDEr-D"}
SCORES = METRICS | {
    "BLEU-4 on the wrong images",
    "distinct",
    "mean_length",
    "unk",
    "copied",
    "novel_4",
}
PROTOCOL = {
    "dataset",
    "split",
    "images",
    "images_in_split",
    "references",
    "BLEU",
    "ROUGE-L",
    "CIDEr",
    "CIDEr-D",
    "tokenisation",
    "intervals",
    "decoding",
    "encoder",
    "encoder_weights",
    "extraction_dtype",
    "seed",
    "revision",
}
FLOORS = {"constant caption", "random training caption", "nearest neighbour"}
MACHINE = {"cpu", "cores", "threads", "load", "accelerator", "python", "versions"}
VERSIONS = {"torch", "torchvision", "timm", "transformers", "accelerate", "numpy", "pillow", "nltk"}
PATH = re.compile(r"(?:^|[\s\"'=])(?:/[\w.-]+/[\w./-]+|[A-Za-z]:\\)")


def strings(value: Any) -> list[str]:
    """Return every string in a JSON value."""
    if isinstance(value, str):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [s for v in inner for s in strings(v)]


def problems(result: dict[str, Any], host: str = "") -> list[str]:
    """Return what is missing from the results of an evaluation, or should not be there."""
    found = []
    parts = {
        "scores": SCORES,
        "intervals": METRICS,
        "floors": FLOORS,
        "protocol": PROTOCOL,
        "machine": MACHINE,
    }
    for part, keys in parts.items():
        found += [f"{part} lacks {key}" for key in sorted(keys - set(result.get(part) or {}))]
    found += [
        f"no version of {v}"
        for v in sorted(VERSIONS - set((result.get("machine") or {}).get("versions") or {}))
    ]
    found += [
        f"lacks {key}"
        for key in ("model", "parameters", "date", "captions_per_second")
        if not result.get(key)
    ]
    found += [f"lacks {key}" for key in ("people", "warnings", "findings") if key not in result]
    for name, row in (result.get("floors") or {}).items():
        found += [
            f"{name} lacks {key}"
            for key in sorted(METRICS - set(row["scores"]) | METRICS - set(row["intervals"]))
        ]
    found += [
        f"{name} is outside its interval"
        for name, (low, high) in (result.get("intervals") or {}).items()
        if not low <= result["scores"][name] <= high
    ]
    protocol = result.get("protocol") or {}
    found += [
        f"protocol has no {key}"
        for key in ("encoder", "encoder_weights", "revision")
        if not protocol.get(key)
    ]
    found += [f"holds the path {s[:60]!r}" for s in strings(result) if PATH.search(s)]
    if len(host) > 3:
        found += [f"holds the host name in {s[:60]!r}" for s in strings(result) if host in s]
    return found


DELETED = {"words", "images", "looked", "patch", "stranger", "over patch", "over stranger"}
POINTED = {"tries", "images", "chance", "chance near", "centre", "maps"}
ATTENTION_PROTOCOL = {
    "dataset",
    "split",
    "images",
    "images_in_split",
    "decoding",
    "intervals",
    "encoder",
    "encoder_weights",
    "extraction_dtype",
    "share",
    "draws",
    "fill",
    "test_seed",
    "seed",
    "revision",
}


def attention_problems(result: dict[str, Any]) -> list[str]:
    """Return what is missing from the tests of a captioner's attention, or should not be there."""
    protocol, machine = result.get("protocol") or {}, result.get("machine") or {}
    found = [f"protocol lacks {key}" for key in sorted(ATTENTION_PROTOCOL - set(protocol))]
    found += [f"machine lacks {key}" for key in sorted(MACHINE - set(machine))]
    found += [f"no version of {v}" for v in sorted(VERSIONS - set(machine.get("versions") or {}))]
    found += [
        f"lacks {key}" for key in ("model", "parameters", "date", "deletion") if not result.get(key)
    ]
    found += ["the share of the class token is missing"] * ("class token" not in result)
    for choice, row in (result.get("deletion") or {}).items():
        found += [f"deletion, {choice} lacks {key}" for key in sorted(DELETED - set(row))]
        for over in ("over patch", "over stranger"):
            for value, ends in (("difference", "interval"), ("more", "more interval")):
                found += _outside(f"{choice}, {over}, {value}", row[over][value], row[over][ends])
    for kind, game in (result.get("pointing") or {}).items():
        found += [f"pointing, {kind} lacks {key}" for key in sorted(POINTED - set(game))]
        found += [f"{kind} has no chance level"] * (not 0 < game["chance"] < 1)
        for choice, one in game["maps"].items():
            found += _outside(f"{kind}, {choice}", one["score"], one["interval"])
    return found + [f"holds the path {s[:60]!r}" for s in strings(result) if PATH.search(s)]


def _outside(name: str, value: float, ends: list[float]) -> list[str]:
    return [] if ends[0] <= value <= ends[1] else [f"{name} is outside its interval"]


def prediction_problems(path: Path) -> list[str]:
    """Return what keeps a file from being captions in COCO's results format."""
    rows = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(rows, list) or not rows:
        return ["it is no list of captions"]
    wrong = [
        row for row in rows if not isinstance(row, dict) or set(row) != {"image_id", "caption"}
    ]
    twice = len(rows) - len({str(row.get("image_id")) for row in rows if isinstance(row, dict)})
    return [f"{len(wrong)} rows have other keys"] * bool(wrong) + [
        f"{twice} images come twice"
    ] * bool(twice)
