"""Training a small CLIP: images and their captions drawn together, all others apart, false twins above all."""

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

from capgen_utils.batches import TrainingData, captions_of, epoch_batches
from capgen_utils.checkpoint import load_checkpoint, save_checkpoint
from capgen_utils.config import ContrastiveConfig, choose_device, choose_dtype
from capgen_utils.datasets import Item, Manifest
from capgen_utils.dual_encoder import DualEncoder, pad
from capgen_utils.encoders import as_picture
from capgen_utils.features import FeatureCache
from capgen_utils.files import CapGenError, fingerprint, write_json
from capgen_utils.machine import machine
from capgen_utils.training import Progress, learning_rate
from capgen_utils.twins import hard_negatives

RANKS = (1, 5, 10)
COLDEST = math.log(100)  # CLIP's bound of the logit scale


# --- the loss and its measures ---------------------------------------------------------------------------------------


def info_nce(logits: Tensor, positive: Tensor) -> Tensor:
    """Return InfoNCE in both directions (arXiv 2103.00020, figure 3), where a row may have several right answers.

    Each image has to find its captions among all texts, and each caption its images among all images: cross-entropy
    against the right answers, each with an equal share. Where image i has text i alone, it is the library's loss.

    Args:
        logits: (B, M), cosines over the temperature.
        positive: (B, M), true where text m is a caption of image b. A text without any image is only a wrong answer.

    Returns:
        The mean of the two directions' means, in nats.
    """
    return (_find(logits, positive) + _find(logits.T, positive.T)) / 2


def _find(logits: Tensor, positive: Tensor) -> Tensor:
    answered = positive.any(1)
    shares = positive.float() / positive.sum(1, keepdim=True).clamp(min=1)
    losses = -(shares * logits.float().log_softmax(1)).sum(1)
    return losses[answered].mean()


def recall(similarity: Tensor, positive: Tensor) -> dict[str, float]:
    """Return recall@1, @5 and @10 in both directions, in percent.

    A search succeeds at k where fewer than k wrong answers score as high as the best right one. A text that describes
    several images word for word is right for each of them.

    Args:
        similarity: (I, M) of images and texts.
        positive: (I, M), true where text m is a caption of image i.
    """
    result = {}
    for name, scores, right in (("image to text", similarity, positive), ("text to image", similarity.T, positive.T)):
        best = scores.masked_fill(~right, -torch.inf).max(1, keepdim=True).values
        wrong = ((scores >= best) & ~right).sum(1)[right.any(1)]
        result |= {f"{name} R@{k}": 100 * (wrong < k).float().mean().item() for k in RANKS}
    return result


def same_texts(captions: Sequence[Sequence[str]], dual: DualEncoder) -> tuple[list[str], Tensor]:
    """Return the different captions of images, and which belong to which.

    Args:
        captions: of each image.
        dual: captions that its tokenizer reads alike are one text.

    Returns:
        M texts, and (images, M), true where text m is a caption of image i.
    """
    keys = [[tuple(dual.tokenizer.encode(caption)) for caption in of_image] for of_image in captions]
    texts = {key: text for own, of_image in zip(keys, captions, strict=True) for key, text in zip(own, of_image)}
    columns = {key: column for column, key in enumerate(texts)}
    positive = torch.zeros(len(captions), len(texts), dtype=torch.bool)
    for image, own in enumerate(keys):
        positive[image, [columns[key] for key in own]] = True
    return list(texts.values()), positive


