"""``Captioner``: one image or many, of any kind; a bad one affects only itself."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import PHOTOS, save_tiny_bundle
from PIL import Image

from capgen_utils import Captioner
from capgen_utils.common.files import CapGenError
from capgen_utils.decoding.captions import Caption

PATHS = sorted(PHOTOS.glob("*.jpg"))[:5]


@pytest.fixture(scope="module")
def captioner(tmp_path_factory: pytest.TempPathFactory) -> Captioner:
    folder = tmp_path_factory.mktemp("captioner") / "bundle"
    save_tiny_bundle(folder)
    return Captioner.from_bundle(folder, "cpu")


def test_an_image_is_the_same_however_it_comes(captioner: Captioner) -> None:
    path = PATHS[0]
    with Image.open(path) as opened:
        image = opened.convert("RGB")
    forms: list[Any] = [path, str(path), image, np.asarray(image), np.asarray(image) / 255.0]
    said = [captioner.caption(form) for form in forms]
    assert all(len(captions) == 1 and captions[0] == said[0][0] for captions in said)
    assert [c.text for c in captioner.caption(forms)] == [said[0][0].text] * 5, (
        "also all of them in one list"
    )
    assert [c.text for c in captioner.caption(tuple(forms[:2]))] == [said[0][0].text] * 2


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str
)
def test_tensors_are_captioned_as_the_pictures_they_hold(
    captioner: Captioner, dtype: torch.dtype
) -> None:
    pixels = torch.from_numpy(
        np.random.default_rng(1).integers(0, 256, (3, 48, 80, 3), dtype=np.uint8)
    )
    batch = pixels.permute(0, 3, 1, 2).to(dtype)  # (B, 3, H, W), and not contiguous
    batch = batch / 255 if dtype.is_floating_point else batch
    # What 8 bits of bfloat16 hold of a number is what counts, also for the picture it is compared
    # with.
    shown = (batch.float() * 255).round().byte() if dtype.is_floating_point else batch
    pictures = [Image.fromarray(one.permute(1, 2, 0).numpy()) for one in shown]
    expected = captioner.caption(pictures, beam=3)
    assert captioner.caption(batch, beam=3) == expected
    assert captioner.caption(list(batch), beam=3) == expected, "a list of tensors"
    assert [c.text for c in captioner.caption(batch, beam=3, batch_size=2)] == [
        c.text for c in expected
    ]
    assert captioner.caption(batch[1], beam=3)[0].text == expected[1].text, "one alone"
    assert captioner.caption([pictures[0], batch[1]], beam=3)[1].text == expected[1].text, "mixed"
    assert (
        captioner.caption(batch.clone().requires_grad_(dtype.is_floating_point), beam=3) == expected
    )
    assert captioner.caption(batch[:0]) == []
    drawn = [captioner.caption(images, temperature=1.0, seed=4) for images in (batch, pictures)]
    assert drawn[0] == drawn[1]
    caption, looked = captioner.attention(batch[2])
    assert caption == captioner.attention(pictures[2])[0] and looked


@pytest.mark.parametrize(
    ("tensor", "remedy"),
    [
        (torch.zeros(8, 8, 3), "channels first"),
        (torch.zeros(2, 8, 8, 3), "channels first"),
        (torch.zeros(8, 8), "first"),
        (torch.zeros(1, 8, 8), "channels first"),
        (torch.zeros(1, 1, 3, 8, 8), "first"),
        (torch.zeros(()), "first"),
        (torch.full((3, 8, 8), 200.0), "divide by 255"),
        (torch.full((3, 8, 8), -0.1), "divide"),
        (torch.full((3, 8, 8), torch.nan), "divide"),
        (torch.zeros(3, 8, 8, dtype=torch.int64), "uint8"),
        (torch.zeros(3, 0, 8, dtype=torch.uint8), "pass"),
        (torch.zeros(3, 8, 8, dtype=torch.bool), "uint8"),
    ],
    ids=lambda value: str(tuple(value.shape)) if isinstance(value, torch.Tensor) else None,
)
def test_tensors_that_are_no_images_are_refused(
    captioner: Captioner, tensor: torch.Tensor, remedy: str
) -> None:
    with pytest.raises(CapGenError) as error:
        captioner.caption(tensor)
    assert remedy in error.value.remedy


@pytest.mark.parametrize("batch_size", [1, 2, 5, 100])
def test_the_batch_size_changes_nothing(captioner: Captioner, batch_size: int) -> None:
    texts = [c.text for c in captioner.caption(PATHS, batch_size=batch_size)]
    assert texts == [captioner.caption(path)[0].text for path in PATHS]


def test_a_caption_says_how_sure_it_is_and_what_else_was_considered(captioner: Captioner) -> None:
    for caption in captioner.caption(PATHS, beam=3):
        assert isinstance(caption, Caption) and caption.text == " ".join(caption.words)
        assert caption.log_probability < 0
        assert 1 <= len(caption.candidates) <= 3 and caption.candidates[0].text == caption.text
        scores = [c.score for c in caption.candidates]
        assert scores == sorted(scores, reverse=True)
        assert not {"<unk>", "<start>", "<pad>", "<end>"} & set(caption.words)


def test_options_replace_the_bundles_own(captioner: Captioner) -> None:
    assert len(captioner.caption(PATHS[0])[0].candidates) == 2, "the bundle's own beam"
    assert len(captioner.caption(PATHS[0], beam=1)[0].candidates) == 1
    short = captioner.caption(PATHS, max_length=2)
    assert all(len(c.words) <= 2 for c in short)
    assert all(c.ended or len(c.words) == 2 for c in short)


@pytest.mark.parametrize(
    "options", [{"temperature": 1.0}, {"top_p": 0.8, "temperature": 1.5, "candidates": 3}]
)
def test_what_is_drawn_hangs_on_the_image_and_the_seed(
    captioner: Captioner, options: dict[str, Any]
) -> None:
    drawn = captioner.caption(PATHS, **options)
    assert all(len(c.candidates) == options.get("candidates", 1) for c in drawn)
    assert {c.temperature for caption in drawn for c in caption.candidates} == {
        options["temperature"]
    }
    reversed_pairs = captioner.caption(PATHS[::-1], batch_size=2, **options)[::-1]
    assert [c.text for c in reversed_pairs] == [c.text for c in drawn], (
        "in another order, in other batches"
    )
    with Image.open(PATHS[1]) as opened:
        assert captioner.caption(opened.convert("RGB"), **options)[0].text == drawn[1].text, (
            "alone, and no file"
        )
    assert captioner.attention(PATHS[1], **options)[0].text == drawn[1].text
    others = [
        [c.text for c in captioner.caption(PATHS, seed=seed, **options)] for seed in (1, 2, 3)
    ]
    assert any(texts != [c.text for c in drawn] for texts in others)


def test_groups_give_candidates_that_differ(captioner: Captioner) -> None:
    for caption in captioner.caption(PATHS, groups=3, diversity=3.0, min_length=3):
        assert 2 <= len({c.text for c in caption.candidates}) == len(caption.candidates) <= 3
    assert all(len(c.words) >= 4 for c in captioner.caption(PATHS, min_length=4))
    for caption in captioner.caption(PATHS, no_repeat_ngram=1):
        assert len(set(caption.words)) == len(caption.words)


@pytest.mark.parametrize(
    "options",
    [
        {"beam": 0},
        {"beam": -1},
        {"top_p": 0.0},
        {"temperature": -1.0},
        {"groups": 0},
        {"beam": 4, "temperature": 1.0},
        {"min_length": 8},
        {"seed": -1},
        {"beam": 10**9},
        {"max_length": 0},
        {"max_length": -2},
        {"max_length": 10**6},
        {"max_length": 16},
    ],
    ids=str,
)
def test_impossible_options_are_refused(captioner: Captioner, options: dict) -> None:
    with pytest.raises(CapGenError) as error:
        captioner.caption(PATHS[0], **options)
    assert error.value.remedy


def test_nothing_gives_nothing(captioner: Captioner) -> None:
    assert captioner.caption([]) == []
    assert list(captioner.caption_each([])) == []


def test_a_bad_image_is_named(captioner: Captioner, tmp_path: Path) -> None:
    (tmp_path / "bad.jpg").write_text("no image")
    for images in (tmp_path / "bad.jpg", [PATHS[0], tmp_path / "bad.jpg"], [tmp_path / "gone.jpg"]):
        with pytest.raises(CapGenError, match=r"(bad|gone)\.jpg"):
            captioner.caption(images)


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_a_bad_image_among_many_spoils_only_itself(
    captioner: Captioner, tmp_path: Path, batch_size: int
) -> None:
    (tmp_path / "bad.jpg").write_text("no image")
    paths = [PATHS[0], tmp_path / "bad.jpg", PATHS[1], tmp_path / "gone.jpg", PATHS[2]]
    results = list(captioner.caption_each(paths, batch_size=batch_size))
    assert [path for path, _ in results] == paths
    assert [isinstance(result, CapGenError) for _, result in results] == [
        False,
        True,
        False,
        True,
        False,
    ]
    for path, result in results:
        if isinstance(result, CapGenError):
            assert path.name in result.problem
        else:
            assert result.text == captioner.caption(path)[0].text


def test_many_images_are_captioned_as_they_are_asked_for(
    captioner: Captioner, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[int] = []
    real = captioner._caption_batch
    monkeypatch.setattr(
        captioner,
        "_caption_batch",
        lambda images, *a: batches.append(len(images)) or real(images, *a),
    )
    first = list(itertools.islice(captioner.caption_each(PATHS, batch_size=2), 1))
    assert len(first) == 1 and batches == [2], "the other batches wait until they are asked for"


def test_an_unknown_device_is_refused(tmp_path: Path) -> None:
    save_tiny_bundle(tmp_path / "b")
    with pytest.raises(CapGenError, match="device"):
        Captioner.from_bundle(tmp_path / "b", "abacus")


def test_attention_says_where_each_word_came_from(captioner: Captioner) -> None:
    image = np.random.default_rng(5).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    caption, looked = captioner.attention(image)
    assert caption == captioner.caption(image)[0]
    assert len(looked) == captioner.model.config.n_decode
    for weights in looked.values():
        cells = captioner.encoder.outputs["grid"][0]
        assert weights.shape == (len(caption.words), captioner.model.config.n_head, cells)
        assert torch.allclose(weights.sum(-1), torch.ones(weights.shape[:2]), atol=1e-5)
