"""Captions of many images, written batch by batch: memory stays small, and a run that was stopped
goes on."""

import csv
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from capgen_utils.common.files import (
    CapGenError,
    explain_os_errors,
    fingerprint,
    read_json,
    sha256_file,
    write_json,
)
from capgen_utils.decoding.captions import Caption
from capgen_utils.decoding.options import DecodingOptions, check_decoding, with_options

if TYPE_CHECKING:  # so that a captioner without torch can be used too
    from capgen_utils.apps.export.onnx_captioner import OnnxCaptioner
    from capgen_utils.captioner import Captioner


BATCH_SIZE = 32
VERSION = 1


Result = tuple[Path, Caption | CapGenError]


_ANOTHER = "name another file, or delete this one"


def shown(path: str | Path) -> str:
    """Return a path as it is written: bytes of a file name that are no UTF-8 become escapes."""
    return str(path).encode("utf-8", "backslashreplace").decode()


def printable(text: str) -> str:
    """Return ``text`` in one line: control characters, which a file name may hold, become escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def read_paths(data: bytes) -> list[Path]:
    """Return the paths that a list holds: one a line, or separated by NUL where there is one
    (``find -print0``)."""
    separator = b"\0" if b"\0" in data else b"\n"
    lines = (line if separator == b"\0" else line.rstrip(b"\r") for line in data.split(separator))
    return [Path(os.fsdecode(line)) for line in lines if line]


# --- how a caption is written


@dataclass(frozen=True)
class Style:
    """How results are written.

    Attributes:
        format: ``text`` to read, ``jsonl`` (an object a line) or ``csv``.
        candidates: how many of an image's captions are written; ``None`` for the format's usual:
            the best one, in ``jsonl`` all.
        reranked: a CLIP chose, so its score is written too.
        named: whether a line of ``text`` begins with the file.
    """

    format: str = "text"
    candidates: int | None = None
    reranked: bool = False
    named: bool = True

    @property
    def header(self) -> str:
        """The first line of a file of this format."""
        columns = ["image", "caption", "rank", "log_probability"] + [
            "temperature",
            "clip_score",
        ] * self.reranked
        return _csv([columns]) if self.format == "csv" else ""

    def record(self, path: Path, caption: Caption) -> str:
        """Return what is written of one image: one or several lines, the last one ended."""
        return {"text": self._text, "jsonl": self._json, "csv": self._rows}[self.format](
            path, caption
        )

    def _text(self, path: Path, caption: Caption) -> str:
        lines = [f"{printable(shown(path))}: {caption.text}" if self.named else caption.text]
        for candidate in caption.candidates[: self.candidates] if self.candidates else ():
            fits = f"  {candidate.clip_score:5.3f}" if candidate.clip_score is not None else ""
            lines.append(f"  {candidate.log_probability:8.2f}{fits}  {candidate.text}")
        return "\n".join(lines) + "\n"

    def _json(self, path: Path, caption: Caption) -> str:
        considered = [
            {"text": c.text, "log_probability": round(c.log_probability, 4)}
            | (
                {}
                if c.clip_score is None
                else {"temperature": c.temperature, "clip_score": round(c.clip_score, 4)}
            )
            for c in caption.candidates[: self.candidates]
        ]
        row = {"image": shown(path), "caption": caption.text, "candidates": considered}
        return json.dumps(row, ensure_ascii=False) + "\n"

    def _rows(self, path: Path, caption: Caption) -> str:
        return _csv(
            [shown(path), c.text, rank, round(c.log_probability, 4)]
            + ([] if c.clip_score is None else [c.temperature, round(c.clip_score, 4)])
            for rank, c in enumerate(caption.candidates[: self.candidates or 1], start=1)
        )


def _csv(rows: Iterable[Sequence[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text).writerows(rows)  # with CR LF, as RFC 4180 has it
    return text.getvalue()


# --- files that grow


class CaptionFile:
    """A file of captions that grows batch by batch; what one batch adds is there before the next
    one begins.

    A second file beside it, ``FILE.settings.json``, says what made it, so that nothing else is ever
    appended.

    Args:
        path: of ``jsonl`` or ``csv``; plain text can be written, but not gone on with.
        style: how it is written.
        settings: what the captions hang on, see ``settings_of``.
        paths: all images of the run, in order.
        batch_size: images of a batch.
        resume: go on with a file that exists. A torn last line is dropped, and with it what its
            batch had written: the batch is captioned anew as a whole, so that the file becomes the
                same to the byte.

    Attributes:
        held: the images that it holds already, as ``shown`` writes them.

    Raises:
        CapGenError: it exists and shall not be gone on with, was made by other settings, or cannot
            be written.
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
        self.path, self.style = path, style
        self.held: set[str] = set()
        if resume and style.format == "text":
            raise CapGenError(
                "a file of plain text cannot be gone on with", "write --format jsonl or csv"
            )
        if os.path.lexists(path) and (not path.is_file() or path.stat().st_size):
            if not resume or not path.is_file():
                raise CapGenError(f"{path} exists already", f"go on with it (--resume), {_ANOTHER}")
            _check_settings(path, settings)
            self._take_up([shown(p) for p in paths], batch_size)
        if style.format != "text":
            write_json(settings_path(path), settings)
        with explain_os_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._stream = _append(path)
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
        """Hand what was written to the operating system: it survives the end of this process."""
        with explain_os_errors(self.path):
            self._stream.flush()

    def _take_up(self, names: Sequence[str], batch_size: int) -> None:
        header, records = _records(self.path, self.style)
        batches = {name: place // batch_size for place, name in enumerate(names)}
        torn = batches.get(records[-1][0]) if records else None
        while torn is not None and records and batches.get(records[-1][0]) == torn:
            records.pop()
        self.held = {name for name, _ in records}
        with explain_os_errors(self.path):
            os.truncate(self.path, records[-1][1] if records else header)


def settings_path(path: Path) -> Path:
    """Return where it is written what made a file of captions."""
    return path.with_name(f"{path.name}.settings.json")


def _append(path: Path) -> TextIO:
    return open(path, "a", encoding="utf-8", newline="")


def _check_settings(path: Path, settings: Mapping[str, Any]) -> None:
    beside = settings_path(path)
    if not beside.is_file():
        raise CapGenError(
            f"what made {path} is not known: there is no {beside.name} beside it", _ANOTHER
        )
    before, now = read_json(beside, _ANOTHER), json.loads(json.dumps(settings))
    before = before if isinstance(before, dict) else {}
    changed = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    if changed:
        raise CapGenError(
            f"{path} was made with other settings ({', '.join(changed)})",
            f"caption as before, or {_ANOTHER}",
        )


def _records(path: Path, style: Style) -> tuple[int, list[tuple[str, int]]]:
    """Return where the header ends, and of each whole record its image and the byte at which it
    ends."""
    header, found, end, held = 0, list[tuple[str, int]](), 0, b""
    with explain_os_errors(path, "read"), open(path, "rb") as stream:
        for line in stream:
            held += line
            if not line.endswith(b"\n") or (style.format == "csv" and held.count(b'"') % 2):
                continue  # torn, or a line break within quotes
            end += len(held)
            if header or not style.header:
                found.append((_image_of(held, style, path, end), end))
            elif held != style.header.encode():
                raise CapGenError(f"{path} does not begin with the columns of captions", _ANOTHER)
            else:
                header = end
            held = b""
    return header, found


def _image_of(record: bytes, style: Style, path: Path, end: int) -> str:
    try:
        text = record.decode("utf-8")
        image = (
            next(csv.reader(io.StringIO(text, newline="")))[0]
            if style.format == "csv"
            else json.loads(text)["image"]
        )
        if isinstance(image, str):
            return image
    except (ValueError, TypeError, KeyError, IndexError, StopIteration, RecursionError, csv.Error):
        pass
    raise CapGenError(f"{path} holds something else than captions before byte {end}", _ANOTHER)


class FailureFile:
    """The images of a run that could not be captioned, one JSON object a line: image, problem,
    remedy.

    Args:
        path: begun anew; ``None`` for no file.

    Raises:
        CapGenError: the file holds something else, or cannot be written.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        if path is None:
            return
        with explain_os_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            first = b""
            if os.path.lexists(path):
                with open(path, "rb") as stream:
                    first = stream.readline(100_000)
            if first and not (first.startswith(b'{"image": ') and b'"problem": ' in first):
                raise CapGenError(f"{path} exists already, and is no list of failures", _ANOTHER)
            path.write_bytes(b"")

    def write(self, failures: Sequence[tuple[Path, CapGenError]]) -> None:
        """Append the failures of one batch."""
        rows = (
            {"image": shown(path), "problem": shown(e.problem), "remedy": e.remedy}
            for path, e in failures
        )
        if self.path is None or not failures:
            return
        with explain_os_errors(self.path), _append(self.path) as stream:
            stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


# --- the run


def settings_of(
    captioner: "Captioner | OnnxCaptioner",
    style: Style,
    options: DecodingOptions,
    rerank: bool = False,
    temperatures: Sequence[float] | None = None,
    scorer: Path | None = None,
) -> dict[str, Any]:
    """Return what the captions of a run hang on: format, bundle (its files' SHA-256), decoding, and
    who chooses.

    Raises:
        CapGenError: the decoding options are not possible.
    """
    decoding = with_options(captioner.decoding, **options)
    chosen = (
        {"scorer": scorer and _contents(scorer), "temperatures": temperatures} if rerank else None
    )
    return {
        "version": VERSION,
        "format": style.format,
        "candidates": style.candidates,
        "bundle": captioner.folder and _contents(captioner.folder),
        "features": captioner.features_dtype,
        "decoding": asdict(check_decoding(decoding, captioner.longest)),
        "reranking": chosen,
    }


def _contents(folder: Path) -> str:
    with explain_os_errors(folder, "read"):
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        return fingerprint(
            {path.relative_to(folder).as_posix(): sha256_file(path) for path in files}
        )


def caption_batches(
    captioner: "Captioner | OnnxCaptioner",
    paths: Sequence[Path],
    held: Iterable[str] = (),
    batch_size: int = BATCH_SIZE,
    **asked: Any,
) -> Iterator[list[Result]]:
    """Caption files batch by batch; nothing of a batch is kept when the next one begins.

    Args:
        captioner: does the work.
        paths: all images. Batches are cut from these, so a run that goes on computes the batches it
            would have.
        held: images that are captioned already, as ``shown`` writes them.
        batch_size: images that go through the networks together.
        asked: as ``Captioner.caption_each`` takes it.

    Yields:
        Each file that was not captioned yet, with its caption or its error.
    """
    done = frozenset(held)
    for start in range(0, len(paths), batch_size):
        missing = [path for path in paths[start : start + batch_size] if shown(path) not in done]
        if missing:
            yield list(captioner.caption_each(missing, batch_size=batch_size, **asked))


def write_batch(
    batch: Sequence[Result], style: Style, output: CaptionFile | TextIO, failures: FailureFile
) -> None:
    """Write the captions of one batch to ``output`` and its failures to their list.

    Raises:
        CapGenError: a file cannot be written.
    """
    said = "".join(
        style.record(path, result) for path, result in batch if isinstance(result, Caption)
    )
    failures.write([(path, result) for path, result in batch if isinstance(result, CapGenError)])
    output.write(said)
    output.flush()
