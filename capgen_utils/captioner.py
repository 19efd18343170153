"""``Captioner``: the one object that turns images into captions (notebook 11)."""

from collections.abc import Callable, Iterator, Sequence
from copy import copy
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from capgen_utils.bundle import Bundle, load_bundle
from capgen_utils.common.device import choose_device, choose_dtype
from capgen_utils.common.files import CapGenError
from capgen_utils.common.paths import REPOSITORY
from capgen_utils.config import DecodingConfig
from capgen_utils.data.images import ImageLike, is_many, open_image
from capgen_utils.data.manifest import Manifest
from capgen_utils.decoding.captions import Caption, Specials, caption_of
from capgen_utils.decoding.options import check_decoding, longest_caption, with_options
from capgen_utils.decoding.rerank import fit, shared_encoder
from capgen_utils.decoding.run import decode_features, encode_features, image_key, word_attention
from capgen_utils.decoding.search import decode
from capgen_utils.vision.dual_encoder import DualEncoder
from capgen_utils.vision.encoder import Encoder
from capgen_utils.vision.features import FeatureCache, encode_pixels, extract

DEFAULT_BUNDLE = REPOSITORY / "data" / "bundles" / "flickr8k_transformer"


class Seen(NamedTuple):
    """What a captioner's encoder saw of B images.

    Attributes:
        features: (B, ...), float16, on the CPU.
        keys: one number per image, which its samples depend on; see ``decoding.search.decode``.
    """

    features: Tensor
    keys: list[int]


