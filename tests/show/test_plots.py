"""Figures: every axis says what it shows, texts fit, and attention lands where it belongs."""

import json
from pathlib import Path

import numpy as np
import pytest
from helpers import PHOTOS
from matplotlib.figure import Figure
from PIL import Image

from capgen_utils.common.files import CapGenError
from capgen_utils.decoding.captions import NextWord
from capgen_utils.show import plots
from capgen_utils.vision.preprocessing import Preprocessing

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
    figure = plots.show_images(
        [RED] * 3, ["short", "a title that is much too long for one line", ""], columns=2
    )
    titles = [ax.get_title() for ax in figure.axes]
    assert titles[0] == "short" and "\n" in titles[1]
    assert len(figure.axes) == 4 and not any(ax.axison for ax in figure.axes)
    assert [len(ax.get_images()) for ax in figure.axes] == [1, 1, 1, 0]


def test_titles_stay_inside_the_figure() -> None:
    figure = plots.show_images(
        [RED] * 4, ["one two three four five six seven eight nine ten " * 2] * 4, columns=2
    )
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
    assert (
        " ".join(text.get_text() for text in values.texts)
        == "1.00 1.00 0.00 1.00 1.00 0.00 0.00 0.00 1.00"
    )
    assert any(ax.get_ylabel() == "cosine similarity" for ax in figure.axes)


def test_intervals_are_drawn_around_values_beside_chance() -> None:
    rows = {"ours": {"A": (0.5, 0.4, 0.7), "B": (2.0, 1.0, 3.0)}, "theirs": {"A": (0.2, 0.1, 0.3)}}
    figure = plots.interval_bars(rows, xlabel="score", chance={"A": 0.25})
    left, right = figure.axes
    assert labelled_x(figure) == ["score\n(dashed: chance 0.25)", "score"]
    assert [ax.get_title() for ax in figure.axes] == ["A", "B"]
    assert [text.get_text() for text in left.texts] == ["0.50", "0.20"] and len(right.texts) == 1, (
        "a row may lack one"
    )
    ends = [segment[:, 0].tolist() for segment in left.collections[0].get_segments()]
    assert ends == [pytest.approx([0.4, 0.7]), pytest.approx([0.1, 0.3])]
    assert [line.get_xdata()[0] for line in left.get_lines() if line.get_linestyle() == "--"] == [
        0.25
    ]
    assert not any(line.get_linestyle() == "--" for line in right.get_lines())


def labelled_x(figure: Figure) -> list[str]:
    return [ax.get_xlabel() for ax in figure.axes]


def test_the_best_captions_stand_above_the_worst() -> None:
    figure = plots.best_and_worst(
        [RED] * 7, [f"caption {i}" for i in range(7)], [3, 9, 1, 5, 0, 8, 2], count=2
    )
    titles = [ax.get_title().replace("\n", " ") for ax in figure.axes]
    assert titles == [
        "score 9: caption 1",
        "score 8: caption 5",
        "score 1: caption 2",
        "score 0: caption 4",
    ]
    three = plots.best_and_worst([RED] * 3, list("abc"), [1, 2, 3], count=5, name="CIDEr-D")
    assert sorted(ax.get_title()[-1] for ax in three.axes if ax.get_title()) == ["a", "b", "c"], (
        "none comes twice"
    )
    with pytest.raises(CapGenError, match="do not belong together"):
        plots.best_and_worst([RED], ["a", "b"], [1])


def test_images_and_captions_that_say_the_same_lie_together_on_the_map() -> None:
    vectors = np.array([[4.0, 0, 0], [-4, 0, 0], [0, 3, 0], [0, -3, 0]])
    gap = np.array([0, 0, 9.0])  # as in CLIP, texts lie apart from images as a whole
    figure = plots.embedding_map(vectors, vectors + gap, [RED] * 4, list("abcd"))
    (ax,) = figure.axes
    images, words = (np.asarray(part.get_offsets()) for part in ax.collections)
    np.testing.assert_allclose(images, words, atol=1e-9)
    assert sorted(map(abs, images[:, 0])) == pytest.approx([0, 0, 4, 4]), "most variance first"
    assert "64%" in ax.get_xlabel() and "36%" in ax.get_ylabel()
    with pytest.raises(CapGenError, match="three images"):
        plots.embedding_map(vectors[:2], vectors, [RED] * 2, list("abcd"))


