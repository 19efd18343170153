"""The command ``capgen caption``: files, folders or a list in; lines of text, JSON or CSV out."""

import argparse
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from capgen_utils.apps.cli import bulk
from capgen_utils.apps.cli.arguments import (
    BUNDLE,
    DECODING_GROUPS,
    DEVICE,
    FP32,
    INTERRUPTED,
    Command,
    decoding_options,
)
from capgen_utils.common.files import CapGenError

STDIN = Path("-")
FORMATS = ("text", "jsonl", "csv")


def run_caption(options: argparse.Namespace) -> int:
    """Caption the images; returns 0 for success, 1 if some images failed, 2 if all did.

    Raises:
        CapGenError: the options contradict each other, or a file cannot be written.
    """
    check_options(options)
    paths, lost = find_paths(options.images)
    captioner = load_captioner(options)
    style = bulk.Style(options.format, options.candidates, options.rerank, named=len(paths) > 1)
    failed = len(lost)
    with open_output(options, style, captioner, paths) as output:
        failures = bulk.FailureFile(options.failures)
        failures.write(lost)
        for _, error in lost:
            complain(error)
        held = output.held if isinstance(output, bulk.CaptionFile) else set[str]()
        try:
            with progress_bar(len(paths), len(held)) as bar:
                for batch in bulk.caption_batches(
                    captioner,
                    paths,
                    held,
                    options.batch_size,
                    rerank=options.rerank,
                    **decoding_options(options),
                ):
                    bulk.write_batch(batch, style, output, failures)
                    for error in (e for _, e in batch if isinstance(e, CapGenError)):
                        failed += 1
                        with bar.external_write_mode(file=sys.stderr):
                            complain(error)
                    bar.update(len(batch))
        except KeyboardInterrupt:
            resumable = options.output and options.format != "text"
            hint = "add --resume to continue" if resumable else "there is no file to continue"
            print(f"\ncapgen: stopped; {hint}", file=sys.stderr)
            return INTERRUPTED
    total = len(paths) + len(lost)
    if failed and total > 1:
        print(f"capgen: {failed} of {total} images could not be captioned", file=sys.stderr)
    return 0 if not failed else 1 if failed < total else 2


def check_options(options: argparse.Namespace) -> None:
    """Set the format that follows from the file's name.

    Raises:
        CapGenError: the options contradict each other.
    """
    output, failures = options.output, options.failures
    for name in ("bundle", "encoder_weights", "scorer", "rerank"):
        if options.onnx is not None and getattr(options, name):
            raise CapGenError(
                f"--{name.replace('_', '-')} does not apply to an exported captioner",
                "use either --onnx or a bundle",
            )
    if options.format is None:
        suffix = output.suffix.lower().removeprefix(".") if output else ""
        options.format = suffix if suffix in FORMATS else "text"
    if options.resume and output is None:
        raise CapGenError("there is no file to continue", "name it: --output FILE")
    if options.batch_size < 1:
        raise CapGenError(
            f"a batch size of {options.batch_size} is not possible", "use --batch-size 1 or more"
        )
    if output and failures and output.absolute() == failures.absolute():
        raise CapGenError(
            "captions and failures cannot go to the same file", "use another file for --failures"
        )


def load_captioner(options: argparse.Namespace) -> Any:
    """Return a ``Captioner``, or the exported one, which imports no torch."""
    if options.onnx is not None:
        from capgen_utils.apps.export.onnx_captioner import OnnxCaptioner

        return OnnxCaptioner.from_folder(options.onnx)
    from capgen_utils.captioner import Captioner

    return Captioner.from_bundle(
        options.bundle, options.device, options.encoder_weights, options.scorer, options.fp32
    )


def find_paths(sources: list[Path]) -> tuple[list[Path], list[tuple[Path, CapGenError]]]:
    """Return the distinct images that the arguments and stdin name, and the paths that fail.

    A missing argument is an error of the command; a missing line of a list on stdin is one failed
    image.

    Raises:
        CapGenError: an argument does not exist, or no image is named.
    """
    from capgen_utils.data.images import find_images

    listed = bulk.read_paths(sys.stdin.buffer.read()) if STDIN in sources else []
    named: list[Path] = []
    for source in sources:
        if source != STDIN and not os.path.exists(source):
            raise CapGenError(f"there is no file or folder {source}", "check the path")
        named += listed if source == STDIN else [source]
    lost: list[tuple[Path, CapGenError]] = []
    paths = find_images(dict.fromkeys(named), lambda path, error: lost.append((path, error)))
    if not paths and not lost:
        raise CapGenError(
            "no image was named", "name files or folders, or write their paths to stdin"
        )
    return list(dict.fromkeys(paths)), lost


def open_output(
    options: argparse.Namespace, style: bulk.Style, captioner: Any, paths: list[Path]
) -> Any:
    """Return a context manager over a ``CaptionFile``, or over stdout with its header written.

    Raises:
        CapGenError: the file exists and cannot be continued, or cannot be written.
    """
    if options.output is None:
        sys.stdout.write(style.header)
        return nullcontext(sys.stdout)
    return bulk.CaptionFile(
        options.output,
        style,
        bulk.settings_of(
            captioner, style, decoding_options(options), options.rerank, options.scorer
        ),
        paths,
        options.batch_size,
        options.resume,
    )


def progress_bar(total: int, initial: int) -> Any:
    """Return a bar on stderr; without a terminal, only long runs report, once a minute."""
    from tqdm.auto import tqdm

    terminal = sys.stderr.isatty()
    return tqdm(
        total=total,
        initial=initial,
        unit="img",
        mininterval=0.1 if terminal else 60.0,
        disable=total < (10 if terminal else 1000),
    )


def complain(error: CapGenError) -> None:
    """Print an error to stderr in two lines, whatever characters the file's name holds."""
    problem = bulk.printable(bulk.shown(error.problem))
    print(f"capgen: {problem}\n  -> {error.remedy}", file=sys.stderr)


COMMAND = Command(
    "caption",
    run_caption,
    "Caption photographs, or whole folders of them.",
    {
        "images": dict(
            nargs="+",
            type=Path,
            metavar="IMAGE",
            help="image files, folders (searched recursively), or - to read paths from stdin",
        ),
        **BUNDLE,
        **FP32,
        "--onnx": dict(
            type=Path,
            metavar="FOLDER",
            help="an exported captioner to use instead, which runs without torch",
        ),
        **DEVICE,
    },
    {
        "output": (
            "Exit code 0 for success, 1 if some images failed, 2 if all did.",
            {
                "--format": dict(
                    choices=FORMATS,
                    help="plain lines, JSON objects with log-probabilities and candidates, or a "
                    "table (default: by the extension of --output, else text)",
                ),
                "--json": dict(
                    dest="format",
                    action="store_const",
                    const="jsonl",
                    help="short for --format jsonl",
                ),
                "--output": dict(type=Path, metavar="FILE", help="write to a file, batch by batch"),
                "--resume": dict(
                    action="store_true",
                    help="continue --output, skipping images already in it",
                ),
                "--failures": dict(
                    type=Path,
                    metavar="FILE",
                    help="list the images that failed, as JSON lines",
                ),
                "--batch-size": dict(type=int, default=32, metavar="N", help="images per batch"),
            },
        ),
        **DECODING_GROUPS,
    },
)
