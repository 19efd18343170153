"""What every captioner is to the rest of the package: four methods and a state (notebook 03)."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from capgen_utils.config import Recipe
from capgen_utils.text.words import Tokenizer

IGNORED = -100  # the target of padding


class State(Protocol):
    """What a captioner remembers between two decoding steps."""

    def select(self, rows: Tensor) -> Self:
        """Return the state of hypotheses ``rows`` (M',), in that order; rows may repeat."""
        ...


class CaptionModel(nn.Module, ABC):
    """A captioner: image features in, logits of the next token out.

    Class attributes:
        name: key in ``models.MODELS``.
        feature: the encoder output it reads, such as ``grid``.
        Config: the dataclass of its hyperparameters.
        recipe: how it is trained by presets that have no recipe for it.
        chunks: number of parts, sorted by caption length, that a training batch is split into.
        select_by_loss: choose the best epoch by dev loss and generate no dev captions; otherwise
            ``TrainingConfig.best_by`` decides.
    """

    name: str
    feature: str
    Config: type
    recipe: Recipe
    chunks: int = 4
    select_by_loss: bool = False
    config: Any
    unk_id: int

    @classmethod
    def feature_of(cls, config: Any) -> str:
        """Return the encoder output that a captioner with these hyperparameters reads."""
        return cls.feature

    @classmethod
    def fit_config(cls, config: Any, clip: Any = None) -> Any:
        """Return ``config`` with the sizes of the trained networks that ``load_pretrained`` copies.

        Args:
            config: hyperparameters.
            clip: as in ``load_pretrained``.
        """
        return config

    def load_pretrained(
        self, tokenizer: Tokenizer, language_model: Callable[[], Path], clip: Any = None
    ) -> None:
        """Copy the weights of trained networks into a new captioner; by default none.

        Args:
            tokenizer: of the captioner.
            language_model: returns the folder of ``gpt2-mini``, training it first if necessary.
            clip: the ``DualEncoder`` whose image half is the encoder, if there is one.

        Raises:
            CapGenError: the networks are not available, or do not fit.
        """

    def drop(self, x: Tensor) -> Tensor:
        """``dropout`` with the probability ``config.dropout``."""
        return dropout(x, self.config.dropout, self.training)

    def hide_words(self, tokens: Tensor) -> Tensor:
        """Replace words of ``tokens`` (M, T) by ``unk_id`` with ``word_dropout`` while training.

        The decoder then has to look at the image instead of completing the sentence from memory.
        The start token is kept.
        """
        if not self.training or not self.config.word_dropout:
            return tokens
        hidden = torch.rand(tokens.shape, device=tokens.device) < self.config.word_dropout
        hidden[:, 0] = False
        return tokens.masked_fill(hidden, self.unk_id)

    @abstractmethod
    def encode(self, features: Tensor) -> Any:
        """Compute everything that belongs to an image once. ``features`` (B, ...) -> memory."""

    @abstractmethod
    def forward(self, memory: Any, tokens: Tensor, image: Tensor) -> Tensor:
        """Score the next token at every position, given the true ones before it (teacher forcing).

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
        """Return the state before the first token, one hypothesis for each image of ``memory``."""

    @abstractmethod
    def step(
        self, tokens: Tensor, state: Any, attention: bool = False
    ) -> tuple[Tensor, Any, Mapping[str, Tensor]]:
        """Read one token for each live hypothesis.

        Args:
            tokens: (M,), the newest token of each hypothesis.
            state: from ``start`` or the previous step.
            attention: also return the attention weights over the image.

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
        """Return the training loss, summed over the targets; by default the cross-entropy.

        Args:
            memory, tokens, image: as in ``forward``.
            targets: (M, T), the token that follows each position; ``IGNORED`` after the last one.
            label_smoothing: share of the target probability spread evenly over the vocabulary.
        """
        return caption_loss(self(memory, tokens, image), targets, label_smoothing)

    def advance(self, share: float) -> None:
        """Called before each training step with the fraction of training completed, for schedules.

        Args:
            share: 0 at the first step, 1 at the end.
        """

    def attention_by_layer(self, memory: Any, tokens: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the attention weights of each decoder layer over one caption, for rollout.

        Args:
            memory: of one image.
            tokens: (1, T), from the start token on.

        Yields:
            Over the image (1, heads, T, N) and over the tokens (1, heads, T, T); nothing unless the
            captioner is a stack of such layers.
        """
        yield from ()


def caption_loss(logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Return the cross-entropy in nats, summed over all targets except ``IGNORED``.

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


def dropout(x: Tensor, probability: float, training: bool) -> Tensor:
    """Zero each element with ``probability`` while training and scale the others up.

    On a CPU, torch draws one random number per element on one core, which can take a third of a
    training step. Here, eight elements share the bytes of one 64-bit number instead; the
    probability is rounded to 1/256.
    """
    if not training or not probability:
        return x
    if x.device.type != "cpu":
        return F.dropout(x, probability)
    dropped = min(255, max(1, round(probability * 256)))
    numbers = torch.empty(-(-x.numel() // 8), dtype=torch.int64).random_(-(2**63), None)
    keep = numbers.view(torch.uint8)[: x.numel()].view(x.shape) >= dropped
    return x * (keep.to(x.dtype) * (256 / (256 - dropped)))


class Grouping:
    """Groups captions by image, so that they share its keys and values without a copy.

    Caption m becomes one of the S slots of row ``image[m]`` in a tensor (B, S, ...), where S is the
    largest number of captions per image. If every image has S captions in order, grouping is a
    plain view.
    """

    def __init__(self, image: Tensor, images: int) -> None:
        counts = torch.bincount(image, minlength=images)  # (B,)
        order = torch.argsort(image, stable=True)  # (M,)
        first = torch.cumsum(counts, 0) - counts  # (B,), captions of the images before
        rank = torch.empty_like(image)  # (M,), the slot within the image
        rank[order] = torch.arange(len(image), device=image.device) - first[image[order]]
        self.images, self.slots = images, int(counts.max()) if len(image) else 0
        self.position = image * self.slots + rank  # (M,), row in (B * S, ...)
        in_order = torch.arange(images * self.slots, device=image.device)
        self.plain = len(image) == images * self.slots and torch.equal(self.position, in_order)

    def gather(self, rows: Tensor) -> Tensor:
        """(M, ...) -> (B, S, ...); empty slots hold zeros."""
        if not self.plain:
            empty = rows.new_zeros(self.images * self.slots, *rows.shape[1:])
            rows = empty.index_copy(0, self.position, rows)
        return rows.view(self.images, self.slots, *rows.shape[1:])

    def scatter(self, grouped: Tensor) -> Tensor:
        """(B, S, ...) -> (M, ...): the inverse of ``gather``."""
        rows = grouped.reshape(self.images * self.slots, *grouped.shape[2:])
        return rows if self.plain else rows[self.position]


@dataclass
class Memory:
    """What is computed once for B images: tensors whose dimension ``axis`` counts the images."""

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
    """Keys and values of the T tokens that M hypotheses have read, one block of memory per layer.

    A block has spare room, so that a new token is written in place; reordering copies the block
    once. The states before and after a token share a block. If a state is continued a second time,
    that continuation gets a new block. No gradient flows back through a cache.
    """

    room = 8  # spare tokens of a new block

    def __init__(self, blocks: list[Tensor], length: int) -> None:
        self.blocks, self.length = blocks, length
        self._written = [length]  # tokens in the blocks, shared by all their states

    @classmethod
    def new(cls, like: Tensor, layers: int, rows: int, heads: int, width: int) -> "KeyValues":
        """Return an empty cache for M = ``rows`` hypotheses, with dtype and device of ``like``."""
        return cls([like.new_empty(rows, cls.room, 2, heads, width) for _ in range(layers)], 0)

    def longer(self) -> "KeyValues":
        """Return a cache with room for one more token, which ``put`` fills in."""
        if self._written[0] != self.length or self.length == self.blocks[0].shape[1]:
            return self.select(None).longer()
        after = KeyValues(self.blocks, self.length + 1)
        after._written = self._written
        after._written[0] += 1
        return after

    def put(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store the newest token's (M, heads, 1, width); return all T: (M, heads, T, width)."""
        block = self.blocks[layer]
        newest = block[:, self.length - 1]  # (M, 2, heads, width)
        newest[:, 0], newest[:, 1] = key[:, :, 0].detach(), value[:, :, 0].detach()
        keys, values = block[:, : self.length].transpose(1, 3).unbind(2)  # (M, heads, T, width)
        return keys, values

    def at_first(self, first: Tensor, later: Tensor) -> Tensor:
        """Return ``first`` at the first token, else ``later``; both have the same shape."""
        return first if self.length == 1 else later

    def select(self, rows: Tensor | None) -> "KeyValues":
        """Return the cache of hypotheses ``rows`` (M',), or a copy of all, with new room."""
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
    """The decoding state: the shared memory of the images, and a cache for each of M hypotheses.

    Attributes:
        memory: of B images; never copied per hypothesis.
        image: (M,), the row of ``memory`` of each hypothesis.
        cache: tensors (layers, M, ...), or keys and values of the tokens read so far.
    """

    memory: Any
    image: Tensor
    cache: tuple[Any, ...]

    @classmethod
    def new(cls, memory: Any, *cache: Tensor | KeyValues) -> Self:
        """Return the state before the first token, one hypothesis per image."""
        device = next(iter(memory.tensors().values())).device
        return cls(memory, torch.arange(memory.images, device=device), cache)

    @cached_property
    def grouping(self) -> Grouping:
        """The grouping of ``image``, kept while the hypotheses stay the same."""
        return Grouping(self.image, self.memory.images)

    def after(self, *cache: Tensor | KeyValues) -> Self:
        """Return the state of the same hypotheses one token later."""
        state = replace(self, cache=cache)
        if "grouping" in vars(self):
            state.grouping = self.grouping
        return state

    def select(self, rows: Tensor) -> Self:
        """Return the state of hypotheses ``rows`` (M',).

        Memory is copied only when half of the images have no hypothesis left: the others are packed
        together, so that finished captions cost nothing.
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
