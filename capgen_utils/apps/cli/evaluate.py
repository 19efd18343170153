"""The commands ``evaluate``, ``attention``, ``score`` and ``leaderboard``."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from capgen_utils.apps.cli.arguments import (
    BUNDLE,
    DATA,
    DECODING_GROUPS,
    Command,
    Options,
    decoding_options,
)
from capgen_utils.common.files import write_json, write_text
from capgen_utils.presets import PRESETS


def run_evaluate(options: argparse.Namespace) -> None:
    """Run ``capgen evaluate``."""
    from capgen_utils.captioner import Captioner
    from capgen_utils.data.datasets import load_dataset
    from capgen_utils.evaluation.results import evaluate, read_result, rescore
    from capgen_utils.vision.dual_encoder import DualEncoder

    for path in options.rescore or ():
        dataset = options.dataset or read_result(path)["protocol"]["dataset"]
        _write_evaluation(path, rescore(path, load_dataset(dataset, options.data), options.java))
    if options.rescore:
        return

    captioner = Captioner.from_bundle(
        options.bundle, encoder_weights=options.encoder_weights, scorer=options.scorer
    )
    manifest = load_dataset(_dataset_of(captioner.bundle, options), options.data)
    name = options.name or f"{manifest.name}_{captioner.bundle.info['model']}"
    _write_evaluation(
        options.output / f"{name}.json",
        evaluate(
            captioner,
            manifest,
            options.split,
            rerank=options.rerank,
            judge=DualEncoder.load(options.judge) if options.judge else None,
            limit=options.limit,
            java=options.java,
            **decoding_options(options),
        ),
    )


def _dataset_of(bundle: Any, options: argparse.Namespace) -> str:
    """Return the dataset that is asked for, else the one the captioner was trained on."""
    trained_on = PRESETS.get(bundle.info.get("preset", ""))
    return options.dataset or (trained_on.dataset if trained_on else "flickr8k")


def _write_evaluation(path: Path, evaluation: Any) -> None:
    from capgen_utils.evaluation.results import predictions_path, summary, write_predictions

    write_predictions(predictions_path(path), evaluation.captions)
    write_json(path, evaluation.result)
    print(summary(evaluation.result))
    print(f"written: {path} and its captions in the same folder")


def run_attention(options: argparse.Namespace) -> None:
    """Run ``capgen attention``."""
    from capgen_utils.captioner import Captioner
    from capgen_utils.data.datasets import load_dataset
    from capgen_utils.evaluation.grounding import measure, summary

    captioner = Captioner.from_bundle(options.bundle, encoder_weights=options.encoder_weights)
    manifest = load_dataset(_dataset_of(captioner.bundle, options), options.data)
    result = measure(captioner, manifest, options.split, options.images, options.seed)
    path = options.output / f"{manifest.name}_{result['model']}_attention.json"
    write_json(path, result)
    print(summary(result))
    print(f"written: {path}")


def run_score(options: argparse.Namespace) -> None:
    """Run ``capgen score``."""
    from capgen_utils.evaluation.scoring import as_lines, score_files

    files = score_files(
        options.predictions, options.references, options.training, options.against, options.java
    )
    for name, sentence in files.warnings.items():
        print(f"WARNING: {name}: {sentence}", file=sys.stderr)
    for finding in files.findings:
        print(f"WARNING: {finding.name}: {finding.text}\n  -> {finding.remedy}", file=sys.stderr)
    intervals = files.intervals if options.intervals else {}
    if options.json:
        rows: dict[str, Any] = dict(files.scores)
        if options.intervals or options.against is not None:  # metric -> an object
            rows = {name: {"value": value} for name, value in rows.items()}
        for name, interval in intervals.items():
            rows[name] |= {"low": interval.low, "high": interval.high}
        for name, difference in files.differences.items():
            rows[name]["ahead"] = difference._asdict()
        print(json.dumps(rows, indent=2))
        return
    lines = as_lines(
        (name, value, intervals[name][1:] if name in intervals else None)
        for name, value in files.scores.items()
    )
    if files.differences:
        lines.append(f"ahead of {options.against}, with the share of resamples in which it is:")
    for name, (value, low, high, wins) in files.differences.items():
        lines.append(f"  {name:28s} {value:+10.2f}   [{low:+.2f}, {high:+.2f}]   {wins:.1%}")
    lines += [f"  {name}: {rule}" for name, rule in files.protocol.items()]
    print("\n".join(lines))


def run_leaderboard(options: argparse.Namespace) -> None:
    """Run ``capgen leaderboard``."""
    from capgen_utils.evaluation.leaderboard import leaderboard

    text = leaderboard(options.results)
    output = options.output or options.results / "leaderboard.md"
    write_text(output, text)
    print(text)
    print(f"written: {output}")


# --- their options

JAVA: Options = {
    "--java": dict(
        action="store_true",
        help="METEOR 1.5 too, as reported in papers; needs Java and: pip install pycocoevalcap",
    )
}
SPLIT: Options = {
    **BUNDLE,
    "--split": dict(default="test", help="dev or test"),
    **DATA,
    "--dataset": dict(help="default: the one the captioner was trained on"),
    "--output": dict(
        type=Path, default=Path("results"), metavar="FOLDER", help="folder of the results"
    ),
}
COMMANDS = (
    Command(
        "evaluate",
        run_evaluate,
        "Caption a split and score the captions.",
        {
            **SPLIT,
            "--limit": dict(
                type=int, metavar="N", help="only the first N images (not a score to publish)"
            ),
            "--rescore": dict(
                type=Path,
                nargs="+",
                metavar="FILE",
                help="only score the captions of these results files again, without decoding",
            ),
            **JAVA,
            "--name": dict(help="name of the results files (default: DATASET_MODEL)"),
            "--judge": dict(
                type=Path,
                metavar="FOLDER",
                help="an independent CLIP that measures how well the captions fit (CLIPScore)",
            ),
        },
        DECODING_GROUPS,
    ),
    Command(
        "attention",
        run_attention,
        "Test a captioner's attention: pointing game on shapes, deletion test.",
        {
            **SPLIT,
            "--images": dict(
                type=int, default=100, metavar="N", help="the first N images of the split"
            ),
            "--seed": dict(type=int, default=0, help="seed of random patches and intervals"),
        },
    ),
    Command(
        "score",
        run_score,
        "Score captions in COCO's formats, or in mappings image -> caption and image -> captions.",
        {
            "predictions": dict(type=Path, help="generated captions, one per image"),
            "references": dict(type=Path, help="human captions of the same images"),
            "--json": dict(
                action="store_true", help="print one JSON object: metric -> value, times 100"
            ),
            "--intervals": dict(action="store_true", help="print 95 %% bootstrap intervals"),
            "--against": dict(
                type=Path,
                metavar="FILE",
                help="another system's captions, to compare with (paired bootstrap)",
            ),
            "--training": dict(
                type=Path,
                metavar="FILE",
                help="human captions of the training images, to find copies",
            ),
            **JAVA,
        },
    ),
    Command(
        "leaderboard",
        run_leaderboard,
        "Print and write the tables of all results files.",
        {
            "--results": dict(
                type=Path,
                default=Path("results"),
                metavar="FOLDER",
                help="folder of the results files",
            ),
            "--output": dict(
                type=Path,
                metavar="FILE",
                help="Markdown file (default: leaderboard.md in the same folder)",
            ),
        },
    ),
)
