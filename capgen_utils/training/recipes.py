"""From a preset to a trained captioner: data, encoder, features, vocabulary, training, in the order
they depend on."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from capgen_utils.common.device import choose_device, choose_dtype
from capgen_utils.common.files import CapGenError
from capgen_utils.config import SMALL_CLIP, TrainingConfig
from capgen_utils.data.datasets import load_dataset
from capgen_utils.data.manifest import Manifest
from capgen_utils.models import CaptionModel, build_model, feature_of
from capgen_utils.models.clip_prefix import ClipPrefixCaptioner
from capgen_utils.presets import Preset, Recipe
from capgen_utils.text.vocabulary import fit_tokenizer, token_rows
from capgen_utils.text.words import Tokenizer
from capgen_utils.training.batches import TrainingData
from capgen_utils.training.clip import dual_encoder_folder, pretrain_dual_encoder
from capgen_utils.training.encoder import encoder_folder, pretrain_encoder
from capgen_utils.training.language import fit_config, initialise
from capgen_utils.training.trainer import Trainer
from capgen_utils.vision.clip import CLIPS
from capgen_utils.vision.dual_encoder import DualEncoder
from capgen_utils.vision.encoder import Encoder
from capgen_utils.vision.encoders import build_encoder
from capgen_utils.vision.features import extract


@dataclass(frozen=True)
class Prepared:
    """Everything that training needs, computed once.

    Attributes:
        preset: as asked for, with the encoder that is really used.
        recipe: how the captioner that this was prepared for is trained.
        manifest: all splits.
        encoder: frozen, on its device.
        dtype: compute dtype of the features.
        tokenizer: fitted on the training captions.
        data: images, captions and features.
        root: folder of the dataset, as asked for.
        scorer: the CLIP that chooses among captions, where the encoder is its image half.
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


def prepare(
    preset: Preset,
    root: Path | None = None,
    encoder_weights: Path | None = None,
    limit: int | None = None,
    model: str = "transformer",
) -> Prepared:
    """Load data, encoder and features; what is missing and can be made here is made, with progress.

    Args:
        preset: names dataset and encoder.
        root: folder of the dataset, where it is not in its usual place.
        encoder_weights: a local weights file.
        limit: images of each split, for a quick look.
        model: the captioner to prepare for: a key of ``models.MODELS``.

    Raises:
        CapGenError: the dataset or the weights cannot be had; says what to do.
    """
    recipe = preset.recipe(model)
    state = PartialState()
    with (
        state.main_process_first()
    ):  # of several processes one draws the data set, the others find it
        manifest = load_dataset(preset.dataset, root, limit)
    encoder, scorer = _encoder(preset, recipe, root, encoder_weights)
    output = feature_of(model, recipe.config)
    train = manifest.split("train")
    with state.main_process_first():  # and one writes the features
        flipped = extract(train, encoder, output, flip=True) if preset.flip else None
        plain = extract(manifest, encoder, output)
    data = TrainingData(train, manifest.split("dev"), plain, flipped)
    tokenizer = fit_tokenizer(recipe.tokenizer, train.captions(), preset.min_count)
    return Prepared(
        preset,
        recipe,
        manifest,
        encoder,
        choose_dtype(choose_device()),
        tokenizer,
        data,
        root,
        scorer,
    )


def _encoder(
    preset: Preset, recipe: Recipe, root: Path | None, weights: Path | None
) -> tuple[Encoder, DualEncoder | None]:
    """The recipe's encoder, and the CLIP that it is half of; what has to be trained here for it is
    trained first."""
    if (
        recipe.encoder in CLIPS and recipe.tokenizer == "clip"
    ):  # it starts from the words of the text half
        with PartialState().main_process_first():
            scorer = DualEncoder.published(str(recipe.encoder), weights).to(choose_device())
            return scorer.images, scorer
    if recipe.encoder == SMALL_CLIP:
        folder = dual_encoder_folder(preset)
        _refuse_to_share(folder, preset)
        pretrain_dual_encoder(preset, root, folder, stem_weights=weights)
        with PartialState().main_process_first():
            scorer = DualEncoder.load(folder, weights).to(choose_device())
            return scorer.images, scorer
    if weights is None and preset.pretraining is not None and recipe.encoder == preset.encoder:
        _refuse_to_share(encoder_folder(), preset)
        pretrain_encoder(preset, root)
    with PartialState().main_process_first():
        return build_encoder(str(recipe.encoder), weights).to(choose_device()), None


def _refuse_to_share(folder: Path, preset: Preset) -> None:
    """Refuse to train an encoder in several processes at once.

    Raises:
        CapGenError: it is not in ``folder`` yet.
    """
    if PartialState().num_processes > 1 and not (folder / "model.safetensors").is_file():
        raise CapGenError(
            f"the encoder in {folder} is not trained yet",
            f"run first: capgen pretrain --preset {preset.name}",
        )


def _fit_tower(config: Any, clip: DualEncoder | None) -> Any:
    """Return a captioner's hyperparameters, with the sizes of the text tower that it is going to
    read words by."""
    if clip is None or getattr(config, "text_inputs", "") != "tower":
        return config
    text = clip.clip.config.text_config
    return replace(
        config,
        tower_layers=text.num_hidden_layers,
        tower_width=text.hidden_size,
        tower_heads=text.num_attention_heads,
        tower_positions=text.max_position_embeddings,
    )


def _start_from_clip(model: CaptionModel, prepared: Prepared) -> None:
    """Let a captioner that starts from CLIP's words start from those of the CLIP that it sees by."""
    clip = prepared.scorer
    if not isinstance(model, ClipPrefixCaptioner) or clip is None:
        return
    rows = token_rows(clip.tokenizer, prepared.tokenizer)
    if rows is not None:
        model.start_from(clip.clip.text_model, rows)
    elif model.tower is not None:
        raise CapGenError(
            f"{clip.name} reads other tokens than the captioner",
            "read learned words (text_inputs), or train it again",
        )


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
        CapGenError: the preset says nothing of this model, or it needs other features or tokens
            than were prepared.
    """
    recipe = prepared.preset.recipe(model_name)
    config, training = (
        fit_config(model_config or recipe.config),
        training or recipe.training or TrainingConfig(),
    )
    torch.manual_seed(training.seed)
    output = feature_of(model_name, config)
    shape = prepared.encoder.outputs.get(output)
    if (recipe.encoder, recipe.tokenizer) != (
        prepared.recipe.encoder,
        prepared.recipe.tokenizer,
    ) or (shape != prepared.data.plain.shape):
        raise CapGenError(
            f"what was prepared is not what {model_name} reads",
            f"call prepare(preset, model={model_name!r})",
        )
    config = _fit_tower(config, prepared.scorer)
    model = build_model(model_name, config, prepared.tokenizer, shape)
    initialise(model, prepared.preset, prepared.tokenizer, prepared.root)
    _start_from_clip(model, prepared)
    return Trainer(
        model_name,
        model,
        prepared.tokenizer,
        prepared.data,
        prepared.encoder,
        training,
        recipe.decoding or prepared.preset.decoding,
        folder,
        prepared.preset.name,
        prepared.dtype,
        trackers,
        scorer=prepared.scorer,
    )
