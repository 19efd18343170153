"""A generated data set: scenes of coloured shapes, true captions, and their judge (notebook 01).

Every scene is kept, so any caption can be checked for truth, and any attention map against the
position of the object. The scenes only serve to judge; nothing is ever trained on them.
"""

import csv
import random
import re
from collections.abc import Mapping, Sequence
from itertools import permutations
from pathlib import Path
from typing import Any, NamedTuple

from tqdm.auto import tqdm

from capgen_utils.common.files import (
    CapGenError,
    atomic_path,
    fingerprint,
    read_json,
    require_space,
    write_json,
)
from capgen_utils.data.scenes import (
    COLOURS,
    HELD_OUT,
    IMAGE_SIZE,
    SHAPES,
    SIZES,
    Scene,
    ShapeObject,
    draw,
    make_scene,
    relation_between,
)

__all__ = [
    "COLOURS",
    "HELD_OUT",
    "IMAGE_SIZE",
    "SHAPES",
    "SIZES",
    "Mention",
    "Scene",
    "ShapeObject",
    "Statement",
    "describe",
    "draw",
    "generate",
    "is_true",
    "judge",
    "load_scenes",
    "make_scene",
    "parse",
    "relation_between",
    "relation_is_right",
    "scenes_file",
    "version",
]

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


# --- captions


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
    one, two = _noun_phrase(first, rng), _noun_phrase(second, rng)
    relation = relation_between(first, second)
    form = rng.randrange(5)
    if form == 0:
        return f"{one} with {two} {TRAILING[OPPOSITE[relation]]}"
    words = RELATIONS[relation][0]
    if form == 1:
        return f"{rng.choice(INTRODUCTIONS)} {one} {words} {two}"
    return f"{one} is {words} {two}" if form < 4 else f"{one} {words} {two}"


def _say_three(things: Sequence[ShapeObject], rng: random.Random) -> str:
    first, second, third = things
    return f"{_say_pair(first, second, rng)}, and there is {_noun_phrase(third, rng)}"


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
            caption = _say_three(things[:3], rng)
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
    related = [
        relation_is_right(captions[n], scenes[n]) is True
        for n in ordinary
        if len(scenes[n].objects) > 1
    ]
    shifts = [shift for shift in (1, 2, 3, 5, 8) if shift < len(ordinary)]
    shares: dict[str, list[bool]] = {
        "true": [is_true(captions[name], scenes[name]) for name in ordinary],
        "true_novel": [
            is_true(captions[name], scenes[name]) for name in captions if scenes[name].novel
        ],
        "relation_right": related,
        "true_shuffled": [
            is_true(captions[name], scenes[ordinary[(i + shift) % len(ordinary)]])
            for shift in shifts
            for i, name in enumerate(ordinary)
        ],
    }
    scores = {name: sum(values) / len(values) for name, values in shares.items() if values}
    return scores | {"distinct": float(len(set(captions.values())))}


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
        by_split = {
            s: [n for n, t in zip(names, splits, strict=True) if t == s]
            for s in ("train", "dev", "test")
        }
        write_json(temporary / "splits.json", by_split)
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
