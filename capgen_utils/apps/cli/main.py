"""The command line: ``capgen`` or ``python -m capgen_utils``."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from capgen_utils.apps.cli.arguments import INTERRUPTED, add_command
from capgen_utils.apps.cli.bulk import printable
from capgen_utils.apps.cli.caption import add_caption
from capgen_utils.apps.cli.evaluate import (
    _add_attention,
    _add_evaluate,
    _add_leaderboard,
    _add_score,
)
from capgen_utils.apps.cli.export import add_export
from capgen_utils.apps.cli.serve import add_serve, serve_extra
from capgen_utils.apps.cli.train import _add_pretrain, _add_train
from capgen_utils.common.files import CapGenError
from capgen_utils.common.machine import VERSION
from capgen_utils.common.paths import train_anew
from capgen_utils.presets import PRESETS


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0 for success, 1 if some images could not be captioned, 2 for an error, which is explained
        on stderr.
    """
    options = make_parser().parse_args(arguments)
    try:
        return int(options.run(options) or 0)
    except CapGenError as error:
        print(f"capgen: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of our output has exited, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("\ncapgen: stopped; run the same command again to continue", file=sys.stderr)
        return INTERRUPTED


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands. Building it imports neither torch nor numpy."""
    parser = argparse.ArgumentParser(
        prog="capgen", description="Image captioning from scratch to CLIP + GPT-2."
    )
    parser.add_argument("--version", action="version", version=f"capgen {VERSION}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    add_command(commands, "doctor", run_doctor, "Check this machine and explain what is missing.")
    for add in (
        add_download,
        _add_pretrain,
        _add_train,
        _add_evaluate,
        _add_attention,
        _add_score,
        _add_leaderboard,
        add_caption,
        add_export,
        add_serve,
        add_info,
        add_course,
    ):
        add(commands)
    completion = add_command(
        commands, "completion", run_completion, "Print a script that completes commands in a shell."
    )
    completion.add_argument("shell", choices=("bash", "zsh", "tcsh"), help="shell to complete in")
    return parser


def subparsers(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """Return the parser of each command by its name."""
    (commands,) = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    return dict(commands.choices)


def run_doctor(options: argparse.Namespace) -> int:
    """Print what this machine has and lacks; returns 1 if something required is broken."""
    from capgen_utils.apps.cli.doctor import examine, exit_code, report

    findings = examine()
    print(report(findings))
    return exit_code(findings)


def add_download(commands: Any) -> None:
    """Declare ``capgen download``."""
    parser = add_command(
        commands, "download", run_download, "Download a dataset, or locate an existing copy."
    )
    parser.add_argument(
        "dataset", nargs="?", default="flickr8k", help="shapes, flickr8k, flickr30k or coco"
    )
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="folder of the dataset")


def run_download(options: argparse.Namespace) -> None:
    """Download a dataset and print the size of each split."""
    from capgen_utils.data.datasets import download_dataset, load_dataset

    folder = download_dataset(options.dataset, options.data)
    manifest = load_dataset(options.dataset, folder)
    print(f"{options.dataset} is in {folder}")
    for name in manifest.split_names():
        split = manifest.split(name)
        print(f"  {name:6s} {len(split):7d} images {sum(1 for _ in split.captions()):8d} captions")
    for reason, count in manifest.report.items():
        print(f"  note: {reason}: {count}")


def add_course(commands: Any) -> None:
    """Declare ``capgen course``."""
    parser = add_command(
        commands, "course", run_course, "Run the course's notebooks and write them as HTML pages."
    )
    parser.add_argument("--preset", default="shapes", help=f"auto, {', '.join(PRESETS)}")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("course-output"),
        metavar="FOLDER",
        help="folder for the pages",
    )
    parser.add_argument("--only", metavar="NN", help="run a single notebook, such as 05")
    parser.add_argument(
        "--keep", action="store_true", help="also store the outputs in notebooks/ (for maintainers)"
    )
    parser.add_argument(
        "--no-train",
        action="store_true",
        help="use the captioners that ship instead of training; takes minutes",
    )


def run_course(options: argparse.Namespace) -> int:
    """Run the notebooks; returns 1 if one failed."""
    from capgen_utils.apps.authoring import course

    train = train_anew() and not options.no_train
    return course.run_course(options.preset, options.output, options.only, options.keep, train)


def add_info(commands: Any) -> None:
    """Declare ``capgen info``."""
    parser = add_command(
        commands, "info", run_info, "Describe a bundle: model, encoder, training, scores, files."
    )
    parser.add_argument(
        "bundle",
        nargs="?",
        type=Path,
        metavar="FOLDER",
        help="a trained captioner (default: the one that ships)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run_info(options: argparse.Namespace) -> None:
    """Print the facts about a bundle."""
    from capgen_utils.apps.export.facts import bundle_facts, facts_text
    from capgen_utils.captioner import DEFAULT_BUNDLE

    facts = bundle_facts(options.bundle or DEFAULT_BUNDLE)
    if options.json:
        print(json.dumps(facts, indent=2))
        return
    for line in facts_text(facts).split("\n"):
        print(printable(line))  # text in a downloaded bundle may hold terminal control codes


def run_completion(options: argparse.Namespace) -> None:
    """Print a completion script that also completes files and folders."""
    with serve_extra("completion"):
        import shtab

    parser = make_parser()
    for command in subparsers(parser).values():
        for action in command._actions:
            if action.type is Path:
                kind = shtab.DIRECTORY if action.metavar == "FOLDER" else shtab.FILE
                action.complete = kind  # type: ignore[attr-defined]
    print(shtab.complete(parser, options.shell))
