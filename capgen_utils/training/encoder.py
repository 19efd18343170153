"""Pre-training of a preset's own small encoder, from image-caption pairs (notebook 02)."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors.torch import load_file
from torch import Tensor

from capgen_utils.common.device import choose_device
from capgen_utils.common.files import CapGenError, read_json
from capgen_utils.data.datasets import load_dataset
from capgen_utils.models import build_model
from capgen_utils.models.base import CaptionModel, State
from capgen_utils.presets import Preset
from capgen_utils.text.words import WordTokenizer
from capgen_utils.training.batches import TrainingData
from capgen_utils.training.folders import encoder_folder, run_folder
from capgen_utils.training.trainer import Trainer
from capgen_utils.vision.encoder import Encoder, Pixels
from capgen_utils.vision.encoders import build_encoder, new_shapes_cnn, save_encoder
from capgen_utils.vision.features import extract


def preset_encoder(preset: Preset, root: Path | None = None, name: str | None = None) -> Encoder:
    """Return an encoder on the chosen device; the preset's own is trained first if necessary.

    Args:
        preset: names the encoder and its weights.
        root: folder of the dataset; ``None`` for the usual one.
        name: another encoder instead of the preset's.

    Raises:
        CapGenError: its weights, or the dataset that it is trained on, are not available.
    """
    trained_here = preset.pretraining is not None and name in (None, preset.encoder)
    if preset.encoder_weights is None and trained_here:
        pretrain_encoder(preset, root)
    with PartialState().main_process_first():
        return build_encoder(name or preset.encoder, preset.encoder_weights).to(choose_device())


def require_one_process(folder: Path, preset: Preset) -> None:
    """Check that no encoder is about to be trained by several processes at once.

    Raises:
        CapGenError: it is.
    """
    if PartialState().num_processes > 1:
        raise CapGenError(
            f"the encoder in {folder} is not trained yet",
            f"run first: capgen pretrain --preset {preset.name}",
        )


def pretrain_encoder(preset: Preset, root: Path | None = None, folder: Path | None = None) -> Path:
    """Train the preset's own small encoder from image-caption pairs, unless it exists.

    The encoder and a small transformer captioner learn together on the training split; the
    captioner is discarded.

    Returns:
        The folder of the encoder.

    Raises:
        CapGenError: the preset's encoder is not trained here.
    """
    if preset.pretraining is None:
        raise CapGenError(
            f"the encoder {preset.encoder} of preset {preset.name} needs no pre-training",
            "go on with: capgen train",
        )
    folder = folder or encoder_folder()
    if (folder / "model.safetensors").is_file():
        return folder
    require_one_process(folder, preset)
    print(f"pre-training the {preset.encoder} encoder once; it is kept in {folder}")
    manifest = load_dataset(preset.dataset, root)
    train, dev = manifest.split("train"), manifest.split("dev")
    pixels = Pixels(new_shapes_cnn().preprocessing)
    data = TrainingData(train, dev, extract(manifest, pixels, "pixels", dtype=torch.float32))
    tokenizer = WordTokenizer.fit(train.captions(), preset.min_count)
    torch.manual_seed(preset.pretraining.seed)
    encoder, run = new_shapes_cnn(), run_folder(folder)
    # Shifted images are regularisation enough.
    config = replace(preset.recipe("transformer").config, dropout=0.0)
    captioner = build_model("transformer", config, tokenizer, encoder.outputs["grid"])
    joint = JointCaptioner(encoder, captioner)
    settings = preset.pretraining, preset.decoding, run, preset.name, torch.float32
    Trainer(joint, tokenizer, data, pixels, *settings).train()
    best, prefix = load_file(run / "bundle" / "model.safetensors"), "encoder.trunk."
    trunk = {k.removeprefix(prefix): v.float() for k, v in best.items() if k.startswith(prefix)}
    encoder.trunk.load_state_dict(trunk)
    info = read_json(run / "bundle" / "config.json", "run pre-training again")
    encoder.training_run = info.get("training_run")
    save_encoder(folder, encoder.cpu())
    return folder


SHIFT = 4  # pixels; spatial relations stay true


def shifted(pixels: Tensor, furthest: int = SHIFT) -> Tensor:
    """Shift each image (B, H, W, C) by up to ``furthest`` pixels per axis, repeating edges."""
    height, width = pixels.shape[1:3]
    moves = torch.randint(-furthest, furthest + 1, (len(pixels), 2)).tolist()
    rows = [(torch.arange(height) + down).clamp(0, height - 1) for down, _ in moves]
    columns = [(torch.arange(width) + right).clamp(0, width - 1) for _, right in moves]
    return torch.stack([image[r][:, c] for image, r, c in zip(pixels, rows, columns, strict=True)])


class JointCaptioner(CaptionModel):
    """A captioner that reads pixels, with an encoder that learns too.

    Args:
        encoder: its ``trunk`` learns here; everywhere else it is frozen.
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
        """Encode pixels (B, size, size, 3), 0 to 255; while training, each image is shifted.

        The encoder then sees every drawing at many positions and learns shapes, not drawings.
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
