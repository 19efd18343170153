"""The commands ``pretrain`` and ``train``."""

import argparse
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from capgen_utils.apps.cli.arguments import (
    add_command,
    add_weights_option,
)
from capgen_utils.common.files import CapGenError
from capgen_utils.common.paths import data_dir
from capgen_utils.presets import PRESETS, get_preset


def _add_data_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", default="auto", help=f"auto, {', '.join(PRESETS)}")
    parser.add_argument(
        "--data",
        type=Path,
        metavar="FOLDER",
        help="folder of the dataset, where it is not found by itself",
    )
    add_weights_option(parser)
    parser.add_argument(
        "--limit",
        type=int,
        metavar="N",
        help="only the first N images of each split (for a quick look)",
    )


def _add_pretrain(commands: Any) -> None:
    parser = add_command(
        commands,
        "pretrain",
        _pretrain,
        "Train what a preset's captioners start from, once: encoder, small CLIP and language model.",
    )
    parser.add_argument("--preset", default="shapes", help=f"one of {', '.join(PRESETS)}")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="folder of the dataset")
    add_weights_option(parser)
    parser.add_argument(
        "--judge",
        action="store_true",
        help="train another small CLIP too, for nothing but measuring re-ranking",
    )


def _pretrain(options: argparse.Namespace) -> None:
    from capgen_utils.training.clip import pretrain_dual_encoder
    from capgen_utils.training.encoder import pretrain_encoder
    from capgen_utils.training.language import MINI, pretrain_language_model

    preset = get_preset(options.preset)
    given = {"stem_weights": options.encoder_weights}
    if preset.pretraining is not None and options.encoder_weights is None:
        print(f"the encoder is in {pretrain_encoder(preset, options.data)}")
    print(f"the small CLIP is in {pretrain_dual_encoder(preset, options.data, **given)}")
    if preset.recipe("clip_gpt2").config.language_model == MINI:
        print(f"the language model is in {pretrain_language_model(preset, options.data)}")
    if options.judge:
        print(f"the judge is in {pretrain_dual_encoder(preset, options.data, judge=True, **given)}")


def _add_train(commands: Any) -> None:
    parser = add_command(
        commands, "train", _train, "Train a captioner; a run that was stopped goes on where it was."
    )
    parser.add_argument(
        "--model",
        default="transformer",
        help=f"which captioner: {', '.join(PRESETS['shapes'].models)}",
    )
    _add_data_options(parser)
    parser.add_argument("--encoder", metavar="NAME", help="another image encoder than the preset's")
    parser.add_argument(
        "--output", type=Path, metavar="FOLDER", help="run folder (default: data/runs/PRESET_MODEL)"
    )
    parser.add_argument("--epochs", type=int, help="instead of the preset's")
    parser.add_argument(
        "--batch-images", type=int, metavar="N", help="images in a batch, instead of the preset's"
    )
    parser.add_argument(
        "--learning-rate", type=float, metavar="X", help="peak, instead of the preset's"
    )
    parser.add_argument("--seed", type=int, help="instead of the preset's")
    parser.add_argument(
        "--dtype", choices=("auto", "fp32", "bf16", "fp16"), help="compute dtype of training"
    )
    parser.add_argument("--no-flip", action="store_true", help="do not train on mirrored images")
    parser.add_argument(
        "--min-count", type=int, metavar="N", help="occurrences that a word needs to be learned"
    )
    parser.add_argument(
        "--tensorboard", action="store_true", help="log to TensorBoard, in the run folder"
    )
    parser.add_argument(
        "--wandb", action="store_true", help="log to Weights & Biases (pip install wandb)"
    )


def _train(options: argparse.Namespace) -> None:
    from capgen_utils.training.recipes import make_trainer, prepare

    preset = _chosen_preset(options)
    names = ("epochs", "batch_images", "learning_rate", "seed", "dtype")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if any(isinstance(value, (int, float)) and value <= 0 for value in given.values()):
        raise CapGenError(
            "epochs, batch size, learning rate and seed are above zero", "see: capgen train --help"
        )
    trackers = [name for name in ("tensorboard", "wandb") if getattr(options, name)]
    folder = options.output or data_dir() / "runs" / f"{preset.name}_{options.model}"
    recipe = preset.recipe(
        options.model
    )  # an unknown name is said before anything is trained or encoded
    prepared = prepare(preset, options.data, options.encoder_weights, options.limit, options.model)
    training = replace(recipe.training, **given)
    trainer = make_trainer(prepared, options.model, folder, training, trackers=trackers)
    started = time.perf_counter()
    progress = trainer.train()
    print(
        f"best dev BLEU-4 {progress.best:.2f} in epoch {progress.best_epoch + 1}; "
        f"{(time.perf_counter() - started) / 60:.1f} minutes now, {progress.seconds / 60:.1f} in all"
    )
    print(
        f"the captioner is in {folder / 'bundle'}; next: capgen evaluate --bundle {folder / 'bundle'}"
    )


def _chosen_preset(options: argparse.Namespace) -> Any:
    preset = get_preset(options.preset)
    if options.encoder:
        preset = preset.with_encoder(options.model, options.encoder)
    if options.no_flip:
        preset = replace(preset, flip=False)
    if options.min_count is not None:
        preset = replace(preset, min_count=options.min_count)
    print(
        f"preset {preset.name}: dataset {preset.dataset}, encoder {preset.recipe(options.model).encoder}"
    )
    return preset
