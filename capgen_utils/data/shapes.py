"""A generated data set: scenes of one to three coloured shapes and true captions (notebook 01).

Every scene is kept, so any caption can be checked for truth, and any attention map against the
position of the object. The scenes only serve to judge; nothing is ever trained on them.
"""

import csv
import math
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations, permutations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw
from tqdm.auto import tqdm

from capgen_utils.common.files import (
    CapGenError,
    atomic_path,
    fingerprint,
    read_json,
    require_space,
    write_json,
)

IMAGE_SIZE = 64

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (218, 40, 40),
    "yellow": (242, 208, 38),
    "green": (52, 158, 58),
    "cyan": (62, 204, 214),
    "blue": (44, 76, 208),
    "purple": (158, 52, 186),
}

SHAPES = ("circle", "square", "triangle", "star")
SIZES = {"small": (15, 18), "large": (24, 28)}  # side of the box in pixels, both ends included
HELD_OUT = frozenset({("red", "star"), ("blue", "triangle"), ("yellow", "square")})
OBJECT_COUNTS, OBJECT_WEIGHTS = (1, 2, 3), (0.35, 0.55, 0.1)

CLEARER = 1.6  # minimal ratio of a pair's offsets along and across their relation
GAP = 3  # pixels between the boxes of a pair, along the relation


@dataclass(frozen=True)
class ShapeObject:
    """One drawn shape; ``box`` is (x0, y0, x1, y1) in pixels, x1 and y1 excluded."""

    colour: str
    shape: str
    size: str
    box: tuple[int, int, int, int]

    @property
    def centre(self) -> tuple[float, float]:
        """The middle of the box, (x, y) in pixels."""
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2

    def check(self) -> None:
        """Raise ``ValueError`` if a value read from a file is not one that objects have."""
        names = (self.colour, list(COLOURS)), (self.shape, SHAPES), (self.size, list(SIZES))
        unknown = [name for name, known in names if name not in known]
        if unknown:
            raise ValueError(f"{unknown[0]!r} is not a colour, shape or size")
        whole = len(self.box) == 4 and all(type(edge) is int for edge in self.box)
        if not whole or not all(
            0 <= low < high <= IMAGE_SIZE for low, high in zip(self.box, self.box[2:], strict=False)
        ):
            raise ValueError(f"the box {self.box} is not four whole numbers inside the image")


