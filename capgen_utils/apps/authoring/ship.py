"""Write the trained captioners of drawn scenes into ``data/bundles`` (``make bundles``)."""

import sys
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import load_file

from capgen_utils.apps.export.bundles import write_small
from capgen_utils.common.files import atomic_path
from capgen_utils.common.tensors import rounded, save_tensors
from capgen_utils.config import MINI
from capgen_utils.presets import Preset, get_preset, mini_folder, run_folder, run_of
from capgen_utils.training.shipped import LANGUAGE_MODEL, LOG, SHIPPED, WEIGHTS, copy_whole


def ship(preset: Preset, shipped: Path = SHIPPED) -> list[Path]:
    """Write the finished runs of a preset in 8 bits, with their logs and the language model.

    Returns:
        The folders written.
    """
    written = []
    for model in preset.models:
        run, target = run_of(preset, model), shipped / f"{preset.name}_{model}"
        if (run / "checkpoint.safetensors").is_file():  # else it is a copy of the shipped one
            write_small(run / "bundle", target)
            copy_whole(run / LOG, target / LOG)
            if getattr(preset.recipe(model).config, "language_model", "") == MINI:
                ship_language_model(mini_folder(preset), target / LANGUAGE_MODEL)
            written.append(target)
    return written


def ship_language_model(folder: Path, target: Path) -> None:
    """Write a language model with its log, rounded like the captioner that started from it."""
    copy_whole(folder, target)
    tensors = {name: rounded(tensor) for name, tensor in load_file(folder / WEIGHTS).items()}
    with atomic_path(target / WEIGHTS) as temporary:
        save_tensors(temporary, tensors, {"format": "pt"})
    copy_whole(run_folder(folder) / LOG, target / LOG)


def main(names: Sequence[str] = ()) -> int:
    """Write the shipped captioners of the named presets, by default of ``shapes``."""
    for name in names or ["shapes"]:
        for folder in ship(get_preset(name)):
            size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
            print(f"{size / 1e6:5.2f} MB  {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
