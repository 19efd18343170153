"""The language model ``gpt2-mini`` that CLIP + GPT-2 starts from (notebook 07)."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from capgen_utils.common.files import CapGenError, atomic_path, write_json
from capgen_utils.common.hub import read_config
from capgen_utils.common.tensors import save_tensors
from capgen_utils.config import MINI, ClipGpt2Config
from capgen_utils.data.datasets import load_dataset
from capgen_utils.data.manifest import Manifest
from capgen_utils.models import CaptionModel
from capgen_utils.models.base import IGNORED, Memory
from capgen_utils.models.clip_gpt2 import SIZES, ClipGpt2Captioner, Gpt2Decoder, gpt2_config
from capgen_utils.presets import Preset
from capgen_utils.text.vocabulary import fit_tokenizer
from capgen_utils.text.words import Tokenizer
from capgen_utils.training.batches import TrainingData
from capgen_utils.training.folders import mini_folder, run_folder
from capgen_utils.training.trainer import Trainer
from capgen_utils.vision.dual_encoder import DualEncoder
from capgen_utils.vision.encoder import Encoder
from capgen_utils.vision.features import FeatureCache
from capgen_utils.vision.preprocessing import Preprocessing


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
    language_model = partial(pretrain_language_model, preset, root)
    model.load_pretrained(tokenizer, language_model, clip)


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
        _trainer(config, tokenizer, manifest, preset, run).train()
    if PartialState().is_main_process:
        _save_as_hub(folder, config, tokenizer, load_file(run / "bundle" / "model.safetensors"))
    PartialState().wait_for_everyone()
    return folder


def _trainer(
    config: ClipGpt2Config, tokenizer: Tokenizer, manifest: Manifest, preset: Preset, run: Path
) -> Trainer:
    model = LanguageModel(config, len(tokenizer), getattr(tokenizer, "unk_id", tokenizer.pad_id))
    names = tuple(item.image for item in manifest.items)
    nothing = FeatureCache(Path("nothing"), names, np.zeros((len(names), 0), np.float16), {})
    data = TrainingData(manifest.split("train"), manifest.split("dev"), nothing)
    blind = Encoder("none", nn.Identity(), Preprocessing(), {LanguageModel.feature: (0,)})
    settings = preset.language, preset.decoding, run, preset.name, torch.float32
    return Trainer(model, tokenizer, data, blind, *settings)


def _save_as_hub(
    folder: Path, config: ClipGpt2Config, tokenizer: Tokenizer, weights: Mapping[str, Tensor]
) -> None:
    """Write a ``LanguageModel``'s weights as a ``GPT2LMHeadModel`` in the hub's layout."""
    ids = {
        "bos_token_id": tokenizer.start_id,
        "eos_token_id": tokenizer.end_id,
        "pad_token_id": tokenizer.pad_id,
    }
    settings = gpt2_config(config, len(tokenizer), architectures=["GPT2LMHeadModel"], **ids)
    named = {
        f"transformer.{key.removeprefix('gpt2.')}": value.float() for key, value in weights.items()
    }
    with atomic_path(folder) as temporary:
        settings.save_pretrained(temporary)
        save_tensors(temporary / "model.safetensors", named, {"format": "pt"})
        write_json(temporary / "tokenizer.json", tokenizer.to_json())
