"""Choice of device and compute dtype, and a check that they work."""

from typing import TYPE_CHECKING

from capgen_utils.common.files import CapGenError

if TYPE_CHECKING:  # functions import torch themselves, so that the command line starts without it
    import torch


def device_name(device: "torch.device") -> str:
    """Return what an accelerator is called; empty for the processor."""
    import torch

    return (
        torch.cuda.get_device_name()
        if device.type == "cuda"
        else {"mps": "Apple GPU"}.get(device.type, "")
    )


def choose_device(name: str = "auto") -> "torch.device":
    """Return the named device, or the best one at hand: CUDA, then Apple's MPS, then the CPU.

    Raises:
        CapGenError: no such device, or this machine has none.
    """
    import torch

    if name != "auto":
        try:
            torch.empty(0, device=name)
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            reason = str(error).splitlines()[0]
            raise CapGenError(
                f"the device {name!r} cannot be used ({reason})",
                "choose one of auto, cpu, cuda, mps that this machine has",
            ) from error
        return torch.device(name)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def cpu_has_bf16() -> bool:
    """Whether the processor multiplies bfloat16 matrices itself (AMX or AVX512-BF16)."""
    import torch

    checks = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(bool(getattr(torch.cpu, check, bool)()) for check in checks)


def choose_dtype(device: "torch.device", name: str = "auto") -> "torch.dtype":
    """Return the compute dtype for ``device``.

    ``auto`` is bf16 where the hardware has it (CUDA compute capability 8.0 and above, CPUs with AMX
    or AVX512-BF16), fp16 on older CUDA devices such as the T4, where bf16 is emulated and slow,
    else fp32.

    Raises:
        CapGenError: ``name`` is none of auto, fp32, bf16, fp16.
    """
    import torch

    named = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if name in named:
        return named[name]
    if name != "auto":
        raise CapGenError(f"there is no dtype {name!r}", f"choose one of auto, {', '.join(named)}")
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16
    if device.type == "cpu" and cpu_has_bf16():
        return torch.bfloat16
    return torch.float32


NO_KERNEL_REMEDY = (
    "the installed torch has no kernels for this card: on Kaggle choose the accelerator T4 instead of P100; "
    "elsewhere install a torch that supports the card (pytorch.org, Get Started)"
)


def check_device(device: "torch.device", dtype: "torch.dtype") -> None:
    """Multiply two matrices and convolve a small image on ``device``: being listed is not the same
    as working.

    Raises:
        RuntimeError: the device cannot run one of them, or computes something wrong.
    """
    import torch

    ones = torch.ones(64, 64, device=device, dtype=dtype)
    product = (ones @ ones).float()
    image = torch.ones(1, 3, 8, 8, device=device, dtype=dtype)
    maps = torch.nn.functional.conv2d(
        image, torch.ones(4, 3, 3, 3, device=device, dtype=dtype)
    ).float()
    if not (
        bool((product == 64).all()) and bool((maps == 27).all())
    ):  # both numbers are exact in bf16 and fp16
        raise RuntimeError("wrong result of a matrix product or a convolution")


def device_remedy(message: str, device: "torch.device") -> str:
    """Return what to do about the error ``message`` that an operation on ``device`` raised."""
    text = message.lower()
    if "no kernel image" in text or "not compatible with the current pytorch" in text:
        return NO_KERNEL_REMEDY
    if "out of memory" in text:
        return "another program uses this device: end it, or restart the notebooks that hold its memory"
    if device.type == "cuda":
        return "update the driver, or run on the processor: set CUDA_VISIBLE_DEVICES to nothing before the command"
    return "install torch again: pip install --force-reinstall -c constraints.txt torch"
