"""One training loop for every captioner: Accelerate, batches grouped by image, resumable to the
bit."""

import importlib.util
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from torch import Tensor, nn
from tqdm.auto import tqdm

from capgen_utils.bundle import Bundle, bundle_info, load_bundle, save_bundle
from capgen_utils.common.device import choose_dtype
from capgen_utils.common.files import (
    CapGenError,
    explain_os_errors,
    fingerprint,
    read_json,
    write_json,
    write_text,
)
from capgen_utils.common.machine import machine, revision
from capgen_utils.common.paths import train_anew
from capgen_utils.common.tensors import load_checkpoint, save_checkpoint
from capgen_utils.config import DecodingConfig, TrainingConfig
from capgen_utils.decoding.captions import Specials
from capgen_utils.decoding.run import caption_manifest
from capgen_utils.evaluation.metrics import bleu, diversity
from capgen_utils.models import CaptionModel
from capgen_utils.models.base import IGNORED
from capgen_utils.text.words import Tokenizer
from capgen_utils.training.batches import (
    Batch,
    Chunk,
    TrainingData,
    chunks_by_length,
    count_targets,
    epoch_batches,
    make_batch,
)
from capgen_utils.vision.dual_encoder import DualEncoder
from capgen_utils.vision.encoder import Encoder

DEV_PROTOCOL = "greedy, dev split, before the weights are rounded to float16"
SAMPLES = 4  # dev images captioned and printed after every evaluation


class _Step(nn.Module):
    """The whole forward pass as one call, which is what wrappers for several processes understand."""

    def __init__(self, model: CaptionModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, features: Tensor, chunks: Sequence[Chunk], label_smoothing: float) -> Tensor:
        """Return the summed loss of all chunks; the images are encoded once."""
        memory = self.model.encode(features)
        losses = [
            self.model.loss(memory, c.inputs, c.image, c.targets, label_smoothing) for c in chunks
        ]
        return torch.stack(losses).sum()


@dataclass
class Progress:
    """Where training stands; everything JSON can hold. Tensors are in the checkpoint beside it."""

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


