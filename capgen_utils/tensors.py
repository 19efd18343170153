"""Named tensors in safetensors files, written and read with explanations; and the tensors that name places."""

import math
import struct
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from capgen_utils.files import CapGenError

_LARGEST = 10**10  # bytes of tensors that one file may hold


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write ``tensors`` in their own dtypes, wherever they are.

    Raises:
        OSError: the disk is full or not writable.
    """
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(plain, path, metadata)
    except SafetensorError as error:  # a full disk arrives as this
        raise OSError(str(error)) from error


def compact(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return ``tensors``; those of float32 that lose nothing by it in float16."""
    return {name: _halved(tensor.detach()) for name, tensor in tensors.items()}


def _halved(tensor: Tensor) -> Tensor:
    half = tensor.half()
    return half if tensor.dtype == torch.float32 and torch.equal(half.float(), tensor) else tensor


def read_tensors(path: Path, shapes: Mapping[str, torch.Size], remedy: str) -> dict[str, Tensor]:
    """Read a safetensors file that must hold exactly the tensors named in ``shapes``.

    Raises:
        CapGenError: unreadable, or other names, shapes or sizes; ``remedy`` becomes the advice.
    """
    try:
        if path.stat().st_size > _LARGEST:
            raise CapGenError(f"{path} is too large", remedy)
        with safe_open(path, framework="pt") as stream:
            names = set(stream.keys())
            wrong = sorted(names ^ set(shapes))[:3]
            wrong += [k for k in names & set(shapes) if tuple(stream.get_slice(k).get_shape()) != tuple(shapes[k])][:3]
            if wrong:
                raise CapGenError(f"{path} does not fit its config.json: {', '.join(wrong)}", remedy)
            tensors = {name: stream.get_tensor(name) for name in names}
    except (SafetensorError, OSError, struct.error, ValueError) as error:
        raise CapGenError(f"{path} is damaged ({error})", remedy) from error
    if not all(torch.isfinite(tensor).all() for tensor in tensors.values() if tensor.is_floating_point()):
        raise CapGenError(f"{path} holds values that are not finite", remedy)
    return tensors


def sinusoids(places: Tensor, width: int) -> Tensor:
    """Sines and cosines of ``places`` (N,) at wavelengths from 2 pi to 10000 x 2 pi: (N, width)."""
    rates = 10000 ** (-torch.arange(0, width, 2) / width)
    angles = places[:, None] * rates  # (N, width / 2)
    return torch.cat([angles.sin(), angles.cos()], dim=1)[:, :width]


def grid_sinusoids(positions: int, width: int) -> Tensor:
    """Sines and cosines of row and column, half of the width each, for a square grid; one axis for any other."""
    side = math.isqrt(positions)
    if side * side != positions:
        return sinusoids(torch.arange(positions), width)
    row, column = torch.arange(positions) // side, torch.arange(positions) % side
    return torch.cat([sinusoids(row, width // 2), sinusoids(column, width - width // 2)], dim=1)
