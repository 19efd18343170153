"""Hostile and odd images and uploads: at least 200 of them, all made here."""

import io
import random
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from PIL import Image, ImageDraw

BOUNDARY = b"frontier7d1f"
KIND = "multipart/form-data; boundary=" + BOUNDARY.decode()


@dataclass(frozen=True)
class Hostile:
    """One request to POST /v1/captions.

    Attributes:
        name: what it is.
        body: as sent.
        kind: content type.
        headers: more of them.
        fine: it is odd, but an image: it has to be captioned.
    """

    name: str
    body: bytes
    kind: str = KIND
    headers: dict[str, str] = field(default_factory=dict)
    fine: bool = False


def part(
    content: bytes,
    disposition: bytes = b'form-data; name="image"; filename="a.jpg"',
    more: bytes = b"",
) -> bytes:
    """Return one part of a body, with the boundary before it."""
    return (
        b"--"
        + BOUNDARY
        + b"\r\nContent-Disposition: "
        + disposition
        + b"\r\n"
        + more
        + b"\r\n"
        + content
        + b"\r\n"
    )


def body(*parts: bytes) -> bytes:
    """Return a whole body."""
    return b"".join(parts) + b"--" + BOUNDARY + b"--\r\n"


def scene(mode: str = "RGB", size: tuple[int, int] = (48, 40)) -> Image.Image:
    """Return a small picture."""
    image = Image.new("RGB", size, (200, 210, 190))
    draw = ImageDraw.Draw(image)
    draw.ellipse((5, 5, 30, 30), fill=(200, 30, 40))
    draw.rectangle((20, 15, 44, 36), fill=(30, 60, 200))
    return image.convert(mode) if mode != "RGB" else image


def saved(kind: str, image: Image.Image | None = None, **options: object) -> bytes:
    """Return an image as a file of ``kind``."""
    stream = io.BytesIO()
    (image or scene()).save(stream, kind, **options)  # type: ignore[arg-type]
    return stream.getvalue()


def frames(count: int) -> dict[str, object]:
    """Return the options that save an animation."""
    return {"save_all": True, "append_images": [scene().rotate(10 * i) for i in range(1, count)]}


def good_files() -> dict[str, bytes]:
    """Return files of every kind that the service reads."""
    return {
        "jpeg": saved("JPEG"),
        "progressive jpeg": saved("JPEG", progressive=True, quality=90),
        "png": saved("PNG"),
        "apng": saved("PNG", **frames(3)),
        "gif": saved("GIF"),
        "animated gif": saved("GIF", **frames(3)),
        "webp": saved("WEBP", lossless=True),
        "animated webp": saved("WEBP", **frames(3)),
        "bmp": saved("BMP"),
        "tiff": saved("TIFF"),
        "lzw tiff": saved("TIFF", compression="tiff_lzw"),
    }


# --- images


