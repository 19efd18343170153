"""Training of a small CLIP: images against captions, and captions against false twins (notebook
06).

Its texts, its losses, its retrieval measures, and its training loop.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from capgen_utils.common.files import CapGenError, fingerprint
from capgen_utils.config import ClipPrefixConfig, ContrastiveConfig
from capgen_utils.data.manifest import Item, Manifest
from capgen_utils.models import IGNORED, CaptionModel, build_model
from capgen_utils.models.clip_prefix import ClipPrefixCaptioner
from capgen_utils.text.twins import hard_negatives
from capgen_utils.training.batches import TrainingData, captions_of, epoch_batches
from capgen_utils.training.loop import Loop, learning_rate
from capgen_utils.vision.clip import as_picture
from capgen_utils.vision.dual_encoder import DualEncoder, pad
from capgen_utils.vision.features import FeatureCache

FLOOR = 0.02  # share of all variance
RANKS = (1, 5, 10)
SAMPLE = 512  # images for the statistics of the stem's grid
COLDEST = math.log(100)  # CLIP's bound of the logit scale


Text = tuple[int, ...]  # token ids


class Texts:
    """The captions of images and their false twins as token ids; equal token ids are one text.

    Args:
        items: images with captions.
        dual: its tokenizer reads them.
        mirrored: include the mirrored view, of which fewer captions are true.
    """

    def __init__(self, items: Sequence[Item], dual: DualEncoder, mirrored: bool) -> None:
        self._tokenizer = dual.tokenizer
        self._longest = dual.clip.config.text_config.max_position_embeddings
        self._captions: dict[tuple[str, bool], list[Text]] = {}
        self._twins: dict[Text, list[Text]] = {}
        for flip in (False, True) if mirrored else (False,):
            for item in items:
                captions = captions_of(item, flip)
                texts = self._captions[item.image, flip] = self._read(captions)
                for caption, text in zip(captions, texts, strict=True):
                    if text not in self._twins:
                        self._twins[text] = self._read(hard_negatives(caption))

    def _read(self, captions: Iterable[str]) -> list[Text]:
        return [tuple(self._tokenizer.encode(text, self._longest)) for text in captions]

    def views(self, items: Sequence[Item], flips: Sequence[bool]) -> list[bool]:
        """Return ``flips``, without images whose captions all mention a side."""
        pairs = zip(items, flips, strict=True)
        return [flip and bool(self._captions.get((item.image, True))) for item, flip in pairs]

    def draw(
        self,
        items: Sequence[Item],
        flips: Sequence[bool],
        config: ContrastiveConfig,
        rng: np.random.Generator,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Choose texts for a batch: some captions of each image, some twins of each caption.

        Returns:
            Token ids (M, T) of different texts; positives (B, M), true where text m is a caption of
            image b, whether or not it was chosen for it; and the columns of captions and their
            twins (P, 2).
        """
        captions = [
            self._captions[item.image, flip] for item, flip in zip(items, flips, strict=True)
        ]
        drawn = dict.fromkeys(c for own in captions for c in _some(own, config.captions, rng))
        pairs = [(c, twin) for c in drawn for twin in _some(self._twins[c], config.twins, rng)]
        texts = dict.fromkeys([*drawn, *(twin for _, twin in pairs)])
        columns = {text: column for column, text in enumerate(texts)}
        positive = torch.zeros(len(captions), len(columns), dtype=torch.bool)  # (B, M)
        for image, own in enumerate(captions):
            positive[image, [columns[c] for c in own if c in columns]] = True
        rows = [_leave_out(text, config.word_dropout, rng) for text in texts]
        twins = torch.tensor([[columns[text] for text in pair] for pair in pairs], dtype=torch.long)
        return pad(rows, self._tokenizer.pad_id), positive, twins.view(-1, 2)


def _some(values: Sequence[Text], count: int, rng: np.random.Generator) -> list[Text]:
    return [values[i] for i in rng.permutation(len(values))[:count]]


def _leave_out(ids: Sequence[int], probability: float, rng: np.random.Generator) -> list[int]:
    """Drop tokens between the first and the last."""
    if not probability:
        return list(ids)
    kept = rng.random(len(ids)) >= probability
    kept[0] = kept[-1] = True
    return [i for i, keep in zip(ids, kept, strict=True) if keep]


# --- losses


def info_nce(logits: Tensor, positive: Tensor) -> Tensor:
    """Return InfoNCE in both directions (arXiv 2103.00020, figure 3), with several positives.

    Each image has to find its captions among all texts, and each caption its images among all
    images: cross-entropy against the positives, each with an equal share. If text i is the only
    caption of image i, this is the library's loss.

    Args:
        logits: (B, M), cosines divided by the temperature.
        positive: (B, M), true where text m is a caption of image b. A text without an image is a
            negative for all images.

    Returns:
        The mean of the two directions' means, in nats.
    """
    return (_find(logits, positive) + _find(logits.T, positive.T)) / 2


