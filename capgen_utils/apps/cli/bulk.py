"""Captions of many images, written batch by batch: memory stays small, and runs can resume."""

import csv
import io
import json
import os
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from capgen_utils.common.files import (
    CapGenError,
    atomic_path,
    explain_os_errors,
    fingerprint,
    read_json,
    sha256_file,
    write_json,
)
from capgen_utils.decoding.captions import Caption
from capgen_utils.decoding.options import check_decoding, with_options

if TYPE_CHECKING:  # so that a captioner without torch can be used too
    from capgen_utils.apps.export.onnx_captioner import OnnxCaptioner
    from capgen_utils.captioner import Captioner

BATCH_SIZE = 32
VERSION = 1
Result = tuple[Path, Caption | CapGenError]
OTHER_FILE = "choose another file, or delete this one"


def shown(path: str | Path) -> str:
    """Return a path as it is written; bytes of a file name that are not UTF-8 become escapes."""
    return str(path).encode("utf-8", "backslashreplace").decode()


def printable(text: str) -> str:
    """Return ``text`` on one line; control characters in file names become escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def read_paths(data: bytes) -> list[Path]:
    """Return the paths of a list: one per line, or separated by NUL (``find -print0``)."""
    lines = data.split(b"\0") if b"\0" in data else [x.rstrip(b"\r") for x in data.split(b"\n")]
    return [Path(os.fsdecode(line)) for line in lines if line]


# --- how a caption is written


@dataclass(frozen=True)
class Style:
    """How results are written.

    Attributes:
        format: ``text`` to read, ``jsonl`` (one object per line) or ``csv``.
        candidates: captions written per image; ``None`` for all of them in ``jsonl``, else only the
            best.
        reranked: whether captions have a CLIP score, which is then written too.
        named: whether a line of ``text`` begins with the file name.
    """

    format: str = "text"
    candidates: int | None = None
    reranked: bool = False
    named: bool = True

    @property
    def columns(self) -> list[str]:
        """The columns of a CSV file."""
        scores = ["temperature", "clip_score"] if self.reranked else []
        return ["image", "caption", "rank", "log_probability", *scores]

    @property
    def header(self) -> str:
        """The first line of a file of this format."""
        return csv_text([self.columns]) if self.format == "csv" else ""

    def record(self, path: Path, caption: Caption) -> str:
        """Return the lines written for one image, the last one terminated."""
        if self.format == "csv":
            return csv_text(
                [shown(path), c.text, rank, round(c.log_probability, 4)]
                + ([] if c.clip_score is None else [c.temperature, round(c.clip_score, 4)])
                for rank, c in enumerate(caption.candidates[: self.candidates or 1], start=1)
            )
        if self.format == "text":
            lines = [f"{printable(shown(path))}: {caption.text}" if self.named else caption.text]
            for c in caption.candidates[: self.candidates or 0]:
                score = "" if c.clip_score is None else f"  {c.clip_score:5.3f}"
                lines.append(f"  {c.log_probability:8.2f}{score}  {c.text}")
            return "\n".join(lines) + "\n"
        candidates = [
            {"text": c.text, "log_probability": round(c.log_probability, 4)}
            | (
                {}
                if c.clip_score is None
                else {"temperature": c.temperature, "clip_score": round(c.clip_score, 4)}
            )
            for c in caption.candidates[: self.candidates]
        ]
        row = {"image": shown(path), "caption": caption.text, "candidates": candidates}
        return json.dumps(row, ensure_ascii=False) + "\n"


def csv_text(rows: Iterable[Sequence[Any]]) -> str:
    """Return rows as CSV, with the line ends of RFC 4180."""
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    return text.getvalue()


# --- files that grow


class CaptionFile:
    """A file of captions that grows batch by batch; each batch is on disk before the next begins.

    ``FILE.settings.json`` beside it records what made the captions, so that only captions of the
    same settings are ever appended.

    Args:
        path: of ``jsonl`` or ``csv``; plain text can be written but not resumed.
        style: how captions are written.
        settings: everything that determines the captions, see ``settings_of``.
        paths: all images of the run, in order.
        batch_size: images per batch.
        resume: continue an existing file. Its last batch is captioned again as a whole, as it may
            be incomplete, so that the finished file is the same to the byte as without a stop.

    Attributes:
        held: the images already in the file, as ``shown`` writes them.

    Raises:
        CapGenError: the file exists and may not be continued, has other settings, or cannot be
            written.
    """

    def __init__(
        self,
        path: Path,
        style: Style,
        settings: Mapping[str, Any],
        paths: Sequence[Path],
        batch_size: int = BATCH_SIZE,
        resume: bool = False,
    ) -> None:
        self.path = path
        self.held: set[str] = set()
        if resume and style.format == "text":
            raise CapGenError("plain text cannot be resumed", "use --format jsonl or csv")
        if os.path.lexists(path) and (not path.is_file() or path.stat().st_size):
            if not resume or not path.is_file():
                raise CapGenError(f"{path} exists already", f"add --resume, {OTHER_FILE}")
            check_settings(path, settings)
            batches = {shown(path): i // batch_size for i, path in enumerate(paths)}
            records = read_records(path, style)
            last = batches.get(records[-1][0]) if records else None
            while last is not None and records and batches.get(records[-1][0]) == last:
                records.pop()
            self.held = {image for image, _ in records}
            kept = style.header + "".join(text for _, text in records)
            with atomic_path(path) as temporary:
                temporary.write_bytes(kept.encode())
        if style.format != "text":
            write_json(settings_path(path), settings)
        with explain_os_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._stream = open(path, "a", encoding="utf-8", newline="")  # noqa: SIM115
            if not path.stat().st_size:
                self._stream.write(style.header)

    def __enter__(self) -> "CaptionFile":
        return self

    def __exit__(self, *_: object) -> None:
        with explain_os_errors(self.path):
            self._stream.close()

    def write(self, text: str) -> None:
        """Append ``text``."""
        with explain_os_errors(self.path):
            self._stream.write(text)

    def flush(self) -> None:
        """Pass the text on to the operating system, so that it survives the end of this process."""
        with explain_os_errors(self.path):
            self._stream.flush()


def read_records(path: Path, style: Style) -> list[tuple[str, str]]:
    """Return image and text of each complete JSON line or CSV row; a torn last one is left out.

    Raises:
        CapGenError: the file holds something else, or cannot be read.
    """
    with explain_os_errors(path, "read"):
        data = path.read_bytes()
    try:
        text = data[: data.rfind(b"\n") + 1].decode("utf-8")
        if style.format == "jsonl":
            records = [(json.loads(line)["image"], f"{line}\n") for line in text.split("\n")[:-1]]
        else:
            rows = list(csv.reader(io.StringIO(text, newline="")))
            if rows and len(rows[-1]) < len(style.columns):  # torn inside a quoted field
                rows.pop()
            if rows[:1] not in ([], [style.columns]) or len(set(map(len, rows))) > 1:
                raise ValueError("other columns")
            records = [(row[0], csv_text([row])) for row in rows[1:]]
        if not all(isinstance(image, str) for image, _ in records):
            raise ValueError("an image is not named")
    except (ValueError, TypeError, KeyError, RecursionError, csv.Error) as error:
        raise CapGenError(f"{path} holds something other than captions", OTHER_FILE) from error
    return records


def settings_path(path: Path) -> Path:
    """Return the path of the settings beside a file of captions."""
    return path.with_name(f"{path.name}.settings.json")


def check_settings(path: Path, settings: Mapping[str, Any]) -> None:
    """Compare the settings recorded beside a file with those of this run.

    Raises:
        CapGenError: they are missing or differ.
    """
    beside = settings_path(path)
    if not beside.is_file():
        raise CapGenError(f"the settings of {path} are not known: no {beside.name}", OTHER_FILE)
    before, now = read_json(beside, OTHER_FILE), json.loads(json.dumps(settings))
    before = before if isinstance(before, dict) else {}
    changed = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    if changed:
        raise CapGenError(
            f"{path} was made with other settings ({', '.join(changed)})",
            f"use the same settings, or {OTHER_FILE}",
        )


class FailureFile:
    """The images that could not be captioned, one JSON object per line: image, problem, remedy.

    Args:
        path: started afresh; ``None`` for no file.

    Raises:
        CapGenError: the file holds something else, or cannot be written.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        if path is None:
            return
        with explain_os_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            if os.path.lexists(path):
                with open(path, "rb") as stream:
                    first = stream.readline(100_000)
                if first and not (first.startswith(b'{"image": ') and b'"problem": ' in first):
                    raise CapGenError(f"{path} exists and is not a list of failures", OTHER_FILE)
            path.write_bytes(b"")

    def write(self, failures: Sequence[tuple[Path, CapGenError]]) -> None:
        """Append the failures of one batch."""
        if self.path is None or not failures:
            return
        with explain_os_errors(self.path), open(self.path, "a", encoding="utf-8") as stream:
            for path, error in failures:
                row = {"image": shown(path), "problem": shown(error.problem)}
                json.dump(row | {"remedy": error.remedy}, stream, ensure_ascii=False)
                stream.write("\n")


