"""Batches grouped by image: each image once, with all of its captions, so that its side is computed
once."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from capgen_utils.config import TrainingConfig
from capgen_utils.data.manifest import Item, Manifest
from capgen_utils.models.base import IGNORED
from capgen_utils.text.ptb import tokenise
from capgen_utils.text.words import Tokenizer
from capgen_utils.vision.features import FeatureCache

SIDES = frozenset(("left", "right"))
CHUNKS = 4


@dataclass(frozen=True)
class TrainingData:
    """What a captioner learns from.

    Attributes:
        train, dev: images with captions.
        plain: features of all images as they are.
        flipped: features of the mirrored training images; ``None`` trains without them.
    """

    train: Manifest
    dev: Manifest
    plain: FeatureCache
    flipped: FeatureCache | None = None

    def readable(self) -> "TrainingData":
        """Leave out the images whose file could not be read when features were extracted."""
        failed = set(self.plain.failed) | set(self.flipped.failed if self.flipped else ())
        keep = [
            replace(part, items=tuple(i for i in part.items if i.image not in failed))
            for part in (self.train, self.dev)
        ]
        return replace(self, train=keep[0], dev=keep[1])


@dataclass(frozen=True)
class Batch:
    """Images with all of their captions: features (B, ...), tokens (M, T), image (M,)."""

    features: Tensor
    tokens: Tensor
    image: Tensor

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on ``device``."""
        return Batch(self.features.to(device), self.tokens.to(device), self.image.to(device))


@dataclass(frozen=True)
class Chunk:
    """Captions of about one length: inputs (M', T'), targets (M', T') with ``IGNORED`` for padding,
    image (M',)."""

    inputs: Tensor
    targets: Tensor
    image: Tensor


def chunks_by_length(batch: Batch, pad_id: int, count: int = CHUNKS) -> list[Chunk]:
    """Sort a batch's captions by length and cut them into ``count`` parts, each as wide as its
    longest caption.

    Half of a batch of captions is padding; so less than a quarter is. The images stay one batch:
    their side is computed once for all chunks.
    """
    lengths = (batch.tokens != pad_id).sum(1)
    order = torch.argsort(lengths, stable=True)
    chunks = []
    for rows in order.tensor_split(min(count, len(order))):
        tokens = batch.tokens[rows, : int(lengths[rows].max())]
        # The last token has no successor. The end token stays a target: only what follows it is
        # ignored.
        targets = tokens[:, 1:].masked_fill(tokens[:, 1:] == pad_id, IGNORED)
        chunks.append(Chunk(tokens[:, :-1], targets, batch.image[rows]))
    return chunks


def count_targets(chunks: Sequence[Chunk]) -> Tensor:
    """Return how many tokens a loss over ``chunks`` sums over, as a tensor of one number."""
    return torch.stack([(chunk.targets != IGNORED).sum() for chunk in chunks]).sum()


def captions_of(item: Item, flipped: bool) -> tuple[str, ...]:
    """Return the captions that are true of the view: a mirrored image loses those that say left or
    right."""
    if not flipped:
        return item.captions
    return tuple(c for c in item.captions if not SIDES.intersection(tokenise(c)))


def make_batch(
    items: Sequence[Item],
    flips: Sequence[bool],
    data: TrainingData,
    tokenizer: Tokenizer,
    seq_len: int,
) -> Batch:
    """Gather features and token ids; an image none of whose captions may be mirrored is taken as it
    is."""
    flips = [
        flip and bool(captions_of(item, True)) for item, flip in zip(items, flips, strict=True)
    ]
    features = data.plain.rows([item.image for item in items])
    if data.flipped is not None and any(flips):
        chosen = [i for i, flip in enumerate(flips) if flip]
        features[chosen] = data.flipped.rows([items[i].image for i in chosen])
    rows, image = [], []
    for i, (item, flip) in enumerate(zip(items, flips, strict=True)):
        encoded = [tokenizer.encode(caption, seq_len) for caption in captions_of(item, flip)]
        rows += encoded
        image += [i] * len(encoded)
    tokens = torch.full((len(rows), max(map(len, rows))), tokenizer.pad_id)
    for row, ids in zip(tokens, rows, strict=True):
        row[: len(ids)] = torch.tensor(ids)
    return Batch(features, tokens, torch.tensor(image))


def epoch_batches(
    data: TrainingData, config: TrainingConfig, epoch: int, rank: int = 0, world: int = 1
) -> Iterator[tuple[list[Item], list[bool]]]:
    """Yield the images of each batch of ``epoch``, and whether each is mirrored.

    The order depends on seed and epoch alone. A process of several takes every ``world``-th image
    of each batch, so a batch holds the same images however many processes share it.
    """
    rng = np.random.default_rng([config.seed, epoch])
    order = rng.permutation(len(data.train))
    flips = rng.random(len(data.train)) < (0.5 if data.flipped is not None else 0.0)
    for start in range(0, len(order), config.batch_images):
        part = order[start : start + config.batch_images][rank::world]
        yield [data.train.items[i] for i in part], [bool(flips[i]) for i in part]
