"""What every captioner is to the rest of the package: four methods, and a state that decoding can
reorder."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

IGNORED = -100  # the target of padding


class State(Protocol):
    """What a captioner remembers between two steps of decoding."""

    def select(self, rows: Tensor) -> Self:
        """Return the state of hypotheses ``rows`` (M',): reordered, dropped or repeated; images
        stay shared."""
        ...


class CaptionModel(nn.Module, ABC):
    """A captioner: features of images in, scores of next words out.

    Class attributes:
        name: key in ``models.MODELS``.
        feature: the encoder output it reads, such as ``grid``.
        chunks: parts of about one caption length that a training batch is read in.
        select_by_loss: the best epoch is the one with the lowest dev loss, and no dev captions are
            generated; else the one with the highest BLEU-4.
    """

    name: str
    feature: str
    chunks: int = 4
    select_by_loss: bool = False
    config: Any

    @classmethod
    def feature_of(cls, config: Any) -> str:
        """Return the encoder output that a captioner with these hyperparameters reads."""
        return cls.feature

    @abstractmethod
    def encode(self, features: Tensor) -> Any:
        """Compute once all that belongs to an image. ``features`` (B, ...) -> memory."""

    @abstractmethod
    def forward(self, memory: Any, tokens: Tensor, image: Tensor) -> Tensor:
        """Score next words with the true previous ones given (teacher forcing).

        Args:
            memory: from ``encode``, of B images.
            tokens: (M, T), each row begins with the start token and may end in padding.
            image: (M,), the row of ``memory`` that caption m belongs to; an image may have any
                number of captions.

        Returns:
            Logits (M, T, V); ``logits[:, t]`` scores ``tokens[:, t + 1]``.
        """

    @abstractmethod
    def start(self, memory: Any) -> State:
        """Return the state before the first word, one hypothesis for each image of ``memory``."""

    @abstractmethod
    def step(
        self, tokens: Tensor, state: Any, attention: bool = False
    ) -> tuple[Tensor, Any, Mapping[str, Tensor]]:
        """Read one token for each live hypothesis.

        Args:
            tokens: (M,) the newest token of each hypothesis.
            state: from ``start`` or the step before.
            attention: also return where each head looked.

        Returns:
            Logits (M, V) of the next token, the new state, and weights: name -> (M, heads, N),
            empty unless asked for.
        """

    def loss(
        self,
        memory: Any,
        tokens: Tensor,
        image: Tensor,
        targets: Tensor,
        label_smoothing: float = 0.0,
    ) -> Tensor:
        """Return what training minimises, summed over the targets: cross-entropy, unless a
        captioner adds to it.

        Args:
            memory, tokens, image: as in ``forward``.
            targets: (M, T), the token that follows each position; ``IGNORED`` where there is none.
            label_smoothing: share of the target probability spread evenly over the vocabulary.
        """
        return caption_loss(self(memory, tokens, image), targets, label_smoothing)

    def advance(self, share: float) -> None:
        """Hear before each training step which ``share`` of training is done (0 to 1); schedules
        hang on it."""


def caption_loss(logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Return cross-entropy in nats, summed over all targets but ``IGNORED`` ones.

    Args:
        logits: (M, T, V).
        targets: (M, T).
        label_smoothing: share of the target probability spread evenly over the vocabulary.
    """
    return F.cross_entropy(
        logits.flatten(0, 1).float(),
        targets.flatten(),
        ignore_index=IGNORED,
        reduction="sum",
        label_smoothing=label_smoothing,
    )


class Grouping:
    """Puts the captions of one image side by side, so that they share its keys and values without a
    copy.

    Caption m becomes slot ``slot[m]`` of row ``image[m]`` in a tensor (B, S, ...), S being the
    largest number of captions an image has. Where every image has S of them in order, this is a
    plain view.
    """

    def __init__(self, image: Tensor, images: int) -> None:
        counts = torch.bincount(image, minlength=images)
        order = torch.argsort(image, stable=True)
        first = torch.cumsum(counts, 0) - counts
        rank = torch.empty_like(image)
        rank[order] = torch.arange(len(image), device=image.device) - first[image[order]]
        self.images, self.slots = images, int(counts.max()) if len(image) else 0
        self.position = image * self.slots + rank
        in_order = torch.arange(images * self.slots, device=image.device)
        self.plain = len(image) == images * self.slots and torch.equal(self.position, in_order)

    def gather(self, rows: Tensor) -> Tensor:
        """(M, ...) -> (B, S, ...); slots without a caption hold zeros."""
        if not self.plain:
            padded = rows.new_zeros(self.images * self.slots, *rows.shape[1:])
            rows = padded.index_copy(0, self.position, rows)
        return rows.view(self.images, self.slots, *rows.shape[1:])

    def scatter(self, grouped: Tensor) -> Tensor:
        """(B, S, ...) -> (M, ...): the inverse of ``gather``."""
        rows = grouped.reshape(self.images * self.slots, *grouped.shape[2:])
        return rows if self.plain else rows[self.position]


@dataclass
class Memory:
    """What is computed once for B images: every field is a tensor whose dimension ``axis`` counts
    the images."""

    axis: ClassVar[int] = 0

    def tensors(self) -> dict[str, Tensor]:
        """Return the fields by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def images(self) -> int:
        """B."""
        return next(iter(self.tensors().values())).shape[self.axis]

    def select(self, rows: Tensor) -> Self:
        """Return the memory of images ``rows``."""
        return replace(
            self,
            **{
                name: tensor.index_select(self.axis, rows)
                for name, tensor in self.tensors().items()
            },
        )


class KeyValues:
    """Keys and values of the T tokens that M hypotheses have read, in one block of memory for each
    layer.

    There is room for some more tokens, so that a new one is written in place and the old ones stay
    where they are; reordering copies them once. The states before and after a token share a block:
    where a state is continued a second time, that continuation gets a block of its own. No gradient
    flows back through a cache.
    """

    room = 8  # more tokens that a new block can take

    def __init__(self, blocks: list[Tensor], length: int) -> None:
        self.blocks, self.length = blocks, length
        self._written = [length]  # tokens in the blocks, known to all states that share them

    @classmethod
    def new(cls, like: Tensor, layers: int, rows: int, heads: int, width: int) -> "KeyValues":
        """Return an empty cache for M = ``rows`` hypotheses with the dtype and device of ``like``."""
        return cls([like.new_empty(rows, cls.room, 2, heads, width) for _ in range(layers)], 0)

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.blocks[0].device

    def longer(self) -> "KeyValues":
        """Return the cache of one token more, for ``put`` to fill in."""
        if self._written[0] != self.length or self.length == self.blocks[0].shape[1]:
            return self.select(None).longer()
        after = KeyValues(self.blocks, self.length + 1)
        after._written = self._written
        after._written[0] += 1
        return after

    def put(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store the newest token's (M, heads, 1, width) and return those of all T: (M, heads, T,
        width)."""
        block = self.blocks[layer]
        newest = block[:, self.length - 1]  # (M, 2, heads, width)
        newest[:, 0], newest[:, 1] = key[:, :, 0].detach(), value[:, :, 0].detach()
        keys, values = (
            block[:, : self.length].transpose(1, 3).unbind(2)
        )  # of (M, heads, 2, T, width)
        return keys, values

    def at_first(self, first: Tensor, later: Tensor) -> Tensor:
        """Return ``first`` where the newest token is the first one, else ``later``; both of the
        same shape."""
        return first if self.length == 1 else later

    def select(self, rows: Tensor | None) -> "KeyValues":
        """Return the cache of hypotheses ``rows`` (M',), or a copy of all, with room again."""
        blocks, length = [], self.length
        for old in self.blocks:
            block = old.new_empty(
                old.shape[0] if rows is None else len(rows), length + self.room, *old.shape[2:]
            )
            if rows is None:
                block[:, :length] = old[:, :length]
            else:
                torch.index_select(old[:, :length], 0, rows, out=block[:, :length])
            blocks.append(block)
        return KeyValues(blocks, length)


@dataclass
class SharedState:
    """What decoding carries: the images' memory, shared, and what each of M hypotheses has for
    itself.

    Attributes:
        memory: of B images; never copied for a hypothesis.
        image: (M,), the row of ``memory`` of each hypothesis.
        cache: tensors (layers, M, ...), or keys and values of the tokens read so far.
    """

    memory: Any
    image: Tensor
    cache: tuple[Any, ...]

    @classmethod
    def new(cls, memory: Any, *cache: Tensor | KeyValues) -> Self:
        """Return the state before the first token, one hypothesis an image."""
        return cls(memory, torch.arange(memory.images, device=cache[0].device), cache)

    @cached_property
    def grouping(self) -> Grouping:
        """The grouping of ``image``, kept while the set of hypotheses stays the same."""
        return Grouping(self.image, self.memory.images)

    def after(self, *cache: Tensor | KeyValues) -> Self:
        """Return the state of the same hypotheses one token later."""
        state = replace(self, cache=cache)
        if "grouping" in vars(self):
            state.grouping = self.grouping
        return state

    def select(self, rows: Tensor) -> Self:
        """Return the state of hypotheses ``rows`` (M',).

        The images' memory is not copied, but for this: once half of the images have no hypothesis
        left, the rest move together, so that finished captions cost nothing.
        """
        image, memory = self.image[rows], self.memory
        present = torch.unique(image)
        if 2 * len(present) <= memory.images:
            memory, image = memory.select(present), torch.searchsorted(present, image)
        cache = tuple(
            c.index_select(1, rows) if isinstance(c, Tensor) else c.select(rows) for c in self.cache
        )
        state = replace(self, memory=memory, image=image, cache=cache)
        if "grouping" in vars(self) and memory is self.memory and torch.equal(image, self.image):
            state.grouping = self.grouping
        return state
