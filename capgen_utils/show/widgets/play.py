"""A dataset explorer, and a game against a captioner. See notebook 11."""

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
from capgen_utils.show.widgets.parts import (
    bullets,
    guarded,
    paragraph,
    photograph,
    scorer_of,
    table,
)

LONGEST = 300  # characters of a caption that a reader types
YOU, MODEL, PEOPLE = "you", "the model", "a human"
METRICS = ("BLEU-1", "BLEU-4", "ROUGE-L", "CIDEr-D")


class Explorer:
    """Walk through a dataset, split by split, and search its captions.

    Args:
        manifest: the dataset.

    Attributes:
        split, words, place: the controls: a split, words that must all be in one caption, and the
            image's number.
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
        for control, callback in (
            (self.split, self._find),
            (self.words, self._find),
            (self.place, self._show),
        ):
            control.observe(callback, "value")
        self._find()

    def _find(self, change: Any = None) -> None:
        with guarded(self.page):
            words = set(self.words.value.lower().split())
            self._items = [
                item
                for item in self._manifest.split(self.split.value).items
                if not words
                or any(words <= set(caption.lower().split()) for caption in item.captions)
            ]
            self.place.max = max(0, len(self._items) - 1)
            self.place.value = min(self.place.value, self.place.max)
            self._show()

    def _show(self, change: Any = None) -> None:
        with guarded(self.page):
            if not self._items:
                self.page.value = paragraph(
                    f"no caption of {self.split.value} holds all of these words"
                )
                return
            item = self._items[self.place.value]
            self.page.value = (
                paragraph(f"{self.place.value + 1} of {len(self._items)} images: {item.image}")
                + photograph(
                    self._manifest.path(item), f"{item.image}: {' / '.join(item.captions[:1])}"
                )
                + bullets(item.captions)
            )


def beside(
    image: str, captions: Mapping[str, str], references: Mapping[str, Sequence[str]]
) -> dict[str, dict[str, float]]:
    """Score several captions of one image, and a human one, against the same references.

    Each human caption is left out once and scored against the others; so are the other captions
    each time, since every further reference raises the scores. CIDEr-D's document frequencies are
    those of all ``references``.

    Args:
        image: the image.
        captions: author -> caption.
        references: human captions of all images of the split, this one included.

    Returns:
        Author -> metric -> score, times 100, mean over the choices of the human caption that is
        left out.

    Raises:
        CapGenError: some image has fewer than two human captions, or this one none.
    """
    if image not in references:
        raise CapGenError(f"there are no references of {image}", "choose an image of this split")
    scores: dict[str, list[list[float]]] = {}
    for chosen, others in human_choices(references):
        for author, caption in {**captions, PEOPLE: chosen[image]}.items():
            statistics = Statistics.of({**chosen, image: caption}, others)
            alone = np.eye(1, len(others), statistics.images.index(image))  # this image, once
            values = statistics.of_samples(alone)  # metric -> (1,)
            scores.setdefault(author, []).append([float(values[name][0]) for name in METRICS])
    return {
        author: dict(zip(METRICS, np.mean(rows, axis=0).tolist(), strict=True))
        for author, rows in scores.items()
    }


class BeatTheModel:
    """A game: the reader's caption is scored beside the captioner's and a human's.

    Args:
        captioner: the opponent.
        manifest: the dataset.
        split: the split whose images are shown.
        limit: use only the first images of the split, so that scoring takes no time.

    Attributes:
        typed, button, another: the reader's caption, the button that scores it, the button for
            another image.
        page: the image.
        result: the scores, or an error.
        widget: all of it.
    """

    def __init__(
        self, captioner: Captioner, manifest: Manifest, split: str = "test", limit: int | None = 200
    ) -> None:
        items = manifest.split(split).limit(limit).items
        self._captioner = captioner
        self._items = [item for item in items if len(item.captions) > 1]
        self._paths = {item.image: manifest.path(item) for item in self._items}
        self._references = {item.image: item.captions for item in self._items}
        self._scenes = load_scenes(manifest.root) if scenes_file(manifest.root).is_file() else {}
        self._place = 0
        self._won: list[bool] = []  # per round
        self.typed = ipywidgets.Text(
            placeholder="your caption", layout=ipywidgets.Layout(width="60%")
        )
        self.button = ipywidgets.Button(description="Score", button_style="primary")
        self.another = ipywidgets.Button(description="Another image")
        self.page, self.result = ipywidgets.HTML(), ipywidgets.HTML()
        self.widget = ipywidgets.VBox(
            [self.page, ipywidgets.HBox([self.typed, self.button, self.another]), self.result]
        )
        self.button.on_click(self._score)
        self.another.on_click(self._next)
        self._show()

    @property
    def image(self) -> str:
        """The name of the image on the page."""
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
                raise CapGenError(
                    f"that is longer than {LONGEST} characters"
                    if text
                    else "there is no caption yet",
                    "type one sentence about the image",
                )
            model = self._captioner.caption(self._paths[self.image])[0].text
            captions = {YOU: text, MODEL: model}
            scores = beside(self.image, captions, self._references)
            self._won.append(scores[YOU]["CIDEr-D"] > scores[MODEL]["CIDEr-D"])
            verdict = "You win by CIDEr-D." if self._won[-1] else "Not ahead by CIDEr-D."
            people, more = self._references[self.image], self._more(captions)
            rows = [
                [author, caption]
                + [f"{scores[author][metric]:.1f}" for metric in METRICS]
                + [values.get(author, "-") for values in more.values()]
                for author, caption in {**captions, PEOPLE: f"(mean of {len(people)})"}.items()
            ]
            self.result.value = (
                table(["", "caption", *METRICS, *more], rows)
                + paragraph(f"{verdict} {sum(self._won)} of {len(self._won)} rounds won.")
                + f"People wrote:{bullets(people)}"
            )

    def _more(self, captions: Mapping[str, str]) -> dict[str, dict[str, str]]:
        """Return further columns: the truth of captions on drawn scenes, CLIP's cosines."""
        columns: dict[str, dict[str, str]] = {}
        if self._scenes:
            scene = self._scenes[self.image]
            columns["true"] = {
                author: "yes" if is_true(caption, scene) else "no"
                for author, caption in captions.items()
            }
        scorer = scorer_of(self._captioner)
        if scorer is not None:
            (cosines,) = fit(scorer, [self._paths[self.image]], [list(captions.values())])
            columns["CLIP (cosine)"] = {
                author: f"{cosine:.3f}" for author, cosine in zip(captions, cosines, strict=True)
            }
        return columns
