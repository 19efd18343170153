"""A captioner inside the service: its abilities, the preparation of images, and batches."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from capgen_utils.apps.serve.schemas import (
    Attention,
    CandidateOut,
    CaptionOut,
    ModelOut,
    Options,
    Region,
    WordAttention,
)
from capgen_utils.bundle import scorer_folder
from capgen_utils.captioner import DEFAULT_BUNDLE, Captioner
from capgen_utils.common.files import CapGenError
from capgen_utils.decoding.captions import Caption
from capgen_utils.decoding.options import check_decoding, describe, with_options
from capgen_utils.evaluation.attention import MEAN, CaptionMaps, caption_maps
from capgen_utils.vision.clip import CLIPS
from capgen_utils.vision.preprocessing import Preprocessing, grid_side, seen_box

Answer = tuple[Caption, CaptionMaps | None]  # with attention maps if asked for
BLANK = Image.new("RGB", (64, 64), (120, 130, 110))


@dataclass(frozen=True)
class Item:
    """One image of one request.

    Attributes:
        image: pixels (side, side, 3) if only the captioner's encoder reads it, else the whole
            image.
        size: (width, height) of the whole image.
        attention: whether to return attention maps.
    """

    image: np.ndarray | Image.Image
    size: tuple[int, int]
    attention: bool

    @property
    def whole_bytes(self) -> int:
        """Memory of a whole image while it waits; small squares do not count."""
        return 3 * self.size[0] * self.size[1] if isinstance(self.image, Image.Image) else 0


class Served:
    """One captioner of the service.

    Args:
        name: its name in requests.
        captioner: used in one thread only.
        rerank: whether it has a scorer.
    """

    def __init__(self, name: str, captioner: Captioner, rerank: bool = False) -> None:
        self.name, self.captioner, self.rerank = name, captioner, rerank
        self.attention = bool(
            captioner.attention(BLANK, beam=1, groups=1, min_length=0, max_length=2)[1]
        )
        self._parameters = sum(p.numel() for p in captioner.model.parameters())

    @classmethod
    def load(
        cls,
        name: str,
        folder: Path | None = None,
        device: str = "auto",
        encoder_weights: Path | None = None,
        scorer: Path | None = None,
        fp32: bool = False,
    ) -> "Served":
        """Load a bundle, and its CLIP for re-ranking if there is one.

        Raises:
            CapGenError: see ``Captioner.from_bundle``.
        """
        captioner = Captioner.from_bundle(folder, device, encoder_weights, scorer, fp32)
        rerank = (
            scorer is not None
            or scorer_folder(folder or DEFAULT_BUNDLE) is not None
            or captioner.bundle.info["encoder"]["name"] in CLIPS
        )
        if rerank:
            captioner.scorer  # noqa: B018 - load it now, so that no request waits for it or fails
        return cls(name, captioner, rerank)

    def describe(self, default: bool) -> ModelOut:
        """Return its entry in ``/v1/models``."""
        bundle = self.captioner.bundle
        return ModelOut(
            name=self.name,
            kind=bundle.info["model"],
            default=default,
            parameters=self._parameters,
            tokens=len(bundle.tokenizer),
            longest=self.captioner.longest,
            encoder=bundle.info["encoder"]["name"],
            attention=self.attention,
            rerank=self.rerank,
            decoding=self.captioner.decoding.to_json(),
        )

    def warm_up(self) -> None:
        """Caption a blank image, so that no request pays for one-time work."""
        for rerank in (False, True)[: 1 + self.rerank]:
            self.captioner.caption(BLANK, rerank=rerank)

    def check(self, options: Options) -> str:
        """Return in words how captions will be decoded.

        Raises:
            CapGenError: the captioner cannot do this.
        """
        if options.rerank and not self.rerank:
            raise CapGenError(f"the captioner {self.name} has no CLIP", "ask without rerank")
        if options.attention and not self.attention:
            raise CapGenError(
                f"the captioner {self.name} has no attention over the image",
                "ask without attention",
            )
        config = with_options(self.captioner.decoding, options.rerank, **options.decoding())
        words = describe(check_decoding(config, self.captioner.longest))
        return f"{words}, chosen by CLIP" if options.rerank else words

    def prepare(self, image: Image.Image, options: Options) -> Item:
        """Return an item for ``run``, resized at once if only the captioner's encoder reads it."""
        preprocessing = self.captioner.encoder.preprocessing
        if options.rerank and self.captioner.scorer.images.preprocessing != preprocessing:
            return Item(image, image.size, options.attention)
        return Item(np.array(preprocessing(image)), image.size, options.attention)

    def run(self, options: Options, items: Sequence[Item]) -> list[Answer | Exception]:
        """Caption items together; if that fails, one by one, to find the items that fail."""
        try:
            return list(self._run(options, items))
        except Exception as error:
            if len(items) == 1:
                return [error]
            return [self.run(options, [item])[0] for item in items]

    def _run(self, options: Options, items: Sequence[Item]) -> list[Answer]:
        captions = self.captioner.caption(
            [item.image for item in items],
            batch_size=len(items),
            rerank=options.rerank,
            **options.decoding(),
        )
        looked = [i for i, c in enumerate(captions) if items[i].attention and c.text.strip()]
        if not looked:
            return [(caption, None) for caption in captions]
        images, tokens = zip(*((items[i].image, captions[i].tokens) for i in looked), strict=True)
        maps = dict(zip(looked, caption_maps(self.captioner, images, tokens), strict=True))
        return [(caption, maps.get(i)) for i, caption in enumerate(captions)]


# --- answers


def caption_out(index: int, item: Item, caption: Caption, maps: CaptionMaps | None) -> CaptionOut:
    """Return the answer for one image."""
    return CaptionOut(
        image=index,
        width=item.size[0],
        height=item.size[1],
        caption=caption.text,
        log_probability=finite(caption.log_probability),
        ended=caption.ended,
        candidates=[
            CandidateOut(
                text=c.text,
                log_probability=finite(c.log_probability),
                score=finite(c.score),
                temperature=c.temperature,
                clip_score=None if c.clip_score is None else finite(c.clip_score),
            )
            for c in caption.candidates
        ],
        attention=None if maps is None else attention_out(maps, item.size),
    )


def finite(value: float) -> float:
    """Return a number for JSON, which has no infinities: a cut caption may be impossible."""
    return round(max(min(value, 1e9), -1e9), 4)


def attention_out(maps: CaptionMaps, size: tuple[int, int]) -> Attention:
    """Return the maps of a caption over an image of ``size`` (width, height)."""
    weights = maps.of(MEAN)
    side = grid_side(weights.shape[1])
    return Attention(
        rows=side,
        columns=side,
        region=region(size, maps.preprocessing),
        words=[
            WordAttention(text=word.text, weights=[round(value, 5) for value in row.tolist()])
            for word, row in zip(maps.words, weights, strict=True)
        ],
    )


def region(size: tuple[int, int], preprocessing: Preprocessing) -> Region:
    """Return the part of an image of ``size`` (width, height) that the encoder saw."""
    (width, height), (left, top, right, bottom) = size, seen_box(size, preprocessing)
    across, down = (right - left) / width, (bottom - top) / height
    return Region(left=left / width, top=top / height, width=across, height=down)