class Trainer:
    """Trains one captioner and keeps its best bundle.

    Args:
        model_name: key in ``models.MODELS``, or ``joint``.
        model: freshly built, weights initialised from ``config.seed``.
        tokenizer: fitted on the training captions.
        data: images, captions, features.
        encoder: what made the features; described in the bundle.
        config: how to train.
        decoding: defaults for the bundle; dev captions are greedy.
        folder: gets ``bundle/``, ``checkpoint.safetensors`` and ``log.jsonl``.
        preset: name for the bundle.
        extraction_dtype: compute dtype of the features.
        trackers: names that Accelerate knows: ``tensorboard``, ``wandb``.
        device: where to compute.
        scorer: a CLIP that chooses among the captioner's captions, for the bundle.
    """

    def __init__(
        self,
        model_name: str,
        model: CaptionModel,
        tokenizer: Tokenizer,
        data: TrainingData,
        encoder: Encoder,
        config: TrainingConfig,
        decoding: DecodingConfig,
        folder: Path,
        preset: str,
        extraction_dtype: torch.dtype,
        trackers: Sequence[str] = (),
        device: torch.device | None = None,
        scorer: DualEncoder | None = None,
    ) -> None:
        self.scorer = scorer
        self.model_name, self.tokenizer, self.encoder = model_name, tokenizer, encoder
        self.config, self.decoding, self.folder, self.preset = (
            config,
            decoding,
            Path(folder),
            preset,
        )
        self.extraction_dtype, self.data = extraction_dtype, data.readable()
        self.specials = Specials(tokenizer.start_id, tokenizer.end_id, tokenizer.banned_ids)
        self.accelerator = _accelerator(config, self.folder, trackers, device)
        self.step_module = self.accelerator.prepare(_Step(model))
        if (
            self.accelerator.num_processes > 1
        ):  # the same weights everywhere by now, but each its own dropout
            torch.manual_seed(config.seed + self.accelerator.process_index)
        self.model = model
        self.average = (
            {k: v.detach().clone() for k, v in self._floats(model)} if config.average else None
        )
        self.optimizer = self.accelerator.prepare(make_optimizer(model, config))
        self.progress = Progress()
        batches = math.ceil(len(self.data.train) / config.batch_images)
        self.total_steps = batches * config.epochs

    @staticmethod
    def _floats(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """All that changes while training; frozen weights need no average."""
        frozen = {
            name for name, parameter in model.named_parameters() if not parameter.requires_grad
        }
        return (
            (k, v)
            for k, v in model.state_dict().items()
            if v.is_floating_point() and k not in frozen
        )

    @property
    def checkpoint_path(self) -> Path:
        """The one checkpoint; the newest replaces the one before."""
        return self.folder / "checkpoint.safetensors"

    def identity(self) -> str:
        """Hash of what must be the same for a checkpoint to be continued."""
        caches = [
            cache.path.name for cache in (self.data.plain, self.data.flipped) if cache is not None
        ]
        return fingerprint([self.settings(), caches])

    def settings(self) -> str:
        """Hash of what is trained and how, on whatever machine: not of the features' dtype, as
        ``identity`` is."""
        shapes = {k: list(v.shape) for k, v in self.model.state_dict().items()}
        settings = [asdict(self.model.config), asdict(self.config), self.tokenizer.to_json()]
        return fingerprint([shapes, settings, len(self.data.train)])

    def train(self) -> Progress:
        """Train to the end, or go on from the checkpoint of a run that was stopped.

        Returns:
            What was reached; ``history`` has one entry an epoch.

        Raises:
            CapGenError: the folder holds a run of other settings; or the loss is no longer finite.
        """
        self._resume()
        bar = tqdm(
            total=self.total_steps,
            initial=self.progress.step,
            unit="step",
            desc=f"train {self.model_name}",
            disable=not self.accelerator.is_main_process,
        )
        while not self.progress.done and self.progress.epoch < self.config.epochs:
            self._run_epoch(bar)
        bar.close()
        self.accelerator.end_training()
        if self.accelerator.is_main_process:
            self._note_run()
        return self.progress

    def _run_epoch(self, bar: tqdm) -> None:
        started, world = time.perf_counter(), self.accelerator.num_processes
        batches = epoch_batches(
            self.data, self.config, self.progress.epoch, self.accelerator.process_index, world
        )
        self.step_module.train()
        for number, (items, flips) in enumerate(batches):
            if number < self.progress.batch:
                continue  # done before the run was stopped
            # Where fewer images are left than processes, one takes part in the step with an image
            # that does not count.
            items, flips, idle = (
                (items, flips, False) if items else (list(self.data.train.items[:1]), [False], True)
            )
            batch = make_batch(items, flips, self.data, self.tokenizer, self.model.config.seq_len)
            self._train_step(batch, idle)
            self.progress.batch += 1
            bar.update()
            bar.set_postfix(
                loss=f"{self.progress.epoch_loss / max(1, self.progress.epoch_tokens):.3f}",
                refresh=False,
            )
            if self.progress.step % self.config.checkpoint_steps == 0:
                self._save(started)
                started = time.perf_counter()
        self._end_epoch(started)

    def _train_step(self, batch: Batch, idle: bool = False) -> None:
        batch = batch.to(self.accelerator.device)
        chunks = chunks_by_length(batch, self.tokenizer.pad_id, self.model.chunks)
        if idle:
            chunks = [
                replace(chunk, targets=torch.full_like(chunk.targets, IGNORED)) for chunk in chunks
            ]
        self._set_learning_rate()
        self.model.advance(self.progress.step / max(1, self.total_steps))
        with self.accelerator.autocast():
            total = self.step_module(batch.features.float(), chunks, self.config.label_smoothing)
        count = self.accelerator.reduce(count_targets(chunks), "sum")
        # Gradients are averaged over processes: times their number, the mean is over the global
        # token count.
        loss = total / count * self.accelerator.num_processes
        self.accelerator.backward(loss)
        self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        value = self.accelerator.reduce(total.detach(), "sum").item()
        if not math.isfinite(value):
            raise CapGenError(
                f"the loss is {value} at step {self.progress.step}",
                "lower the learning rate, or train with --dtype fp32",
            )
        self.progress.step += 1
        self.progress.epoch_loss += value
        self.progress.epoch_tokens += int(count.item())
        self._update_average()

    def _set_learning_rate(self) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.progress.step, self.total_steps, self.config)

    @torch.no_grad()
    def _update_average(self) -> None:
        if self.average is None:
            return
        # Young averages follow the weights faster, so that the first epochs can be judged too.
        decay = min(self.config.average, (1 + self.progress.step) / (10 + self.progress.step))
        for key, value in self._floats(self.model):
            self.average[key].lerp_(value, 1 - decay)

    def _end_epoch(self, started: float) -> None:
        progress = self.progress
        entry: dict[str, Any] = {"epoch": progress.epoch + 1, "step": progress.step}
        entry["train_loss"] = progress.epoch_loss / max(1, progress.epoch_tokens)
        last = progress.epoch + 1 == self.config.epochs
        if last or (progress.epoch + 1) % self.config.evaluate_every == 0:
            entry |= self._evaluate()
        progress.seconds += time.perf_counter() - started
        entry["seconds"] = round(progress.seconds, 1)
        progress.history.append(entry)
        progress.epoch, progress.batch, progress.epoch_loss, progress.epoch_tokens = (
            progress.epoch + 1,
            0,
            0.0,
            0,
        )
        waited = progress.epoch - 1 - progress.best_epoch
        progress.done = last or ("dev_loss" in entry and waited >= self.config.patience)
        self._log(entry)
        self._save(time.perf_counter())

    def _evaluate(self) -> dict[str, Any]:
        """Score the averaged weights on the dev split; the best weights become the bundle."""
        own = (
            {k: v.detach().clone() for k, v in self.model.state_dict().items()}
            if self.average is not None
            else None
        )
        if self.average is not None:
            self.model.load_state_dict(self.average, strict=False)
        self.model.eval()
        result: dict[str, Any] = {"dev_loss": self._dev_loss()}
        if not self.model.select_by_loss:
            result |= self._dev_captions()
        progress, score = self.progress, result.get("BLEU-4", 0.0)
        better = result["dev_loss"] < progress.best_loss
        if self.config.best_by == "BLEU-4" and not self.model.select_by_loss:
            # Few or short captions can leave BLEU-4 at 0 for many epochs: among equals the lower
            # loss is better.
            better = (score, -result["dev_loss"]) > (progress.best, -progress.best_loss)
        if better:
            progress.best, progress.best_loss = score, result["dev_loss"]
            progress.best_epoch = progress.epoch
            if self.accelerator.is_main_process:
                save_bundle(
                    self.folder / "bundle", self.bundle(result), self.encoder, scorer=self.scorer
                )
        if own is not None:
            self.model.load_state_dict(own)
        self.model.train()
        return result

    def _dev_captions(self) -> dict[str, Any]:
        dev = self.data.dev.limit(self.config.dev_images)
        spoken = caption_manifest(
            self.model, dev, self.data.plain, self.tokenizer, replace(self.decoding, beam=1)
        )
        samples = {item.image: spoken[item.image] for item in dev.items[:SAMPLES]}
        references = {item.image: item.captions for item in dev.items}
        return bleu(spoken, references) | diversity(spoken) | {"samples": samples}

    def bundle(self, dev: Mapping[str, Any]) -> Bundle:
        """Return the model as it is now with everything a bundle says of it."""
        info = bundle_info(
            self.model_name,
            self.model,
            self.encoder,
            self.extraction_dtype,
            self.decoding,
            self.preset,
            dataset=self.data.train.name,
            training=asdict(self.config),
            settings=self.settings(),
            step=self.progress.step,
            revision=revision(),
            dev={k: v for k, v in dev.items() if k != "samples"} | {"protocol": DEV_PROTOCOL},
        )
        return Bundle(self.model, self.tokenizer, info)

    @torch.inference_mode()
    def _dev_loss(self) -> float:
        total, count = 0.0, 0
        dev = self.data.dev.items
        for start in range(0, len(dev), self.config.batch_images):
            items = dev[start : start + self.config.batch_images]
            batch = make_batch(
                items, [False] * len(items), self.data, self.tokenizer, self.model.config.seq_len
            )
            batch = batch.to(self.accelerator.device)
            chunks = chunks_by_length(batch, self.tokenizer.pad_id, self.model.chunks)
            with self.accelerator.autocast():
                total += self.step_module(batch.features.float(), chunks, 0.0).item()
            count += int(count_targets(chunks))
        return total / max(1, count)

    def _note_run(self) -> None:
        """Write into the bundle what the whole run took: known only now, after its best epoch was
        saved."""
        path = self.folder / "bundle" / "config.json"
        if not path.exists():
            return
        info = read_json(path, "delete the run folder and train again")
        if info.get("training_run") is None:
            info["training_run"] = {
                "minutes": round(self.progress.seconds / 60, 2),
                "epochs": self.progress.epoch,
                "best_epoch": self.progress.best_epoch + 1,
                "dtype": self.accelerator.mixed_precision,
                "machine": machine(),
            }
            write_json(path, info)

    def _log(self, entry: dict[str, Any]) -> None:
        if not self.accelerator.is_main_process:
            return
        # Written whole: a run that was killed between log and checkpoint must not log an epoch
        # twice.
        lines = [json.dumps(line, ensure_ascii=False) + "\n" for line in self.progress.history]
        write_text(self.folder / "log.jsonl", "".join(lines))
        numbers = {k: v for k, v in entry.items() if isinstance(v, (int, float))}
        self.accelerator.log(numbers, step=self.progress.step)
        tqdm.write(
            "  ".join(
                f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in numbers.items()
            )
        )
        for image, caption in entry.get("samples", {}).items():
            tqdm.write(f"    {image}: {caption}")

    def _save(self, started: float) -> None:
        self.progress.seconds += time.perf_counter() - started
        self.accelerator.wait_for_everyone()
        if not self.accelerator.is_main_process:
            return
        tensors, scalars = _pack(self)
        progress = asdict(self.progress) | {"identity": self.identity(), "scalars": scalars}
        save_checkpoint(self.checkpoint_path, tensors, progress)

    def _resume(self) -> None:
        if not self.checkpoint_path.exists():
            if not train_anew() and (self.folder / "bundle" / "config.json").is_file():
                self._take_over(load_bundle(self.folder / "bundle"))
            return
        tensors, progress = load_checkpoint(self.checkpoint_path)
        if progress.pop("identity") != self.identity():
            raise CapGenError(
                f"{self.folder} holds a run with other settings or other data",
                "choose another folder (--output), or delete this one to start over",
            )
        _unpack(self, tensors, progress.pop("scalars"))
        self.progress = Progress(**progress)
        if self.accelerator.is_main_process:
            where = (
                "finished"
                if self.progress.done
                else f"epoch {self.progress.epoch + 1}, step {self.progress.step}"
            )
            tqdm.write(f"going on from {self.checkpoint_path}: {where}")

    def _take_over(self, bundle: Bundle) -> None:
        """Take a bundle without its checkpoint for the finished run that it came from.

        Raises:
            CapGenError: it was trained in another way, or on another encoder.
        """
        info, run = bundle.info, bundle.info.get("training_run")
        if run is None:
            return  # it was stopped
        if (
            info.get("settings") != self.settings()
            or info["encoder"]["weights_hash"] != self.encoder.weights_hash()
        ):
            raise CapGenError(
                f"{self.folder} holds a captioner of other settings, or on another encoder",
                "delete the folder, or train anew (TRAIN = True, or CAPGEN_TRAIN=1)",
            )
        self.model.load_state_dict(bundle.model.state_dict())
        log = self.folder / "log.jsonl"
        self.progress = Progress(
            epoch=run["epochs"],
            step=info["step"],
            best=info["dev"].get("BLEU-4", 0.0),
            done=True,
            best_loss=info["dev"]["dev_loss"],
            best_epoch=run["best_epoch"] - 1,
            seconds=60 * run["minutes"],
            history=[json.loads(line) for line in log.read_text("utf-8").splitlines()]
            if log.is_file()
            else [],
        )
        tqdm.write(f"nothing is trained: {self.folder / 'bundle'} is there")


