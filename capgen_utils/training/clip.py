"""Training a small CLIP: images and their captions drawn together, all others apart, false twins
above all."""

import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from capgen_utils.common.device import choose_device, choose_dtype
from capgen_utils.common.files import CapGenError, fingerprint, write_text
from capgen_utils.common.machine import machine
from capgen_utils.common.paths import data_dir
from capgen_utils.common.tensors import load_checkpoint, save_checkpoint
from capgen_utils.config import ClipPrefixConfig, ContrastiveConfig
from capgen_utils.data.datasets import load_dataset
from capgen_utils.data.manifest import Item
from capgen_utils.models import IGNORED, CaptionModel, build_model
from capgen_utils.models.clip_prefix import ClipPrefixCaptioner
from capgen_utils.presets import Preset
from capgen_utils.text.twins import hard_negatives
from capgen_utils.text.vocabulary import fit_tokenizer
from capgen_utils.training.batches import TrainingData, captions_of, epoch_batches
from capgen_utils.training.clip_loss import SAMPLE, info_nce, measure, twin_loss
from capgen_utils.training.encoder import preset_encoder
from capgen_utils.training.trainer import (
    Progress,
    learning_rate,
    make_optimizer,
    pack_optimizer,
    unpack_optimizer,
)
from capgen_utils.vision.clip import as_picture
from capgen_utils.vision.dual_encoder import DualEncoder, pad
from capgen_utils.vision.features import extract

FLOOR = 0.02  # share of all variance
COLDEST = math.log(100)  # CLIP's bound of the logit scale