def _find(logits: Tensor, positive: Tensor) -> Tensor:
    shares = positive.float() / positive.sum(1, keepdim=True).clamp(min=1)  # (B, M)
    losses = -(shares * logits.float().log_softmax(1)).sum(1)  # (B,)
    return losses[positive.any(1)].mean()


def twin_loss(logits: Tensor, positive: Tensor, pairs: Tensor) -> Tensor:
    """Return the mean cross-entropy of choosing between a caption and its false twin, in nats.

    In ``info_nce`` the twin is one of hundreds of negatives; here it is the only one.

    Args:
        logits: (B, M), cosines divided by the temperature.
        positive: (B, M), true where text m is a caption of image b.
        pairs: (P, 2), columns of captions and of their twins.
    """
    caption, twin = pairs.unbind(1)  # (P,) each
    chosen = positive[:, caption] & ~positive[:, twin]  # (B, P)
    return (
        F.softplus(logits[:, twin] - logits[:, caption])[chosen].mean()
        if chosen.any()
        else logits.sum() * 0
    )


class Reconstruction(nn.Module):
    """Reconstructs the stem's grid from an image's vector; used only in training.

    A caption that mentions positions is useful only to an image half that knows positions, and the
    other way round, so neither half learns relations for a long time. Reconstruction needs no
    captions (self-supervision beside CLIP, as in arXiv 2112.12750); once the vectors hold
    positions, the text half learns quickly.

    The grid is whitened first: otherwise only its strongest directions, such as colours, would be
    worth reconstructing.

    Args:
        dual: whose image vectors are read.
        grids: (n, N, D), of a sample of images, for the statistics of the grid.
    """

    mean: Tensor
    whiten: Tensor
    variance: Tensor

    def __init__(self, dual: DualEncoder, grids: Tensor) -> None:
        super().__init__()
        self.patch = dual.clip.config.vision_config.patch_size
        patches = self._patches(as_picture(grids.float())).flatten(0, 2)  # (n * patches, D)
        mean = patches.mean(0)  # (D,)
        values, directions = torch.linalg.eigh((patches - mean).T.cov(correction=0))
        floor = FLOOR * values.sum()  # weaker directions are noise and stay weak
        whiten = directions / (values.clamp(min=0) + floor).sqrt()  # (D, D)
        variance = ((patches - mean) @ whiten).pow(2).mean()
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("whiten", whiten, persistent=False)
        self.register_buffer("variance", variance, persistent=False)
        size = patches.shape[0] // len(grids) * patches.shape[1]
        self.read = nn.Linear(dual.images.outputs["embedding"][0], size)

    def _patches(self, pictures: Tensor) -> Tensor:
        """(B, D, side, side) -> the mean of each patch (B, side / patch, side / patch, D)."""
        return F.avg_pool2d(pictures, self.patch).permute(0, 2, 3, 1)

    def forward(self, vectors: Tensor, pictures: Tensor) -> Tensor:
        """Return the share of the variance of ``pictures`` that ``vectors`` do not explain.

        Args:
            vectors: (B, E).
            pictures: (B, D, side, side).
        """
        target = ((self._patches(pictures) - self.mean) @ self.whiten).flatten(
            1
        )  # (B, patches * D)
        predicted = self.read(vectors * vectors.shape[1] ** 0.5)  # inputs of about unit size
        return (predicted.float() - target).pow(2).mean() / self.variance


def speaker(dual: DualEncoder) -> CaptionModel:
    """Return an untrained captioner that reads an image's vector; used only in training.

    Contrast teaches a vector what distinguishes its image from the others in the batch. Captioning
    teaches it to hold everything that the captions mention (CoCa, arXiv 2205.01917).
    """
    text = dual.clip.config.text_config
    config = ClipPrefixConfig(
        seq_len=text.max_position_embeddings,
        d_model=text.hidden_size,
        n_decode=2,
        n_head=text.num_attention_heads,
        fc_dim=text.intermediate_size,
    )
    name, shape = ClipPrefixCaptioner.name, dual.images.outputs["embedding"]
    return build_model(name, config, dual.tokenizer, shape)


# --- retrieval measures


def recall(similarity: Tensor, positive: Tensor) -> dict[str, float]:
    """Return recall@1, @5 and @10 in both directions, in percent.

    A search succeeds at k if fewer than k wrong answers score as high as the best right one. A text
    that several images share is right for each of them.

    Args:
        similarity: (I, M) of images and texts.
        positive: (I, M), true where text m is a caption of image i.
    """
    result: dict[str, float] = {}
    for name, scores, right in (
        ("image to text", similarity, positive),
        ("text to image", similarity.T, positive.T),
    ):
        best = scores.masked_fill(~right, -torch.inf).max(1, keepdim=True).values
        wrong = ((scores >= best) & ~right).sum(1)[right.any(1)]
        result |= {f"{name} R@{k}": 100 * (wrong < k).float().mean().item() for k in RANKS}
    return result


