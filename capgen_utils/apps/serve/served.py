"""A captioner as the service uses it: what it can do, how an upload is made ready for it, and how a
batch is run."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from capgen_utils.apps.serve.problems import Problem
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
from capgen_utils.vision.grid import grid_side, seen_box
from capgen_utils.vision.preprocessing import Preprocessing


@dataclass(frozen=True)
class Item:
    """One image of one request.

    Attributes:
        image: what the captioner gets: its own small square where that is all it needs, else the
            whole image.
        size: (width, height) of the whole image.
        attention: whether maps are wanted.
    """

    image: np.ndarray | Image.Image
    size: tuple[int, int]
    attention: bool

    @property
    def whole_bytes(self) -> int:
        """Memory that a whole image takes while it waits; small squares do not count."""
        return 3 * self.size[0] * self.size[1] if isinstance(self.image, Image.Image) else 0


@dataclass(frozen=True)
class Answered:
    """What the captioner said of an item."""

    caption: Caption
    maps: CaptionMaps | None


class Served:
    """One captioner of the service.

    Args:
        name: that requests ask for.
        captioner: used in one thread only.
        rerank: whether its scorer can be had.
    """

    def __init__(self, name: str, captioner: Captioner, rerank: bool = False) -> None:
        self.name, self.captioner, self.rerank = name, captioner, rerank
        self.attention = bool(
            captioner.attention(_dummy(), beam=1, groups=1, min_length=0, max_length=2)[1]
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
        """Load a bundle, and the CLIP that chooses where there is one.

        Raises:
            CapGenError: see ``Captioner.from_bundle``.
        """
        captioner = Captioner.from_bundle(folder, device, encoder_weights, scorer, fp32)
        own = (
            scorer_folder(folder or DEFAULT_BUNDLE)
            or captioner.bundle.info["encoder"]["name"] in CLIPS
        )
        if scorer is not None or own:
            captioner.scorer  # noqa: B018 - loaded now: it fails before anybody waits for it
        return cls(name, captioner, scorer is not None or bool(own))

    def describe(self, default: bool) -> ModelOut:
        """Return what ``/v1/models`` says of it."""
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
        """Caption something, so that no request pays for what is done only once."""
        self.captioner.caption(_dummy())
        if self.rerank:
            self.captioner.caption(_dummy(), rerank=True)

    def check(self, options: Options) -> str:
        """Return in words how captions will be found.

        Raises:
            Problem: 422, it cannot be done.
        """
        if options.rerank and not self.rerank:
            raise _cannot(
                self.name, "no CLIP that could choose among captions", "ask without rerank"
            )
        if options.attention and not self.attention:
            raise _cannot(self.name, "no attention over the image", "ask without attention")
        try:
            config = with_options(self.captioner.decoding, options.rerank, **options.decoding())
            words = describe(check_decoding(config, self.captioner.longest))
        except CapGenError as error:
            raise Problem.impossible(error) from error
        return f"{words}, chosen by CLIP" if options.rerank else words

    def prepare(self, image: Image.Image, options: Options) -> Item:
        """Return an item for ``run``: an image that only the captioner's encoder sees is made small
        at once."""
        preprocessing = self.captioner.encoder.preprocessing
        if options.rerank and self.captioner.scorer.images.preprocessing != preprocessing:
            return Item(image, image.size, options.attention)
        return Item(np.array(preprocessing(image)), image.size, options.attention)

    def run(self, options: Options, items: Sequence[Item]) -> list[Answered | Exception]:
        """Caption items together; where that fails, find those that are to blame."""
        try:
            return list(self._run(options, items))
        except Exception as error:
            if len(items) == 1:
                return [error]
            return [self.run(options, [item])[0] for item in items]

    def _run(self, options: Options, items: Sequence[Item]) -> list[Answered]:
        captions = self.captioner.caption(
            [item.image for item in items],
            batch_size=len(items),
            rerank=options.rerank,
            **options.decoding(),
        )
        maps: list[CaptionMaps | None] = [None] * len(items)
        wanted = [i for i, item in enumerate(items) if item.attention and captions[i].text.strip()]
        if wanted:
            found = caption_maps(
                self.captioner,
                [items[i].image for i in wanted],
                [captions[i].tokens for i in wanted],
            )
            for i, own in zip(wanted, found, strict=True):
                maps[i] = own
        return [Answered(caption, own) for caption, own in zip(captions, maps, strict=True)]


def _cannot(name: str, what: str, remedy: str) -> Problem:
    return Problem(422, "impossible_options", f"the captioner {name} has {what}", remedy)


def _dummy() -> Image.Image:
    return Image.new("RGB", (64, 64), (120, 130, 110))


# --- what is answered


def caption_out(place: int, item: Item, answered: Answered) -> CaptionOut:
    """Return what the answer says of one image."""
    caption = answered.caption
    return CaptionOut(
        image=place,
        width=item.size[0],
        height=item.size[1],
        caption=caption.text,
        log_probability=_number(caption.log_probability),
        ended=caption.ended,
        candidates=[
            CandidateOut(
                text=c.text,
                log_probability=_number(c.log_probability),
                score=_number(c.score),
                temperature=c.temperature,
                clip_score=None if c.clip_score is None else _number(c.clip_score),
            )
            for c in caption.candidates
        ],
        attention=None if answered.maps is None else attention_out(answered.maps, item.size),
    )


def _number(value: float) -> float:
    """JSON knows no infinities: a caption that was cut where nothing could follow may have one."""
    return round(max(min(value, 1e9), -1e9), 4)


def attention_out(maps: CaptionMaps, size: tuple[int, int]) -> Attention:
    """Return the maps of a caption over an image of ``size`` (width, height)."""
    weights = maps.of(MEAN)
    side = grid_side(weights.shape[1])
    words = [
        WordAttention(text=word.text, weights=[round(value, 5) for value in row.tolist()])
        for word, row in zip(maps.words, weights, strict=True)
    ]
    return Attention(rows=side, columns=side, region=region(size, maps.preprocessing), words=words)


def region(size: tuple[int, int], preprocessing: Preprocessing) -> Region:
    """Return which part of an image of ``size`` (width, height) the encoder saw."""
    left, top, right, bottom = seen_box(size, preprocessing)
    width, height = size
    return Region(
        left=left / width,
        top=top / height,
        width=(right - left) / width,
        height=(bottom - top) / height,
    )
