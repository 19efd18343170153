"""``Captioner``: the one object that turns images into captions."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from capgen_utils.checkpoint import Bundle, load_bundle
from capgen_utils.config import LARGEST_BEAM, DecodingConfig, choose_device
from capgen_utils.decoding import Hypothesis, Specials, decode_features
from capgen_utils.encoders import Encoder
from capgen_utils.features import encode_images
from capgen_utils.files import CapGenError
from capgen_utils.images import ImageLike, is_many
from capgen_utils.machine import REPOSITORY

DEFAULT_BUNDLE = REPOSITORY / "data" / "bundles" / "flickr8k_transformer"


@dataclass(frozen=True)
class Candidate:
    """One caption that was considered: its text, log-probability (natural, summed) and ranking score."""

    text: str
    log_probability: float
    score: float


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
        self.specials = Specials(self.tokenizer.start_id, self.tokenizer.end_id, self.tokenizer.banned_ids)

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
        self,
        images: ImageLike | Sequence[ImageLike],
        beam: int | None = None,
        max_length: int | None = None,
        batch_size: int = 32,
    ) -> list[Caption]:
        """Caption one image or many.

        Args:
            images: a path, PIL image or array (H, W, 3), or a sequence of them.
            beam: instead of the bundle's own; 1 is greedy search.
            max_length: longest caption in tokens, instead of the bundle's own.
            batch_size: images that go through the networks together.

        Returns:
            One ``Caption`` for each image, in their order.

        Raises:
            CapGenError: an image cannot be read (names it), or the options are not possible.
        """
        many: Sequence[Any] = images if is_many(images) else [images]  # type: ignore[assignment]
        decoding = self._decoding(beam, max_length)
        parts = (many[start : start + batch_size] for start in range(0, len(many), batch_size))
        return [caption for part in parts for caption in self._caption_batch(part, decoding)]

    def caption_each(
        self, paths: Sequence[Path], beam: int | None = None, max_length: int | None = None, batch_size: int = 32
    ) -> Iterator[tuple[Path, Caption | CapGenError]]:
        """Caption many files, yielding each with its caption, or with the error that its image caused."""
        decoding = self._decoding(beam, max_length)
        for start in range(0, len(paths), batch_size):
            part = paths[start : start + batch_size]
            try:
                captions: Sequence[Caption | CapGenError] = self._caption_batch(part, decoding)
            except CapGenError:  # find the ones that are to blame
                captions = [self._caption_or_error(path, decoding) for path in part]
            yield from zip(part, captions, strict=True)

    def attention(self, image: ImageLike, beam: int | None = None) -> tuple[Caption, dict[str, Tensor]]:
        """Caption one image and say where the captioner looked for each word.

        Returns:
            The caption, and for each layer the weights (words, heads, N) over the encoder's grid; rows sum to 1.

        Raises:
            CapGenError: as ``caption``.
        """
        features = self._features([image])
        hypotheses = decode_features(self.model, features, self.specials, self._decoding(beam, None))[0]
        looked: dict[str, list[Tensor]] = {}
        with torch.inference_mode():
            state = self.model.start(self.model.encode(features.to(self.device).float()))
            for token in (self.specials.start, *hypotheses[0].tokens[:-1]):  # reading it, the model says the next
                _, state, weights = self.model.step(torch.tensor([token], device=self.device), state, attention=True)
                for name, value in weights.items():
                    looked.setdefault(name, []).append(value.cpu())
        return self._result(hypotheses), {name: torch.cat(steps) for name, steps in looked.items()}

    def _decoding(self, beam: int | None, max_length: int | None) -> DecodingConfig:
        given = {"beam": beam, "max_length": max_length}
        decoding = replace(self.bundle.decoding, **{k: v for k, v in given.items() if v is not None})
        if not 1 <= decoding.beam <= LARGEST_BEAM:
            raise CapGenError(f"a beam of {decoding.beam} is not possible", f"ask for 1 to {LARGEST_BEAM}")
        longest = getattr(self.model.config, "seq_len", decoding.max_length + 1) - 1
        if not 1 <= decoding.max_length <= longest:
            raise CapGenError(
                f"this captioner cannot say {decoding.max_length} tokens", f"ask for at least 1 and at most {longest}"
            )
        return decoding

    def _features(self, images: Sequence[Any]) -> Tensor:
        return encode_images(self.encoder, images, self.bundle.extraction_dtype)[self.model.feature]

    def _caption_batch(self, images: Sequence[Any], decoding: DecodingConfig) -> list[Caption]:
        found = decode_features(self.model, self._features(images), self.specials, decoding)
        return [self._result(hypotheses) for hypotheses in found]

    def _caption_or_error(self, path: Path, decoding: DecodingConfig) -> Caption | CapGenError:
        try:
            return self._caption_batch([path], decoding)[0]
        except CapGenError as error:
            return error

    def _result(self, hypotheses: Sequence[Hypothesis]) -> Caption:
        best = hypotheses[0]
        candidates = tuple(Candidate(self.tokenizer.decode(h.tokens), h.log_probability, h.score) for h in hypotheses)
        words = tuple(self.tokenizer.words(best.tokens))
        return Caption(candidates[0].text, best.log_probability, words, best.ended, candidates)
