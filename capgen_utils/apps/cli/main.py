"""The command line: ``capgen`` or ``python -m capgen_utils``."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from capgen_utils.apps.cli import caption, evaluate, serve, train
from capgen_utils.apps.cli.arguments import BUNDLE, DATA, INTERRUPTED, Command, add_command
from capgen_utils.apps.cli.bulk import printable
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
    for command in (
        Command("doctor", run_doctor, "Check this machine and explain what is missing."),
        DOWNLOAD,
        *train.COMMANDS,
        *evaluate.COMMANDS,
        caption.COMMAND,
        EXPORT,
        serve.COMMAND,
        INFO,
        COURSE,
        COMPLETION,
    ):
        add_command(commands, command)
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


def run_export(options: argparse.Namespace) -> None:
    """Export a bundle.

    Raises:
        CapGenError: the options contradict each other, or the export fails.
    """
    from capgen_utils.captioner import DEFAULT_BUNDLE

    bundle, output = options.bundle or DEFAULT_BUNDLE, options.output
    if options.push and options.format != "hub":
        raise CapGenError("--push works only with --format hub", "add --format hub")
    if output.exists() and not output.is_dir():
        raise CapGenError(f"{output} is a file", "name a folder")
    if output.absolute().is_relative_to(bundle.absolute()):
        raise CapGenError(f"{output} is the bundle itself or inside it", "name another folder")
    if options.format == "onnx":
        from capgen_utils.apps.export.onnx_graphs import export_onnx

        for name, difference in export_onnx(bundle, output, options.encoder_weights).items():
            print(f"  {name + '.onnx':14s} differs from torch by at most {difference:.2g}")
        print(f"the exported captioner is in {output}")
        print(f"next: capgen caption --onnx {output} IMAGE")
    elif options.format == "hub":
        from capgen_utils.apps.export.bundles import export_hub, push, require_pushable

        if options.push:
            require_pushable(options.push)  # before anything is written
        export_hub(bundle, output)
        print(f"the folder for the hub is {output}; read README.md in it before you publish it")
        if options.push:
            print(f"pushed to {push(output, options.push)}")
    else:
        from capgen_utils.apps.export.bundles import write_small

        write_small(bundle, output)
        before, after = (
            sum(path.stat().st_size for path in folder.rglob("*.safetensors")) / 1e6
            for folder in (bundle, output)
        )
        print(f"{before:.1f} MB of weights became {after:.1f} MB in {output}")


def run_course(options: argparse.Namespace) -> int:
    """Run the notebooks; returns 1 if one failed."""
    from capgen_utils.apps.authoring import course

    return course.run_course(
        options.preset,
        options.output,
        options.only,
        options.keep,
        train_anew() and not options.no_train,
    )


def run_info(options: argparse.Namespace) -> None:
    """Print the facts about a bundle."""
    from capgen_utils.apps.export.bundles import bundle_facts, facts_text
    from capgen_utils.captioner import DEFAULT_BUNDLE

    facts = bundle_facts(options.bundle or DEFAULT_BUNDLE)
    if options.json:
        print(json.dumps(facts, indent=2))
        return
    for line in facts_text(facts).split("\n"):
        print(printable(line))  # text in a downloaded bundle may hold terminal control codes


def run_completion(options: argparse.Namespace) -> None:
    """Print a completion script that also completes files and folders."""
    with serve.serve_extra("completion"):
        import shtab

    parser = make_parser()
    for command in subparsers(parser).values():
        for action in command._actions:
            if action.type is Path:
                kind = shtab.DIRECTORY if action.metavar == "FOLDER" else shtab.FILE
                action.complete = kind  # type: ignore[attr-defined]
    print(shtab.complete(parser, options.shell))


DOWNLOAD = Command(
    "download",
    run_download,
    "Download a dataset, or locate an existing copy.",
    {
        "dataset": dict(nargs="?", default="flickr8k", help="shapes, flickr8k, flickr30k or coco"),
        **DATA,
    },
)
EXPORT = Command(
    "export",
    run_export,
    "Export a captioner: as ONNX graphs that run without torch, for a model hub, or in 8 bits.",
    {
        **BUNDLE,
        "--format": dict(
            choices=("onnx", "hub", "small"),
            required=True,
            help="onnx: three graphs for ONNX Runtime, checked against torch; "
            "hub: the bundle with a model card; small: the bundle with 8 bits per weight",
        ),
        "--output": dict(type=Path, required=True, metavar="FOLDER", help="replaced if it exists"),
        "--push": dict(
            metavar="OWNER/NAME",
            help="with --format hub: also upload it (requires a token of the hub)",
        ),
    },
)
INFO = Command(
    "info",
    run_info,
    "Describe a bundle: model, encoder, training, scores, files.",
    {
        "bundle": dict(
            nargs="?",
            type=Path,
            metavar="FOLDER",
            help="a trained captioner (default: the one that ships)",
        ),
        "--json": dict(action="store_true", help="print one JSON object"),
    },
)
COURSE = Command(
    "course",
    run_course,
    "Run the course's notebooks and write them as HTML pages.",
    {
        "--preset": dict(default="shapes", help=f"auto, {', '.join(PRESETS)}"),
        "--output": dict(
            type=Path, default=Path("course-output"), metavar="FOLDER", help="folder for the pages"
        ),
        "--only": dict(metavar="NN", help="run a single notebook, such as 05"),
        "--keep": dict(
            action="store_true",
            help="also store the outputs in notebooks/ (for maintainers)",
        ),
        "--no-train": dict(
            action="store_true",
            help="use the captioners that ship instead of training; takes minutes",
        ),
    },
)
COMPLETION = Command(
    "completion",
    run_completion,
    "Print a script that completes commands in a shell.",
    {"shell": dict(choices=("bash", "zsh", "tcsh"), help="shell to complete in")},
)