def twin_accuracy(dual: DualEncoder, images: Tensor, captions: Sequence[Sequence[str]]) -> dict[str, float]:
    """Say how often a caption fits its image better than its false twins do.

    Args:
        dual: the judge.
        images: vectors (B, E).
        captions: of each image.

    Returns:
        In percent: ``twins``, of all pairs of a caption and a twin; ``twins, all of an image``, of all images that
        have such pairs, those where every caption won against every twin. Empty where no caption has a twin.
    """
    pairs = [(i, c, twin) for i, own in enumerate(captions) for c in own for twin in hard_negatives(c)]
    if not pairs:
        return {}
    texts = {text: row for row, text in enumerate(dict.fromkeys(text for _, *both in pairs for text in both))}
    vectors = dual.embed_texts(list(texts))
    rows = torch.tensor([[i, texts[caption], texts[twin]] for i, caption, twin in pairs])
    true, false = ((images[rows[:, 0]] * vectors[rows[:, column]]).sum(1) for column in (1, 2))
    won = true > false
    lost = set(rows[~won, 0].tolist())
    judged = set(rows[:, 0].tolist())
    return {
        "twins": 100 * won.float().mean().item(),
        "twins, all of an image": 100 * (1 - len(lost) / len(judged)),
    }


def measure(dual: DualEncoder, manifest: Manifest, cache: FeatureCache, batch_size: int = 256) -> dict[str, float]:
    """Return ``recall`` and ``twin_accuracy`` of a split, all images of it at once.

    Args:
        dual: the dual encoder.
        manifest: one split.
        cache: its stem's grid, the plain view.
        batch_size: images that are encoded together.
    """
    items = [item for item in manifest.items if item.image not in cache.failed and item.captions]
    parts = (items[start : start + batch_size] for start in range(0, len(items), batch_size))
    images = torch.cat([dual.embed_grid(cache.rows([item.image for item in part])) for part in parts])
    captions = [item.captions for item in items]
    texts, positive = same_texts(captions, dual)
    result = recall(dual.similarity(images, dual.embed_texts(texts)), positive)
    result["mean recall"] = sum(result.values()) / len(result)
    return result | twin_accuracy(dual, images, captions)


# --- what is drawn ---------------------------------------------------------------------------------------------------


class Texts:
    """The captions of images and their false twins as token ids; what is read alike is one text.

    Args:
        items: images with captions.
        dual: its tokenizer reads them.
        mirrored: also for the mirrored view, of which fewer captions are true.
    """

    def __init__(self, items: Sequence[Item], dual: DualEncoder, mirrored: bool) -> None:
        self._tokenizer, self._longest = dual.tokenizer, dual.clip.config.text_config.max_position_embeddings
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
        return self._numbers.setdefault(tuple(self._tokenizer.encode(text, self._longest)), len(self._numbers))

    def draw(
        self, items: Sequence[Item], flips: Sequence[bool], config: ContrastiveConfig, rng: np.random.Generator
    ) -> tuple[Tensor, Tensor]:
        """Choose texts for a batch: some captions of each image, some twins of each caption.

        Returns:
            Token ids (M, T) of different texts, and (B, M): true where text m is a caption of image b, chosen for
            it or not.
        """
        own = [self._captions[item.image, flip] for item, flip in zip(items, flips, strict=True)]
        drawn = [c for captions in own for c in _some(captions, config.captions, rng)]
        drawn += [twin for c in drawn for twin in _some(self._twins[c], config.twins, rng)]
        columns = {number: column for column, number in enumerate(dict.fromkeys(drawn))}
        positive = torch.zeros(len(own), len(columns), dtype=torch.bool)
        for image, captions in enumerate(own):
            positive[image, [columns[c] for c in captions if c in columns]] = True
        rows = [_leave_out(self._ids[number], config.word_dropout, rng) for number in columns]
        return pad(rows, self._tokenizer.pad_id), positive


def _some(values: Sequence[int], count: int, rng: np.random.Generator) -> list[int]:
    return [values[i] for i in rng.permutation(len(values))[:count]]


def _leave_out(ids: Sequence[int], probability: float, rng: np.random.Generator) -> list[int]:
    """Leave out tokens between the first and the last."""
    if not probability:
        return list(ids)
    kept = rng.random(len(ids)) >= probability
    kept[0] = kept[-1] = True
    return [i for i, keep in zip(ids, kept, strict=True) if keep]


