"""Pre-training of what captioners start from: encoder, small CLIP, language model (notebooks 02,
06 and 07)."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from capgen_utils.common.device import choose_device
from capgen_utils.common.files import CapGenError, atomic_path, read_json, write_json
from capgen_utils.common.hub import read_config
from capgen_utils.common.tensors import save_tensors
from capgen_utils.config import MINI, ClipGpt2Config
from capgen_utils.data.datasets import load_dataset
from capgen_utils.data.manifest import Manifest
from capgen_utils.models import CaptionModel, build_model
from capgen_utils.models.base import IGNORED, Memory, State
from capgen_utils.models.clip_gpt2 import SIZES, ClipGpt2Captioner, Gpt2Decoder, gpt2_config
from capgen_utils.presets import (
    Preset,
    dual_encoder_folder,
    encoder_folder,
    mini_folder,
    run_folder,
)
from capgen_utils.text.vocabulary import fit_tokenizer
from capgen_utils.text.words import Tokenizer, WordTokenizer
from capgen_utils.training.batches import TrainingData
from capgen_utils.training.clip import ContrastiveTrainer, measure
from capgen_utils.training.loop import named_below
from capgen_utils.training.trainer import Trainer
from capgen_utils.vision.dual_encoder import DualEncoder
from capgen_utils.vision.encoder import Encoder, Pixels
from capgen_utils.vision.encoders import build_encoder, new_shapes_cnn, save_encoder
from capgen_utils.vision.features import FeatureCache, extract
from capgen_utils.vision.preprocessing import Preprocessing

SHIFT = 4  # pixels; spatial relations stay true


def initialise(
    model: CaptionModel,
    preset: Preset,
    tokenizer: Tokenizer,
    root: Path | None = None,
    clip: DualEncoder | None = None,
) -> None:
    """Give a new captioner the trained networks that it starts from, if any.

    Args:
        model: untrained.
        preset: names the captions on which ``gpt2-mini`` is pre-trained, once.
        tokenizer: of the captioner.
        root: folder of the dataset; ``None`` for the usual one.
        clip: the CLIP whose image half is the encoder.

    Raises:
        CapGenError: the networks are not available, or do not fit.
    """
    model.load_pretrained(tokenizer, partial(pretrain_language_model, preset, root), clip)


# --- the encoder


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


def is_trained(folder: Path, preset: Preset) -> bool:
    """Return whether ``folder`` holds a trained network; only one process may go on to train it.

    Raises:
        CapGenError: it is not trained, and there are several processes.
    """
    trained = (folder / "model.safetensors").is_file()
    if not trained and PartialState().num_processes > 1:
        raise CapGenError(
            f"the encoder in {folder} is not trained yet",
            f"run first: capgen pretrain --preset {preset.name}",
        )
    return trained


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
    if is_trained(folder, preset):
        return folder
    print(f"pre-training the {preset.encoder} encoder once; it is kept in {folder}")
    manifest = load_dataset(preset.dataset, root)
    pixels = Pixels(new_shapes_cnn().preprocessing)
    data = TrainingData.extract(manifest, pixels, "pixels", dtype=torch.float32)
    tokenizer = WordTokenizer.fit(data.train.captions(), preset.min_count)
    torch.manual_seed(preset.pretraining.seed)
    encoder, run = new_shapes_cnn(), run_folder(folder)
    # Shifted images are regularisation enough.
    config = replace(preset.recipe("transformer").config, dropout=0.0)
    captioner = build_model("transformer", config, tokenizer, encoder.outputs["grid"])
    settings = preset.pretraining, preset.decoding, run, preset.name, torch.float32
    Trainer(JointCaptioner(encoder, captioner), tokenizer, data, pixels, *settings).train()
    best = load_file(run / "bundle" / "model.safetensors")
    encoder.trunk.load_state_dict(named_below("encoder.trunk", best))
    info = read_json(run / "bundle" / "config.json", "run pre-training again")
    encoder.training_run = info.get("training_run")
    save_encoder(folder, encoder.cpu())
    return folder


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
        captioner: one that reads one of the encoder's outputs, and learns from its words alone.
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

    def start(self, memory: Any) -> State:
        """See ``CaptionModel.start``."""
        return self.captioner.start(memory)

    def step(
        self, tokens: Tensor, state: Any, attention: bool = False
    ) -> tuple[Tensor, Any, Mapping[str, Tensor]]:
        """See ``CaptionModel.step``."""
        return self.captioner.step(tokens, state, attention)


# --- the small CLIP


def pretrain_dual_encoder(
    preset: Preset, root: Path | None = None, folder: Path | None = None, judge: bool = False
) -> Path:
    """Train the small CLIP of a preset from its image-caption pairs, unless it exists.

    Args:
        preset: names the dataset, the stem, the sizes and the training.
        root: folder of the dataset; ``None`` for the usual one.
        folder: where to keep it; ``None`` for ``dual_encoder_folder``.
        judge: train the second one, which only measures.

    Returns:
        The folder of the dual encoder.

    Raises:
        CapGenError: the dataset or the stem's weights are not available.
    """
    folder = folder or dual_encoder_folder(preset, judge)
    if is_trained(folder, preset):
        return folder
    recipe = preset.judge if judge else preset.clip
    stem = preset_encoder(preset, root)
    print(f"training a small CLIP on {stem.name} once; it is kept in {folder}")
    manifest = load_dataset(preset.dataset, root)
    seen = load_dataset(recipe.dataset) if recipe.dataset else manifest
    data = TrainingData.extract(seen, stem, "grid", preset.flip)
    tokenizer = fit_tokenizer(recipe.tokenizer, data.train.captions(), preset.min_count)
    torch.manual_seed(recipe.training.seed)
    dual = DualEncoder.new(recipe.sizes, stem, tokenizer)
    best = ContrastiveTrainer(dual, data, recipe.training, run_folder(folder)).train()
    best.clip.half().float()  # the precision of the file
    facts = best.images.training_run = dict(best.images.training_run or {})
    grid = extract(manifest, stem, "grid")
    for split in ("dev", "test"):
        if split in manifest.split_names():
            scores = measure(best.to(choose_device()), manifest.split(split), grid)
            facts[split] = {key: round(value, 2) for key, value in scores.items()}
            print(f"{split}: " + ", ".join(f"{key} {value:.1f}" for key, value in scores.items()))
    best.save(folder)
    return folder


# --- the language model


@dataclass
class NoImage(Memory):
    """The memory of B images that are not seen: (B, 0)."""

    nothing: Tensor


class LanguageModel(Gpt2Decoder):
    """GPT-2 that learns captions without their images; the best epoch has the lowest dev loss.

    It reads all captions of an image as one document. A single caption gives self-attention little
    to attend to. The second caption of a document largely repeats the first, and predicting it
    requires looking up which attribute belongs to which object. The captioner needs exactly this
    from its frozen layers.
    """

    name = MINI
    feature = "nothing"
    select_by_loss = True
    chunks = 1

    def encode(self, features: Tensor) -> NoImage:
        """(B, 0) -> the same."""
        return NoImage(features)

    def loss(
        self,
        memory: Any,
        tokens: Tensor,
        image: Tensor,
        targets: Tensor,
        label_smoothing: float = 0.0,
    ) -> Tensor:
        """Cross-entropy of documents, cut to GPT-2's positions; see ``CaptionModel.loss``."""
        tokens, targets = documents(tokens, targets, image, self.training)  # (I, T') each
        longest, rows = self.config.n_positions, torch.arange(len(tokens), device=tokens.device)
        tokens, targets = tokens[:, :longest], targets[:, :longest]
        return super().loss(memory, tokens, rows, targets, label_smoothing)