class Captioner:
    """Captions photographs with a trained bundle.

    >>> captioner = Captioner.from_bundle()
    >>> captioner.caption("data/photos/cat.jpg")[0].text  # doctest: +SKIP

    Args:
        bundle: the trained captioner.
        encoder: the encoder that it was trained on.
        device: by default the best one of this machine.
        scorer: a CLIP for re-ranking; by default the bundle's own, if it has one.

    Attributes:
        bundle, encoder, model, tokenizer, device: its parts, the networks on the device.
        specials: token ids that decoding needs.
        decoding: the bundle's decoding defaults.
        longest: the longest caption in tokens, including the end token.
        folder: the folder that the bundle was read from.
        images, cache: set by ``reading``: a manifest and its features.
    """

    def __init__(
        self,
        bundle: Bundle,
        encoder: Encoder,
        device: torch.device | None = None,
        scorer: DualEncoder | None = None,
    ) -> None:
        self.device = device or choose_device()
        self.bundle, self.encoder = bundle, encoder.to(self.device)
        self.model = bundle.model.to(self.device).eval()
        self.tokenizer = bundle.tokenizer
        self.specials = Specials.of(self.tokenizer)
        self.decoding, self.longest = bundle.decoding, longest_caption(self.model)
        self.folder = bundle.folder
        self._scorer = scorer
        self.images: Manifest | None = None
        self.cache: FeatureCache | None = None
        self._shared: dict[DualEncoder, Callable[[Tensor], Tensor] | None] = {}

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
            path: the bundle's folder; by default the captioner that ships with CapGen.
            device: ``auto``, ``cpu``, ``cuda`` or ``mps``.
            encoder_weights: a local weights file of the encoder, if it cannot be downloaded.
            scorer: folder of a CLIP for re-ranking; by default the bundle's own, if it has one.
            fp32: compute features in fp32, as exported captioners do, instead of in the dtype of
                the training features. A few captions differ. Devices that only emulate bf16 use
                fp32 in its place, which is many times faster there.

        Raises:
            CapGenError: the bundle, the encoder's weights or the scorer cannot be loaded; says what
                to do.
        """
        bundle = load_bundle(DEFAULT_BUNDLE if path is None else Path(path), encoder_weights)
        where = choose_device(device)
        bf16 = bundle.extraction_dtype == torch.bfloat16
        if fp32 or (bf16 and choose_dtype(where) != torch.bfloat16):
            bundle.info["extraction_dtype"] = "float32"
        clip = None if scorer is None else DualEncoder.load(Path(scorer), encoder_weights)
        return cls(bundle, bundle.build_encoder(), where, clip)

    @property
    def features_dtype(self) -> str:
        """The encoder's compute dtype: ``float32``, ``bfloat16`` or ``float16``."""
        return str(self.bundle.info["extraction_dtype"])

    @cached_property
    def scorer(self) -> DualEncoder:
        """The CLIP that re-ranks captions.

        Raises:
            CapGenError: the bundle has no CLIP, or it cannot be loaded.
        """
        scorer = self._scorer or self.bundle.build_scorer()
        if scorer is None:
            raise CapGenError(
                "this bundle has no CLIP to re-rank captions with",
                "train a small one (capgen pretrain) and name its folder: "
                "scorer=FOLDER, --scorer FOLDER",
            )
        return scorer.to(self.device)

    def reading(self, manifest: Manifest, cache: FeatureCache | None = None) -> "Captioner":
        """Return a copy of this captioner that reads cached features of ``manifest``.

        It takes image names of the manifest instead of photographs. What it samples for an image
        depends on the name and the seed.

        Args:
            manifest: the images.
            cache: their features by this captioner's encoder; by default they are extracted, or
                found in the data folder.

        Raises:
            CapGenError: see ``vision.features.extract``.
        """
        reader = copy(self)
        if cache is None:
            dtype = self.bundle.extraction_dtype
            cache = extract(manifest, self.encoder, self.model.feature, dtype=dtype)
        reader.images, reader.cache = manifest, cache
        return reader

    def see(self, images: Sequence[Any]) -> Seen:
        """Open, resize and encode images, or read their features from the cache.

        Raises:
            CapGenError: an image cannot be read, or is not in the cache.
        """
        if self.cache is not None:
            return Seen(self.cache.rows(images), [image_key(name.encode()) for name in images])
        # (B, size, size, 3), uint8
        pixels = np.stack([self.encoder.preprocessing(open_image(image)) for image in images])
        outputs = encode_pixels(self.encoder, pixels, self.bundle.extraction_dtype)
        return Seen(outputs[self.model.feature], [image_key(image.tobytes()) for image in pixels])

    def memory(self, images: Sequence[Any]) -> Any:
        """Return the model's memory of images, from which it decodes captions.

        Raises:
            CapGenError: an image cannot be read.
        """
        return encode_features(self.model, self.see(images).features)

    def clip_vectors(
        self, clip: DualEncoder, images: Sequence[Any], features: Tensor | None = None
    ) -> Tensor:
        """Return a CLIP's vectors (B, E) of images, on the CPU.

        If both share an encoder, the captioner's features are used.

        Args:
            clip: the scorer, or another one.
            images: as ``see`` takes them.
            features: what ``see`` returned for them.

        Raises:
            CapGenError: an image cannot be read.
        """
        if clip not in self._shared:  # comparing weights takes a while: once per CLIP
            self._shared[clip] = shared_encoder(clip, self.encoder, self.model.feature)
        read = self._shared[clip]
        if read is not None:
            return read(self.see(images).features if features is None else features).cpu()
        if self.images is not None:
            images = [self.images.root / name for name in images]
        return clip.embed_images(images, self.bundle.extraction_dtype)

    def caption(
        self,
        images: ImageLike | Sequence[ImageLike],
        *,
        batch_size: int = 32,
        rerank: bool = False,
        **options: Any,
    ) -> list[Caption]:
        """Caption one image or many.

        What is sampled for an image depends on its pixels and the seed, not on the other images.

        Args:
            images: a path, PIL image, array (H, W, 3) or torch tensor (3, H, W), or a sequence of
                them; also a tensor (B, 3, H, W). Numbers are uint8, or float from 0 to 1.
            batch_size: images per batch.
            rerank: let the ``scorer`` choose the caption that fits the image best, by default among
                captions sampled at ``temperatures`` 0, 0.01, 0.1, 0.5, 0.7, 1 and 1.5.
            options: replace the bundle's decoding defaults: ``beam`` (1 is greedy search),
                ``max_length`` in tokens, ``min_length``, ``length_penalty``, ``temperature`` (above
                0 samples captions), ``temperatures``, ``top_k``, ``top_p``,
                ``repetition_penalty``, ``no_repeat_ngram``, ``groups`` and ``diversity`` of the
                beam, ``candidates`` per image, ``seed``; see ``config.DecodingConfig`` and
                ``decoding.options.with_options``.

        Returns:
            One ``Caption`` per image, in their order.

        Raises:
            CapGenError: an image cannot be read (names it), the options are not possible, or there
                is no scorer.
        """
        many: Sequence[Any] = images if is_many(images) else [images]  # type: ignore[assignment]
        decoding = self._decoding(rerank, options)
        batches = (many[start : start + batch_size] for start in range(0, len(many), batch_size))
        return [c for batch in batches for c in self._caption_batch(batch, decoding, rerank)]

    def caption_each(
        self, paths: Sequence[Path], *, batch_size: int = 32, rerank: bool = False, **options: Any
    ) -> Iterator[tuple[Path, Caption | CapGenError]]:
        """Caption files as ``caption`` does; yields each with its caption or its own error."""
        decoding = self._decoding(rerank, options)
        for start in range(0, len(paths), batch_size):
            batch = paths[start : start + batch_size]
            yield from zip(batch, self._caption_readable(batch, decoding, rerank), strict=True)

    def attention(self, image: ImageLike, **options: Any) -> tuple[Caption, dict[str, Tensor]]:
        """Caption one image and say where the captioner looked for each word.

        Args:
            image: as in ``caption``.
            options: as in ``caption``.

        Returns:
            The caption, and for each layer the weights (words, heads, N) over the encoder's grid;
            rows sum to 1. Empty for a captioner without attention.

        Raises:
            CapGenError: as ``caption``.
        """
        decoding, seen = self._decoding(False, options), self.see([image])
        memory = encode_features(self.model, seen.features)
        (hypotheses,) = decode(self.model, memory, 1, self.specials, decoding, seen.keys)
        (weights,) = word_attention(self.model, memory, [hypotheses[0].tokens], self.specials)
        return caption_of(self.tokenizer, hypotheses), weights

    def _decoding(self, rerank: bool, options: dict[str, Any]) -> DecodingConfig:
        decoding = check_decoding(with_options(self.decoding, rerank, **options), self.longest)
        if rerank:
            self.scorer  # noqa: B018 - raises here if there is none, before any image is read
        return decoding

    def _caption_batch(
        self, images: Sequence[Any], decoding: DecodingConfig, rerank: bool
    ) -> list[Caption]:
        features, keys = self.see(images)
        decoded = decode_features(self.model, features, self.specials, decoding, keys)
        if not rerank:
            return [caption_of(self.tokenizer, hypotheses) for hypotheses in decoded]
        texts = [[self.tokenizer.decode(h.tokens) for h in hypotheses] for hypotheses in decoded]
        scores = fit(self.scorer, self.clip_vectors(self.scorer, images, features), texts)
        return [
            caption_of(self.tokenizer, hypotheses, clip_scores)
            for hypotheses, clip_scores in zip(decoded, scores, strict=True)
        ]

    def _caption_readable(
        self, paths: Sequence[Path], decoding: DecodingConfig, rerank: bool
    ) -> list[Caption | CapGenError]:
        """Caption the readable images of a batch together; the others get their errors."""
        try:
            return list(self._caption_batch(paths, decoding, rerank))
        except CapGenError as error:
            if len(paths) == 1:
                return [error]
        errors: list[CapGenError | None] = []
        for path in paths:
            try:
                open_image(path)
                errors.append(None)
            except CapGenError as error:
                errors.append(error)
        readable = [path for path, error in zip(paths, errors, strict=True) if error is None]
        if len(readable) == len(paths):  # something else went wrong: try them one by one
            return [r for path in paths for r in self._caption_readable([path], decoding, rerank)]
        captions = iter(self._caption_readable(readable, decoding, rerank) if readable else ())
        return [error or next(captions) for error in errors]
