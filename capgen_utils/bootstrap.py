"""What the first cell of a notebook does on Colab and Kaggle; on any other machine it does nothing.

What is there stays as it is: only what is missing is installed, under constraints that hold every
installed version fast, and never torch, torchvision or numpy. A restarted kernel runs the same cell
again and finds all done. Nothing but the standard library is imported before the installation.
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

from capgen_utils.common.device import device_name
from capgen_utils.common.files import CapGenError
from capgen_utils.common.paths import REPOSITORY, requirement_lines

KEPT = (
    "torch",
    "torchvision",
    "numpy",
)  # these come with the host; another build of them may not see its GPU


NOT_NEEDED = ("jupyterlab", "kaggle")  # a host is a notebook server, and Flickr8k needs no account
DRIVE = Path("/content/drive")


LOCAL = {
    "flickr8k": (Path("/content/flickr8k"), "CAPGEN_FLICKR8K")
}  # images stay off Drive: many small files are slow


_GPU = {
    "Colab": "Runtime > Change runtime type > T4 GPU",
    "Kaggle": "Settings > Accelerator > GPU T4 x2 (not P100)",
}


_RETRY = "is the network on? (Kaggle: Settings > Internet); then run this cell again"


def host() -> str | None:
    """Return ``Colab`` or ``Kaggle`` where the notebook runs there, else ``None``."""
    if "google.colab" in sys.modules or os.environ.get("COLAB_RELEASE_TAG"):
        return "Colab"
    return "Kaggle" if os.environ.get("KAGGLE_KERNEL_RUN_TYPE") else None


def prepare(drive: bool = False) -> None:
    """Make the package usable on a host: install what is missing, and let the preset be chosen by
    the GPU.

    Args:
        drive: on Colab, keep features and runs on Google Drive, where they outlast the machine.

    Raises:
        CapGenError: the installation or Drive failed; says what to do.
    """
    place = host()
    if place is None:
        return
    os.environ.setdefault("CAPGEN_PRESET", "auto")
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if str(REPOSITORY) not in paths:  # for the programs that notebooks start
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPOSITORY), *paths]))
    if drive and place == "Colab":
        keep_on_drive()
    install_missing()


def keep_on_drive(folder: Path = DRIVE) -> Path:
    """Mount Google Drive and let ``CAPGEN_DATA`` name a folder on it; returns that folder.

    Raises:
        CapGenError: it cannot be mounted.
    """
    try:
        if not (folder / "MyDrive").is_dir():
            importlib.import_module("google.colab.drive").mount(str(folder))
        target = folder / "MyDrive" / "capgen"
        target.mkdir(parents=True, exist_ok=True)
    except Exception as error:  # Colab's own errors are of many kinds
        raise CapGenError(
            f"Google Drive cannot be used ({error})", "allow the access, or set drive=False"
        ) from error
    os.environ["CAPGEN_DATA"] = str(target)
    return target


# --- packages


def missing_requirements() -> list[str]:
    """Return the requirements of which no version at all is installed, without those that are left
    to the host."""
    names = {line: re.split(r"[\s<>=!~;\[]", line)[0] for line in requirement_lines()}
    left = {_canonical(name) for name in KEPT + NOT_NEEDED}
    return [
        line for line, name in names.items() if _canonical(name) not in left and not _version(name)
    ]


def install_missing() -> list[str]:
    """Install the missing requirements, and nothing that would change a version that is there;
    returns them.

    Raises:
        CapGenError: torch, torchvision or numpy are missing, or pip failed.
    """
    lost = [name for name in KEPT if not _version(name)]
    if lost:
        raise CapGenError(
            f"this machine has no {', '.join(lost)}",
            "choose a runtime with PyTorch, or install it first",
        )
    missing = missing_requirements()
    if missing:
        print(
            f"installing {len(missing)} packages that are missing; what is there keeps its version"
        )
        with tempfile.TemporaryDirectory() as folder:
            held = Path(folder) / "held.txt"
            held.write_text(
                "\n".join(f"{name}=={version}" for name, version in installed()) + "\n",
                encoding="utf-8",
            )
            command = [
                sys.executable,
                "-m",
                "pip",
                "install",
                "-q",
                "--disable-pip-version-check",
                "-c",
                str(held),
            ]
            done = subprocess.run([*command, *missing], capture_output=True, text=True, check=False)
        if done.returncode:
            said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or [
                "pip failed"
            ]
            raise CapGenError(f"cannot install {', '.join(missing)}: {said[0][:300]}", _RETRY)
        importlib.invalidate_caches()
    for line in too_old():
        print(f"WARNING: {line}")
    return missing


def installed() -> Iterator[tuple[str, str]]:
    """Yield name and version of everything that is installed; of what is there twice, the one that
    is imported."""
    names = {
        _canonical(one.metadata["Name"]) for one in metadata.distributions() if one.metadata["Name"]
    }
    for name in sorted(names):
        version = _version(name)
        if re.fullmatch(r"[a-z0-9][a-z0-9.-]*", name) and re.fullmatch(r"[0-9][\w.+!]*", version):
            yield name, version


def too_old() -> Iterator[str]:
    """Yield a sentence for each requirement whose installed version is older than CapGen was tried
    with."""
    from packaging.requirements import Requirement

    for requirement in map(Requirement, requirement_lines()):
        have = _version(requirement.name)
        if have and not requirement.specifier.contains(have, prereleases=True):
            yield f"{requirement.name} {have} is older than CapGen was tried with ({requirement.specifier})"


def _version(name: str) -> str:
    try:
        return metadata.version(name) or ""
    except metadata.PackageNotFoundError:
        return ""


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


# --- what will be used


def announce(preset: str, train: bool = True) -> None:
    """Say what will not be trained; on a host also what the notebook will use and what will not
    work.

    There it finds or downloads the images, too.

    Args:
        preset: name of a preset, or ``auto``.
        train: train what has not been trained; else take the captioners that ship, where there are
            any.

    Raises:
        CapGenError: no such preset, or its images can be neither found nor downloaded.
    """
    place = host()
    for line in describe(preset, place) if place is not None else ():
        print(line)
    _return_to_own_data()
    os.environ.pop("CAPGEN_TRAIN", None)
    if not train:
        os.environ["CAPGEN_TRAIN"] = "0"  # for the package, and for programs that notebooks start
        print(without_training(preset))
    if place is not None:
        find_images(preset)


def _return_to_own_data() -> None:
    """Undo what an earlier run of the cell did where it took what ships."""
    from capgen_utils.common.paths import data_dir, own_data_dir

    if data_dir() != own_data_dir():
        os.environ["CAPGEN_DATA"] = str(own_data_dir())


def without_training(preset: str) -> str:
    """Put what ships for a preset where training would have put it; returns which captioners need
    no training now."""
    from capgen_utils.common.paths import data_dir, own_data_dir
    from capgen_utils.presets import get_preset
    from capgen_utils.training.shipped import take_shipped

    chosen = get_preset(preset)
    found = take_shipped(chosen)
    missing = [model for model in chosen.models if model not in found]
    parts = [f"ready without training: {', '.join(found)}"] if found else []
    parts += [f"not among what ships for {chosen.name}: {', '.join(missing)}"] if missing else []
    if data_dir() != own_data_dir():
        parts.append(
            f"what was trained here started from another encoder; what ships lies apart, in {data_dir()}"
        )
    return "; ".join(parts)


def describe(preset: str, place: str) -> Iterator[str]:
    """Yield lines: device and number format, preset and encoder, and warnings.

    Args:
        preset: as in ``announce``.
        place: ``Colab`` or ``Kaggle``.
    """
    from capgen_utils.common.device import choose_device, choose_dtype
    from capgen_utils.presets import get_preset

    chosen, device = get_preset(preset), choose_device()
    dtype = str(choose_dtype(device)).removeprefix("torch.")
    yield f"{place}: {device_name(device) or 'no GPU'}, {dtype}; preset {chosen.name}, encoder {chosen.encoder}"
    if device.type == "cpu":
        yield f"WARNING: no GPU is switched on: {_GPU[place]}"
    else:
        yield from failures(device)


def failures(device: object) -> Iterator[str]:
    """Run a real operation on ``device``; yield a warning with its remedy where that fails."""
    import torch

    from capgen_utils.common.device import check_device, choose_dtype, device_remedy

    assert isinstance(device, torch.device)
    try:
        check_device(device, choose_dtype(device))
    except Exception as error:  # drivers and libraries raise many kinds
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        yield f"WARNING: the GPU does not work: {first[:200]}\n  -> {device_remedy(str(error), device)}"


def find_images(preset: str, environment: MutableMapping[str, str] = os.environ) -> Path:
    """Find, draw or download the images of a preset; returns their folder.

    Where the data folder lies on Drive, photographs are kept beside it on the machine's own disk.

    Raises:
        CapGenError: they can be neither found nor downloaded.
    """
    from capgen_utils.data.datasets import download_dataset
    from capgen_utils.presets import get_preset

    dataset = get_preset(preset).dataset
    if environment.get("CAPGEN_DATA", "").startswith(str(DRIVE)) and dataset in LOCAL:
        folder, variable = LOCAL[dataset]
        environment.setdefault(variable, str(download_dataset(dataset, folder)))
    return download_dataset(dataset)