# --- the run


def settings_of(
    captioner: "Captioner | OnnxCaptioner",
    style: Style,
    options: dict[str, Any],
    rerank: bool = False,
    scorer: Path | None = None,
) -> dict[str, Any]:
    """Return everything that determines the captions of a run.

    Returns:
        Format, decoding, re-ranking, and a hash of the files of bundle and scorer.

    Raises:
        CapGenError: the decoding options are not possible.
    """
    # First, so that impossible options are refused before any file is hashed.
    decoding = with_options(captioner.decoding, rerank, **options)
    check_decoding(decoding, captioner.longest)
    return {
        "version": VERSION,
        "format": style.format,
        "candidates": style.candidates,
        "bundle": captioner.folder and hash_folder(captioner.folder),
        "features": captioner.features_dtype,
        "decoding": decoding.to_json(),
        "reranking": {"scorer": scorer and hash_folder(scorer)} if rerank else None,
    }


def hash_folder(folder: Path) -> str:
    """Return a hash of the names and contents of all files in a folder."""
    with explain_os_errors(folder, "read"):
        return fingerprint(
            {
                p.relative_to(folder).as_posix(): sha256_file(p)
                for p in sorted(folder.rglob("*"))
                if p.is_file()
            }
        )


def caption_batches(
    captioner: "Captioner | OnnxCaptioner",
    paths: Sequence[Path],
    held: Container[str] = (),
    batch_size: int = BATCH_SIZE,
    **asked: Any,
) -> Iterator[list[Result]]:
    """Caption files batch by batch; nothing of a batch is kept when the next one begins.

    Args:
        captioner: captions the images.
        paths: all images. Batches are cut from these, so that a resumed run has the same batches.
        held: images that are captioned already, as ``shown`` writes them.
        batch_size: images per batch.
        asked: options of ``Captioner.caption_each``.

    Yields:
        Each remaining file of a batch, with its caption or its error.
    """
    for start in range(0, len(paths), batch_size):
        missing = [path for path in paths[start : start + batch_size] if shown(path) not in held]
        if missing:
            yield list(captioner.caption_each(missing, batch_size=batch_size, **asked))


def write_batch(
    batch: Sequence[Result], style: Style, output: CaptionFile | TextIO, failures: FailureFile
) -> None:
    """Write the captions of one batch to ``output`` and its failures to their list.

    Raises:
        CapGenError: a file cannot be written.
    """
    failures.write([(path, error) for path, error in batch if isinstance(error, CapGenError)])
    output.write("".join(style.record(path, c) for path, c in batch if isinstance(c, Caption)))
    output.flush()
