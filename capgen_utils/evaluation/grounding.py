"""Tests of attention against chance: the pointing game and the deletion test (notebook 10)."""

from collections.abc import Iterable, Mapping, Sequence
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
from capgen_utils.data.shapes import (
    COLOURS,
    SHAPES,
    Scene,
    ShapeObject,
    is_true,
    load_scenes,
    scenes_file,
)
from capgen_utils.decoding.logits import log_probabilities
from capgen_utils.decoding.run import image_key
from capgen_utils.evaluation.attention import MEAN, ROLLOUT, CaptionMaps, caption_maps
from capgen_utils.evaluation.metrics import mean_interval
from capgen_utils.evaluation.metrics.resampling import INTERVALS
from capgen_utils.evaluation.results import protocol, with_facts
from capgen_utils.vision.preprocessing import grid_side

KINDS = {"colour": tuple(COLOURS), "shape": SHAPES}  # words that name an object of a scene
SHARE, DRAWS = 0.2, 4  # of the deletion test: share of cells masked, random patches per word
# Words that name nothing visible; the other words of a caption are its content words.
_FUNCTION = """
a an the this that these those some any each other another one of in on at to from with without for
by into onto over under up down off out near next behind beside between through across along around
against above below front back top left right side and or but as while than there here it its he his
him she her they their them who which what is are was were be been being has have having does do did
not no we you i our your
"""
FUNCTION_WORDS = frozenset(_FUNCTION.split())


