"""The demo: upload photographs or pick a sample, choose a captioner and its decoding, see what it
says and why."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ipywidgets
from PIL import Image

from capgen_utils.captioner import DEFAULT_BUNDLE, Captioner
from capgen_utils.common.files import CapGenError
from capgen_utils.common.paths import REPOSITORY, data_dir
from capgen_utils.data.images import open_bytes, open_image
from capgen_utils.decoding.captions import Caption
from capgen_utils.decoding.rerank import fit
from capgen_utils.evaluation.attention import caption_maps, next_words
from capgen_utils.show.widgets.parts import (
    WIDE,
    error_box,
    guarded,
    paragraph,
    photograph,
    scorer_of,
    table,
    text_of,
)
from capgen_utils.show.widgets.steps import Steps
from capgen_utils.vision.dual_encoder import DualEncoder

MOST = 12  # photographs a click: each keeps its step-through in the page
NO_SAMPLE = "(none)"


SEARCH, GREEDY, DRAW = "beam search", "greedy", "draw"


PHOTOS = REPOSITORY / "data" / "photos"


def read_upload(value: Any) -> list[tuple[str, bytes]]:
    """Return name and content of the files in ``FileUpload.value``, in the order in which they were
    chosen.

    It has two shapes: since ipywidgets 8 it is a tuple of mappings with ``name`` and ``content``, a
    memoryview; before that, which is what Colab has, a mapping from name to a mapping with
    ``content``, bytes.

    Raises:
        CapGenError: it has neither shape.
    """
    try:
        if isinstance(value, Mapping):
            return [(str(name), bytes(entry["content"])) for name, entry in value.items()]
        return [(str(entry["name"]), bytes(entry["content"])) for entry in value]
    except (KeyError, TypeError, AttributeError) as error:
        raise CapGenError(
            f"this is not what FileUpload holds ({type(error).__name__})",
            "pass FileUpload.value of ipywidgets 7 or 8",
        ) from error


def find_bundles() -> dict[str, Path]:
    """Return the trained captioners on this machine by name: those that ship, and those in the data
    folder's runs.

    The one that ``Captioner.from_bundle`` takes by default comes first.
    """
    shipped = sorted((REPOSITORY / "data" / "bundles").glob("*/config.json"))
    trained = sorted(data_dir().glob("runs/*/bundle/config.json"))
    found = {path.parent.name: path.parent for path in shipped}
    for path in trained:
        run = path.parent.parent
        here = (
            run / "checkpoint.safetensors"
        ).is_file()  # else it may be what ships, put in the place of training
        found.setdefault(f"{run.name} (trained here)" if here else run.name, path.parent)
    return dict(sorted(found.items(), key=lambda pair: pair[1] != DEFAULT_BUNDLE))


class Demo:
    """Caption photographs in a notebook: JupyterLab, Colab, Kaggle, or Voilà.

    Nothing that a reader chooses or uploads raises: what goes wrong stands in the widget. Uploads
    stay in memory.

    Args:
        bundles: name -> folder of a captioner, or a loaded one; by default those of
            ``find_bundles``.
        photos: samples to choose from; by default those that ship.

    Attributes:
        upload, sample, model, way, beam, temperature, top_k, top_p, candidates, rerank, button:
            what is chosen.
        fp32: whether features are in fp32 for every captioner, as an exported one has them, and not
            as it was trained. It cannot be chosen for a captioner that was loaded before, which
            stays as it is.
        status: how it went: timing, or an error.
        results: one box a photograph.
        widget: all of it.
    """

    def __init__(
        self,
        bundles: Mapping[str, Path | Captioner] | None = None,
        photos: Sequence[Path] | None = None,
    ) -> None:
        self._bundles: dict[str, Path | Captioner] = dict(
            find_bundles() if bundles is None else bundles
        )
        self._loaded: dict[
            tuple[str, bool], Captioner
        ] = {}  # by name, and whether features are always in fp32
        samples = sorted(PHOTOS.glob("*.jpg")) if photos is None else photos
        self._samples = {path.stem.replace("_", " "): path for path in samples}
        self._make_controls()
        self.status = ipywidgets.HTML()
        self.results = ipywidgets.VBox([])
        self.status.add_class("capgen-status")
        self.results.add_class("capgen-results")
        self.widget = ipywidgets.VBox([*self._rows(), self.status, self.results])
        self.way.observe(self._toggle, "value")
        self.model.observe(self._toggle_fp32, "value")
        self.button.on_click(self._click)
        self._toggle()
        self._toggle_fp32()
        if not self._bundles:
            self.status.value = error_box(
                CapGenError(
                    "there is no trained captioner",
                    "run a notebook that trains one, or: capgen train",
                )
            )

    def _make_controls(self) -> None:
        wide = {"description_width": "initial"}
        self.upload = ipywidgets.FileUpload(
            accept="image/*", multiple=True, description="photographs"
        )
        self.sample = ipywidgets.Dropdown(
            options=[NO_SAMPLE, *self._samples], description="or a sample", style=wide
        )
        self.model = ipywidgets.Dropdown(
            options=list(self._bundles), description="captioner", style=wide
        )
        self.fp32 = ipywidgets.Checkbox(
            False, description="features always in fp32 (as exported)", indent=False
        )
        self.way = ipywidgets.Dropdown(
            options=[SEARCH, GREEDY, DRAW], description="decoding", style=wide
        )
        self.beam = ipywidgets.IntSlider(5, 2, 10, description="beam width", style=wide)
        self.temperature = ipywidgets.FloatSlider(
            1.0, min=0.1, max=2.0, step=0.1, description="temperature", style=wide
        )
        self.top_k = ipywidgets.IntSlider(0, 0, 50, description="top-k (0: all)", style=wide)
        self.top_p = ipywidgets.FloatSlider(
            1.0, min=0.1, max=1.0, step=0.05, description="top-p", style=wide
        )
        self.candidates = ipywidgets.IntSlider(5, 1, 10, description="candidates", style=wide)
        self.rerank = ipywidgets.Checkbox(
            False, description="let CLIP choose (where there is one)", indent=False
        )
        self.button = ipywidgets.Button(
            description="Caption", button_style="primary", icon="comment"
        )
        self.button.add_class("capgen-go")

    def _rows(self) -> list[Any]:
        return [
            ipywidgets.HBox([self.upload, self.sample, self.model, self.fp32]),
            ipywidgets.HBox([self.way, self.candidates, self.beam, self.temperature]),
            ipywidgets.HBox([self.top_k, self.top_p, self.rerank]),
            self.button,
        ]

    def _toggle(self, change: Any = None) -> None:
        """Grey out what the way of decoding does not read."""
        way = self.way.value
        self.beam.disabled = way != SEARCH
        self.candidates.disabled = self.rerank.disabled = way == GREEDY
        for control in (self.temperature, self.top_k, self.top_p):
            control.disabled = way != DRAW

    def _toggle_fp32(self, change: Any = None) -> None:
        """Let the box say how a captioner is that came loaded; off again for the next one that can
        be loaded so."""
        known, was_fixed = self._bundles.get(self.model.value), self.fp32.disabled
        self.fp32.disabled = isinstance(known, Captioner)
        if isinstance(known, Captioner):
            self.fp32.value = known.features_dtype == "float32"
        elif was_fixed:
            self.fp32.value = False

    def options(self) -> dict[str, Any]:
        """Return what is chosen, as ``Captioner.caption`` takes it."""
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
        """Return the photographs that are chosen, by name, and what is wrong with those that cannot
        be read.

        Raises:
            CapGenError: there are none, or too many.
        """
        uploads = read_upload(self.upload.value)
        if not uploads and self.sample.value == NO_SAMPLE:
            raise CapGenError(
                "there is no photograph yet", "upload one or several, or pick a sample"
            )
        if len(uploads) > MOST:
            raise CapGenError(
                f"{len(uploads)} photographs at once are too many", f"upload at most {MOST}"
            )
        found: list[tuple[str, Image.Image]] = []
        refused = []
        for name, content in uploads:
            try:
                found.append((name, open_bytes(content, name)))
            except CapGenError as error:
                refused.append(error)
        if self.sample.value != NO_SAMPLE:
            found.append((self.sample.value, open_image(self._samples[self.sample.value])))
        return found, refused

    def captioner(self) -> Captioner:
        """Return the captioner that is chosen, with the features that are chosen; each is loaded
        once.

        Raises:
            CapGenError: there is none, or it cannot be loaded.
        """
        name = self.model.value
        if name is None:
            raise CapGenError(
                "there is no trained captioner", "run a notebook that trains one, or: capgen train"
            )
        known = self._bundles[name]
        if isinstance(known, Captioner):
            return known
        chosen = (name, self.fp32.value)
        if chosen not in self._loaded:
            self.status.value = paragraph(f"loading {name} ...")
            self._loaded[chosen] = Captioner.from_bundle(known, fp32=self.fp32.value)
        return self._loaded[chosen]

    def _click(self, button: Any = None) -> None:
        self.button.disabled = True
        self.results.children = ()
        try:
            with guarded(self.status):
                self._run()
        finally:
            self.button.disabled = False

    def _run(self) -> None:
        images, refused = self.images()
        captioner = self.captioner() if images else None
        self.status.value = paragraph("captioning ...")
        if captioner is None:
            self.status.value = "".join(map(error_box, refused))
            return
        started = time.perf_counter()
        scorer = scorer_of(captioner)
        rerank = self.rerank.value and not self.rerank.disabled and scorer is not None
        captions = captioner.caption(
            [image for _, image in images], rerank=rerank, **self.options()
        )
        seconds = time.perf_counter() - started
        cards = []
        for (name, image), caption in zip(images, captions, strict=True):
            cards.append(self._card(captioner, scorer, name, image, caption))
        self.results.children = tuple(cards)
        many = f"{len(images)} photographs" if len(images) > 1 else "one photograph"
        self.status.value = paragraph(f"{many} in {seconds:.2f} s") + "".join(
            map(error_box, refused)
        )

    def _card(
        self,
        captioner: Captioner,
        scorer: DualEncoder | None,
        name: str,
        image: Image.Image,
        caption: Caption,
    ) -> ipywidgets.VBox:
        title = ipywidgets.HTML(
            f"<h3 class='capgen-caption' style='margin:0.6em 0 0.2em'>{text_of(caption.text) or '(nothing)'}</h3>"
            + photograph(image, f"{name}: {caption.text}")
        )
        own = caption.candidates[: self.candidates.value]
        fits = fit(scorer, [image], [[one.text for one in own]])[0] if scorer is not None else None
        header = ["candidate", "log-probability", *(["CLIP (cosine)"] if fits else [])]
        rows = [
            [one.text, f"{one.log_probability:.2f}", *([f"{fits[i]:.3f}"] if fits else [])]
            for i, one in enumerate(own)
        ]
        listed = ipywidgets.HTML(table(header, rows))
        card = ipywidgets.VBox([title, listed, _looks(captioner, image, caption)], layout=WIDE)
        card.add_class("capgen-card")
        return card


def _looks(captioner: Captioner, image: Image.Image, caption: Caption) -> Any:
    """Return the step-through of a caption; where there is none, the reason."""
    try:
        (maps,) = caption_maps(captioner, [image], [caption.tokens])
        return Steps(image, maps, next_words(captioner, image, maps)).widget
    except CapGenError as error:
        return ipywidgets.HTML(paragraph(f"No word-by-word maps: {error.problem}."))


def demo(bundles: Mapping[str, Path | Captioner] | None = None) -> ipywidgets.VBox:
    """Return the demo as a widget; see ``Demo``."""
    return Demo(bundles).widget
