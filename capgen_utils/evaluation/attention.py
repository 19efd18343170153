"""Where a captioner looks for each word: attention maps by layer and head (notebook 10)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from capgen_utils.captioner import Captioner
from capgen_utils.common.files import CapGenError
from capgen_utils.data.images import ImageLike
from capgen_utils.decoding.captions import NextWord
from capgen_utils.decoding.logits import allowed
from capgen_utils.decoding.run import word_attention
from capgen_utils.text.words import Tokenizer
from capgen_utils.vision.preprocessing import Preprocessing, grid_side, upsample

MEAN, ROLLOUT = "mean", "rollout"


def on_grid(weights: Tensor) -> Tensor:
    """Drop the class token, if there is one, and renormalise the rest.

    A vision transformer's vectors are a class token, which has no position, and then a square grid.
    Their number is one more than a square, so it is never a square itself.

    Args:
        weights: (..., N).

    Returns:
        (..., cells), rows sum to 1; uniform if the class token had all of the attention.

    Raises:
        CapGenError: N is neither a square number nor one more.
    """
    cells = weights.shape[-1]
    if round(cells**0.5) ** 2 == cells:
        return weights
    grid_side(cells - 1)
    rest = weights[..., 1:]  # (..., cells)
    total = rest.sum(-1, keepdim=True)
    return torch.where(total > 0, rest / total.clamp_min(1e-30), 1 / (cells - 1))


def mean_map(weights: Mapping[str, Tensor]) -> Tensor:
    """Return the mean (words, N) over layers and heads of layer -> (words, heads, N)."""
    return torch.stack([layer.mean(1) for layer in weights.values()]).mean(0)


def rollout(cross: Sequence[Tensor], own: Sequence[Tensor]) -> Tensor:
    """Follow attention through all layers of a decoder: attention rollout for cross-attention.

    The paper (arXiv 2005.00928) follows an encoder, whose positions mix with each other: layer by
    layer, R = (A + I) / 2 R, where the identity stands for the residual connection. In a decoder,
    words mix with words, and R is the share of each image position in each word's vector, so it
    starts at R = 0. In each layer, self-attention A and then cross-attention C are each added to a
    residual of equal weight:

        R <- (A R + R) / 2;    R <- (C + R) / 2

    At the end every row is divided by its sum. Heads are averaged first. As in the paper, values,
    gates and feed-forward networks are ignored.

    Args:
        cross: per layer, first to last: (T, N), what each word read from the image; rows sum to 1.
        own: per layer: (T, T), what each word read from the words so far; rows sum to 1.

    Returns:
        (T, N), rows sum to 1.
    """
    share = torch.zeros_like(cross[0])  # (T, N)
    for over_image, over_words in zip(cross, own, strict=True):
        share = (over_words @ share + share) / 2
        share = (over_image + share) / 2
    return share / share.sum(-1, keepdim=True)


@torch.inference_mode()
def layer_attention(model: Any, memory: Any, tokens: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Read one caption and return the cross-attention (T, N) and self-attention (T, T) of every
    layer, heads averaged.

    Args:
        model: a captioner, in eval mode.
        memory: of one image.
        tokens: (1, T), the start token and all words but the last: row t belongs to the word that
            is said after it.

    Returns:
        Two lists, empty for a captioner that is no stack of such layers.
    """
    layers = [
        (over_image[0].mean(0).cpu(), over_words[0].mean(0).cpu())  # (T, N), (T, T)
        for over_image, over_words in model.attention_by_layer(memory, tokens)
    ]
    return [over_image for over_image, _ in layers], [over_words for _, over_words in layers]


class Word(NamedTuple):
    """A word of a caption and its tokens: positions ``first`` to ``last``, the latter excluded."""

    text: str
    first: int
    last: int


