"""Open images safely: decoded, upright and RGB, or refused with the reason (notebook 02)."""

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

if TYPE_CHECKING:  # tensors are recognised by their methods: images are opened without torch
    from torch import Tensor

MAX_PIXELS = 100_000_000  # a decoded RGB image of this size takes 300 MB
MAX_BYTES = 200_000_000
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")  # JPEG opens MPO, which holds two images
_MAGIC = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*")
_TOO_LARGE = f"scale it to at most {MAX_PIXELS // 10**6} megapixels first"

_TOO_MANY_BYTES = f"is larger than {MAX_BYTES // 10**6} MB"
_NOT_AN_IMAGE = (
    "the file is damaged or not an image: open it in a viewer, or save it again as JPEG or PNG"
)

ImageLike = Union[str, Path, Image.Image, np.ndarray, "Tensor"]


def open_image(source: ImageLike) -> Image.Image:
    """Return ``source`` as an upright 8-bit RGB image.

    The content of a file tells its format, not its name. The camera's EXIF rotation is applied;
    transparency is blended with white; CMYK, palette, grey and 16-bit images are converted; of an
    animation the first frame is taken. All other metadata is dropped.

    Args:
        source: a path, a PIL image, an array (H, W), (H, W, 3) or (H, W, 4), or a torch tensor
            (3, H, W) on any device; arrays and tensors are uint8, or float from 0 to 1.

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
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # a pipe would be waited for
            raise CapGenError(f"{path} is not a file", "name an image file")
        if status.st_size > MAX_BYTES:
            raise CapGenError(f"{path} {_TOO_MANY_BYTES}", "save it smaller first")
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise CapGenError(f"there is no file {path}", "check the path") from error
    except (OSError, ValueError) as error:
        raise CapGenError(f"{path} cannot be read as an image ({error})", _NOT_AN_IMAGE) from error
    return open_bytes(content, str(path))


def open_bytes(content: bytes | bytearray | memoryview, name: str = "the upload") -> Image.Image:
    """Return an image from bytes, as ``open_image`` does; ``name`` is only used in messages.

    Raises:
        CapGenError: empty, truncated, too large, or not an image.
    """
    if not len(content):
        raise CapGenError(f"{name} is empty", "the file is empty: copy or download it again")
    if len(content) > MAX_BYTES:
        raise CapGenError(f"{name} {_TOO_MANY_BYTES}", "save it smaller first")
    try:
        with warnings.catch_warnings():
            # MAX_PIXELS is lower than Pillow's limit
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(content), formats=FORMATS) as image:
                return _to_rgb(image, name)
    except CapGenError:
        raise
    except Image.DecompressionBombError as error:
        raise CapGenError(f"{name} has too many pixels ({error})", _TOO_LARGE) from error
    except Exception as error:  # Pillow's parsers raise many kinds on damaged input
        known = not isinstance(error, UnidentifiedImageError)  # which names an object in memory
        reason = f"cannot be read as an image ({error})" if known else "is not an image"
        raise CapGenError(f"{name} {reason}", _NOT_AN_IMAGE) from error


def _to_rgb(image: Image.Image, name: str = "the image") -> Image.Image:
    width, height = image.size
    if width * height > MAX_PIXELS or not width or not height:
        raise CapGenError(f"{name} has {width} x {height} pixels", _TOO_LARGE)
    image.load()
    rgb = _flat(ImageOps.exif_transpose(image))
    rgb.info = {}  # location, camera, comments: Pillow would copy some into files that it writes
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
    """Scale grey values to uint8: 16-bit ones by their range, others by the image's extremes."""
    values = grey.astype(np.float64)
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    if grey.dtype != np.float32 and low >= 0 and high <= 65535:
        low, high = 0.0, 65535.0
    scaled = (np.nan_to_num(values, nan=low) - low) / max(high - low, 1e-12)
    return (scaled * 255).round().astype(np.uint8)


def _from_array(array: np.ndarray) -> Image.Image:
    channels = array.shape[2:] in ((), (3,), (4,))
    if array.ndim not in (2, 3) or not channels or not array.size:
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
    kind = tensor.float() if tensor.is_floating_point() else tensor  # numpy has no bfloat16
    return np.asarray(kind.detach().cpu().permute(1, 2, 0))


def find_images(
    sources: Iterable[str | Path], on_error: Callable[[Path, CapGenError], None] | None = None
) -> list[Path]:
    """Expand folders to the image files in them and their subfolders; files are kept unchanged.

    In a folder, a file is an image by its suffix, or else by its first bytes. Hidden files and
    folders are left out, and links to folders are not followed. Names are sorted, so the order is
    the same every time.

    Args:
        sources: files and folders.
        on_error: called with each source or folder that cannot be used and the reason; without it
            the first one ends the search.

    Raises:
        CapGenError: a path does not exist, or a folder cannot be read or holds no image.
    """

    def refuse(path: Path, problem: str, remedy: str) -> None:
        error = CapGenError(problem, remedy)
        if on_error is None:
            raise error
        on_error(path, error)

    images: list[Path] = []
    for source in map(Path, sources):
        inside = list(_walk(source, refuse)) if os.path.isdir(source) else [source]
        if not os.path.exists(source):  # unlike Path.exists, no error for an impossible name
            refuse(source, f"there is no file or folder {source}", "check the path")
        elif inside:
            images += inside
        else:
            refuse(source, f"{source} holds no image", f"image files end in {', '.join(SUFFIXES)}")
    return images


def _walk(folder: Path, refuse: Callable[[Path, str, str], None]) -> Iterator[Path]:
    def unreadable(error: OSError) -> None:
        problem = f"cannot read the folder {error.filename}: {error.strerror}"
        refuse(Path(error.filename), problem, "check who may read it")

    for parent, folders, names in os.walk(folder, onerror=unreadable):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        shown = (Path(parent, name) for name in sorted(names) if not name.startswith("."))
        yield from filter(_is_image, shown)


def _is_image(path: Path) -> bool:
    """Whether a file has the suffix or the first bytes of an image."""
    if path.suffix.lower() in SUFFIXES:
        return True
    try:
        if not os.path.isfile(path):  # opening a pipe would wait for its other end
            return False
        with open(path, "rb") as stream:
            head = stream.read(12)
    except OSError:
        return False
    bitmap = head[:2] == b"BM" and head[6:10] == bytes(4)  # many texts begin with these letters
    return bitmap or head.startswith(_MAGIC) or (head[:4] == b"RIFF" and head[8:] == b"WEBP")


def is_many(images: Any) -> bool:
    """Whether ``images`` is a sequence of images or a tensor (B, 3, H, W), not a single image."""
    return (isinstance(images, Sequence) and not isinstance(images, str)) or (
        _is_tensor(images) and images.ndim == 4
    )