@dataclass(frozen=True)
class Pointing:
    """One try of the pointing game (arXiv 1608.00507): where the map of a word peaks.

    Attributes:
        image: number of the image.
        kind: ``colour`` or ``shape``.
        hits: choice of map -> 1 if its peak lies in the box of the object that the word names, else
            0; if several pixels are the highest, the share of them that do. So a uniform map scores
            chance.
        near: the same for that box grown by half a grid cell on each side, since a cell also sees
            its surroundings.
        others: as ``hits`` for the boxes of all other objects; ``None`` without another one.
        area, near_area: share of the image that the right box and the grown one cover, the score of
            a random pixel.
        centre: 1 if the image's centre is in the right box.
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
    """Return the kind of a word and the object that it names.

    No two objects of a scene share a colour or a shape.
    """
    named = ((kind, thing) for kind in KINDS for thing in scene.objects)
    return next(((kind, thing) for kind, thing in named if getattr(thing, kind) == word), None)


def pointings(
    maps: Sequence[CaptionMaps], scenes: Sequence[Scene], size: tuple[int, int], heads: bool = True
) -> list[Pointing]:
    """Play the pointing game with every colour and shape word of captions that are true.

    Args:
        maps: one caption per image.
        scenes: of the same images.
        size: (width, height) of the images in pixels, the units of the boxes.
        heads: also play with every single head.
    """
    width, height = size
    tries = []
    for image, (caption, scene) in enumerate(zip(maps, scenes, strict=True)):
        by = round(width / grid_side(caption.of().shape[1]) / 2)  # half a cell
        for word, text in enumerate(caption.texts if is_true(caption.caption, scene) else ()):
            named = named_object(text, scene)
            if named is None:
                continue
            x0, y0, x1, y1 = named[1].box
            near = max(0, x0 - by), max(0, y0 - by), min(width, x1 + by), min(height, y1 + by)
            rest = [other.box for other in scene.objects if other != named[1]]
            levels = {c: caption.on_pixels(word, size, c) for c in caption.choices(heads)}
            hits, near_hits, others = (
                {choice: peak_share(level, boxes) for choice, level in levels.items()}
                for boxes in ([named[1].box], [near], rest)
            )
            tries.append(
                Pointing(
                    image,
                    named[0],
                    hits,
                    near_hits,
                    others if rest else None,
                    (x1 - x0) * (y1 - y0) / (width * height),
                    (near[2] - near[0]) * (near[3] - near[1]) / (width * height),
                    float(x0 <= width // 2 < x1 and y0 <= height // 2 < y1),
                )
            )
    return tries


def pointing_game(tries: Sequence[Pointing], seed: int = 0) -> dict[str, Any]:
    """Return the score of the pointing game for colour words and for shape words.

    Args:
        tries: from ``pointings``.
        seed: of the bootstrap over images.

    Returns:
        kind -> ``tries``, ``images``; ``chance``, the mean share of the image that the right box
        covers; ``centre``, the score of always pointing at the middle; and ``maps``: choice ->
        ``hits``, ``score`` = hits / tries, ``interval`` (95 %, bootstrap over images); ``near``,
        the score on boxes grown by half a cell, to compare with ``chance near``; ``another``, the
        score on boxes of other objects in scenes that have some. All are shares of one. A kind
        without a try is left out.
    """
    games = {}
    for kind in KINDS:
        of_kind = [one for one in tries if one.kind == kind]
        if of_kind:
            games[kind] = {
                "tries": len(of_kind),
                "images": len({one.image for one in of_kind}),
                "chance": _mean(one.area for one in of_kind),
                "chance near": _mean(one.near_area for one in of_kind),
                "centre": _mean(one.centre for one in of_kind),
                "maps": {choice: _score(of_kind, choice, seed) for choice in of_kind[0].hits},
            }
    return games


def _score(tries: Sequence[Pointing], choice: str, seed: int) -> dict[str, Any]:
    value, *ends = _mean_over_images([(one.image, one.hits[choice]) for one in tries], seed)
    others = [one.others[choice] for one in tries if one.others is not None]
    return {
        "hits": round(sum(one.hits[choice] for one in tries), 2),
        "score": value,
        "interval": ends,
        "near": _mean(one.near[choice] for one in tries),
        "another": _mean(others) if others else None,
    }


def _mean(values: Iterable[float]) -> float:
    return round(float(np.mean(list(values))), 4)


def _mean_over_images(values: Iterable[tuple[int, float]], seed: int) -> list[float]:
    """Return the mean of (image, value) pairs and its interval, by bootstrap over images."""
    images, numbers = zip(*values, strict=True)
    _, rows = np.unique(images, return_inverse=True)
    totals, counts = np.bincount(rows, numbers).tolist(), np.bincount(rows).tolist()
    return [round(end, 4) for end in mean_interval(totals, counts, seed=seed)]


@dataclass(frozen=True)
class Deletion:
    """How far a word's log-probability (nats) falls when parts of the image are hidden.

    The words before it stay the same.

    Attributes:
        image: number of the image.
        word: the word.
        looked: the fall when the cells that the word looked at are hidden.
        patches: the fall when the same cells, moved to a random position, are hidden; one per draw.
        stranger: the fall when the cells that a word of another caption looked at are hidden. They
            know where objects usually are, but not where they are in this image.
    """

    image: int
    word: str
    looked: float
    patches: tuple[float, ...]
    stranger: float


def top_cells(weights: Tensor, share: float = SHARE) -> np.ndarray:
    """Return the cells with the most attention as booleans (side, side).

    ``share`` of them are true, at least one.
    """
    values = weights.double().numpy()
    side = grid_side(len(values))
    chosen = np.zeros(len(values), dtype=bool)
    chosen[np.argsort(-values, kind="stable")[: max(1, round(share * len(values)))]] = True
    return chosen.reshape(side, side)


def moved(cells: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Return ``cells`` (side, side) shifted by a random offset, wrapping around the edges."""
    step = int(generator.integers(1, cells.size))
    return np.roll(cells, divmod(step, len(cells)), (0, 1))


def hide(pixels: np.ndarray, cells: np.ndarray) -> np.ndarray:
    """Return ``pixels`` (size, size, 3) with ``cells`` (side, side) painted in the mean colour."""
    size, side = len(pixels), len(cells)
    row = np.arange(size) * side // size  # the cell of each row of pixels
    hidden = cells[np.ix_(row, row)]  # (size, size)
    return np.where(hidden[..., None], pixels.mean((0, 1)).round().astype(np.uint8), pixels)


