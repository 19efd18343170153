"""The training loop: schedule, resume to the bit after a kill, several processes, early stopping,
logs, errors."""

import json
import math
import os
import socket
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ROOT, run_and_kill, run_script, start_script, tiny_trainer
from safetensors.torch import load_file

from capgen_utils.bundle import load_bundle
from capgen_utils.common.files import CapGenError
from capgen_utils.common.tensors import load_checkpoint, save_checkpoint
from capgen_utils.config import TrainingConfig
from capgen_utils.decoding.run import caption_manifest
from capgen_utils.evaluation.metrics import bleu
from capgen_utils.training import trainer as training
from capgen_utils.training.loop import learning_rate
from capgen_utils.training.trainer import Trainer

PICKLES = (".pt", ".pth", ".pkl", ".pickle", ".bin", ".ckpt")


def read_log(run: Path) -> list[dict[str, Any]]:
    return [
        json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()
    ]


def same_tensors(one: Path, other: Path) -> bool:
    first, second = load_file(one), load_file(other)
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def test_the_learning_rate_warms_up_and_follows_a_cosine() -> None:
    config = TrainingConfig(learning_rate=2.0, warmup=0.1)
    rates = [learning_rate(step, 100, config) for step in range(100)]
    assert (
        rates[0] == pytest.approx(0.2)
        and rates[9] == pytest.approx(2.0)
        and rates[10] == pytest.approx(2.0)
    )
    assert rates[55] == pytest.approx(2.0 * (0.01 + 0.99 * 0.5), rel=1e-6)
    assert 0.02 <= rates[-1] < 0.025
    assert all(a < b for a, b in zip(rates[:9], rates[1:10], strict=True))
    assert all(a > b for a, b in zip(rates[10:], rates[11:], strict=False))
    assert learning_rate(0, 1, config) == 2.0 and learning_rate(500, 100, config) == pytest.approx(
        0.02
    )
    assert learning_rate(0, 10, replace(config, warmup=0.0)) == 2.0


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Trainer]:
    folder = tmp_path_factory.mktemp("trained")
    trainer = tiny_trainer(folder, epochs=2, average=0.8, trackers=["tensorboard"])
    trainer.train()
    return folder / "run", trainer


def test_a_run_leaves_a_bundle_a_checkpoint_and_a_log(trained: tuple[Path, Trainer]) -> None:
    run, trainer = trained
    assert trainer.progress.done and trainer.progress.epoch == 2
    log = read_log(run)
    assert [e["epoch"] for e in log] == [1, 2] and [e["step"] for e in log] == [3, 6]
    needed = {
        "train_loss",
        "dev_loss",
        "BLEU-1",
        "BLEU-4",
        "distinct",
        "mean_length",
        "unk",
        "samples",
        "seconds",
    }
    assert all(needed <= set(e) for e in log)
    assert all(math.isfinite(e["train_loss"]) and math.isfinite(e["dev_loss"]) for e in log)
    assert log == trainer.progress.history
    assert log[0]["samples"].keys() == log[1]["samples"].keys(), "the same images in every epoch"
    info = load_bundle(run / "bundle").info
    assert (
        info["training"] == asdict(trainer.config)
        and info["dev"]["protocol"]
        and info["dataset"] == "tiny"
    )
    assert info["encoder"]["name"] == "tiny" and info["decoding"]["beam"] == 2


def test_nothing_is_pickled_and_nothing_half_written_stays(trained: tuple[Path, Trainer]) -> None:
    run, _ = trained
    files = [p.relative_to(run).as_posix() for p in run.rglob("*") if p.is_file()]
    assert not [f for f in files if f.endswith(PICKLES) or ".partial" in f]
    top = {f.split("/")[0] for f in files} - {"capgen"}  # TensorBoard's folder
    assert top == {"bundle", "checkpoint.safetensors", "log.jsonl"}


def test_tensorboard_files_are_written_when_asked_for(
    trained: tuple[Path, Trainer], tmp_path: Path
) -> None:
    run, _ = trained
    assert list(run.rglob("events.out.tfevents.*"))
    tiny_trainer(tmp_path, epochs=1).train()
    assert not list(tmp_path.rglob("events.*"))


