"""HTML that all widgets share: pictures, tables, lists and errors. See notebook 11."""

import base64
import html
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from matplotlib.figure import Figure
from PIL import Image

from capgen_utils.captioner import Captioner
from capgen_utils.common.files import CapGenError
from capgen_utils.data.images import ImageLike, open_image
from capgen_utils.show.plots.style import rendered
from capgen_utils.vision.dual_encoder import DualEncoder

WIDE = {"width": "100%"}
_CELL = "style='padding:2px 12px 2px 0;text-align:left;vertical-align:top'"


def text_of(value: object) -> str:
    """Return any text (a file name, a caption, a reader's input) with its markup escaped."""
    return html.escape(str(value))


def drawn(figure: Figure, text: str) -> str:
    """Return a figure as HTML, with ``text`` for screen readers."""
    return _image(*rendered(figure), text)


def photograph(image: ImageLike, text: str, side: int = 320) -> str:
    """Return an image as HTML, at most ``side`` pixels wide and high, with an alternative text."""
    picture = open_image(image)
    width, height = picture.size
    if max(width, height) < side // 2:  # a drawing of a few pixels
        picture = picture.resize((side // 2, side // 2 * height // width), Image.Resampling.NEAREST)
    picture.thumbnail((side, side))
    stream = io.BytesIO()
    picture.save(stream, format="JPEG", quality=88)
    return _image(stream.getvalue(), "jpeg", text)


def _image(data: bytes, kind: str, text: str) -> str:
    address = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return f'<img alt="{text_of(text)}" style="max-width:100%" src="{address}">'


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a table as HTML; every cell is text, never markup."""
    head = "".join(f"<th {_CELL}>{text_of(name)}</th>" for name in header)
    lines = ["".join(f"<td {_CELL}>{text_of(cell)}</td>" for cell in row) for row in rows]
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def bullets(texts: Sequence[str]) -> str:
    """Return a list of plain texts as HTML."""
    return "<ul>" + "".join(f"<li>{text_of(text)}</li>" for text in texts) + "</ul>"


def paragraph(text: str) -> str:
    """Return a paragraph of plain text as HTML."""
    return f"<p style='margin:0.3em 0'>{text_of(text)}</p>"


def error_box(error: BaseException) -> str:
    """Return an error as HTML: the problem and the remedy, without a traceback."""
    if isinstance(error, CapGenError):
        problem, remedy = error.problem, error.remedy
    else:
        problem = f"an unexpected error occurred ({type(error).__name__}: {error})"
        remedy = "try another photograph or other settings; if it persists, report this message"
    return (
        "<div role='alert' class='capgen-error' "
        "style='border-left:4px solid #D55E00;padding:4px 10px;margin:4px 0'>"
        f"<b>{text_of(problem)}</b><br>{text_of(remedy)}</div>"
    )


@contextmanager
def guarded(box: Any) -> Iterator[None]:
    """Show an error in ``box``, a widget with a ``value`` of HTML, instead of raising it.

    An exception in a widget's callback ends in a log that nobody reads: the click would seem to do
    nothing.
    """
    try:
        yield
    except Exception as error:
        box.value = error_box(error)


def scorer_of(captioner: Captioner) -> DualEncoder | None:
    """Return the CLIP that can score a captioner's captions, or ``None``."""
    try:
        return captioner.scorer
    except CapGenError:
        return None
