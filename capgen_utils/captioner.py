"""``Captioner``: the one object that turns images into captions."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor

from capgen_utils.bundle import Bundle, load_bundle, require_scorer
from capgen_utils.common.device import choose_device
from capgen_utils.common.files import CapGenError
from capgen_utils.common.paths import REPOSITORY
from capgen_utils.config import DecodingConfig
from capgen_utils.data.images import ImageLike, is_many, open_image
from capgen_utils.decoding.captions import Caption, Hypothesis, Specials, caption_of
from capgen_utils.decoding.options import (
    DecodingOptions,
    check_decoding,
    longest_caption,
    with_options,
)
from capgen_utils.decoding.rerank import best_first, fit, shared_sight, temperatures_of
from capgen_utils.decoding.run import decode_features, image_key, word_attention
from capgen_utils.decoding.search import decode
from capgen_utils.vision.dual_encoder import DualEncoder
from capgen_utils.vision.encoder import Encoder
from capgen_utils.vision.features import encode_images

DEFAULT_BUNDLE = REPOSITORY / "data" / "bundles" / "flickr8k_transformer"


@dataclass(frozen=True)
class _Plan:
    """How the captions of an image are found, and who chooses among them."""

    decoding: DecodingConfig
    temperatures: tuple[float, ...] | None = None
    scorer: DualEncoder | None = None

    @property
    def draws(self) -> bool:
        return any(self.temperatures or (self.decoding.temperature,))


class Captioner:
    """Captions photographs with a trained bundle.

    >>> captioner = Captioner.from_bundle()
    >>> captioner.caption("data/photos/cat.jpg")[0].text  # doctest: +SKIP
    """

    def __init__(
        self,
        bundle: Bundle,
        encoder: Encoder,
        device: torch.device | None = None,
        scorer: DualEncoder | None = None,
        encoder_weights: Path | None = None,
    ) -> None:
        self.device = device or choose_device()
        self._given_scorer, self._weights = scorer, encoder_weights
        self.bundle, self.encoder = bundle, encoder.to(self.device)
        self.model = bundle.model.to(self.device).eval()
        self.tokenizer = bundle.tokenizer
        self.specials = Specials.of(self.tokenizer)

    @classmethod
    def from_bundle(
        cls,
        path: str | Path | None = None,
        device: str = "auto",
        encoder_weights: Path | None = None,
        scorer: str | Path | None = None,
        fp32: bool = False,
    ) -> "Captioner":
        """Load a bundle and its encoder.

        Args:
            path: the bundle's folder; by default the trained one that ships with CapGen.
            device: ``auto``, ``cpu``, ``cuda``, ``mps``.
            encoder_weights: a local weights file of the encoder, where its own cannot be
                downloaded.
            scorer: folder of a CLIP that can choose among captions; by default the bundle's own,
                where it has one.
            fp32: compute features in fp32, as an exported captioner does, and not in the dtype that
                those of training were computed in; a caption in many differs.

        Raises:
            CapGenError: the bundle, the encoder's weights or the scorer cannot be loaded; says what
                to do.
        """
        bundle = load_bundle(Path(path) if path is not None else DEFAULT_BUNDLE)
        if fp32:
            bundle.info["extraction_dtype"] = "float32"
        given = (
            require_scorer(bundle, Path(scorer), encoder_weights) if scorer is not None else None
        )
        return cls(
            bundle,
            bundle.build_encoder(encoder_weights),
            choose_device(device),
            given,
            encoder_weights,
        )

    @property
    def decoding(self) -> DecodingConfig:
        """How captions are found unless asked otherwise."""
        return self.bundle.decoding

    @property
    def longest(self) -> int:
        """Tokens that a caption can have, its end token included."""
        return longest_caption(self.model)

    @property
    def features_dtype(self) -> str:
        """What the encoder computes in: ``float32``, ``bfloat16`` or ``float16``."""
        return str(self.bundle.info["extraction_dtype"])

    @property
    def folder(self) -> Path | None:
        """Where the bundle was read from."""
        return self.bundle.folder

    @cached_property
    def scorer(self) -> DualEncoder:
        """The CLIP that chooses among captions: the one that was given, else the bundle's.

        Raises:
            CapGenError: there is none, or it cannot be loaded.
        """
        return (self._given_scorer or require_scorer(self.bundle, None, self._weights)).to(
            self.device
        )

    @cached_property
    def _scorer_reads(self) -> Callable[[Tensor], Tensor] | None:
        return shared_sight(self.scorer, self.encoder, self.model.feature)

    def caption(
        self,
        images: ImageLike | Sequence[ImageLike],
        *,
        batch_size: int = 32,
        rerank: bool = False,
        temperatures: Sequence[float] | None = None,
        **options: Unpack[DecodingOptions],
    ) -> list[Caption]:
        """Caption one image or many.

        What is drawn for an image hangs on its pixels and the seed, not on the images beside it.

        Args:
            images: a path, PIL image, array (H, W, 3) or torch tensor (3, H, W), or a sequence of
                them; also a tensor (B, 3, H, W). Numbers are uint8, or float from 0 to 1.
            batch_size: images that go through the networks together.
            rerank: let the ``scorer`` choose the caption that fits the image best.
            temperatures: what it chooses from: one caption drawn at each of these, 0 being the most
                likely one. By default 0, 0.01, 0.1, 0.5, 0.7, 1 and 1.5, unless options ask for a
                beam or for samples.
            options: instead of the bundle's own decoding defaults: ``beam`` (1 is greedy search),
                ``max_length`` in tokens, ``min_length``, ``length_penalty``, ``temperature`` (above
                0 draws captions), ``top_k``, ``top_p``, ``repetition_penalty``,
                ``no_repeat_ngram``, ``groups`` and ``diversity`` of the beam, ``candidates`` an
                image, ``seed``; see ``config.DecodingConfig`` and ``decoding.with_options``.

        Returns:
            One ``Caption`` for each image, in their order.

        Raises:
            CapGenError: an image cannot be read (names it), the options are not possible, or there
                is no scorer.
        """
        many: Sequence[Any] = images if is_many(images) else [images]  # type: ignore[assignment]
        plan = self._plan(options, rerank, temperatures)
        parts = (many[start : start + batch_size] for start in range(0, len(many), batch_size))
        return [caption for part in parts for caption in self._caption_batch(part, plan)]

    def caption_each(
        self,
        paths: Sequence[Path],
        *,
        batch_size: int = 32,
        rerank: bool = False,
        temperatures: Sequence[float] | None = None,
        **options: Unpack[DecodingOptions],
    ) -> Iterator[tuple[Path, Caption | CapGenError]]:
        """Caption many files as ``caption`` does, yielding each with its caption or the error that
        its image caused."""
        plan = self._plan(options, rerank, temperatures)
        for start in range(0, len(paths), batch_size):
            part = paths[start : start + batch_size]
            try:
                captions: Sequence[Caption | CapGenError] = self._caption_batch(part, plan)
            except CapGenError:
                captions = self._caption_readable(part, plan)
            yield from zip(part, captions, strict=True)

    def attention(
        self, image: ImageLike, **options: Unpack[DecodingOptions]
    ) -> tuple[Caption, dict[str, Tensor]]:
        """Caption one image and say where the captioner looked for each word.

        Args:
            image: as in ``caption``.
            options: as in ``caption``.

        Returns:
            The caption, and for each layer the weights (words, heads, N) over the encoder's grid;
            rows sum to 1. A captioner without attention has none.

        Raises:
            CapGenError: as ``caption``.
        """
        plan, features = self._plan(options), self._features([image])
        with torch.inference_mode():
            memory = self.model.encode(features.to(self.device).float())
            found = decode(
                self.model, memory, 1, self.specials, plan.decoding, self._keys([image], plan)
            )[0]
            looked = word_attention(self.model, memory, [found[0].tokens], self.specials)[0]
        return self._result(found), looked

    def _plan(
        self,
        options: DecodingOptions,
        rerank: bool = False,
        temperatures: Sequence[float] | None = None,
    ) -> _Plan:
        decoding = check_decoding(with_options(self.decoding, **options), self.longest)
        if rerank:
            return _Plan(decoding, temperatures_of(temperatures, options), self.scorer)
        if temperatures is not None:
            raise CapGenError(
                "captions are drawn at several temperatures for a CLIP to choose from",
                "ask for rerank too (--rerank)",
            )
        return _Plan(decoding)

    def _keys(self, images: Sequence[Any], plan: _Plan) -> list[int] | None:
        """Return what draws for each image hang on: a hash of the pixels that the encoder sees."""
        if not plan.draws:
            return None
        return [
            image_key(self.encoder.preprocessing(open_image(image), False).tobytes())
            for image in images
        ]

    def _features(self, images: Sequence[Any]) -> Tensor:
        return encode_images(self.encoder, images, self.bundle.extraction_dtype)[self.model.feature]

    def _caption_batch(self, images: Sequence[Any], plan: _Plan) -> list[Caption]:
        features, keys = self._features(images), self._keys(images, plan)
        found = decode_features(
            self.model,
            features,
            self.specials,
            plan.decoding,
            keys=keys,
            temperatures=plan.temperatures,
        )
        if plan.scorer is None:
            return [self._result(hypotheses) for hypotheses in found]
        vectors = (
            self._scorer_reads(features) if self._scorer_reads else self._look(plan.scorer, images)
        )
        texts = [[self.tokenizer.decode(h.tokens) for h in hypotheses] for hypotheses in found]
        return [
            self._result(hypotheses, scores)
            for hypotheses, scores in zip(found, fit(plan.scorer, vectors, texts), strict=True)
        ]

    def _look(self, scorer: DualEncoder, images: Sequence[Any]) -> Tensor:
        return scorer.embed_images(images, self.bundle.extraction_dtype)

    def _caption_readable(self, paths: Sequence[Path], plan: _Plan) -> list[Caption | CapGenError]:
        """Caption those of a batch that can be read, still together; the others get their errors."""
        opened = [_why_unreadable(path) for path in paths]
        good = [path for path, error in zip(paths, opened, strict=True) if error is None]
        try:
            captions = iter(self._caption_batch(good, plan) if good else ())
        except CapGenError:  # it is not the files: find the ones that are to blame
            return [self._caption_or_error(path, plan) for path in paths]
        return [next(captions) if error is None else error for error in opened]

    def _caption_or_error(self, path: Path, plan: _Plan) -> Caption | CapGenError:
        try:
            return self._caption_batch([path], plan)[0]
        except CapGenError as error:
            return error

    def _result(
        self, hypotheses: Sequence[Hypothesis], scores: Sequence[float] | None = None
    ) -> Caption:
        order = range(len(hypotheses)) if scores is None else best_first(scores)
        return caption_of(self.tokenizer, hypotheses, order, scores)


def _why_unreadable(path: Path) -> CapGenError | None:
    try:
        open_image(path)
    except CapGenError as error:
        return error
    return None
