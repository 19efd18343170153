"""Is attention where the thing is, and does it matter? Pointing game and deletion test, with chance
beside them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from capgen_utils.captioner import Captioner
from capgen_utils.common.files import CapGenError
from capgen_utils.data.images import ImageLike, open_image
from capgen_utils.data.manifest import Manifest
from capgen_utils.data.scenes import COLOURS, SHAPES, Scene, ShapeObject
from capgen_utils.data.shapes import is_true, load_scenes, scenes_file
from capgen_utils.decoding.logits import allowed
from capgen_utils.decoding.run import image_key
from capgen_utils.evaluation.attention import MEAN, ROLLOUT, CaptionMaps, caption_maps
from capgen_utils.evaluation.metrics import mean_interval
from capgen_utils.evaluation.metrics.resampling import INTERVALS
from capgen_utils.evaluation.results import protocol, with_facts
from capgen_utils.vision.grid import grid_side

KINDS = {"colour": tuple(COLOURS), "shape": SHAPES}  # words that name an object of a scene


SHARE, DRAWS = 0.2, 4  # of the deletion test: cells that are masked, random patches a word


# Words that name nothing to see; what is left of a caption are its content words.
_FUNCTION = """
a an the this that these those some any each other another one of in on at to from with without for by into onto over
under up down off out near next behind beside between through across along around against above below front back top
left right side and or but as while than there here it its he his him she her they their them who which what is are was
were be been being has have having does do did not no we you i our your
"""


FUNCTION_WORDS = frozenset(_FUNCTION.split())


# --- the pointing game


@dataclass(frozen=True)
class Pointing:
    """What a word's map points at: one try of the pointing game (arXiv 1608.00507).

    Attributes:
        image: number of the image.
        kind: ``colour`` or ``shape``.
        hits: choice of map -> 1 where its peak lies in the box of the object that the word names,
            else 0; where several pixels are the highest, the share of them that do. So a map that
            is the same everywhere scores chance.
        near: the same for that box grown by half a cell of the grid on each side: a cell also sees
            what is beside it.
        others: as ``hits`` for the boxes of all other objects; without a try where there is none
            (``None``).
        area, near_area: share of the image that the right box and the grown one cover: what a
            random pixel would score.
        centre: 1 where the image's centre is in the right box.
    """

    image: int
    kind: str
    hits: Mapping[str, float]
    near: Mapping[str, float]
    others: Mapping[str, float] | None
    area: float
    near_area: float
    centre: float


def peak_share(level: np.ndarray, boxes: Sequence[tuple[int, int, int, int]]) -> float:
    """Return the share of the highest pixels of a map (height, width) that lie in one of the boxes.

    Args:
        level: values of 0 or more.
        boxes: (x0, y0, x1, y1) in pixels, x1 and y1 excluded.
    """
    inside = np.zeros(level.shape, dtype=bool)
    for x0, y0, x1, y1 in boxes:
        inside[y0:y1, x0:x1] = True
    return float(inside[level >= level.max() * (1 - 1e-6)].mean())


def named_object(word: str, scene: Scene) -> tuple[str, ShapeObject] | None:
    """Return which kind of word this is and the object it names; no two of a scene share a colour
    or a shape."""
    for kind, known in KINDS.items():
        for thing in scene.objects if word in known else ():
            if getattr(thing, kind) == word:
                return kind, thing
    return None


def pointings(
    maps: Sequence[CaptionMaps], scenes: Sequence[Scene], size: tuple[int, int], heads: bool = True
) -> list[Pointing]:
    """Play the pointing game with every colour and shape word of the captions that are true of
    their scene.

    Args:
        maps: one caption an image.
        scenes: of the same images.
        size: (width, height) of the images in pixels, in which the boxes are given.
        heads: play with every single head too.
    """
    found = []
    for image, (own, scene) in enumerate(zip(maps, scenes, strict=True)):
        if not is_true(own.caption, scene):
            continue
        for place, text in enumerate(own.texts):
            named = named_object(text, scene)
            if named is not None:
                found.append(_pointing(image, own, place, *named, scene, size, heads))
    return found


def _pointing(
    image: int,
    own: CaptionMaps,
    place: int,
    kind: str,
    thing: ShapeObject,
    scene: Scene,
    size: tuple[int, int],
    heads: bool,
) -> Pointing:
    levels = {choice: own.on_pixels(place, size, choice) for choice in own.choices(heads)}
    x0, y0, x1, y1 = thing.box
    grown = _grown(thing.box, size, size[0] / grid_side(own.of().shape[1]) / 2)
    rest = [other.box for other in scene.objects if other != thing]
    return Pointing(
        image,
        kind,
        {choice: peak_share(level, [thing.box]) for choice, level in levels.items()},
        {choice: peak_share(level, [grown]) for choice, level in levels.items()},
        {choice: peak_share(level, rest) for choice, level in levels.items()} if rest else None,
        (x1 - x0) * (y1 - y0) / (size[0] * size[1]),
        (grown[2] - grown[0]) * (grown[3] - grown[1]) / (size[0] * size[1]),
        float(x0 <= size[0] // 2 < x1 and y0 <= size[1] // 2 < y1),
    )


def _grown(
    box: tuple[int, int, int, int], size: tuple[int, int], margin: float
) -> tuple[int, int, int, int]:
    x0, y0, x1, y1 = box
    by = round(margin)
    return max(0, x0 - by), max(0, y0 - by), min(size[0], x1 + by), min(size[1], y1 + by)


def pointing_game(tries: Sequence[Pointing], seed: int = 0) -> dict[str, Any]:
    """Return the score of the pointing game for colour words and for shape words.

    Args:
        tries: from ``pointings``.
        seed: of the bootstrap over images.

    Returns:
        kind -> ``tries``, ``images``; ``chance``, the mean share of the image that the right box
        covers; ``centre``, the score of always pointing at the middle; and ``maps``: choice ->
        ``hits``, ``score`` = hits / tries, ``interval`` (95 %, bootstrap over images); ``near``,
        the score on boxes grown by half a cell, to be held against ``chance near``; ``another``,
        the score on boxes of other objects in scenes that have some. All are shares of one. A kind
        without a try is left out.
    """
    found = {}
    for kind in KINDS:
        own = [one for one in tries if one.kind == kind]
        if own:
            found[kind] = {
                "tries": len(own),
                "images": len({one.image for one in own}),
                "chance": round(float(np.mean([one.area for one in own])), 4),
                "chance near": round(float(np.mean([one.near_area for one in own])), 4),
                "centre": round(float(np.mean([one.centre for one in own])), 4),
                "maps": {choice: _score(own, choice, seed) for choice in own[0].hits},
            }
    return found


def _score(tries: Sequence[Pointing], choice: str, seed: int) -> dict[str, Any]:
    value, *ends = _mean_over_images([(one.image, one.hits[choice]) for one in tries], seed)
    others = [one.others[choice] for one in tries if one.others is not None]
    return {
        "hits": round(sum(one.hits[choice] for one in tries), 2),
        "score": value,
        "interval": ends,
        "near": round(float(np.mean([one.near[choice] for one in tries])), 4),
        "another": round(float(np.mean(others)), 4) if others else None,
    }


def _mean_over_images(values: Sequence[tuple[int, float]], seed: int) -> list[float]:
    """Return mean and ends of the interval of values that each belong to an image."""
    images = sorted({image for image, _ in values})
    own = [[value for image, value in values if image == one] for one in images]
    return [
        round(end, 4)
        for end in mean_interval([sum(v) for v in own], [len(v) for v in own], seed=seed)
    ]


# --- the deletion test


@dataclass(frozen=True)
class Deletion:
    """How far the log-probability (nats) of a word falls when parts of the image are hidden; the
    words before it stay.

    Attributes:
        image: number of the image.
        word: the word.
        looked: what the word looked at is hidden.
        patches: the same cells moved to random places are hidden; one entry a draw.
        stranger: what a word of another caption looked at is hidden: it knows where things usually
            are, not where they are in this image.
    """

    image: int
    word: str
    looked: float
    patches: tuple[float, ...]
    stranger: float


def top_cells(weights: Tensor, share: float = SHARE) -> np.ndarray:
    """Return which cells hold the most attention: (side, side) of booleans, ``share`` of them true,
    at least one."""
    values = weights.double().numpy()
    side = grid_side(len(values))
    chosen = np.zeros(len(values), dtype=bool)
    chosen[np.argsort(-values, kind="stable")[: max(1, round(share * len(values)))]] = True
    return chosen.reshape(side, side)


def moved(cells: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Return ``cells`` (side, side) moved to a random other place; what leaves the grid enters on
    the other side."""
    step = int(generator.integers(1, cells.size))
    return np.roll(cells, divmod(step, len(cells)), (0, 1))


