"""The command ``capgen export``: ONNX graphs, a folder for the Hugging Face hub, or 8 bits."""

import argparse
from pathlib import Path
from typing import Any

from capgen_utils.apps.cli.arguments import add_bundle_options, add_command
from capgen_utils.common.files import CapGenError


def add_export(commands: Any) -> None:
    """Declare ``capgen export``."""
    parser = add_command(
        commands,
        "export",
        run_export,
        "Export a captioner: as ONNX graphs that run without torch, for a model hub, or in 8 bits.",
    )
    add_bundle_options(parser)
    parser.add_argument(
        "--format",
        choices=("onnx", "hub", "small"),
        required=True,
        help="onnx: three graphs for ONNX Runtime, checked against torch; "
        "hub: the bundle with a model card; small: the bundle with 8 bits per weight",
    )
    parser.add_argument(
        "--output", type=Path, required=True, metavar="FOLDER", help="replaced if it exists"
    )
    parser.add_argument(
        "--push",
        metavar="OWNER/NAME",
        help="with --format hub: also upload it (requires a token of the hub)",
    )


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
        export_for_hub(bundle, output, options.push)
    else:
        from capgen_utils.apps.export.small import write_small

        write_small(bundle, output)
        before, after = (
            sum(path.stat().st_size for path in folder.rglob("*.safetensors")) / 1e6
            for folder in (bundle, output)
        )
        print(f"{before:.1f} MB of weights became {after:.1f} MB in {output}")


def export_for_hub(bundle: Path, output: Path, name: str | None) -> None:
    """Write the folder for the hub, and upload it if it has a name there."""
    from capgen_utils.apps.export.model_card import export_hub, push, require_pushable

    if name:
        require_pushable(name)  # before anything is written
    export_hub(bundle, output)
    print(f"the folder for the hub is {output}; read README.md in it before you publish it")
    if name:
        print(f"pushed to {push(output, name)}")
