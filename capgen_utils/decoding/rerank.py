"""Re-ranking: CLIP chooses the caption that fits the image best (notebook 06)."""

from collections.abc import Callable, Sequence

from torch import Tensor

from capgen_utils.common.files import CapGenError
from capgen_utils.data.images import ImageLike
from capgen_utils.decoding.captions import best_first
from capgen_utils.vision.dual_encoder import DualEncoder
from capgen_utils.vision.encoder import Encoder


def rerank(
    scorer: DualEncoder, images: Tensor | Sequence[ImageLike], captions: Sequence[Sequence[str]]
) -> list[list[tuple[str, float]]]:
    """Order the candidate captions of each image by how well they fit it, whatever wrote them.

    Args:
        scorer: a CLIP.
        images: photographs, or their vectors (B, E) by the same ``scorer``.
        captions: candidates for each image.

    Returns:
        For each image its captions with their score, the cosine of image and caption, best first.
        Equal scores keep the order of the input.

    Raises:
        CapGenError: the numbers of images and of lists differ, or an image cannot be read.
    """
    return [
        [(texts[i], scores[i]) for i in best_first(scores)]
        for texts, scores in zip(captions, fit(scorer, images, captions), strict=True)
    ]


def fit(
    scorer: DualEncoder, images: Tensor | Sequence[ImageLike], captions: Sequence[Sequence[str]]
) -> list[list[float]]:
    """Return the cosine of each image with each of its captions, in the order of the input.

    Raises:
        CapGenError: as ``rerank``.
    """
    if len(images) != len(captions):
        raise CapGenError(
            f"there are {len(images)} images and {len(captions)} lists of captions",
            "pass one list of captions per image",
        )
    vectors = images if isinstance(images, Tensor) else scorer.embed_images(images)  # (B, E)
    # Candidates often agree: each text is embedded once.
    distinct = list(dict.fromkeys(text for texts in captions for text in texts))
    rows = {text: row for row, text in enumerate(distinct)}
    embedded = scorer.embed_texts(distinct)  # (distinct texts, E)
    return [
        scorer.similarity(vector[None], embedded[[rows[text] for text in texts]])[0].tolist()
        for vector, texts in zip(vectors.float().cpu(), captions, strict=True)
    ]


def shared_encoder(
    scorer: DualEncoder, encoder: Encoder, output: str
) -> Callable[[Tensor], Tensor] | None:
    """Return a function from a captioner's features to the scorer's vectors (B, E).

    With it, no image is encoded twice.

    Args:
        scorer: a CLIP.
        encoder: the captioner's.
        output: the encoder output that the captioner reads.

    Returns:
        ``None`` if the scorer has to encode the images itself.
    """
    images = scorer.images
    if encoder.preprocessing != images.preprocessing:
        return None
    weights = encoder.weights_hash()
    if output == "embedding" and weights == images.weights_hash():
        return Tensor.float
    if output == "grid" and images.stem is not None and weights == images.stem.weights_hash():
        return scorer.embed_grid
    return None
