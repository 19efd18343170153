"""The demo, and the step through a caption: its words, their maps and the next words.

Notebooks 10 and 11 use them.
"""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ipywidgets
from PIL import Image

from capgen_utils.captioner import DEFAULT_BUNDLE, Captioner
from capgen_utils.common.files import CapGenError
from capgen_utils.common.paths import REPOSITORY, data_dir
from capgen_utils.data.images import ImageLike, open_bytes, open_image
from capgen_utils.decoding.captions import Caption, NextWord
from capgen_utils.decoding.rerank import fit
from capgen_utils.evaluation.attention import MEAN, CaptionMaps, caption_maps, next_words
from capgen_utils.show.plots import attention_step, scale_top
from capgen_utils.show.widgets.parts import (
    WIDE,
    drawn,
    error_box,
    guarded,
    paragraph,
    photograph,
    scorer_of,
    table,
    text_of,
)
from capgen_utils.vision.dual_encoder import DualEncoder

MOST = 12  # photographs per click: each keeps its step-through in the page
NO_SAMPLE = "(none)"
SEARCH, GREEDY, DRAW = "beam search", "greedy", "draw"
PHOTOS = REPOSITORY / "data" / "photos"
_NO_CAPTIONER = CapGenError(
    "there is no trained captioner", "run a notebook that trains one, or: capgen train"
)
_WIDE_LABEL = {"description_width": "initial"}


def read_upload(value: Any) -> list[tuple[str, bytes]]:
    """Return the name and content of each file in ``FileUpload.value``, in the order of choice.

    Since ipywidgets 8 the value is a tuple of mappings with ``name`` and ``content``, a memoryview.
    Before, as on Colab, it maps names to mappings with ``content``, bytes.

    Raises:
        CapGenError: it has neither form.
    """
    try:
        if isinstance(value, Mapping):
            return [(str(name), bytes(entry["content"])) for name, entry in value.items()]
        return [(str(entry["name"]), bytes(entry["content"])) for entry in value]
    except (KeyError, TypeError, AttributeError) as error:
        raise CapGenError(
            f"this is not a value of FileUpload ({type(error).__name__})",
            "pass FileUpload.value of ipywidgets 7 or 8",
        ) from error


def find_bundles() -> dict[str, Path]:
    """Return the captioners on this machine by name: shipped ones and those in the data folder.

    The default of ``Captioner.from_bundle`` comes first.
    """
    shipped = sorted((REPOSITORY / "data" / "bundles").glob("*/config.json"))
    bundles = {path.parent.name: path.parent for path in shipped}
    for path in sorted(data_dir().glob("runs/*/bundle/config.json")):
        run = path.parent.parent
        # Without a checkpoint it may be a shipped captioner, copied here instead of training.
        trained_here = (run / "checkpoint.safetensors").is_file()
        bundles.setdefault(run.name + " (trained here)" * trained_here, path.parent)
    return dict(sorted(bundles.items(), key=lambda pair: pair[1] != DEFAULT_BUNDLE))


