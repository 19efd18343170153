"""What a measurement has to name: processor, cores, load, accelerator, versions, and the commit of the code."""

import os
import platform
import subprocess
import tomllib
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "torchvision", "timm", "transformers", "accelerate", "numpy", "pillow", "nltk")


def machine() -> dict[str, Any]:
    """Return what a measurement names: processor, cores, load, accelerator and versions; never a host or a path."""
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


def device_name(device: "torch.device") -> str:
    """Return what an accelerator is called; empty for the processor."""
    import torch

    return torch.cuda.get_device_name() if device.type == "cuda" else {"mps": "Apple GPU"}.get(device.type, "")


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
        run = ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"]
        return subprocess.run(run, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def requirement_lines() -> list[str]:
    """Return the package's requirements as text: from the clone's file, else from the installed metadata."""
    listed = REPOSITORY / "requirements.txt"
    if listed.is_file():
        lines = listed.read_text(encoding="utf-8").splitlines()
    else:
        lines = [line for line in metadata.requires("capgen-utils") or [] if "extra ==" not in line]
    return [text for line in lines if (text := line.split("#")[0].strip())]


def repository_address() -> str:
    """Return the project's public address; ``pyproject.toml`` names it, or what was installed from it."""
    path = REPOSITORY / "pyproject.toml"
    if path.is_file():
        return str(tomllib.loads(path.read_text(encoding="utf-8"))["project"]["urls"]["Repository"])
    listed = metadata.metadata("capgen-utils").get_all("Project-URL") or []
    return next(line.split(", ", 1)[1] for line in listed if line.startswith("Repository, "))
