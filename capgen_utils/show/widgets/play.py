"""Look around in a dataset, and write captions against a captioner."""

from collections.abc import Mapping, Sequence
from typing import Any

import ipywidgets
import numpy as np

from capgen_utils.captioner import Captioner
from capgen_utils.common.files import CapGenError
from capgen_utils.data.manifest import Manifest
from capgen_utils.data.shapes import is_true, load_scenes, scenes_file
from capgen_utils.decoding.rerank import fit
from capgen_utils.evaluation.baselines import human_choices
from capgen_utils.evaluation.metrics import Statistics
from capgen_utils.evaluation.metrics.scores import BLEU_NAMES, bleu_of_sums
from capgen_utils.show.widgets.parts import (
    guarded,
    paragraph,
    photograph,
    scorer_of,
    table,
    text_of,
)

LONGEST = 300  # characters of a caption that a reader types


YOU, MODEL, PEOPLE = "you", "the model", "a human"


METRICS = ("BLEU-1", "BLEU-4", "ROUGE-L", "CIDEr-D")


class Explorer:
    """Walk through a dataset, split by split, and search its captions.

    Args:
        manifest: the dataset.

    Attributes:
        split, words, place: what is chosen: a split, words that all have to stand in one caption,
            the image's number.
        page: image and captions.
        widget: all of it.
    """

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self.split = ipywidgets.Dropdown(options=manifest.split_names(), description="split")
        self.words = ipywidgets.Text(
            description="search", placeholder="words", continuous_update=False
        )
        self.place = ipywidgets.IntSlider(0, 0, 0, description="image")
        self.page = ipywidgets.HTML()
        self.widget = ipywidgets.VBox(
            [ipywidgets.HBox([self.split, self.words, self.place]), self.page]
        )
        self.widget.add_class("capgen-explorer")
        for control in (self.split, self.words):
            control.observe(self._find, "value")
        self.place.observe(self._show, "value")
        self._find()

    def _find(self, change: Any = None) -> None:
        with guarded(self.page):
            wanted = set(self.words.value.lower().split())
            self._found = [
                item
                for item in self._manifest.split(self.split.value).items
                if not wanted
                or any(wanted <= set(caption.lower().split()) for caption in item.captions)
            ]
            self.place.max = max(0, len(self._found) - 1)
            self.place.value = min(self.place.value, self.place.max)
            self._show()

    def _show(self, change: Any = None) -> None:
        with guarded(self.page):
            if not self._found:
                self.page.value = paragraph(
                    f"no caption of {self.split.value} holds all of these words"
                )
                return
            item = self._found[self.place.value]
            listed = "".join(f"<li>{text_of(caption)}</li>" for caption in item.captions)
            count = f"{self.place.value + 1} of {len(self._found)} images: {item.image}"
            self.page.value = (
                paragraph(count)
                + photograph(
                    self._manifest.path(item), f"{item.image}: {' / '.join(item.captions[:1])}"
                )
                + f"<ul>{listed}</ul>"
            )


def explorer(manifest: Manifest) -> ipywidgets.VBox:
    """Return a widget that walks through a dataset; see ``Explorer``."""
    return Explorer(manifest).widget


def beside(
    image: str, captions: Mapping[str, str], references: Mapping[str, Sequence[str]]
) -> dict[str, dict[str, float]]:
    """Score several captions of one image, and one human caption, against the same references.

    Each human caption is left out once and scored against the others, and so are the captions each
    time: with one reference more every score would be higher. What a word is worth for CIDEr-D
    follows from all of ``references``.

    Args:
        image: the image.
        captions: who said it -> caption.
        references: human captions of all images of the split, this one among them.

    Returns:
        Who -> metric -> score, times 100, mean over the choices of the human caption that is left
        out.

    Raises:
        CapGenError: an image has fewer than two human captions, or it has none at all.
    """
    if image not in references:
        raise CapGenError(f"there are no references of {image}", "choose an image of this split")
    each: dict[str, list[dict[str, float]]] = {who: [] for who in (*captions, PEOPLE)}
    for chosen, others in human_choices(references):
        for who, caption in {**captions, PEOPLE: chosen[image]}.items():
            each[who].append(_scores(image, {**chosen, image: caption}, others))
    return {
        who: {metric: float(np.mean([one[metric] for one in found])) for metric in METRICS}
        for who, found in each.items()
    }


def _scores(
    image: str, said: Mapping[str, str], references: Mapping[str, Sequence[str]]
) -> dict[str, float]:
    statistics = Statistics.of(said, references)
    row = statistics.images.index(image)
    values = dict(zip(BLEU_NAMES, bleu_of_sums(statistics.bleu[row]).tolist(), strict=True))
    return values | {name: float(found[row]) for name, found in statistics.means.items()}