class Demo:
    """Caption photographs in a notebook: JupyterLab, Colab, Kaggle, or Voilà.

    Choices and uploads never raise: errors are shown in the widget. Uploads stay in memory.

    Args:
        bundles: name -> folder of a captioner, or a loaded one; by default ``find_bundles()``.
        photos: the samples; by default those that ship.

    Attributes:
        upload, sample, model, way, beam, temperature, top_k, top_p, candidates, rerank, button:
            the controls.
        fp32: compute features in fp32 for every captioner, as an exported one does, instead of the
            dtype of its training; fixed for captioners that were loaded before.
        status: timing, or an error.
        results: one box per photograph.
        widget: all of it.
    """

    def __init__(
        self,
        bundles: Mapping[str, Path | Captioner] | None = None,
        photos: Sequence[Path] | None = None,
    ) -> None:
        self._bundles: Mapping[str, Path | Captioner] = (
            find_bundles() if bundles is None else bundles
        )
        self._loaded: dict[tuple[str, bool], Captioner] = {}  # by name and fp32
        samples = sorted(PHOTOS.glob("*.jpg")) if photos is None else photos
        self._samples = {path.stem.replace("_", " "): path for path in samples}
        self._make_controls()
        self.status, self.results = ipywidgets.HTML(), ipywidgets.VBox([])
        self.status.add_class("capgen-status")
        self.widget = ipywidgets.VBox(
            [
                ipywidgets.HBox([self.upload, self.sample, self.model, self.fp32]),
                ipywidgets.HBox([self.way, self.candidates, self.beam, self.temperature]),
                ipywidgets.HBox([self.top_k, self.top_p, self.rerank]),
                self.button,
                self.status,
                self.results,
            ]
        )
        self.way.observe(self._toggle, "value")
        self.model.observe(self._toggle, "value")
        self.button.on_click(self._click)
        self._toggle()
        if not self._bundles:
            self.status.value = error_box(_NO_CAPTIONER)

    def _make_controls(self) -> None:
        def slider(kind: Any, value: float, low: float, high: float, name: str, **more: Any) -> Any:
            return kind(value, min=low, max=high, description=name, style=_WIDE_LABEL, **more)

        def dropdown(options: list[str], name: str) -> Any:
            return ipywidgets.Dropdown(options=options, description=name, style=_WIDE_LABEL)

        self.upload = ipywidgets.FileUpload(
            accept="image/*", multiple=True, description="photographs"
        )
        self.sample = dropdown([NO_SAMPLE, *self._samples], "or a sample")
        self.model = dropdown(list(self._bundles), "captioner")
        self.way = dropdown([SEARCH, GREEDY, DRAW], "decoding")
        self.fp32 = ipywidgets.Checkbox(
            False, description="features always in fp32 (as exported)", indent=False
        )
        self.beam = slider(ipywidgets.IntSlider, 5, 2, 10, "beam width")
        self.temperature = slider(ipywidgets.FloatSlider, 1.0, 0.1, 2.0, "temperature", step=0.1)
        self.top_k = slider(ipywidgets.IntSlider, 0, 0, 50, "top-k (0: all)")
        self.top_p = slider(ipywidgets.FloatSlider, 1.0, 0.1, 1.0, "top-p", step=0.05)
        self.candidates = slider(ipywidgets.IntSlider, 5, 1, 10, "candidates")
        self.rerank = ipywidgets.Checkbox(
            False, description="let CLIP choose (if there is one)", indent=False
        )
        self.button = ipywidgets.Button(
            description="Caption", button_style="primary", icon="comment"
        )
        self.button.add_class("capgen-go")

    def _toggle(self, change: Any = None) -> None:
        """Disable the controls that are ignored; show how a loaded captioner computes features."""
        way, bundle = self.way.value, self._bundles.get(self.model.value)
        self.beam.disabled = way != SEARCH
        self.candidates.disabled = self.rerank.disabled = way == GREEDY
        for control in (self.temperature, self.top_k, self.top_p):
            control.disabled = way != DRAW
        if isinstance(bundle, Captioner):
            self.fp32.value = bundle.features_dtype == "float32"
        elif self.fp32.disabled:  # the box of the captioner before
            self.fp32.value = False
        self.fp32.disabled = isinstance(bundle, Captioner)

    def options(self) -> dict[str, Any]:
        """Return the chosen decoding options, as ``Captioner.caption`` takes them."""
        if self.way.value == GREEDY:
            return {"beam": 1}
        if self.way.value == SEARCH:
            return {"beam": max(self.beam.value, self.candidates.value)}
        return {
            "temperature": self.temperature.value,
            "top_k": self.top_k.value or None,
            "top_p": self.top_p.value if self.top_p.value < 1 else None,
            "candidates": self.candidates.value,
        }

    def images(self) -> tuple[list[tuple[str, Image.Image]], list[CapGenError]]:
        """Return the chosen photographs by name, and the errors of those that cannot be read.

        Raises:
            CapGenError: no photograph was chosen, or too many.
        """
        uploads, sample = read_upload(self.upload.value), self.sample.value
        if not uploads and sample == NO_SAMPLE:
            raise CapGenError(
                "there is no photograph yet", "upload one or several, or pick a sample"
            )
        if len(uploads) > MOST:
            raise CapGenError(
                f"{len(uploads)} photographs at once are too many", f"upload at most {MOST}"
            )
        images, errors = [], []
        for name, content in uploads:
            try:
                images.append((name, open_bytes(content, name)))
            except CapGenError as error:
                errors.append(error)
        if sample != NO_SAMPLE:
            images.append((sample, open_image(self._samples[sample])))
        return images, errors

    def captioner(self) -> Captioner:
        """Return the chosen captioner with the chosen features; each is loaded once.

        Raises:
            CapGenError: no captioner was chosen, or it cannot be loaded.
        """
        name, fp32 = self.model.value, self.fp32.value
        if name is None:
            raise _NO_CAPTIONER
        bundle = self._bundles[name]
        if isinstance(bundle, Captioner):
            return bundle
        if (name, fp32) not in self._loaded:
            self.status.value = paragraph(f"loading {name} ...")
            self._loaded[name, fp32] = Captioner.from_bundle(bundle, fp32=fp32)
        return self._loaded[name, fp32]

    def _click(self, button: Any = None) -> None:
        self.button.disabled = True
        self.results.children = ()
        try:
            with guarded(self.status):
                images, errors = self.images()
                problems = "".join(map(error_box, errors))
                self.status.value = (self._caption(images) if images else "") + problems
        finally:
            self.button.disabled = False

    def _caption(self, images: Sequence[tuple[str, Image.Image]]) -> str:
        """Show the captions of images; return how long they took, as HTML."""
        captioner = self.captioner()
        self.status.value = paragraph("captioning ...")
        started = time.perf_counter()
        scorer = scorer_of(captioner)
        rerank = self.rerank.value and not self.rerank.disabled and scorer is not None
        pictures = [image for _, image in images]
        captions = captioner.caption(pictures, rerank=rerank, **self.options())
        seconds = time.perf_counter() - started
        self.results.children = tuple(
            self._card(captioner, scorer, name, image, caption)
            for (name, image), caption in zip(images, captions, strict=True)
        )
        many = f"{len(images)} photographs" if len(images) > 1 else "one photograph"
        return paragraph(f"{many} in {seconds:.2f} s")

    def _card(
        self,
        captioner: Captioner,
        scorer: DualEncoder | None,
        name: str,
        image: Image.Image,
        caption: Caption,
    ) -> ipywidgets.VBox:
        """Return a caption, its photograph, its candidates, and the step through its words."""
        title = (
            "<h3 class='capgen-caption' style='margin:0.6em 0 0.2em'>"
            f"{text_of(caption.text) or '(nothing)'}</h3>"
            + photograph(image, f"{name}: {caption.text}")
        )
        candidates = caption.candidates[: self.candidates.value]
        header = ["candidate", "log-probability"]
        rows = [[each.text, f"{each.log_probability:.2f}"] for each in candidates]
        if scorer is not None:
            header.append("CLIP (cosine)")
            cosines = fit(scorer, [image], [[each.text for each in candidates]])[0]
            rows = [[*row, f"{cosine:.3f}"] for row, cosine in zip(rows, cosines, strict=True)]
        try:
            (maps,) = caption_maps(captioner, [image], [caption.tokens])
            steps = Steps(image, maps, next_words(captioner, image, maps)).widget
        except CapGenError as error:
            steps = ipywidgets.HTML(paragraph(f"No word-by-word maps: {error.problem}."))
        listed = ipywidgets.HTML(table(header, rows))
        card = ipywidgets.VBox([ipywidgets.HTML(title), listed, steps], layout=WIDE)
        card.add_class("capgen-card")
        return card


def demo(bundles: Mapping[str, Path | Captioner] | None = None) -> ipywidgets.VBox:
    """Return the demo as a widget; see ``Demo``."""
    return Demo(bundles).widget


# --- the step through a caption


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
        shown = ", ".join(f"{each.text} {each.probability:.0%}" for each in likely[:3])
        return drawn(
            attention_step(self._image, maps[word], top, likely, text, self._maps.preprocessing),
            f"The captioner's attention ({choice}) for the word: {text}. Likeliest: {shown}.",
        )
