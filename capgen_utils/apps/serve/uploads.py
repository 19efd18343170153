"""Safe uploads: multipart bodies are read within limits and in memory, images opened by content."""

import io
import re
import struct
from collections.abc import AsyncGenerator, Callable

from PIL import Image
from python_multipart.multipart import parse_options_header
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from capgen_utils.apps.serve.protection import Limits
from capgen_utils.apps.serve.schemas import Problem
from capgen_utils.common.files import CapGenError
from capgen_utils.data.images import FORMATS, open_image

IMAGE_FIELD = "image"
MOST_FIELDS = 64
FIELD_BYTES = 1024
MOST_SCANS = 100  # of a JPEG: each one decodes the whole image but takes only a few bytes
MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # of a JPEG segment
SEE = "see /openapi.json, or send: curl -F image=@photo.jpg"


class InMemory(MultiPartParser):
    """Starlette's parser, which writes nothing to a disk and knows whether the body was whole."""

    spool_max_size = 0  # bytes of a file kept in memory: all of them
    ended = False

    def on_end(self) -> None:
        """The last boundary has arrived."""
        self.ended = True


async def read_form(request: Request, limits: Limits, take: Callable[[int], None]) -> FormData:
    """Read a multipart body as it arrives.

    Args:
        request: its body has not been read.
        limits: of bytes and images.
        take: reserves memory for the body, see ``Budget.hold``.

    Returns:
        An ``UploadFile`` for each image, the texts of the other fields.

    Raises:
        Problem: 400 for a malformed body, 413 for too much, 415 for another type, 422 without an
            image, 503 if other requests hold all the memory for uploads.
    """
    kind, length, encoding = (
        request.headers.get(f"content-{name}", "") for name in ("type", "length", "encoding")
    )
    if parse_options_header(kind)[0] != b"multipart/form-data":
        raise Problem(415, "not_multipart", "the body is not multipart/form-data", SEE)
    if encoding.strip().lower() not in ("", "identity"):
        raise Problem(
            415, "encoded_body", "compressed bodies are not accepted", "send the images as they are"
        )
    detail = f"the body is larger than {limits.body_bytes / 1e6:g} MB"
    too_large = Problem(413, "body_too_large", detail, "send fewer or smaller images")
    if length.isdecimal() and int(length[:20]) > limits.body_bytes:
        raise too_large

    async def counted() -> AsyncGenerator[bytes, None]:
        size = 0
        async for chunk in request.stream():
            size += len(chunk)
            if size > limits.body_bytes:
                raise too_large
            take(len(chunk))
            yield chunk

    most = {"max_files": limits.images, "max_fields": MOST_FIELDS, "max_part_size": FIELD_BYTES}
    parser = InMemory(request.headers, counted(), **most)
    try:
        form = await parser.parse()
    except (MultiPartException, ValueError) as error:  # ValueError: an odd charset
        if str(error).startswith("Too many files"):
            detail = f"more than {limits.images} images in one request"
            raise Problem(413, "too_many_images", detail, "send several requests") from error
        raise Problem(400, "bad_multipart", f"the body cannot be read: {error}", SEE) from error
    if not parser.ended:
        raise Problem(400, "bad_multipart", "the body ends before its last boundary", SEE)
    images = form.getlist(IMAGE_FIELD)
    if not images or not all(isinstance(image, UploadFile) for image in images):
        raise Problem(422, "no_image", f"no part named {IMAGE_FIELD!r} holds a file", SEE)
    return form


# --- images


def open_upload(data: bytes, index: int, limits: Limits) -> Image.Image:
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
        return Problem(
            status,
            "bad_image" if status == 422 else "image_too_large",
            f"image {index} {detail}",
            remedy,
            [{"image": index, "detail": detail}],
        )

    if not data:
        raise problem("is empty", "choose a file that holds an image")
    scale = f"scale it to at most {limits.pixels / 1e6:g} megapixels"
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            if not 0 < width * height <= limits.pixels:
                raise problem(f"has {width} x {height} pixels", scale, 413)
            if frames_exceed(image, data, limits.frames):
                detail = f"has more than {limits.frames} frames"
                raise problem(detail, "reduce it to at most one frame", 413)
            if image.format in ("JPEG", "MPO") and scans_exceed(data, MOST_SCANS):
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