def hide(pixels: np.ndarray, cells: np.ndarray) -> np.ndarray:
    """Return ``pixels`` (size, size, 3) with the mean colour of the image where ``cells`` (side,
    side) are true."""
    size, side = len(pixels), len(cells)
    row = np.arange(size) * side // size  # the cell of each row of pixels
    hidden = cells[np.ix_(row, row)]
    return np.where(hidden[..., None], pixels.mean((0, 1)).round().astype(np.uint8), pixels)


def content_words(maps: CaptionMaps) -> list[int]:
    """Return the places of words that name something: letters, and not in ``FUNCTION_WORDS``."""
    return [
        i
        for i, text in enumerate(maps.texts)
        if text.isalpha() and text.lower() not in FUNCTION_WORDS
    ]


def deletions(
    captioner: Captioner,
    images: Sequence[ImageLike],
    maps: Sequence[CaptionMaps],
    choice: str = MEAN,
    share: float = SHARE,
    draws: int = DRAWS,
    seed: int = 0,
) -> list[Deletion]:
    """Hide what each content word looked at, and for comparison patches of the same size and shape,
    and look again.

    What is hidden gets the image's mean colour, in the pixels that the encoder sees; the image is
    encoded anew.

    Args:
        captioner: that the maps are of.
        images: whose captions the maps are of.
        maps: one an image, from ``caption_maps``.
        choice: which map, see ``CaptionMaps``.
        share: of the grid's cells that are hidden.
        draws: random patches for each word; what is drawn hangs on the image's pixels and the seed.
        seed: of the draws.

    Raises:
        CapGenError: an impossible share or number of draws; an image cannot be read.
    """
    if not 0 < share < 1 or draws < 1:
        raise CapGenError(
            f"hiding a share of {share} in {draws} draws is not possible",
            "share 0 to 1, draws 1 or more",
        )
    top = [[top_cells(row, share) for row in own.of(choice)] for own in maps]
    places = [content_words(own) for own in maps]
    found = []
    for image, own in enumerate(
        tqdm(maps, desc=f"deletion test, {choice}", unit="img", leave=False)
    ):
        pixels = captioner.encoder.preprocessing(open_image(images[image]))
        generator = np.random.default_rng([seed, image_key(pixels.tobytes())])
        strangers = _strangers(top, places, image, generator)
        masks = [
            [
                top[image][place],
                next(strangers),
                *(moved(top[image][place], generator) for _ in range(draws)),
            ]
            for place in places[image]
        ]
        falls = _falls(captioner, own, pixels, places[image], masks)
        found += [
            Deletion(image, own.texts[place], fall[0], tuple(fall[2:]), fall[1])
            for place, fall in zip(places[image], falls, strict=True)
        ]
    return found


