"""What several commands of the command line have in common: how they are declared, and options on
decoding."""

import argparse
from pathlib import Path
from typing import Any

INTERRUPTED = 130  # what shells return after Ctrl-C


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults that say something: "None" and "False" do not."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False) else super()._get_help_string(action)


def add_command(commands: Any, name: str, run: Any, text: str) -> argparse.ArgumentParser:
    """Declare a command.

    Args:
        commands: what ``add_subparsers`` returned.
        name: of the command.
        run: takes the parsed options, returns the exit code or ``None`` for 0.
        text: one sentence of help.
    """
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=text, description=text, formatter_class=_HelpFormatter
    )
    parser.set_defaults(run=run)
    return parser


def add_bundle_options(parser: argparse.ArgumentParser) -> None:
    """Declare which trained captioner is meant, and where the weights of its encoder are."""
    parser.add_argument(
        "--bundle",
        type=Path,
        metavar="FOLDER",
        help="a trained captioner (default: the one that ships)",
    )
    add_weights_option(parser)


def add_weights_option(parser: argparse.ArgumentParser) -> None:
    """Declare where the encoder's weights are."""
    parser.add_argument(
        "--encoder-weights", type=Path, metavar="FILE", help="local weights file of the encoder"
    )


def add_fp32_option(parser: argparse.ArgumentParser) -> None:
    """Declare what features are computed in."""
    parser.add_argument(
        "--fp32",
        action="store_true",
        help="compute features in fp32, as exported captioners do (default: as trained)",
    )


_DECODING_OPTIONS: dict[str, tuple[type, str, str]] = {
    "beam": (int, "N", "hypotheses kept; 1 is greedy search"),
    "max_length": (int, "N", "longest caption in tokens"),
    "min_length": (int, "N", "shortest caption in tokens"),
    "length_penalty": (float, "X", "above 0 favours long captions in beam search"),
    "groups": (int, "N", "diverse beam search: groups that share the beam and keep apart"),
    "diversity": (float, "X", "how much the groups keep apart"),
    "temperature": (float, "X", "above 0 draws captions: low ones are safe, high ones varied"),
    "top_k": (int, "N", "draw among the N most likely tokens (alone: at temperature 1)"),
    "top_p": (
        float,
        "X",
        "draw among the tokens that hold this probability (alone: at temperature 1)",
    ),
    "seed": (int, "N", "of what is drawn"),
    "repetition_penalty": (float, "X", "above 1 avoids tokens that were said before"),
    "no_repeat_ngram": (int, "N", "no run of N tokens comes twice"),
    "candidates": (int, "N", "captions to consider for an image: as many draws, or a beam as wide"),
}


def add_decoding_options(parser: argparse.ArgumentParser) -> None:
    """Declare how captions are found."""
    group = parser.add_argument_group(
        "decoding", "How captions are found; the defaults are the captioner's own."
    )
    for name, (kind, metavar, text) in _DECODING_OPTIONS.items():
        group.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar=metavar, help=text)


def add_reranking_options(parser: argparse.ArgumentParser) -> None:
    """Declare how a CLIP chooses among captions."""
    group = parser.add_argument_group(
        "re-ranking", "A CLIP chooses the caption that fits the image best."
    )
    group.add_argument("--rerank", action="store_true", help="let it choose")
    group.add_argument(
        "--scorer",
        type=Path,
        metavar="FOLDER",
        help="the CLIP (default: the captioner's own, where it has one)",
    )
    group.add_argument(
        "--temperatures",
        type=float,
        nargs="+",
        metavar="X",
        help="choose among captions drawn at these (default: 0 0.01 0.1 0.5 0.7 1 1.5; with --beam: among the beam's)",
    )


def decoding_options(options: argparse.Namespace) -> Any:
    """Return the ``decoding.DecodingOptions`` that were given; the others are ``None``."""
    return {name: getattr(options, name) for name in _DECODING_OPTIONS}