def test_the_fit_of_captions_has_a_row_a_caption_and_a_column_an_image() -> None:
    figure = plots.caption_similarity(
        [[0.9, 0.1, 0.2], [0.3, 0.8, 0.4]], [RED, RED], ["one", "two", "three"]
    )
    ax = figure.axes[0]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["one", "two", "three"]
    placed = {tuple(map(int, text.get_position())): text.get_text() for text in ax.texts}
    assert placed == {
        (0, 0): "0.90",
        (0, 1): "0.10",
        (0, 2): "0.20",
        (1, 0): "0.30",
        (1, 1): "0.80",
        (1, 2): "0.40",
    }
    with pytest.raises(CapGenError, match="do not belong"):
        plots.caption_similarity([[0.9]], [RED, RED], ["one"])


# --- attention


def peak(row: int, column: int, side: int = 7) -> np.ndarray:
    weights = np.full((side, side), 0.001, dtype=np.float32)
    weights[row, column] = 1
    return weights.reshape(-1)


@pytest.mark.parametrize("size", [(224, 224), (640, 427), (300, 500), (70, 70)])
@pytest.mark.parametrize("cell", [(0, 0), (3, 3), (1, 5), (6, 2), (6, 6)])
def test_a_peak_lands_in_its_cell_of_a_squashed_image(
    size: tuple[int, int], cell: tuple[int, int]
) -> None:
    light = plots.upsample(peak(*cell), size, Preprocessing(resize="squash"))
    width, height = size
    assert light.shape == (height, width)
    y, x = np.unravel_index(light.argmax(), light.shape)
    row, column = cell
    assert row * height / 7 <= y < (row + 1) * height / 7
    assert column * width / 7 <= x < (column + 1) * width / 7
    if (
        0 < row < 6 and 0 < column < 6
    ):  # inside, the light is symmetric around the middle of the cell
        ys, xs = np.indices(light.shape)
        weight = np.where(light > 0.1, light, 0)
        assert abs((ys * weight).sum() / weight.sum() + 0.5 - (row + 0.5) * height / 7) < 1
        assert abs((xs * weight).sum() / weight.sum() + 0.5 - (column + 0.5) * width / 7) < 1


def test_the_grid_of_a_cropped_image_covers_its_middle_only() -> None:
    light = plots.upsample(peak(0, 0), (300, 100), Preprocessing(resize="crop"))
    y, x = np.unravel_index(light.argmax(), light.shape)
    assert light.shape == (100, 300) and y < 15 and 100 <= x < 115
    assert not light[:, :100].any() and not light[:, 200:].any()


def test_attention_is_laid_over_the_grey_photograph_and_grows_brighter() -> None:
    shown = plots.overlay(Image.new("RGB", (70, 140), "white"), peak(2, 4)).astype(int)
    assert shown.shape == (140, 70, 3) and plots.overlay(RED, peak(0, 0)).dtype == np.uint8
    bright, dark = shown[50, 45], shown[120, 10]  # the middle of the cell, and a place far from it
    assert np.ptp(dark) < 12, "nearly grey where nothing is looked at"
    assert np.ptp(bright) > 60 and bright.sum() > dark.sum() + 100
    coloured = np.ptp(plots.overlay(PHOTO, np.zeros(49)).astype(int), axis=2)
    assert coloured.max() < 12, "a photograph that is not looked at has no colours"


def test_what_a_crop_has_cut_off_is_faded() -> None:
    shown = plots.overlay(
        Image.new("RGB", (300, 100), "black"), peak(3, 3), Preprocessing(resize="crop")
    )
    assert (
        shown[:, :100].min() > 150 and shown[:, 200:].min() > 150 and shown[0, 100:200].max() < 60
    )


def test_one_scale_serves_all_words() -> None:
    figure = plots.attention_panel(RED, ["a", "b"], np.stack([peak(3, 3), (peak(3, 3) + 1) / 50]))
    first, second = (ax.get_images()[0].get_array().astype(int) for ax in figure.axes[1:3])
    assert first[32, 32].sum() > second[32, 32].sum() + 100, (
        "the second map is nearly even, and looks it"
    )
    (bar,) = [ax for ax in figure.axes if ax.get_label() == "<colorbar>"]
    assert "1 = even" in bar.get_ylabel() and bar.get_ylim()[1] == pytest.approx(
        plots.scale_top(49 * np.stack([peak(3, 3), (peak(3, 3) + 1) / 50]))
    )
    assert plots.scale_top(np.ones((3, 49))) == 1.5, (
        "even maps are not blown up to look like something"
    )


