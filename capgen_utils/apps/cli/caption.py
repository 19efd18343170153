"""The command ``capgen caption``: files, folders or a list in; lines of text, JSON or CSV out."""

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from capgen_utils.apps.cli.arguments import (
    INTERRUPTED,
    add_bundle_options,
    add_command,
    add_decoding_options,
    add_fp32_option,
    add_reranking_options,
    decoding_options,
)
from capgen_utils.common.files import CapGenError

_STDIN = Path("-")
_FORMATS = ("text", "jsonl", "csv")
_SECONDS = 60.0  # between two reports where stderr is no terminal


def add_caption(commands: Any) -> None:
    """Declare the command."""
    parser = add_command(
        commands, "caption", _caption, "Caption photographs, or whole folders of them."
    )
    parser.add_argument(
        "images",
        nargs="+",
        type=Path,
        metavar="IMAGE",
        help="image files, folders with all that is in them, or - for a list of paths on stdin",
    )
    add_bundle_options(parser)
    add_fp32_option(parser)
    parser.add_argument(
        "--onnx",
        type=Path,
        metavar="FOLDER",
        help="an exported captioner instead, which needs no torch",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    _add_output_options(parser)
    add_decoding_options(parser)
    add_reranking_options(parser)


def _add_output_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "output", "Ends with 0, with 1 if some images failed, with 2 if all did."
    )
    group.add_argument(
        "--format",
        choices=_FORMATS,
        help="lines to read, JSON objects with log-probability and candidates, or a table (default: by the name of "
        "--output, else text)",
    )
    group.add_argument(
        "--json",
        dest="format",
        action="store_const",
        const="jsonl",
        help="short for --format jsonl",
    )
    group.add_argument(
        "--output", type=Path, metavar="FILE", help="write there instead, batch by batch"
    )
    group.add_argument(
        "--resume", action="store_true", help="go on with --output: what it holds is not done again"
    )
    group.add_argument(
        "--failures", type=Path, metavar="FILE", help="list the images that failed, as JSON lines"
    )
    group.add_argument(
        "--batch-size", type=int, default=32, metavar="N", help="images that are worked on together"
    )


def _caption(options: argparse.Namespace) -> int:
    from capgen_utils.apps.cli.bulk import FailureFile, Style

    _check(options)
    lost: list[tuple[Path, CapGenError]] = []
    paths = _gather(options.images, lost)
    captioner = _load(options)
    style = Style(options.format, options.candidates, options.rerank, named=len(paths) > 1)
    with _output(options, style, captioner, paths) as output:
        failures = FailureFile(options.failures)
        failures.write(lost)
        for _, error in lost:
            _complain(error)
        try:
            failed = len(lost) + _run(options, style, captioner, paths, output, failures)
        except KeyboardInterrupt:
            kept = options.output and options.format != "text"
            again = (
                "with --resume the same command goes on where it was"
                if kept
                else "there is no file to go on with"
            )
            print(f"\ncapgen: stopped; {again}", file=sys.stderr)
            return INTERRUPTED
    total = len(paths) + len(lost)
    if failed and total > 1:
        print(f"capgen: {failed} of {total} images could not be captioned", file=sys.stderr)
    return 0 if not failed else 1 if failed < total else 2


def _load(options: argparse.Namespace) -> Any:
    """Return a ``Captioner``, or the exported one that was asked for, which imports no torch."""
    if options.onnx is not None:
        from capgen_utils.apps.export.onnx_captioner import OnnxCaptioner

        return OnnxCaptioner.from_folder(options.onnx)
    from capgen_utils.captioner import Captioner

    weights, scorer = options.encoder_weights, options.scorer
    return Captioner.from_bundle(options.bundle, options.device, weights, scorer, options.fp32)


