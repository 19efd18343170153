"""What a measurement has to name: processor, cores, load, accelerator, versions, and the commit of
the code."""

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    pass
from capgen_utils.common.paths import REPOSITORY

VERSION = "0.1.0"  # of this package; the tag of a release is v and this
PACKAGES = ("torch", "torchvision", "timm", "transformers", "accelerate", "numpy", "pillow", "nltk")


def machine() -> dict[str, Any]:
    """Return what a measurement names: processor, cores, load, accelerator and versions; never a
    host or a path."""
    import torch  # here, because what runs without torch needs the rest of this module

    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "accelerator": accelerator,
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in PACKAGES},
    }


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def revision() -> str:
    """Return the commit of this code, ``unknown`` outside a clone; ``+`` marks uncommitted changes."""
    try:
        run = [
            "git",
            "-C",
            str(REPOSITORY),
            "describe",
            "--always",
            "--dirty=+",
            "--abbrev=12",
            "--exclude=*",
        ]
        return subprocess.run(
            run, capture_output=True, text=True, check=True, timeout=20
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
