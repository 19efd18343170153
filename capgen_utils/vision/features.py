"""The feature cache (notebook 02): each image is encoded once, and read back memory-mapped."""

import functools
import io
import json
import math
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from capgen_utils.common.device import choose_device, choose_dtype
from capgen_utils.common.files import (
    CapGenError,
    explain_os_errors,
    fingerprint,
    read_json,
    require_space,
    write_json,
)
from capgen_utils.common.paths import data_dir
from capgen_utils.data.images import open_image
from capgen_utils.data.manifest import Manifest
from capgen_utils.vision.encoder import Encoder

FORMAT = 1
DECODERS = 2  # threads that decode images while the encoder computes
PREFETCH = 4  # decoded batches that may wait for the encoder

# Names of images, an array with a row for each, and the unreadable ones with the reason.
_Batch = tuple[list[str], np.ndarray, dict[str, str]]
_Encode = Callable[[int, int], Iterator[_Batch]]  # first row, images in a batch -> batches


@dataclass(frozen=True)
class FeatureCache:
    """Features of a list of images, one row per image.

    Attributes:
        path: the ``.npy`` file.
        names: image names; ``names[i]`` belongs to row i.
        array: float16 (images, *shape), memory-mapped, read-only.
        failed: images that could not be read -> reason; their rows are NaN.
    """

    path: Path
    names: tuple[str, ...]
    array: np.ndarray
    failed: dict[str, str]
    index: dict[str, int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "index", {name: row for row, name in enumerate(self.names)})

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one image's features."""
        return tuple(self.array.shape[1:])

    def rows(self, names: Sequence[str]) -> Tensor:
        """Return the features of ``names`` as a float16 tensor (len(names), *shape).

        Raises:
            CapGenError: the cache lacks features of an image.
        """
        missing = [name for name in names if name not in self.index or name in self.failed]
        if missing:
            raise CapGenError(
                f"{self.path} holds no features of {missing[0]}", "extract the features again"
            )
        return torch.from_numpy(self.array[[self.index[name] for name in names]])


def encode_images(
    encoder: Encoder, images: Sequence[Any], dtype: torch.dtype, flip: bool = False
) -> dict[str, Tensor]:
    """Encode images, as the cache does for whole data sets.

    Args:
        encoder: on its device.
        images: each as ``images.open_image`` takes it.
        dtype: compute dtype; bf16 and fp16 run under autocast.

    Returns:
        Output name -> float16 (len(images), *shape) on the CPU.
    """
    pixels = np.stack([encoder.preprocessing(open_image(image), flip) for image in images])
    return encode_pixels(encoder, pixels, dtype)


@torch.inference_mode()
def encode_pixels(encoder: Encoder, pixels: np.ndarray, dtype: torch.dtype) -> dict[str, Tensor]:
    """Encode what the encoder's preprocessing returns, (B, size, size, 3) uint8; see above."""
    device = encoder.mean.device
    with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
        outputs = encoder(torch.from_numpy(pixels).to(device))
    return {name: value.to(torch.float16).cpu() for name, value in outputs.items()}


def cache_key(
    manifest: Manifest, encoder: Encoder, output: str, flip: bool, dtype: torch.dtype
) -> dict[str, Any]:
    """Return all that the features depend on; its fingerprint is part of the cache's file name.

    The size of each image file is included, so that a replaced image makes the old cache stale.
    """
    key = {
        "format": FORMAT,
        "encoder": encoder.name,
        "weights": encoder.weights_hash(),
        "preprocessing": asdict(encoder.preprocessing),
        "output": output,
        "view": "flip" if flip else "plain",
        "dtype": str(dtype).removeprefix("torch."),
        "files": _files_of(manifest),
    }
    return json.loads(json.dumps(key))  # as it will be read back, tuples as lists


def _files_of(manifest: Manifest) -> str:
    return fingerprint([(item.image, _file_size(manifest.path(item))) for item in manifest.items])


def _file_size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1