def _strangers(
    top: Sequence[Sequence[np.ndarray]],
    places: Sequence[Sequence[int]],
    image: int,
    generator: np.random.Generator,
) -> Iterator[np.ndarray]:
    """Yield the cells of random content words of other captions; of this one where there is no
    other."""
    others = [i for i, own in enumerate(places) if own and i != image] or [image]
    while True:
        other = others[int(generator.integers(len(others)))]
        yield top[other][places[other][int(generator.integers(len(places[other])))]]


def _falls(
    captioner: Captioner,
    maps: CaptionMaps,
    pixels: np.ndarray,
    places: Sequence[int],
    masks: Sequence[Sequence[Any]],
) -> list[list[float]]:
    """Return for each place how far its word falls under each of its masks."""
    if not places:
        return []
    views = [pixels, *(hide(pixels, cells) for own in masks for cells in own)]
    said = word_log_probabilities(
        captioner, [Image.fromarray(view) for view in views], maps
    )  # (views, words)
    each = len(masks[0])
    return [
        (said[0, place] - said[1 + i * each : 1 + (i + 1) * each, place]).tolist()
        for i, place in enumerate(places)
    ]


@torch.inference_mode()
def word_log_probabilities(
    captioner: Captioner, images: Sequence[ImageLike], maps: CaptionMaps, batch_size: int = 32
) -> Tensor:
    """Return the log-probabilities (images, words) in nats that a captioner gives to the words of
    one caption.

    Args:
        captioner: any.
        images: how the image may look.
        maps: of the caption. A word of several tokens gets their sum; tokens that are never said
            are left out.
        batch_size: images that are encoded together.
    """
    model, device, own = captioner.model, captioner.device, torch.tensor(maps.tokens)
    start = torch.tensor([captioner.specials.start, *maps.tokens[:-1]], device=device)
    parts = []
    for first in range(0, len(images), batch_size):
        part = images[first : first + batch_size]
        memory = captioner.memory(part)
        rows = torch.arange(len(part), device=device)
        logits = model(memory, start.expand(len(part), -1), rows)  # (B, T, V)
        scores = (
            allowed(logits.flatten(0, 1), captioner.specials.banned)
            .log_softmax(-1)
            .view_as(logits)
            .cpu()
        )
        tokens = scores.gather(2, own.expand(len(part), -1)[..., None])[..., 0]
        parts.append(
            torch.stack([tokens[:, word.first : word.last].sum(1) for word in maps.words], 1)
        )
    return torch.cat(parts).double()


