"""The commands ``pretrain`` and ``train``."""

import argparse
import time
from dataclasses import replace
from pathlib import Path

from capgen_utils.apps.cli.arguments import DATA, WEIGHTS, Command
from capgen_utils.config import MINI
from capgen_utils.presets import PRESETS, get_preset


def run_pretrain(options: argparse.Namespace) -> None:
    """Run ``capgen pretrain``."""
    from capgen_utils.training.pretraining import (
        pretrain_dual_encoder,
        pretrain_encoder,
        pretrain_language_model,
    )

    preset, data = get_preset(options.preset), options.data
    preset = replace(preset, encoder_weights=options.encoder_weights)
    if preset.pretraining is not None and preset.encoder_weights is None:
        print(f"the encoder is in {pretrain_encoder(preset, data)}")
    print(f"the small CLIP is in {pretrain_dual_encoder(preset, data)}")
    if preset.recipe("clip_gpt2").config.language_model == MINI:
        print(f"the language model is in {pretrain_language_model(preset, data)}")
    if options.judge:
        print(f"the judge is in {pretrain_dual_encoder(preset, data, judge=True)}")


def run_train(options: argparse.Namespace) -> None:
    """Run ``capgen train``."""
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
    print(f"preset {preset.name}: dataset {preset.dataset}, encoder {preset.recipe(model).encoder}")
    names = ("epochs", "batch_images", "learning_rate", "seed", "dtype")
    started = time.perf_counter()
    run = train(
        model,
        preset=preset,
        data=options.data,
        folder=options.output,
        limit=options.limit,
        trackers=[name for name in ("tensorboard", "wandb") if getattr(options, name)],
        **{name: value for name in names if (value := getattr(options, name)) is not None},
    )
    progress, minutes = run.progress, (time.perf_counter() - started) / 60
    print(
        f"best dev BLEU-4 {progress.best:.2f} in epoch {progress.best_epoch + 1}; "
        f"{minutes:.1f} minutes now, {progress.seconds / 60:.1f} in all"
    )
    bundle = run.folder / "bundle"
    print(f"the captioner is in {bundle}; next: capgen evaluate --bundle {bundle}")


COMMANDS = (
    Command(
        "pretrain",
        run_pretrain,
        "Train what a preset's captioners start from, once: encoder, small CLIP, language model.",
        {
            "--preset": dict(default="shapes", help=f"one of {', '.join(PRESETS)}"),
            **DATA,
            **WEIGHTS,
            "--judge": dict(
                action="store_true",
                help="also train a second small CLIP, used only to measure re-ranking",
            ),
        },
    ),
    Command(
        "train",
        run_train,
        "Train a captioner, or continue an interrupted run.",
        {
            "--model": dict(
                default="transformer",
                help=f"which captioner: {', '.join(PRESETS['shapes'].models)}",
            ),
            "--preset": dict(default="auto", help=f"auto, {', '.join(PRESETS)}"),
            "--data": dict(
                type=Path, metavar="FOLDER", help="folder of the dataset, if not the usual one"
            ),
            **WEIGHTS,
            "--limit": dict(
                type=int, metavar="N", help="use only N images of each split, for a quick look"
            ),
            "--encoder": dict(metavar="NAME", help="another image encoder than the preset's"),
            "--output": dict(
                type=Path,
                metavar="FOLDER",
                help="run folder (default: data/runs/PRESET_MODEL)",
            ),
            "--epochs": dict(type=int, help="instead of the preset's"),
            "--batch-images": dict(
                type=int, metavar="N", help="images per batch, instead of the preset's"
            ),
            "--learning-rate": dict(type=float, metavar="X", help="peak, instead of the preset's"),
            "--seed": dict(type=int, help="instead of the preset's"),
            "--dtype": dict(
                choices=("auto", "fp32", "bf16", "fp16"), help="compute dtype of training"
            ),
            "--no-flip": dict(action="store_true", help="do not train on mirrored images"),
            "--min-count": dict(
                type=int,
                metavar="N",
                help="minimum occurrences of a word in the training captions",
            ),
            "--tensorboard": dict(
                action="store_true", help="log to TensorBoard, in the run folder"
            ),
            "--wandb": dict(
                action="store_true", help="log to Weights & Biases (pip install wandb)"
            ),
        },
    ),
)
