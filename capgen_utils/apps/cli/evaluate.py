"""The commands ``evaluate``, ``attention``, ``score`` and ``leaderboard``."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from capgen_utils.apps.cli.arguments import (
    add_bundle_options,
    add_command,
    add_decoding_options,
    add_reranking_options,
    decoding_options,
)
from capgen_utils.common.files import write_json
from capgen_utils.presets import PRESETS

_JAVA = "METEOR 1.5 too, as reported in papers; needs Java and: pip install pycocoevalcap"


def _add_split_options(parser: argparse.ArgumentParser) -> None:
    """Declare the captioner, the images and the folder of the results."""
    add_bundle_options(parser)
    parser.add_argument("--split", default="test", help="dev or test")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="folder of the dataset")
    parser.add_argument("--dataset", help="default: the one the captioner was trained on")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("results"),
        metavar="FOLDER",
        help="folder of the results",
    )


def add_evaluate(commands: Any) -> None:
    """Declare ``capgen evaluate``."""
    parser = add_command(
        commands, "evaluate", run_evaluate, "Caption a split and score the captions."
    )
    _add_split_options(parser)
    parser.add_argument(
        "--limit", type=int, metavar="N", help="only the first N images (not a score to publish)"
    )
    parser.add_argument(
        "--rescore",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="only score the captions of these results files again, without decoding",
    )
    parser.add_argument("--java", action="store_true", help=_JAVA)
    parser.add_argument("--name", help="name of the results files (default: DATASET_MODEL)")
    parser.add_argument(
        "--judge",
        type=Path,
        metavar="FOLDER",
        help="an independent CLIP that measures how well the captions fit (CLIPScore)",
    )
    add_decoding_options(parser)
    add_reranking_options(parser)


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
    evaluation = evaluate(
        captioner,
        manifest,
        options.split,
        rerank=options.rerank,
        judge=DualEncoder.load(options.judge) if options.judge else None,
        limit=options.limit,
        java=options.java,
        **decoding_options(options),
    )
    name = options.name or f"{manifest.name}_{captioner.bundle.info['model']}"
    _write_evaluation(options.output / f"{name}.json", evaluation)


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


def add_attention(commands: Any) -> None:
    """Declare ``capgen attention``."""
    parser = add_command(
        commands,
        "attention",
        run_attention,
        "Test a captioner's attention: pointing game on shapes, deletion test.",
    )
    _add_split_options(parser)
    parser.add_argument(
        "--images", type=int, default=100, metavar="N", help="the first N images of the split"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of random patches and intervals")


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


def add_score(commands: Any) -> None:
    """Declare ``capgen score``."""
    parser = add_command(
        commands,
        "score",
        run_score,
        "Score captions in COCO's formats, or in mappings image -> caption and image -> captions.",
    )
    parser.add_argument("predictions", type=Path, help="generated captions, one per image")
    parser.add_argument("references", type=Path, help="human captions of the same images")
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object: metric -> value, times 100"
    )
    parser.add_argument("--intervals", action="store_true", help="print 95 %% bootstrap intervals")
    parser.add_argument(
        "--against",
        type=Path,
        metavar="FILE",
        help="another system's captions, to compare with (paired bootstrap)",
    )
    parser.add_argument(
        "--training",
        type=Path,
        metavar="FILE",
        help="human captions of the training images, to find copies",
    )
    parser.add_argument("--java", action="store_true", help=_JAVA)


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


def add_leaderboard(commands: Any) -> None:
    """Declare ``capgen leaderboard``."""
    parser = add_command(
        commands, "leaderboard", run_leaderboard, "Print and write the tables of all results files."
    )
    parser.add_argument(
        "--results",
        type=Path,
        default=Path("results"),
        metavar="FOLDER",
        help="folder of the results files",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="Markdown file (default: leaderboard.md in the same folder)",
    )


def run_leaderboard(options: argparse.Namespace) -> None:
    """Run ``capgen leaderboard``."""
    from capgen_utils.common.files import write_text
    from capgen_utils.evaluation.leaderboard import leaderboard

    text = leaderboard(options.results)
    output = options.output or options.results / "leaderboard.md"
    write_text(output, text)
    print(text)
    print(f"written: {output}")
