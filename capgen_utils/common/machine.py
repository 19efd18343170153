"""The machine, versions and commit that every measurement names (notebook 09)."""

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from capgen_utils.common.paths import REPOSITORY

VERSION = "0.1.0"  # of this package; a release is tagged with "v" before it
PACKAGES = ("torch", "torchvision", "timm", "transformers", "accelerate", "numpy", "pillow", "nltk")


def machine() -> dict[str, Any]:
    """Return processor, cores, load, accelerator and versions; never a host name or a path."""
    import torch  # here, because the rest of this module must work without torch

    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
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
    """Return the commit of this code; ``+`` marks uncommitted changes, no clone is ``unknown``."""
    command = ["git", "-C", str(REPOSITORY), "describe", "--always"]
    command += ["--dirty=+", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.check_output(
            command, stderr=subprocess.DEVNULL, text=True, timeout=20
        ).strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
