"""Photographs from outside, made harmless: decoded, turned upright, RGB, or refused with the
reason."""

import io
import os
import stat
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union, cast

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from capgen_utils.common.files import CapGenError

if TYPE_CHECKING:  # a tensor is known by what it can do: images are opened without torch too
    from torch import Tensor


MAX_PIXELS = 100_000_000  # a decoded RGB image of this size takes 300 MB
MAX_BYTES = 200_000_000
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")  # an MPO of two pictures is opened by JPEG
_MAGIC = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*")
_TOO_LARGE = f"scale it to at most {MAX_PIXELS // 10**6} megapixels first"


_NOT_AN_IMAGE = (
    "the file is damaged or not an image: open it in a viewer, or save it again as JPEG or PNG"
)


ImageLike = Union[str, Path, Image.Image, np.ndarray, "Tensor"]


def open_image(source: ImageLike) -> Image.Image:
    """Return ``source`` as an upright 8-bit RGB image.

    A path is opened by content, not by its name. The camera's EXIF rotation is applied;
    transparency is laid on white; CMYK, palette, grey and 16-bit images are converted; of an
    animation the first frame is taken. The rest of its metadata is dropped.

    Args:
        source: a path, a PIL image, an array (H, W), (H, W, 3) or (H, W, 4), or a torch tensor (3,
            H, W), wherever it lies; arrays and tensors are uint8, or float from 0 to 1.

    Raises:
        CapGenError: missing, empty, truncated, too large, or not an image; names the file.
    """
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if _is_tensor(source):
        return _from_array(_channels_last(source))
    if isinstance(source, Image.Image):
        try:  # an image that was opened but not loaded can still turn out to be damaged
            return _to_rgb(source)
        except (OSError, ValueError, SyntaxError) as error:
            raise CapGenError(
                f"the image cannot be read ({error})", "the file it came from is damaged"
            ) from error
    path = Path(cast("str | Path", source))
    try:
        if not stat.S_ISREG((status := path.stat()).st_mode):  # a pipe would be waited for
            raise CapGenError(f"{path} is not a file", "name an image file")
        if status.st_size > MAX_BYTES:
            raise CapGenError(
                f"{path} is larger than {MAX_BYTES // 10**6} MB", "save it smaller first"
            )
        return _decode(path, str(path))
    except CapGenError:
        raise
    except FileNotFoundError as error:
        raise CapGenError(f"there is no file {path}", "check the path") from error
    except Exception as error:  # Pillow's parsers raise many kinds on damaged input
        raise CapGenError(f"{path} cannot be read as an image ({error})", _remedy(path)) from error


def open_bytes(content: bytes | bytearray | memoryview, name: str = "the upload") -> Image.Image:
    """Return an image that came as bytes, as ``open_image`` does; its name is only used to speak of
    it.

    Raises:
        CapGenError: empty, truncated, too large, or not an image.
    """
    if not len(content) or len(content) > MAX_BYTES:
        size = "is empty" if not len(content) else f"is larger than {MAX_BYTES // 10**6} MB"
        raise CapGenError(f"{name} {size}", "choose a photograph, saved smaller if need be")
    try:
        return _decode(io.BytesIO(content), name)
    except CapGenError:
        raise
    except UnidentifiedImageError as error:  # its message names an object in memory
        raise CapGenError(f"{name} is not an image", _NOT_AN_IMAGE) from error
    except Exception as error:
        raise CapGenError(f"{name} cannot be read as an image ({error})", _NOT_AN_IMAGE) from error


def _decode(source: Path | io.BytesIO, name: str) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", Image.DecompressionBombWarning
            )  # our own limit is lower
            with Image.open(source, formats=FORMATS) as image:
                return _to_rgb(image, name)
    except Image.DecompressionBombError as error:
        raise CapGenError(f"{name} has too many pixels ({error})", _TOO_LARGE) from error


def _remedy(path: Path) -> str:
    if os.path.isfile(path) and path.stat().st_size == 0:
        return "the file is empty: copy or download it again"
    return _NOT_AN_IMAGE


def _to_rgb(image: Image.Image, name: str = "the image") -> Image.Image:
    width, height = image.size
    if width * height > MAX_PIXELS or not width or not height:
        raise CapGenError(f"{name} has {width} x {height} pixels", _TOO_LARGE)
    image.load()
    rgb = _flat(ImageOps.exif_transpose(image))
    rgb.info = {}  # place, camera, comments: Pillow would write some of them into files made from the image
    return rgb