def test_the_dev_score_is_that_of_generated_captions(trained: tuple[Path, Trainer]) -> None:
    run, trainer = trained
    model = trainer.model.eval()
    own = {k: v.clone() for k, v in model.state_dict().items()}
    model.load_state_dict(trainer.average, strict=False)
    said = caption_manifest(
        model,
        trainer.data.dev,
        trainer.data.plain,
        trainer.tokenizer,
        replace(trainer.decoding, beam=1),
    )
    model.load_state_dict(own)
    references = {item.image: item.captions for item in trainer.data.dev.items}
    assert bleu(said, references)["BLEU-1"] == pytest.approx(read_log(run)[-1]["BLEU-1"])


def test_the_bundle_holds_the_averaged_weights(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, epochs=1, average=0.9)
    trainer.train()
    tensors, _ = load_checkpoint(trainer.checkpoint_path)
    stored = load_file(tmp_path / "run" / "bundle" / "model.safetensors")
    key = "embedding.weight"
    assert torch.equal(stored[key], tensors[f"average.{key}"].half())
    assert not torch.equal(stored[key], tensors[f"model.{key}"].half())
    assert torch.equal(tensors[f"model.{key}"], trainer.model.state_dict()[key]), (
        "training goes on with its own"
    )


def test_the_average_is_an_exponential_one(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, epochs=2, average=0.3)
    expected = trainer.model.embedding.weight.detach().clone()
    update = trainer.after_step

    def follow() -> None:
        decay = min(0.3, (1 + trainer.progress.step) / (10 + trainer.progress.step))
        expected.mul_(decay).add_(trainer.model.embedding.weight.detach(), alpha=1 - decay)
        update()

    trainer.after_step = follow
    trainer.train()
    torch.testing.assert_close(trainer.average["embedding.weight"], expected, atol=1e-5, rtol=1e-4)


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    contents = []
    for run, seed in (("a", 5), ("b", 5), ("c", 6)):
        tiny_trainer(
            tmp_path, tmp_path / run, epochs=2, seed=seed, model={"dropout": 0.2}, flip=True
        ).train()
        contents.append((tmp_path / run / "bundle" / "model.safetensors").read_bytes())
    assert contents[0] == contents[1] != contents[2]


def test_captions_are_tokenised_once_in_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = tiny_trainer(tmp_path, epochs=6, flip=True)
    encode, encoded = trainer.tokenizer.encode, []

    def counted(caption: str, *arguments: Any) -> list[int]:
        encoded.append(caption)
        return encode(caption, *arguments)

    monkeypatch.setattr(trainer.tokenizer, "encode", counted)
    trainer.train()
    train, dev = (len(list(s.captions())) for s in (trainer.data.train, trainer.data.dev))
    assert len(encoded) <= 2 * train + dev, "once per view, not once per epoch"


def test_training_is_learning(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, epochs=12)
    history = trainer.train().history
    assert history[-1]["train_loss"] < 0.8 * history[0]["train_loss"]


# --- interrupted


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("killed")
    return folder, run_script("train", folder, run="whole")


@pytest.mark.parametrize(
    "moment",
    [
        {"stop_step": 1},
        {"stop_step": 7},
        {"stop_step": 8},
        {"stop_evaluation": 1},
        {"stop_evaluation": 2},
    ],
    ids=str,
)
def test_a_killed_run_goes_on_and_ends_with_the_same_bits(
    uninterrupted: tuple[Path, str], moment: dict
) -> None:
    folder, losses = uninterrupted
    run = "-".join(f"{k}{v}" for k, v in moment.items())
    run_and_kill("train", folder, run=run, **moment)
    assert run_script("train", folder, run=run) == losses
    for part in ("checkpoint.safetensors", "bundle/model.safetensors"):
        assert same_tensors(folder / "whole" / part, folder / run / part), part
    assert [e["epoch"] for e in read_log(folder / run)] == [1, 2, 3]


def test_a_run_killed_again_and_again_still_ends_the_same(uninterrupted: tuple[Path, str]) -> None:
    folder, losses = uninterrupted
    for step in (3, 6, 11):
        run_and_kill("train", folder, run="often", stop_step=step)
    assert run_script("train", folder, run="often") == losses
    assert same_tensors(
        folder / "whole" / "checkpoint.safetensors", folder / "often" / "checkpoint.safetensors"
    )


