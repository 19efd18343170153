"""Shared by tests of attention and widgets: made-up maps, a demo's uploads and captions."""

import re
from datetime import UTC, datetime
from typing import Any

import ipywidgets
from torch import Tensor

from capgen_utils.evaluation.attention import CaptionMaps, Word
from capgen_utils.show import widgets
from capgen_utils.vision.preprocessing import Preprocessing


def maps_of(
    weights: dict[str, Tensor], rolled: Tensor | None = None, words: str = "a red star"
) -> CaptionMaps:
    texts = words.split()
    spelled = tuple(Word(text, i, i + 1) for i, text in enumerate(texts))
    rolled = next(iter(weights.values())).mean(1) if rolled is None else rolled
    return CaptionMaps(
        words, spelled, tuple(range(len(texts))), weights, rolled, Preprocessing(size=64)
    )


def upload(demo: widgets.Demo, *files: tuple[str, bytes]) -> None:
    """Set the value as a browser would; it is of this ipywidgets' shape."""
    one = {"type": "image/jpeg", "last_modified": datetime.now(UTC)}
    if int(ipywidgets.__version__.split(".")[0]) >= 8:
        value: Any = tuple(
            {"name": n, "size": len(d), "content": memoryview(d), **one} for n, d in files
        )
    else:
        value = {
            n: {"metadata": {"name": n, "size": len(d), **one}, "content": d} for n, d in files
        }
    demo.upload.set_trait("value", value)


def captions_of(demo: widgets.Demo) -> list[str]:
    return [
        re.findall(r"<h3[^>]*>(.*?)</h3>", card.children[0].value)[0]
        for card in demo.results.children
    ]