def _flat(image: Image.Image) -> Image.Image:
    """Return a copy in RGB."""
    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray(_to_8_bit(np.asarray(image))).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _to_8_bit(grey: np.ndarray) -> np.ndarray:
    """Scale deep grey values to uint8: 16-bit ones by their range, others by the image's own
    minimum and maximum."""
    values = grey.astype(np.float64)
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    if grey.dtype != np.float32 and low >= 0 and high <= 65535:
        low, high = 0.0, 65535.0
    scaled = (np.nan_to_num(values, nan=low) - low) / max(high - low, 1e-12)
    return (scaled * 255).round().astype(np.uint8)


def _from_array(array: np.ndarray) -> Image.Image:
    if (
        array.ndim not in (2, 3)
        or (array.ndim == 3 and array.shape[2] not in (3, 4))
        or not array.size
    ):
        raise CapGenError(
            f"an array of shape {array.shape} is not an image",
            "pass (height, width, 3), channels last",
        )
    if np.issubdtype(array.dtype, np.floating):
        if not np.isfinite(array).all() or array.min() < 0 or array.max() > 1:
            raise CapGenError(
                "a float image must hold values from 0 to 1", "divide by 255, or pass uint8"
            )
        array = (array * 255).round().astype(np.uint8)
    if array.dtype != np.uint8:
        raise CapGenError(
            f"an image array of dtype {array.dtype} is not supported",
            "pass uint8, or float from 0 to 1",
        )
    return _to_rgb(Image.fromarray(array))


def _is_tensor(source: Any) -> bool:
    return all(hasattr(source, name) for name in ("detach", "permute", "is_floating_point"))


def _channels_last(tensor: Any) -> np.ndarray:
    """(3, H, W) -> array (H, W, 3)."""
    if tensor.ndim != 3 or tensor.shape[0] != 3:
        raise CapGenError(
            f"a tensor of shape {tuple(tensor.shape)} is not an image",
            "pass (3, height, width), channels first, or a batch of them: (B, 3, height, width)",
        )
    kind = tensor.float() if tensor.is_floating_point() else tensor  # numpy knows no bfloat16
    return np.asarray(kind.detach().cpu().permute(1, 2, 0))


def find_images(
    sources: Iterable[str | Path], on_error: Callable[[Path, CapGenError], None] | None = None
) -> list[Path]:
    """Expand folders to the image files in them and in their folders; single files are kept as they
    are.

    In a folder, a file is an image by its name, or by its first bytes where the name says nothing;
    what is hidden is left out, and links to folders are not followed. The order is that of the
    names, so it is the same every time.

    Args:
        sources: files and folders.
        on_error: gets each source or folder that cannot be used, and why; without it the first one
            ends the search.

    Raises:
        CapGenError: a path does not exist, or a folder cannot be read or holds no image.
    """

    def refuse(path: Path, problem: str, remedy: str) -> None:
        error = CapGenError(problem, remedy)
        if on_error is None:
            raise error
        on_error(path, error)

    found: list[Path] = []
    for source in map(Path, sources):
        inside = list(_walk(source, refuse)) if os.path.isdir(source) else [source]
        if not os.path.exists(
            source
        ):  # unlike Path.exists, no error for a name that no file can have
            refuse(source, f"there is no file or folder {source}", "check the path")
        elif inside:
            found += inside
        else:
            refuse(source, f"{source} holds no image", f"image files end in {', '.join(SUFFIXES)}")
    return found


def _walk(folder: Path, refuse: Callable[[Path, str, str], None]) -> Iterator[Path]:
    def unreadable(error: OSError) -> None:
        refuse(
            Path(error.filename),
            f"cannot read the folder {error.filename}: {error.strerror}",
            "check who may read it",
        )

    for parent, folders, names in os.walk(folder, onerror=unreadable):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        shown = sorted(name for name in names if not name.startswith("."))
        yield from (path for path in (Path(parent, name) for name in shown) if _is_image(path))


def _is_image(path: Path) -> bool:
    """Whether a file calls itself an image or begins like one."""
    if path.suffix.lower() in SUFFIXES:
        return True
    try:
        if not os.path.isfile(path):  # opening a pipe would wait for its other end
            return False
        with open(path, "rb") as stream:
            head = stream.read(12)
    except OSError:
        return False
    bitmap = head[:2] == b"BM" and head[6:10] == bytes(4)  # two letters alone begin many a text
    return bitmap or head.startswith(_MAGIC) or (head[:4] == b"RIFF" and head[8:] == b"WEBP")


def is_many(images: Any) -> bool:
    """Whether ``images`` is a sequence of images, or a tensor (B, 3, H, W) of them, rather than one
    image."""
    return (isinstance(images, Sequence) and not isinstance(images, str)) or (
        _is_tensor(images) and images.ndim == 4
    )