def test_a_kill_between_log_and_checkpoint_writes_no_epoch_twice(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, epochs=2, checkpoint_steps=1)
    log = trainer._log

    def die(entry: dict[str, Any]) -> None:
        log(entry)
        raise KeyboardInterrupt

    trainer._log = die
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    tiny_trainer(tmp_path, epochs=2, checkpoint_steps=1).train()
    assert [e["epoch"] for e in read_log(tmp_path / "run")] == [1, 2]


def test_a_finished_run_is_found_finished(trained: tuple[Path, Trainer], tmp_path: Path) -> None:
    first = tiny_trainer(tmp_path, epochs=1)
    first.train()
    before = (tmp_path / "run" / "bundle" / "model.safetensors").stat().st_mtime_ns
    again = tiny_trainer(tmp_path, epochs=1)
    assert again.train().history == first.progress.history
    assert (tmp_path / "run" / "bundle" / "model.safetensors").stat().st_mtime_ns == before
    assert len(read_log(tmp_path / "run")) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"learning_rate": 1e-3},
        {"seed": 9},
        {"epochs": 9},
        {"model": {"d_model": 64}},
        {"model": {"n_head": 2}},
        {"model": {"dropout": 0.5}},
        {"images": {"train": 11}},
        {"flip": True},
    ],
    ids=str,
)
def test_a_folder_with_a_run_of_other_settings_is_refused(tmp_path: Path, change: dict) -> None:
    tiny_trainer(tmp_path, epochs=1).train()
    before = (tmp_path / "run" / "checkpoint.safetensors").read_bytes()
    with pytest.raises(CapGenError, match="other settings") as error:
        tiny_trainer(tmp_path, **({"epochs": 1} | change)).train()
    assert "--output" in error.value.remedy
    assert (tmp_path / "run" / "checkpoint.safetensors").read_bytes() == before


@pytest.mark.parametrize("part", [0.0, 0.3, 0.9, 0.999])
def test_a_truncated_checkpoint_is_refused(tmp_path: Path, part: float) -> None:
    path = tmp_path / "checkpoint.safetensors"
    save_checkpoint(path, {"a": torch.ones(100)}, {"epoch": 1})
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * part)])
    with pytest.raises(CapGenError, match="damaged"):
        load_checkpoint(path)


def test_a_file_that_is_no_checkpoint_is_refused(
    tmp_path: Path, trained: tuple[Path, Trainer]
) -> None:
    with pytest.raises(CapGenError, match="damaged"):
        load_checkpoint(trained[0] / "bundle" / "model.safetensors")


# --- several processes


def run_on_two(folder: Path, run: str, **options: Any) -> None:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    env = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        str(port),
        str(ROOT / "tests" / "killed.py"),
        "distributed",
        str(folder),
        json.dumps({"run": run} | options),
    ]
    done = subprocess.run(
        command, env=env, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.parametrize(
    "train", [12, 13], ids=["even", "one image left for the last batch, so one process has none"]
)
def test_two_processes_give_the_losses_of_one(tmp_path: Path, train: int) -> None:
    run_script_quietly("distributed", tmp_path, run="one", train=train)
    run_on_two(tmp_path, "two", train=train)
    one, two = (json.loads((tmp_path / f"{run}.json").read_text()) for run in ("one", "two"))
    assert (one["world"], two["world"]) == (1, 2)
    assert len(one["history"]) == len(two["history"]) == 2
    for a, b in zip(one["history"], two["history"], strict=True):
        assert a["step"] == b["step"]
        assert a["train_loss"] == pytest.approx(b["train_loss"], abs=1e-4)
        assert a["dev_loss"] == pytest.approx(b["dev_loss"], abs=1e-4)
    assert [e["epoch"] for e in read_log(tmp_path / "two")] == [1, 2], "one process writes the log"


def run_script_quietly(what: str, folder: Path, **options: Any) -> None:
    process = start_script(what, folder, **options)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-3000:]


# --- the end of training


