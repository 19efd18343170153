"""What every captioner is to the rest of the package: four methods, and a state that decoding can reorder."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn


class State(Protocol):
    """What a captioner remembers between two steps of decoding."""

    def select(self, rows: Tensor) -> Self:
        """Return the state of hypotheses ``rows`` (M',): reordered, dropped or repeated; images stay shared."""
        ...


class CaptionModel(nn.Module, ABC):
    """A captioner: features of images in, scores of next words out.

    Class attributes:
        name: key in ``models.MODELS``.
        feature: the encoder output it reads, such as ``grid``.
    """

    name: str
    feature: str
    config: Any

    @abstractmethod
    def encode(self, features: Tensor) -> Any:
        """Compute once all that belongs to an image. ``features`` (B, ...) -> memory."""

    @abstractmethod
    def forward(self, memory: Any, tokens: Tensor, image: Tensor) -> Tensor:
        """Score next words with the true previous ones given (teacher forcing).

        Args:
            memory: from ``encode``, of B images.
            tokens: (M, T), each row begins with the start token and may end in padding.
            image: (M,), the row of ``memory`` that caption m belongs to; an image may have any number of captions.

        Returns:
            Logits (M, T, V); ``logits[:, t]`` scores ``tokens[:, t + 1]``.
        """

    @abstractmethod
    def start(self, memory: Any) -> State:
        """Return the state before the first word, one hypothesis for each image of ``memory``."""

    @abstractmethod
    def step(self, tokens: Tensor, state: Any, attention: bool = False) -> tuple[Tensor, Any, Mapping[str, Tensor]]:
        """Read one token for each live hypothesis.

        Args:
            tokens: (M,) the newest token of each hypothesis.
            state: from ``start`` or the step before.
            attention: also return where each head looked.

        Returns:
            Logits (M, V) of the next token, the new state, and weights: name -> (M, heads, N), empty unless asked for.
        """


class Grouping:
    """Puts the captions of one image side by side, so that they share its keys and values without a copy.

    Caption m becomes slot ``slot[m]`` of row ``image[m]`` in a tensor (B, S, ...), S being the largest number of
    captions an image has. Where every image has S of them in order, this is a plain view.
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
