"""Uploads made harmless: multipart bodies read within bounds and in memory only, images opened by
content."""

import io
import re
import struct
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field

from PIL import Image
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from capgen_utils.apps.serve.problems import Problem
from capgen_utils.apps.serve.protection import Hold, Limits
from capgen_utils.common.files import CapGenError
from capgen_utils.data.images import FORMATS, open_image

IMAGE_FIELD = "image"
MOST_FIELDS = 64
FIELD_BYTES = 1000


MOST_SCANS = (
    100  # of a JPEG: each is a walk over the whole image, and costs a hostile file a few bytes
)


_SEE = "see /openapi.json, or send: curl -F image=@photo.jpg"


@dataclass
class Form:
    """A parsed body.

    Attributes:
        images: bytes of each image, in the order they came in; names and types that were claimed
            are not kept.
        fields: the values of each other field.
    """

    images: list[bytearray] = field(default_factory=list)
    fields: dict[str, list[str]] = field(default_factory=dict)

    def values(self) -> dict[str, str | list[str]]:
        """Return the fields as a model takes them: empty ones are not given, repeated ones are
        lists."""
        given = {name: [v for v in values if v.strip()] for name, values in self.fields.items()}
        return {
            name: values[0] if len(values) == 1 else values
            for name, values in given.items()
            if values
        }


# --- multipart


def boundary_of(content_type: str, content_encoding: str = "") -> bytes:
    """Return what separates the parts.

    Raises:
        Problem: 415, another type than multipart/form-data; 400, no boundary.
    """
    kind, parameters = parse_options_header(content_type.encode("latin-1", "replace"))
    if kind.lower() != b"multipart/form-data":
        raise Problem(415, "not_multipart", "the body is not multipart/form-data", _SEE)
    if content_encoding.strip().lower() not in ("", "identity"):
        raise Problem(
            415, "encoded_body", "compressed bodies are not accepted", "send the images as they are"
        )
    boundary = parameters.get(b"boundary", b"")
    if not re.fullmatch(
        rb"[0-9A-Za-z'()+_,./:=? -]{0,69}[0-9A-Za-z'()+_,./:=?-]", boundary
    ):  # RFC 2046
        raise Problem(400, "bad_boundary", "the content type names no usable boundary", _SEE)
    return boundary


class _Reader:
    """Collects the parts of one body; what is too much ends it at once."""

    def __init__(self, boundary: bytes, limits: Limits) -> None:
        self.form, self.ended, self._limits = Form(), False, limits
        self._name, self._value = bytearray(), bytearray()
        self._disposition = b""
        self._part: bytearray | None = None
        self._field = ""
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._begin,
                "on_header_field": lambda data, start, end: self._name.extend(data[start:end]),
                "on_header_value": lambda data, start, end: self._value.extend(data[start:end]),
                "on_header_end": self._header_end,
                "on_headers_finished": self._headers_finished,
                "on_part_data": self._data,
                "on_part_end": self._part_end,
                "on_end": self._end,
            },
        )

    def write(self, chunk: bytes) -> None:
        try:
            self._parser.write(chunk)
        except FormParserError as error:
            raise Problem(
                400, "bad_multipart", "the body is no well-formed multipart/form-data", _SEE
            ) from error

    def finish(self) -> Form:
        if not self.ended:
            raise Problem(400, "bad_multipart", "the body ends before its last boundary", _SEE)
        return self.form

    def _end(self) -> None:
        self.ended = True

    def _begin(self) -> None:
        self._disposition = b""

    def _header_end(self) -> None:
        name = bytes(self._name).lower()
        if name == b"content-disposition":
            self._disposition = bytes(self._value)
        elif name == b"content-transfer-encoding" and bytes(self._value).strip().lower() not in (
            b"binary",
            b"8bit",
            b"7bit",
        ):
            raise Problem(400, "encoded_part", "a part is encoded", "send the images as they are")
        self._name.clear()
        self._value.clear()

    def _headers_finished(self) -> None:
        kind, parameters = parse_options_header(self._disposition)
        name = parameters.get(b"name")
        if kind.lower() != b"form-data" or name is None:
            raise Problem(400, "bad_multipart", "a part has no name", _SEE)
        try:
            self._field = name.decode("utf-8")
        except UnicodeDecodeError as error:
            raise Problem(400, "bad_multipart", "a part's name is not UTF-8", _SEE) from error
        self._part = bytearray()
        if self._field == IMAGE_FIELD:
            if len(self.form.images) >= self._limits.images:
                most = self._limits.images
                raise Problem(
                    413,
                    "too_many_images",
                    f"more than {most} images in one request",
                    "send several requests",
                )
            self.form.images.append(self._part)
        elif sum(map(len, self.form.fields.values())) >= MOST_FIELDS:
            raise Problem(400, "too_many_fields", f"more than {MOST_FIELDS} fields", _SEE)

    def _data(self, data: bytes, start: int, end: int) -> None:
        assert self._part is not None
        self._part += data[start:end]
        if self._field != IMAGE_FIELD and len(self._part) > FIELD_BYTES:
            raise Problem(
                400, "field_too_long", f"a field is longer than {FIELD_BYTES} bytes", _SEE
            )

    def _part_end(self) -> None:
        assert self._part is not None
        if self._field == IMAGE_FIELD:
            return
        try:
            value = self._part.decode("utf-8")
        except UnicodeDecodeError as error:
            raise Problem(400, "bad_multipart", "a field is not UTF-8", _SEE) from error
        self.form.fields.setdefault(self._field, []).append(value)


