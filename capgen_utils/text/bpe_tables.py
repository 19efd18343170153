"""The byte-pair tables of CLIP (notebook 06) and GPT-2 (notebook 07), as they were published."""

import gzip
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from capgen_utils.common.files import CapGenError, read_json

TABLES = Path(__file__).parent / "tables"
MAX_BYTES = 20_000_000  # the largest published file holds 3 MB

Merge = tuple[str, str]


@dataclass(frozen=True)
class Family:
    """A published byte-pair encoding (arXiv 1508.07909, on bytes as in the GPT-2 paper).

    The merges define the whole table: ids number the single symbols, then the merges by rank, then
    the special tokens.

    Attributes:
        name: used in commands and files.
        title: used in messages.
        start, end: the special tokens around a text. GPT-2 has only one, which separates documents.
        suffix: marks the last symbol of a word; empty if a leading space marks the first instead.
        merges: number of merges.
        sha256: of the merges, written as lines "first second".
        file: the table in ``TABLES``, which may hold unused merges at its end.
    """

    name: str
    title: str
    start: str
    end: str
    suffix: str
    merges: int
    sha256: str
    file: str

    @property
    def specials(self) -> tuple[str, ...]:
        """The special tokens by id."""
        return (self.end,) if self.start == self.end else (self.start, self.end)

    @property
    def singles(self) -> tuple[str, ...]:
        """The tokens of one byte by id: without the suffix, then with it if there is one."""
        symbols = tuple(byte_symbols().values())
        return symbols + tuple(s + self.suffix for s in symbols) if self.suffix else symbols

    @property
    def size(self) -> int:
        """The number of tokens in the published table."""
        return len(self.singles) + self.merges + len(self.specials)


FAMILIES = {
    "clip": Family(
        name="clip",
        title="CLIP",
        start="<|startoftext|>",
        end="<|endoftext|>",
        suffix="</w>",
        merges=48_894,
        sha256="f61f2adf497e6f5357c347aeb4646fabe82f341e946de5bdec5d2858e41bef4a",
        file="clip.txt.gz",
    ),
    "gpt2": Family(
        name="gpt2",
        title="GPT-2",
        start="<|endoftext|>",
        end="<|endoftext|>",
        suffix="",
        merges=50_000,
        sha256="04e3597d7996f292ca9b8b7285ca4d58a6ae171ac47d73fc7140ceb0c7a6bbc0",
        file="gpt2.bpe",
    ),
}


def find_family(name: Any) -> Family:
    """Return the family called ``name``.

    Raises:
        CapGenError: there is no such family.
    """
    if not isinstance(name, str) or name not in FAMILIES:
        raise CapGenError(
            f"there is no byte-pair family {name!r}", f"choose one of: {', '.join(FAMILIES)}"
        )
    return FAMILIES[name]


def byte_symbols() -> dict[int, str]:
    """Return the printable character that stands for each byte, in the order of the published ids.

    Bytes that Latin-1 prints stand for themselves. The others, in rising order, are written from
    U+0100 on.
    """
    printed = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1)]
    printed += range(ord("®"), ord("ÿ") + 1)
    others = sorted(set(range(256)) - set(printed))
    symbols = [*map(chr, printed), *(chr(256 + i) for i in range(len(others)))]
    return dict(zip([*printed, *others], symbols, strict=True))


def load_merges(family: Family, folder: Path | None = None) -> list[Merge]:
    """Return the published merges of ``family``, by rank.

    Args:
        family: which table.
        folder: a model in the hub's layout (merges.txt with vocab.json, or tokenizer.json) whose
            table must be the published one. By default the table that CapGen ships is read.

    Raises:
        CapGenError: the folder holds no table, or another one.
    """
    ids: Any = None
    if folder is None:
        content = (TABLES / family.file).read_bytes()
        if family.file.endswith(".gz"):
            content = gzip.decompress(content)
        lines: list[Any] = content.decode().split("\n")[1:]  # without "#version"
    else:
        lines, ids = _read_folder(folder, family)
    lines = [" ".join(map(str, m)) if isinstance(m, list) else str(m) for m in lines]
    text = "\n".join(lines[: family.merges]).encode("utf-8", "replace")
    if hashlib.sha256(text).hexdigest() != family.sha256:
        raise CapGenError(
            f"{folder} does not hold the table that {family.title} was published with",
            _remedy(family),
        )
    merges: list[Merge] = [(m[0], m[1]) for m in (line.split() for line in lines[: family.merges])]
    if ids is not None and ids != {t: i for i, t in enumerate(published_tokens(family, merges))}:
        raise CapGenError(
            f"{folder} does not number the tokens as {family.title} does", _remedy(family)
        )
    return merges


def _read_folder(folder: Path, family: Family) -> tuple[list[Any], Any]:
    """Return the merges of a model folder as they are written, and its ids by token, if any."""
    names = ("merges.txt", "vocab.json", "tokenizer.json")
    merges, vocabulary, together = paths = [folder / name for name in names]
    remedy = _remedy(family)
    try:
        if any(path.is_file() and path.stat().st_size > MAX_BYTES for path in paths):
            raise CapGenError(f"a file of the tokenizer in {folder} is too large", remedy)
        if merges.is_file():
            lines = merges.read_text(encoding="utf-8").split("\n")
            ids = read_json(vocabulary, remedy) if vocabulary.is_file() else None
            return lines["#version" in lines[0] :], ids
    except (OSError, ValueError) as error:
        raise CapGenError(f"cannot read {merges}: {error}", remedy) from error
    value = read_json(together, remedy)
    model = value.get("model") if isinstance(value, dict) else None
    if not isinstance(model, dict) or not isinstance(model.get("merges"), list):
        raise CapGenError(f"the folder {folder} holds no byte-pair table", remedy)
    return model["merges"], model.get("vocab")


def published_tokens(family: Family, merges: Sequence[Merge]) -> list[str]:
    """Return the tokens of ``family`` in the order of their ids."""
    return [*family.singles, *(first + second for first, second in merges), *family.specials]


def _remedy(family: Family) -> str:
    return f"use a folder with {family.title}'s own tokenizer files, or remove them: CapGen has it"
