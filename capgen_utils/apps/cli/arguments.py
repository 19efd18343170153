"""Tables of options, and those that several commands share. Imports no torch."""

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from capgen_utils.decoding.options import OPTIONS, TEMPERATURES

INTERRUPTED = 130  # what shells return after Ctrl-C
Options = Mapping[str, dict[str, Any]]  # name -> keywords of ``add_argument``
Groups = Mapping[str, tuple[str | None, Options]]  # title -> description and options


class Command(NamedTuple):
    """A command of ``capgen``.

    Attributes:
        name: of the command.
        run: takes the parsed options, returns the exit code or ``None`` for 0.
        text: one sentence of help.
        options: its arguments and options.
        groups: further options, shown in groups.
    """

    name: str
    run: Callable[[argparse.Namespace], int | None]
    text: str
    options: Options = {}
    groups: Groups = {}


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows every default except ``None`` and ``False``."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False) else super()._get_help_string(action)


def add_command(commands: Any, command: Command) -> None:
    """Declare a command; ``commands`` is what ``add_subparsers`` returned."""
    name, run, text, options, groups = command
    parser = commands.add_parser(name, help=text, description=text, formatter_class=_HelpFormatter)
    parser.set_defaults(run=run)
    for title, (description, members) in {"": (None, options), **groups}.items():
        group = parser.add_argument_group(title, description) if title else parser
        for option, keywords in members.items():
            group.add_argument(option, **keywords)


def _option(name: str, more: str = "", **keywords: Any) -> Options:
    kind, option = OPTIONS[name]
    keywords |= {"type": kind, "metavar": option.metavar, "help": option.help + more}
    return {f"--{name.replace('_', '-')}": keywords}


WEIGHTS: Options = {
    "--encoder-weights": dict(type=Path, metavar="FILE", help="local weights file of the encoder")
}
BUNDLE: Options = {
    "--bundle": dict(
        type=Path,
        metavar="FOLDER",
        help="folder of a trained captioner (default: the one that ships)",
    ),
    **WEIGHTS,
}
FP32: Options = {
    "--fp32": dict(
        action="store_true",
        help="compute features in fp32, as exported captioners do (default: as trained)",
    )
}
DEVICE: Options = {"--device": dict(default="auto", help="auto, cpu, cuda or mps")}
DATA: Options = {"--data": dict(type=Path, metavar="FOLDER", help="folder of the dataset")}
DECODING_GROUPS: Groups = {
    "decoding": (
        "How captions are found; the defaults are the bundle's.",
        {k: v for name in OPTIONS if name != "temperatures" for k, v in _option(name).items()},
    ),
    "re-ranking": (
        "A CLIP chooses the caption that fits the image best.",
        {
            "--rerank": dict(action="store_true", help="re-rank the candidates with a CLIP"),
            "--scorer": dict(
                type=Path,
                metavar="FOLDER",
                help="folder of the CLIP (default: the bundle's own, if it has one)",
            ),
            **_option(
                "temperatures",
                f" (default: {' '.join(f'{t:g}' for t in TEMPERATURES)}; "
                "with --beam, re-rank the beam)",
                nargs="+",
            ),
        },
    ),
}


def decoding_options(options: argparse.Namespace) -> dict[str, Any]:
    """Return the options for ``decoding.options.with_options``; ``None`` if not given."""
    return {name: getattr(options, name, None) for name in OPTIONS}
