"""CLIPScore and RefCLIPScore of embeddings (Hessel et al. 2021, arXiv 2104.08718).

    CLIPScore(c, v)       = 2.5 max(cos(c, v), 0)
    RefCLIPScore(c, R, v) = harmonic mean of CLIPScore(c, v) and max(0, max over r in R cos(c, r))

The paper embeds "A photo depicts " + caption with CLIP ViT-B/32. With another dual encoder, or
without the prefix, state both beside the number: it cannot be compared with published ones.
Notebook 09 teaches it.
"""

from collections.abc import Sequence

import numpy as np

from capgen_utils.common.files import CapGenError

PREFIX = "A photo depicts "
WEIGHT = 2.5


def clip_score(images: np.ndarray, captions: np.ndarray) -> np.ndarray:
    """Return CLIPScore of each pair, times 100.

    Args:
        images: (N, E) embeddings; need not have length 1.
        captions: (N, E) embeddings of the captions, in the images' order.

    Returns:
        (N,), from 0 to 250.

    Raises:
        CapGenError: the shapes do not fit, or an embedding is zero or not finite.
    """
    if np.shape(images) != np.shape(captions):
        raise CapGenError(
            f"{np.shape(images)} image and {np.shape(captions)} caption embeddings do not pair up",
            "give one caption embedding for each image, from the same dual encoder",
        )
    return 100 * WEIGHT * np.maximum(0, (_unit(images) * _unit(captions)).sum(axis=1))


def ref_clip_score(
    images: np.ndarray, captions: np.ndarray, references: Sequence[np.ndarray]
) -> np.ndarray:
    """Return RefCLIPScore of each pair, times 100.

    Args:
        images: (N, E) embeddings.
        captions: (N, E) embeddings of the captions.
        references: for each image the embeddings (R, E) of its human captions.

    Returns:
        (N,).

    Raises:
        CapGenError: the shapes do not fit, or an embedding is zero or not finite.
    """
    with_image = clip_score(images, captions)  # (N,)
    shape = np.shape(images)
    if len(references) != shape[0] or any(np.shape(r)[1:] != shape[1:] for r in references):
        raise CapGenError(
            f"the embeddings of {len(references)} images' references do not fit those of "
            f"{shape[0]} captions",
            "give for each image an array (references, size) from the same dual encoder",
        )
    pairs = zip(references, _unit(captions), strict=True)
    closest = [max(0.0, float((_unit(texts) @ caption).max())) for texts, caption in pairs]
    with_references = 100 * np.array(closest)  # (N,)
    total = with_image + with_references
    both = 2 * with_image * with_references
    return np.divide(both, total, out=np.zeros(len(total)), where=total > 0)


def _unit(vectors: np.ndarray) -> np.ndarray:
    """Return vectors (N, E) with length 1."""
    array = np.asarray(vectors, dtype=np.float64)
    usable = array.ndim == 2 and array.size
    norms = np.linalg.norm(array, axis=-1, keepdims=True) if usable else np.zeros(1)  # (N, 1)
    if not np.isfinite(norms).all() or not (norms > 0).all():
        raise CapGenError(
            "an embedding is missing, zero or not finite",
            "embed every caption and every image again",
        )
    return np.asarray(array / norms)