@dataclass(frozen=True)
class Scene:
    """The objects of one image; ``novel`` if a colour-shape pair never occurs in train and dev."""

    objects: tuple[ShapeObject, ...]
    novel: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return the scene as values that JSON can hold."""
        return {
            "objects": [asdict(o) | {"box": list(o.box)} for o in self.objects],
            "novel": self.novel,
        }

    @classmethod
    def from_dict(cls, values: Any) -> "Scene":
        """Rebuild a scene from ``to_dict``'s values.

        Raises:
            ValueError: something is missing, of the wrong type, or names no known colour, shape or
                size.
        """
        try:
            objects = tuple(
                ShapeObject(**{**thing, "box": tuple(thing["box"])}) for thing in values["objects"]
            )
            novel = values["novel"]
        except (KeyError, TypeError) as error:
            raise ValueError(
                "a scene has the keys objects and novel, an object colour, shape, size and box"
            ) from error
        if not isinstance(novel, bool) or len(objects) not in OBJECT_COUNTS:
            raise ValueError("objects is a list of one to three, novel is true or false")
        for thing in objects:
            thing.check()
        return cls(objects, novel)


def relation_between(first: ShapeObject, second: ShapeObject) -> str:
    """Return the relation of ``first`` to ``second``, along the larger offset of their centres."""
    dx, dy = (a - b for a, b in zip(first.centre, second.centre, strict=True))
    if abs(dx) >= abs(dy):
        return "left" if dx < 0 else "right"
    return "above" if dy < 0 else "below"


def _clearly_apart(first: ShapeObject, second: ShapeObject) -> bool:
    """Whether the relation is unambiguous: far apart on one axis, close on the other."""
    offsets = [abs(a - b) for a, b in zip(first.centre, second.centre, strict=True)]
    axis = 0 if offsets[0] >= offsets[1] else 1
    low, high = (first, second) if first.centre[axis] < second.centre[axis] else (second, first)
    return (
        offsets[axis] >= CLEARER * offsets[1 - axis] and high.box[axis] - low.box[axis + 2] >= GAP
    )


def _place(pairs: Sequence[tuple[str, str]], rng: random.Random) -> tuple[ShapeObject, ...]:
    """Give each colour-shape pair a size and position so that all relations are unambiguous."""
    while True:
        objects = []
        for colour, shape in pairs:
            size = rng.choice(list(SIZES))
            side = rng.randint(*SIZES[size])
            x, y = (rng.randint(2, IMAGE_SIZE - 2 - side) for _ in range(2))
            objects.append(ShapeObject(colour, shape, size, (x, y, x + side, y + side)))
        if all(_clearly_apart(a, b) for a, b in combinations(objects, 2)):
            return tuple(objects)


def make_scene(rng: random.Random, novel: bool = False) -> Scene:
    """Return a scene of one to three objects; no two share a colour or a shape.

    Args:
        rng: the only source of randomness.
        novel: put exactly one held-out colour-shape pair into the scene; otherwise it holds none.
    """
    count = rng.choices(OBJECT_COUNTS, OBJECT_WEIGHTS)[0]
    while True:
        colours, shapes = rng.sample(list(COLOURS), count), rng.sample(SHAPES, count)
        pairs = list(zip(colours, shapes, strict=True))
        if len(HELD_OUT.intersection(pairs)) == int(novel):
            return Scene(_place(pairs, rng), novel)


# --- captions

VERSION = 4  # in the data folder's name: raise it when the same seed gives other data
CAPTIONS_PER_IMAGE = 5
RELATIONS = {  # relation -> its phrases; captions use the first
    "left": ("left of", "to the left of"),
    "right": ("right of", "to the right of"),
    "above": ("above",),
    "below": ("below",),
}

TRAILING = {
    "left": "to its left",
    "right": "to its right",
    "above": "above it",
    "below": "below it",
}

OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}
INTRODUCTIONS = ("there is", "here is", "the picture shows", "we see")


def _noun_phrase(thing: ShapeObject, rng: random.Random) -> str:
    size = f"{thing.size} " if rng.random() < 0.3 else ""
    return f"a {size}{thing.colour} {thing.shape}"


def _say_one(thing: ShapeObject, rng: random.Random) -> str:
    form = rng.randrange(4)
    if form == 0:
        return f"the {thing.shape} is {thing.colour}"
    phrase = _noun_phrase(thing, rng)
    if form == 1:
        return f"{phrase} in the picture"
    return f"{rng.choice(INTRODUCTIONS)} {phrase}" if form == 2 else phrase


def _say_pair(first: ShapeObject, second: ShapeObject, rng: random.Random) -> str:
    one, two, form = _noun_phrase(first, rng), _noun_phrase(second, rng), rng.randrange(5)
    relation = relation_between(first, second)
    if form == 0:
        return f"{one} with {two} {TRAILING[OPPOSITE[relation]]}"
    words = RELATIONS[relation][0]
    if form == 1:
        return f"{rng.choice(INTRODUCTIONS)} {one} {words} {two}"
    return f"{one} is {words} {two}" if form < 4 else f"{one} {words} {two}"


def describe(scene: Scene, rng: random.Random) -> tuple[str, ...]:
    """Return five captions that are true of ``scene``, all different if the grammar allows it.

    Each names the colour and shape of the objects it mentions, and a relation if there are two or
    more.
    """
    captions: list[str] = []
    for attempt in range(50):
        things = rng.sample(scene.objects, len(scene.objects))
        if len(things) == 1:
            caption = _say_one(things[0], rng)
        elif len(things) == 2 or rng.random() < 0.5:
            caption = _say_pair(things[0], things[1], rng)
        else:
            pair = _say_pair(things[0], things[1], rng)
            caption = f"{pair}, and there is {_noun_phrase(things[2], rng)}"
        if caption not in captions or attempt >= 40:
            captions.append(caption)
        if len(captions) == CAPTIONS_PER_IMAGE:
            break
    return tuple(captions)


# --- judging


class Mention(NamedTuple):
    """A noun phrase: the colour and shape it names, and the size or ``""``."""

    colour: str
    shape: str
    size: str


class Statement(NamedTuple):
    """A parsed caption: its mentions, and relations (i, relation, j) between mentions i and j."""

    mentions: tuple[Mention, ...]
    relations: tuple[tuple[int, str, int], ...]


def _either(words: Sequence[str] | Mapping[str, Any]) -> str:
    return "|".join(sorted(words, key=len, reverse=True))


_NOUN = re.compile(
    rf"\b(?:an?|the) (?:(?P<size>{_either(SIZES)}) )?"
    rf"(?:(?P<c1>{_either(COLOURS)}) (?P<s1>{_either(SHAPES)})"
    rf"|(?P<s2>{_either(SHAPES)}) (?:that is|is(?= \w+$)) (?P<c2>{_either(COLOURS)}))\b"
)

_RELATION = f"(?P<rel>{_either([words for ways in RELATIONS.values() for words in ways])})"
_MEANING = {words: name for name, ways in RELATIONS.items() for words in ways}

_MEANING |= {words: OPPOSITE[name] for name, words in TRAILING.items()}

_START = f"(?:(?:{_either(INTRODUCTIONS)}) )?"
_CLAUSES = {  # which mentions a clause relates, by their order in it; "N" stands for a mention
    "related": re.compile(f"{_START}N (?:is )?{_RELATION} N"),
    "trailing": re.compile(f"{_START}N with N (?P<rel>{_either(list(TRAILING.values()))})"),
    "inverted": re.compile(f"{_RELATION} N is N"),
    "continued": re.compile(f"(?:is )?{_RELATION} N"),
    "named": re.compile(f"{_START}N(?: in the picture)?"),
}


def parse(caption: str) -> Statement | None:
    """Parse a caption by the grammar; case and punctuation do not matter.

    Returns:
        Its statement, or ``None`` if the caption is not a sentence of the grammar.
    """
    text = " ".join(re.findall(r"[^\W_]+", caption.lower()))
    mentions = tuple(
        Mention(m["c1"] or m["c2"], m["s1"] or m["s2"], m["size"] or "")
        for m in _NOUN.finditer(text)
    )
    relations: list[tuple[int, str, int]] = []
    subject, position = -1, 0
    for clause in _NOUN.sub("N", text).split(" and "):
        kind, match = next(
            ((k, m) for k, p in _CLAUSES.items() if (m := p.fullmatch(clause))), ("", None)
        )
        if match is None or (kind == "continued" and subject < 0):
            return None
        following = position + clause.split().count("N")
        if kind == "continued":
            relations.append((subject, _MEANING[match["rel"]], position))
        else:
            subject = position + 1 if kind == "inverted" else position
            if kind != "named":
                relations.append(
                    (
                        subject,
                        _MEANING[match["rel"]],
                        following - 1 if subject == position else position,
                    )
                )
        position = following
    return Statement(mentions, tuple(relations))


def _holds(statement: Statement, scene: Scene, sizes: bool = True) -> bool:
    """Whether distinct objects can be found for all mentions such that every relation holds."""

    def fits(mention: Mention, thing: ShapeObject) -> bool:
        size = mention.size if sizes and mention.size else thing.size
        return (mention.colour, mention.shape, size) == (thing.colour, thing.shape, thing.size)

    return any(
        all(fits(m, o) for m, o in zip(statement.mentions, chosen, strict=True))
        and all(
            relation_between(chosen[i], chosen[j]) == relation
            for i, relation, j in statement.relations
        )
        for chosen in permutations(scene.objects, len(statement.mentions))
    )


def is_true(caption: str, scene: Scene) -> bool:
    """Whether ``caption`` can be parsed and all of it is true of ``scene``."""
    statement = parse(caption)
    return statement is not None and _holds(statement, scene)


def relation_is_right(caption: str, scene: Scene) -> bool | None:
    """Whether the stated relations hold between objects of the named colours and shapes.

    Returns:
        ``None`` if the caption states no relation or the scene has one object.
    """
    statement = parse(caption)
    if len(scene.objects) < 2 or statement is None or not statement.relations:
        return None
    used = sorted({index for i, _, j in statement.relations for index in (i, j)})
    relations = tuple(
        (used.index(i), relation, used.index(j)) for i, relation, j in statement.relations
    )
    return _holds(
        Statement(tuple(statement.mentions[i] for i in used), relations), scene, sizes=False
    )


def judge(captions: Mapping[str, str], scenes: Mapping[str, Scene]) -> dict[str, float]:
    """Judge one caption per image by the scenes; shares are from 0 to 1.

    Returns:
        ``true`` and ``true_novel``: share of true captions of ordinary and of novel scenes;
        ``relation_right``: share of ordinary scenes with several objects whose caption states a
        right relation;
        ``distinct``: number of different captions;
        ``true_shuffled``: share of captions that are true of another image's ordinary scene, as a
        captioner that ignores the image would reach. Shares of no scenes are left out.

    Raises:
        CapGenError: there are no captions, or one belongs to an image without a scene.
    """
    unknown = sorted(set(captions) - set(scenes))
    if unknown or not captions:
        raise CapGenError(
            f"no scene is known for {unknown[0]!r}"
            if unknown
            else "there are no captions to judge",
            "caption images of the generated data set, and name them as its captions.txt does",
        )
    ordinary = sorted(name for name in captions if not scenes[name].novel)
    shifts = [shift for shift in (1, 2, 3, 5, 8) if shift < len(ordinary)]
    shares: dict[str, list[bool]] = {
        "true": [is_true(captions[name], scenes[name]) for name in ordinary],
        "true_novel": [
            is_true(captions[name], scenes[name]) for name in captions if scenes[name].novel
        ],
        "relation_right": [
            relation_is_right(captions[name], scenes[name]) is True
            for name in ordinary
            if len(scenes[name].objects) > 1
        ],
        "true_shuffled": [
            is_true(captions[name], scenes[ordinary[(i + shift) % len(ordinary)]])
            for shift in shifts
            for i, name in enumerate(ordinary)
        ],
    }
    scores = {name: sum(values) / len(values) for name, values in shares.items() if values}
    return scores | {"distinct": float(len(set(captions.values())))}


# --- drawing

SUPERSAMPLING = 4


def _outline(shape: str, turn: float) -> np.ndarray:
    """Return the corners (n, 2) of a shape, rotated by ``turn`` radians, in the unit square."""
    corners = {"circle": 48, "square": 4, "triangle": 3, "star": 10}[shape]
    start = math.pi / 4 if shape == "square" else -math.pi / 2
    angles = start + turn + 2 * math.pi * np.arange(corners) / corners
    radius = np.where(np.arange(corners) % 2, 0.42, 1.0) if shape == "star" else np.ones(corners)
    points = np.stack([np.cos(angles), np.sin(angles)], axis=1) * radius[:, None]
    low, high = points.min(axis=0), points.max(axis=0)
    return (points - low) / (high - low)


def _background(rng: random.Random) -> np.ndarray:
    """Return a greyish background (64, 64, 3) in 0..255: light or dark, tinted, with a slope."""
    grey = rng.uniform(165, 235) if rng.random() < 0.6 else rng.uniform(25, 70)
    tint = np.array([rng.uniform(-8, 8) for _ in range(3)])
    slope_x, slope_y = rng.uniform(-18, 18), rng.uniform(-18, 18)
    steps = np.linspace(-0.5, 0.5, IMAGE_SIZE)
    ramp = slope_x * steps[None, :, None] + slope_y * steps[:, None, None]
    return np.asarray(np.clip(grey + tint + ramp, 0, 255))


def draw(scene: Scene, seed: int | str) -> Image.Image:
    """Draw a scene: RGB, 64 x 64, edges anti-aliased; the same seed gives the same pixels.

    ``seed`` determines what no caption mentions: background, shade, a slight rotation, noise.
    """
    rng = random.Random(f"draw {seed}")
    ground = Image.fromarray(_background(rng).astype(np.uint8))
    canvas = ground.resize((IMAGE_SIZE * SUPERSAMPLING,) * 2, Image.Resampling.BILINEAR)
    pen = ImageDraw.Draw(canvas)
    for thing in scene.objects:
        x0, y0, x1, y1 = thing.box
        extent = np.array([x1 - x0, y1 - y0]) * SUPERSAMPLING - 1  # Pillow fills the last pixel too
        outline = _outline(thing.shape, rng.uniform(-0.15, 0.15))
        points = outline * extent + np.array([x0, y0]) * SUPERSAMPLING
        shade = tuple(max(0, min(255, v + rng.randint(-14, 14))) for v in COLOURS[thing.colour])
        pen.polygon([(float(x), float(y)) for x, y in points], fill=shade)
    small = canvas.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BOX)
    pixels = np.asarray(small, dtype=np.float32)
    # bytes of Random, since numpy's distributions may differ from version to version
    noise = np.frombuffer(rng.randbytes(pixels.size), dtype=np.uint8).reshape(pixels.shape)
    return Image.fromarray(np.clip(pixels + (noise / 255.0 - 0.5) * 20, 0, 255).astype(np.uint8))


# --- files


def version(count: int = 3800, seed: int = 0) -> str:
    """Return a short hash of the data that ``generate(folder, count, seed)`` writes."""
    return fingerprint({"generator": VERSION, "count": count, "seed": seed})


def generate(folder: Path, count: int = 3800, seed: int = 0) -> None:
    """Write Images/, captions.txt, splits.json and scenes.json to ``folder`` in one atomic step.

    Of ``count`` images, 80 % are train, 10 % dev and 10 % test. Another ``count`` / 30 test images
    hold a colour-shape pair that never occurs in train or dev, although its colour and its shape
    do.

    Raises:
        CapGenError: ``count`` is below 10, or the folder cannot be written.
    """
    if count < 10:
        raise CapGenError(f"{count} scenes cannot be split in three", "ask for 10 or more")
    tenth, novel = count // 10, max(1, round(count / 30))
    splits = ["train"] * (count - 2 * tenth) + ["dev"] * tenth + ["test"] * (tenth + novel)
    names = [f"scene_{index:05d}.png" for index in range(count + novel)]
    require_space(Path(folder).parent, 16_000 * len(names), "the shapes data set")
    with atomic_path(Path(folder)) as temporary:
        (temporary / "Images").mkdir(parents=True)
        scenes: dict[str, Scene] = {}
        with open(temporary / "captions.txt", "w", encoding="utf-8", newline="") as stream:
            rows = csv.writer(stream, lineterminator="\n")
            rows.writerow(("image", "caption"))
            for index, name in enumerate(tqdm(names, desc="drawing shapes", unit="image")):
                rng = random.Random(f"scene {seed} {index}")
                scenes[name] = make_scene(rng, novel=index >= count)
                draw(scenes[name], f"{seed} {index}").save(
                    temporary / "Images" / name, compress_level=1
                )
                rows.writerows((name, caption) for caption in describe(scenes[name], rng))
        write_json(
            temporary / "splits.json",
            {
                s: [n for n, t in zip(names, splits, strict=True) if t == s]
                for s in ("train", "dev", "test")
            },
        )
        write_json(
            temporary / "scenes.json", {name: scene.to_dict() for name, scene in scenes.items()}
        )


def scenes_file(folder: Path) -> Path:
    """Return the scenes file of a generated folder, or of the Images folder in it."""
    folder = Path(folder)
    inside = folder.name == "Images" and not (folder / "scenes.json").exists()
    return (folder.parent if inside else folder) / "scenes.json"


def load_scenes(folder: Path) -> dict[str, Scene]:
    """Read the scenes of a generated folder (or of the Images folder in it), by image file name.

    Raises:
        CapGenError: scenes.json is missing or not what ``generate`` writes.
    """
    path = scenes_file(folder)
    remedy = f"delete {path.parent} and generate it again"
    values = read_json(path, remedy)
    if not isinstance(values, dict):
        raise CapGenError(f"{path} holds no scenes by image name", remedy)
    scenes = {}
    for name, scene in values.items():
        try:
            scenes[name] = Scene.from_dict(scene)
        except ValueError as error:
            raise CapGenError(f"{path}: {name} is no scene ({error})", remedy) from error
    return scenes
