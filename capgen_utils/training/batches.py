"""Batches grouped by image: each image once, with all of its captions (notebook 03)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from capgen_utils.config import TrainingConfig
from capgen_utils.data.manifest import Item, Manifest
from capgen_utils.models.base import IGNORED
from capgen_utils.text.ptb import tokenise
from capgen_utils.text.words import Tokenizer
from capgen_utils.vision.encoder import Encoder
from capgen_utils.vision.features import FeatureCache, extract

SIDES = frozenset(("left", "right"))
CHUNKS = 4


@dataclass(frozen=True)
class TrainingData:
    """Images, captions and features to learn from.

    Attributes:
        train, dev: images with captions.
        plain: features of all images as they are.
        flipped: features of the mirrored training images; ``None`` to train without them.
    """

    train: Manifest
    dev: Manifest
    plain: FeatureCache
    flipped: FeatureCache | None = None

    @classmethod
    def extract(
        cls,
        manifest: Manifest,
        encoder: Encoder,
        output: str,
        flip: bool = False,
        dtype: torch.dtype | None = None,
    ) -> "TrainingData":
        """Return the images of ``manifest`` with one ``output`` of an encoder.

        Args:
            manifest: all splits.
            encoder: see ``vision.features.extract``.
            output: one of its outputs.
            flip: also extract the mirrored training images.
            dtype: compute dtype of the features; see ``vision.features.extract``.

        Raises:
            CapGenError: see ``vision.features.extract``.
        """
        train = manifest.split("train")
        flipped = extract(train, encoder, output, flip=True, dtype=dtype) if flip else None
        plain = extract(manifest, encoder, output, dtype=dtype)
        return cls(train, manifest.split("dev"), plain, flipped)

    def features(self, items: Sequence[Item], flips: Sequence[bool]) -> Tensor:
        """Gather the features (B, ...) of images; ``flips`` says which are mirrored."""
        features = self.plain.rows([item.image for item in items])
        mirrored = [i for i, flip in enumerate(flips) if flip]
        if mirrored and self.flipped is not None:
            features[mirrored] = self.flipped.rows([items[i].image for i in mirrored])
        return features

    def readable(self) -> "TrainingData":
        """Return the data without the images that could not be read for feature extraction."""
        failed = set(self.plain.failed) | set(self.flipped.failed if self.flipped else ())
        train, dev = (
            replace(split, items=tuple(i for i in split.items if i.image not in failed))
            for split in (self.train, self.dev)
        )
        return replace(self, train=train, dev=dev)


@dataclass(frozen=True)
class Batch:
    """Images with all of their captions.

    Attributes:
        features: (B, ...).
        tokens: (M, T), padded.
        image: (M,), the row of ``features`` that each caption belongs to.
        idle: no token counts: it stands in for a process without images.
    """

    features: Tensor
    tokens: Tensor
    image: Tensor
    idle: bool = False

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on ``device``."""
        moved = {name: getattr(self, name).to(device) for name in ("features", "tokens", "image")}
        return replace(self, **moved)


class Chunk(NamedTuple):
    """Captions of similar length: what ``CaptionModel.loss`` reads.

    Attributes:
        inputs: (M', T').
        image: (M',).
        targets: (M', T'), the next tokens; ``IGNORED`` for padding.
    """

    inputs: Tensor
    image: Tensor
    targets: Tensor


def chunks_by_length(batch: Batch, pad_id: int, count: int = CHUNKS) -> list[Chunk]:
    """Sort captions by length and split them into ``count`` chunks, each as wide as its longest.

    Half of a batch of captions is padding; this leaves less than a quarter. The images stay one
    batch: they are encoded once for all chunks.
    """
    lengths = (batch.tokens != pad_id).sum(1)  # (M,)
    order = torch.argsort(lengths, stable=True)
    chunks = []
    for rows in order.tensor_split(min(count, len(order))):
        tokens = batch.tokens[rows, : int(lengths[rows].max())]  # (M', T' + 1)
        # The end token is a target; only what follows it is ignored.
        ignored = (tokens[:, 1:] == pad_id) | batch.idle
        targets = tokens[:, 1:].masked_fill(ignored, IGNORED)
        chunks.append(Chunk(tokens[:, :-1], batch.image[rows], targets))
    return chunks


def count_targets(chunks: Sequence[Chunk]) -> Tensor:
    """Return the number of tokens that the loss of ``chunks`` sums over, as a scalar tensor."""
    return torch.stack([(chunk.targets != IGNORED).sum() for chunk in chunks]).sum()


def captions_of(item: Item, flipped: bool) -> tuple[str, ...]:
    """Return the captions that are true of a view: mirroring drops those with left or right."""
    if not flipped:
        return item.captions
    return tuple(c for c in item.captions if not SIDES.intersection(tokenise(c)))


class Batcher:
    """Makes batches; each caption is tokenised only once, however many epochs follow.

    Args:
        data: features.
        tokenizer: of the captions.
        seq_len: longest caption in tokens; longer ones are cut.
    """

    def __init__(self, data: TrainingData, tokenizer: Tokenizer, seq_len: int) -> None:
        self.data, self.tokenizer, self.seq_len = data, tokenizer, seq_len
        self._tokens: dict[tuple[str, bool], list[Tensor]] = {}

    def tokens(self, item: Item, flipped: bool) -> list[Tensor]:
        """Return the token ids of the captions that are true of a view."""
        key = item.image, flipped
        if key not in self._tokens:
            captions = captions_of(item, flipped)
            self._tokens[key] = [
                torch.tensor(self.tokenizer.encode(caption, self.seq_len)) for caption in captions
            ]
        return self._tokens[key]

    def batch(self, items: Sequence[Item], flips: Sequence[bool]) -> Batch:
        """Gather features and token ids.

        Args:
            items: the images.
            flips: whether each is mirrored; if all of its captions mention a side, it is not.
        """
        views = [flip and bool(self.tokens(i, True)) for i, flip in zip(items, flips, strict=True)]
        rows = [self.tokens(item, flip) for item, flip in zip(items, views, strict=True)]
        captions = [row for captions in rows for row in captions]
        tokens = pad_sequence(captions, True, self.tokenizer.pad_id)  # (M, T)
        image = torch.arange(len(items)).repeat_interleave(torch.tensor([len(r) for r in rows]))
        return Batch(self.data.features(items, views), tokens, image)


def make_batch(
    items: Sequence[Item],
    flips: Sequence[bool],
    data: TrainingData,
    tokenizer: Tokenizer,
    seq_len: int,
) -> Batch:
    """Return a single batch; see ``Batcher``."""
    return Batcher(data, tokenizer, seq_len).batch(items, flips)


def epoch_batches(
    data: TrainingData, config: TrainingConfig, epoch: int, rank: int = 0, world: int = 1
) -> Iterator[tuple[list[Item], list[bool]]]:
    """Yield the images of each batch of ``epoch``, and whether each is mirrored.

    The order depends on seed and epoch alone. Each of several processes takes every ``world``-th
    image of a batch, so that batches do not depend on the number of processes.
    """
    rng = np.random.default_rng([config.seed, epoch])
    order = rng.permutation(len(data.train))
    flips = rng.random(len(data.train)) < (0.5 if data.flipped is not None else 0.0)
    for start in range(0, len(order), config.batch_images):
        rows = order[start : start + config.batch_images][rank::world]
        yield [data.train.items[i] for i in rows], [bool(flips[i]) for i in rows]
