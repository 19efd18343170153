"""Tensors in safetensors files, compact and checked on reading, and position encodings."""

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from capgen_utils.common.files import CapGenError, atomic_path

SCALE = ".scale"  # suffix of the name of an int8 tensor's scales
MAX_BYTES = 10**10  # of one file


def save_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write ``tensors`` from any device, in their own dtypes.

    Raises:
        OSError: the disk is full or not writable.
    """
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(plain, path, metadata)
    except SafetensorError as error:  # a full disk arrives as this
        raise OSError(str(error)) from error


def compact(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return ``tensors`` with float32 as int8 or float16 wherever that loses nothing.

    A tensor that ``round_to_bytes`` rounded becomes two: int8, and, named with the suffix
    ``SCALE``, one float16 scale per row. ``read_tensors`` multiplies them again.
    """
    packed = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
    for name, tensor in list(packed.items()):
        if tensor.dtype != torch.float32:
            continue
        if tensor.ndim >= 2:
            whole, scale = _to_bytes(tensor)
            if torch.equal(_from_bytes(whole, scale), tensor):
                packed |= {name: whole, name + SCALE: scale}
                continue
        if torch.equal(tensor.half().float(), tensor):
            packed[name] = tensor.half()
    return packed


@torch.no_grad()
def round_to_bytes(module: nn.Module) -> None:
    """Round a module's weights in place, as ``rounded`` does."""
    for tensor in module.state_dict().values():
        tensor.copy_(rounded(tensor))


def rounded(tensor: Tensor) -> Tensor:
    """Round float32 weights: matrices to 255 evenly spaced values per row, the rest to float16.

    The largest value of a row is 127 times the row's float16 scale, so rounding again changes
    nothing.
    """
    if tensor.dtype != torch.float32:
        return tensor
    return _from_bytes(*_to_bytes(tensor)) if tensor.ndim >= 2 else tensor.half().float()


def _to_bytes(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """(rows, ...) -> int8 of the same shape, and the rows' scales in float16 (rows,)."""
    rows = tensor.flatten(1)
    scale = (rows.abs().amax(1) / 127).half()
    whole = torch.where(scale[:, None] > 0, rows / scale[:, None].float(), 0.0)
    return whole.round().clamp(-127, 127).to(torch.int8).view(tensor.shape), scale


def _from_bytes(whole: Tensor, scale: Tensor) -> Tensor:
    return whole.float() * scale.float().view(-1, *[1] * (whole.ndim - 1))


def read_tensors(path: Path, shapes: Mapping[str, torch.Size], remedy: str) -> dict[str, Tensor]:
    """Read a safetensors file that must hold exactly the tensors named in ``shapes``.

    Tensors of int8 with scales come back as float32.

    Raises:
        CapGenError: unreadable, other names or shapes, too large, or not finite; ``remedy`` becomes
            the advice.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise CapGenError(f"{path} is too large", remedy)
        with safe_open(path, framework="pt") as stream:
            names = set(stream.keys())
            scaled = {k for k in shapes if k + SCALE in names and k + SCALE not in shapes}
            sizes = dict(shapes) | {k + SCALE: shapes[k][:1] for k in scaled}
            slices = {k: stream.get_slice(k) for k in names & set(sizes)}
            wrong = names ^ set(sizes)
            wrong |= {k for k, s in slices.items() if tuple(s.get_shape()) != tuple(sizes[k])}
            wrong |= {k for k in scaled & set(slices) if slices[k].get_dtype() != "I8"}
            if wrong:
                raise CapGenError(
                    f"{path} does not fit its config.json: {', '.join(sorted(wrong)[:3])}", remedy
                )
            tensors = {name: stream.get_tensor(name) for name in shapes}
            tensors |= {
                name: _from_bytes(tensors[name], stream.get_tensor(name + SCALE)) for name in scaled
            }
    except (SafetensorError, OSError, struct.error, ValueError) as error:
        raise CapGenError(f"{path} is damaged ({error})", remedy) from error
    if not all(torch.isfinite(tensor).all() for tensor in tensors.values()):
        raise CapGenError(f"{path} holds values that are not finite", remedy)
    return tensors


def save_checkpoint(path: Path, tensors: Mapping[str, Tensor], progress: Mapping[str, Any]) -> None:
    """Write a training checkpoint as one file, with ``progress`` as JSON in its header."""
    with atomic_path(path) as temporary:
        save_tensors(temporary, tensors, {"progress": json.dumps(progress)})


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what ``save_checkpoint`` wrote.

    Raises:
        CapGenError: unreadable.
    """
    try:
        with safe_open(path, framework="pt") as stream:
            progress = json.loads(stream.metadata()["progress"])
            names = stream.keys()
            return {name: stream.get_tensor(name) for name in names}, progress
    except Exception as error:
        raise CapGenError(
            f"the checkpoint {path} is damaged ({error})", "delete it and train again"
        ) from error


def sinusoids(positions: Tensor, width: int) -> Tensor:
    """Encode ``positions`` (N,) as sines and cosines (arXiv 1706.03762): (N, width).

    The wavelengths rise from 2 pi to 10000 x 2 pi.
    """
    rates = 10000 ** (-torch.arange(0, width, 2) / width)
    angles = positions[:, None] * rates  # (N, width / 2)
    return torch.cat([angles.sin(), angles.cos()], dim=1)[:, :width]


def grid_sinusoids(positions: int, width: int) -> Tensor:
    """Encode the cells of a grid: (positions, width).

    Row and column get half of the width each. A grid that is not square is encoded as a sequence.
    """
    side = math.isqrt(positions)
    if side * side != positions:
        return sinusoids(torch.arange(positions), width)
    row, column = torch.arange(positions) // side, torch.arange(positions) % side
    return torch.cat([sinusoids(row, width // 2), sinusoids(column, width - width // 2)], dim=1)