def deletion_test(found: Sequence[Deletion], seed: int = 0) -> dict[str, Any]:
    """Return what hiding did to content words.

    Args:
        found: from ``deletions``.
        seed: of the bootstrap over images.

    Returns:
        ``words``, ``images``; ``looked``, ``patch``, ``stranger``: mean falls in nats; and for both
        comparisons,
        ``over patch`` and ``over stranger``: ``difference`` of the falls with its ``interval``, and
            ``more``, the share
        of words that fall further when what they looked at is hidden, with ``more interval`` (a
        word is compared with the mean of its random patches; equal falls count half). Intervals: 95
        %, bootstrap over images.

    Raises:
        CapGenError: there is no content word.
    """
    if not found:
        raise CapGenError(
            "no caption holds a word to test", "test more images, or a captioner that says more"
        )
    patch = [float(np.mean(one.patches)) for one in found]
    stranger = [one.stranger for one in found]
    return {
        "words": len(found),
        "images": len({one.image for one in found}),
        "looked": round(float(np.mean([one.looked for one in found])), 4),
        "patch": round(float(np.mean(patch)), 4),
        "stranger": round(float(np.mean(stranger)), 4),
        "over patch": _comparison(found, patch, seed),
        "over stranger": _comparison(found, stranger, seed),
    }


def _comparison(found: Sequence[Deletion], others: Sequence[float], seed: int) -> dict[str, Any]:
    ahead = [one.looked - other for one, other in zip(found, others, strict=True)]
    images = [one.image for one in found]
    difference, *ends = _mean_over_images(list(zip(images, ahead, strict=True)), seed)
    wins = [0.5 * (float(np.sign(value)) + 1) for value in ahead]
    more, *more_ends = _mean_over_images(list(zip(images, wins, strict=True)), seed)
    return {"difference": difference, "interval": ends, "more": more, "more interval": more_ends}


