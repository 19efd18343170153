"""Training of a captioner: its batches, its dev scores and its bundle (notebook 03)."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from capgen_utils.bundle import Bundle, bundle_info, load_bundle, save_bundle
from capgen_utils.common.files import CapGenError, fingerprint, read_json, write_json
from capgen_utils.common.machine import revision
from capgen_utils.common.paths import train_anew
from capgen_utils.config import DecodingConfig, TrainingConfig
from capgen_utils.decoding.run import caption_manifest
from capgen_utils.evaluation.metrics import bleu, diversity
from capgen_utils.models import CaptionModel
from capgen_utils.text.words import Tokenizer
from capgen_utils.training.batches import (
    Batch,
    Batcher,
    Chunk,
    TrainingData,
    chunks_by_length,
    count_targets,
    epoch_batches,
)
from capgen_utils.training.loop import Loop, Progress
from capgen_utils.vision.dual_encoder import DualEncoder
from capgen_utils.vision.encoder import Encoder

DEV_PROTOCOL = "greedy, dev split, before the weights are rounded to float16"
SAMPLES = 4  # dev images whose captions are printed after every evaluation


class _Step(nn.Module):
    """The whole forward pass as one module, as wrappers for several processes require."""

    def __init__(self, model: CaptionModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, features: Tensor, chunks: Sequence[Chunk], label_smoothing: float) -> Tensor:
        """Return the loss summed over all chunks; the images are encoded once."""
        memory = self.model.encode(features)
        losses = [self.model.loss(memory, *chunk, label_smoothing) for chunk in chunks]
        return torch.stack(losses).sum()


class Trainer(Loop):
    """Trains one captioner and keeps its best bundle.

    Args:
        model: untrained, with weights initialised from ``config.seed``.
        tokenizer: fitted on the training captions.
        data: images, captions, features.
        encoder: the encoder of the features; described in the bundle.
        config: how to train.
        decoding: defaults for the bundle; dev captions are greedy.
        folder: gets ``bundle/``, ``checkpoint.safetensors`` and ``log.jsonl``.
        preset: name for the bundle.
        extraction_dtype: compute dtype of the features.
        trackers, device: see ``Loop``.
        scorer: a CLIP for re-ranking captions, stored in the bundle.
    """

    score = "BLEU-4"

    def __init__(
        self,
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
        super().__init__(
            model.name, model, model, data, config, folder, config.epochs, trackers, device
        )
        self.model, self.tokenizer, self.encoder, self.scorer = model, tokenizer, encoder, scorer
        self.decoding, self.preset, self.extraction_dtype = decoding, preset, extraction_dtype
        self.by_loss = model.select_by_loss or config.best_by != "BLEU-4"
        self.step_module = self.accelerator.prepare(_Step(model))
        self.batcher = Batcher(self.data, tokenizer, model.config.seq_len)
        if self.accelerator.num_processes > 1:  # the same weights everywhere, but other dropout
            torch.manual_seed(config.seed + self.accelerator.process_index)

    def train(self) -> Progress:
        """Train to the end; see ``Loop.run``."""
        progress, path = self.run(), self.folder / "bundle" / "config.json"
        if self.accelerator.is_main_process and path.exists():
            # Known only now: the bundle was written after the best epoch.
            info = read_json(path, "delete the run folder and train again")
            if info.get("training_run") is None:
                write_json(path, info | {"training_run": self.run_facts()})
        return progress

    def settings(self) -> str:
        """See ``Loop.settings``. Unlike ``identity`` it does not depend on the features' dtype."""
        shapes = {k: list(v.shape) for k, v in self.model.state_dict().items()}
        settings = [asdict(self.model.config), asdict(self.config), self.tokenizer.to_json()]
        return fingerprint([shapes, settings, len(self.data.train)])

    def batches(self) -> Iterator[Batch]:
        """See ``Loop.batches``."""
        self.step_module.train()
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        chosen = epoch_batches(self.data, self.config, self.progress.epoch, rank, world)
        for items, flips in islice(chosen, self.progress.batch, None):
            if items:
                yield self.batcher.batch(items, flips)
            else:  # fewer images than processes: take part in the step with an image without effect
                yield replace(self.batcher.batch(self.data.train.items[:1], [False]), idle=True)

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """See ``Loop.loss``; the terms are tokens."""
        self.model.advance(self.progress.step / (self.epoch_steps * self.epochs))
        total, count = self._forward(batch, self.config.label_smoothing)
        return total, self.accelerator.reduce(count, "sum")

    def _forward(self, batch: Batch, label_smoothing: float) -> tuple[Tensor, Tensor]:
        batch = batch.to(self.accelerator.device)
        chunks = chunks_by_length(batch, self.tokenizer.pad_id, self.model.chunks)
        with self.accelerator.autocast():
            total = self.step_module(batch.features.float(), chunks, label_smoothing)
        return total, count_targets(chunks)

    def evaluate(self) -> dict[str, Any]:
        """Return the loss on the dev split and, unless the model is selected by it, BLEU."""
        self.model.eval()
        result: dict[str, Any] = {"dev_loss": self._dev_loss()}
        if not self.model.select_by_loss:
            dev, decoding = (
                self.data.dev.limit(self.config.dev_images),
                replace(self.decoding, beam=1),
            )
            captions = caption_manifest(self.model, dev, self.data.plain, self.tokenizer, decoding)
            references = {item.image: item.captions for item in dev.items}
            samples = {item.image: captions[item.image] for item in dev.items[:SAMPLES]}
            result |= bleu(captions, references) | diversity(captions) | {"samples": samples}
        self.model.train()
        return result

    @torch.inference_mode()
    def _dev_loss(self) -> float:
        total, count, size = 0.0, 0, self.config.batch_images
        for start in range(0, len(self.data.dev), size):
            items = self.data.dev.items[start : start + size]
            loss, tokens = self._forward(self.batcher.batch(items, [False] * len(items)), 0.0)
            total, count = total + loss.item(), count + int(tokens)
        return total / max(1, count)

    def keep(self, result: dict[str, Any]) -> None:
        """Write the model as it is now as the bundle, with its scores."""
        info = bundle_info(
            self.model.name,
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
            dev={k: v for k, v in result.items() if k != "samples"} | {"protocol": DEV_PROTOCOL},
        )
        bundle = Bundle(self.model, self.tokenizer, info)
        save_bundle(self.folder / "bundle", bundle, self.encoder, scorer=self.scorer)

    def resume(self) -> None:
        """Continue from the checkpoint; a bundle without one is taken as a finished run.

        Raises:
            CapGenError: it was trained with other settings, other data or another encoder.
        """
        super().resume()
        known = (self.folder / "bundle" / "config.json").is_file()
        if self.checkpoint_path.exists() or train_anew() or not known:
            return
        bundle, log = load_bundle(self.folder / "bundle"), self.folder / "log.jsonl"
        info, facts = bundle.info, bundle.info.get("training_run")
        if facts is None:
            return  # the run was interrupted
        same_encoder = info["encoder"]["weights_hash"] == self.encoder.weights_hash()
        if info.get("settings") != self.settings() or not same_encoder:
            raise CapGenError(
                f"{self.folder} holds a captioner with other settings, or on another encoder",
                "delete the folder, or train anew (TRAIN = True, or CAPGEN_TRAIN=1)",
            )
        self.model.load_state_dict(bundle.model.state_dict())
        lines = log.read_text("utf-8").splitlines() if log.is_file() else []
        self.progress = Progress(
            epoch=facts["epochs"],
            step=info["step"],
            best=info["dev"].get("BLEU-4", 0.0),
            best_loss=info["dev"]["dev_loss"],
            best_epoch=facts["best_epoch"] - 1,
            seconds=60 * facts["minutes"],
            done=True,
            history=[json.loads(line) for line in lines],
        )
        tqdm.write(f"nothing to train: {self.folder / 'bundle'} exists")
