"""From a preset to a trained captioner: data, encoder, features, vocabulary, training, in the order they depend on."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors.torch import load_file

from capgen_utils.batches import TrainingData
from capgen_utils.checkpoint import save_encoder
from capgen_utils.config import Preset, TrainingConfig, choose_device, choose_dtype, data_dir
from capgen_utils.datasets import Manifest, load_dataset
from capgen_utils.encoders import Encoder, Pixels, build_encoder, new_shapes_cnn
from capgen_utils.features import extract
from capgen_utils.files import CapGenError, read_json
from capgen_utils.models import JointCaptioner, build_model
from capgen_utils.text import Tokenizer, WordTokenizer
from capgen_utils.training import Trainer


@dataclass(frozen=True)
class Prepared:
    """Everything that training needs, computed once.

    Attributes:
        preset: as asked for, with the encoder that is really used.
        manifest: all splits.
        encoder: frozen, on its device.
        dtype: compute dtype of the features.
        tokenizer: fitted on the training captions.
        data: images, captions and features.
    """

    preset: Preset
    manifest: Manifest
    encoder: Encoder
    dtype: torch.dtype
    tokenizer: Tokenizer
    data: TrainingData


def encoder_folder() -> Path:
    """Return where pre-training keeps the encoder of ``shapes``."""
    return data_dir() / "encoders" / "shapes_cnn"


def prepare(
    preset: Preset,
    root: Path | None = None,
    encoder_weights: Path | None = None,
    limit: int | None = None,
    output: str = "grid",
) -> Prepared:
    """Load data, encoder and features; what is missing and can be made here is made, with progress.

    Args:
        preset: names dataset and encoder.
        root: folder of the dataset, where it is not in its usual place.
        encoder_weights: a local weights file.
        limit: images of each split, for a quick look.
        output: of the encoder, such as ``grid``.

    Raises:
        CapGenError: the dataset or the weights cannot be had; says what to do.
    """
    state = PartialState()
    with state.main_process_first():  # of several processes one draws the data set, the others find it
        manifest = load_dataset(preset.dataset, root, limit)
    if preset.pretraining is not None and encoder_weights is None:
        if state.num_processes > 1 and not (encoder_folder() / "model.safetensors").is_file():
            raise CapGenError(
                f"the encoder {preset.encoder} is not trained yet", f"run first: capgen pretrain --preset {preset.name}"
            )
        pretrain_encoder(preset, root)
    device = choose_device()
    with state.main_process_first():  # and one writes the features
        encoder = build_encoder(preset.encoder, encoder_weights).to(device)
        train = manifest.split("train")
        flipped = extract(train, encoder, output, flip=True) if preset.flip else None
        plain = extract(manifest, encoder, output)
    data = TrainingData(train, manifest.split("dev"), plain, flipped)
    tokenizer = WordTokenizer.fit(train.captions(), preset.min_count)
    return Prepared(preset, manifest, encoder, choose_dtype(device), tokenizer, data)


def model_settings(preset: Preset, model_name: str) -> Any:
    """Return the hyperparameters that ``preset`` has for a model.

    Raises:
        CapGenError: it has none.
    """
    if model_name not in preset.model:
        raise CapGenError(
            f"the preset {preset.name} has no model {model_name!r}", f"choose one of {', '.join(preset.model)}"
        )
    return preset.model[model_name]


def make_trainer(
    prepared: Prepared,
    model_name: str,
    folder: Path,
    training: TrainingConfig | None = None,
    model_config: Any = None,
    trackers: Sequence[str] = (),
) -> Trainer:
    """Build a captioner, seeded, and its trainer.

    Args:
        prepared: from ``prepare``.
        model_name: key in ``models.MODELS``.
        folder: gets bundle, checkpoint and log.
        training, model_config: instead of the preset's.
        trackers: see ``Trainer``.

    Raises:
        CapGenError: the preset says nothing of this model.
    """
    preset = prepared.preset
    config = model_config or model_settings(preset, model_name)
    training = training or preset.training
    torch.manual_seed(training.seed)
    shape = prepared.encoder.outputs["grid"]
    model = build_model(model_name, config, prepared.tokenizer, shape)
    return Trainer(
        model_name, model, prepared.tokenizer, prepared.data, prepared.encoder, training,
        preset.decoding, folder, preset.name, prepared.dtype, trackers,
    )  # fmt: skip


def pretrain_encoder(preset: Preset, root: Path | None = None, folder: Path | None = None) -> Path:
    """Train the preset's own small encoder from image-caption pairs, once; later calls find it.

    Encoder and a small transformer captioner learn together on the training split; the captioner is thrown away.

    Returns:
        The folder of the encoder.

    Raises:
        CapGenError: the preset's encoder is not one that is trained here.
    """
    if preset.pretraining is None:
        raise CapGenError(
            f"the encoder {preset.encoder} of preset {preset.name} needs no pre-training", "go on with: capgen train"
        )
    folder = folder or encoder_folder()
    if (folder / "model.safetensors").is_file():
        return folder
    print(f"pre-training the {preset.encoder} encoder once; it is kept in {folder}")
    manifest = load_dataset(preset.dataset, root)
    encoder = new_shapes_cnn()
    pixels = Pixels(encoder.preprocessing)
    train = manifest.split("train")
    data = TrainingData(train, manifest.split("dev"), extract(manifest, pixels, "pixels", dtype=torch.float32))
    tokenizer = WordTokenizer.fit(train.captions(), preset.min_count)
    torch.manual_seed(preset.pretraining.seed)
    encoder = new_shapes_cnn()  # again, after the seed
    config = replace(preset.model["transformer"], dropout=0.0)  # shifted images are enough against learning by heart
    joint = JointCaptioner(encoder, build_model("transformer", config, tokenizer, encoder.outputs["grid"]))
    run = folder.parent / f"{folder.name}-run"
    Trainer(
        "joint", joint, tokenizer, data, pixels, preset.pretraining, preset.decoding, run, preset.name, torch.float32
    ).train()
    best = load_file(run / "bundle" / "model.safetensors")
    prefix = "encoder.trunk."
    encoder.trunk.load_state_dict({k.removeprefix(prefix): v.float() for k, v in best.items() if k.startswith(prefix)})
    encoder.training_run = read_json(run / "bundle" / "config.json", "run pre-training again").get("training_run")
    save_encoder(folder, encoder.cpu())
    return folder
