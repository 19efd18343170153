"""Photographs of every kind come out upright and RGB, or are refused by name with advice."""

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from helpers import PHOTOS
from PIL import Image

from capgen_utils.common.files import CapGenError
from capgen_utils.data.images import (
    FORMATS,
    MAX_PIXELS,
    find_images,
    is_many,
    open_bytes,
    open_image,
)


def corners(size: tuple[int, int] = (48, 32)) -> Image.Image:
    """Return an image whose four quarters are red, green, blue and white, from the top left on."""
    image = Image.new("RGB", size)
    width, height = size[0] // 2, size[1] // 2
    for colour, place in zip(
        ("red", "lime", "blue", "white"),
        ((0, 0), (width, 0), (0, height), (width, height)),
        strict=True,
    ):
        image.paste(Image.new("RGB", (width, height), colour), place)
    return image


def near(
    image: Image.Image, place: tuple[int, int], colour: tuple[int, int, int], slack: int = 40
) -> bool:
    return bool(np.abs(np.array(image.getpixel(place), dtype=int) - colour).max() <= slack)


def refused(path: Path) -> CapGenError:
    with pytest.raises(CapGenError) as error:
        open_image(path)
    assert path.name in error.value.problem
    assert error.value.remedy
    return error.value


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(b"\0" * 64))
        + chunk(b"IEND", b"")
    )


# --- what is refused


def test_a_missing_file(tmp_path: Path) -> None:
    assert "no file" in refused(tmp_path / "gone.jpg").problem


def test_an_empty_file_is_called_empty(tmp_path: Path) -> None:
    (tmp_path / "empty.jpg").touch()
    assert "empty" in refused(tmp_path / "empty.jpg").remedy


def test_text_named_jpg(tmp_path: Path) -> None:
    (tmp_path / "notes.jpg").write_text("this is not a photograph")
    refused(tmp_path / "notes.jpg")


def test_a_folder_is_not_an_image(tmp_path: Path) -> None:
    (tmp_path / "folder.jpg").mkdir()
    refused(tmp_path / "folder.jpg")


def test_broken_images_without_a_suffix_are_found_so_that_they_are_reported(tmp_path: Path) -> None:
    (tmp_path / "cut").write_bytes(b"\xff\xd8\xff\xe0 and nothing more")
    (tmp_path / "bomb").write_bytes(png_header(65_000, 65_000))
    (tmp_path / "notes").write_text("no image")
    found = find_images([tmp_path])
    assert [path.name for path in found] == ["bomb", "cut"]


