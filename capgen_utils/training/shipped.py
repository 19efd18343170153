"""Copies the captioners that ship with CapGen to where training would put them (notebook 00).

For maintainers: ``make bundles`` writes the captioners of ``shapes`` from their finished runs.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from capgen_utils.common.files import atomic_path, read_json
from capgen_utils.common.paths import APART, REPOSITORY, own_data_dir
from capgen_utils.config import SMALL_CLIP
from capgen_utils.presets import (
    Preset,
    dual_encoder_folder,
    encoder_folder,
    mini_folder,
    run_folder,
    run_of,
)

SHIPPED = REPOSITORY / "data" / "bundles"
LOG = "log.jsonl"
WEIGHTS = "model.safetensors"
LANGUAGE_MODEL = "language_model"  # in the bundle of the captioner that starts from it


def take_shipped(preset: Preset, shipped: Path = SHIPPED) -> list[str]:
    """Copy a preset's shipped captioners, and what they start from, to where training puts them.

    Your own models are never overwritten. With ``CAPGEN_TRAIN=0``, notebooks and ``capgen train``
    treat the copies as finished runs. If you have trained another encoder, the shipped captioners,
    which need their own, go to a separate data folder, and ``CAPGEN_DATA`` is set to it.

    Args:
        preset: of the captioners, the encoder, the small CLIP and the language model.
        shipped: the folder of the shipped bundles.

    Returns:
        The names of the shipped captioners that are now in place.
    """
    models = [m for m in preset.models if _records_run(shipped / f"{preset.name}_{m}")]
    if any(_is_another(*pair) for pair in _starting_points(preset, models, shipped)):
        if all(_is_trained(preset, model) for model in models):
            return models
        os.environ["CAPGEN_DATA"] = str(own_data_dir() / APART)
    for source, target in _starting_points(preset, models, shipped):
        if not (target / WEIGHTS).is_file():
            copy_whole(source, target)
        if (source / LOG).is_file() and not run_folder(target).exists():
            copy_whole(source / LOG, run_folder(target) / LOG)
    for model in models:
        bundle, run = shipped / f"{preset.name}_{model}", run_of(preset, model)
        if not _is_trained(preset, model):
            if (bundle / LOG).is_file():
                copy_whole(bundle / LOG, run / LOG)
            copy_whole(bundle, run / "bundle")
    return models


def _records_run(bundle: Path) -> bool:
    """Return whether a bundle names the settings of its run; those of earlier versions do not."""
    path = bundle / "config.json"
    return path.is_file() and "settings" in read_json(path, "copy the repository again")


def _starting_points(
    preset: Preset, models: list[str], shipped: Path
) -> Iterator[tuple[Path, Path]]:
    """Yield the shipped folder and the target of everything that captioners start from."""
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
    """Return whether two folders both hold weights, and their weights differ."""
    remedy = "delete this folder; it is copied or trained again"
    present = [folder for folder in (source, target) if (folder / WEIGHTS).is_file()]
    return len({read_json(f / "config.json", remedy).get("weights_hash") for f in present}) > 1


def copy_whole(source: Path, target: Path) -> None:
    """Copy a file or a folder atomically, without the logs and language models inside it."""
    with atomic_path(target) as temporary:
        if source.is_dir():
            shutil.copytree(source, temporary, ignore=shutil.ignore_patterns(LOG, LANGUAGE_MODEL))
        else:
            shutil.copyfile(source, temporary)
