"""The first cell of every notebook: prepare Colab or Kaggle; elsewhere only choose what to train.

Missing packages are installed under constraints that pin every installed version, and never torch,
torchvision or numpy. Running the cell again changes nothing. Before the installation, the module
imports nothing but the standard library.
"""

import importlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, MutableMapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from capgen_utils.common.device import device_name
from capgen_utils.common.files import CapGenError
from capgen_utils.common.paths import APART, REPOSITORY, data_dir, own_data_dir, requirement_lines

if TYPE_CHECKING:
    import torch

KEPT = ("torch", "torchvision", "numpy")  # another build of these might not find the host's GPU
NOT_NEEDED = ("jupyterlab", "kaggle")  # the host runs notebooks; Flickr8k needs no account
DRIVE = Path("/content/drive")
LOCAL = {"flickr8k": (Path("/content/flickr8k"), "CAPGEN_FLICKR8K")}  # Drive is slow for images

_GPU = {
    "Colab": "Runtime > Change runtime type > T4 GPU",
    "Kaggle": "Settings > Accelerator > GPU T4 x2 (not P100)",
}
_RETRY = "check the network (Kaggle: Settings > Internet), then run this cell again"


def host() -> str | None:
    """Return ``"Colab"`` or ``"Kaggle"`` if the notebook runs there, else ``None``."""
    if "google.colab" in sys.modules or os.environ.get("COLAB_RELEASE_TAG"):
        return "Colab"
    return "Kaggle" if os.environ.get("KAGGLE_KERNEL_RUN_TYPE") else None


def prepare(drive: bool = False) -> None:
    """Install missing packages on Colab and Kaggle, and let the GPU decide the preset there.

    Args:
        drive: on Colab, keep features and runs on Google Drive, where they outlive the session.

    Raises:
        CapGenError: the installation or Google Drive failed.
    """
    name = host()
    if name is None:
        return
    os.environ.setdefault("CAPGEN_PRESET", "auto")
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if str(REPOSITORY) not in paths:  # for the programs that notebooks start
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPOSITORY), *paths]))
    if drive and name == "Colab":
        keep_on_drive()
    install_missing()


def keep_on_drive(folder: Path = DRIVE) -> Path:
    """Mount Google Drive, point ``CAPGEN_DATA`` to a folder on it, and return that folder.

    Raises:
        CapGenError: Drive cannot be mounted or written.
    """
    try:
        if not (folder / "MyDrive").is_dir():
            importlib.import_module("google.colab.drive").mount(str(folder))
        target = folder / "MyDrive" / "capgen"
        target.mkdir(parents=True, exist_ok=True)
    except Exception as error:  # Colab raises many types
        raise CapGenError(
            f"Google Drive is not available ({error})", "allow the access, or set drive=False"
        ) from error
    os.environ["CAPGEN_DATA"] = str(target)
    return target


# --- packages


def missing_requirements(extra: str = "") -> list[str]:
    """Return the requirements of which no version is installed, except those left to the host.

    Args:
        extra: an extra of the package, such as ``serve``; by default the package itself.
    """
    names = {line: re.split(r"[\s<>=!~;\[]", line)[0] for line in requirement_lines(extra)}
    return [
        line
        for line, name in names.items()
        if name.lower() not in KEPT + NOT_NEEDED and not _version(name)
    ]


def install_missing(extra: str = "") -> list[str]:
    """Install missing requirements without changing any installed version, and return them.

    Raises:
        CapGenError: torch, torchvision or numpy are missing, or pip failed.
    """
    absent = [name for name in KEPT if not _version(name)]
    if absent:
        raise CapGenError(
            f"{', '.join(absent)} not installed on this machine",
            "choose a runtime with PyTorch, or install it first",
        )
    missing = missing_requirements(extra)
    if missing:
        print(f"installing {len(missing)} missing packages; installed versions stay as they are")
        with tempfile.TemporaryDirectory() as folder:
            pins = Path(folder) / "installed.txt"
            pins.write_text("".join(f"{name}=={version}\n" for name, version in installed()))
            options = ["-q", "--disable-pip-version-check", "-c", str(pins)]
            pip = [sys.executable, "-m", "pip", "install", *options, *missing]
            done = subprocess.run(pip, capture_output=True, text=True, check=False)
        if done.returncode:
            lines = done.stderr.splitlines()
            reason = next((line for line in lines if line.startswith("ERROR")), "pip failed")
            raise CapGenError(f"cannot install {', '.join(missing)}: {reason[:300]}", _RETRY)
        importlib.invalidate_caches()
    for line in too_old():
        print(f"WARNING: {line}")
    return missing


