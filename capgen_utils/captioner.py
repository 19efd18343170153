"""``Captioner``: the one object that turns images into captions."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from capgen_utils.checkpoint import LARGEST_BEAM, Bundle, load_bundle
from capgen_utils.config import choose_device
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
        return [c for start in range(0, len(many), batch_size)
                for c in self._caption_batch(many[start : start + batch_size], beam, max_length)]  # fmt: skip

    def caption_each(
        self, paths: Sequence[Path], beam: int | None = None, max_length: int | None = None, batch_size: int = 32
    ) -> Iterator[tuple[Path, Caption | CapGenError]]:
        """Caption many files, yielding each with its caption, or with the error that its image caused."""
        for start in range(0, len(paths), batch_size):
            part = paths[start : start + batch_size]
            try:
                yield from zip(part, self._caption_batch(part, beam, max_length), strict=True)
            except CapGenError:  # find the ones that are to blame
                for path in part:
                    try:
                        yield path, self._caption_batch([path], beam, max_length)[0]
                    except CapGenError as error:
                        yield path, error

    def _caption_batch(self, images: Sequence[Any], beam: int | None, max_length: int | None) -> list[Caption]:
        if not len(images):
            return []
        decoding = self.bundle.decoding
        decoding = replace(
            decoding,
            beam=decoding.beam if beam is None else beam,
            max_length=decoding.max_length if max_length is None else max_length,
        )
        if not 1 <= decoding.beam <= LARGEST_BEAM:
            raise CapGenError(f"a beam of {decoding.beam} is not possible", f"ask for 1 to {LARGEST_BEAM}")
        longest = getattr(self.model.config, "seq_len", decoding.max_length + 1) - 1
        if decoding.max_length > longest:
            raise CapGenError(f"this captioner cannot say {decoding.max_length} tokens", f"ask for at most {longest}")
        output = encode_images(self.encoder, images, self.bundle.extraction_dtype)[self.model.feature]
        found = decode_features(self.model, output, self.specials, decoding)
        return [self._result(hypotheses) for hypotheses in found]

    def _result(self, hypotheses: Sequence[Hypothesis]) -> Caption:
        best = hypotheses[0]
        candidates = tuple(Candidate(self.tokenizer.decode(h.tokens), h.log_probability, h.score) for h in hypotheses)
        words = tuple(self.tokenizer.words(best.tokens))
        return Caption(candidates[0].text, best.log_probability, words, best.ended, candidates)
