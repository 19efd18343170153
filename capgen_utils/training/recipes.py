"""From a preset to a trained captioner: data, encoder, features, vocabulary, training (notebook
05)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from capgen_utils.bundle import load_bundle
from capgen_utils.captioner import Captioner
from capgen_utils.common.device import choose_device, choose_dtype
from capgen_utils.common.files import CapGenError
from capgen_utils.config import SMALL_CLIP, Recipe, TrainingConfig
from capgen_utils.data.datasets import load_dataset
from capgen_utils.data.manifest import Manifest
from capgen_utils.models import build_model, model_class
from capgen_utils.presets import Preset, get_preset, run_of
from capgen_utils.text.vocabulary import fit_tokenizer
from capgen_utils.text.words import Tokenizer
from capgen_utils.training.batches import TrainingData
from capgen_utils.training.loop import Progress
from capgen_utils.training.pretraining import initialise, preset_encoder, pretrain_dual_encoder
from capgen_utils.training.trainer import Trainer
from capgen_utils.vision.clip import CLIPS
from capgen_utils.vision.dual_encoder import DualEncoder
from capgen_utils.vision.encoder import Encoder


@dataclass(frozen=True)
class Prepared:
    """Everything that training needs, computed once.

    Attributes:
        preset: with a recipe for the captioner.
        recipe: how the captioner is trained.
        manifest: all splits.
        encoder: frozen, on its device.
        dtype: compute dtype of the features.
        tokenizer: fitted on the training captions.
        data: images, captions and features.
        root: folder of the dataset, as asked for.
        scorer: the CLIP for re-ranking captions, if the encoder is its image half.
    """

    preset: Preset
    recipe: Recipe
    manifest: Manifest
    encoder: Encoder
    dtype: torch.dtype
    tokenizer: Tokenizer
    data: TrainingData
    root: Path | None = None
    scorer: DualEncoder | None = None


@dataclass
class Run:
    """A finished training run.

    Attributes:
        trainer: with the model after the last epoch.
        progress: best scores, duration and history.
    """

    trainer: Trainer
    progress: Progress

    @property
    def folder(self) -> Path:
        """The run folder: ``bundle/``, ``checkpoint.safetensors`` and ``log.jsonl``."""
        return self.trainer.folder

    @property
    def history(self) -> list[dict[str, Any]]:
        """Losses and dev scores, one entry per epoch."""
        return self.progress.history

    @cached_property
    def captioner(self) -> Captioner:
        """The captioner of the best epoch."""
        bundle = load_bundle(self.folder / "bundle")
        return Captioner(bundle, self.trainer.encoder, scorer=self.trainer.scorer)


def train(
    model: str = "transformer",
    *,
    preset: str | Preset = "auto",
    data: Path | None = None,
    folder: Path | None = None,
    limit: int | None = None,
    trackers: Sequence[str] = (),
    **settings: Any,
) -> Run:
    """Train a captioner, or continue a run that was interrupted, as ``capgen train`` does.

    Args:
        model: a key of ``models.MODELS``.
        preset: a name or a ``Preset``.
        data: folder of the dataset; ``None`` for the usual one.
        folder: run folder; ``None`` for ``data/runs/PRESET_MODEL``.
        limit: images of each split, for a quick look.
        trackers: ``tensorboard``, ``wandb``.
        settings: fields of ``TrainingConfig`` that replace the preset's, such as ``epochs``.

    Raises:
        CapGenError: the dataset or the weights are not available, or a setting is impossible.
    """
    if any(isinstance(value, int | float) and value <= 0 for value in settings.values()):
        raise CapGenError(
            "epochs, batch size, learning rate and seed must be above zero",
            "see: capgen train --help",
        )
    preset = get_preset(preset) if isinstance(preset, str) else preset
    preset = preset.including(model, model_class(model).recipe)
    training = replace(preset.recipe(model).training or TrainingConfig(), **settings)
    folder = folder or run_of(preset, model)
    prepared = prepare(preset, data, limit, model)
    trainer = make_trainer(prepared, model, folder, training, trackers=trackers)
    return Run(trainer, trainer.train())


def prepare(
    preset: Preset,
    root: Path | None = None,
    limit: int | None = None,
    model: str = "transformer",
) -> Prepared:
    """Load data, encoder, features and vocabulary, creating what does not exist yet.

    Args:
        preset: names dataset, encoder and the encoder's weights.
        root: folder of the dataset; ``None`` for the usual one.
        limit: images of each split, for a quick look.
        model: the captioner to prepare for: a key of ``models.MODELS``.

    Raises:
        CapGenError: the dataset or the weights are not available; says what to do.
    """
    preset = preset.including(model, model_class(model).recipe)
    recipe, state = preset.recipe(model), PartialState()
    with state.main_process_first():  # one process downloads or draws the dataset
        manifest = load_dataset(preset.dataset, root, limit)
    encoder, scorer = _encoder(preset, recipe, root)
    with state.main_process_first():  # one process extracts the features
        output = model_class(model).feature_of(recipe.config)
        data = TrainingData.extract(manifest, encoder, output, preset.flip)
    tokenizer = fit_tokenizer(recipe.tokenizer, data.train.captions(), preset.min_count)
    dtype = choose_dtype(choose_device())
    return Prepared(preset, recipe, manifest, encoder, dtype, tokenizer, data, root, scorer)


def _encoder(
    preset: Preset, recipe: Recipe, root: Path | None
) -> tuple[Encoder, DualEncoder | None]:
    """Return the recipe's encoder and the CLIP that it is half of, training them if necessary."""
    name, load = str(recipe.encoder), partial(DualEncoder.published, str(recipe.encoder))
    if name == SMALL_CLIP:
        load = partial(DualEncoder.load, pretrain_dual_encoder(preset, root))
    elif name not in CLIPS or recipe.tokenizer != "clip":
        return preset_encoder(preset, root, name), None
    with PartialState().main_process_first():  # the captioner starts from the text half's words
        scorer = load(preset.encoder_weights).to(choose_device())
    return scorer.images, scorer


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
        trackers: see ``Loop``.

    Raises:
        CapGenError: the preset has no recipe for this model, or it needs other features or tokens
            than those prepared.
    """
    preset, encoder, tokenizer = prepared.preset, prepared.encoder, prepared.tokenizer
    recipe, kind = preset.recipe(model_name), model_class(model_name)
    training = training or recipe.training or TrainingConfig()
    config = kind.fit_config(model_config or recipe.config, prepared.scorer)
    torch.manual_seed(training.seed)
    shape = encoder.outputs.get(kind.feature_of(config))
    expected = recipe.encoder, recipe.tokenizer, shape
    made = prepared.recipe.encoder, prepared.recipe.tokenizer, prepared.data.plain.shape
    if shape is None or expected != made:
        raise CapGenError(
            f"the prepared data does not fit {model_name}",
            f"call prepare(preset, model={model_name!r})",
        )
    model = build_model(model_name, config, tokenizer, shape)
    initialise(model, preset, tokenizer, prepared.root, prepared.scorer)
    decoding = recipe.decoding or preset.decoding
    settings = training, decoding, folder, preset.name, prepared.dtype, trackers
    return Trainer(model, tokenizer, prepared.data, encoder, *settings, scorer=prepared.scorer)
