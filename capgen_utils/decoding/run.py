"""Decode whole batches and manifests from encoder features (notebook 08)."""

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from capgen_utils.config import DecodingConfig
from capgen_utils.data.manifest import Manifest
from capgen_utils.decoding.captions import Hypothesis, Specials
from capgen_utils.decoding.search import Steps, decode, device_of
from capgen_utils.text.words import Tokenizer
from capgen_utils.vision.features import FeatureCache


def image_key(content: bytes) -> int:
    """Return an image's key for ``decode``: a hash of its name or of its pixels."""
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "big")


@torch.inference_mode()
def word_attention(
    model: Steps, memory: Any, captions: Sequence[Sequence[int]], specials: Specials
) -> list[dict[str, Tensor]]:
    """Read finished captions again and return where the captioner looked for each word.

    Args:
        model: a captioner, in eval mode.
        memory: from its ``encode``; one image per caption.
        captions: ids without start and end token.
        specials: token ids.

    Returns:
        For each caption the weights by layer name: (words, heads, N), on the CPU. Empty for a
        captioner without attention.
    """
    state = model.start(memory)
    device = device_of(state)
    alive, looked = list(range(len(captions))), [dict[str, list[Tensor]]() for _ in captions]
    tokens = torch.full((len(captions),), specials.start, device=device)  # (M,)
    # Reading token t, the model predicts token t + 1: its attention belongs to that one.
    for position in range(max(1, *map(len, captions))):
        _, state, weights = model.step(tokens, state, attention=True)  # name -> (M, heads, N)
        for name, value in weights.items():
            for image, row in zip(alive, value.cpu(), strict=True):
                looked[image].setdefault(name, []).append(row)
        going = [row for row, image in enumerate(alive) if position + 1 < len(captions[image])]
        if not going:
            break
        if len(going) < len(alive):
            state = state.select(torch.tensor(going, device=device))
            alive = [alive[row] for row in going]
        tokens = torch.tensor([captions[image][position] for image in alive], device=device)
    return [
        {name: torch.stack(rows)[: len(caption)] for name, rows in by_name.items()}
        for caption, by_name in zip(captions, looked, strict=True)
    ]


def encode_features(model: Any, features: Tensor) -> Any:
    """Return the captioner's memory of B images from their features (B, ...), in fp32."""
    with torch.inference_mode():
        return model.encode(features.to(next(model.parameters()).device).float())


def decode_features(
    model: Any,
    features: Tensor,
    specials: Specials,
    config: DecodingConfig,
    keys: Sequence[int] | None = None,
) -> list[list[Hypothesis]]:
    """Return hypotheses per image from encoder features (B, ...); see ``decode``."""
    return decode(model, encode_features(model, features), len(features), specials, config, keys)


def decode_manifest(
    model: Any,
    manifest: Manifest,
    cache: FeatureCache,
    tokenizer: Tokenizer,
    decoding: DecodingConfig,
    batch_size: int = 64,
    progress: bool = False,
) -> dict[str, list[Hypothesis]]:
    """Return hypotheses by image name, from cached features of ``manifest``; see ``decode``.

    Samples depend on the image's name and the seed, not on the other images of the batch.
    """
    specials = Specials.of(tokenizer)
    names = [item.image for item in manifest.items if item.image not in cache.failed]
    hypotheses: dict[str, list[Hypothesis]] = {}
    starts = range(0, len(names), batch_size)
    for start in tqdm(starts, desc="captioning", unit="batch", disable=not progress):
        batch = names[start : start + batch_size]
        keys = [image_key(name.encode()) for name in batch]
        decoded = decode_features(model, cache.rows(batch), specials, decoding, keys)
        hypotheses |= zip(batch, decoded, strict=True)
    return hypotheses


def caption_manifest(
    model: Any,
    manifest: Manifest,
    cache: FeatureCache,
    tokenizer: Tokenizer,
    decoding: DecodingConfig,
    batch_size: int = 64,
    progress: bool = False,
) -> dict[str, str]:
    """Return the best caption by image name; see ``decode_manifest``."""
    hypotheses = decode_manifest(model, manifest, cache, tokenizer, decoding, batch_size, progress)
    return {name: tokenizer.decode(best.tokens) for name, (best, *_) in hypotheses.items()}
