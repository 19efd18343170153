"""The training loop that captioners, encoder, small CLIP and language model share (notebook 03).

Accelerate moves tensors, casts and joins processes; checkpoints are resumable to the bit.
"""

import importlib.util
import json
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from torch import Tensor, nn
from tqdm.auto import tqdm

from capgen_utils.common.device import choose_dtype
from capgen_utils.common.files import CapGenError, explain_os_errors, fingerprint, write_text
from capgen_utils.common.machine import machine
from capgen_utils.common.tensors import load_checkpoint, save_checkpoint
from capgen_utils.config import TrainingConfig
from capgen_utils.training.batches import TrainingData


@dataclass
class Progress:
    """The state of a run that JSON can hold; the tensors are in the checkpoint beside it."""

    epoch: int = 0
    step: int = 0
    batch: int = 0
    best: float = -1.0
    best_loss: float = 1e9
    best_epoch: int = -1
    epoch_loss: float = 0.0
    epoch_tokens: int = 0
    seconds: float = 0.0
    done: bool = False
    history: list[dict[str, Any]] = field(default_factory=list)


class Loop(ABC):
    """One training run: batches, steps, the averaged weights, evaluation, checkpoints and the log.

    Subclasses define what a batch is, its loss, and how the model is evaluated and kept.

    Args:
        name: shown in the progress bar.
        model: everything that learns.
        averaged: the part of ``model`` whose averaged weights are evaluated and kept.
        data: images, captions, features; images that could not be read are left out.
        config: how to train.
        folder: gets ``checkpoint.safetensors`` and ``log.jsonl``.
        epochs: passes over the training images, at most.
        trackers: names that Accelerate knows: ``tensorboard``, ``wandb``.
        device: where to compute; by default the fastest.
    """

    score = "score"  # the entry of an evaluation that is to be maximised
    by_loss = False  # minimise dev_loss instead
    shown: Sequence[str] = ()  # the entries of the log that are printed; by default all numbers

    def __init__(
        self,
        name: str,
        model: nn.Module,
        averaged: nn.Module,
        data: TrainingData,
        config: TrainingConfig,
        folder: Path,
        epochs: int,
        trackers: Sequence[str] = (),
        device: torch.device | None = None,
    ) -> None:
        self.name, self.data = name, data.readable()
        self.config, self.folder = config, Path(folder)
        self.accelerator = _accelerator(config, self.folder, trackers, device)
        self.learner, self.averaged = model.to(self.accelerator.device), averaged
        average = {k: v.detach().clone() for k, v in self._changing()}
        self.average = average if config.average else None
        self.optimizer = self.accelerator.prepare(make_optimizer(model, config))
        self.progress, self.epochs = Progress(), epochs
        self.epoch_steps = math.ceil(len(self.data.train) / config.batch_images)
        self.checkpoint_path = self.folder / "checkpoint.safetensors"  # the newest replaces it

    @abstractmethod
    def settings(self) -> str:
        """Return a hash of the model, the data and the configuration, the same on any machine."""

    @abstractmethod
    def batches(self) -> Iterator[Any]:
        """Yield the batches of epoch ``progress.epoch`` from ``progress.batch`` on.

        They depend on the seed and the epoch alone.
        """

    @abstractmethod
    def loss(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Return the loss summed over a batch, and the global number of terms of the sum."""

    @abstractmethod
    def evaluate(self) -> dict[str, Any]:
        """Score the model, which now has its averaged weights, on the dev split."""

    @abstractmethod
    def keep(self, result: dict[str, Any]) -> None:
        """Save the model as the best one so far; ``result`` is from ``evaluate``."""

    def is_evaluated(self) -> bool:
        """Return whether the model is evaluated after this epoch."""
        epoch = self.progress.epoch + 1
        return epoch == self.epochs or epoch % self.config.evaluate_every == 0

    def learning_rate(self) -> float:
        """Return the learning rate of the next step."""
        return learning_rate(self.progress.step, self.epoch_steps * self.epochs, self.config)

    def _changing(self) -> Iterator[tuple[str, Tensor]]:
        """Yield what changes in training; frozen weights need no average."""
        frozen = {k for k, p in self.averaged.named_parameters() if not p.requires_grad}
        for key, value in self.averaged.state_dict().items():
            if value.is_floating_point() and key not in frozen:
                yield key, value

    def identity(self) -> str:
        """Return a hash of everything that must be the same for a checkpoint to be continued."""
        caches = [c.path.name for c in (self.data.plain, self.data.flipped) if c is not None]
        return fingerprint([self.settings(), caches])

    def run_facts(self) -> dict[str, Any]:
        """Return duration, epochs and machine of the run."""
        return {
            "minutes": round(self.progress.seconds / 60, 2),
            "epochs": self.progress.epoch,
            "best_epoch": self.progress.best_epoch + 1,
            "dtype": {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}[
                self.accelerator.mixed_precision
            ],
            "machine": machine(),
        }

    def run(self) -> Progress:
        """Train to the end, or continue from the checkpoint of an interrupted run.

        Returns:
            The progress; ``history`` has one entry per epoch.

        Raises:
            CapGenError: the folder holds a run with other settings, or the loss is not finite.
        """
        self.resume()
        with tqdm(
            total=self.epoch_steps * self.epochs,
            initial=self.progress.step,
            unit="step",
            desc=f"train {self.name}",
            disable=not self.accelerator.is_main_process,
        ) as bar:
            while not self.progress.done and self.progress.epoch < self.epochs:
                self._run_epoch(bar)
        self.accelerator.end_training()
        return self.progress

    def _run_epoch(self, bar: tqdm) -> None:
        started, progress = time.perf_counter(), self.progress
        for batch in self.batches():
            self._train_step(batch)
            progress.batch += 1
            bar.update()
            mean = progress.epoch_loss / max(1, progress.epoch_tokens)
            bar.set_postfix(loss=f"{mean:.3f}", refresh=False)
            if progress.step % self.config.checkpoint_steps == 0:
                self._save(started)
                started = time.perf_counter()
        self._end_epoch(started)

    def _train_step(self, batch: Any) -> None:
        progress = self.progress
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        total, count = self.loss(batch)
        # Accelerate averages gradients over processes: times their number, the mean is over the
        # global token count.
        self.accelerator.backward(total / count * self.accelerator.num_processes)
        self.accelerator.clip_grad_norm_(self.learner.parameters(), self.config.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        value = self.accelerator.reduce(total.detach(), "sum").item()
        if not math.isfinite(value):
            raise CapGenError(
                f"the loss is {value} at step {progress.step}",
                "lower the learning rate, or train with --dtype fp32",
            )
        progress.step += 1
        progress.epoch_loss += value
        progress.epoch_tokens += int(count.item())
        self.after_step()

    @torch.no_grad()
    def after_step(self) -> None:
        """Update the averaged weights."""
        if self.average is None:
            return
        # At first the average follows the weights faster, so that early epochs count too.
        decay = min(self.config.average, (1 + self.progress.step) / (10 + self.progress.step))
        for key, value in self._changing():
            self.average[key].lerp_(value, 1 - decay)

    def _end_epoch(self, started: float) -> None:
        progress = self.progress
        entry: dict[str, Any] = {
            "epoch": progress.epoch + 1,
            "step": progress.step,
            "train_loss": progress.epoch_loss / max(1, progress.epoch_tokens),
        }
        evaluated = self.is_evaluated()
        if evaluated:
            entry |= self._evaluate()
        progress.seconds += time.perf_counter() - started
        entry["seconds"] = round(progress.seconds, 1)
        progress.history.append(entry)
        waited = progress.epoch - progress.best_epoch
        progress.epoch += 1
        progress.batch, progress.epoch_loss, progress.epoch_tokens = 0, 0.0, 0
        lost_patience = evaluated and waited >= self.config.patience
        progress.done = progress.epoch == self.epochs or lost_patience
        if self.accelerator.is_main_process:
            self._log(entry)
        self._save(time.perf_counter())

    def _evaluate(self) -> dict[str, Any]:
        """Score the averaged weights; keep the model if they are the best so far."""
        progress = self.progress
        trained = {k: v.detach().clone() for k, v in self.averaged.state_dict().items()}
        if self.average is not None:
            self.averaged.load_state_dict(self.average, strict=False)
        result = self.evaluate()
        score, loss = result.get(self.score, 0.0), result.get("dev_loss", 0.0)
        # Few or short captions can leave BLEU-4 at 0 for many epochs: of equal scores the one with
        # the lower loss is better.
        better = (score, -loss) > (progress.best, -progress.best_loss)
        if loss < progress.best_loss if self.by_loss else better:
            progress.best, progress.best_loss, progress.best_epoch = score, loss, progress.epoch
            if self.accelerator.is_main_process:
                self.keep(result)
        self.averaged.load_state_dict(trained)
        return result

    def _log(self, entry: dict[str, Any]) -> None:
        # Written whole: a run that was killed between log and checkpoint must not log an epoch
        # twice.
        lines = [json.dumps(line, ensure_ascii=False) + "\n" for line in self.progress.history]
        write_text(self.folder / "log.jsonl", "".join(lines))
        numbers = {k: v for k, v in entry.items() if isinstance(v, (int, float))}
        self.accelerator.log(numbers, step=self.progress.step)
        shown = {k: v for k, v in numbers.items() if not self.shown or k in self.shown}
        texts = (f"{v:.3f}" if isinstance(v, float) else str(v) for v in shown.values())
        tqdm.write("  ".join(map(" ".join, zip(shown, texts, strict=True))))
        for image, caption in entry.get("samples", {}).items():
            tqdm.write(f"    {image}: {caption}")

    def _save(self, started: float) -> None:
        """Write everything that training depends on, as tensors and JSON."""
        self.progress.seconds += time.perf_counter() - started
        self.accelerator.wait_for_everyone()
        if not self.accelerator.is_main_process:
            return
        tensors = {f"model.{k}": v for k, v in self.learner.state_dict().items()}
        tensors |= {f"average.{k}": v for k, v in (self.average or {}).items()}
        for index, values in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{k}": torch.as_tensor(v) for k, v in values.items()}
        tensors["rng.cpu"] = torch.get_rng_state()
        if self.accelerator.device.type == "cuda":
            tensors["rng.cuda"] = torch.cuda.get_rng_state()
        scaler = self.accelerator.scaler
        scalars = {"scaler": scaler.state_dict() if scaler is not None else {}}
        more = {"identity": self.identity(), "scalars": scalars}
        save_checkpoint(self.checkpoint_path, tensors, asdict(self.progress) | more)

    def resume(self) -> None:
        """Continue from the checkpoint, if there is one.

        Raises:
            CapGenError: it is of a run with other settings or other data.
        """
        if not self.checkpoint_path.exists():
            return
        tensors, progress = load_checkpoint(self.checkpoint_path)
        if progress.pop("identity") != self.identity():
            raise CapGenError(
                f"{self.folder} holds a run with other settings or other data",
                "choose another folder (--output), or delete this one to start over",
            )
        self.learner.load_state_dict(named_below("model", tensors))
        if self.average is not None:
            average = named_below("average", tensors)
            self.average = {k: v.to(self.accelerator.device) for k, v in average.items()}
        stepped = {int(key.split(".")[1]) for key in tensors if key.startswith("optimizer.")}
        state = {index: named_below(f"optimizer.{index}", tensors) for index in stepped}
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": state})
        torch.set_rng_state(tensors["rng.cpu"])
        if "rng.cuda" in tensors and self.accelerator.device.type == "cuda":
            torch.cuda.set_rng_state(tensors["rng.cuda"])
        scaler = progress.pop("scalars")["scaler"]
        if self.accelerator.scaler is not None and scaler:
            self.accelerator.scaler.load_state_dict(scaler)
        self.progress = Progress(**progress)
        if self.accelerator.is_main_process:
            position = f"epoch {self.progress.epoch + 1}, step {self.progress.step}"
            reached = "finished" if self.progress.done else position
            tqdm.write(f"continuing from {self.checkpoint_path}: {reached}")


def named_below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors whose names begin with ``prefix`` and a point, without both."""
    start = f"{prefix}."
    return {k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)}