def same_texts(captions: Sequence[Sequence[str]], dual: DualEncoder) -> tuple[list[str], Tensor]:
    """Return the distinct captions of images, and the images that each belongs to.

    Args:
        captions: of each image.
        dual: captions with the same token ids are one text.

    Returns:
        M texts, and (images, M), true where text m is a caption of image i.
    """
    keys = {text: tuple(dual.tokenizer.encode(text)) for texts in captions for text in texts}
    texts = {key: caption for caption, key in keys.items()}
    columns = {key: column for column, key in enumerate(texts)}
    positive = torch.zeros(len(captions), len(texts), dtype=torch.bool)
    for image, own in enumerate(captions):
        positive[image, [columns[keys[caption]] for caption in own]] = True
    return list(texts.values()), positive


def twin_accuracy(
    dual: DualEncoder, images: Tensor, captions: Sequence[Sequence[str]]
) -> dict[str, float]:
    """Return how often a caption fits its image better than its false twins.

    Args:
        dual: the dual encoder.
        images: vectors (B, E).
        captions: of each image.

    Returns:
        In percent: ``twins``, the pairs of caption and twin in which the caption wins; ``twins, all
        of an image``, the images with such pairs whose captions win all of them. Empty if no
        caption has a twin.
    """
    pairs = [
        (i, c, twin) for i, own in enumerate(captions) for c in own for twin in hard_negatives(c)
    ]
    if not pairs:
        return {}
    texts = {
        text: row
        for row, text in enumerate(dict.fromkeys(text for _, *both in pairs for text in both))
    }
    vectors = dual.embed_texts(list(texts))
    rows = torch.tensor([[i, texts[caption], texts[twin]] for i, caption, twin in pairs])
    true, false = ((images[rows[:, 0]] * vectors[rows[:, column]]).sum(1) for column in (1, 2))
    won = true > false
    lost, all_images = (len(row.unique()) for row in (rows[~won, 0], rows[:, 0]))
    return {
        "twins": 100 * won.float().mean().item(),
        "twins, all of an image": 100 * (1 - lost / all_images),
    }


def measure(
    dual: DualEncoder, manifest: Manifest, cache: FeatureCache, batch_size: int = 256
) -> dict[str, float]:
    """Return ``recall`` and ``twin_accuracy`` over a whole split, and their mean, ``score``.

    Args:
        dual: the dual encoder.
        manifest: one split.
        cache: the stem's grid of the plain view.
        batch_size: images encoded at once.
    """
    items = [item for item in manifest.items if item.image not in cache.failed and item.captions]
    parts = (items[start : start + batch_size] for start in range(0, len(items), batch_size))
    images = torch.cat(
        [dual.embed_grid(cache.rows([item.image for item in part])) for part in parts]
    )
    captions = [item.captions for item in items]
    texts, positive = same_texts(captions, dual)
    result = recall(dual.similarity(images, dual.embed_texts(texts)), positive)
    result["mean recall"] = sum(result.values()) / len(result)
    twins = twin_accuracy(dual, images, captions)
    result["score"] = (
        (result["mean recall"] + twins["twins"]) / 2 if twins else result["mean recall"]
    )
    return result | twins


# --- training