# --- results


def measure(
    captioner: Captioner,
    manifest: Manifest,
    split: str = "test",
    images: int | None = 100,
    seed: int = 0,
    share: float = SHARE,
    draws: int = DRAWS,
) -> dict[str, Any]:
    """Caption the first images of a split as the bundle does by default, and test where the
    captioner looked.

    Args:
        captioner: one that looks.
        manifest: the whole dataset; where it is drawn scenes, the pointing game is played too.
        split: whose images are looked at.
        images: how many; ``None`` for all.
        seed: of random patches and of the bootstrap.
        share, draws: of the deletion test, see ``deletions``.

    Returns:
        What the results file holds: protocol, machine, ``class token`` (the mean share of attention
            that it takes),
        ``true captions`` and ``pointing`` (see ``pointing_game``) for drawn scenes, and
        ``deletion``: choice of map -> see ``deletion_test``.

    Raises:
        CapGenError: the captioner does not look; no such split; an image cannot be read.
    """
    part = manifest.split(split).limit(images)
    paths = [part.path(item) for item in part.items]
    maps = caption_maps(captioner, paths)
    tested = [choice for choice in (MEAN, ROLLOUT) if choice in maps[0].choices()] or maps[
        0
    ].choices()
    tests = {"share": share, "draws": draws, "fill": "mean colour of the image", "test_seed": seed}
    tests["intervals"] = INTERVALS
    result: dict[str, Any] = {
        "kind": "attention",
        "protocol": protocol(captioner, manifest, split, len(part), captioner.decoding) | tests,
    }
    result["class token"] = round(float(torch.cat([own.elsewhere() for own in maps]).mean()), 4)
    if scenes_file(manifest.root).exists():
        known = load_scenes(manifest.root)
        scenes = [known[item.image] for item in part.items]
        result["true captions"] = sum(
            is_true(own.caption, scene) for own, scene in zip(maps, scenes, strict=True)
        )
        result["pointing"] = pointing_game(pointings(maps, scenes, open_image(paths[0]).size), seed)
    result["deletion"] = {
        choice: deletion_test(deletions(captioner, paths, maps, choice, share, draws, seed), seed)
        for choice in tested
    }
    return with_facts(result, captioner.bundle)


def summary(result: Mapping[str, Any]) -> str:
    """Return the tests as lines of text: every map's score beside chance."""
    rules = result["protocol"]
    lines = [f"{result['model']} on {rules['dataset']}/{rules['split']}: {rules['images']} images"]
    for kind, row in result.get("pointing", {}).items():
        lines.append(f"pointing game, {kind} words: {row['tries']} tries in {row['images']} images")
        lines += [
            f"  {'chance (share of the image in the box)':40s} {row['chance']:7.1%}   "
            f"near (within half a cell): {row['chance near']:.1%}"
        ]
        lines += [f"  {'the middle of the image':40s} {row['centre']:7.1%}"]
        for choice, one in row["maps"].items():
            low, high = one["interval"]
            other = f"   near: {one['near']:.1%}"
            other += (
                f"   another object's box: {one['another']:.1%}"
                if one["another"] is not None
                else ""
            )
            lines.append(f"  {choice:40s} {one['score']:7.1%}   [{low:.1%}, {high:.1%}]{other}")
    for choice, row in result["deletion"].items():
        lines.append(
            f"deletion test, {choice}: {row['words']} content words in {row['images']} images, fall in nats"
        )
        lines.append(
            f"  where the word looked {row['looked']:+.3f}; a random patch {row['patch']:+.3f}; "
            f"where another caption's word looked {row['stranger']:+.3f}"
        )
        for over in ("over patch", "over stranger"):
            one = row[over]
            (low, high), (least, most) = one["interval"], one["more interval"]
            lines.append(
                f"  {over:16s} {one['difference']:+.3f} [{low:+.3f}, {high:+.3f}]   "
                f"falls further for {one['more']:.1%} of words [{least:.1%}, {most:.1%}]"
            )
    return "\n".join(lines)