def extract(
    manifest: Manifest,
    encoder: Encoder,
    output: str = "grid",
    flip: bool = False,
    folder: Path | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    batch_size: int = 32,
) -> FeatureCache:
    """Return the features of every image of ``manifest``, from the cache if it holds them.

    A missing cache is written row by row beside its final name; a killed run continues where it
    stopped. Unreadable images are counted, reported and marked, not fatal. An encoder with a stem
    takes the stem's grid from its cache, if there is one.

    Raises:
        CapGenError: too little disk space; no such output; a damaged cache; no readable image.
    """
    if output not in encoder.outputs:
        raise CapGenError(
            f"{encoder.name} has no output {output!r}",
            f"choose one of {', '.join(encoder.outputs)}",
        )
    device = device or choose_device()
    dtype = dtype or choose_dtype(device)
    key = cache_key(manifest, encoder, output, flip, dtype)
    path = cache_path(manifest, key, folder)
    if not path.with_suffix(".json").exists():
        encoder.to(device)
        encode: _Encode = functools.partial(_encoded_images, manifest, encoder, output, dtype, flip)
        stem = encoder.stem
        grids = find_cache(manifest, stem, "grid", dtype, flip, folder) if stem else None
        if grids is not None:
            encode = functools.partial(_encoded_grids, grids, encoder, output)
        shape = (len(manifest), *encoder.outputs[output])
        failed = _write_rows(path, shape, f"{encoder.name}, {key['view']} view", encode, batch_size)
        _finish(path, key, manifest, shape, failed)
    return open_cache(path, key)


def cache_path(manifest: Manifest, key: dict[str, Any], folder: Path | None = None) -> Path:
    """Return the file for features with this key; by default in the data folder's ``features``."""
    parts = (manifest.name, key["encoder"].replace(" ", "_"), key["output"], key["view"])
    name = "-".join([*parts, fingerprint(key)])
    return (folder or data_dir() / "features") / f"{name}.npy"


def find_cache(
    manifest: Manifest,
    encoder: Encoder,
    output: str,
    dtype: torch.dtype,
    flip: bool = False,
    folder: Path | None = None,
) -> FeatureCache | None:
    """Return the features of ``manifest`` if they have been extracted already."""
    key = cache_key(manifest, encoder, output, flip, dtype)
    path = cache_path(manifest, key, folder)
    return open_cache(path, key) if path.with_suffix(".json").exists() else None


def find_features(
    manifest: Manifest,
    encoder: str,
    weights: str,
    dtype: str,
    output: str | None = None,
    folder: Path | None = None,
) -> FeatureCache | None:
    """Return the features that a results file names; the encoder itself is not needed.

    Args:
        manifest: the whole dataset.
        encoder: its name.
        weights: hash of its weights.
        dtype: compute dtype, such as ``bfloat16``.
        output: ``None`` for any.
        folder: instead of the data folder's ``features``.
    """
    wanted = {
        "encoder": encoder,
        "weights": weights,
        "dtype": dtype,
        "view": "plain",
        "files": _files_of(manifest),
        **({} if output is None else {"output": output}),
    }
    for path in sorted((folder or data_dir() / "features").glob(f"{manifest.name}-*-plain-*.json")):
        key = read_json(path, f"delete {path.with_suffix('')}.*").get("key", {})
        if all(key.get(name) == value for name, value in wanted.items()):
            return open_cache(path.with_suffix(".npy"), key)
    return None


def _header(shape: tuple[int, ...]) -> bytes:
    """Return the bytes a ``.npy`` file of float16 begins with."""
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        stream, {"descr": "<f2", "fortran_order": False, "shape": shape}
    )
    return stream.getvalue()


def _write_rows(
    path: Path, shape: tuple[int, ...], title: str, encode: _Encode, batch_size: int
) -> dict[str, str]:
    """Append the rows that the partial file lacks; returns the unreadable images -> reason."""
    partial, log = path.with_suffix(".partial"), path.with_suffix(".failed")
    header, row = _header(shape), 2 * math.prod(shape[1:])
    size = len(header) + shape[0] * row
    print(f"features of {shape[0]} images, {title}: {size / 1e6:.0f} MB in {path.parent}")
    with explain_os_errors(partial):
        path.parent.mkdir(parents=True, exist_ok=True)
        require_space(path.parent, size - _file_size(partial) + 2**20, "the feature cache")
        with open(partial, "ab") as stream:
            # a row that a kill cut in half is written again
            rows = max(0, stream.tell() - len(header)) // row
            stream.truncate(len(header) + rows * row if rows else 0)
            if not rows:
                stream.write(header)
                log.unlink(missing_ok=True)
            failed = read_json(log, f"delete {partial}") if log.exists() else {}
            with tqdm(total=shape[0], initial=rows, unit="img", desc=title) as bar:
                for names, features, unreadable in encode(rows, batch_size):
                    for name, reason in unreadable.items():
                        tqdm.write(f"skipped: {reason}")
                        features[names.index(name)] = np.nan
                    if unreadable:
                        failed |= unreadable
                        write_json(log, failed)
                    stream.write(features.tobytes())
                    bar.update(len(names))
            stream.flush()
            os.fsync(stream.fileno())
    return failed