class ContrastiveTrainer(Loop):
    """Trains a small CLIP and keeps its best state.

    Args:
        dual: untrained, with weights initialised from ``config.seed``.
        data: images with captions, and the grid of the stem.
        config: how to train.
        folder: gets ``best/``, ``checkpoint.safetensors`` and ``log.jsonl``.
        device: where to compute.
    """

    config: ContrastiveConfig
    shown = ("epoch", "train_loss", "mean recall", "twins", "seconds")

    def __init__(
        self,
        dual: DualEncoder,
        data: TrainingData,
        config: ContrastiveConfig,
        folder: Path,
        device: torch.device | None = None,
    ) -> None:
        if config.looking and not config.reconstruction:
            raise CapGenError(
                "the looking epochs have no loss to learn from",
                "give reconstruction a weight above 0",
            )
        data = data.readable()
        self.texts = Texts(data.train.items, dual, data.flipped is not None)
        self.dual, self.weights = dual, dual.clip.requires_grad_(True)
        self.learners = nn.ModuleDict({"clip": self.weights})
        if config.reconstruction:
            grids = data.plain.rows([item.image for item in data.train.items[:SAMPLE]])
            self.learners["reconstruction"] = Reconstruction(dual, grids)
        if config.captioning:
            self.learners["speaker"] = speaker(dual)
        with torch.no_grad():
            self.weights.logit_scale.fill_(-math.log(config.temperature))
        epochs = config.looking + config.epochs
        super().__init__(
            dual.name, self.learners, self.weights, data, config, folder, epochs, device=device
        )
        dual.to(self.accelerator.device)

    def train(self) -> DualEncoder:
        """Train to the end; see ``Loop.run``.

        Returns:
            The dual encoder after its best epoch by the dev score, with its ``training_run``.
        """
        self.run()
        best = DualEncoder.load(self.folder / "best")
        best.images.training_run = self.run_facts()
        return best

    def settings(self) -> str:
        """See ``Loop.settings``."""
        settings = [self.dual.images.settings, asdict(self.config), self.dual.tokenizer.to_json()]
        return fingerprint([settings, len(self.data.train)])

    @property
    def _looking(self) -> bool:
        return self.progress.epoch < self.config.looking

    def batches(self) -> Iterator[tuple[list[Item], list[bool], Any]]:
        """Yield images, whether each is mirrored, and the texts drawn for them (``Texts.draw``)."""
        config, epoch = self.config, self.progress.epoch
        if not self.progress.batch:
            torch.manual_seed(config.seed * 1009 + epoch)  # dropout depends on seed and epoch alone
        rng = np.random.default_rng([config.seed, epoch, 1])
        for number, (items, flips) in enumerate(epoch_batches(self.data, config, epoch)):
            flips = self.texts.views(items, flips)
            texts = None if self._looking else self.texts.draw(items, flips, config, rng)
            if number >= self.progress.batch:
                yield items, flips, texts

    def loss(self, batch: tuple[list[Item], list[bool], Any]) -> tuple[Tensor, Tensor]:
        """See ``Loop.loss``; the sum has one term."""
        items, flips, texts = batch
        grid, device = self.data.features(items, flips), self.accelerator.device  # (B, N, D)
        if texts is not None:
            texts = [tensor.to(device) for tensor in texts]
        pictures = as_picture(grid.to(device).float())
        return self._loss(pictures, texts), torch.ones((), device=device)

    def _loss(self, pictures: Tensor, texts: Sequence[Tensor] | None) -> Tensor:
        """Return the loss of a batch.

        Args:
            pictures: (B, D, side, side), the stem's grids.
            texts: tokens (M, T), positives (B, M) and twins (P, 2); ``None`` while only looking.
        """
        config = self.config
        with self.accelerator.autocast():
            dropped = F.dropout(pictures, config.feature_dropout)
            images = self.dual.images.look(dropped)["embedding"]  # (B, E)
            reconstruction = images.new_zeros(())
            if config.reconstruction:
                reconstruction = self.learners["reconstruction"](images, pictures)
        if texts is None:
            return reconstruction
        tokens, positive, pairs = texts
        with self.accelerator.autocast():
            vectors = self.dual.read(tokens)  # (M, E)
            captioning = self._say(images, tokens, positive) if config.captioning else 0.0
        logits = self.dual.logits(images, vectors)  # (B, M)
        contrast = info_nce(logits, positive) + config.twin_weight * twin_loss(
            logits, positive, pairs
        )
        return contrast + config.reconstruction * reconstruction + config.captioning * captioning

    def _say(self, images: Tensor, tokens: Tensor, positive: Tensor) -> Tensor:
        """Return the mean cross-entropy of the images' captions, in nats per token."""
        image, column = positive.nonzero(as_tuple=True)
        inputs, targets = tokens[column, :-1], tokens[column, 1:]  # (captions, T - 1)
        targets = targets.masked_fill(targets == self.dual.tokenizer.pad_id, IGNORED)
        model: Any = self.learners["speaker"]
        total = model.loss(model.encode(images), inputs, image, targets)
        return total / (targets != IGNORED).sum()

    def learning_rate(self) -> float:
        """Return the next step's learning rate; looking has a warm-up and a cosine of its own."""
        step, looking = self.progress.step, self.epoch_steps * self.config.looking
        if self._looking:
            return learning_rate(step, looking, self.config)
        return learning_rate(step - looking, self.epoch_steps * self.config.epochs, self.config)

    @torch.no_grad()
    def after_step(self) -> None:
        """Bound the logit scale; see ``Loop.after_step``."""
        self.weights.logit_scale.clamp_(max=COLDEST)
        super().after_step()

    def is_evaluated(self) -> bool:
        """See ``Loop.is_evaluated``; while looking there is nothing to compare."""
        return not self._looking and super().is_evaluated()

    def evaluate(self) -> dict[str, Any]:
        """See ``measure``."""
        with self.accelerator.autocast():
            return measure(self.dual, self.data.dev, self.data.plain)

    def keep(self, result: dict[str, Any]) -> None:
        """Save the dual encoder."""
        self.dual.save(self.folder / "best")
