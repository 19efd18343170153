"""Presets and hyperparameters as plain values, the data folder, and the choice of device and dtype."""

import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from capgen_utils.files import CapGenError
from capgen_utils.machine import REPOSITORY

Config = TypeVar("Config")
LARGEST_BEAM = 100  # hypotheses an image; memory grows with it, captions stop changing long before


@dataclass(frozen=True)
class TransformerConfig:
    """Hyperparameters of the ResNet + transformer captioner.

    Attributes:
        img_size: side of the square the encoder sees, in pixels.
        cnn_backbone: name of the image encoder, a key of ``encoders.ENCODERS``.
        seq_len: longest caption in tokens, start and end token included.
        d_model: width of the decoder.
        n_decode: number of decoder layers.
        n_head: attention heads in each layer; divides ``d_model``.
        fc_dim: width of the feed-forward layers.
        dropout: probability, on embeddings, attention outputs and feed-forward outputs alike.
        word_dropout: probability of hiding an input word while training (read as ``<unk>``), so that the
            decoder learns to look at the image instead of finishing the sentence by heart.
    """

    img_size: int = 224
    cnn_backbone: str = "resnet50"
    seq_len: int = 40
    d_model: int = 256
    n_decode: int = 3
    n_head: int = 8
    fc_dim: int = 1024
    dropout: float = 0.2
    word_dropout: float = 0.0


@dataclass(frozen=True)
class TrainingConfig:
    """How a captioner is trained; the same loop reads it for every model.

    Attributes:
        epochs: passes over the training images; training can end earlier, see ``patience``.
        batch_images: images in a batch, over all processes; each comes with all of its captions.
        learning_rate: peak of AdamW's learning rate, reached after ``warmup`` and left along a cosine.
        warmup: share of all steps spent warming up.
        weight_decay: AdamW's, on matrices only.
        label_smoothing: share of the target probability spread over the vocabulary.
        clip: largest gradient norm.
        average: decay of the exponential moving average of the weights that is evaluated and kept; 0 turns
            it off.
        patience: epochs without a better dev BLEU-4 after which training stops.
        evaluate_every: epochs between two evaluations on generated captions.
        dev_images: images of the dev split that are captioned in an evaluation; ``None`` for all.
        checkpoint_steps: steps between two checkpoints inside an epoch; one is written after each epoch too.
        seed: of weights, batches and dropout.
        dtype: compute dtype of training: ``auto``, ``fp32``, ``bf16`` or ``fp16``.
    """

    epochs: int = 20
    batch_images: int = 64
    learning_rate: float = 5e-4
    warmup: float = 0.05
    weight_decay: float = 0.05
    label_smoothing: float = 0.1
    clip: float = 1.0
    average: float = 0.0
    patience: int = 5
    evaluate_every: int = 1
    dev_images: int | None = None
    checkpoint_steps: int = 500
    seed: int = 1
    dtype: str = "auto"


@dataclass(frozen=True)
class DecodingConfig:
    """How captions are searched for.

    Attributes:
        beam: hypotheses kept for an image; 1 is greedy search.
        max_length: tokens a caption may have, its end token included.
        length_penalty: a hypothesis of n tokens, its end token counted, is ranked by
            log-probability / n ** length_penalty.
    """

    beam: int = 5
    max_length: int = 39
    length_penalty: float = 1.0


@dataclass(frozen=True)
class Preset:
    """Everything that one word on the command line chooses. No module branches on ``name``.

    Attributes:
        name: what the user types.
        dataset: a key of ``datasets.DATASETS``.
        encoder: a key of ``encoders.ENCODERS``.
        flip: also train on mirrored images (captions that say left or right are left out of that view).
        min_count: occurrences a word needs in the training captions to enter the vocabulary.
        model: hyperparameters by model name.
        training: of the captioner.
        pretraining: of the encoder, where the preset's encoder has to be trained first; else ``None``.
        decoding: the defaults that go into the bundle.
    """

    name: str
    dataset: str
    encoder: str
    flip: bool = False
    min_count: int = 5
    model: Mapping[str, Any] = field(default_factory=lambda: {"transformer": TransformerConfig()})
    training: TrainingConfig = TrainingConfig()
    pretraining: TrainingConfig | None = None
    decoding: DecodingConfig = DecodingConfig()


# Drawn scenes are clean and plentiful: nothing needs smoothing or dropping, and all epochs are worth their seconds.
SHAPES_TRAINING = TrainingConfig(
    epochs=16,
    batch_images=32,
    learning_rate=2e-3,
    weight_decay=0.01,
    label_smoothing=0.0,
    average=0.99,
    patience=16,
)

PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset(
            name="shapes",
            dataset="shapes",
            encoder="shapes_cnn",
            min_count=1,
            model={
                "transformer": TransformerConfig(
                    img_size=64,
                    cnn_backbone="shapes_cnn",
                    seq_len=26,
                    d_model=128,
                    n_decode=2,
                    n_head=4,
                    fc_dim=512,
                    dropout=0.1,
                )
            },  # fmt: skip
            training=SHAPES_TRAINING,
            pretraining=replace(SHAPES_TRAINING, epochs=22),
            decoding=DecodingConfig(beam=3, max_length=25),
        ),
        Preset(
            name="flickr8k",
            dataset="flickr8k",
            encoder="efficientnet_lite0",
            flip=True,
            model={
                "transformer": TransformerConfig(
                    cnn_backbone="efficientnet_lite0",
                    seq_len=26,
                    d_model=384,
                    n_decode=3,
                    n_head=8,
                    fc_dim=1024,
                    dropout=0.3,
                )
            },  # fmt: skip
            training=TrainingConfig(epochs=17, batch_images=64, learning_rate=8e-4, average=0.999, patience=6),
            decoding=DecodingConfig(beam=5, max_length=25, length_penalty=0.5),
        ),
        Preset(name="flickr30k", dataset="flickr30k", encoder="resnet50", flip=True),
        Preset(name="coco", dataset="coco", encoder="resnet50", flip=True),
        Preset(name="folder", dataset="folder", encoder="efficientnet_lite0", min_count=2),
    )
}


def get_preset(name: str) -> Preset:
    """Return a preset; ``auto`` is ``flickr8k`` where there is a GPU and ``shapes`` elsewhere.

    Raises:
        CapGenError: no such preset; lists those there are.
    """
    if name == "auto":
        name = "flickr8k" if choose_device().type in ("cuda", "mps") else "shapes"
    if name not in PRESETS:
        raise CapGenError(f"there is no preset {name!r}", f"choose one of auto, {', '.join(PRESETS)}")
    return PRESETS[name]


def from_dict(kind: type[Config], values: Mapping[str, Any]) -> Config:
    """Build the dataclass ``kind`` from JSON values.

    Raises:
        CapGenError: a key that ``kind`` does not have, or a value of the wrong type.
    """
    known = {f.name: f for f in fields(kind)}  # type: ignore[arg-type]
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise CapGenError(
            f"{kind.__name__} does not know {', '.join(unknown)}",
            "the file was written by another version of CapGen: use that version, or train again",
        )
    defaults = asdict(kind())  # type: ignore[call-overload]
    for key, value in values.items():
        default = defaults[key]
        accepted = (
            (int, float) if isinstance(default, float) else (int, type(None)) if default is None else type(default)
        )
        possible = isinstance(value, accepted) and isinstance(value, bool) == isinstance(default, bool)
        if not possible or (isinstance(value, float) and not math.isfinite(value)):
            raise CapGenError(f"{kind.__name__}.{key} cannot be {value!r}", f"use a value like {defaults[key]!r}")
    return kind(**values)


def data_dir() -> Path:
    """Return the folder for downloads, features and runs: ``CAPGEN_DATA``, or ``data/`` of the repository."""
    return Path(os.environ.get("CAPGEN_DATA") or REPOSITORY / "data").expanduser()


def choose_device(name: str = "auto") -> torch.device:
    """Return the named device, or the best one at hand: CUDA, then Apple's MPS, then the CPU.

    Raises:
        CapGenError: no such device, or this machine has none.
    """
    if name != "auto":
        try:
            torch.empty(0, device=name)
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            reason = str(error).splitlines()[0]
            raise CapGenError(
                f"the device {name!r} cannot be used ({reason})",
                "choose one of auto, cpu, cuda, mps that this machine has",
            ) from error
        return torch.device(name)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def cpu_has_bf16() -> bool:
    """Whether the processor multiplies bfloat16 matrices itself (AMX or AVX512-BF16)."""
    checks = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(bool(getattr(torch.cpu, check, bool)()) for check in checks)


def choose_dtype(device: torch.device, name: str = "auto") -> torch.dtype:
    """Return the compute dtype for ``device``.

    ``auto`` is bf16 where the hardware has it (CUDA compute capability 8.0 and above, CPUs with AMX or
    AVX512-BF16), fp16 on older CUDA devices such as the T4, where bf16 is emulated and slow, else fp32.

    Raises:
        CapGenError: ``name`` is none of auto, fp32, bf16, fp16.
    """
    named = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if name in named:
        return named[name]
    if name != "auto":
        raise CapGenError(f"there is no dtype {name!r}", f"choose one of auto, {', '.join(named)}")
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16
    if device.type == "cpu" and cpu_has_bf16():
        return torch.bfloat16
    return torch.float32
