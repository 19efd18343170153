"""Step through a caption: a slider over its words moves the map, with the probabilities of the next
words beside it."""

from typing import Any

import ipywidgets

from capgen_utils.captioner import Captioner
from capgen_utils.data.images import ImageLike, open_image
from capgen_utils.decoding.captions import NextWord
from capgen_utils.evaluation.attention import MEAN, CaptionMaps, caption_maps, next_words
from capgen_utils.show.plots.looks import attention_step, scale_top
from capgen_utils.show.widgets.parts import WIDE, drawn, guarded, text_of


def step_through(
    captioner: Captioner,
    image: ImageLike,
    caption: str | None = None,
    **options: Any,
) -> ipywidgets.VBox:
    """Return a widget that walks through a caption word by word.

    Args:
        captioner: one that looks: attend_tell, transformer, clip_gpt2.
        image: a path, PIL image or array.
        caption: what is to be said; by default what the captioner says.
        options: how it is found, see ``Captioner.caption``.

    Raises:
        CapGenError: the captioner has no attention over the image; the caption is empty or too
            long; the image cannot be read.
    """
    picture = open_image(image)
    (maps,) = caption_maps(captioner, [picture], None if caption is None else [caption], **options)
    return Steps(picture, maps, next_words(captioner, picture, maps)).widget


class Steps:
    """A slider over the words of a caption, and what it moves.

    Args:
        image: that the caption is of.
        maps: where the captioner looked.
        likely: what it held likely for each word, from ``next_words``.

    Attributes:
        slider: the number of the word.
        choice: which map is shown: a layer, a head, the mean of all, rollout.
        sentence: the caption, with the word marked.
        picture: map and probabilities.
        widget: all of it.
    """

    def __init__(self, image: ImageLike, maps: CaptionMaps, likely: list[list[NextWord]]) -> None:
        self._image, self._maps, self._likely = image, maps, likely
        self._drawn: dict[tuple[str, int], str] = {}
        last = len(maps.words) - 1
        choices = maps.choices(heads=True)
        self.slider = ipywidgets.IntSlider(
            0, 0, last, description="word", readout=False, continuous_update=True
        )
        self.play = ipywidgets.Play(min=0, max=last, interval=1200, description="play")
        self.choice = ipywidgets.Dropdown(
            options=choices, value=MEAN if MEAN in choices else choices[0], description="map"
        )
        self.sentence, self.picture = ipywidgets.HTML(), ipywidgets.HTML(layout=WIDE)
        ipywidgets.jslink((self.play, "value"), (self.slider, "value"))
        self.slider.observe(self._show, "value")
        self.choice.observe(self._show, "value")
        parts = [self.play, self.slider, *([self.choice] if len(choices) > 1 else [])]
        self.widget = ipywidgets.VBox([self.sentence, ipywidgets.HBox(parts), self.picture])
        self.widget.add_class("capgen-steps")
        self._show()

    def _show(self, change: Any = None) -> None:
        with guarded(self.picture):
            word, choice = self.slider.value, self.choice.value
            marked = [
                f"<mark>{text_of(text)}</mark>" if i == word else text_of(text)
                for i, text in enumerate(self._maps.texts)
            ]
            self.sentence.value = " ".join(marked)
            self.picture.value = self._drawn.get((choice, word)) or self._draw(choice, word)

    def _draw(self, choice: str, word: int) -> str:
        maps, likely = self._maps.of(choice), self._likely[word]
        top = scale_top(maps * maps.shape[1])
        figure = attention_step(
            self._image, maps[word], top, likely, self._maps.texts[word], self._maps.preprocessing
        )
        shown = ", ".join(f"{each.text} {each.probability:.0%}" for each in likely[:3])
        text = f"Where the captioner looked ({choice}) when it said: {self._maps.texts[word]}. Likeliest: {shown}."
        self._drawn[choice, word] = drawn(figure, text)
        return self._drawn[choice, word]
