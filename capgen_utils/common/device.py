"""Choose a device and a compute dtype, and check that they work (all notebooks).

torch is imported when it is needed: a notebook's first cell reads this module before torch is
installed.
"""

from typing import TYPE_CHECKING

from capgen_utils.common.files import CapGenError

if TYPE_CHECKING:
    import torch

NO_KERNEL_REMEDY = (
    "the installed torch has no kernels for this card: on Kaggle choose the accelerator T4 instead "
    "of P100; elsewhere install a torch that supports the card (pytorch.org, Get Started)"
)


def device_name(device: "torch.device") -> str:
    """Return the product name of an accelerator; empty for the CPU."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name()
    return "Apple GPU" if device.type == "mps" else ""


def choose_device(name: str = "auto") -> "torch.device":
    """Return the named device, or the best available one: CUDA, then Apple's MPS, then the CPU.

    Raises:
        CapGenError: there is no such device, or this machine does not have it.
    """
    import torch

    if name != "auto":
        try:
            torch.empty(0, device=name)
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            raise CapGenError(
                f"the device {name!r} cannot be used ({str(error).splitlines()[0]})",
                "choose one of auto, cpu, cuda, mps that this machine has",
            ) from error
        return torch.device(name)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def cpu_has_bf16() -> bool:
    """Whether the CPU multiplies bfloat16 matrices in hardware (AMX or AVX512-BF16)."""
    import torch

    checks = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(bool(getattr(torch.cpu, check, bool)()) for check in checks)


def choose_dtype(device: "torch.device", name: str = "auto") -> "torch.dtype":
    """Return the compute dtype for ``device``.

    ``auto`` is bf16 if the hardware has it (CUDA compute capability 8.0 and above, CPUs with AMX or
    AVX512-BF16); fp16 on older CUDA devices such as the T4, which emulate bf16 slowly; else fp32.

    Raises:
        CapGenError: ``name`` is not one of auto, fp32, bf16, fp16.
    """
    import torch

    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if name in dtypes:
        return dtypes[name]
    if name != "auto":
        raise CapGenError(f"there is no dtype {name!r}", f"choose one of auto, {', '.join(dtypes)}")
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16
    return torch.bfloat16 if device.type == "cpu" and cpu_has_bf16() else torch.float32


def check_device(device: "torch.device", dtype: "torch.dtype") -> None:
    """Multiply two matrices and convolve a small image: a listed device need not work.

    Raises:
        RuntimeError: the device cannot run one of them, or computes a wrong result.
    """
    import torch

    ones = torch.ones(64, 64, device=device, dtype=dtype)
    image = torch.ones(1, 3, 8, 8, device=device, dtype=dtype)
    kernel = torch.ones(4, 3, 3, 3, device=device, dtype=dtype)
    # 64 and 27 are exact in bf16 and fp16
    product, maps = ones @ ones, torch.nn.functional.conv2d(image, kernel)
    if not (bool((product == 64).all()) and bool((maps == 27).all())):
        raise RuntimeError("wrong result of a matrix product or a convolution")


def device_remedy(message: str, device: "torch.device") -> str:
    """Return what to do about an error with this ``message`` from an operation on ``device``."""
    text = message.lower()
    if "no kernel image" in text or "not compatible with the current pytorch" in text:
        return NO_KERNEL_REMEDY
    if "out of memory" in text:
        return (
            "another program uses this device: end it, or restart the notebooks that hold its "
            "memory"
        )
    if device.type == "cuda":
        return (
            "update the driver, or run on the CPU: set CUDA_VISIBLE_DEVICES to an empty string "
            "before the command"
        )
    return "install torch again: pip install --force-reinstall -c constraints.txt torch"
