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

_JAVA = "METEOR 1.5 too, the one that papers report; needs Java and: pip install pycocoevalcap"


def _add_split_options(parser: argparse.ArgumentParser) -> None:
    """Declare which captioner is measured, on what, and where the results go."""
    add_bundle_options(parser)
    parser.add_argument("--split", default="test", help="dev or test")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="folder of the dataset")
    parser.add_argument("--dataset", help="instead of the one the captioner was trained on")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("results"),
        metavar="FOLDER",
        help="where the results go",
    )


def _add_evaluate(commands: Any) -> None:
    parser = add_command(commands, "evaluate", _evaluate, "Caption a split and score the captions.")
    _add_split_options(parser)
    parser.add_argument(
        "--limit", type=int, metavar="N", help="only the first N images (no score to publish)"
    )
    parser.add_argument(
        "--rescore",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="score the captions beside these results files again instead; nothing is decoded",
    )
    parser.add_argument("--java", action="store_true", help=_JAVA)
    parser.add_argument("--name", help="of the results files (default: DATASET_MODEL)")
    parser.add_argument(
        "--judge",
        type=Path,
        metavar="FOLDER",
        help="a CLIP that chose nothing and says how well captions fit",
    )
    add_decoding_options(parser)
    add_reranking_options(parser)


def _evaluate(options: argparse.Namespace) -> None:
    if options.rescore:
        return _rescore(options)
    from capgen_utils.captioner import Captioner
    from capgen_utils.data.datasets import load_dataset
    from capgen_utils.evaluation.results import evaluate
    from capgen_utils.vision.dual_encoder import DualEncoder

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
    """The dataset that is asked for, else the one that the captioner was trained on."""
    trained_on = PRESETS.get(bundle.info.get("preset", ""))
    return options.dataset or (trained_on.dataset if trained_on else "flickr8k")


def _rescore(options: argparse.Namespace) -> None:
    from capgen_utils.data.datasets import load_dataset
    from capgen_utils.evaluation.results import read_result, rescore

    for path in options.rescore:
        dataset = options.dataset or read_result(path)["protocol"]["dataset"]
        _write_evaluation(path, rescore(path, load_dataset(dataset, options.data), options.java))


def _write_evaluation(path: Path, evaluation: Any) -> None:
    from capgen_utils.evaluation.results import predictions_path, summary, write_predictions

    write_predictions(predictions_path(path), evaluation.captions)
    write_json(path, evaluation.result)
    print(summary(evaluation.result))
    print(f"written: {path} and the captions beside it")


def _add_attention(commands: Any) -> None:
    parser = add_command(
        commands,
        "attention",
        _attention,
        "Test where a captioner looks: pointing game on shapes, deletion test.",
    )
    _add_split_options(parser)
    parser.add_argument(
        "--images", type=int, default=100, metavar="N", help="the first N images of the split"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of random patches and of the intervals"
    )


def _attention(options: argparse.Namespace) -> None:
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


def _add_score(commands: Any) -> None:
    parser = add_command(
        commands,
        "score",
        _score,
        "Score captions from anywhere: COCO's formats, or mappings image -> caption and image -> list of captions.",
    )
    parser.add_argument("predictions", type=Path, help="generated captions, one an image")
    parser.add_argument("references", type=Path, help="human captions of the same images")
    parser.add_argument(
        "--json", action="store_true", help="one JSON object: metric -> value; all times 100"
    )
    parser.add_argument(
        "--intervals", action="store_true", help="with the ends of 95 %% bootstrap intervals"
    )
    parser.add_argument(
        "--against",
        type=Path,
        metavar="FILE",
        help="another system's captions: is the first one better? (paired bootstrap)",
    )
    parser.add_argument(
        "--training",
        type=Path,
        metavar="FILE",
        help="human captions of the training images: what was copied?",
    )
    parser.add_argument("--java", action="store_true", help=_JAVA)


def _score(options: argparse.Namespace) -> None:
    from capgen_utils.evaluation.scoring import as_lines, score_files

    found = score_files(
        options.predictions, options.references, options.training, options.against, options.java
    )
    for name, sentence in found.warnings.items():
        print(f"WARNING: {name}: {sentence}", file=sys.stderr)
    for finding in found.findings:
        print(f"WARNING: {finding.name}: {finding.text}\n  -> {finding.remedy}", file=sys.stderr)
    if options.json:
        print(
            json.dumps(_score_json(found, options.intervals, options.against is not None), indent=2)
        )
        return
    shown = found.intervals if options.intervals else {}
    print(
        "\n".join(
            as_lines(
                (name, value, shown[name][1:] if name in shown else None)
                for name, value in found.scores.items()
            )
        )
    )
    if found.differences:
        print(f"ahead of {options.against}, with the share of resamples in which it is:")
        for name, one in found.differences.items():
            print(
                f"  {name:28s} {one.value:+10.2f}   [{one.low:+.2f}, {one.high:+.2f}]   {one.wins:.1%}"
            )
    print("\n".join(f"  {name}: {rule}" for name, rule in found.protocol.items()))


def _score_json(found: Any, with_intervals: bool, with_differences: bool) -> dict[str, Any]:
    """Metric -> value; where more is asked for, metric -> an object of what is asked for."""
    if not with_intervals and not with_differences:
        return dict(found.scores)
    rows: dict[str, dict[str, Any]] = {
        name: {"value": value} for name, value in found.scores.items()
    }
    for name, one in found.intervals.items() if with_intervals else ():
        rows[name] |= {"low": one.low, "high": one.high}
    for name, one in found.differences.items():
        rows[name]["ahead"] = one._asdict()
    return rows


def _add_leaderboard(commands: Any) -> None:
    parser = add_command(
        commands, "leaderboard", _leaderboard, "Print and write the tables of all results files."
    )
    parser.add_argument(
        "--results",
        type=Path,
        default=Path("results"),
        metavar="FOLDER",
        help="where the results files are",
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="Markdown (default: leaderboard.md beside them)"
    )


def _leaderboard(options: argparse.Namespace) -> None:
    from capgen_utils.common.files import write_text
    from capgen_utils.evaluation.leaderboard import leaderboard

    text = leaderboard(options.results)
    output = options.output or options.results / "leaderboard.md"
    write_text(output, text)
    print(text)
    print(f"written: {output}")
