"""The step through a caption: its words, their maps and the next words. See notebooks 10 and 11."""

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
        captioner: one with attention: attend_tell, transformer, clip_gpt2.
        image: a path, PIL image or array.
        caption: the caption to walk through; by default the captioner's own.
        options: decoding options, see ``Captioner.caption``.

    Raises:
        CapGenError: the captioner has no attention over the image; the caption is empty or too
            long; the image cannot be read.
    """
    picture = open_image(image)
    (maps,) = caption_maps(captioner, [picture], None if caption is None else [caption], **options)
    return Steps(picture, maps, next_words(captioner, picture, maps)).widget


class Steps:
    """A slider over the words of a caption, with the map and the next words of each.

    Args:
        image: the captioned image.
        maps: the attention for each word.
        likely: the likeliest next words at each word, from ``next_words``.

    Attributes:
        slider: the number of the word.
        choice: the map: of a layer, a head, the mean of all, or rollout.
        sentence: the caption, with the word marked.
        picture: map and probabilities.
        widget: all of it.
    """

    def __init__(self, image: ImageLike, maps: CaptionMaps, likely: list[list[NextWord]]) -> None:
        self._image, self._maps, self._likely = image, maps, likely
        self._drawn: dict[tuple[str, int], str] = {}
        last, choices = len(maps.words) - 1, maps.choices(heads=True)
        self.slider = ipywidgets.IntSlider(0, 0, last, description="word", readout=False)
        self.play = ipywidgets.Play(min=0, max=last, interval=1200, description="play")
        self.choice = ipywidgets.Dropdown(
            options=choices, value=MEAN if MEAN in choices else choices[0], description="map"
        )
        self.sentence, self.picture = ipywidgets.HTML(), ipywidgets.HTML(layout=WIDE)
        ipywidgets.jslink((self.play, "value"), (self.slider, "value"))
        self.slider.observe(self._show, "value")
        self.choice.observe(self._show, "value")
        controls = [self.play, self.slider, *([self.choice] if len(choices) > 1 else [])]
        self.widget = ipywidgets.VBox([self.sentence, ipywidgets.HBox(controls), self.picture])
        self.widget.add_class("capgen-steps")
        self._show()

    def _show(self, change: Any = None) -> None:
        with guarded(self.picture):
            word, choice = self.slider.value, self.choice.value
            texts = [text_of(text) for text in self._maps.texts]
            texts[word] = f"<mark>{texts[word]}</mark>"
            self.sentence.value = " ".join(texts)
            if (choice, word) not in self._drawn:
                self._drawn[choice, word] = self._draw(choice, word)
            self.picture.value = self._drawn[choice, word]

    def _draw(self, choice: str, word: int) -> str:
        maps, likely = self._maps.of(choice), self._likely[word]  # (words, N)
        text, top = self._maps.texts[word], scale_top(maps * maps.shape[1])
        figure = attention_step(
            self._image, maps[word], top, likely, text, self._maps.preprocessing
        )
        shown = ", ".join(f"{each.text} {each.probability:.0%}" for each in likely[:3])
        return drawn(
            figure,
            f"The captioner's attention ({choice}) for the word: {text}. Likeliest: {shown}.",
        )
