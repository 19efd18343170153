"""Figures: every axis says what it shows, texts fit, and attention lands where it belongs."""

import json
from pathlib import Path

import numpy as np
import pytest
from helpers import PHOTOS
from matplotlib.figure import Figure
from PIL import Image

from capgen_utils import plots
from capgen_utils.encoders import Preprocessing
from capgen_utils.files import CapGenError

PHOTO = PHOTOS / "hikers_on_dune.jpg"
RED = Image.new("RGB", (64, 64), "red")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder whose log holds epoch 2 twice, and one epoch without an evaluation."""
    entries = [
        {"epoch": 1, "train_loss": 3.0, "dev_loss": 2.9, "BLEU-4": 10.0},
        {"epoch": 2, "train_loss": 9.0, "dev_loss": 9.0, "BLEU-4": 1.0},
        {"epoch": 2, "train_loss": 2.0, "dev_loss": 2.1, "BLEU-4": 20.0},
        {"epoch": 3, "train_loss": 1.5},
    ]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, entries)) + "\n")
    return tmp_path


def labelled(figure: Figure) -> bool:
    """Whether every visible axis with a scale has both of its labels."""
    axes = [ax for ax in figure.axes if ax.axison and ax.get_label() != "<colorbar>"]
    return bool(axes) and all(ax.get_xlabel() and ax.get_ylabel() for ax in axes)


def test_distributions_and_curves_have_labelled_axes(run: Path) -> None:
    figures = [
        plots.length_histogram([3, 4, 4, 9], limit=5),
        plots.word_frequencies({"a": 90, "dog": 30, "runs": 3}),
        plots.learning_curves({"one": run, "two": run}),
    ]
    assert all(map(labelled, figures))
    assert all(ax.get_title() for figure in figures for ax in figure.axes)


def test_the_length_histogram_counts_and_says_what_is_cut() -> None:
    (ax,) = plots.length_histogram([3, 4, 4, 9], limit=5).axes
    assert [bar.get_height() for bar in ax.patches] == [0, 0, 0, 1, 2, 0, 0, 0, 0, 1]
    texts = " ".join(text.get_text() for text in ax.get_legend().get_texts())
    assert "mean 5.0" in texts and "25.0% are longer" in texts


def test_word_frequencies_are_sorted_and_limited() -> None:
    left, right = plots.word_frequencies({"b": 5, "a": 5, "c": 7, "d": 1}, top=3).axes
    assert [label.get_text() for label in left.get_yticklabels()] == ["c", "a", "b"]
    assert right.get_lines()[0].get_ydata().tolist() == [7, 5, 5, 1]
    assert right.get_xscale() == right.get_yscale() == "log"


def test_bars_carry_their_values_and_the_reference_is_set_off() -> None:
    (ax,) = plots.bars({"floor": 6.62, "a human": 21.4}, "BLEU-4", reference="a human").axes
    assert [text.get_text() for text in ax.texts] == ["6.6", "21.4"]
    assert ax.get_xlabel() == "BLEU-4"
    colours = [bar.get_facecolor() for bar in ax.patches]
    assert colours[0] != colours[1]


def test_learning_curves_take_the_newest_entry_of_an_epoch(run: Path) -> None:
    loss, score = plots.learning_curves({"x": run}).axes
    train, dev = loss.get_lines()
    assert list(train.get_ydata()) == [3.0, 2.0, 1.5] and list(dev.get_xdata()) == [1, 2]
    assert list(score.get_lines()[0].get_ydata()) == [10.0, 20.0]
    assert [text.get_text() for text in score.texts] == ["20.0"]


@pytest.mark.parametrize("content", [None, "{not json}\n", '{"step": 1}\n', "[1]\n"])
def test_a_missing_or_damaged_log_is_named(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "log.jsonl").write_text(content)
    with pytest.raises(CapGenError, match=r"log\.jsonl"):
        plots.read_log(tmp_path)


def test_images_stand_under_their_titles_and_long_titles_are_wrapped() -> None:
    figure = plots.show_images([RED] * 3, ["short", "a title that is much too long for one line", ""], columns=2)
    titles = [ax.get_title() for ax in figure.axes]
    assert titles[0] == "short" and "\n" in titles[1]
    assert len(figure.axes) == 4 and not any(ax.axison for ax in figure.axes)
    assert [len(ax.get_images()) for ax in figure.axes] == [1, 1, 1, 0]


def test_titles_stay_inside_the_figure() -> None:
    figure = plots.show_images([RED] * 4, ["one two three four five six seven eight nine ten " * 2] * 4, columns=2)
    figure.draw_without_rendering()
    for ax in figure.axes:
        box = ax.title.get_window_extent()
        assert box.y1 <= figure.bbox.height + 1 and box.y0 >= 0


def test_images_and_titles_must_match() -> None:
    with pytest.raises(CapGenError, match="1 images cannot be shown with 2 titles"):
        plots.show_images([RED], ["a", "b"])
    with pytest.raises(CapGenError):
        plots.show_images([])


def test_the_grid_is_drawn_over_what_the_encoder_sees() -> None:
    figure = plots.draw_grid(PHOTO, Preprocessing(size=224), 49)
    before, after = figure.axes
    assert before.get_images()[0].get_array().shape[:2] != (224, 224)
    assert after.get_images()[0].get_array().shape[:2] == (224, 224)
    assert [text.get_text() for text in after.texts] == [str(i) for i in range(49)]
    assert after.texts[8].get_position() == (48.0, 48.0)  # the second cell of the second row
    assert len(after.get_lines()) == 16


def test_a_grid_has_to_be_square() -> None:
    assert plots.grid_side(49) == 7
    with pytest.raises(CapGenError, match="50 cells"):
        plots.draw_grid(PHOTO, Preprocessing(), 50)


def test_similarity_is_the_cosine() -> None:
    figure = plots.similarity_matrix(np.array([[1.0, 0.0], [3.0, 0.0], [0.0, 2.0]]), [RED] * 3)
    values = next(ax for ax in figure.axes if ax.texts)
    assert " ".join(text.get_text() for text in values.texts) == "1.00 1.00 0.00 1.00 1.00 0.00 0.00 0.00 1.00"
    assert any(ax.get_ylabel() == "cosine similarity" for ax in figure.axes)


# --- attention ------------------------------------------------------------------------------------------------------


def peak(row: int, column: int, side: int = 7) -> np.ndarray:
    weights = np.full((side, side), 0.001, dtype=np.float32)
    weights[row, column] = 1
    return weights.reshape(-1)


@pytest.mark.parametrize("size", [(224, 224), (640, 427), (300, 500), (70, 70)])
@pytest.mark.parametrize("cell", [(0, 0), (3, 3), (1, 5), (6, 2), (6, 6)])
def test_a_peak_lands_in_its_cell_of_a_squashed_image(size: tuple[int, int], cell: tuple[int, int]) -> None:
    light = plots.upsample(peak(*cell), size, Preprocessing(resize="squash"))
    width, height = size
    assert light.shape == (height, width)
    y, x = np.unravel_index(light.argmax(), light.shape)
    row, column = cell
    assert row * height / 7 <= y < (row + 1) * height / 7
    assert column * width / 7 <= x < (column + 1) * width / 7
    if 0 < row < 6 and 0 < column < 6:  # inside, the light is symmetric around the middle of the cell
        ys, xs = np.indices(light.shape)
        weight = np.where(light > 0.1, light, 0)
        assert abs((ys * weight).sum() / weight.sum() + 0.5 - (row + 0.5) * height / 7) < 1
        assert abs((xs * weight).sum() / weight.sum() + 0.5 - (column + 0.5) * width / 7) < 1


def test_the_grid_of_a_cropped_image_covers_its_middle_only() -> None:
    light = plots.upsample(peak(0, 0), (300, 100), Preprocessing(resize="crop"))
    y, x = np.unravel_index(light.argmax(), light.shape)
    assert light.shape == (100, 300) and y < 15 and 100 <= x < 115
    assert not light[:, :100].any() and not light[:, 200:].any()


def test_the_spotlight_lights_what_is_attended_and_dims_the_rest() -> None:
    white = Image.new("RGB", (70, 140), "white")
    shown = plots.spotlight(white, peak(2, 4))
    assert shown.shape == (140, 70, 3) and shown.dtype == np.uint8
    assert shown[50, 45].min() > 240
    assert shown[120, 10].max() < 90


def test_uniform_attention_leaves_the_photograph_as_it_is() -> None:
    assert np.array_equal(plots.spotlight(RED, np.full(49, 1 / 49)), np.asarray(RED))
    plots.attention_panel(RED, ["a"], np.full((1, 49), 1 / 49)).draw_without_rendering()  # no level to draw a line at


def test_the_panel_has_the_image_and_one_picture_a_word_in_order() -> None:
    words = ["a", "red", "circle"]
    weights = np.stack([peak(0, 0), peak(3, 3), peak(6, 6)])
    figure = plots.attention_panel(PHOTO, words, weights, columns=3)
    titles = [ax.get_title() for ax in figure.axes]
    assert titles == ["the image", *words, "", ""]
    lit = [ax.get_images()[0].get_array() for ax in figure.axes[1:4]]
    height, width = lit[0].shape[:2]
    ground = np.asarray(Image.open(PHOTO), dtype=float)
    for (row, column), picture in zip([(0, 0), (3, 3), (6, 6)], lit, strict=True):
        y, x = int((row + 0.5) * height / 7), int((column + 0.5) * width / 7)
        ratios = [np.asarray(p, dtype=float)[y, x].sum() / max(1, ground[y, x].sum()) for p in lit]
        assert max(ratios) == np.asarray(picture, dtype=float)[y, x].sum() / max(1, ground[y, x].sum())


def test_heads_are_averaged() -> None:
    weights = np.stack([np.stack([peak(0, 0), peak(6, 6)])])  # one word, two heads
    mean = weights.mean(1)
    pictures = [plots.attention_panel(RED, ["a"], w).axes[1].get_images()[0].get_array() for w in (weights, mean)]
    assert np.array_equal(*pictures)


def test_words_and_weights_must_match() -> None:
    with pytest.raises(CapGenError, match="2 words"):
        plots.attention_panel(RED, ["a", "b"], peak(0, 0)[None])


def test_layers_are_rows_and_words_are_columns() -> None:
    weights = np.stack([peak(0, 0), peak(1, 1)])
    figure = plots.attention_layers(RED, ["a", "star"], {"layer0": weights, "layer1": weights[:, None]})
    assert [ax.get_title() for ax in figure.axes] == ["a", "star", "", ""]
    assert [ax.get_ylabel() for ax in figure.axes] == ["layer0", "", "layer1", ""]


# --- showing --------------------------------------------------------------------------------------------------------


def test_a_figure_is_displayed_with_its_text_and_photographs_take_little_space() -> None:
    from IPython.core.formatters import DisplayFormatter

    chart, _ = DisplayFormatter().format(plots.alt(plots.bars({"a": 1.0}, "x"), "one bar"))
    photo, metadata = DisplayFormatter().format(plots.alt(plots.show_images([PHOTO] * 6, columns=3, size=3), "a dune"))
    assert "image/png" in chart and "image/jpeg" in photo
    assert metadata["image/jpeg"]["alt"] == "a dune"
    assert len(photo["image/jpeg"]) < 250_000


def test_the_source_that_is_shown_is_the_source_that_runs() -> None:
    shown = plots.show_source(Preprocessing.__call__).data
    assert shown.startswith("`capgen_utils.encoders`")
    assert "```python\ndef __call__(self" in shown and shown.endswith("```")


def test_figures_leave_no_trace_in_pyplot() -> None:
    import matplotlib.pyplot as plt

    before = plt.get_fignums()
    plots.bars({"a": 1.0}, "x")
    assert plt.get_fignums() == before
