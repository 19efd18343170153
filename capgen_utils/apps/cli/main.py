"""The command line: ``capgen`` or ``python -m capgen_utils``."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from capgen_utils.apps.cli.arguments import (
    INTERRUPTED,
    add_command,
)
from capgen_utils.apps.cli.caption import add_caption
from capgen_utils.apps.cli.evaluate import (
    _add_attention,
    _add_evaluate,
    _add_leaderboard,
    _add_score,
)
from capgen_utils.apps.cli.export import add_export
from capgen_utils.apps.cli.serve import add_serve
from capgen_utils.apps.cli.train import _add_pretrain, _add_train
from capgen_utils.common.files import CapGenError
from capgen_utils.common.machine import VERSION
from capgen_utils.common.paths import train_anew
from capgen_utils.presets import PRESETS


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0 when all went well; 1 when some images of a bulk command failed; 2 for an error, explained
        on stderr.
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
        print(
            "\ncapgen: stopped; run the same command again and it goes on where it was",
            file=sys.stderr,
        )
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="capgen", description="Image captioning from scratch to CLIP + GPT-2."
    )
    parser.add_argument("--version", action="version", version=f"capgen {VERSION}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for add in (
        _add_doctor,
        _add_download,
        _add_pretrain,
        _add_train,
        _add_evaluate,
        _add_attention,
        _add_score,
        _add_leaderboard,
        add_caption,
        add_export,
        add_serve,
        _add_info,
        _add_course,
        _add_completion,
    ):
        add(commands)
    return parser


def _add_doctor(commands: Any) -> None:
    add_command(
        commands, "doctor", _doctor, "Check this machine and say what is missing and how to get it."
    )


def _doctor(options: argparse.Namespace) -> int:
    from capgen_utils.apps.cli.doctor import examine, exit_code, report

    findings = examine()
    print(report(findings))
    return exit_code(findings)


def _add_download(commands: Any) -> None:
    parser = add_command(
        commands, "download", _download, "Get a dataset, or find the one that is there already."
    )
    parser.add_argument(
        "dataset", nargs="?", default="flickr8k", help="shapes, flickr8k, flickr30k or coco"
    )
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="where it is or shall be")


def _download(options: argparse.Namespace) -> None:
    from capgen_utils.data.datasets import download_dataset, load_dataset

    folder = download_dataset(options.dataset, options.data)
    manifest = load_dataset(options.dataset, folder)
    print(f"{options.dataset} is in {folder}")
    for split in manifest.split_names():
        part = manifest.split(split)
        print(f"  {split:6s} {len(part):7d} images {sum(1 for _ in part.captions()):8d} captions")
    for reason, count in manifest.report.items():
        print(f"  note: {reason}: {count}")


def _add_course(commands: Any) -> None:
    parser = add_command(
        commands, "course", _course, "Run the course's notebooks and write them as pages to read."
    )
    parser.add_argument("--preset", default="shapes", help=f"auto, {', '.join(PRESETS)}")
    parser.add_argument(
        "--output", type=Path, default=Path("course-output"), metavar="FOLDER", help="for the pages"
    )
    parser.add_argument("--only", metavar="NN", help="one notebook by its number, such as 05")
    parser.add_argument(
        "--keep", action="store_true", help="also store the outputs in notebooks/ (for maintainers)"
    )
    parser.add_argument(
        "--no-train",
        action="store_true",
        help="train nothing where a trained captioner ships: minutes",
    )


def _course(options: argparse.Namespace) -> int:
    from capgen_utils.apps.authoring.course import run_course

    train = train_anew() and not options.no_train
    return run_course(options.preset, options.output, options.only, options.keep, train)


def _add_info(commands: Any) -> None:
    parser = add_command(
        commands, "info", _info, "Say what a bundle holds: model, encoder, training, scores, files."
    )
    parser.add_argument(
        "bundle",
        nargs="?",
        type=Path,
        metavar="FOLDER",
        help="a trained captioner (default: the one that ships)",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object")


def _info(options: argparse.Namespace) -> None:
    from capgen_utils.apps.cli.bulk import printable
    from capgen_utils.apps.export.facts import bundle_facts, facts_text
    from capgen_utils.captioner import DEFAULT_BUNDLE

    facts = bundle_facts(options.bundle or DEFAULT_BUNDLE)
    lines = map(
        printable, facts_text(facts).split("\n")
    )  # a bundle from elsewhere does not steer the terminal
    print(json.dumps(facts, indent=2) if options.json else "\n".join(lines))


def _add_completion(commands: Any) -> None:
    parser = add_command(
        commands, "completion", _completion, "Print a script that lets a shell complete commands."
    )
    parser.add_argument("shell", choices=("bash", "zsh", "tcsh"), help="which shell")


def _completion(options: argparse.Namespace) -> None:
    import shtab

    parser = _parser()
    (commands,) = [
        action.choices
        for action in parser._actions
        if isinstance(action, argparse._SubParsersAction)
    ]
    for action in (action for command in commands.values() for action in command._actions):
        if action.type is Path:
            action.complete = shtab.DIRECTORY if action.metavar == "FOLDER" else shtab.FILE  # type: ignore[attr-defined]
    print(shtab.complete(parser, options.shell))
