"""Trained captioners that ship: written small, and put where training would have put them.

For maintainers: ``make bundles`` writes those of ``shapes`` from their finished runs.
"""

import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file

from capgen_utils.checkpoint import load_bundle, save_bundle
from capgen_utils.config import APART, data_dir, own_data_dir
from capgen_utils.contrastive import dual_encoder_folder
from capgen_utils.files import atomic_path, read_json
from capgen_utils.language import MINI, mini_folder, run_folder
from capgen_utils.machine import REPOSITORY
from capgen_utils.presets import SMALL_CLIP, Preset, get_preset
from capgen_utils.pretraining import encoder_folder
from capgen_utils.tensors import round_to_bytes, rounded, save_tensors

SHIPPED = REPOSITORY / "data" / "bundles"
LOG = "log.jsonl"
WEIGHTS = "model.safetensors"
LANGUAGE_MODEL = "language_model"  # in the bundle of the captioner that began with it


# --- for maintainers ------------------------------------------------------------------------------------------------


def write_small(folder: Path, output: Path) -> None:
    """Write a bundle with 8 bits for each weight of its matrices: about half of its size.

    An encoder or a CLIP of its own is rounded too.

    Args:
        folder: a bundle.
        output: replaced when it exists.

    Raises:
        CapGenError: the bundle is damaged, or ``output`` cannot be written.
    """
    bundle = load_bundle(folder)
    encoder, scorer = bundle.build_encoder(), bundle.build_scorer()
    if scorer is not None and scorer.images.weights_hash() == encoder.weights_hash():
        encoder = scorer.images
    if scorer is not None and scorer.source is None:
        round_to_bytes(scorer.clip)
    for own in (encoder, encoder.stem):
        if own is not None and not own.public:
            round_to_bytes(own.trunk)
    round_to_bytes(bundle.model)
    bundle.info["encoder"] = encoder.describe()
    save_bundle(output, bundle, encoder, torch.float32, scorer)


def ship(preset: Preset, shipped: Path = SHIPPED) -> list[Path]:
    """Write the finished runs of a preset small, each with its log, and the language model with the one that reads it.

    Returns:
        What was written.
    """
    written = []
    for model in preset.models:
        run, target = _run(preset, model), shipped / f"{preset.name}_{model}"
        if (run / "checkpoint.safetensors").is_file():  # else it is what ships already
            write_small(run / "bundle", target)
            _copy(run / LOG, target / LOG)
            if getattr(preset.recipe(model).config, "language_model", "") == MINI:
                _ship_language_model(mini_folder(preset), target / LANGUAGE_MODEL)
            written.append(target)
    return written


def _ship_language_model(folder: Path, target: Path) -> None:
    """Write a language model with its log, rounded as the captioner is that began with it; the library reads it."""
    _copy(folder, target)
    weights = load_file(folder / WEIGHTS)
    with atomic_path(target / WEIGHTS) as temporary:
        save_tensors(temporary, {name: rounded(tensor) for name, tensor in weights.items()}, {"format": "pt"})
    _copy(run_folder(folder) / LOG, target / LOG)


def _run(preset: Preset, model: str) -> Path:
    return data_dir() / "runs" / f"{preset.name}_{model}"


# --- for readers ----------------------------------------------------------------------------------------------------


def take_shipped(preset: Preset, shipped: Path = SHIPPED) -> list[str]:
    """Put what ships for a preset where training would have put it: captioners, and what they start from.

    What has been trained here stays; notebooks and ``capgen train`` find the rest as finished runs where
    ``CAPGEN_TRAIN`` is 0. What ships rests on its own encoder: where another one was trained here, it lies apart, in a
    data folder of its own, which ``CAPGEN_DATA`` names from then on.

    Args:
        preset: whose captioners, encoder, small CLIP and language model are wanted.
        shipped: where they lie.

    Returns:
        The names of the captioners that are in place now and ship.
    """
    found = [model for model in preset.models if _stands_in(shipped / f"{preset.name}_{model}" / "config.json")]
    if any(_is_another(*pair) for pair in _starting_points(preset, found, shipped)):
        if all(_is_trained(preset, model) for model in found):
            return found
        os.environ["CAPGEN_DATA"] = str(own_data_dir() / APART)
    for source, target in _starting_points(preset, found, shipped):
        if not (target / WEIGHTS).is_file():
            _copy(source, target)
        if (source / LOG).is_file() and not run_folder(target).exists():
            _copy(source / LOG, run_folder(target) / LOG)
    for model in found:
        bundle, run = shipped / f"{preset.name}_{model}", _run(preset, model)
        if not _is_trained(preset, model):
            if (bundle / LOG).is_file():
                _copy(bundle / LOG, run / LOG)
            _copy(bundle, run / "bundle")
    return found


def _stands_in(path: Path) -> bool:
    """Whether a bundle says which run it came from; one of an earlier version of the code does not."""
    return path.is_file() and "settings" in read_json(path, "copy the repository again")


def _starting_points(preset: Preset, models: list[str], shipped: Path) -> Iterator[tuple[Path, Path]]:
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
    return (_run(preset, model) / "bundle" / "config.json").is_file()


def _is_another(source: Path, target: Path) -> bool:
    """Whether a folder of weights is there already, and holds other weights."""
    remedy = "delete this folder; it is copied or trained again"
    present = [folder for folder in (source, target) if (folder / WEIGHTS).is_file()]
    return len({read_json(folder / "config.json", remedy).get("weights_hash") for folder in present}) > 1


def _copy(source: Path, target: Path) -> None:
    with atomic_path(target) as temporary:
        if source.is_dir():
            shutil.copytree(source, temporary, ignore=shutil.ignore_patterns(LOG, LANGUAGE_MODEL))
        else:
            shutil.copyfile(source, temporary)


def main(names: Sequence[str] = ()) -> int:
    """Write what ships for the named presets, by default for ``shapes``."""
    for name in names or ["shapes"]:
        for folder in ship(get_preset(name)):
            size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
            print(f"{size / 1e6:5.2f} MB  {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
