"""Trained captioners that ship: written small, and put where training would have put them."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import torch

from capgen_utils.checkpoint import load_bundle, save_bundle
from capgen_utils.config import data_dir
from capgen_utils.contrastive import dual_encoder_folder
from capgen_utils.files import CapGenError, atomic_path, read_json
from capgen_utils.language import mini_folder
from capgen_utils.machine import REPOSITORY
from capgen_utils.presets import SMALL_CLIP, Preset
from capgen_utils.pretraining import encoder_folder
from capgen_utils.tensors import round_to_bytes

SHIPPED = REPOSITORY / "data" / "bundles"
LOG = "log.jsonl"


# --- for maintainers ------------------------------------------------------------------------------------------------


def write_small(folder: Path, output: Path) -> None:
    """Write a bundle with 8 bits for each weight of its matrices: about half of its size.

    An encoder of its own stays as it is; a CLIP of its own is rounded too. The log of its training, where it lies
    beside the bundle, goes with it.

    Args:
        folder: a bundle.
        output: replaced when it exists.

    Raises:
        CapGenError: the bundle is damaged, or ``output`` cannot be written.
    """
    bundle = load_bundle(folder)
    encoder, scorer = bundle.build_encoder(), bundle.build_scorer()
    if scorer is not None:
        if scorer.images.weights_hash() == encoder.weights_hash():
            encoder = scorer.images
        if scorer.source is None:
            round_to_bytes(scorer.clip)
            bundle.info["encoder"] = encoder.describe()
    round_to_bytes(bundle.model)
    save_bundle(output, bundle, encoder, torch.float32, scorer)
    log = Path(folder).absolute().parent / LOG
    if log.is_file():
        with atomic_path(output / LOG) as temporary:
            shutil.copyfile(log, temporary)


# --- for readers ----------------------------------------------------------------------------------------------------


def take_shipped(preset: Preset, shipped: Path = SHIPPED) -> list[str]:
    """Put what ships for a preset where training would have put it: captioners, and what they start from.

    What has been trained here stays; notebooks and ``capgen train`` find the rest as finished runs where
    ``CAPGEN_TRAIN`` is 0.

    Args:
        preset: whose captioners, encoder, small CLIP and language model are wanted.
        shipped: where they lie.

    Returns:
        The names of the captioners that are in place now and ship.

    Raises:
        CapGenError: an encoder or a CLIP was trained here that the captioners that ship do not know.
    """
    found = [model for model in preset.models if (shipped / f"{preset.name}_{model}" / "config.json").is_file()]
    for source, target in _starting_points(preset, found, shipped):
        _place(source, target)
    for model in found:
        bundle, run = shipped / f"{preset.name}_{model}", data_dir() / "runs" / f"{preset.name}_{model}"
        if not (run / "bundle" / "config.json").is_file():
            if (bundle / LOG).is_file():
                _copy(bundle / LOG, run / LOG)
            _copy(bundle, run / "bundle")
    return found


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
    language = shipped / mini_folder(preset).name
    if language.is_dir():
        yield language, mini_folder(preset)


def _place(source: Path, target: Path) -> None:
    """Copy a folder of weights, unless it is there already.

    Raises:
        CapGenError: another one is there.
    """
    if not (target / "model.safetensors").is_file():
        return _copy(source, target)
    remedy = "train the captioners too (TRAIN = True), or choose another data folder (CAPGEN_DATA)"
    hashes = [read_json(folder / "config.json", remedy).get("weights_hash") for folder in (source, target)]
    if hashes[0] != hashes[1]:
        raise CapGenError(f"{target} was trained here, and the captioners that ship know another one", remedy)


def _copy(source: Path, target: Path) -> None:
    with atomic_path(target) as temporary:
        if source.is_dir():
            shutil.copytree(source, temporary, ignore=shutil.ignore_patterns(LOG))
        else:
            shutil.copyfile(source, temporary)