@pytest.mark.parametrize("suffix", ["jpg", "png"])
@pytest.mark.parametrize("eighth", range(1, 8))
def test_truncated_files(tmp_path: Path, suffix: str, eighth: int) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / f"whole.{suffix}")
    content = (tmp_path / f"whole.{suffix}").read_bytes()
    path = tmp_path / f"cut.{suffix}"
    path.write_bytes(content[: len(content) * eighth // 8])
    refused(path)


@pytest.mark.parametrize(
    ("width", "height"), [(65_000, 65_000), (12_000, 12_000), (2**31 - 1, 2**31 - 1)]
)
def test_decompression_bombs_are_refused_for_their_size(
    tmp_path: Path, width: int, height: int
) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(png_header(width, height))
    assert path.stat().st_size < 200 and width * height > MAX_PIXELS
    assert "megapixels" in refused(path).remedy


def test_a_file_of_too_many_bytes_is_not_even_opened(tmp_path: Path) -> None:
    path = tmp_path / "large.jpg"
    with open(path, "wb") as stream:
        stream.truncate(300_000_000)
    assert "200 MB" in refused(path).problem


def test_formats_that_run_programs_are_not_opened(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n")
    refused(tmp_path / "a.jpg")


def test_a_damaged_pil_image_is_refused_too(tmp_path: Path) -> None:
    content = (PHOTOS / "dog_panting.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(content[: len(content) // 2])
    with Image.open(tmp_path / "cut.jpg") as lazy, pytest.raises(CapGenError):
        open_image(lazy)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 4, 2), np.uint8),
        np.zeros((3, 8, 8), np.uint8),
        np.zeros((2, 4, 4, 3), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
        np.zeros(9, np.uint8),
        np.zeros((4, 4, 3), np.int64),
        np.zeros((4, 4, 3), bool),
        np.full((4, 4, 3), 255.0),
        np.full((4, 4, 3), -0.1),
        np.full((4, 4, 3), np.nan),
        np.full((4, 4, 3), np.inf),
    ],
    ids=lambda a: f"{a.dtype}{a.shape}",
)
def test_arrays_that_are_no_images(array: np.ndarray) -> None:
    with pytest.raises(CapGenError) as error:
        open_image(array)
    assert error.value.remedy


# --- what is taken


@pytest.mark.parametrize(
    "mode", ["RGB", "L", "1", "P", "CMYK", "YCbCr", "LAB", "HSV", "RGBA", "LA"]
)
def test_modes_become_rgb(mode: str) -> None:
    source = (
        corners().convert("RGB").convert("L").convert(mode) if mode in ("LA", "1") else corners()
    )
    image = open_image(source if mode in ("LA", "1") else _converted(mode))
    assert image.mode == "RGB" and image.size == (48, 32)


def _converted(mode: str) -> Image.Image:
    if mode == "LAB":
        return Image.new("LAB", (48, 32))
    return corners().convert(mode)


def test_cmyk_jpeg_keeps_its_colours(tmp_path: Path) -> None:
    corners().convert("CMYK").save(tmp_path / "print.jpg", quality=95)
    image = open_image(tmp_path / "print.jpg")
    assert near(image, (5, 5), (255, 0, 0)) and near(image, (40, 28), (255, 255, 255))


def test_16_bit_grey_keeps_its_range(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 64).astype(np.uint16)[None].repeat(16, 0)
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    values = np.asarray(open_image(tmp_path / "deep.png"))
    assert values.shape == (16, 64, 3) and values[0, 0, 0] == 0 and values[0, -1, 0] == 255
    assert abs(int(values[0, 32, 0]) - 129) <= 2


def test_transparency_lies_on_white(tmp_path: Path) -> None:
    palette = corners().quantize(8)
    first = palette.getpixel((0, 0))
    palette.save(tmp_path / "palette.png", transparency=first)
    image = open_image(tmp_path / "palette.png")
    assert near(image, (5, 5), (255, 255, 255)) and near(image, (40, 5), (0, 255, 0))
    clear = corners().convert("RGBA")
    clear.putalpha(0)
    clear.save(tmp_path / "clear.png")
    assert near(open_image(tmp_path / "clear.png"), (40, 5), (255, 255, 255), slack=0)


def test_an_animation_gives_its_first_frame(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "lime", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:], duration=10)
    with Image.open(tmp_path / "moving.gif") as image:
        assert image.n_frames == 3
    assert near(open_image(tmp_path / "moving.gif"), (8, 8), (255, 0, 0), slack=8)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_exif_rotations_come_out_upright(tmp_path: Path, orientation: int, suffix: str) -> None:
    upright = corners()
    flip, rotate, T = Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose, Image.Transpose
    stored = {
        1: upright,
        2: upright.transpose(flip),
        3: upright.transpose(rotate.ROTATE_180),
        4: upright.transpose(T.FLIP_TOP_BOTTOM),
        5: upright.transpose(T.TRANSPOSE),
        6: upright.transpose(rotate.ROTATE_90),  # shown by turning it clockwise
        7: upright.transpose(T.TRANSVERSE),
        8: upright.transpose(rotate.ROTATE_270),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"turned.{suffix}"
    stored.save(path, exif=exif, **({"quality": 95} if suffix == "jpg" else {}))
    image = open_image(path)
    assert image.size == (48, 32)
    for place, colour in (((5, 5), (255, 0, 0)), ((43, 5), (0, 255, 0)), ((5, 27), (0, 0, 255))):
        assert near(image, place, colour), (
            f"orientation {orientation} at {place}: {image.getpixel(place)}"
        )


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_what_a_camera_has_noted_is_dropped_and_the_caller_s_own_image_keeps_it(
    tmp_path: Path, kind: str
) -> None:
    exif, path = Image.Exif(), tmp_path / "noted"
    exif[0x010E] = "in my garden"
    corners().save(path, kind, exif=exif, comment=b"in my garden")
    with Image.open(path) as noted:
        for image in (open_image(path), open_image(noted), open_bytes(path.read_bytes())):
            image.save(again := io.BytesIO(), "JPEG")
            assert not image.info and not image.getexif() and b"garden" not in again.getvalue()
        assert noted.getexif()[0x010E] == "in my garden"


def test_the_content_decides_not_the_name(tmp_path: Path) -> None:
    corners().save(tmp_path / "really.png")
    (tmp_path / "really.png").rename(tmp_path / "named.jpg")
    assert near(open_image(tmp_path / "named.jpg"), (5, 5), (255, 0, 0), slack=0)
    assert near(open_image(str(tmp_path / "named.jpg")), (5, 5), (255, 0, 0), slack=0)


def test_arrays_of_bytes_and_floats_agree() -> None:
    array = np.asarray(corners())
    for given in (
        array,
        array / 255.0,
        (array / 255.0).astype(np.float32),
        np.dstack([array, array[..., :1] * 0 + 255]),
    ):
        assert np.array_equal(np.asarray(open_image(given)), array)
    assert open_image(array[..., 0]).size == (48, 32)
    assert np.array_equal(np.asarray(open_image(array[:, ::-1])), array[:, ::-1]), (
        "a view, not contiguous"
    )


# --- lists of images


def test_folders_are_expanded_in_order(tmp_path: Path) -> None:
    for name in (
        "b.JPG",
        "a.png",
        "c.txt",
        "sub/d.jpg",
        "sub/more/e.gif",
        ".f.png",
        ".hidden/g.png",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = [
        p.relative_to(tmp_path).as_posix() for p in find_images([tmp_path, tmp_path / "c.txt"])
    ]
    assert found == ["a.png", "b.JPG", "sub/d.jpg", "sub/more/e.gif", "c.txt"]
    (tmp_path / "none").mkdir()
    for wrong in (tmp_path / "gone", tmp_path / "none"):
        with pytest.raises(CapGenError, match=wrong.name):
            find_images([wrong])


def test_a_file_whose_name_says_nothing_is_known_by_its_content(tmp_path: Path) -> None:
    for kind in FORMATS:
        corners().save(tmp_path / f"a {kind}", format=kind)
    for name, content in {
        "BMI.txt": b"BMI is a ratio",
        "RIFF.wav": b"RIFF    WAVE",
        "empty": b"",
        "x": b"GIF",
    }.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "folder.jpg").mkdir()
    assert {p.name for p in find_images([tmp_path])} == {f"a {kind}" for kind in FORMATS}


def test_what_cannot_be_searched_is_told_and_the_search_goes_on(tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    told: list[tuple[Path, CapGenError]] = []
    wrong = [tmp_path / "gone", tmp_path / "none", Path("long" * 2000)]
    good = tmp_path / "a.jpg"
    good.touch()
    assert find_images([*wrong, good], lambda path, error: told.append((path, error))) == [good]
    assert [path for path, _ in told] == wrong


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    assert "is not a file" in refused(tmp_path / "pipe.jpg").problem


def test_what_is_one_image_and_what_are_many() -> None:
    one = [Path("a.jpg"), "a.jpg", corners(), np.zeros((4, 4, 3), np.uint8)]
    assert not any(map(is_many, one))
    assert is_many(one) and is_many(tuple(one))