@pytest.mark.parametrize(
    ("scores", "patience", "evaluate_every", "epochs", "best"),
    [
        ([5, 4, 3, 2, 1, 0], 2, 1, 3, 1),
        ([1, 2, 1, 3, 2, 1], 2, 1, 6, 4),
        ([1, 2, 3, 4, 5, 6], 1, 1, 6, 6),
        ([0, 0, 0, 0, 0, 0], 3, 1, 4, 1),
        ([5, 1, 1], 1, 2, 4, 2),
        (
            [1, 2],
            2,
            3,
            6,
            6,
        ),  # more epochs between two evaluations than patience: still every evaluation counts
    ],
)
def test_early_stopping(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    scores: list[float],
    patience: int,
    evaluate_every: int,
    epochs: int,
    best: int,
) -> None:
    given = iter(scores)
    monkeypatch.setattr(training, "bleu", lambda *a: bleu(*a) | {"BLEU-4": float(next(given))})
    monkeypatch.setattr(Trainer, "_dev_loss", lambda self: 1.0)
    trainer = tiny_trainer(tmp_path, epochs=6, patience=patience, evaluate_every=evaluate_every)
    progress = trainer.train()
    assert (progress.epoch, progress.best_epoch + 1) == (epochs, best)
    assert progress.done and progress.best == max(
        scores[: len([e for e in progress.history if "BLEU-4" in e])]
    )
    assert load_bundle(tmp_path / "run" / "bundle").info["dev"]["BLEU-4"] == progress.best


def test_among_equal_scores_the_lower_dev_loss_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter([3.0, 2.0, 2.5, 1.0, 4.0])
    monkeypatch.setattr(training, "bleu", lambda *a: bleu(*a) | {"BLEU-4": 0.0})
    monkeypatch.setattr(Trainer, "_dev_loss", lambda self: next(losses))
    progress = tiny_trainer(tmp_path, epochs=5, patience=5).train()
    assert progress.best_epoch + 1 == 4
    assert (
        load_bundle(tmp_path / "run" / "bundle").info["dev"]["dev_loss"]
        == progress.best_loss
        == 1.0
    )


def test_a_loss_that_is_not_finite_ends_training_with_advice(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, epochs=1)
    with torch.no_grad():
        trainer.model.embedding.weight[5] = torch.nan
    with pytest.raises(CapGenError, match="loss is nan") as error:
        trainer.train()
    assert "learning rate" in error.value.remedy
    assert not trainer.checkpoint_path.exists(), "weights that are lost are not kept"


def test_a_run_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file where the folder should be")
    with pytest.raises(CapGenError, match="run"):
        tiny_trainer(tmp_path)


def test_images_that_cannot_be_read_do_not_train(tmp_path: Path) -> None:
    from helpers import CPU, tiny_config, tiny_encoder, tiny_manifest

    from capgen_utils.config import DecodingConfig
    from capgen_utils.models import build_model
    from capgen_utils.text.words import WordTokenizer
    from capgen_utils.training.batches import TrainingData
    from capgen_utils.vision.features import extract

    manifest = tiny_manifest(tmp_path / "images")
    broken = [manifest.split("train").items[1].image, manifest.split("dev").items[0].image]
    for name in broken:
        (tmp_path / "images" / name).write_bytes(b"damaged")
    encoder, train = tiny_encoder(), manifest.split("train")
    cache = extract(
        manifest, encoder, folder=tmp_path / "features", dtype=torch.float32, device=CPU
    )
    assert set(cache.failed) == set(broken)
    tokenizer = WordTokenizer.fit(train.captions(), 1)
    trainer = Trainer(
        build_model("transformer", tiny_config(), tokenizer, (9, 12)),
        tokenizer,
        TrainingData(train, manifest.split("dev"), cache),
        encoder,
        TrainingConfig(epochs=1, dtype="fp32"),
        DecodingConfig(beam=1, max_length=8),
        tmp_path / "run",
        "shapes",
        torch.float32,
        device=CPU,
    )
    assert len(trainer.data.train) == 11 and len(trainer.data.dev) == 3
    history = trainer.train().history
    assert math.isfinite(history[0]["train_loss"]) and math.isfinite(history[0]["dev_loss"])
