"""Scenes of one to three coloured shapes: objects, relations and drawing (notebook 01)."""

import math
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

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
        if not isinstance(values, dict) or values.get("novel") not in (True, False):
            raise ValueError("a scene has the keys objects, and novel: true or false")
        objects = values.get("objects")
        if not isinstance(objects, list) or len(objects) not in OBJECT_COUNTS:
            raise ValueError("objects is a list of one to three")
        return cls(tuple(_checked_object(o) for o in objects), bool(values["novel"]))


def _checked_object(values: Any) -> ShapeObject:
    if not isinstance(values, dict) or set(values) != {"colour", "shape", "size", "box"}:
        raise ValueError("an object has the keys colour, shape, size and box")
    for key, known in (("colour", COLOURS), ("shape", SHAPES), ("size", SIZES)):
        if not isinstance(values[key], str) or values[key] not in known:
            raise ValueError(f"{values[key]!r} is not a {key}")
    box = values["box"]
    if not isinstance(box, list) or len(box) != 4 or any(type(v) is not int for v in box):
        raise ValueError("a box is four whole numbers")
    x0, y0, x1, y1 = box
    if not (0 <= x0 < x1 <= IMAGE_SIZE and 0 <= y0 < y1 <= IMAGE_SIZE):
        raise ValueError(f"the box {box} is not inside the image")
    return ShapeObject(values["colour"], values["shape"], values["size"], (x0, y0, x1, y1))


def relation_between(first: ShapeObject, second: ShapeObject) -> str:
    """Return the relation of ``first`` to ``second``, along the larger offset of their centres."""
    dx = first.centre[0] - second.centre[0]
    dy = first.centre[1] - second.centre[1]
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
            break
    return Scene(_place(pairs, rng), novel)


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