def need(extra: str) -> None:
    """Make sure that an extra, such as ``serve``, is installed; on Colab and Kaggle, install it.

    Raises:
        CapGenError: packages are missing, and this is neither Colab nor Kaggle, or pip failed.
    """
    if host():
        install_missing(extra)
    elif missing := missing_requirements(extra):
        raise CapGenError(
            f"not installed: {', '.join(missing)}",
            f"run in the repository: pip install -c constraints.txt -e '.[{extra}]'",
        )


def installed() -> Iterator[tuple[str, str]]:
    """Yield the name and the importable version of every installed distribution."""
    for name in sorted({each.metadata["Name"] or "" for each in metadata.distributions()}):
        version = _version(name) if re.fullmatch(r"[A-Za-z0-9][\w.-]*", name) else ""
        if re.fullmatch(r"[0-9][\w.+!]*", version):
            yield name, version


def too_old() -> Iterator[str]:
    """Yield a sentence for each requirement that is installed in an older, untested version."""
    from packaging.requirements import Requirement

    for requirement in map(Requirement, requirement_lines()):
        version, specifier = _version(requirement.name), requirement.specifier
        if version and not specifier.contains(version, prereleases=True):
            yield f"{requirement.name} {version} is older than CapGen supports ({specifier})"


def _version(name: str) -> str:
    try:
        return metadata.version(name) or ""
    except metadata.PackageNotFoundError:
        return ""


# --- what will be used


def announce(preset: str, train: bool = True) -> None:
    """Report what the notebook uses on Colab or Kaggle, and place shipped captioners if wanted.

    On Colab and Kaggle it also finds or downloads the images.

    Args:
        preset: name of a preset, or ``auto``.
        train: train what has not been trained; if false, use the captioners that ship.

    Raises:
        CapGenError: the preset is unknown, or its images can be neither found nor downloaded.
    """
    name = host()
    if name is not None:
        print(*describe(preset, name), sep="\n")
    if data_dir() != own_data_dir():  # an earlier run of the cell chose the shipped captioners
        os.environ["CAPGEN_DATA"] = str(own_data_dir())
    os.environ.pop("CAPGEN_TRAIN", None)
    if not train:
        os.environ["CAPGEN_TRAIN"] = "0"  # programs that the notebook starts read it too
        print(without_training(preset))
    if name is not None:
        find_images(preset)


def without_training(preset: str) -> str:
    """Copy the shipped captioners of a preset into the data folder, and report which there are."""
    from capgen_utils.presets import get_preset
    from capgen_utils.training.shipped import take_shipped

    chosen = get_preset(preset)
    shipped = take_shipped(chosen)
    missing = [model for model in chosen.models if model not in shipped]
    lines = {
        f"ready without training: {', '.join(shipped)}": shipped,
        f"no captioner ships for {chosen.name}: {', '.join(missing)}": missing,
        "your own models are never overwritten: shipped captioners, which need another encoder, "
        f"are in {own_data_dir() / APART}": data_dir() != own_data_dir(),
    }
    return "; ".join(line for line, applies in lines.items() if applies)


def describe(preset: str, name: str) -> Iterator[str]:
    """Yield lines on device, dtype, preset and encoder, and warnings about the GPU.

    Args:
        preset: as in ``announce``.
        name: ``Colab`` or ``Kaggle``.
    """
    from capgen_utils.common.device import choose_device, choose_dtype
    from capgen_utils.presets import get_preset

    chosen, device = get_preset(preset), choose_device()
    dtype = choose_dtype(device)
    yield (
        f"{name}: {device_name(device) or 'no GPU'}, {str(dtype).removeprefix('torch.')}; "
        f"preset {chosen.name}, encoder {chosen.encoder}"
    )
    if device.type == "cpu":
        yield f"WARNING: no GPU is switched on: {_GPU[name]}"
    else:
        yield from failures(device, dtype)


def failures(device: "torch.device", dtype: "torch.dtype") -> Iterator[str]:
    """Run a small computation on ``device``; if it fails, yield a warning with its remedy."""
    from capgen_utils.common.device import check_device, device_remedy

    try:
        check_device(device, dtype)
    except Exception as error:  # drivers and libraries raise many types
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        remedy = device_remedy(str(error), device)
        yield f"WARNING: the GPU does not work: {reason}\n  -> {remedy}"


def find_images(preset: str, environment: MutableMapping[str, str] = os.environ) -> Path:
    """Find, draw or download the images of a preset, and return their folder.

    If the data folder is on Google Drive, photographs go to the machine's own disk.

    Raises:
        CapGenError: the images can be neither found nor downloaded.
    """
    from capgen_utils.data.datasets import download_dataset
    from capgen_utils.presets import get_preset

    dataset = get_preset(preset).dataset
    if environment.get("CAPGEN_DATA", "").startswith(str(DRIVE)) and dataset in LOCAL:
        folder, variable = LOCAL[dataset]
        environment.setdefault(variable, str(download_dataset(dataset, folder)))
    return download_dataset(dataset)
