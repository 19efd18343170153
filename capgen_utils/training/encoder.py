"""Pre-training of a preset's own small encoder, from image-caption pairs."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from capgen_utils.common.device import choose_device
from capgen_utils.common.files import CapGenError, read_json
from capgen_utils.common.paths import data_dir
from capgen_utils.data.datasets import load_dataset
from capgen_utils.models import build_model
from capgen_utils.models.base import CaptionModel, State
from capgen_utils.presets import Preset
from capgen_utils.text.words import WordTokenizer
from capgen_utils.training.batches import TrainingData
from capgen_utils.training.trainer import Trainer
from capgen_utils.vision.encoder import Encoder, Pixels
from capgen_utils.vision.encoders import build_encoder, new_shapes_cnn, save_encoder
from capgen_utils.vision.features import extract


def encoder_folder() -> Path:
    """Return where pre-training keeps the encoder of ``shapes``."""
    return data_dir() / "encoders" / "shapes_cnn"


def preset_encoder(
    preset: Preset, root: Path | None = None, weights: Path | None = None
) -> Encoder:
    """Return a preset's own encoder on the chosen device; where it has to be trained here it is
    trained first.

    Raises:
        CapGenError: its weights, or the dataset that it is trained on, cannot be had.
    """
    if weights is None and preset.pretraining is not None:
        pretrain_encoder(preset, root)
    return build_encoder(preset.encoder, weights).to(choose_device())


def pretrain_encoder(preset: Preset, root: Path | None = None, folder: Path | None = None) -> Path:
    """Train the preset's own small encoder from image-caption pairs, once; later calls find it.

    Encoder and a small transformer captioner learn together on the training split; the captioner is
    thrown away.

    Returns:
        The folder of the encoder.

    Raises:
        CapGenError: the preset's encoder is not one that is trained here.
    """
    if preset.pretraining is None:
        raise CapGenError(
            f"the encoder {preset.encoder} of preset {preset.name} needs no pre-training",
            "go on with: capgen train",
        )
    folder = folder or encoder_folder()
    if (folder / "model.safetensors").is_file():
        return folder
    print(f"pre-training the {preset.encoder} encoder once; it is kept in {folder}")
    manifest = load_dataset(preset.dataset, root)
    encoder = new_shapes_cnn()
    pixels = Pixels(encoder.preprocessing)
    train = manifest.split("train")
    data = TrainingData(
        train, manifest.split("dev"), extract(manifest, pixels, "pixels", dtype=torch.float32)
    )
    tokenizer = WordTokenizer.fit(train.captions(), preset.min_count)
    torch.manual_seed(preset.pretraining.seed)
    encoder = new_shapes_cnn()  # again, after the seed
    # Shifted images are enough against learning by heart.
    config = replace(preset.recipe("transformer").config, dropout=0.0)
    joint = JointCaptioner(
        encoder, build_model("transformer", config, tokenizer, encoder.outputs["grid"])
    )
    run = folder.parent / f"{folder.name}-run"
    Trainer(
        "joint",
        joint,
        tokenizer,
        data,
        pixels,
        preset.pretraining,
        preset.decoding,
        run,
        preset.name,
        torch.float32,
    ).train()
    best = load_file(run / "bundle" / "model.safetensors")
    prefix = "encoder.trunk."
    encoder.trunk.load_state_dict(
        {k.removeprefix(prefix): v.float() for k, v in best.items() if k.startswith(prefix)}
    )
    encoder.training_run = read_json(run / "bundle" / "config.json", "run pre-training again").get(
        "training_run"
    )
    save_encoder(folder, encoder.cpu())
    return folder


SHIFT = 4  # pixels; what is left of, or above, something stays so


def shifted(pixels: Tensor, furthest: int = SHIFT) -> Tensor:
    """Move each image (B, H, W, C) by up to ``furthest`` pixels along both axes; its edge is
    repeated."""
    height, width = pixels.shape[1:3]
    moves = torch.randint(-furthest, furthest + 1, (len(pixels), 2)).tolist()
    rows = [(torch.arange(height) + down).clamp(0, height - 1) for down, _ in moves]
    columns = [(torch.arange(width) + right).clamp(0, width - 1) for _, right in moves]
    return torch.stack([image[r][:, c] for image, r, c in zip(pixels, rows, columns, strict=True)])


class JointCaptioner(CaptionModel):
    """Reads pixels: ``encode`` runs the encoder's network, then the captioner's own ``encode``.

    Args:
        encoder: its ``trunk`` learns here; on its own it is frozen.
        captioner: any captioner that reads one of the encoder's outputs.
    """

    name = "joint"
    feature = "pixels"

    def __init__(self, encoder: Encoder, captioner: CaptionModel) -> None:
        super().__init__()
        self.encoder, self.captioner, self.config = encoder, captioner, captioner.config
        self.chunks = captioner.chunks
        encoder.trunk.requires_grad_(True)

    def encode(self, features: Tensor) -> Any:
        """``features`` are pixels (B, size, size, 3), 0 to 255; while training, each image is
        shifted a little.

        So the encoder meets every drawing in many places and learns shapes rather than drawings.
        """
        features = shifted(features) if self.training else features
        return self.captioner.encode(self.encoder(features)[self.captioner.feature])

    def forward(self, memory: Any, tokens: Tensor, image: Tensor) -> Tensor:
        """See ``CaptionModel.forward``."""
        return self.captioner(memory, tokens, image)

    def loss(
        self,
        memory: Any,
        tokens: Tensor,
        image: Tensor,
        targets: Tensor,
        label_smoothing: float = 0.0,
    ) -> Tensor:
        """See ``CaptionModel.loss``."""
        return self.captioner.loss(memory, tokens, image, targets, label_smoothing)

    def advance(self, share: float) -> None:
        """See ``CaptionModel.advance``."""
        self.captioner.advance(share)

    def start(self, memory: Any) -> State:
        """See ``CaptionModel.start``."""
        return self.captioner.start(memory)

    def step(
        self, tokens: Tensor, state: Any, attention: bool = False
    ) -> tuple[Tensor, Any, Mapping[str, Tensor]]:
        """See ``CaptionModel.step``."""
        return self.captioner.step(tokens, state, attention)