def _check(options: argparse.Namespace) -> None:
    of_bundles = ("bundle", "encoder_weights", "scorer", "rerank")
    if options.onnx is not None and (
        unused := [name for name in of_bundles if getattr(options, name)]
    ):
        raise CapGenError(
            f"an exported captioner knows no --{unused[0].replace('_', '-')}",
            "use either --onnx or a bundle",
        )
    if options.format is None:
        suffix = options.output.suffix.lower().removeprefix(".") if options.output else ""
        options.format = suffix if suffix in _FORMATS else "text"
    if options.resume and options.output is None:
        raise CapGenError(
            "there is nothing to go on with", "name the file to go on with: --output FILE"
        )
    if options.batch_size < 1:
        raise CapGenError(
            f"{options.batch_size} images cannot be worked on together", "--batch-size 1 or more"
        )
    if (
        options.output
        and options.failures
        and options.output.absolute() == options.failures.absolute()
    ):
        raise CapGenError(
            "captions and failures cannot go to the same file", "name another one for --failures"
        )


def _gather(sources: Sequence[Path], lost: list[tuple[Path, CapGenError]]) -> list[Path]:
    """Return the images that the arguments and stdin name, each once; ``lost`` gets what cannot be
    found.

    A typed path that does not exist is a mistake of the command; a line of a long list is one image
    less.
    """
    from capgen_utils.apps.cli.bulk import read_paths
    from capgen_utils.data.images import find_images

    listed = read_paths(sys.stdin.buffer.read()) if _STDIN in sources else []
    for source in sources:
        if source != _STDIN and not os.path.exists(source):
            raise CapGenError(f"there is no file or folder {source}", "check the path")
    named = [path for source in sources for path in (listed if source == _STDIN else [source])]
    found = find_images(dict.fromkeys(named), lambda path, error: lost.append((path, error)))
    if not found and not lost:
        raise CapGenError(
            "no image was named", "name files or folders, or write their paths to stdin"
        )
    return list(dict.fromkeys(found))


def _output(options: argparse.Namespace, style: Any, captioner: Any, paths: Sequence[Path]) -> Any:
    from capgen_utils.apps.cli.bulk import CaptionFile, settings_of

    if options.output is None:
        sys.stdout.write(style.header)
        return nullcontext(sys.stdout)
    decoding = decoding_options(options)
    settings = settings_of(
        captioner, style, decoding, options.rerank, options.temperatures, options.scorer
    )
    return CaptionFile(options.output, style, settings, paths, options.batch_size, options.resume)


def _run(
    options: argparse.Namespace,
    style: Any,
    captioner: Any,
    paths: Sequence[Path],
    output: Any,
    failures: Any,
) -> int:
    """Caption what is not there yet; returns how many images failed."""
    from capgen_utils.apps.cli.bulk import caption_batches, write_batch

    held: set[str] = getattr(output, "held", set())  # stdout holds nothing yet
    asked = {"rerank": options.rerank, "temperatures": options.temperatures} | decoding_options(
        options
    )
    failed = 0
    with _progress(len(paths), held) as bar:
        for batch in caption_batches(captioner, paths, held, options.batch_size, **asked):
            write_batch(batch, style, output, failures)
            for error in (result for _, result in batch if isinstance(result, CapGenError)):
                failed += 1
                with bar.external_write_mode(file=sys.stderr):
                    _complain(error)
            bar.update(len(batch))
    return failed


def _progress(total: int, held: Any) -> Any:
    from tqdm.auto import tqdm

    terminal = sys.stderr.isatty()
    return tqdm(
        total=total,
        initial=len(held),
        unit="img",
        mininterval=0.1 if terminal else _SECONDS,
        disable=total < (10 if terminal else 1000),
    )


def _complain(error: CapGenError) -> None:
    """Say on stderr what failed, in two lines whatever the name of the file holds."""
    from capgen_utils.apps.cli.bulk import printable, shown

    print(f"capgen: {printable(shown(error.problem))}\n  -> {error.remedy}", file=sys.stderr)
