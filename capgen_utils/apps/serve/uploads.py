"""Safe uploads: multipart bodies are read within limits and in memory, images opened by content."""

import io
import re
import struct
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

from PIL import Image
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, MultipartState, parse_options_header

from capgen_utils.apps.serve.problems import Problem
from capgen_utils.apps.serve.protection import Limits
from capgen_utils.common.files import CapGenError
from capgen_utils.data.images import FORMATS, open_image

IMAGE_FIELD = "image"
MOST_FIELDS = 64
FIELD_BYTES = 1000
MOST_SCANS = 100  # of a JPEG: each one decodes the whole image but takes only a few bytes
MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # of a JPEG segment
SEE = "see /openapi.json, or send: curl -F image=@photo.jpg"


@dataclass
class Form:
    """A parsed body.

    Attributes:
        images: bytes of each image, in order; claimed names and types are not kept.
        fields: the values of every other field.
    """

    images: list[bytearray] = field(default_factory=list)
    fields: dict[str, list[str]] = field(default_factory=dict)

    def values(self) -> dict[str, str | list[str]]:
        """Return the fields for a model: empty ones are left out, repeated ones are lists."""
        fields = {name: [v for v in values if v.strip()] for name, values in self.fields.items()}
        return {name: v[0] if len(v) == 1 else v for name, v in fields.items() if v}


# --- multipart


def boundary_of(content_type: str, content_encoding: str = "") -> bytes:
    """Return the bytes that separate the parts.

    Raises:
        Problem: 415, not multipart/form-data; 400, no boundary.
    """
    kind, parameters = parse_options_header(content_type.encode("latin-1", "replace"))
    if kind.lower() != b"multipart/form-data":
        raise Problem(415, "not_multipart", "the body is not multipart/form-data", SEE)
    if content_encoding.strip().lower() not in ("", "identity"):
        raise Problem(
            415, "encoded_body", "compressed bodies are not accepted", "send the images as they are"
        )
    boundary = parameters.get(b"boundary", b"")
    if not re.fullmatch(
        rb"[0-9A-Za-z'()+_,./:=? -]{0,69}[0-9A-Za-z'()+_,./:=?-]", boundary
    ):  # RFC 2046
        raise Problem(400, "bad_boundary", "the content type names no usable boundary", SEE)
    return boundary


class _Reader:
    """Collects the parts of one body; anything beyond the limits ends it at once."""

    def __init__(self, boundary: bytes, limits: Limits) -> None:
        self.form, self._limits = Form(), limits
        self._header = (bytearray(), bytearray())  # name, value
        self._disposition = b""
        self._field, self._part = "", bytearray()
        self._parser = MultipartParser(
            boundary,
            {
                "on_header_field": lambda data, i, j: self._header[0].extend(data[i:j]),
                "on_header_value": lambda data, i, j: self._header[1].extend(data[i:j]),
                "on_header_end": self.end_header,
                "on_headers_finished": self.begin_part,
                "on_part_data": lambda data, i, j: self.extend_part(data[i:j]),
                "on_part_end": self.end_part,
            },
        )

    @property
    def ended(self) -> bool:
        """Whether the last boundary has arrived."""
        return self._parser.state == MultipartState.END

    def write(self, chunk: bytes) -> None:
        try:
            self._parser.write(chunk)
        except (FormParserError, UnicodeDecodeError) as error:
            raise _malformed("the body is not well-formed multipart/form-data in UTF-8") from error

    def end_header(self) -> None:
        name, value = (bytes(text) for text in self._header)
        self._header = (bytearray(), bytearray())
        if name.lower() == b"content-disposition":
            self._disposition = value
        encoded = value.strip().lower() not in (b"binary", b"8bit", b"7bit")
        if name.lower() == b"content-transfer-encoding" and encoded:
            raise _malformed("a part is encoded", "encoded_part", "send the images as they are")

    def begin_part(self) -> None:
        kind, parameters = parse_options_header(self._disposition)
        self._disposition = b""
        if kind.lower() != b"form-data" or b"name" not in parameters:
            raise _malformed("a part has no name")
        self._field, self._part = parameters[b"name"].decode("utf-8"), bytearray()
        if self._field == IMAGE_FIELD:
            if len(self.form.images) >= self._limits.images:
                detail = f"more than {self._limits.images} images in one request"
                raise Problem(413, "too_many_images", detail, "send several requests")
            self.form.images.append(self._part)
        elif sum(map(len, self.form.fields.values())) >= MOST_FIELDS:
            raise _malformed(f"more than {MOST_FIELDS} fields", "too_many_fields")

    def extend_part(self, data: bytes) -> None:
        self._part += data
        if self._field != IMAGE_FIELD and len(self._part) > FIELD_BYTES:
            raise _malformed(f"a field is longer than {FIELD_BYTES} bytes", "field_too_long")

    def end_part(self) -> None:
        if self._field != IMAGE_FIELD:
            values = self.form.fields.setdefault(self._field, [])
            values.append(self._part.decode("utf-8"))


