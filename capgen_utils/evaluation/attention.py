"""Where a captioner looks for each word: maps by layer and head, their means, rollout; from the
grid to pixels."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Unpack

import numpy as np
import torch
from torch import Tensor

from capgen_utils.captioner import Captioner
from capgen_utils.common.files import CapGenError
from capgen_utils.data.images import ImageLike
from capgen_utils.decoding.captions import NextWord
from capgen_utils.decoding.logits import allowed
from capgen_utils.decoding.options import DecodingOptions, longest_caption
from capgen_utils.decoding.run import word_attention
from capgen_utils.text.words import Tokenizer
from capgen_utils.vision.features import encode_images
from capgen_utils.vision.grid import grid_side, upsample
from capgen_utils.vision.preprocessing import Preprocessing

MEAN, ROLLOUT = "mean", "rollout"


# --- maps over the grid


def on_grid(weights: Tensor) -> Tensor:
    """Drop the class token, where there is one, and let the rest sum to one again.

    A vision transformer's vectors are a class token, which stands for no place, and then a square
    grid: one more than a square number, which no square number is.

    Args:
        weights: (..., N).

    Returns:
        (..., cells), rows sum to 1; even where the class token had everything.

    Raises:
        CapGenError: N is neither a square number nor one more.
    """
    cells = weights.shape[-1]
    if round(cells**0.5) ** 2 == cells:
        return weights
    rest = weights[..., 1:]
    grid_side(cells - 1)
    total = rest.sum(-1, keepdim=True)
    return torch.where(total > 0, rest / total.clamp_min(1e-30), 1 / (cells - 1))


def mean_map(weights: Mapping[str, Tensor]) -> Tensor:
    """Return the mean (words, N) over all heads of all layers of ``weights``: layer -> (words,
    heads, N)."""
    return torch.stack([own.mean(1) for own in weights.values()]).mean(0)


# --- rollout


def rollout(cross: Sequence[Tensor], own: Sequence[Tensor]) -> Tensor:
    """Follow attention through all layers of a decoder (attention rollout, arXiv 2005.00928, for
    cross-attention).

    The paper follows an encoder, in which places mix with places: R = (A + I) / 2 R, layer by
    layer, the identity standing for the residual connection. Here words mix with words, and what is
    followed is how much of each word's vector came from each place of the image. At first nothing
    did: R = 0. In each layer, self-attention A and then cross-attention C are each added to a
    residual of equal share:

        R <- (A R + R) / 2;    R <- (C + R) / 2

    At last every row is divided by its sum: the share of the image in what the word was said from.
    Heads are averaged before. As in the paper, values, gates and feed-forward networks are passed
    over.

    Args:
        cross: of each layer, first to last: (T, N), what each word read from the image; rows sum to
            1.
        own: of each layer: (T, T), what each word read from the words before it and itself; rows
            sum to 1.

    Returns:
        (T, N), rows sum to 1.
    """
    share = torch.zeros_like(cross[0])
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
    layers = list(model.attention_by_layer(memory, tokens))
    over_image = [weights[0].mean(0).cpu() for weights, _ in layers]  # (T, N) each
    over_words = [weights[0].mean(0).cpu() for _, weights in layers]  # (T, T) each
    return over_image, over_words


# --- words


class Word(NamedTuple):
    """A word of a caption and the tokens that spell it: places ``first`` to ``last``, the latter
    excluded."""

    text: str
    first: int
    last: int


def words_of(tokenizer: Tokenizer, tokens: Sequence[int]) -> list[Word]:
    """Return the words that tokens spell, as they stand between the spaces of the decoded text.

    Args:
        tokenizer: of the captioner: whole words, or byte pairs, of which a word may need several.
        tokens: ids without start and end token.
    """
    owner: list[int] = []  # the word that each token belongs to
    for place in range(len(tokens)):
        count = len(tokenizer.decode(tokens[: place + 1]).split())
        if tokenizer.decode(
            [tokens[place]]
        ).strip():  # a later token can join words: "3", "3 .", "3.5"
            owner = [*(min(word, count - 1) for word in owner), max(count - 1, 0)]
        else:
            owner.append(count)  # a space on its own belongs to the word that follows it
    texts = tokenizer.decode(tokens).split()
    places = [
        [place for place, word in enumerate(owner) if word == number]
        for number in range(len(texts))
    ]
    return [Word(text, own[0], own[-1] + 1) for text, own in zip(texts, places, strict=True) if own]


# --- maps


@dataclass(frozen=True)
class CaptionMaps:
    """Where a captioner looked when it said each word of a caption; every map sums to 1.

    A choice is a map by name: a layer's name (its heads averaged), ``layer0 head1`` (one head),
    ``mean`` (all heads of all layers averaged) or ``rollout`` (see there). Where there is one
    layer, the last two are that layer's.

    Attributes:
        caption: the text.
        words: its words; the maps of a word's tokens are averaged.
        tokens: ids without start and end token.
        weights: layer -> (words, heads, N), as the captioner looked: with CLIP's class token, where
            there is one.
        rolled: (words, N), rollout.
        preprocessing: of the encoder: which part of the image the grid covers.
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
        """Return the names of all different maps; those of single heads too where asked for."""
        names = []
        for layer, weights in self.weights.items():
            count = weights.shape[1]
            names += [layer, *(f"{layer} head{i}" for i in range(count) if heads and count > 1)]
        return names + [MEAN, ROLLOUT] * (len(self.weights) > 1)

    def of(self, choice: str = MEAN) -> Tensor:
        """Return the maps (words, cells) of one choice, over the grid row by row.

        Raises:
            CapGenError: no such choice; lists those there are.
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
        """Return the maps (words, heads, cells) of every head of a layer."""
        return on_grid(self.weights[layer])

    def elsewhere(self) -> Tensor:
        """Return the share (words,) of attention, averaged over layers, on CLIP's class token; 0
        without one."""
        mean = mean_map(self.weights)
        return mean[:, 0] if mean.shape[1] > on_grid(mean).shape[1] else torch.zeros(len(mean))

    def on_pixels(self, word: int, size: tuple[int, int], choice: str = MEAN) -> np.ndarray:
        """Return the map of a word over an image of ``size`` (width, height): (height, width); see
        ``upsample``."""
        return upsample(self.of(choice)[word], size, self.preprocessing)


def caption_maps(
    captioner: Captioner,
    images: Sequence[ImageLike],
    captions: Sequence[str | Sequence[int]] | None = None,
    batch_size: int = 32,
    **options: Unpack[DecodingOptions],
) -> list[CaptionMaps]:
    """Caption images and return where the captioner looked for each word.

    Attention at step t belongs to the word that is said at step t, not to the one that is read
    there.

    Args:
        captioner: one that looks: attend_tell, transformer, clip_gpt2.
        images: paths, PIL images or arrays.
        captions: what is to be said, one an image, as text or as ``Caption.tokens``; by default
            what the captioner says.
        batch_size: images that go through the networks together.
        options: how captions are found, see ``Captioner.caption``.

    Raises:
        CapGenError: the captioner has no attention over the image; not as many captions as images,
            or an empty one; an image cannot be read.
    """
    if captions is not None and len(captions) != len(images):
        raise CapGenError(
            f"{len(captions)} captions do not belong to {len(images)} images", "pass one an image"
        )
    found = []
    for start in range(0, len(images), batch_size):
        part = list(images[start : start + batch_size])
        if captions is None:
            said = [
                caption.tokens
                for caption in captioner.caption(part, batch_size=batch_size, **options)
            ]
        else:
            said = [_given(captioner, text) for text in captions[start : start + batch_size]]
        found += _read(captioner, part, said)
    return found


def _given(captioner: Captioner, said: str | Sequence[int]) -> tuple[int, ...]:
    tokens = tuple(captioner.tokenizer.encode(said)[1:-1] if isinstance(said, str) else said)
    longest = longest_caption(captioner.model)
    if len(tokens) > longest - isinstance(said, str):  # one that was cut has no end token
        raise CapGenError(
            f"a caption of {len(tokens)} tokens is too long: {said[:60]!r}",
            f"pass {longest} at most",
        )
    return tokens


@torch.inference_mode()
def next_words(
    captioner: Captioner, image: ImageLike, maps: CaptionMaps, count: int = 8
) -> list[list[NextWord]]:
    """Return what a captioner held likely at each word of a caption, given the words before it.

    Args:
        captioner: that said or read the caption.
        image: that it is of.
        maps: of the caption. Of a word that is spelled by several tokens, the first one is looked
            at.
        count: how many to return for each word.

    Returns:
        For each word the tokens that were likely, the likeliest first; what was said is always
        among them. The end of the caption is written ``(end)``.
    """
    model, specials = captioner.model, captioner.specials
    features = encode_images(captioner.encoder, [image], captioner.bundle.extraction_dtype)[
        model.feature
    ]
    memory = model.encode(features.to(captioner.device).float())
    read = torch.tensor([[specials.start, *maps.tokens[:-1]]], device=captioner.device)
    logits = model(memory, read, read.new_zeros(1))[0]  # (T, V)
    likely = allowed(logits, specials.banned).softmax(-1).cpu()
    found = []
    for word in maps.words:
        said, row = maps.tokens[word.first], likely[word.first]
        best = row.topk(min(count, len(row))).indices.tolist()
        best = best if said in best else [*best[: count - 1], said]
        found.append(
            [NextWord(_shown(captioner, token), float(row[token]), token == said) for token in best]
        )
    return found


def _shown(captioner: Captioner, token: int) -> str:
    return (
        "(end)"
        if token == captioner.specials.end
        else captioner.tokenizer.decode([token]).strip() or "(space)"
    )


@torch.inference_mode()
def _read(
    captioner: Captioner, images: Sequence[Any], captions: Sequence[tuple[int, ...]]
) -> list[CaptionMaps]:
    model, device = captioner.model, captioner.device
    features = encode_images(captioner.encoder, images, captioner.bundle.extraction_dtype)[
        model.feature
    ]
    memory = model.encode(features.to(device).float())
    looked = word_attention(model, memory, captions, captioner.specials)
    found = []
    for i, (tokens, weights) in enumerate(zip(captions, looked, strict=True)):
        if not weights:
            raise CapGenError(
                f"{model.name} has no attention over the image",
                "choose attend_tell, transformer or clip_gpt2",
            )
        if not captioner.tokenizer.decode(tokens).strip():
            raise CapGenError(
                "an empty caption has no words to look for",
                "pass a caption, or ask for min_length=1",
            )
        read = torch.tensor([[captioner.specials.start, *tokens[:-1]]], device=device)
        cross, own = layer_attention(model, memory.select(torch.tensor([i], device=device)), read)
        rolled = rollout(cross, own) if cross else mean_map(weights)
        found.append(_merged(captioner, tokens, weights, rolled))
    return found


def _merged(
    captioner: Captioner, tokens: tuple[int, ...], weights: Mapping[str, Tensor], rolled: Tensor
) -> CaptionMaps:
    """Average the maps of tokens that spell one word."""
    words = words_of(captioner.tokenizer, tokens)

    def by_word(values: Tensor) -> Tensor:
        return torch.stack([values[word.first : word.last].float().mean(0) for word in words])

    merged = {layer: by_word(values) for layer, values in weights.items()}
    caption = captioner.tokenizer.decode(tokens)
    return CaptionMaps(
        caption, tuple(words), tokens, merged, by_word(rolled), captioner.encoder.preprocessing
    )
