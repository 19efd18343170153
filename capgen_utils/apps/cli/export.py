"""The command ``capgen export``: a captioner as ONNX graphs, or as a folder for the Hugging Face
hub."""

import argparse
from pathlib import Path
from typing import Any

from capgen_utils.apps.cli.arguments import add_bundle_options, add_command
from capgen_utils.common.files import CapGenError

_FORMATS = ("onnx", "hub", "small")


def add_export(commands: Any) -> None:
    """Declare the command."""
    parser = add_command(
        commands,
        "export",
        _export,
        "Write a captioner as ONNX graphs that run without torch, for a model hub, or small.",
    )
    add_bundle_options(parser)
    parser.add_argument(
        "--format",
        choices=_FORMATS,
        required=True,
        help="onnx: three graphs for ONNX Runtime, compared with torch; hub: the bundle with a model card; "
        "small: the bundle with 8 bits a weight",
    )
    parser.add_argument(
        "--output", type=Path, required=True, metavar="FOLDER", help="is replaced when it exists"
    )
    parser.add_argument(
        "--push",
        metavar="OWNER/NAME",
        help="with --format hub: upload it there too (needs a token of the hub)",
    )


def _export(options: argparse.Namespace) -> None:
    from capgen_utils.captioner import DEFAULT_BUNDLE

    bundle = options.bundle or DEFAULT_BUNDLE
    if options.push and options.format != "hub":
        raise CapGenError("only a folder for the hub can be pushed", "ask for --format hub")
    if options.output.exists() and not options.output.is_dir():
        raise CapGenError(f"{options.output} is a file", "name a folder")
    if options.output.absolute().is_relative_to(bundle.absolute()):
        raise CapGenError(
            f"{options.output} is, or lies in, the bundle itself", "name another folder"
        )
    {"onnx": _export_onnx, "hub": _export_hub, "small": _export_small}[options.format](
        options, bundle
    )


def _export_onnx(options: argparse.Namespace, bundle: Path) -> None:
    from capgen_utils.apps.export.onnx_graphs import export_onnx

    differences = export_onnx(bundle, options.output, options.encoder_weights)
    for name, difference in differences.items():
        print(f"  {name + '.onnx':14s} differs from torch by at most {difference:.2g}")
    print(
        f"the exported captioner is in {options.output}; next: capgen caption --onnx {options.output} IMAGE"
    )


def _export_hub(options: argparse.Namespace, bundle: Path) -> None:
    from capgen_utils.apps.export.model_card import export_hub, push, require_pushable

    if options.push:
        require_pushable(options.push)  # before anything is written
    export_hub(bundle, options.output)
    print(f"the folder for the hub is {options.output}; read README.md in it before you publish it")
    if options.push:
        print(f"pushed to {push(options.output, options.push)}")


def _export_small(options: argparse.Namespace, bundle: Path) -> None:
    from capgen_utils.apps.export.small import write_small

    write_small(bundle, options.output)
    sizes = (
        sum(p.stat().st_size for p in folder.rglob("*.safetensors")) / 1e6
        for folder in (bundle, options.output)
    )
    print("{:.1f} MB of weights have become {:.1f} MB in {}".format(*sizes, options.output))