def content_words(maps: CaptionMaps) -> list[int]:
    """Return the positions of words made of letters that are not in ``FUNCTION_WORDS``."""
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
    """Hide the cells that each content word looked at, and for comparison random patches.

    Hidden cells get the image's mean colour, in the pixels that the encoder sees; the image is then
    encoded again.

    Args:
        captioner: that the maps are of.
        images: the captioned images.
        maps: one per image, from ``caption_maps``.
        choice: which map, see ``CaptionMaps``.
        share: share of the grid's cells to hide.
        draws: random patches per word; they depend on the image's pixels and the seed.
        seed: of the draws.

    Raises:
        CapGenError: an impossible share or number of draws; an image cannot be read.
    """
    if not 0 < share < 1 or draws < 1:
        raise CapGenError(
            f"hiding a share of {share} in {draws} draws is not possible",
            "choose a share between 0 and 1, and at least 1 draw",
        )
    top = [[top_cells(row, share) for row in of_image.of(choice)] for of_image in maps]
    words = [content_words(of_image) for of_image in maps]
    results = []
    progress = tqdm(maps, desc=f"deletion test, {choice}", unit="img", leave=False)
    for image, of_image in enumerate(progress):
        pixels = captioner.encoder.preprocessing(open_image(images[image]))
        generator = np.random.default_rng([seed, image_key(pixels.tobytes())])
        # Captions of other images with content words; this one, if it is alone.
        others = [i for i in range(len(maps)) if words[i] and i != image] or [image]
        masks = []  # (words, 2 + draws): the word's own cells, a stranger's, random patches
        for word in words[image]:
            other = others[int(generator.integers(len(others)))]
            stranger = words[other][int(generator.integers(len(words[other])))]
            cells = top[image][word]
            patches = [moved(cells, generator) for _ in range(draws)]
            masks.append([cells, top[other][stranger], *patches])
        if not masks:
            continue
        views = [pixels, *(hide(pixels, cells) for of_word in masks for cells in of_word)]
        scores = word_log_probabilities(captioner, [Image.fromarray(v) for v in views], of_image)
        hidden = scores[1:].unflatten(0, (len(masks), -1))  # (words, masks of each, all words)
        for word, of_word in zip(words[image], hidden, strict=True):
            looked, stranger, *patches = (scores[0, word] - of_word[:, word]).tolist()
            results.append(Deletion(image, of_image.texts[word], looked, tuple(patches), stranger))
    return results


@torch.inference_mode()
def word_log_probabilities(
    captioner: Captioner, images: Sequence[ImageLike], maps: CaptionMaps, batch_size: int = 32
) -> Tensor:
    """Return the log-probabilities (images, words) in nats of the words of one caption.

    Args:
        captioner: any captioner.
        images: versions of the image.
        maps: of the caption. A word of several tokens gets their sum; banned tokens are excluded.
        batch_size: images per batch.
    """
    model, device, actual = captioner.model, captioner.device, torch.tensor(maps.tokens)
    start = torch.tensor([captioner.specials.start, *maps.tokens[:-1]], device=device)  # (T,)
    batches = []
    for first in range(0, len(images), batch_size):
        batch = images[first : first + batch_size]
        rows = torch.arange(len(batch), device=device)
        logits = model(captioner.memory(batch), start.expand(len(batch), -1), rows)  # (B, T, V)
        scores = log_probabilities(logits.flatten(0, 1), captioner.specials.banned)  # (B * T, V)
        scores = scores.view_as(logits).cpu()
        tokens = scores.gather(2, actual.expand(len(batch), -1)[..., None])[..., 0]  # (B, T)
        words = [tokens[:, word.first : word.last].sum(1) for word in maps.words]
        batches.append(torch.stack(words, 1))  # (B, words)
    return torch.cat(batches).double()


def deletion_test(tests: Sequence[Deletion], seed: int = 0) -> dict[str, Any]:
    """Return the effect of hiding parts of the image on content words.

    Args:
        tests: from ``deletions``.
        seed: of the bootstrap over images.

    Returns:
        ``words``, ``images``; ``looked``, ``patch``, ``stranger``: mean falls in nats; and for both
        comparisons, ``over patch`` and ``over stranger``: ``difference`` of the falls with its
        ``interval``, and ``more``, the share of words that fall further when the cells they looked
        at are hidden, with ``more interval``. A word is compared with the mean of its random
        patches; equal falls count half. Intervals: 95 %, bootstrap over images.

    Raises:
        CapGenError: there is no content word.
    """
    if not tests:
        raise CapGenError(
            "no caption has a content word to test",
            "test more images, or a captioner with longer captions",
        )
    patch = [float(np.mean(test.patches)) for test in tests]
    stranger = [test.stranger for test in tests]
    return {
        "words": len(tests),
        "images": len({test.image for test in tests}),
        "looked": _mean(test.looked for test in tests),
        "patch": _mean(patch),
        "stranger": _mean(stranger),
        "over patch": _comparison(tests, patch, seed),
        "over stranger": _comparison(tests, stranger, seed),
    }


