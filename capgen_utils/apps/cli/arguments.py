"""Options that several commands share: bundle, weights, decoding, re-ranking. Imports no torch."""

import argparse
from pathlib import Path
from typing import Any

from capgen_utils.decoding.options import OPTIONS, TEMPERATURES

INTERRUPTED = 130  # what shells return after Ctrl-C


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows every default except ``None`` and ``False``."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False) else super()._get_help_string(action)


def add_command(commands: Any, name: str, run: Any, text: str) -> argparse.ArgumentParser:
    """Declare a command.

    Args:
        commands: returned by ``add_subparsers``.
        name: name of the command.
        run: takes the parsed options, returns the exit code or ``None`` for 0.
        text: one sentence of help.
    """
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=text, description=text, formatter_class=_HelpFormatter
    )
    parser.set_defaults(run=run)
    return parser


def add_bundle_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options that choose a bundle and the weights of its encoder."""
    parser.add_argument(
        "--bundle",
        type=Path,
        metavar="FOLDER",
        help="folder of a trained captioner (default: the one that ships)",
    )
    add_weights_option(parser)


def add_weights_option(parser: argparse.ArgumentParser) -> None:
    """Declare ``--encoder-weights``."""
    parser.add_argument(
        "--encoder-weights", type=Path, metavar="FILE", help="local weights file of the encoder"
    )


def add_fp32_option(parser: argparse.ArgumentParser) -> None:
    """Declare ``--fp32``."""
    parser.add_argument(
        "--fp32",
        action="store_true",
        help="compute features in fp32, as exported captioners do (default: as trained)",
    )


def add_decoding_options(parser: argparse.ArgumentParser) -> None:
    """Declare the decoding options, from the table in ``config.DecodingConfig``."""
    group = parser.add_argument_group(
        "decoding", "How captions are found; the defaults are the bundle's."
    )
    for name in OPTIONS:
        if name != "temperatures":
            _add_option(group, name)


def add_reranking_options(parser: argparse.ArgumentParser) -> None:
    """Declare how a CLIP re-ranks captions."""
    group = parser.add_argument_group(
        "re-ranking", "A CLIP chooses the caption that fits the image best."
    )
    group.add_argument("--rerank", action="store_true", help="re-rank the candidates with a CLIP")
    group.add_argument(
        "--scorer",
        type=Path,
        metavar="FOLDER",
        help="folder of the CLIP (default: the bundle's own, if it has one)",
    )
    listed = " ".join(f"{temperature:g}" for temperature in TEMPERATURES)
    default = f" (default: {listed}; with --beam, re-rank the beam)"
    _add_option(group, "temperatures", default, nargs="+")


def _add_option(group: Any, name: str, more: str = "", **keywords: Any) -> None:
    kind, option = OPTIONS[name]
    group.add_argument(
        f"--{name.replace('_', '-')}",
        type=kind,
        metavar=option.metavar,
        help=option.help + more,
        **keywords,
    )


def decoding_options(options: argparse.Namespace) -> dict[str, Any]:
    """Return the options for ``decoding.options.with_options``; ``None`` if not given."""
    return {name: getattr(options, name, None) for name in OPTIONS}
