"""CLIP chooses among captions: the one whose vector is nearest to the image's comes first."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from capgen_utils.common.files import CapGenError
from capgen_utils.data.images import ImageLike
from capgen_utils.data.manifest import Manifest
from capgen_utils.decoding.options import DecodingOptions
from capgen_utils.decoding.search import TEMPERATURES
from capgen_utils.vision.dual_encoder import DualEncoder
from capgen_utils.vision.encoder import Encoder
from capgen_utils.vision.features import FeatureCache, extract, find_cache


def rerank(
    scorer: DualEncoder, images: Tensor | Sequence[ImageLike], captions: Sequence[Sequence[str]]
) -> list[list[tuple[str, float]]]:
    """Order the candidate captions of each image by how well they fit it.

    It takes strings, so it does not matter who said them.

    Args:
        scorer: a CLIP.
        images: photographs, or their vectors (B, E) by the same ``scorer``.
        captions: candidates for each image.

    Returns:
        For each image its captions with their score, best first: the cosine of image and caption.
            Equal ones stay in
        the order they came in.

    Raises:
        CapGenError: another number of images than of lists of captions, or an image cannot be read.
    """
    return [
        [(own[i], scores[i]) for i in best_first(scores)]
        for own, scores in zip(captions, fit(scorer, images, captions), strict=True)
    ]


def best_first(scores: Sequence[float]) -> list[int]:
    """Return the places of ``scores`` from the highest to the lowest; equal ones keep their order."""
    return sorted(range(len(scores)), key=lambda i: -scores[i])


def fit(
    scorer: DualEncoder, images: Tensor | Sequence[ImageLike], captions: Sequence[Sequence[str]]
) -> list[list[float]]:
    """Return the cosine of each image with each of its captions, in the order they came in.

    Raises:
        CapGenError: as ``rerank``.
    """
    if len(images) != len(captions):
        raise CapGenError(
            f"there are {len(images)} images and {len(captions)} lists of captions",
            "give each image its own list",
        )
    vectors = images if isinstance(images, Tensor) else scorer.embed_images(images)
    texts = {
        text: row
        for row, text in enumerate(dict.fromkeys(text for own in captions for text in own))
    }
    embedded = scorer.embed_texts(
        list(texts)
    )  # many candidates say the same: each text is read once
    return [
        scorer.similarity(
            vector[None], embedded[torch.tensor([texts[t] for t in own], dtype=torch.long)]
        )[0].tolist()
        for vector, own in zip(vectors.float().cpu(), captions, strict=True)
    ]


def temperatures_of(
    temperatures: Sequence[float] | None, options: DecodingOptions
) -> tuple[float, ...] | None:
    """Return at which temperatures the captions to choose from are drawn, one at each.

    Args:
        temperatures: as asked for; ``None`` for the usual ones.
        options: how captions are found.

    Returns:
        ``None`` where the options name a search or a number of samples: then those are chosen from.

    Raises:
        CapGenError: both are asked for.
    """
    finders = ("beam", "groups", "temperature", "samples", "candidates")
    given = [name for name in finders if options.get(name) is not None]
    if given and temperatures is not None:
        raise CapGenError(
            f"{given[0]} and temperatures both say how to find the captions to choose from",
            "ask for one of the two",
        )
    return None if given else tuple(TEMPERATURES if temperatures is None else temperatures)


def shared_sight(
    scorer: DualEncoder, encoder: Encoder, output: str
) -> Callable[[Tensor], Tensor] | None:
    """Return how a captioner's features become the scorer's vectors (B, E), so that no image is
    encoded twice.

    Args:
        scorer: a CLIP.
        encoder: the captioner's.
        output: which of its outputs the captioner reads.

    Returns:
        ``None`` where the scorer has to look at the images itself.
    """
    images = scorer.images
    if encoder.preprocessing != images.preprocessing:
        return None
    if output == "embedding" and encoder.weights_hash() == images.weights_hash():
        return Tensor.float
    if (
        output == "grid"
        and images.stem is not None
        and encoder.weights_hash() == images.stem.weights_hash()
    ):
        return scorer.embed_grid
    return None


def image_vectors(
    scorer: DualEncoder,
    encoder: Encoder,
    output: str,
    cache: FeatureCache,
    manifest: Manifest,
    names: Sequence[str],
    dtype: torch.dtype,
) -> Tensor:
    """Return the scorer's vectors (B, E) of images that have been encoded for a captioner.

    Args:
        scorer: a CLIP.
        encoder, output, cache: the captioner's, and its features of these images.
        manifest: holds these images; the scorer's features of it are cached where it has to look
            itself.
        names: the images.
        dtype: compute dtype of the encoders.

    Raises:
        CapGenError: an image cannot be read.
    """
    reads = shared_sight(scorer, encoder, output)
    if reads is None:
        images = scorer.images
        seen = find_cache(manifest, images, "embedding", dtype) or extract(
            manifest, images, "embedding", dtype=dtype
        )
        return seen.rows(names).float()
    parts = [names[start : start + 256] for start in range(0, len(names), 256)]
    return torch.cat([reads(cache.rows(part)).cpu() for part in parts])