# --- training --------------------------------------------------------------------------------------------------------


class ContrastiveTrainer:
    """Trains a small CLIP and keeps its best state; a run that was stopped goes on with the epoch it was in.

    Args:
        dual: freshly built, weights initialised from ``config.seed``.
        data: images with captions, and the grid of the stem.
        config: how to train.
        folder: gets ``best/``, ``checkpoint.safetensors`` and ``log.json``.
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
        self.dual, self.data, self.config, self.folder = dual.to(self.device), data.readable(), config, Path(folder)
        self.texts = Texts(self.data.train.items, dual, self.data.flipped is not None)
        self.dual.clip.requires_grad_(True)
        with torch.no_grad():
            self.dual.clip.logit_scale.fill_(-math.log(config.temperature))
        self.average = {k: v.detach().clone() for k, v in self.dual.clip.state_dict().items()}
        self.optimizer = _optimizer(self.dual.clip, config)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.progress = Progress()
        self.total_steps = math.ceil(len(self.data.train) / config.batch_images) * config.epochs

    def train(self) -> Progress:
        bar = tqdm(total=self.total_steps, initial=self.progress.step, unit="step", desc=f"train {self.dual.name}")
        while not self.progress.done and self.progress.epoch < self.config.epochs:
            self._run_epoch(bar)
        bar.close()
        return self.progress

    def _run_epoch(self, bar: tqdm) -> None:
        started, progress = time.perf_counter(), self.progress
        torch.manual_seed(self.config.seed * 100_003 + progress.epoch)
        rng = np.random.default_rng([self.config.seed, progress.epoch, 1])
        total = 0.0
        for items, flips in epoch_batches(self.data, self.config, progress.epoch):
            total += self._step(items, flips, rng)
            progress.step += 1
            bar.update()
        entry = {"epoch": progress.epoch + 1, "train_loss": total}
        t=time.perf_counter()
        self._evaluate(entry)
        entry["evals"]=time.perf_counter()-t
        progress.seconds += time.perf_counter() - started
        entry["seconds"] = progress.seconds
        progress.epoch += 1
        tqdm.write("  ".join(f"{k} {v:.2f}" if isinstance(v, float) else f"{k} {v}" for k, v in entry.items()))

    def _step(self, items: Sequence[Item], flips: Sequence[bool], rng: np.random.Generator) -> float:
        flips = [flip and bool(captions_of(item, True)) for item, flip in zip(items, flips, strict=True)]
        grid = self.data.plain.rows([item.image for item in items])
        chosen = [i for i, flip in enumerate(flips) if flip]
        if chosen:
            grid[chosen] = self.data.flipped.rows([items[i].image for i in chosen])
        tokens, positive = self.texts.draw(items, flips, self.config, rng)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.progress.step, self.total_steps, self.config)
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            hidden = F.dropout(grid.to(self.device).float(), self.config.feature_dropout)
            images = self.dual.images.look(as_picture(hidden))["embedding"]
            texts = self.dual.read(tokens.to(self.device))
        loss = info_nce(self.dual.logits(images, texts), positive.to(self.device))
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.dual.clip.parameters(), self.config.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            self.dual.clip.logit_scale.clamp_(max=COLDEST)
            decay = min(self.config.average, (1 + self.progress.step) / (10 + self.progress.step))
            for k, v in self.dual.clip.state_dict().items():
                self.average[k].lerp_(v, 1 - decay)
        return loss.item()

    def _evaluate(self, entry):
        own = {k: v.detach().clone() for k, v in self.dual.clip.state_dict().items()}
        self.dual.clip.load_state_dict(self.average)
        entry |= measure(self.dual, self.data.dev, self.data.plain)
        self.dual.save(self.folder / "best")
        self.dual.clip.load_state_dict(own)


def _optimizer(model, config):
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.98), eps=1e-6)
