"""``Captioner``: the one object that turns images into captions."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor

from capgen_utils.checkpoint import Bundle, load_bundle
from capgen_utils.config import DecodingConfig, choose_device
from capgen_utils.decoding import (
    DecodingOptions,
    Hypothesis,
    Specials,
    check_decoding,
    decode,
    decode_features,
    image_key,
    longest_caption,
    with_options,
    word_attention,
)
from capgen_utils.encoders import Encoder
from capgen_utils.features import encode_images
from capgen_utils.files import CapGenError
from capgen_utils.images import ImageLike, is_many, open_image
from capgen_utils.machine import REPOSITORY

DEFAULT_BUNDLE = REPOSITORY / "data" / "bundles" / "flickr8k_transformer"


@dataclass(frozen=True)
class Candidate:
    """One caption that was considered; see ``decoding.Hypothesis`` for what the numbers mean exactly.

    Attributes:
        text: the caption.
        log_probability: natural logarithm under the captioner, summed over its tokens.
        score: what candidates are ranked by.
        temperature: what it was drawn at; 0 where it was searched for.
    """

    text: str
    log_probability: float
    score: float
    temperature: float = 0.0


@dataclass(frozen=True)
class Caption:
    """The result for one image.

    Attributes:
        text: the best caption.
        log_probability: natural logarithm, summed over its tokens.
        words: the caption token by token.
        ended: false where it was cut at the maximum length.
        candidates: all captions found, best first; the first is ``text``.
    """

    text: str
    log_probability: float
    words: tuple[str, ...]
    ended: bool
    candidates: tuple[Candidate, ...]


class Captioner:
    """Captions photographs with a trained bundle.

    >>> captioner = Captioner.from_bundle()
    >>> captioner.caption("data/photos/cat.jpg")[0].text  # doctest: +SKIP
    """

    def __init__(self, bundle: Bundle, encoder: Encoder, device: torch.device | None = None) -> None:
        self.device = device or choose_device()
        self.bundle, self.encoder = bundle, encoder.to(self.device)
        self.model = bundle.model.to(self.device).eval()
        self.tokenizer = bundle.tokenizer
        self.specials = Specials.of(self.tokenizer)

    @classmethod
    def from_bundle(
        cls, path: str | Path | None = None, device: str = "auto", encoder_weights: Path | None = None
    ) -> "Captioner":
        """Load a bundle and its encoder.

        Args:
            path: the bundle's folder; by default the trained one that ships with CapGen.
            device: ``auto``, ``cpu``, ``cuda``, ``mps``.
            encoder_weights: a local weights file of the encoder, where its own cannot be downloaded.

        Raises:
            CapGenError: the bundle or the encoder's weights cannot be loaded; says what to do.
        """
        bundle = load_bundle(Path(path) if path is not None else DEFAULT_BUNDLE)
        return cls(bundle, bundle.build_encoder(encoder_weights), choose_device(device))

    def caption(
        self, images: ImageLike | Sequence[ImageLike], *, batch_size: int = 32, **options: Unpack[DecodingOptions]
    ) -> list[Caption]:
        """Caption one image or many.

        What is drawn for an image hangs on its pixels and the seed, not on the images beside it.

        Args:
            images: a path, PIL image or array (H, W, 3), or a sequence of them.
            batch_size: images that go through the networks together.
            options: instead of the bundle's own decoding defaults: ``beam`` (1 is greedy search), ``max_length`` in
                tokens, ``min_length``, ``length_penalty``, ``temperature`` (above 0 draws captions), ``top_k``,
                ``top_p``, ``repetition_penalty``, ``no_repeat_ngram``, ``groups`` and ``diversity`` of the beam,
                ``candidates`` an image, ``seed``; see ``config.DecodingConfig`` and ``decoding.with_options``.

        Returns:
            One ``Caption`` for each image, in their order.

        Raises:
            CapGenError: an image cannot be read (names it), or the options are not possible.
        """
        many: Sequence[Any] = images if is_many(images) else [images]  # type: ignore[assignment]
        decoding = self._decoding(options)
        parts = (many[start : start + batch_size] for start in range(0, len(many), batch_size))
        return [caption for part in parts for caption in self._caption_batch(part, decoding)]

    def caption_each(
        self, paths: Sequence[Path], *, batch_size: int = 32, **options: Unpack[DecodingOptions]
    ) -> Iterator[tuple[Path, Caption | CapGenError]]:
        """Caption many files as ``caption`` does, yielding each with its caption or the error that its image caused."""
        decoding = self._decoding(options)
        for start in range(0, len(paths), batch_size):
            part = paths[start : start + batch_size]
            try:
                captions: Sequence[Caption | CapGenError] = self._caption_batch(part, decoding)
            except CapGenError:  # find the ones that are to blame
                captions = [self._caption_or_error(path, decoding) for path in part]
            yield from zip(part, captions, strict=True)

    def attention(self, image: ImageLike, **options: Unpack[DecodingOptions]) -> tuple[Caption, dict[str, Tensor]]:
        """Caption one image and say where the captioner looked for each word.

        Args:
            image: as in ``caption``.
            options: as in ``caption``.

        Returns:
            The caption, and for each layer the weights (words, heads, N) over the encoder's grid; rows sum to 1. A
            captioner without attention has none.

        Raises:
            CapGenError: as ``caption``.
        """
        decoding, features = self._decoding(options), self._features([image])
        with torch.inference_mode():
            memory = self.model.encode(features.to(self.device).float())
            found = decode(self.model, memory, 1, self.specials, decoding, self._keys([image], decoding))[0]
            looked = word_attention(self.model, memory, [found[0].tokens], self.specials)[0]
        return self._result(found), looked

    def _decoding(self, options: DecodingOptions) -> DecodingConfig:
        return check_decoding(with_options(self.bundle.decoding, **options), longest_caption(self.model))

    def _keys(self, images: Sequence[Any], decoding: DecodingConfig) -> list[int] | None:
        """Return what draws for each image hang on: a hash of the pixels that the encoder sees."""
        if not decoding.temperature:
            return None
        return [image_key(self.encoder.preprocessing(open_image(image), False).tobytes()) for image in images]

    def _features(self, images: Sequence[Any]) -> Tensor:
        return encode_images(self.encoder, images, self.bundle.extraction_dtype)[self.model.feature]

    def _caption_batch(self, images: Sequence[Any], decoding: DecodingConfig) -> list[Caption]:
        features, keys = self._features(images), self._keys(images, decoding)
        found = decode_features(self.model, features, self.specials, decoding, keys=keys)
        return [self._result(hypotheses) for hypotheses in found]

    def _caption_or_error(self, path: Path, decoding: DecodingConfig) -> Caption | CapGenError:
        try:
            return self._caption_batch([path], decoding)[0]
        except CapGenError as error:
            return error

    def _result(self, hypotheses: Sequence[Hypothesis]) -> Caption:
        best = hypotheses[0]
        candidates = tuple(
            Candidate(self.tokenizer.decode(h.tokens), h.log_probability, h.score, h.temperature) for h in hypotheses
        )
        words = tuple(self.tokenizer.words(best.tokens))
        return Caption(candidates[0].text, best.log_probability, words, best.ended, candidates)
