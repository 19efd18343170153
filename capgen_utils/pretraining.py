"""Pre-training of a preset's own small encoder, from image-caption pairs."""

from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file

from capgen_utils.batches import TrainingData
from capgen_utils.config import choose_device, data_dir
from capgen_utils.datasets import load_dataset
from capgen_utils.encoders import Encoder, Pixels, build_encoder, new_shapes_cnn, save_encoder
from capgen_utils.features import extract
from capgen_utils.files import CapGenError, read_json
from capgen_utils.models import JointCaptioner, build_model
from capgen_utils.presets import Preset
from capgen_utils.text import WordTokenizer
from capgen_utils.training import Trainer


def encoder_folder() -> Path:
    """Return where pre-training keeps the encoder of ``shapes``."""
    return data_dir() / "encoders" / "shapes_cnn"


def preset_encoder(preset: Preset, root: Path | None = None, weights: Path | None = None) -> Encoder:
    """Return a preset's own encoder on the chosen device; where it has to be trained here it is trained first.

    Raises:
        CapGenError: its weights, or the dataset that it is trained on, cannot be had.
    """
    if weights is None and preset.pretraining is not None:
        pretrain_encoder(preset, root)
    return build_encoder(preset.encoder, weights).to(choose_device())


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
    # Shifted images are enough against learning by heart.
    config = replace(preset.recipe("transformer").config, dropout=0.0)
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