def _malformed(detail: str, code: str = "bad_multipart", remedy: str = SEE) -> Problem:
    return Problem(400, code, detail, remedy)


async def read_form(
    chunks: AsyncIterator[bytes],
    content_type: str,
    content_encoding: str,
    limits: Limits,
    take: Callable[[int], None],
) -> Form:
    """Read a multipart body as it arrives, without writing anything to a disk.

    Args:
        chunks: the body.
        content_type, content_encoding: headers of the request.
        limits: of bytes and images.
        take: reserves memory for the body, see ``Budget.hold``.

    Raises:
        Problem: 400 for a malformed body, 413 for too much, 415 for another type, 422 without an
            image, 503 if other requests hold all the memory for uploads.
    """
    reader, size = _Reader(boundary_of(content_type, content_encoding), limits), 0
    async for chunk in chunks:
        size += len(chunk)
        if size > limits.body_bytes:
            raise too_large(limits)
        take(len(chunk))
        reader.write(chunk)
    if not reader.ended:
        raise _malformed("the body ends before its last boundary")
    if not reader.form.images:
        raise Problem(422, "no_image", f"no part is named {IMAGE_FIELD!r}", SEE)
    return reader.form


def too_large(limits: Limits) -> Problem:
    """Return 413 for a body of too many bytes."""
    detail = f"the body is larger than {limits.body_bytes / 1e6:g} MB"
    return Problem(413, "body_too_large", detail, "send fewer or smaller images")


# --- images


def open_upload(data: bytes | bytearray, index: int, limits: Limits) -> Image.Image:
    """Return an uploaded image upright and in RGB, without metadata, as ``images.open_image`` does.

    Args:
        data: the file.
        index: position of the image in its request, for the error.
        limits: of pixels and frames.

    Raises:
        Problem: 413 for too many pixels or frames, 422 for a file that is damaged or no image.
            Neither reveals more of the content than its size.
    """

    def problem(detail: str, remedy: str, status: int = 422) -> Problem:
        code = "bad_image" if status == 422 else "image_too_large"
        errors = [{"image": index, "detail": detail}]
        return Problem(status, code, f"image {index} {detail}", remedy, errors)

    if not data:
        raise problem("is empty", "choose a file that holds an image")
    scale = f"scale it to at most {limits.pixels / 1e6:g} megapixels"
    content = bytes(data)  # copied once and shared by the streams over it
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            width, height = image.size
            if not 0 < width * height <= limits.pixels:
                raise problem(f"has {width} x {height} pixels", scale, 413)
            if frames_exceed(image, content, limits.frames):
                detail = f"has more than {limits.frames} frames"
                raise problem(detail, "reduce it to at most one frame", 413)
            if image.format in ("JPEG", "MPO") and scans_exceed(content, MOST_SCANS):
                raise problem(f"is a JPEG of more than {MOST_SCANS} scans", "save it again")
            return open_image(image)
    except Problem:
        raise
    except Image.DecompressionBombError as error:
        raise problem("has too many pixels", scale, 413) from error
    except CapGenError as error:
        remedy = "open it in a viewer, or save it again as JPEG or PNG"
        raise problem("is damaged", remedy) from error
    except Exception as error:  # Pillow's parsers raise many kinds on damaged input
        known = ", ".join(FORMATS)
        remedy = f"send an undamaged file in one of {known}"
        raise problem("is not an image that can be read", remedy) from error


def frames_exceed(image: Image.Image, data: bytes, most: int) -> bool:
    """Whether an opened image has more than ``most`` frames; bounded work, nothing is decoded."""
    if image.format == "GIF":
        return gif_frames_exceed(data, most)
    if image.format == "TIFF":  # counting all would follow a chain of millions
        try:
            image.seek(most)
        except EOFError:
            return False
        finally:
            image.seek(0)
        return True
    return int(getattr(image, "n_frames", 1)) > most  # from the header


def gif_frames_exceed(data: bytes, most: int) -> bool:
    """Whether a GIF has more than ``most`` frames, by the structure of its blocks."""

    def table(flags: int) -> int:
        """Return the size of a colour table in bytes."""
        return 3 << (flags & 7) + 1 if flags & 128 else 0

    frames, position = 0, 13 + table(data[10])  # after the header
    while position < len(data) and data[position] in (0x21, 0x2C) and frames <= most:
        if data[position] == 0x2C:  # a frame: descriptor, colour table, code size
            frames += 1
            position += 11 + table(data[position + 9] if position + 9 < len(data) else 0)
        else:
            position += 2
        while position < len(data) and data[position]:  # blocks of data, until an empty one
            position += 1 + data[position]
        position += 1
    return frames > most


def scans_exceed(data: bytes, most: int) -> bool:
    """Whether a JPEG has more than ``most`` scans."""
    scans, position = 0, 2
    while marker := MARKER.search(data, position):
        kind, position = data[marker.start() + 1], marker.end()
        scans += kind == 0xDA
        if kind == 0xD9 or scans > most:
            break
        if position + 2 <= len(data):
            position += struct.unpack_from(">H", data, position)[0]
    return scans > most
