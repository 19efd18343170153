"""CLIPScore and RefCLIPScore by hand, and the embeddings that they refuse."""

import math

import numpy as np
import pytest

from capgen_utils.common.files import CapGenError
from capgen_utils.evaluation.metrics import (
    clip_score,
    ref_clip_score,
)


def test_clip_score_by_hand() -> None:
    images = np.array([[2.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    captions = np.array([[3.0, 3.0], [0.0, 5.0], [-1.0, 0.0]])
    assert clip_score(images, captions) == pytest.approx([250 * math.sqrt(0.5), 250, 0])


def test_ref_clip_score_is_the_harmonic_mean_with_the_closest_reference() -> None:
    images, captions = np.array([[1.0, 0.0], [1.0, 0.0]]), np.array([[0.6, 0.8], [0.6, 0.8]])
    references = [np.array([[0.0, 1.0], [-1.0, 0.0]]), np.array([[-0.6, -0.8]])]
    with_image, with_references = 2.5 * 0.6, 0.8
    expected = 100 * 2 * with_image * with_references / (with_image + with_references)
    assert ref_clip_score(images, captions, references) == pytest.approx([expected, 0])


@pytest.mark.parametrize(
    ("images", "captions"),
    [
        (np.ones((2, 3)), np.ones((3, 3))),
        (np.ones((2, 3)), np.zeros((2, 3))),
        (np.full((2, 3), np.nan), np.ones((2, 3))),
        (np.ones(3), np.ones(3)),
        (np.ones((0, 3)), np.ones((0, 3))),
    ],
)
def test_embeddings_that_do_not_fit_are_refused(images: np.ndarray, captions: np.ndarray) -> None:
    with pytest.raises(CapGenError):
        clip_score(images, captions)


@pytest.mark.parametrize(
    "references", [[np.ones((2, 3))], [np.ones((2, 4))] * 2, [np.ones((0, 3))] * 2]
)
def test_reference_embeddings_that_do_not_fit_are_refused(references: list[np.ndarray]) -> None:
    with pytest.raises(CapGenError):
        ref_clip_score(np.ones((2, 3)), np.ones((2, 3)), references)