def truncated() -> Iterator[tuple[str, bytes]]:
    """Yield every kind, cut at each eighth."""
    for kind, data in good_files().items():
        for eighth in range(1, 8):
            yield f"{kind} cut at {eighth}/8", data[: len(data) * eighth // 8]


def wrong_magic() -> Iterator[tuple[str, bytes]]:
    """Yield every kind with the first bytes of another, and files that are no images."""
    kinds = {name: good_files()[name] for name in ("jpeg", "png", "gif", "webp", "bmp")}
    for name, data in kinds.items():
        for other, begins in kinds.items():
            if name != other:
                yield f"{name} that begins like {other}", begins[:12] + data[12:]
    yield from (
        ("text", b"a photograph of a dog"),
        ("html", b"<!doctype html><script>alert(1)</script>"),
        (
            "svg",
            b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/hostname"/></svg>',
        ),
        (
            "svg of entities",
            b'<!DOCTYPE s [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;&a;">]><svg>&b;</svg>',
        ),
        ("pdf", b"%PDF-1.4\n1 0 obj<<>>endobj\n%%EOF"),
        ("postscript", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n(%pipe%id) (r) file"),
        (
            "eps with a binary head",
            b"\xc5\xd0\xd3\xc6" + struct.pack("<6I", 32, 100, 0, 0, 0, 0) + b"%!PS" + b" " * 100,
        ),
        ("ppm", b"P6 8 8 255\n" + bytes(192)),
        (
            "xbm",
            b"#define a_width 8\n#define a_height 8\nstatic char a_bits[] = {0,0,0,0,0,0,0,0};",
        ),
        ("tar", b"a" * 257 + b"ustar" + bytes(250)),
        ("zip", b"PK\x05\x06" + bytes(18)),
        ("elf", b"\x7fELF" + bytes(60)),
        ("ico", b"\0\0\1\0\1\0\x10\x10\0\0\1\0\x20\0\0\0\0\0\x16\0\0\0"),
        ("null bytes", bytes(5000)),
        ("only the magic of jpeg", b"\xff\xd8\xff"),
        ("only the magic of png", b"\x89PNG\r\n\x1a\n"),
        ("only the magic of webp", b"RIFF\xff\xff\xff\xffWEBP"),
        ("only the magic of tiff", b"II*\0\x08\0\0\0"),
        ("empty", b""),
        ("noise", random.Random(1).randbytes(4000)),
    )


def chunk(kind: bytes, content: bytes) -> bytes:
    """Return a chunk of a PNG."""
    return (
        struct.pack(">I", len(content))
        + kind
        + content
        + struct.pack(">I", zlib.crc32(kind + content))
    )


def png(
    width: int,
    height: int,
    *chunks: bytes,
    depth: int = 8,
    colour: int = 0,
    rows: int | None = None,
) -> bytes:
    """Return a PNG that claims ``width`` x ``height`` pixels; its data hold ``rows`` of zeros."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    packer = zlib.compressobj(9)
    row = bytes(1 + width * depth // 8)
    packed = (
        b"".join(packer.compress(row) for _ in range(height if rows is None else rows))
        + packer.flush()
    )
    return (
        b"\x89PNG\r\n\x1a\n"
        + head
        + b"".join(chunks)
        + chunk(b"IDAT", packed)
        + chunk(b"IEND", b"")
    )


def gif(width: int, height: int, images: int = 1, inner: tuple[int, int] = (1, 1)) -> bytes:
    """Return a GIF with a canvas of that size and ``images`` small frames."""
    head = b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + bytes(3) + b"\xff" * 3
    frame = b"," + struct.pack("<HHHHB", 0, 0, *inner, 0) + b"\x02\x02\x44\x01\x00"
    return head + frame * images + b";"


def tiff(width: int, height: int, next_directory: int = 0, count: int = 1) -> bytes:
    """Return a TIFF of one strip that claims ``width`` x ``height`` pixels."""
    entries = [
        (256, 4, 1, width),
        (257, 4, 1, height),
        (258, 3, 1, 8),
        (259, 3, 1, 1),
        (262, 3, 1, 1),
        (273, 4, 1, 8),
        (277, 3, 1, 1),
        (278, 4, 1, height),
        (279, 4, count, 64),
    ]
    table = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return (
        b"II*\0\x08\0\0\0"
        + struct.pack("<H", len(entries))
        + table
        + struct.pack("<I", next_directory)
        + bytes(64)
    )


def bmp(width: int, height: int) -> bytes:
    """Return the headers of a BMP of that size."""
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 100, 0, 0, 54) + header


def webp_canvas(width: int, height: int) -> bytes:
    """Return an extended WebP that claims a canvas of that size."""
    inside = b"WEBP" + b"VP8X" + struct.pack("<I", 10) + b"\x02\0\0\0"
    inside += struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3]
    inside += b"ANIM" + struct.pack("<IIH", 6, 0, 0) + saved("WEBP", lossless=True)[12:]
    return b"RIFF" + struct.pack("<I", len(inside)) + inside


def jpeg_size(width: int, height: int) -> bytes:
    """Return a JPEG whose header claims another size."""
    data = bytearray(saved("JPEG"))
    place = data.index(b"\xff\xc0") + 5
    data[place : place + 4] = struct.pack(">HH", height, width)
    return bytes(data)


def many_scans(count: int) -> bytes:
    """Return a progressive JPEG whose last scan is repeated ``count`` times."""
    data = saved("JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * count + b"\xff\xd9"


def bombs() -> Iterator[tuple[str, bytes]]:
    """Yield files that would exhaust memory or time."""
    yield from (
        ("png bomb of 400 megapixels", png(20000, 20000, rows=100)),
        ("png bomb of 2 gigapixels", png(50000, 50000, rows=10)),
        ("png of 2^31 pixels a side", png(2**31 - 1, 2**31 - 1, rows=0)[:200]),
        ("png that holds more rows than it says", png(100, 10, rows=200_000)),
        (
            "png with a text of 50 MB",
            png(8, 8, chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(50_000_000), 9))),
        ),
        (
            "png with a profile of 50 MB",
            png(8, 8, chunk(b"iCCP", b"k\0\0" + zlib.compress(bytes(50_000_000), 9))),
        ),
        ("png with 5000 text chunks", png(8, 8, *[chunk(b"tEXt", b"k\0v")] * 5000)),
        (
            "png that says it has 2^31 frames",
            png(8, 8, chunk(b"acTL", struct.pack(">II", 2**31 - 1, 0))),
        ),
        ("gif with a canvas of 4 gigapixels", gif(65535, 65535)),
        ("gif of 200,000 frames", gif(8, 8, 200_000)),
        ("gif frame larger than its canvas", gif(8, 8, 1, (65535, 65535))),
        ("webp with a canvas of 268 megapixels", webp_canvas(16383, 16383)),
        ("webp with a canvas of 2^48 pixels", webp_canvas(2**24, 2**24)),
        ("tiff of 4 gigapixels", tiff(65535, 65535)),
        ("tiff of 2^32 pixels a side", tiff(2**32 - 1, 2**32 - 1)),
        ("tiff whose directory follows itself", tiff(8, 8, next_directory=8)),
        ("tiff with 2^31 strips", tiff(8, 8, count=2**31)),
        ("bmp of 10^9 pixels", bmp(31622, 31622)),
        ("bmp of negative size", bmp(-5, -5)),
        ("jpeg of 4 gigapixels", jpeg_size(65535, 65535)),
        ("jpeg larger than its data", jpeg_size(4000, 4000)),
        ("jpeg of 2000 scans", many_scans(2000)),
    )


def polyglots() -> Iterator[tuple[str, bytes]]:
    """Yield files of two formats at once; those that start as images are images."""
    files = good_files()
    for kind in ("jpeg", "png", "gif"):
        yield f"{kind} that is a zip too", files[kind] + b"PK\x05\x06" + bytes(18)
        yield f"{kind} with html behind it", files[kind] + b"<script>alert(1)</script>"
    yield (
        "jpeg with php in a comment",
        files["jpeg"][:2] + b"\xff\xfe\0\x18<?php system($_GET[0]);" + files["jpeg"][2:],
    )
    yield "gif that is javascript too", b"GIF89a" + b"=1/*" + files["gif"][10:] + b"*/;alert(1)"
    yield "png behind text", b"hello" + files["png"]
    yield "pdf with a jpeg in it", b"%PDF-1.4\n" + files["jpeg"]


def sizes() -> Iterator[tuple[str, bytes]]:
    """Yield images without pixels, and very long ones."""
    yield from (
        ("png of 0 x 0", png(0, 0)),
        ("png of 0 x 5", png(0, 5)),
        ("png of 5 x 0", png(5, 0)),
        ("gif of 0 x 0", gif(0, 0)),
        ("gif frame of 0 x 0", gif(8, 8, 1, (0, 0))),
        ("jpeg of 0 x 0", jpeg_size(0, 0)),
        ("jpeg of 0 rows", jpeg_size(48, 0)),
        ("tiff of 0 x 0", tiff(0, 0)),
        ("png of 65,000 x 1", png(65000, 1)),
        ("png of 1 x 65,000", png(1, 65000)),
        ("png of 65,000 x 65,000", png(65000, 65000, rows=3)),
        ("gif of 65,000 x 1", gif(65000, 1)),
        ("jpeg of 65,000 x 65,000", jpeg_size(65000, 65000)),
        ("tiff of 65,000 x 1", tiff(65000, 1)),
        ("png of 1 x 1", png(1, 1)),
        ("bmp of 1 x 1", saved("BMP", scene(size=(1, 1)))),
    )


def odd_but_fine() -> Iterator[tuple[str, bytes]]:
    """Yield unusual images, which have to be captioned."""
    deep = Image.new("I;16", (20, 20), 40000)
    yield from (
        ("cmyk jpeg", saved("JPEG", scene("CMYK"))),
        ("cmyk tiff", saved("TIFF", scene("CMYK"))),
        ("grey jpeg", saved("JPEG", scene("L"))),
        ("palette png", saved("PNG", scene("P"))),
        ("palette png with a transparent colour", saved("PNG", scene("P"), transparency=3)),
        ("black and white png", saved("PNG", scene("1"))),
        ("black and white tiff in fax code", saved("TIFF", scene("1"), compression="group4")),
        ("16-bit png", saved("PNG", deep)),
        ("16-bit tiff", saved("TIFF", deep)),
        ("32-bit float tiff", saved("TIFF", scene("F"))),
        ("grey and alpha png", saved("PNG", scene("LA"))),
        ("transparent png", saved("PNG", Image.new("RGBA", (20, 20), (9, 9, 9, 0)))),
        ("transparent webp", saved("WEBP", scene("RGBA"))),
        ("lab tiff", saved("TIFF", scene("LAB"))),
        ("ycbcr tiff", saved("TIFF", scene("YCbCr"))),
        ("tiff of three pages", saved("TIFF", **frames(3))),
        ("one pixel wide", saved("PNG", scene(size=(1, 300)))),
        *((kind, data) for kind, data in good_files().items()),
    )


def metadata() -> Iterator[tuple[str, bytes]]:
    """Yield images with broken EXIF and colour profiles."""
    start = b"Exif\0\0II*\0\x08\0\0\0"
    exifs = {
        "empty": b"Exif\0\0",
        "cut": b"Exif\0\0II*\0\x08\0\0\0\x05",
        "noise": b"Exif\0\0" + random.Random(2).randbytes(500),
        "orientation 77": start + b"\x01\0\x12\x01\x03\0\x01\0\0\0\x4d\0\0\0\0\0\0\0",
        "orientation as text": start + b"\x01\0\x12\x01\x02\0\x04\0\0\0abc\0\0\0\0\0",
        "a directory that follows itself": b"Exif\0\0II*\0\x08\0\0\0\0\0\x08\0\0\0",
        "65,535 entries": b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + bytes(600),
        "an offset far away": b"Exif\0\0II*\0\xff\xff\xff\x7f",
    }
    for name, content in exifs.items():
        yield f"jpeg with EXIF: {name}", saved("JPEG", exif=content)
        yield f"png with EXIF: {name}", png(8, 8, chunk(b"eXIf", content[6:]))
    for name, profile in {
        "noise": random.Random(3).randbytes(700),
        "one byte": b"x",
        "zeros": bytes(3000),
    }.items():
        yield f"jpeg with a colour profile: {name}", saved("JPEG", icc_profile=profile)
        yield f"png with a colour profile: {name}", saved("PNG", icc_profile=profile)
        yield f"webp with a colour profile: {name}", saved("WEBP", icc_profile=profile)
    yield "png with a broken checksum", saved("PNG").replace(b"IDAT", b"IDAt", 1)


def flipped() -> Iterator[tuple[str, bytes]]:
    """Yield every kind with some bytes changed."""
    draw = random.Random(4)
    for kind, data in good_files().items():
        for number in range(4):
            changed = bytearray(data)
            for _ in range(1 + number * 3):
                changed[draw.randrange(len(changed))] = draw.randrange(256)
            yield f"{kind} with changed bytes {number}", bytes(changed)


# --- uploads


def boundaries(good: bytes) -> Iterator[Hostile]:
    """Yield bodies with inconsistent boundaries."""
    whole = body(part(good))
    named = {
        "no boundary": "multipart/form-data",
        "an empty one": "multipart/form-data; boundary=",
        "another one": "multipart/form-data; boundary=other",
        "a long one": f"multipart/form-data; boundary={'b' * 5000}",
        "quotes that do not end": 'multipart/form-data; boundary="frontier7d1f',
        "a line break": 'multipart/form-data; boundary="a\tb"',
        "not ASCII": "multipart/form-data; boundary=\xe9\xe8",
        "twice": f"{KIND}; boundary=second",
        "json": "application/json",
        "a plain form": "application/x-www-form-urlencoded",
        "multipart of another kind": "multipart/mixed; boundary=frontier7d1f",
        "nothing": "",
        "nonsense": ";;;===",
        "an image": "image/jpeg",
        "many parameters": KIND + "; a=b" * 500,
    }
    for name, kind in named.items():
        yield Hostile(f"content type with {name}", whole, kind)
    edge = b"--" + BOUNDARY
    shapes = {
        "no last boundary": part(good),
        "only the last boundary": edge + b"--\r\n",
        "an empty body": b"",
        "no line break behind the boundary": edge + b"Content-Disposition",
        "only line breaks": b"\r\n" * 1000,
        "a boundary that ends in the middle": whole[: len(whole) - 6],
        "text before": b"preamble\r\n" + whole,
        "text behind": whole + b"x" * 5000,
        "lf instead of crlf": whole.replace(b"\r\n", b"\n"),
        "the boundary within the image": body(part(good + b"\r\n" + edge + b"\r\n" + good)),
        "two ends": whole + whole,
        "dashes": b"-" * 10_000,
        "no headers": edge + b"\r\n\r\nx\r\n" + edge + b"--\r\n",
        "cut in a header": whole[:60],
        "zeros": bytes(2000),
    }
    for name, content in shapes.items():
        yield Hostile(f"body with {name}", content)


def headers(good: bytes) -> Iterator[Hostile]:
    """Yield parts and requests with malicious headers."""
    parts: dict[str, bytes] = {
        "no disposition": b"--"
        + BOUNDARY
        + b"\r\nContent-Type: image/jpeg\r\n\r\n"
        + good
        + b"\r\n",
        "no name": part(good, b'form-data; filename="a.jpg"'),
        "another kind": part(good, b'attachment; name="image"'),
        "an empty name": part(good, b'form-data; name=""'),
        "a name that is not UTF-8": part(good, b'form-data; name="\xff\xfe"'),
        "name twice": part(good, b'form-data; name="image"; name="beam"'),
        "name* twice": part(good, b"form-data; name=\"image\"; name*=utf-8''beam"),
        "a quote that does not end": part(good, b'form-data; name="image'),
        "a header of 100 kB": part(good, more=b"X-Long: " + b"a" * 100_000 + b"\r\n"),
        "a name of 100 kB": part(good, b'form-data; name="' + b"a" * 100_000 + b'"'),
        "500 headers": part(good, more=b"X-Many: 1\r\n" * 500),
        "a header without colon": part(good, more=b"nonsense\r\n"),
        "a header without name": part(good, more=b": x\r\n"),
        "a folded header": part(good, more=b"X-Folded: a\r\n b\r\n"),
        "a zero byte in a header": part(good, more=b"X-Zero: \0\r\n"),
        "base64": part(good, more=b"Content-Transfer-Encoding: base64\r\n"),
        "an inner multipart": part(good, more=b"Content-Type: multipart/mixed; boundary=b\r\n"),
        "a charset": part(good, more=b"Content-Type: image/jpeg; charset=utf-7\r\n"),
        "a field that is not UTF-8": part(good) + part(b"\xff\xfe", b'form-data; name="beam"'),
        "a field as a file": part(good) + part(b"3", b'form-data; name="beam"; filename="x"'),
        "a field of 1 MB": part(good) + part(b"3" * 1_000_000, b'form-data; name="beam"'),
        "an image as text": part(b"hello", b'form-data; name="image"'),
        "the field _charset_": part(good) + part(b"utf-16", b'form-data; name="_charset_"'),
        "100 images": part(good) * 100,
        "2000 fields": part(good) + part(b"1", b'form-data; name="beam"') * 2000,
        "2000 empty parts": part(b"", b'form-data; name="x"') * 2000,
    }
    for name, content in parts.items():
        yield Hostile(f"part with {name}", body(content))
    for key, value in {
        "Content-Encoding": "gzip",
        "X-HTTP-Method-Override": "DELETE",
        "X-Forwarded-For": "1.1.1.1, ::1, nonsense",
        "Range": "bytes=0-1",
        "Origin": "https://elsewhere.example",
        "Cookie": "a=" + "b" * 4000,
        "Authorization": "Basic " + "x" * 2000,
        "X-API-Key": "\x7f",
    }.items():
        yield Hostile(f"request with {key}", body(part(good)), headers={key: value})


def names(good: bytes) -> Iterator[Hostile]:
    """Yield uploads with misleading file names; no name is ever used."""
    for name in (
        b"../../../../etc/passwd",
        b"..\\..\\windows\\win.ini",
        b"/dev/zero",
        b"file:///etc/passwd",
        b"a\0.jpg",
        b"http://127.0.0.1:1/x.jpg",
        b"$(reboot).jpg",
        b"`id`.png",
        b"con.jpg",
        b"\xf0\x9f\x90\xb6.jpg",
        b"",
        b".",
        b"%2e%2e%2f",
        b"a" * 3000,
        b"<script>.jpg",
        b"a.jpg; name=beam",
    ):
        disposition = b'form-data; name="image"; filename="' + name + b'"'
        yield Hostile(f"file name {name[:30]!r}", body(part(good, disposition)))


def fields(good: bytes) -> Iterator[Hostile]:
    """Yield options that are not possible."""
    wrong: Sequence[tuple[bytes, bytes]] = [
        (b"beam", b"0"),
        (b"beam", b"-1"),
        (b"beam", b"1e9"),
        (b"beam", b"9" * 900),
        (b"beam", b"nan"),
        (b"beam", b"true"),
        (b"temperature", b"inf"),
        (b"temperature", b"NaN"),
        (b"temperature", b"-0.1"),
        (b"top_p", b"0"),
        (b"top_p", b"2"),
        (b"top_k", b"-5"),
        (b"seed", b"1" * 40),
        (b"max_length", b"100000"),
        (b"candidates", b"1000000"),
        (b"model", b"../../x"),
        (b"model", b"\xe2\x80\xae"),
        (b"temperatures", b"[]"),
        (b"rerank", b"maybe"),
        (b"__proto__", b"1"),
        (b"bundle", b"/tmp"),
        (b"groups", b"16"),
        (b"min_length", b"200"),
        (b"beam", "\u0663".encode()),
    ]
    for name, value in wrong:
        disposition = b'form-data; name="' + name + b'"'
        yield Hostile(
            f"field {name.decode()}={value[:12]!r}", body(part(good), part(value, disposition))
        )


def corpus() -> list[Hostile]:
    """Return everything."""
    good = saved("JPEG")
    images = [
        *truncated(),
        *wrong_magic(),
        *bombs(),
        *polyglots(),
        *sizes(),
        *metadata(),
        *flipped(),
    ]
    found = [Hostile(name, body(part(data))) for name, data in images]
    found += [Hostile(name, body(part(data)), fine=True) for name, data in odd_but_fine()]
    return found + [*boundaries(good), *headers(good), *names(good), *fields(good)]