def documents(
    tokens: Tensor, targets: Tensor, image: Tensor, shuffle: bool
) -> tuple[Tensor, Tensor]:
    """Join the captions of each image into one document.

    Args:
        tokens, targets: (M, T), the token at each position and the next one; ``IGNORED`` for
            padding.
        image: (M,), the image of each caption.
        shuffle: join them in random order.

    Returns:
        Tokens and targets of the I images that have captions: (I, T') each.
    """
    real = targets != IGNORED  # (M, T)
    inputs, outputs = [], []
    for i in image.unique().tolist():
        rows = (image == i).nonzero()[:, 0]
        rows = rows[torch.randperm(len(rows)).to(rows.device)] if shuffle else rows
        inputs.append(torch.cat([tokens[row, real[row]] for row in rows]))
        outputs.append(torch.cat([targets[row, real[row]] for row in rows]))
    return pad_sequence(inputs, True), pad_sequence(outputs, True, IGNORED)


def pretrain_language_model(
    preset: Preset, root: Path | None = None, folder: Path | None = None
) -> Path:
    """Train a small GPT-2 on the preset's training captions, unless it exists.

    The state of the random number generators is the same afterwards.

    Args:
        preset: its recipe of ``clip_gpt2`` holds the sizes, ``language`` the training.
        root: folder of the dataset; ``None`` for the usual one.
        folder: where to keep it; ``None`` for ``mini_folder``.

    Returns:
        The folder, in the hub's layout (the library's ``GPT2LMHeadModel.from_pretrained`` reads
        it), with ``tokenizer.json`` as in a bundle.

    Raises:
        CapGenError: the preset starts from a published GPT-2, or the folder holds one of other
            sizes.
    """
    recipe = preset.recipe(ClipGpt2Captioner.name)
    config, folder = recipe.config, folder or mini_folder(preset)
    if config.language_model != MINI:
        raise CapGenError(
            f"the preset {preset.name} starts from {config.language_model}",
            "go on with: capgen train",
        )
    if (folder / "model.safetensors").is_file():
        remedy = f"delete {folder} and {run_folder(folder)}: the next training creates them again"
        kept = read_config(folder, remedy)
        if odd := [key for key in SIZES if kept.get(key) != getattr(config, key)]:
            raise CapGenError(f"the language model in {folder} has another {odd[0]}", remedy)
        return folder
    if PartialState().is_main_process:
        print(f"pre-training {MINI} once on the captions; it is kept in {folder}")
    manifest, run = load_dataset(preset.dataset, root), run_folder(folder)
    captions = manifest.split("train").captions()
    tokenizer = fit_tokenizer(recipe.tokenizer, captions, preset.min_count)
    with torch.random.fork_rng():
        torch.manual_seed(preset.language.seed)
        unknown = getattr(tokenizer, "unk_id", tokenizer.pad_id)
        model = LanguageModel(config, len(tokenizer), unknown)
        train_language_model(model, tokenizer, manifest, preset, run)
    if PartialState().is_main_process:
        save_as_hub(folder, config, tokenizer, load_file(run / "bundle" / "model.safetensors"))
    PartialState().wait_for_everyone()
    return folder