def _comparison(tests: Sequence[Deletion], others: Sequence[float], seed: int) -> dict[str, Any]:
    ahead = [(test.image, test.looked - fall) for test, fall in zip(tests, others, strict=True)]
    difference, *ends = _mean_over_images(ahead, seed)
    wins = [(image, 0.5 * (float(np.sign(value)) + 1)) for image, value in ahead]
    more, *more_ends = _mean_over_images(wins, seed)
    return {"difference": difference, "interval": ends, "more": more, "more interval": more_ends}


def measure(
    captioner: Captioner,
    manifest: Manifest,
    split: str = "test",
    images: int | None = 100,
    seed: int = 0,
    share: float = SHARE,
    draws: int = DRAWS,
) -> dict[str, Any]:
    """Caption the first images of a split with the bundle's defaults, and test its attention.

    Args:
        captioner: one with attention.
        manifest: the whole dataset; on drawn scenes, the pointing game is played too.
        split: ``dev`` or ``test``.
        images: how many; ``None`` for all.
        seed: of random patches and of the bootstrap.
        share, draws: of the deletion test, see ``deletions``.

    Returns:
        The contents of the results file: protocol, machine, ``class token`` (its mean share of the
        attention), for drawn scenes ``true captions`` and ``pointing`` (see ``pointing_game``), and
        ``deletion``: choice of map -> see ``deletion_test``.

    Raises:
        CapGenError: the captioner has no attention; no such split; an image cannot be read.
    """
    part = manifest.split(split).limit(images)
    paths = [part.path(item) for item in part.items]
    maps = caption_maps(captioner, paths)
    choices = maps[0].choices()
    rules = protocol(captioner, manifest, split, len(part), captioner.decoding) | {
        "intervals": INTERVALS,
        "share": share,
        "draws": draws,
        "fill": "mean colour of the image",
        "test_seed": seed,
    }
    elsewhere = torch.cat([of_image.elsewhere() for of_image in maps])  # (words of all captions,)
    result: dict[str, Any] = {
        "kind": "attention",
        "protocol": rules,
        "class token": round(float(elsewhere.mean()), 4),
    }
    if scenes_file(manifest.root).exists():
        known = load_scenes(manifest.root)
        scenes = [known[item.image] for item in part.items]
        result["true captions"] = sum(
            is_true(of_image.caption, scene) for of_image, scene in zip(maps, scenes, strict=True)
        )
        result["pointing"] = pointing_game(pointings(maps, scenes, open_image(paths[0]).size), seed)
    result["deletion"] = {
        choice: deletion_test(deletions(captioner, paths, maps, choice, share, draws, seed), seed)
        for choice in [c for c in (MEAN, ROLLOUT) if c in choices] or choices
    }
    return with_facts(result, captioner.bundle)


def summary(result: Mapping[str, Any]) -> str:
    """Return the tests as lines of text: the score of every map beside chance."""
    rules = result["protocol"]
    lines = [f"{result['model']} on {rules['dataset']}/{rules['split']}: {rules['images']} images"]
    for kind, game in result.get("pointing", {}).items():
        lines += [
            f"pointing game, {kind} words: {game['tries']} tries in {game['images']} images",
            f"  {'chance (share of the image in the box)':40s} {game['chance']:7.1%}   "
            f"near (within half a cell): {game['chance near']:.1%}",
            f"  {'the centre of the image':40s} {game['centre']:7.1%}",
        ]
        for choice, score in game["maps"].items():
            low, high = score["interval"]
            line = f"  {choice:40s} {score['score']:7.1%}   [{low:.1%}, {high:.1%}]"
            line += f"   near: {score['near']:.1%}"
            if score["another"] is not None:
                line += f"   another object's box: {score['another']:.1%}"
            lines.append(line)
    for choice, test in result["deletion"].items():
        lines += [
            f"deletion test, {choice}: {test['words']} content words in {test['images']} images, "
            "fall in nats",
            f"  where the word looked {test['looked']:+.3f}; a random patch {test['patch']:+.3f}; "
            f"where a word of another caption looked {test['stranger']:+.3f}",
        ]
        for over in ("over patch", "over stranger"):
            gain = test[over]
            (low, high), (least, most) = gain["interval"], gain["more interval"]
            lines.append(
                f"  {over:16s} {gain['difference']:+.3f} [{low:+.3f}, {high:+.3f}]   "
                f"falls further for {gain['more']:.1%} of words [{least:.1%}, {most:.1%}]"
            )
    return "\n".join(lines)