def learning_rate(step: int, total: int, config: TrainingConfig) -> float:
    """Return the learning rate of ``step`` (from 0): linear warm-up, then half a cosine down to 1 %
    of the peak."""
    warmup = max(1, round(config.warmup * total))
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    share = (step - warmup) / max(1, total - warmup)
    return config.learning_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, share))))


def make_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    """Return AdamW over what is learnable; only matrices decay."""
    learnable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in learnable if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in learnable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups, lr=config.learning_rate, betas=(0.9, 0.98), eps=1e-9, fused=False
    )


def pack_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return an optimizer's state as named tensors."""
    state = optimizer.state_dict()["state"]
    return {
        f"optimizer.{index}.{k}": torch.as_tensor(v)
        for index, values in state.items()
        for k, v in values.items()
    }


def unpack_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Give an optimizer the state that ``pack_optimizer`` took; other tensors are passed over."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, index, name = key.split(".", 2)
            state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})


def _accelerator(
    config: TrainingConfig, folder: Path, trackers: Sequence[str], device: torch.device | None
) -> Accelerator:
    with explain_os_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    missing = [name for name in trackers if importlib.util.find_spec(name) is None]
    if missing:
        raise CapGenError(f"{missing[0]} is not installed", f"run: pip install {missing[0]}")
    cpu = device is not None and device.type == "cpu"
    # Accelerate keeps one precision for the whole process; a notebook trains several captioners in
    # one.
    AcceleratorState._reset_state()
    dtype = choose_dtype(PartialState(cpu=cpu).device, config.dtype)
    precision = {torch.float32: "no", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    accelerator = Accelerator(
        cpu=cpu, mixed_precision=precision, log_with=list(trackers) or None, project_dir=str(folder)
    )
    if trackers:
        accelerator.init_trackers(
            "capgen", config={k: v for k, v in asdict(config).items() if v is not None}
        )
    return accelerator


def _pack(trainer: Trainer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Everything that training depends on, as tensors and JSON scalars."""
    tensors = {f"model.{k}": v for k, v in trainer.model.state_dict().items()}
    tensors |= {f"average.{k}": v for k, v in (trainer.average or {}).items()}
    tensors |= pack_optimizer(trainer.optimizer)
    tensors["rng.cpu"] = torch.get_rng_state()
    if trainer.accelerator.device.type == "cuda":
        tensors["rng.cuda"] = torch.cuda.get_rng_state()
    scaler = trainer.accelerator.scaler
    return tensors, {"scaler": scaler.state_dict() if scaler is not None else {}}


def _unpack(trainer: Trainer, tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]) -> None:
    def part(prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

    trainer.model.load_state_dict(part("model."))
    if trainer.average is not None:
        trainer.average = {k: v.to(trainer.accelerator.device) for k, v in part("average.").items()}
    unpack_optimizer(trainer.optimizer, tensors)
    torch.set_rng_state(tensors["rng.cpu"])
    if "rng.cuda" in tensors and trainer.accelerator.device.type == "cuda":
        torch.cuda.set_rng_state(tensors["rng.cuda"])
    if trainer.accelerator.scaler is not None and scalars["scaler"]:
        trainer.accelerator.scaler.load_state_dict(scalars["scaler"])
