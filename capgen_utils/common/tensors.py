"""Named tensors in safetensors files, written and read with explanations; and the tensors that name
places."""

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from capgen_utils.common.files import CapGenError, atomic_path

SCALE = ".scale"  # ends the name of the scales that belong to a tensor of bytes
_LARGEST = 10**10  # bytes of tensors that one file may hold


def save_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
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
    """Return ``tensors``; those of float32 that lose nothing by it as bytes with scales, or in
    float16.

    What ``round_to_bytes`` has rounded becomes two tensors: int8, and beside it, its name ending in
    ``SCALE``, one float16 number a row. ``read_tensors`` multiplies them again.
    """
    packed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        packed |= _packed(name, tensor.detach().cpu())
    return packed


def _packed(name: str, tensor: Tensor) -> dict[str, Tensor]:
    if tensor.dtype != torch.float32:
        return {name: tensor}
    if tensor.ndim >= 2:
        whole, scale = _to_bytes(tensor)
        if torch.equal(_from_bytes(whole, scale), tensor):
            return {name: whole, name + SCALE: scale}
    half = tensor.half()
    return {name: half if torch.equal(half.float(), tensor) else tensor}


@torch.no_grad()
def round_to_bytes(module: nn.Module) -> None:
    """Round a module's weights in place, as ``rounded`` does."""
    for tensor in module.state_dict().values():
        tensor.copy_(rounded(tensor))


def rounded(tensor: Tensor) -> Tensor:
    """Return weights of float32 rounded: a matrix to 255 evenly spaced numbers a row, all else to
    float16.

    The largest number of a row is 127 times the row's scale, itself a float16, so rounding twice
    changes nothing.
    """
    if tensor.dtype != torch.float32:
        return tensor
    return _from_bytes(*_to_bytes(tensor)) if tensor.ndim >= 2 else tensor.half().float()


def _to_bytes(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """(rows, ...) -> int8 of the same shape, and the rows' scales in float16 (rows,)."""
    rows = tensor.flatten(1)
    scale = (rows.abs().amax(1) / 127).half()
    whole = (
        torch.where(scale[:, None] > 0, rows / scale[:, None].float(), 0.0).round().clamp(-127, 127)
    )
    return whole.to(torch.int8).view(tensor.shape), scale


def _from_bytes(whole: Tensor, scale: Tensor) -> Tensor:
    return whole.float() * scale.float().view(-1, *[1] * (whole.ndim - 1))


def read_tensors(path: Path, shapes: Mapping[str, torch.Size], remedy: str) -> dict[str, Tensor]:
    """Read a safetensors file that must hold exactly the tensors named in ``shapes``; bytes come
    back as float32.

    Raises:
        CapGenError: unreadable, or other names, shapes or sizes; ``remedy`` becomes the advice.
    """
    try:
        if path.stat().st_size > _LARGEST:
            raise CapGenError(f"{path} is too large", remedy)
        with safe_open(path, framework="pt") as stream:
            names = set(stream.keys())
            scaled = {k for k in shapes if k + SCALE in names and k + SCALE not in shapes}
            sizes = dict(shapes) | {k + SCALE: shapes[k][:1] for k in scaled}
            wrong = sorted(names ^ set(sizes))[:3]
            wrong += [
                k
                for k in names & set(sizes)
                if tuple(stream.get_slice(k).get_shape()) != tuple(sizes[k])
            ][:3]
            wrong += [k for k in names & scaled if stream.get_slice(k).get_dtype() != "I8"][:3]
            if wrong:
                raise CapGenError(
                    f"{path} does not fit its config.json: {', '.join(wrong)}", remedy
                )
            tensors = {name: stream.get_tensor(name) for name in shapes}
            tensors |= {
                name: _from_bytes(tensors[name], stream.get_tensor(name + SCALE)) for name in scaled
            }
    except (SafetensorError, OSError, struct.error, ValueError) as error:
        raise CapGenError(f"{path} is damaged ({error})", remedy) from error
    if not all(
        torch.isfinite(tensor).all() for tensor in tensors.values() if tensor.is_floating_point()
    ):
        raise CapGenError(f"{path} holds values that are not finite", remedy)
    return tensors


def save_checkpoint(path: Path, tensors: Mapping[str, Tensor], progress: Mapping[str, Any]) -> None:
    """Write a training checkpoint in one file: tensors, and ``progress`` as JSON in its header."""
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
            return {name: stream.get_tensor(name) for name in stream.keys()}, progress  # noqa: SIM118
    except Exception as error:
        raise CapGenError(
            f"the checkpoint {path} is damaged ({error})", "delete it and train again"
        ) from error