def words_of(tokenizer: Tokenizer, tokens: Sequence[int]) -> list[Word]:
    """Return the words that tokens spell: what the spaces of the decoded text separate.

    Args:
        tokenizer: the captioner's: whole words, or byte pairs, several of which can spell a word.
        tokens: ids without start and end token.
    """
    owner: list[int] = []  # the word that each token belongs to
    for position, token in enumerate(tokens):
        count = len(tokenizer.decode(tokens[: position + 1]).split())
        if tokenizer.decode([token]).strip():  # a later token can join words: "3", "3 .", "3.5"
            owner = [*(min(word, count - 1) for word in owner), max(count - 1, 0)]
        else:
            owner.append(count)  # a space on its own belongs to the word that follows it
    return [
        Word(text, owner.index(number), len(owner) - owner[::-1].index(number))
        for number, text in enumerate(tokenizer.decode(tokens).split())
        if number in owner
    ]


@dataclass(frozen=True)
class CaptionMaps:
    """Where a captioner looked for each word of a caption; every map sums to 1.

    A choice is a map by name: a layer's name (its heads averaged), ``layer0 head1`` (one head),
    ``mean`` (all heads of all layers averaged) or ``rollout`` (see there). With a single layer, the
    last two equal that layer's.

    Attributes:
        caption: the text.
        words: its words; the maps of a word's tokens are averaged.
        tokens: ids without start and end token.
        weights: layer -> (words, heads, N), including CLIP's class token if there is one.
        rolled: (words, N), rollout.
        preprocessing: of the encoder; decides which part of the image the grid covers.
    """

    caption: str
    words: tuple[Word, ...]
    tokens: tuple[int, ...]
    weights: Mapping[str, Tensor]
    rolled: Tensor
    preprocessing: Preprocessing

    @property
    def texts(self) -> list[str]:
        """The words as text."""
        return [word.text for word in self.words]

    def choices(self, heads: bool = False) -> list[str]:
        """Return the names of all distinct maps, optionally with those of single heads."""
        names = [
            name
            for layer, weights in self.weights.items()
            for name in (layer, *(f"{layer} head{i}" for i in range(weights.shape[1])))
            if name == layer or (heads and weights.shape[1] > 1)
        ]
        return names + [MEAN, ROLLOUT] * (len(self.weights) > 1)

    def of(self, choice: str = MEAN) -> Tensor:
        """Return the maps (words, cells) of one choice, over the grid row by row.

        Raises:
            CapGenError: no such choice; lists the possible ones.
        """
        layer, _, head = choice.partition(" head")
        if choice == ROLLOUT:
            return on_grid(self.rolled)
        if choice == MEAN:
            return on_grid(mean_map(self.weights))
        if choice not in self.choices(heads=True):
            raise CapGenError(
                f"there is no attention map {choice!r}",
                f"choose one of {', '.join(self.choices(True))}",
            )
        return on_grid(self.weights[layer][:, int(head)] if head else self.weights[layer].mean(1))

    def heads(self, layer: str) -> Tensor:
        """Return the maps (words, heads, cells) of all heads of a layer."""
        return on_grid(self.weights[layer])

    def elsewhere(self) -> Tensor:
        """Return the share of attention (words,) on CLIP's class token, averaged over layers.

        It is 0 for a captioner without a class token.
        """
        mean = mean_map(self.weights)
        return mean[:, 0] if mean.shape[1] > on_grid(mean).shape[1] else torch.zeros(len(mean))

    def on_pixels(self, word: int, size: tuple[int, int], choice: str = MEAN) -> np.ndarray:
        """Return the map (height, width) of a word over an image of ``size`` (width, height)."""
        return upsample(self.of(choice)[word], size, self.preprocessing)


def caption_maps(
    captioner: Captioner,
    images: Sequence[ImageLike],
    captions: Sequence[str | Sequence[int]] | None = None,
    batch_size: int = 32,
    **options: Any,
) -> list[CaptionMaps]:
    """Caption images and return where the captioner looked for each word.

    Attention at step t belongs to the word generated at step t, not to the word that is read.

    Args:
        captioner: one with attention: attend_tell, transformer or clip_gpt2.
        images: paths, PIL images or arrays.
        captions: captions to read instead of generating them, one per image, as text or as
            ``Caption.tokens``.
        batch_size: images per batch.
        options: decoding options, see ``Captioner.caption``.

    Raises:
        CapGenError: the captioner has no attention over the image; the numbers of captions and
            images differ; a caption is empty or too long; an image cannot be read.
    """
    if captions is not None and len(captions) != len(images):
        raise CapGenError(
            f"there are {len(captions)} captions and {len(images)} images",
            "pass one caption per image",
        )
    maps = []
    for start in range(0, len(images), batch_size):
        batch = images[start : start + batch_size]
        if captions is None:
            generated = captioner.caption(list(batch), batch_size=batch_size, **options)
            tokens = [caption.tokens for caption in generated]
        else:
            tokens = [_tokens_of(captioner, text) for text in captions[start : start + batch_size]]
        memory = captioner.memory(batch)
        looked = word_attention(captioner.model, memory, tokens, captioner.specials)
        for i, (ids, weights) in enumerate(zip(tokens, looked, strict=True)):
            alone = memory.select(torch.tensor([i], device=captioner.device))
            maps.append(_maps_of(captioner, alone, ids, weights))
    return maps


