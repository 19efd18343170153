"""Trained captioners that ship: written small, and put where training would have put them.

For maintainers: ``make bundles`` writes those of ``shapes`` from their finished runs.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from capgen_utils.common.files import atomic_path, read_json
from capgen_utils.common.paths import APART, REPOSITORY, own_data_dir
from capgen_utils.config import SMALL_CLIP
from capgen_utils.presets import Preset
from capgen_utils.training.folders import (
    dual_encoder_folder,
    encoder_folder,
    mini_folder,
    run_folder,
    run_of,
)

SHIPPED = REPOSITORY / "data" / "bundles"
LOG = "log.jsonl"
WEIGHTS = "model.safetensors"
LANGUAGE_MODEL = "language_model"  # in the bundle of the captioner that began with it


# --- for readers


def take_shipped(preset: Preset, shipped: Path = SHIPPED) -> list[str]:
    """Put what ships for a preset where training would have put it: captioners, and what they start
    from.

    What has been trained here stays; notebooks and ``capgen train`` find the rest as finished runs
    where ``CAPGEN_TRAIN`` is 0. What ships rests on its own encoder: where another one was trained
    here, it lies apart, in a data folder of its own, which ``CAPGEN_DATA`` names from then on.

    Args:
        preset: whose captioners, encoder, small CLIP and language model are wanted.
        shipped: where they lie.

    Returns:
        The names of the captioners that are in place now and ship.
    """
    found = [
        model
        for model in preset.models
        if _stands_in(shipped / f"{preset.name}_{model}" / "config.json")
    ]
    if any(_is_another(*pair) for pair in _starting_points(preset, found, shipped)):
        if all(_is_trained(preset, model) for model in found):
            return found
        os.environ["CAPGEN_DATA"] = str(own_data_dir() / APART)
    for source, target in _starting_points(preset, found, shipped):
        if not (target / WEIGHTS).is_file():
            copy_whole(source, target)
        if (source / LOG).is_file() and not run_folder(target).exists():
            copy_whole(source / LOG, run_folder(target) / LOG)
    for model in found:
        bundle, run = shipped / f"{preset.name}_{model}", run_of(preset, model)
        if not _is_trained(preset, model):
            if (bundle / LOG).is_file():
                copy_whole(bundle / LOG, run / LOG)
            copy_whole(bundle, run / "bundle")
    return found


def _stands_in(path: Path) -> bool:
    """Return whether a bundle records its run; bundles of earlier versions do not."""
    return path.is_file() and "settings" in read_json(path, "copy the repository again")


def _starting_points(
    preset: Preset, models: list[str], shipped: Path
) -> Iterator[tuple[Path, Path]]:
    """Yield what captioners start from: where it ships, and where it belongs."""
    for model in models:
        encoder = shipped / f"{preset.name}_{model}" / "encoder"
        name = preset.recipe(model).encoder
        if name == SMALL_CLIP:
            yield encoder, dual_encoder_folder(preset)
            if preset.pretraining is not None:
                yield encoder / "stem", encoder_folder()
        elif name == preset.encoder and preset.pretraining is not None:
            yield encoder, encoder_folder()
        if (encoder.parent / LANGUAGE_MODEL).is_dir():
            yield encoder.parent / LANGUAGE_MODEL, mini_folder(preset)


def _is_trained(preset: Preset, model: str) -> bool:
    return (run_of(preset, model) / "bundle" / "config.json").is_file()


def _is_another(source: Path, target: Path) -> bool:
    """Whether a folder of weights is there already, and holds other weights."""
    remedy = "delete this folder; it is copied or trained again"
    present = [folder for folder in (source, target) if (folder / WEIGHTS).is_file()]
    return (
        len({read_json(folder / "config.json", remedy).get("weights_hash") for folder in present})
        > 1
    )


def copy_whole(source: Path, target: Path) -> None:
    """Copy a file or a folder in one step, without the logs and language models inside it."""
    with atomic_path(target) as temporary:
        if source.is_dir():
            shutil.copytree(source, temporary, ignore=shutil.ignore_patterns(LOG, LANGUAGE_MODEL))
        else:
            shutil.copyfile(source, temporary)
