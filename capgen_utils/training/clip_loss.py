"""The contrastive losses of a CLIP and its retrieval measures (notebook 06)."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from capgen_utils.data.manifest import Manifest
from capgen_utils.text.twins import hard_negatives
from capgen_utils.vision.dual_encoder import DualEncoder
from capgen_utils.vision.features import FeatureCache

RANKS = (1, 5, 10)
SAMPLE = 512  # images for the statistics of the stem's grid


def info_nce(logits: Tensor, positive: Tensor) -> Tensor:
    """Return InfoNCE in both directions (arXiv 2103.00020, figure 3), with several positives.

    Each image has to find its captions among all texts, and each caption its images among all
    images: cross-entropy against the positives, each with an equal share. If text i is the only
    caption of image i, this is the library's loss.

    Args:
        logits: (B, M), cosines divided by the temperature.
        positive: (B, M), true where text m is a caption of image b. A text without an image is a
            negative for all images.

    Returns:
        The mean of the two directions' means, in nats.
    """
    return (_find(logits, positive) + _find(logits.T, positive.T)) / 2


def _find(logits: Tensor, positive: Tensor) -> Tensor:
    answered = positive.any(1)  # (B,)
    shares = positive.float() / positive.sum(1, keepdim=True).clamp(min=1)  # (B, M)
    losses = -(shares * logits.float().log_softmax(1)).sum(1)  # (B,)
    return losses[answered].mean()


def twin_loss(logits: Tensor, positive: Tensor, pairs: Tensor) -> Tensor:
    """Return the mean cross-entropy of choosing between a caption and its false twin, in nats.

    In ``info_nce`` the twin is one of hundreds of negatives; here it is the only one.

    Args:
        logits: (B, M), cosines divided by the temperature.
        positive: (B, M), true where text m is a caption of image b.
        pairs: (P, 2), columns of captions and of their twins.
    """
    caption, twin = pairs.unbind(1)  # (P,) each
    chosen = positive[:, caption] & ~positive[:, twin]  # (B, P)
    return (
        F.softplus(logits[:, twin] - logits[:, caption])[chosen].mean()
        if chosen.any()
        else logits.sum() * 0
    )


def recall(similarity: Tensor, positive: Tensor) -> dict[str, float]:
    """Return recall@1, @5 and @10 in both directions, in percent.

    A search succeeds at k if fewer than k wrong answers score as high as the best right one. A text
    that several images share is right for each of them.

    Args:
        similarity: (I, M) of images and texts.
        positive: (I, M), true where text m is a caption of image i.
    """
    result: dict[str, float] = {}
    for name, scores, right in (
        ("image to text", similarity, positive),
        ("text to image", similarity.T, positive.T),
    ):
        best = scores.masked_fill(~right, -torch.inf).max(1, keepdim=True).values
        wrong = ((scores >= best) & ~right).sum(1)[right.any(1)]
        result |= {f"{name} R@{k}": 100 * (wrong < k).float().mean().item() for k in RANKS}
    return result


def same_texts(captions: Sequence[Sequence[str]], dual: DualEncoder) -> tuple[list[str], Tensor]:
    """Return the distinct captions of images, and the images that each belongs to.

    Args:
        captions: of each image.
        dual: captions with the same token ids are one text.

    Returns:
        M texts, and (images, M), true where text m is a caption of image i.
    """
    keys = {text: tuple(dual.tokenizer.encode(text)) for texts in captions for text in texts}
    texts = {key: caption for caption, key in keys.items()}
    columns = {key: column for column, key in enumerate(texts)}
    positive = torch.zeros(len(captions), len(texts), dtype=torch.bool)
    for image, own in enumerate(captions):
        positive[image, [columns[keys[caption]] for caption in own]] = True
    return list(texts.values()), positive


def twin_accuracy(
    dual: DualEncoder, images: Tensor, captions: Sequence[Sequence[str]]
) -> dict[str, float]:
    """Return how often a caption fits its image better than its false twins.

    Args:
        dual: the dual encoder.
        images: vectors (B, E).
        captions: of each image.

    Returns:
        In percent: ``twins``, the pairs of caption and twin in which the caption wins; ``twins, all
        of an image``, the images with such pairs whose captions win all of them. Empty if no
        caption has a twin.
    """
    pairs = [
        (i, c, twin) for i, own in enumerate(captions) for c in own for twin in hard_negatives(c)
    ]
    if not pairs:
        return {}
    texts = {
        text: row
        for row, text in enumerate(dict.fromkeys(text for _, *both in pairs for text in both))
    }
    vectors = dual.embed_texts(list(texts))
    rows = torch.tensor([[i, texts[caption], texts[twin]] for i, caption, twin in pairs])
    true, false = ((images[rows[:, 0]] * vectors[rows[:, column]]).sum(1) for column in (1, 2))
    won = true > false
    lost = set(rows[~won, 0].tolist())
    judged = set(rows[:, 0].tolist())
    return {
        "twins": 100 * won.float().mean().item(),
        "twins, all of an image": 100 * (1 - len(lost) / len(judged)),
    }


def measure(
    dual: DualEncoder, manifest: Manifest, cache: FeatureCache, batch_size: int = 256
) -> dict[str, float]:
    """Return ``recall`` and ``twin_accuracy`` over a whole split, and their mean, ``score``.

    Args:
        dual: the dual encoder.
        manifest: one split.
        cache: the stem's grid of the plain view.
        batch_size: images encoded at once.
    """
    items = [item for item in manifest.items if item.image not in cache.failed and item.captions]
    parts = (items[start : start + batch_size] for start in range(0, len(items), batch_size))
    images = torch.cat(
        [dual.embed_grid(cache.rows([item.image for item in part])) for part in parts]
    )
    captions = [item.captions for item in items]
    texts, positive = same_texts(captions, dual)
    result = recall(dual.similarity(images, dual.embed_texts(texts)), positive)
    result["mean recall"] = sum(result.values()) / len(result)
    twins = twin_accuracy(dual, images, captions)
    result["score"] = (
        (result["mean recall"] + twins["twins"]) / 2 if twins else result["mean recall"]
    )
    return result | twins