def _tokens_of(captioner: Captioner, caption: str | Sequence[int]) -> tuple[int, ...]:
    """Return the ids of a caption without start and end token."""
    if isinstance(caption, str):
        tokens, longest = tuple(captioner.tokenizer.encode(caption)[1:-1]), captioner.longest - 1
    else:
        tokens, longest = tuple(caption), captioner.longest  # one that was cut has no end token
    if len(tokens) > longest:
        raise CapGenError(
            f"a caption of {len(tokens)} tokens is too long: {caption[:60]!r}",
            f"pass at most {captioner.longest} tokens",
        )
    return tokens


@torch.inference_mode()
def next_words(
    captioner: Captioner, image: ImageLike, maps: CaptionMaps, count: int = 8
) -> list[list[NextWord]]:
    """Return the most likely next tokens at each word of a caption, given the words before it.

    Args:
        captioner: the captioner that generated or read the caption.
        image: the captioned image.
        maps: of the caption. For a word of several tokens, the first one is looked at.
        count: tokens per word.

    Returns:
        For each word its likely tokens, most likely first, always including the caption's own. The
        end of the caption is written ``(end)``.
    """
    memory, specials = captioner.memory([image]), captioner.specials
    read = torch.tensor([[specials.start, *maps.tokens[:-1]]], device=captioner.device)  # (1, T)
    logits = captioner.model(memory, read, read.new_zeros(1))[0]  # (T, V)
    probabilities = allowed(logits, specials.banned).softmax(-1).cpu()  # (T, V)

    def shown(token: int) -> str:
        if token == specials.end:
            return "(end)"
        return captioner.tokenizer.decode([token]).strip() or "(space)"

    likely = []
    for word in maps.words:
        actual, row = maps.tokens[word.first], probabilities[word.first]  # (V,)
        best = row.topk(min(count, len(row))).indices.tolist()
        best = best if actual in best else [*best[: count - 1], actual]
        likely.append([NextWord(shown(t), float(row[t]), t == actual) for t in best])
    return likely


@torch.inference_mode()
def _maps_of(
    captioner: Captioner, memory: Any, tokens: tuple[int, ...], weights: Mapping[str, Tensor]
) -> CaptionMaps:
    """Return the maps of one caption from its tokens' weights by layer, (T, heads, N) each."""
    caption = captioner.tokenizer.decode(tokens)
    if not weights:
        raise CapGenError(
            f"{captioner.model.name} has no attention over the image",
            "choose attend_tell, transformer or clip_gpt2",
        )
    if not caption.strip():
        raise CapGenError(
            "an empty caption has no words to look for",
            "pass a caption, or ask for min_length=1",
        )
    read = torch.tensor([[captioner.specials.start, *tokens[:-1]]], device=captioner.device)
    cross, own = layer_attention(captioner.model, memory, read)
    rolled = rollout(cross, own) if cross else mean_map(weights)  # (T, N)
    words = words_of(captioner.tokenizer, tokens)
    return CaptionMaps(
        caption,
        tuple(words),
        tokens,
        {layer: _by_word(words, values) for layer, values in weights.items()},
        _by_word(words, rolled),
        captioner.encoder.preprocessing,
    )


def _by_word(words: Sequence[Word], values: Tensor) -> Tensor:
    """Average values (T, ...) of tokens over each word: (words, ...)."""
    return torch.stack([values[word.first : word.last].float().mean(0) for word in words])
