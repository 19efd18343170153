"""Presets: everything that one word on the command line chooses (notebook 00)."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from capgen_utils.common.device import choose_device
from capgen_utils.common.files import CapGenError
from capgen_utils.common.paths import data_dir
from capgen_utils.config import (
    RECIPES,
    SMALL_CLIP,
    AttendTellConfig,
    ClipGpt2Config,
    ClipPrefixConfig,
    ContrastiveConfig,
    DecodingConfig,
    Recipe,
    ShowTellConfig,
    SmallClipConfig,
    TrainingConfig,
    TransformerConfig,
)


@dataclass(frozen=True)
class ClipRecipe:
    """How a preset trains a small CLIP on the grid of its own encoder.

    Attributes:
        sizes: of its two halves.
        training: how it is trained.
        tokenizer: ``clip`` or ``word``.
        dataset: a key of ``datasets.DATASETS``; ``None`` for the preset's.
    """

    sizes: SmallClipConfig = SmallClipConfig()
    training: ContrastiveConfig = ContrastiveConfig()
    tokenizer: str = "clip"
    dataset: str | None = None


@dataclass(frozen=True)
class Preset:
    """Everything that one word on the command line chooses; no module branches on ``name``.

    Attributes:
        name: what the user types.
        dataset: a key of ``datasets.DATASETS``.
        encoder: a key of ``encoders.ENCODERS``.
        encoder_weights: a local file or folder with the encoder's weights; ``None`` to download
            them, or to train them here.
        flip: also train on mirrored images, without the captions that mention left or right.
        min_count: how often a word must occur in the training captions to enter the vocabulary.
        models: recipes by model name; see ``recipe``.
        training: settings for the captioners.
        pretraining: settings for the encoder, if it is trained here; else ``None``.
        clip: how the dual encoder ``SMALL_CLIP`` is trained.
        judge: how a second dual encoder is trained that only measures; its seed, widths and
            vocabulary differ.
        language: settings for the language model ``gpt2-mini``.
        decoding: the defaults that go into the bundle.
    """

    name: str
    dataset: str
    encoder: str
    encoder_weights: Path | None = None
    flip: bool = False
    min_count: int = 5
    models: Mapping[str, Recipe] = field(default_factory=RECIPES.copy)
    training: TrainingConfig = TrainingConfig()
    pretraining: TrainingConfig | None = None
    clip: ClipRecipe = ClipRecipe()
    judge: ClipRecipe = ClipRecipe(
        SmallClipConfig(vision_width=256, vision_heads=4, text_width=256, text_heads=4),
        ContrastiveConfig(seed=2),
        "word",
    )
    language: TrainingConfig = TrainingConfig()
    decoding: DecodingConfig = DecodingConfig()

    def including(self, model: str, recipe: Recipe) -> "Preset":
        """Return the preset with ``recipe`` for ``model``, unless it has one of its own."""
        return replace(self, models={model: recipe, **self.models})

    def recipe(self, model: str) -> Recipe:
        """Return how ``model`` is trained, with the preset's own values where the recipe has none.

        Raises:
            CapGenError: the preset has no recipe for this model.
        """
        if model not in self.models:
            raise CapGenError(
                f"the preset {self.name} has no model {model!r}",
                f"choose one of {', '.join(self.models)}",
            )
        recipe = self.models[model]
        return replace(
            recipe,
            encoder=recipe.encoder or self.encoder,
            training=recipe.training or self.training,
            decoding=recipe.decoding or self.decoding,
        )

    def with_encoder(self, model: str, encoder: str) -> "Preset":
        """Return the preset with another encoder for ``model``.

        Raises:
            CapGenError: the preset has no recipe for this model.
        """
        config = self.recipe(model).config
        if hasattr(config, "cnn_backbone"):
            config = replace(config, cnn_backbone=encoder)
        recipe = replace(self.models[model], encoder=encoder, config=config)
        return replace(self, models={**self.models, model: recipe})


# Drawn scenes are clean and plentiful: no label smoothing, and no early stopping.
SHAPES_TRAINING = TrainingConfig(
    epochs=16,
    batch_images=32,
    learning_rate=2e-3,
    weight_decay=0.01,
    label_smoothing=0.0,
    average=0.99,
    # Many true captions are equally good, so BLEU cannot rank good captioners.
    best_by="dev_loss",
    patience=16,
)


_SHAPES_CNN: dict[str, Any] = {"img_size": 64, "cnn_backbone": "shapes_cnn", "seq_len": 26}


# Closed gates protect the knowledge of a large language model. The mini has little to protect, and
# would open them too late to learn relations.
_MINI: dict[str, Any] = {
    "seq_len": 32,
    "language_model": "gpt2-mini",
    "n_positions": 128,
    "image_positions": True,
    "gate": False,
}


_LITE0: dict[str, Any] = {"cnn_backbone": "efficientnet_lite0", "seq_len": 26}


_SHAPES_CLIP = SmallClipConfig(
    embed_size=512,
    patch=2,
    vision_width=160,
    vision_layers=3,
    vision_heads=10,
    text_width=96,
    text_layers=2,
    text_heads=6,
    seq_len=32,
)


_SHAPES_CONTRASTIVE = ContrastiveConfig(
    epochs=4,
    batch_images=32,
    learning_rate=1e-3,
    weight_decay=0.05,
    average=0.99,
    patience=4,
    captions=2,
    twins=4,
    twin_weight=2.0,
    reconstruction=5.0,
    looking=2,
    captioning=2.0,
    feature_dropout=0.0,
)


SHAPES = Preset(
    name="shapes",
    dataset="shapes",
    encoder="shapes_cnn",
    min_count=1,
    models={
        "show_tell": Recipe(
            ShowTellConfig(
                **_SHAPES_CNN, embed_size=256, hidden_size=512, num_layers=1, dropout=0.2
            ),
            training=replace(SHAPES_TRAINING, epochs=18, batch_images=64, learning_rate=3e-3),
        ),
        "attend_tell": Recipe(
            AttendTellConfig(**_SHAPES_CNN, attention_size=128, dropout=0.1, doubly_stochastic=0.1),
            training=replace(SHAPES_TRAINING, epochs=10),
        ),
        "transformer": Recipe(
            TransformerConfig(
                **_SHAPES_CNN, d_model=128, n_decode=2, n_head=4, fc_dim=512, dropout=0.1
            )
        ),
        "clip_prefix": Recipe(
            ClipPrefixConfig(
                seq_len=32,
                d_model=192,
                n_decode=2,
                n_head=8,
                fc_dim=384,
                dropout=0.1,
                noise=0.2,
                text_inputs="tower",
            ),
            SMALL_CLIP,
            "clip",
            training=replace(SHAPES_TRAINING, epochs=14),
        ),
        "clip_gpt2": Recipe(
            ClipGpt2Config(**_MINI, n_embd=128, n_layer=2, n_head=4),
            tokenizer="gpt2",
            training=replace(SHAPES_TRAINING, epochs=22, batch_images=64, learning_rate=4e-3),
        ),
    },
    training=SHAPES_TRAINING,
    pretraining=replace(SHAPES_TRAINING, epochs=22),
    clip=ClipRecipe(_SHAPES_CLIP, _SHAPES_CONTRASTIVE, dataset="many_shapes"),
    judge=ClipRecipe(
        replace(_SHAPES_CLIP, vision_width=96, vision_heads=6, text_width=128, text_heads=8),
        replace(_SHAPES_CONTRASTIVE, seed=2),
        "word",
        "many_shapes",
    ),
    language=replace(SHAPES_TRAINING, epochs=12),
    decoding=DecodingConfig(beam=3, max_length=25),
)


FLICKR8K_TRAINING = TrainingConfig(
    epochs=17, batch_images=64, learning_rate=8e-4, average=0.999, patience=6
)


_FLICKR8K_CONTRASTIVE = ContrastiveConfig(
    epochs=20,
    batch_images=128,
    learning_rate=5e-4,
    weight_decay=0.1,
    average=0.999,
    feature_dropout=0.3,
    word_dropout=0.1,
    captioning=1.0,
)


FLICKR8K = Preset(
    name="flickr8k",
    dataset="flickr8k",
    encoder="efficientnet_lite0",
    flip=True,
    models={
        "show_tell": Recipe(ShowTellConfig(**_LITE0, dropout=0.3)),
        "attend_tell": Recipe(
            AttendTellConfig(
                **_LITE0, embed_size=512, hidden_size=512, attention_size=256, dropout=0.4
            ),
            training=replace(FLICKR8K_TRAINING, epochs=13),
        ),
        "transformer": Recipe(
            TransformerConfig(**_LITE0, d_model=384, n_decode=3, n_head=8, fc_dim=1024, dropout=0.3)
        ),
        "clip_prefix": Recipe(
            ClipPrefixConfig(
                seq_len=32, d_model=384, n_decode=4, n_head=8, fc_dim=1024, dropout=0.3
            ),
            SMALL_CLIP,
            "clip",
        ),
        "clip_gpt2": Recipe(
            ClipGpt2Config(**_MINI, n_embd=384, n_layer=4, n_head=6, dropout=0.2),
            tokenizer="gpt2",
        ),
    },
    training=FLICKR8K_TRAINING,
    clip=ClipRecipe(SmallClipConfig(), _FLICKR8K_CONTRASTIVE),
    judge=ClipRecipe(
        replace(SmallClipConfig(), vision_width=256, vision_heads=4, text_width=256, text_heads=4),
        replace(_FLICKR8K_CONTRASTIVE, seed=2, captioning=0.0),  # no captioner reads it
        "word",
    ),
    language=TrainingConfig(epochs=8, batch_images=64, learning_rate=1e-3, average=0.99),
    decoding=DecodingConfig(beam=5, max_length=25, length_penalty=0.5),
)


PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        SHAPES,
        FLICKR8K,
        Preset(name="flickr30k", dataset="flickr30k", encoder="resnet50", flip=True),
        Preset(name="coco", dataset="coco", encoder="resnet50", flip=True),
        Preset(name="folder", dataset="folder", encoder="efficientnet_lite0", min_count=2),
    )
}


def get_preset(name: str) -> Preset:
    """Return a preset; ``auto`` is ``flickr8k`` with a GPU and ``shapes`` without one.

    Raises:
        CapGenError: there is no such preset; lists the presets.
    """
    if name == "auto":
        name = "flickr8k" if choose_device().type in ("cuda", "mps") else "shapes"
    if name not in PRESETS:
        raise CapGenError(
            f"there is no preset {name!r}", f"choose one of auto, {', '.join(PRESETS)}"
        )
    return PRESETS[name]


# --- the folders in which training keeps its results


def run_of(preset: Preset, model: str) -> Path:
    """Return the run folder of a preset's captioner."""
    return data_dir() / "runs" / f"{preset.name}_{model}"


def encoder_folder() -> Path:
    """Return the folder of the encoder that is pre-trained for ``shapes``."""
    return data_dir() / "encoders" / "shapes_cnn"


def dual_encoder_folder(preset: Preset, judge: bool = False) -> Path:
    """Return the folder of a preset's small CLIP, or of the one that only measures."""
    return data_dir() / "encoders" / f"{preset.name}_{'judge' if judge else 'clip'}"


def mini_folder(preset: Preset) -> Path:
    """Return the folder of a preset's language model."""
    return data_dir() / "language_models" / f"{preset.name}_gpt2_mini"


def run_folder(folder: Path) -> Path:
    """Return where the training of the network in ``folder`` keeps its log and its checkpoint."""
    return folder.parent / f"{folder.name}-run"