def test_uniform_attention_draws_no_pattern() -> None:
    shown = plots.overlay(RED, np.full(49, 1 / 49))
    assert len(np.unique(shown.reshape(-1, 3), axis=0)) == 1
    plots.attention_panel(RED, ["a"], np.full((1, 49), 1 / 49)).draw_without_rendering()


def test_the_panel_has_the_image_and_one_picture_a_word_in_order() -> None:
    words = ["a", "red", "circle"]
    cells = [(0, 0), (3, 3), (6, 6)]
    figure = plots.attention_panel(
        PHOTO, words, np.stack([peak(*cell) for cell in cells]), columns=3
    )
    axes = [ax for ax in figure.axes if ax.get_label() != "<colorbar>"]
    assert [ax.get_title() for ax in axes] == ["the image", *words, "", ""]
    lit = [ax.get_images()[0].get_array().astype(float) for ax in axes[1:4]]
    height, width = lit[0].shape[:2]
    for number, (row, column) in enumerate(cells):
        y, x = int((row + 0.5) * height / 7), int((column + 0.5) * width / 7)
        assert int(np.argmax([np.ptp(picture[y, x]) for picture in lit])) == number, (
            "coloured where it looked"
        )


def test_a_step_shows_the_map_and_the_next_words() -> None:
    likely = [
        NextWord("dog", 0.6, False),
        NextWord("cat", 0.3, True),
        NextWord("(end)", 0.1, False),
    ]
    left, right, *_ = plots.attention_step(RED, peak(3, 3), 10, likely, "cat").axes
    assert left.get_title() == "cat"
    assert [label.get_text() for label in right.get_yticklabels()] == ["dog", "cat", "(end)"]
    assert [bar.get_width() for bar in right.patches] == pytest.approx([60, 30, 10])
    said, other = right.patches[1].get_facecolor(), right.patches[0].get_facecolor()
    assert said != other and right.get_xlabel()


def test_heads_are_averaged() -> None:
    weights = np.stack([np.stack([peak(0, 0), peak(6, 6)])])  # one word, two heads
    mean = weights.mean(1)
    pictures = [
        plots.attention_panel(RED, ["a"], w).axes[1].get_images()[0].get_array()
        for w in (weights, mean)
    ]
    assert np.array_equal(*pictures)


def test_words_and_weights_must_match() -> None:
    with pytest.raises(CapGenError, match="2 words"):
        plots.attention_panel(RED, ["a", "b"], peak(0, 0)[None])


def test_layers_are_rows_and_words_are_columns() -> None:
    weights = np.stack([peak(0, 0), peak(1, 1)])
    figure = plots.attention_layers(
        RED, ["a", "star"], {"layer0": weights, "layer1": weights[:, None]}
    )
    axes = [ax for ax in figure.axes if ax.get_label() != "<colorbar>"]
    assert [ax.get_title() for ax in axes] == ["a", "star", "", ""]
    assert [ax.get_ylabel() for ax in axes] == ["layer0", "", "layer1", ""]
    with pytest.raises(CapGenError, match="2 words"):
        plots.attention_layers(RED, ["a", "star"], {"layer0": weights[:1]})


# --- showing


def test_a_figure_is_displayed_with_its_text_and_photographs_take_little_space() -> None:
    from IPython.core.formatters import DisplayFormatter

    chart, _ = DisplayFormatter().format(plots.alt(plots.bars({"a": 1.0}, "x"), "one bar"))
    photo, metadata = DisplayFormatter().format(
        plots.alt(plots.show_images([PHOTO] * 6, columns=3, size=3), "a dune")
    )
    assert "image/png" in chart and "image/jpeg" in photo
    assert metadata["image/jpeg"]["alt"] == "a dune"
    assert len(photo["image/jpeg"]) < 250_000


def test_the_source_that_is_shown_is_the_source_that_runs() -> None:
    shown = plots.show_source(Preprocessing.__call__).data
    assert shown.startswith("`capgen_utils.vision.preprocessing`")
    assert "```python\ndef __call__(self" in shown and shown.endswith("```")


def test_figures_leave_no_trace_in_pyplot() -> None:
    import matplotlib.pyplot as plt

    before = plt.get_fignums()
    plots.bars({"a": 1.0}, "x")
    assert plt.get_fignums() == before