def train_language_model(
    model: LanguageModel, tokenizer: Tokenizer, manifest: Manifest, preset: Preset, run: Path
) -> None:
    """Train ``model`` as a captioner whose images have no features."""
    names = tuple(item.image for item in manifest.items)
    nothing = FeatureCache(Path("nothing"), names, np.zeros((len(names), 0), np.float16), {})
    data = TrainingData(manifest.split("train"), manifest.split("dev"), nothing)
    blind = Encoder("none", nn.Identity(), Preprocessing(), {LanguageModel.feature: (0,)})
    settings = preset.language, preset.decoding, run, preset.name, torch.float32
    Trainer(model, tokenizer, data, blind, *settings).train()


def save_as_hub(
    folder: Path, config: ClipGpt2Config, tokenizer: Tokenizer, weights: Mapping[str, Tensor]
) -> None:
    """Write a ``LanguageModel``'s weights as a ``GPT2LMHeadModel`` in the hub's layout."""
    settings = gpt2_config(
        config,
        len(tokenizer),
        architectures=["GPT2LMHeadModel"],
        bos_token_id=tokenizer.start_id,
        eos_token_id=tokenizer.end_id,
        pad_token_id=tokenizer.pad_id,
    )
    named = {f"transformer.{k.removeprefix('gpt2.')}": v.float() for k, v in weights.items()}
    with atomic_path(folder) as temporary:
        settings.save_pretrained(temporary)
        save_tensors(temporary / "model.safetensors", named, {"format": "pt"})
        write_json(temporary / "tokenizer.json", tokenizer.to_json())