class Texts:
    """The captions of images and their false twins as token ids; what is read alike is one text.

    Args:
        items: images with captions.
        dual: its tokenizer reads them.
        mirrored: also for the mirrored view, of which fewer captions are true.
    """

    def __init__(self, items: Sequence[Item], dual: DualEncoder, mirrored: bool) -> None:
        self._tokenizer, self._longest = (
            dual.tokenizer,
            dual.clip.config.text_config.max_position_embeddings,
        )
        self._numbers: dict[tuple[int, ...], int] = {}
        self._twins: dict[int, list[int]] = {}
        self._captions = {
            (item.image, flip): [self._number(caption) for caption in captions_of(item, flip)]
            for flip in ((False, True) if mirrored else (False,))
            for item in items
        }
        self._ids = list(self._numbers)

    def _number(self, caption: str) -> int:
        number = self._add(caption)
        if number not in self._twins:
            self._twins[number] = [self._add(twin) for twin in hard_negatives(caption)]
        return number

    def _add(self, text: str) -> int:
        return self._numbers.setdefault(
            tuple(self._tokenizer.encode(text, self._longest)), len(self._numbers)
        )

    def draw(
        self,
        items: Sequence[Item],
        flips: Sequence[bool],
        config: ContrastiveConfig,
        rng: np.random.Generator,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Choose texts for a batch: some captions of each image, some twins of each caption.

        Returns:
            Token ids (M, T) of different texts; (B, M), true where text m is a caption of image b,
            chosen for it or not; and (P, 2), the columns of captions and of their twins.
        """
        own = [self._captions[item.image, flip] for item, flip in zip(items, flips, strict=True)]
        drawn = dict.fromkeys(c for captions in own for c in _some(captions, config.captions, rng))
        pairs = [(c, twin) for c in drawn for twin in _some(self._twins[c], config.twins, rng)]
        columns = {
            number: column
            for column, number in enumerate(dict.fromkeys([*drawn, *(t for _, t in pairs)]))
        }
        positive = torch.zeros(len(own), len(columns), dtype=torch.bool)
        for image, captions in enumerate(own):
            positive[image, [columns[c] for c in captions if c in columns]] = True
        rows = [_leave_out(self._ids[number], config.word_dropout, rng) for number in columns]
        places = torch.tensor(
            [[columns[c], columns[twin]] for c, twin in pairs], dtype=torch.long
        ).view(-1, 2)
        return pad(rows, self._tokenizer.pad_id), positive, places


def _some(values: Sequence[int], count: int, rng: np.random.Generator) -> list[int]:
    return [values[i] for i in rng.permutation(len(values))[:count]]


def _leave_out(ids: Sequence[int], probability: float, rng: np.random.Generator) -> list[int]:
    """Leave out tokens between the first and the last."""
    if not probability:
        return list(ids)
    kept = rng.random(len(ids)) >= probability
    kept[0] = kept[-1] = True
    return [i for i, keep in zip(ids, kept, strict=True) if keep]


# --- keeping what stands where


class Reconstruction(nn.Module):
    """Reads the stem's grid back from an image's vector; needed while training alone.

    A caption that says what stands to the left is of use only to an image half that knows places,
    and the other way round, so left to themselves both wait for each other for a long time. A
    vector that tells what stands where needs no captions to learn it (self-supervision beside CLIP,
    as in arXiv 2112.12750), and then the text half learns alone.

    The grid is whitened first: else its loudest directions, colours say, would be all that is worth
    keeping.

    Args:
        dual: whose image vectors are read.
        grids: (n, N, D), of some images: what is usual in the stem's grid.
    """

    mean: Tensor
    whiten: Tensor
    variance: Tensor

    def __init__(self, dual: DualEncoder, grids: Tensor) -> None:
        super().__init__()
        self.patch = dual.clip.config.vision_config.patch_size
        patches = self._patches(as_picture(grids.float())).flatten(0, 2)  # (n * patches, D)
        self.register_buffer("mean", patches.mean(0), persistent=False)
        covariance = (patches - self.mean).T.cov(correction=0)
        values, directions = torch.linalg.eigh(covariance)
        floor = FLOOR * values.sum()  # quieter directions are noise, and stay quiet
        self.register_buffer(
            "whiten", directions / (values.clamp(min=0) + floor).sqrt(), persistent=False
        )
        self.register_buffer(
            "variance", ((patches - self.mean) @ self.whiten).pow(2).mean(), persistent=False
        )
        places = patches.shape[0] // len(grids)
        self.read = nn.Linear(dual.images.outputs["embedding"][0], places * patches.shape[1])

    def _patches(self, pictures: Tensor) -> Tensor:
        """(B, D, side, side) -> the mean of each patch (B, side / patch, side / patch, D)."""
        return F.avg_pool2d(pictures, self.patch).permute(0, 2, 3, 1)

    def forward(self, vectors: Tensor, pictures: Tensor) -> Tensor:
        """Return the share of the variance of ``pictures`` (B, D, side, side) that ``vectors`` (B,
        E) do not tell."""
        target = ((self._patches(pictures) - self.mean) @ self.whiten).flatten(1)
        found = self.read(vectors * vectors.shape[1] ** 0.5)  # numbers of about unit size
        return (found.float() - target).pow(2).mean() / self.variance


def speaker(dual: DualEncoder) -> CaptionModel:
    """Return an untrained captioner that says captions from an image's vector; needed while
    training alone.

    Comparing teaches a vector what tells its image from the others in the batch. Saying teaches it
    to hold all that a caption says, in a form that can be read off (CoCa, arXiv 2205.01917).
    """
    text = dual.clip.config.text_config
    config = ClipPrefixConfig(
        seq_len=text.max_position_embeddings,
        d_model=text.hidden_size,
        n_decode=2,
        n_head=text.num_attention_heads,
        fc_dim=text.intermediate_size,
    )
    return build_model(
        ClipPrefixCaptioner.name, config, dual.tokenizer, dual.images.outputs["embedding"]
    )


# --- training


class ContrastiveTrainer:
    """Trains a small CLIP and keeps its best state; a run that was stopped goes on with the epoch
    it was in.

    Args:
        dual: freshly built, weights initialised from ``config.seed``.
        data: images with captions, and the grid of the stem.
        config: how to train.
        folder: gets ``best/``, ``checkpoint.safetensors`` and ``log.jsonl``.
        device: where to compute.
    """

    def __init__(
        self,
        dual: DualEncoder,
        data: TrainingData,
        config: ContrastiveConfig,
        folder: Path,
        device: torch.device | None = None,
    ) -> None:
        self.device = device or choose_device()
        self.dtype = choose_dtype(self.device, config.dtype)
        self.dual, self.data, self.config, self.folder = (
            dual.to(self.device),
            data.readable(),
            config,
            Path(folder),
        )
        self.texts = Texts(self.data.train.items, dual, self.data.flipped is not None)
        self.weights = dual.clip.requires_grad_(True)
        self.learners = nn.ModuleDict({"clip": self.weights})
        if config.reconstruction:
            grids = self.data.plain.rows([item.image for item in self.data.train.items[:SAMPLE]])
            self.learners["reconstruction"] = Reconstruction(dual, grids).to(self.device)
        if config.captioning:
            self.learners["speaker"] = speaker(dual).to(self.device)
        with torch.no_grad():
            self.weights.logit_scale.fill_(-math.log(config.temperature))
        self.average = {k: v.detach().clone() for k, v in self.weights.state_dict().items()}
        self.optimizer = make_optimizer(self.learners, config)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.progress = Progress()
        self.looking_steps, self.matching_steps = (
            math.ceil(len(self.data.train) / config.batch_images) * epochs
            for epochs in (config.looking, config.epochs)
        )
        if config.looking and not config.reconstruction:
            raise CapGenError(
                "looking has nothing to learn by", "give reconstruction a weight above 0"
            )

    def identity(self) -> str:
        """Hash of what must be the same for a checkpoint to be continued."""
        caches = [
            cache.path.name for cache in (self.data.plain, self.data.flipped) if cache is not None
        ]
        settings = [self.dual.images.settings, asdict(self.config), self.dual.tokenizer.to_json()]
        return fingerprint([settings, caches, len(self.data.train)])

    def train(self) -> DualEncoder:
        """Train to the end, or go on from the checkpoint of a run that was stopped.

        Returns:
            The dual encoder as it was after its best epoch by the score on dev, with its
            ``training_run``.

        Raises:
            CapGenError: the folder holds a run of other settings; or the loss is no longer finite.
        """
        self._resume()
        total = self.looking_steps + self.matching_steps
        bar = tqdm(
            total=total, initial=self.progress.step, unit="step", desc=f"train {self.dual.name}"
        )
        while not self.progress.done:
            self._run_epoch(bar)
        bar.close()
        best = DualEncoder.load(self.folder / "best")
        best.images.training_run = {
            "minutes": round(self.progress.seconds / 60, 2),
            "epochs": self.progress.epoch,
            "best_epoch": self.progress.best_epoch + 1,
            "dtype": str(self.dtype).removeprefix("torch."),
            "machine": machine(),
        }
        return best

    def _run_epoch(self, bar: tqdm) -> None:
        started, progress, losses = time.perf_counter(), self.progress, []
        torch.manual_seed(
            self.config.seed * 1009 + progress.epoch
        )  # dropout depends on seed and epoch alone
        rng = np.random.default_rng([self.config.seed, progress.epoch, 1])
        for items, flips in epoch_batches(self.data, self.config, progress.epoch):
            losses.append(self._step(items, flips, rng))
            bar.update()
            bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
        entry: dict[str, float] = {
            "epoch": progress.epoch + 1,
            "train_loss": sum(losses) / len(losses),
        }
        if not self._looking:
            entry |= self._evaluate()
        progress.epoch += 1
        waited = progress.epoch - 1 - max(progress.best_epoch, self.config.looking)
        progress.done = (
            progress.epoch >= self.config.looking + self.config.epochs
            or waited >= self.config.patience
        )
        progress.seconds += time.perf_counter() - started
        entry["seconds"] = round(progress.seconds, 1)
        progress.history.append(entry)
        self._save()
        shown = ("epoch", "train_loss", "mean recall", "twins", "seconds")
        tqdm.write(
            "  ".join(f"{k} {entry[k]:.2f}".removesuffix(".00") for k in shown if k in entry)
        )

    def _step(
        self, items: Sequence[Item], flips: Sequence[bool], rng: np.random.Generator
    ) -> float:
        grid, flips = self._grid(items, flips)
        for group in self.optimizer.param_groups:
            group["lr"] = self._learning_rate()
        loss = self._loss(as_picture(grid.to(self.device).float()), items, flips, rng)
        if not math.isfinite(loss.item()):
            raise CapGenError(
                f"the loss is {loss.item()} at step {self.progress.step}", "lower the learning rate"
            )
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.learners.parameters(), self.config.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self._after_step()
        return loss.item()

    @property
    def _looking(self) -> bool:
        return self.progress.epoch < self.config.looking

    def _learning_rate(self) -> float:
        """Looking has a warm-up and a cosine of its own."""
        if self._looking:
            return learning_rate(self.progress.step, self.looking_steps, self.config)
        return learning_rate(
            self.progress.step - self.looking_steps, self.matching_steps, self.config
        )

    def _loss(
        self,
        pictures: Tensor,
        items: Sequence[Item],
        flips: Sequence[bool],
        rng: np.random.Generator,
    ) -> Tensor:
        config = self.config
        with self._autocast():
            images = self.dual.images.look(F.dropout(pictures, config.feature_dropout))["embedding"]
            lost = images.new_zeros(())
            if config.reconstruction:
                lost = self.learners["reconstruction"](images, pictures)
        if self._looking:
            return lost
        tokens, positive, pairs = (
            part.to(self.device) for part in self.texts.draw(items, flips, config, rng)
        )
        with self._autocast():
            texts = self.dual.read(tokens)
            said = self._say(images, tokens, positive) if config.captioning else 0.0
        logits = self.dual.logits(images, texts)
        matched = info_nce(logits, positive) + config.twin_weight * twin_loss(
            logits, positive, pairs
        )
        return matched + config.reconstruction * lost + config.captioning * said

    def _say(self, images: Tensor, tokens: Tensor, positive: Tensor) -> Tensor:
        """Return the cross-entropy of each image's captions, in nats a token, as a mean over all
        tokens."""
        image, column = positive.nonzero(as_tuple=True)
        inputs, targets = tokens[column, :-1], tokens[column, 1:]
        targets = targets.masked_fill(targets == self.dual.tokenizer.pad_id, IGNORED)
        own: Any = self.learners["speaker"]
        return own.loss(own.encode(images), inputs, image, targets) / (targets != IGNORED).sum()

    def _grid(self, items: Sequence[Item], flips: Sequence[bool]) -> tuple[Tensor, list[bool]]:
        """Return the stem's grid of each view; an image none of whose captions may be mirrored is
        taken as it is."""
        flips = [
            flip and bool(captions_of(item, True)) for item, flip in zip(items, flips, strict=True)
        ]
        grid = self.data.plain.rows([item.image for item in items])
        mirrored = [i for i, flip in enumerate(flips) if flip]
        if mirrored and self.data.flipped is not None:
            grid[mirrored] = self.data.flipped.rows([items[i].image for i in mirrored])
        return grid, flips

    @torch.no_grad()
    def _after_step(self) -> None:
        self.weights.logit_scale.clamp_(max=COLDEST)
        self.progress.step += 1
        # Young averages follow the weights faster, so that the first epochs can be judged too.
        decay = min(self.config.average, (1 + self.progress.step) / (10 + self.progress.step))
        for key, value in self.weights.state_dict().items():
            self.average[key].lerp_(value, 1 - decay)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(
            self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32
        )

    def _evaluate(self) -> dict[str, float]:
        """Measure the averaged weights on dev; the best ones are saved."""
        own = {key: value.detach().clone() for key, value in self.weights.state_dict().items()}
        self.weights.load_state_dict(self.average)
        with self._autocast():
            result = measure(self.dual, self.data.dev, self.data.plain)
        if result["score"] > self.progress.best:
            self.progress.best, self.progress.best_epoch = result["score"], self.progress.epoch
            self.dual.save(self.folder / "best")
        self.weights.load_state_dict(own)
        return result

    def _save(self) -> None:
        tensors = {f"model.{k}": v for k, v in self.learners.state_dict().items()}
        tensors |= {f"average.{k}": v for k, v in self.average.items()}
        tensors |= pack_optimizer(self.optimizer)
        progress = asdict(self.progress) | {
            "identity": self.identity(),
            "scaler": self.scaler.state_dict(),
        }
        save_checkpoint(self.folder / "checkpoint.safetensors", tensors, progress)
        lines = [json.dumps(line) + "\n" for line in self.progress.history]
        write_text(self.folder / "log.jsonl", "".join(lines))

    def _resume(self) -> None:
        path = self.folder / "checkpoint.safetensors"
        if not path.exists():
            return
        tensors, progress = load_checkpoint(path)
        if progress.pop("identity") != self.identity():
            raise CapGenError(
                f"{self.folder} holds a run with other settings or other data",
                f"delete {self.folder}",
            )
        self.learners.load_state_dict(
            {k[6:]: v for k, v in tensors.items() if k.startswith("model.")}
        )
        self.average = {
            k[8:]: v.to(self.device) for k, v in tensors.items() if k.startswith("average.")
        }
        unpack_optimizer(self.optimizer, tensors)
        if scaler := progress.pop("scaler"):
            self.scaler.load_state_dict(scaler)
        self.progress = Progress(**progress)
        tqdm.write(f"going on from {path}: epoch {self.progress.epoch + 1}")


def pretrain_dual_encoder(
    preset: Preset,
    root: Path | None = None,
    folder: Path | None = None,
    judge: bool = False,
    stem_weights: Path | None = None,
) -> Path:
    """Train the small CLIP of a preset from its image-caption pairs, once; later calls find it.

    Args:
        preset: names the dataset, the stem, the sizes and the training.
        root: folder of the dataset, where it is not in its usual place.
        folder: instead of ``dual_encoder_folder``.
        judge: train the other one, which serves for nothing but measuring.
        stem_weights: a local weights file of the stem.

    Returns:
        The folder of the dual encoder.

    Raises:
        CapGenError: the dataset or the stem's weights cannot be had.
    """
    folder = folder or dual_encoder_folder(preset, judge)
    if (folder / "model.safetensors").is_file():
        return folder
    recipe = preset.judge if judge else preset.clip
    stem = preset_encoder(preset, root, stem_weights)
    print(f"training a small CLIP on {stem.name} once; it is kept in {folder}")
    manifest = load_dataset(preset.dataset, root)
    seen = load_dataset(recipe.dataset) if recipe.dataset else manifest
    train = seen.split("train")
    flipped = extract(train, stem, "grid", flip=True) if preset.flip else None
    data = TrainingData(train, seen.split("dev"), extract(seen, stem, "grid"), flipped)
    tokenizer = fit_tokenizer(recipe.tokenizer, train.captions(), preset.min_count)
    torch.manual_seed(recipe.training.seed)
    dual = DualEncoder.new(recipe.sizes, stem, tokenizer)
    best = ContrastiveTrainer(
        dual, data, recipe.training, folder.parent / f"{folder.name}-run"
    ).train()
    best.clip.half().float()  # as it is kept
    run = best.images.training_run = dict(best.images.training_run or {})
    grid = extract(manifest, stem, "grid")
    for split in ("dev", "test"):
        if split in manifest.split_names():
            scores = measure(best.to(choose_device()), manifest.split(split), grid)
            run[split] = {key: round(value, 2) for key, value in scores.items()}
            print(f"{split}: " + ", ".join(f"{key} {value:.1f}" for key, value in scores.items()))
    best.save(folder)
    return folder


def dual_encoder_folder(preset: Preset, judge: bool = False) -> Path:
    """Return where a preset's small CLIP is kept, or the one that only measures."""
    return data_dir() / "encoders" / f"{preset.name}_{'judge' if judge else 'clip'}"
