"""What tests run in processes of their own: training that is killed, slow extraction, two
processes.

Run as ``python killed.py WHAT FOLDER [OPTIONS AS JSON]``. A line ``now`` says that the moment has
come.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from helpers import CPU, tiny_encoder, tiny_manifest, tiny_trainer

from capgen_utils.vision import features


def extraction(folder: Path, delay: float = 0.0) -> None:
    """Extract features of 40 images, one at a time, slowly."""
    run = features.encode_pixels

    def slowly(*arguments: Any) -> Any:
        print("now", flush=True)
        time.sleep(delay)
        return run(*arguments)

    features.encode_pixels = slowly
    manifest = tiny_manifest(folder / "images", train=40, dev=0)
    (folder / "images" / "003.png").write_bytes(b"damaged")
    cache = features.extract(
        manifest,
        tiny_encoder(),
        folder=folder / "features",
        dtype=torch.float32,
        device=CPU,
        batch_size=2,
    )
    print(cache.path, flush=True)


SETTINGS: dict[str, Any] = {
    "model": {"dropout": 0.2, "word_dropout": 0.1},
    "average": 0.9,
    "checkpoint_steps": 2,
    "epochs": 3,
    "batch_images": 2,
    "flip": True,
}


def train(
    folder: Path, run: str = "run", stop_step: int = 0, stop_evaluation: int = 0, **changes: Any
) -> None:
    """Train; say ``now`` and hang at a step or in an evaluation, so that the kill comes exactly
    there."""
    trainer = tiny_trainer(folder, folder / run, **(SETTINGS | changes))
    step, dev_loss = trainer._train_step, trainer._dev_loss
    evaluations = [0]

    def hang() -> None:
        print("now", flush=True)
        time.sleep(600)

    def stepping(*arguments: Any) -> None:
        step(*arguments)
        if stop_step and trainer.progress.step == stop_step:
            hang()

    def evaluating() -> float:
        evaluations[0] += 1
        if evaluations[0] == stop_evaluation:
            hang()
        return dev_loss()

    trainer._train_step, trainer._dev_loss = stepping, evaluating
    trainer.train()
    print(
        json.dumps([[e["train_loss"], e["dev_loss"]] for e in trainer.progress.history]), flush=True
    )


def bulk(folder: Path, output: str = "out.jsonl", resume: bool = False) -> None:
    """Caption the photos of a folder slowly, so that a kill can come between two batches."""
    from capgen_utils.apps.cli import bulk as module
    from capgen_utils.apps.cli import main as cli

    write = module.write_batch

    def slowly(*arguments: Any) -> None:
        write(*arguments)
        print("now", flush=True)
        time.sleep(0.3)

    module.write_batch = slowly
    asked = [str(folder / "photos"), "--bundle", str(folder / "bundle"), "--batch-size", "4"]
    print(cli.main(["caption", *asked, "--output", str(folder / output), *["--resume"] * resume]))


def distributed(folder: Path, run: str = "run", train: int = 12, **changes: Any) -> None:
    """Train without any chance in the model, so that the number of processes cannot matter."""
    settings = {
        "epochs": 2,
        "batch_images": 4,
        "checkpoint_steps": 3,
        "images": {"train": train},
    } | changes
    trainer = tiny_trainer(folder, folder / run, **settings)
    progress = trainer.train()
    if trainer.accelerator.is_main_process:
        world = trainer.accelerator.num_processes
        entries = [{k: v for k, v in e.items() if k != "samples"} for e in progress.history]
        (folder / f"{run}.json").write_text(json.dumps({"world": world, "history": entries}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    what = {"extraction": extraction, "bulk": bulk, "train": train, "distributed": distributed}[
        sys.argv[1]
    ]
    what(Path(sys.argv[2]), **json.loads(sys.argv[3] if len(sys.argv) > 3 else "{}"))
