"""The command line: ``capgen`` or ``python -m capgen_utils``."""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from capgen_utils import __version__
from capgen_utils.arguments import (
    INTERRUPTED,
    add_bundle_options,
    add_command,
    add_decoding_options,
    add_reranking_options,
    add_weights_option,
    decoding_options,
)
from capgen_utils.captioning import add_caption
from capgen_utils.config import data_dir, train_anew
from capgen_utils.exporting import add_export
from capgen_utils.files import CapGenError, write_json
from capgen_utils.presets import PRESETS, get_preset
from capgen_utils.serving import add_serve

_JAVA = "METEOR 1.5 too, the one that papers report; needs Java and: pip install pycocoevalcap"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0 when all went well; 1 when some images of a bulk command failed; 2 for an error, explained on stderr.
    """
    options = _parser().parse_args(arguments)
    try:
        return int(options.run(options) or 0)
    except CapGenError as error:
        print(f"capgen: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of our output left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("\ncapgen: stopped; run the same command again and it goes on where it was", file=sys.stderr)
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="capgen", description="Image captioning from scratch to CLIP + GPT-2.")
    parser.add_argument("--version", action="version", version=f"capgen {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for add in (
        _add_doctor, _add_download, _add_pretrain, _add_train, _add_evaluate, _add_attention, _add_score,
        _add_leaderboard, add_caption, add_export, add_serve, _add_info, _add_course, _add_completion,
    ):  # fmt: skip
        add(commands)
    return parser


def _add_data_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", default="auto", help=f"auto, {', '.join(PRESETS)}")
    parser.add_argument(
        "--data", type=Path, metavar="FOLDER", help="folder of the dataset, where it is not found by itself"
    )
    add_weights_option(parser)
    parser.add_argument(
        "--limit", type=int, metavar="N", help="only the first N images of each split (for a quick look)"
    )


def _add_doctor(commands: Any) -> None:
    add_command(commands, "doctor", _doctor, "Check this machine and say what is missing and how to get it.")


def _doctor(options: argparse.Namespace) -> int:
    from capgen_utils.doctor import examine, exit_code, report

    findings = examine()
    print(report(findings))
    return exit_code(findings)


def _add_download(commands: Any) -> None:
    parser = add_command(commands, "download", _download, "Get a dataset, or find the one that is there already.")
    parser.add_argument("dataset", nargs="?", default="flickr8k", help="shapes, flickr8k, flickr30k or coco")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="where it is or shall be")


def _download(options: argparse.Namespace) -> None:
    from capgen_utils.datasets import download_dataset, load_dataset

    folder = download_dataset(options.dataset, options.data)
    manifest = load_dataset(options.dataset, folder)
    print(f"{options.dataset} is in {folder}")
    for split in manifest.split_names():
        part = manifest.split(split)
        print(f"  {split:6s} {len(part):7d} images {sum(1 for _ in part.captions()):8d} captions")
    for reason, count in manifest.report.items():
        print(f"  note: {reason}: {count}")


def _add_pretrain(commands: Any) -> None:
    parser = add_command(
        commands,
        "pretrain",
        _pretrain,
        "Train what a preset's captioners start from, once: encoder, small CLIP and language model.",
    )
    parser.add_argument("--preset", default="shapes", help=f"one of {', '.join(PRESETS)}")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="folder of the dataset")
    add_weights_option(parser)
    parser.add_argument(
        "--judge", action="store_true", help="train another small CLIP too, for nothing but measuring re-ranking"
    )


def _pretrain(options: argparse.Namespace) -> None:
    from capgen_utils.contrastive import pretrain_dual_encoder
    from capgen_utils.language import MINI, pretrain_language_model
    from capgen_utils.pretraining import pretrain_encoder

    preset = get_preset(options.preset)
    given = {"stem_weights": options.encoder_weights}
    if preset.pretraining is not None and options.encoder_weights is None:
        print(f"the encoder is in {pretrain_encoder(preset, options.data)}")
    print(f"the small CLIP is in {pretrain_dual_encoder(preset, options.data, **given)}")
    if preset.recipe("clip_gpt2").config.language_model == MINI:
        print(f"the language model is in {pretrain_language_model(preset, options.data)}")
    if options.judge:
        print(f"the judge is in {pretrain_dual_encoder(preset, options.data, judge=True, **given)}")


def _add_train(commands: Any) -> None:
    parser = add_command(commands, "train", _train, "Train a captioner; a run that was stopped goes on where it was.")
    parser.add_argument(
        "--model", default="transformer", help=f"which captioner: {', '.join(PRESETS['shapes'].models)}"
    )
    _add_data_options(parser)
    parser.add_argument("--encoder", metavar="NAME", help="another image encoder than the preset's")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="run folder (default: data/runs/PRESET_MODEL)")
    parser.add_argument("--epochs", type=int, help="instead of the preset's")
    parser.add_argument("--batch-images", type=int, metavar="N", help="images in a batch, instead of the preset's")
    parser.add_argument("--learning-rate", type=float, metavar="X", help="peak, instead of the preset's")
    parser.add_argument("--seed", type=int, help="instead of the preset's")
    parser.add_argument("--dtype", choices=("auto", "fp32", "bf16", "fp16"), help="compute dtype of training")
    parser.add_argument("--no-flip", action="store_true", help="do not train on mirrored images")
    parser.add_argument("--min-count", type=int, metavar="N", help="occurrences that a word needs to be learned")
    parser.add_argument("--tensorboard", action="store_true", help="log to TensorBoard, in the run folder")
    parser.add_argument("--wandb", action="store_true", help="log to Weights & Biases (pip install wandb)")


def _train(options: argparse.Namespace) -> None:
    from capgen_utils.recipes import make_trainer, prepare

    preset = _chosen_preset(options)
    names = ("epochs", "batch_images", "learning_rate", "seed", "dtype")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if any(isinstance(value, (int, float)) and value <= 0 for value in given.values()):
        raise CapGenError("epochs, batch size, learning rate and seed are above zero", "see: capgen train --help")
    trackers = [name for name in ("tensorboard", "wandb") if getattr(options, name)]
    folder = options.output or data_dir() / "runs" / f"{preset.name}_{options.model}"
    recipe = preset.recipe(options.model)  # an unknown name is said before anything is trained or encoded
    prepared = prepare(preset, options.data, options.encoder_weights, options.limit, options.model)
    training = replace(recipe.training, **given)
    trainer = make_trainer(prepared, options.model, folder, training, trackers=trackers)
    started = time.perf_counter()
    progress = trainer.train()
    print(f"best dev BLEU-4 {progress.best:.2f} in epoch {progress.best_epoch + 1}; "
          f"{(time.perf_counter() - started) / 60:.1f} minutes now, {progress.seconds / 60:.1f} in all")  # fmt: skip
    print(f"the captioner is in {folder / 'bundle'}; next: capgen evaluate --bundle {folder / 'bundle'}")


def _chosen_preset(options: argparse.Namespace) -> Any:
    preset = get_preset(options.preset)
    if options.encoder:
        preset = preset.with_encoder(options.model, options.encoder)
    if options.no_flip:
        preset = replace(preset, flip=False)
    if options.min_count is not None:
        preset = replace(preset, min_count=options.min_count)
    print(f"preset {preset.name}: dataset {preset.dataset}, encoder {preset.recipe(options.model).encoder}")
    return preset


def _add_split_options(parser: argparse.ArgumentParser) -> None:
    """Declare which captioner is measured, on what, and where the results go."""
    add_bundle_options(parser)
    parser.add_argument("--split", default="test", help="dev or test")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="folder of the dataset")
    parser.add_argument("--dataset", help="instead of the one the captioner was trained on")
    parser.add_argument("--output", type=Path, default=Path("results"), metavar="FOLDER", help="where the results go")


def _add_evaluate(commands: Any) -> None:
    parser = add_command(commands, "evaluate", _evaluate, "Caption a split and score the captions.")
    _add_split_options(parser)
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N images (no score to publish)")
    parser.add_argument(
        "--rescore", type=Path, nargs="+", metavar="FILE",
        help="score the captions beside these results files again instead; nothing is decoded",
    )  # fmt: skip
    parser.add_argument("--java", action="store_true", help=_JAVA)
    parser.add_argument("--name", help="of the results files (default: DATASET_MODEL)")
    parser.add_argument(
        "--judge", type=Path, metavar="FOLDER", help="a CLIP that chose nothing and says how well captions fit"
    )
    add_decoding_options(parser)
    add_reranking_options(parser)


def _evaluate(options: argparse.Namespace) -> None:
    if options.rescore:
        return _rescore(options)
    from capgen_utils.captioner import DEFAULT_BUNDLE
    from capgen_utils.checkpoint import load_bundle
    from capgen_utils.datasets import load_dataset
    from capgen_utils.decoding import with_options
    from capgen_utils.results import evaluate

    bundle = load_bundle(options.bundle or DEFAULT_BUNDLE)
    manifest = load_dataset(_dataset_of(bundle, options), options.data)
    decoding = with_options(bundle.decoding, **decoding_options(options))
    evaluation = evaluate(
        bundle, manifest, options.split, decoding, options.encoder_weights, _choosing(options, bundle), options.limit,
        options.java,
    )  # fmt: skip
    name = options.name or f"{manifest.name}_{bundle.info['model']}"
    _write_evaluation(options.output / f"{name}.json", evaluation)


def _dataset_of(bundle: Any, options: argparse.Namespace) -> str:
    """The dataset that is asked for, else the one that the captioner was trained on."""
    trained_on = PRESETS.get(bundle.info.get("preset", ""))
    return options.dataset or (trained_on.dataset if trained_on else "flickr8k")


def _rescore(options: argparse.Namespace) -> None:
    from capgen_utils.datasets import load_dataset
    from capgen_utils.results import read_result, rescore

    for path in options.rescore:
        dataset = options.dataset or read_result(path)["protocol"]["dataset"]
        _write_evaluation(path, rescore(path, load_dataset(dataset, options.data), options.java))


def _write_evaluation(path: Path, evaluation: Any) -> None:
    from capgen_utils.results import predictions_path, summary, write_predictions

    write_predictions(predictions_path(path), evaluation.captions)
    write_json(path, evaluation.result)
    print(summary(evaluation.result))
    print(f"written: {path} and the captions beside it")


def _choosing(options: argparse.Namespace, bundle: Any) -> Any:
    from capgen_utils.checkpoint import require_scorer
    from capgen_utils.dual_encoder import DualEncoder
    from capgen_utils.rerank import temperatures_of
    from capgen_utils.results import Choosing

    judge = DualEncoder.load(options.judge) if options.judge else None
    if not options.rerank:
        return Choosing(judge=judge)
    scorer = require_scorer(bundle, options.scorer, options.encoder_weights)
    return Choosing(scorer, temperatures_of(options.temperatures, decoding_options(options)), judge)


def _add_attention(commands: Any) -> None:
    parser = add_command(
        commands, "attention", _attention, "Test where a captioner looks: pointing game on shapes, deletion test."
    )
    _add_split_options(parser)
    parser.add_argument("--images", type=int, default=100, metavar="N", help="the first N images of the split")
    parser.add_argument("--seed", type=int, default=0, help="of random patches and of the intervals")


def _attention(options: argparse.Namespace) -> None:
    from capgen_utils.captioner import Captioner
    from capgen_utils.datasets import load_dataset
    from capgen_utils.grounding import measure, summary

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
    parser.add_argument("--json", action="store_true", help="one JSON object: metric -> value; all times 100")
    parser.add_argument("--intervals", action="store_true", help="with the ends of 95 %% bootstrap intervals")
    parser.add_argument(
        "--against",
        type=Path,
        metavar="FILE",
        help="another system's captions: is the first one better? (paired bootstrap)",
    )
    parser.add_argument(
        "--training", type=Path, metavar="FILE", help="human captions of the training images: what was copied?"
    )
    parser.add_argument("--java", action="store_true", help=_JAVA)


def _score(options: argparse.Namespace) -> None:
    from capgen_utils.scoring import as_lines, score_files

    found = score_files(options.predictions, options.references, options.training, options.against, options.java)
    for name, sentence in found.warnings.items():
        print(f"WARNING: {name}: {sentence}", file=sys.stderr)
    for finding in found.findings:
        print(f"WARNING: {finding.name}: {finding.text}\n  -> {finding.remedy}", file=sys.stderr)
    if options.json:
        print(json.dumps(_score_json(found, options.intervals, options.against is not None), indent=2))
        return
    shown = found.intervals if options.intervals else {}
    print("\n".join(as_lines((name, value, shown[name][1:] if name in shown else None)
                            for name, value in found.scores.items())))  # fmt: skip
    if found.differences:
        print(f"ahead of {options.against}, with the share of resamples in which it is:")
        for name, one in found.differences.items():
            print(f"  {name:28s} {one.value:+10.2f}   [{one.low:+.2f}, {one.high:+.2f}]   {one.wins:.1%}")
    print("\n".join(f"  {name}: {rule}" for name, rule in found.protocol.items()))


def _score_json(found: Any, with_intervals: bool, with_differences: bool) -> dict[str, Any]:
    """Metric -> value; where more is asked for, metric -> an object of what is asked for."""
    if not with_intervals and not with_differences:
        return dict(found.scores)
    rows: dict[str, dict[str, Any]] = {name: {"value": value} for name, value in found.scores.items()}
    for name, one in found.intervals.items() if with_intervals else ():
        rows[name] |= {"low": one.low, "high": one.high}
    for name, one in found.differences.items():
        rows[name]["ahead"] = one._asdict()
    return rows


def _add_leaderboard(commands: Any) -> None:
    parser = add_command(commands, "leaderboard", _leaderboard, "Print and write the tables of all results files.")
    parser.add_argument(
        "--results", type=Path, default=Path("results"), metavar="FOLDER", help="where the results files are"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="Markdown (default: leaderboard.md beside them)")


def _leaderboard(options: argparse.Namespace) -> None:
    from capgen_utils.files import write_text
    from capgen_utils.leaderboard import leaderboard

    text = leaderboard(options.results)
    output = options.output or options.results / "leaderboard.md"
    write_text(output, text)
    print(text)
    print(f"written: {output}")


def _add_course(commands: Any) -> None:
    parser = add_command(commands, "course", _course, "Run the course's notebooks and write them as pages to read.")
    parser.add_argument("--preset", default="shapes", help=f"auto, {', '.join(PRESETS)}")
    parser.add_argument("--output", type=Path, default=Path("course-output"), metavar="FOLDER", help="for the pages")
    parser.add_argument("--only", metavar="NN", help="one notebook by its number, such as 05")
    parser.add_argument("--keep", action="store_true", help="also store the outputs in notebooks/ (for maintainers)")
    parser.add_argument(
        "--no-train",
        action="store_true",
        help="train nothing where a trained captioner ships: minutes",
    )


def _course(options: argparse.Namespace) -> int:
    from capgen_utils.course import run_course

    train = train_anew() and not options.no_train
    return run_course(options.preset, options.output, options.only, options.keep, train)


def _add_info(commands: Any) -> None:
    parser = add_command(commands, "info", _info, "Say what a bundle holds: model, encoder, training, scores, files.")
    parser.add_argument(
        "bundle", nargs="?", type=Path, metavar="FOLDER", help="a trained captioner (default: the one that ships)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object")


def _info(options: argparse.Namespace) -> None:
    from capgen_utils.bulk import printable
    from capgen_utils.captioner import DEFAULT_BUNDLE
    from capgen_utils.facts import bundle_facts, facts_text

    facts = bundle_facts(options.bundle or DEFAULT_BUNDLE)
    lines = map(printable, facts_text(facts).split("\n"))  # a bundle from elsewhere does not steer the terminal
    print(json.dumps(facts, indent=2) if options.json else "\n".join(lines))


def _add_completion(commands: Any) -> None:
    parser = add_command(commands, "completion", _completion, "Print a script that lets a shell complete commands.")
    parser.add_argument("shell", choices=("bash", "zsh", "tcsh"), help="which shell")


def _completion(options: argparse.Namespace) -> None:
    import shtab

    parser = _parser()
    (commands,) = [action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    for action in (action for command in commands.values() for action in command._actions):
        if action.type is Path:
            action.complete = shtab.DIRECTORY if action.metavar == "FOLDER" else shtab.FILE  # type: ignore[attr-defined]
    print(shtab.complete(parser, options.shell))
