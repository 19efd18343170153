"""The contrastive losses of CLIP and the measures of a trained one (notebook 06)."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from capgen_utils.data.manifest import Manifest
from capgen_utils.text.twins import hard_negatives
from capgen_utils.vision.dual_encoder import DualEncoder
from capgen_utils.vision.features import FeatureCache

RANKS = (1, 5, 10)
SAMPLE = 512  # images that say what is usual in the stem's grid


# --- the loss and its measures


def info_nce(logits: Tensor, positive: Tensor) -> Tensor:
    """Return InfoNCE in both directions (arXiv 2103.00020, figure 3), where a row may have several
    right answers.

    Each image has to find its captions among all texts, and each caption its images among all
    images: cross-entropy against the right answers, each with an equal share. Where image i has
    text i alone, it is the library's loss.

    Args:
        logits: (B, M), cosines over the temperature.
        positive: (B, M), true where text m is a caption of image b. A text without any image is
            only a wrong answer.

    Returns:
        The mean of the two directions' means, in nats.
    """
    return (_find(logits, positive) + _find(logits.T, positive.T)) / 2


def _find(logits: Tensor, positive: Tensor) -> Tensor:
    answered = positive.any(1)
    shares = positive.float() / positive.sum(1, keepdim=True).clamp(min=1)
    losses = -(shares * logits.float().log_softmax(1)).sum(1)
    return losses[answered].mean()


def twin_loss(logits: Tensor, positive: Tensor, pairs: Tensor) -> Tensor:
    """Return the cross-entropy of choosing between a caption and its false twin, in nats, as a mean
    over all choices.

    Among hundreds of wrong answers the twin is one; here it is the only one.

    Args:
        logits: (B, M), cosines over the temperature.
        positive: (B, M), true where text m is a caption of image b.
        pairs: (P, 2), columns of a caption and of a twin.
    """
    caption, twin = pairs.unbind(1)
    chosen = positive[:, caption] & ~positive[:, twin]
    return (
        F.softplus(logits[:, twin] - logits[:, caption])[chosen].mean()
        if chosen.any()
        else logits.sum() * 0
    )


def recall(similarity: Tensor, positive: Tensor) -> dict[str, float]:
    """Return recall@1, @5 and @10 in both directions, in percent.

    A search succeeds at k where fewer than k wrong answers score as high as the best right one. A
    text that describes several images word for word is right for each of them.

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
    """Return the different captions of images, and which belong to which.

    Args:
        captions: of each image.
        dual: captions that its tokenizer reads alike are one text.

    Returns:
        M texts, and (images, M), true where text m is a caption of image i.
    """
    keys = {caption: tuple(dual.tokenizer.encode(caption)) for own in captions for caption in own}
    texts = {key: caption for caption, key in keys.items()}
    columns = {key: column for column, key in enumerate(texts)}
    positive = torch.zeros(len(captions), len(texts), dtype=torch.bool)
    for image, own in enumerate(captions):
        positive[image, [columns[keys[caption]] for caption in own]] = True
    return list(texts.values()), positive


def twin_accuracy(
    dual: DualEncoder, images: Tensor, captions: Sequence[Sequence[str]]
) -> dict[str, float]:
    """Say how often a caption fits its image better than its false twins do.

    Args:
        dual: the judge.
        images: vectors (B, E).
        captions: of each image.

    Returns:
        In percent: ``twins``, of all pairs of a caption and a twin; ``twins, all of an image``, of
            all images that
        have such pairs, those where every caption won against every twin. Empty where no caption
        has a twin.
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
    """Return ``recall`` and ``twin_accuracy`` of a split, all images of it at once, and ``score``,
    their mean.

    Args:
        dual: the dual encoder.
        manifest: one split.
        cache: its stem's grid, the plain view.
        batch_size: images that are encoded together.
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


# --- what is drawn