@torch.inference_mode()
def _encoded_grids(
    grids: FeatureCache, encoder: Encoder, output: str, first: int, batch_size: int
) -> Iterator[_Batch]:
    for start in range(first, len(grids.names), batch_size):
        names = list(grids.names[start : start + batch_size])
        grid = torch.from_numpy(np.array(grids.array[start : start + batch_size]))  # (B, N, D)
        features = encoder.from_stem(grid.to(encoder.mean.device))[output].to(torch.float16)
        failed = {name: grids.failed[name] for name in names if name in grids.failed}
        yield names, features.cpu().numpy(), failed


def _encoded_images(
    manifest: Manifest,
    encoder: Encoder,
    output: str,
    dtype: torch.dtype,
    flip: bool,
    first: int,
    batch_size: int,
) -> Iterator[_Batch]:
    """Yield batches in order; threads decode images ahead while the encoder computes."""

    def decode(start: int) -> _Batch:
        pixels, failed, items = [], {}, manifest.items[start : start + batch_size]
        for item in items:
            try:
                image = open_image(manifest.path(item))
            except CapGenError as error:
                image, failed[item.image] = Image.new("RGB", (8, 8)), error.problem
            pixels.append(encoder.preprocessing(image, flip))
        return [item.image for item in items], np.stack(pixels), failed

    waiting: list[Future[_Batch]] = []
    with ThreadPoolExecutor(DECODERS) as pool:
        for start in range(first, len(manifest), batch_size):
            waiting.append(pool.submit(decode, start))
            last = start + batch_size >= len(manifest)
            while waiting and (last or len(waiting) == PREFETCH):
                names, pixels, failed = waiting.pop(0).result()
                yield names, encode_pixels(encoder, pixels, dtype)[output].numpy(), failed


def _finish(
    path: Path,
    key: dict[str, Any],
    manifest: Manifest,
    shape: tuple[int, ...],
    failed: dict[str, str],
) -> None:
    """Give the complete file its name; a cache is complete once its description is written."""
    partial = path.with_suffix(".partial")
    if len(failed) == len(manifest):
        partial.unlink()
        raise CapGenError(f"no image of {manifest.name} could be read", next(iter(failed.values())))
    if failed:
        print(f"{len(failed)} of {len(manifest)} images could not be read and are left out")
    with explain_os_errors(path):
        os.replace(partial, path)
        path.with_suffix(".failed").unlink(missing_ok=True)
    names = [item.image for item in manifest.items]
    write_json(
        path.with_suffix(".json"),
        {"key": key, "shape": list(shape), "crc32": _crc(path), "failed": failed, "names": names},
    )


def _crc(path: Path) -> int:
    return zlib.crc32(np.memmap(path, mode="r").data)


def open_cache(path: Path, key: dict[str, Any] | None = None, verify: bool = False) -> FeatureCache:
    """Open a complete cache.

    Args:
        path: the ``.npy`` file; its description lies beside it as ``.json``.
        key: all that the features must depend on (``cache_key``); ``None`` skips the comparison.
        verify: also compare the checksum of all bytes (about a second per gigabyte).

    Raises:
        CapGenError: missing, truncated, damaged, or made from something else (stale).
    """
    remedy = f"delete {path.with_suffix('')}.* and run again: it will be extracted again"
    meta = read_json(path.with_suffix(".json"), remedy)
    try:
        shape, names, failed = tuple(meta["shape"]), tuple(meta["names"]), dict(meta["failed"])
        stored_key, crc = meta["key"], meta["crc32"]
    except (KeyError, TypeError) as error:
        raise CapGenError(
            f"{path.with_suffix('.json')} is not a feature description", remedy
        ) from error
    if key is not None and stored_key != key:
        changed = [name for name in key if stored_key.get(name) != key[name]]
        raise CapGenError(
            f"{path} is stale: {', '.join(changed)} changed since it was written", remedy
        )
    expected = len(_header(shape)) + 2 * math.prod(shape)
    actual = _file_size(path)
    if actual != expected or len(names) != shape[0]:
        raise CapGenError(f"{path} is truncated: {actual} bytes instead of {expected}", remedy)
    if verify and _crc(path) != crc:
        raise CapGenError(f"{path} is damaged: its checksum differs", remedy)
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    if array.shape != shape or array.dtype != np.float16:
        raise CapGenError(f"{path} holds {array.dtype}{array.shape}, not float16{shape}", remedy)
    return FeatureCache(path, names, array, failed)
