"""The commands ``pretrain`` and ``train``."""

import argparse
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from capgen_utils.apps.cli.arguments import add_command, add_weights_option
from capgen_utils.config import MINI
from capgen_utils.presets import PRESETS, get_preset


def _add_pretrain(commands: Any) -> None:
    parser = add_command(
        commands,
        "pretrain",
        _pretrain,
        "Train what a preset's captioners start from, once: encoder, small CLIP, language model.",
    )
    parser.add_argument("--preset", default="shapes", help=f"one of {', '.join(PRESETS)}")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="folder of the dataset")
    add_weights_option(parser)
    judge = "also train a second small CLIP, used only to measure re-ranking"
    parser.add_argument("--judge", action="store_true", help=judge)


def _pretrain(options: argparse.Namespace) -> None:
    from capgen_utils.training.clip import pretrain_dual_encoder
    from capgen_utils.training.encoder import pretrain_encoder
    from capgen_utils.training.language import pretrain_language_model

    preset, data = get_preset(options.preset), options.data
    preset = replace(preset, encoder_weights=options.encoder_weights)
    if preset.pretraining is not None and preset.encoder_weights is None:
        print(f"the encoder is in {pretrain_encoder(preset, data)}")
    print(f"the small CLIP is in {pretrain_dual_encoder(preset, data)}")
    if preset.recipe("clip_gpt2").config.language_model == MINI:
        print(f"the language model is in {pretrain_language_model(preset, data)}")
    if options.judge:
        print(f"the judge is in {pretrain_dual_encoder(preset, data, judge=True)}")


def _add_train(commands: Any) -> None:
    parser = add_command(
        commands, "train", _train, "Train a captioner, or continue an interrupted run."
    )
    add = parser.add_argument
    models = ", ".join(PRESETS["shapes"].models)
    add("--model", default="transformer", help=f"which captioner: {models}")
    add("--preset", default="auto", help=f"auto, {', '.join(PRESETS)}")
    add("--data", type=Path, metavar="FOLDER", help="folder of the dataset, if not the usual one")
    add_weights_option(parser)
    add("--limit", type=int, metavar="N", help="use only N images of each split, for a quick look")
    add("--encoder", metavar="NAME", help="another image encoder than the preset's")
    folder = "run folder (default: data/runs/PRESET_MODEL)"
    add("--output", type=Path, metavar="FOLDER", help=folder)
    add("--epochs", type=int, help="instead of the preset's")
    add("--batch-images", type=int, metavar="N", help="images per batch, instead of the preset's")
    add("--learning-rate", type=float, metavar="X", help="peak, instead of the preset's")
    add("--seed", type=int, help="instead of the preset's")
    dtypes = ("auto", "fp32", "bf16", "fp16")
    add("--dtype", choices=dtypes, help="compute dtype of training")
    add("--no-flip", action="store_true", help="do not train on mirrored images")
    occurrences = "minimum occurrences of a word in the training captions"
    add("--min-count", type=int, metavar="N", help=occurrences)
    add("--tensorboard", action="store_true", help="log to TensorBoard, in the run folder")
    add("--wandb", action="store_true", help="log to Weights & Biases (pip install wandb)")


def _train(options: argparse.Namespace) -> None:
    from capgen_utils.models import model_class
    from capgen_utils.training.recipes import train

    model, preset = options.model, get_preset(options.preset)
    preset = preset.including(model, model_class(model).recipe)
    if options.encoder:
        preset = preset.with_encoder(model, options.encoder)
    preset = replace(
        preset,
        encoder_weights=options.encoder_weights,
        flip=preset.flip and not options.no_flip,
        min_count=preset.min_count if options.min_count is None else options.min_count,
    )
    encoder = preset.recipe(model).encoder
    print(f"preset {preset.name}: dataset {preset.dataset}, encoder {encoder}")
    names = ("epochs", "batch_images", "learning_rate", "seed", "dtype")
    settings = {name: getattr(options, name) for name in names}
    started = time.perf_counter()
    run = train(
        model,
        preset=preset,
        data=options.data,
        folder=options.output,
        limit=options.limit,
        trackers=[name for name in ("tensorboard", "wandb") if getattr(options, name)],
        **{name: value for name, value in settings.items() if value is not None},
    )
    progress, minutes = run.progress, (time.perf_counter() - started) / 60
    print(
        f"best dev BLEU-4 {progress.best:.2f} in epoch {progress.best_epoch + 1}; "
        f"{minutes:.1f} minutes now, {progress.seconds / 60:.1f} in all"
    )
    bundle = run.folder / "bundle"
    print(f"the captioner is in {bundle}; next: capgen evaluate --bundle {bundle}")