class BeatTheModel:
    """The reader types a caption and sees its scores beside the captioner's and a human's.

    Args:
        captioner: that is to be beaten.
        manifest: the dataset.
        split: whose images are shown.
        limit: only the first images of the split, so that scoring takes no time.

    Attributes:
        typed, button, another: the reader's caption, the button that scores it, the button for
            another image.
        page: the image. ``result``: the scores, or what is wrong.
        widget: all of it.
    """

    def __init__(
        self, captioner: Captioner, manifest: Manifest, split: str = "test", limit: int | None = 200
    ) -> None:
        part = manifest.split(split).limit(limit)
        self._captioner, self._items = (
            captioner,
            [item for item in part.items if len(item.captions) > 1],
        )
        self._paths = {item.image: manifest.path(item) for item in self._items}
        self._references = {item.image: item.captions for item in self._items}
        self._scenes = load_scenes(manifest.root) if scenes_file(manifest.root).is_file() else {}
        self._place, self._won, self._played = 0, 0, 0
        self.typed = ipywidgets.Text(
            placeholder="your caption", layout=ipywidgets.Layout(width="60%")
        )
        self.button = ipywidgets.Button(description="Score", button_style="primary")
        self.another = ipywidgets.Button(description="Another image")
        self.page, self.result = ipywidgets.HTML(), ipywidgets.HTML()
        self.widget = ipywidgets.VBox(
            [self.page, ipywidgets.HBox([self.typed, self.button, self.another]), self.result]
        )
        self.widget.add_class("capgen-beat")
        self.button.on_click(self._score)
        self.another.on_click(self._next)
        self._show()

    @property
    def image(self) -> str:
        """Name of the image that is shown."""
        return self._items[self._place].image

    def _show(self) -> None:
        with guarded(self.result):
            self.page.value = photograph(self._paths[self.image], "the image to describe")
            self.result.value, self.typed.value = "", ""

    def _next(self, button: Any = None) -> None:
        self._place = (self._place + 1) % len(self._items)
        self._show()

    def _score(self, button: Any = None) -> None:
        with guarded(self.result):
            text = " ".join(self.typed.value.split())
            if not text or len(text) > LONGEST:
                problem = (
                    "there is no caption yet"
                    if not text
                    else f"that is longer than {LONGEST} characters"
                )
                raise CapGenError(problem, "type one sentence about the image")
            model = self._captioner.caption(self._paths[self.image])[0].text
            captions = {YOU: text, MODEL: model}
            found = beside(self.image, captions, self._references)
            self._played += 1
            self._won += found[YOU]["CIDEr-D"] > found[MODEL]["CIDEr-D"]
            self.result.value = self._result(captions, found)

    def _result(self, captions: Mapping[str, str], found: Mapping[str, Mapping[str, float]]) -> str:
        own = self._references[self.image]
        said = {**captions, PEOPLE: f"(mean of {len(own)})"}
        more, extra = self._more(captions)
        rows = [
            [
                who,
                said[who],
                *(f"{found[who][metric]:.1f}" for metric in METRICS),
                *extra.get(who, ["-"] * len(more)),
            ]
            for who in (YOU, MODEL, PEOPLE)
        ]
        verdict = (
            "You win by CIDEr-D."
            if found[YOU]["CIDEr-D"] > found[MODEL]["CIDEr-D"]
            else "Not ahead by CIDEr-D."
        )
        people = "".join(f"<li>{text_of(caption)}</li>" for caption in own)
        tally = f"{verdict} {self._won} of {self._played} rounds won."
        return (
            table(["", "caption", *METRICS, *more], rows)
            + paragraph(tally)
            + f"People wrote:<ul>{people}</ul>"
        )

    def _more(self, captions: Mapping[str, str]) -> tuple[list[str], dict[str, list[str]]]:
        """Return what else can be said of captions: whether they are true of a drawn scene, and
        what a CLIP thinks."""
        names, values = [], {who: list[str]() for who in captions}
        if self._scenes:
            names.append("true")
            for who, caption in captions.items():
                values[who].append("yes" if is_true(caption, self._scenes[self.image]) else "no")
        scorer = scorer_of(self._captioner)
        if scorer is not None:
            names.append("CLIP (cosine)")
            fits = fit(scorer, [self._paths[self.image]], [list(captions.values())])[0]
            for who, value in zip(captions, fits, strict=True):
                values[who].append(f"{value:.3f}")
        return names, values


def beat_the_model(
    captioner: Captioner, manifest: Manifest, split: str = "test"
) -> ipywidgets.VBox:
    """Return a widget in which the reader writes captions against a captioner; see
    ``BeatTheModel``."""
    return BeatTheModel(captioner, manifest, split).widget