def learning_rate(step: int, total: int, config: TrainingConfig) -> float:
    """Return the learning rate of ``step``: a linear warm-up, then a half cosine to 1 % of the
    peak.

    Args:
        step: from 0.
        total: number of steps.
        config: peak and warm-up.
    """
    warmup = max(1, round(config.warmup * total))
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    share = (step - warmup) / max(1, total - warmup)
    return config.learning_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, share))))


def make_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    """Return AdamW over the trainable parameters; only matrices decay."""
    learnable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in learnable if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in learnable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups, lr=config.learning_rate, betas=(0.9, 0.98), eps=1e-9, fused=False
    )


def _accelerator(
    config: TrainingConfig, folder: Path, trackers: Sequence[str], device: torch.device | None
) -> Accelerator:
    with explain_os_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    missing = [name for name in trackers if importlib.util.find_spec(name) is None]
    if missing:
        raise CapGenError(f"{missing[0]} is not installed", f"run: pip install {missing[0]}")
    cpu = device is not None and device.type == "cpu"
    # Accelerate keeps one precision per process, but a notebook trains several models in one.
    AcceleratorState._reset_state()
    dtype = choose_dtype(PartialState(cpu=cpu).device, config.dtype)
    precision = {torch.float32: "no", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    accelerator = Accelerator(
        cpu=cpu, mixed_precision=precision, log_with=list(trackers) or None, project_dir=str(folder)
    )
    if trackers:
        values = {k: v for k, v in asdict(config).items() if v is not None}
        accelerator.init_trackers("capgen", config=values)
    return accelerator