async def read_form(
    chunks: AsyncIterator[bytes],
    content_type: str,
    content_encoding: str,
    limits: Limits,
    hold: Hold,
) -> Form:
    """Read a multipart body as it arrives; nothing of it touches a disk.

    Args:
        chunks: the body.
        content_type, content_encoding: headers of the request.
        limits: bytes and images.
        hold: grows with the body.

    Raises:
        Problem: 400 for what is malformed, 413 for what is too much, 415 for another type, 503
            where other requests hold all the memory there is for uploads.
    """
    reader, size = _Reader(boundary_of(content_type, content_encoding), limits), 0
    async for chunk in chunks:
        size += len(chunk)
        if size > limits.body_bytes:
            raise too_large(limits)
        hold.add(len(chunk))
        reader.write(chunk)
    form = reader.finish()
    if not form.images:
        raise Problem(422, "no_image", f"no part is named {IMAGE_FIELD!r}", _SEE)
    return form


def too_large(limits: Limits) -> Problem:
    """Return 413 for a body of too many bytes."""
    return Problem(
        413,
        "body_too_large",
        f"the body is larger than {limits.body_bytes / 1e6:g} MB",
        "send fewer or smaller images",
    )


# --- images


def open_upload(data: bytes | bytearray, place: int, limits: Limits) -> Image.Image:
    """Return an uploaded image upright and in RGB, as ``images.open_image`` does; its metadata is
    gone.

    Args:
        data: the file.
        place: of the image in its request, for the error.
        limits: pixels and frames.

    Raises:
        Problem: 413 for too many pixels or frames, 422 for what is no image or damaged. Neither
            says more of the content than its size.
    """
    if not data:
        raise _refused(place, "is empty", "choose a file that holds an image")
    content = bytes(data)  # copied once; streams over it share it
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            width, height = image.size
            if width * height > limits.pixels or not width or not height:
                raise _too_many(
                    place, f"has {width} x {height} pixels", f"{limits.pixels / 1e6:g} megapixels"
                )
            if frames_exceed(image, content, limits.frames):
                raise _too_many(place, f"has more than {limits.frames} frames", "one frame")
            if image.format in ("JPEG", "MPO") and scans_exceed(content, MOST_SCANS):
                raise _refused(place, f"is a JPEG of more than {MOST_SCANS} scans", "save it again")
            return open_image(image)
    except Problem:
        raise
    except Image.DecompressionBombError as error:
        raise _too_many(
            place, "has too many pixels", f"{limits.pixels / 1e6:g} megapixels"
        ) from error
    except CapGenError as error:
        raise _refused(
            place, "is damaged", "open it in a viewer, or save it again as JPEG or PNG"
        ) from error
    except Exception as error:  # Pillow's parsers raise many kinds on damaged input
        known = ", ".join(FORMATS)
        raise _refused(
            place, "is not an image that can be read", f"send one of {known}, undamaged"
        ) from error


def _refused(place: int, what: str, remedy: str) -> Problem:
    return Problem(
        422, "bad_image", f"image {place} {what}", remedy, [{"image": place, "detail": what}]
    )


def _too_many(place: int, what: str, most: str) -> Problem:
    return Problem(
        413,
        "image_too_large",
        f"image {place} {what}",
        f"scale it to at most {most}",
        [{"image": place, "detail": what}],
    )


def frames_exceed(image: Image.Image, data: bytes, most: int) -> bool:
    """Whether an image that was opened, not loaded, has more than ``most`` frames; bounded work,
    nothing decoded."""
    if image.format == "GIF":
        return sum(1 for _ in zip(_gif_frames(data), range(most + 1), strict=False)) > most
    if image.format == "TIFF":  # counting them all would follow a chain of millions
        try:
            image.seek(most)
        except EOFError:
            return False
        finally:
            image.seek(0)
        return True
    return int(getattr(image, "n_frames", 1)) > most  # written in the header


def _gif_frames(data: bytes) -> Iterator[int]:
    """Yield where each frame of a GIF begins."""
    place = 13 + (
        3 << (data[10] & 7) + 1 if data[10] & 128 else 0
    )  # behind the header and its colour table
    while place < len(data) and data[place] in (0x21, 0x2C):
        if data[place] == 0x2C:
            yield place
            flags = data[place + 9] if place + 9 < len(data) else 0
            place += 11 + (
                3 << (flags & 7) + 1 if flags & 128 else 0
            )  # descriptor, colour table, code size
        else:
            place += 2
        while place < len(data) and data[place]:  # blocks of data, until an empty one
            place += 1 + data[place]
        place += 1


_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")


def scans_exceed(data: bytes, most: int) -> bool:
    """Whether a JPEG has more than ``most`` scans."""
    scans, place = 0, 2
    while found := _MARKER.search(data, place):
        marker, place = data[found.start() + 1], found.end()
        if marker == 0xD9:
            return False
        if marker == 0xDA:
            scans += 1
            if scans > most:
                return True
        if place + 2 <= len(data):
            place += struct.unpack_from(">H", data, place)[0]
    return False
