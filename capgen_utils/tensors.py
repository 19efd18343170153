"""Named tensors in safetensors files: written or refused with an explanation, read only where they are as expected."""

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
