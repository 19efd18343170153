"""Decode whole batches and manifests from encoder features (notebook 08)."""

import hashlib
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from capgen_utils.config import DecodingConfig
from capgen_utils.data.manifest import Manifest
from capgen_utils.decoding.captions import Hypothesis, Specials
from capgen_utils.decoding.search import Steps, _device, candidates, decode
from capgen_utils.text.words import Tokenizer
from capgen_utils.vision.features import FeatureCache

# --- around the engine


def image_key(content: bytes) -> int:
    """Return a number that stands for an image in ``decode``: a hash of its name or of its pixels."""
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "big")


@torch.inference_mode()
def word_attention(
    model: Steps, memory: Any, captions: Sequence[Sequence[int]], specials: Specials
) -> list[dict[str, Tensor]]:
    """Read finished captions again and return where the captioner looked when it said each word.

    Args:
        model: any captioner, in eval mode.
        memory: from its ``encode``; one image for each caption.
        captions: ids without start and end token.
        specials: token ids.

    Returns:
        For each caption the captioner's weights by name: (words, heads, N), on the CPU. Empty where
        it has none.
    """
    state = model.start(memory)
    device = _device(state)
    alive, looked = list(range(len(captions))), [dict[str, list[Tensor]]() for _ in captions]
    tokens = torch.full((len(captions),), specials.start, device=device)
    for position in range(
        max(1, *map(len, captions))
    ):  # reading one token, the model says the next
        _, state, weights = model.step(tokens, state, attention=True)
        for name, value in weights.items():
            for image, row in zip(alive, value.cpu(), strict=True):
                looked[image].setdefault(name, []).append(row)
        going = [row for row, image in enumerate(alive) if position + 1 < len(captions[image])]
        if not going:
            break
        state = (
            state.select(torch.tensor(going, device=device)) if len(going) < len(alive) else state
        )
        alive = [alive[row] for row in going]
        tokens = torch.tensor([captions[image][position] for image in alive], device=device)
    return [
        {name: torch.stack(rows)[: len(caption)] for name, rows in found.items()}
        for caption, found in zip(captions, looked, strict=True)
    ]


def decode_features(
    model: Any,
    features: Tensor,
    specials: Specials,
    config: DecodingConfig,
    dtype: torch.dtype = torch.float32,
    keys: Sequence[int] | None = None,
    temperatures: Sequence[float] | None = None,
) -> list[list[Hypothesis]]:
    """Encode ``features`` (B, ...) and find captions; fp32 unless asked otherwise.

    See ``decode``; where there are ``temperatures``, see ``candidates``.
    """
    device = next(model.parameters()).device
    reduced = dtype != torch.float32
    with (
        torch.inference_mode(),
        torch.autocast(device.type, dtype=dtype) if reduced else nullcontext(),
    ):
        memory = model.encode(features.to(device).float())
        if temperatures is not None:
            return candidates(model, memory, len(features), specials, config, temperatures, keys)
        return decode(model, memory, len(features), specials, config, keys)


def decode_manifest(
    model: Any,
    manifest: Manifest,
    cache: FeatureCache,
    tokenizer: Tokenizer,
    decoding: DecodingConfig,
    batch_size: int = 64,
    progress: bool = False,
    temperatures: Sequence[float] | None = None,
) -> dict[str, list[Hypothesis]]:
    """Find captions for every image of ``manifest`` from cached features: image -> hypotheses, see
    ``decode_features``.

    What is drawn for an image hangs on its name and the seed, not on the images around it.
    """
    specials = Specials.of(tokenizer)
    names = [item.image for item in manifest.items if item.image not in cache.failed]
    found: dict[str, list[Hypothesis]] = {}
    for start in tqdm(
        range(0, len(names), batch_size), desc="captioning", unit="batch", disable=not progress
    ):
        part = names[start : start + batch_size]
        keys = [image_key(name.encode()) for name in part]
        features = cache.rows(part)
        spoken = decode_features(
            model, features, specials, decoding, keys=keys, temperatures=temperatures
        )
        found |= zip(part, spoken, strict=True)
    return found


def caption_manifest(
    model: Any,
    manifest: Manifest,
    cache: FeatureCache,
    tokenizer: Tokenizer,
    decoding: DecodingConfig,
    batch_size: int = 64,
    progress: bool = False,
) -> dict[str, str]:
    """Caption every image of ``manifest`` from cached features: image -> best caption; see
    ``decode_manifest``."""
    found = decode_manifest(model, manifest, cache, tokenizer, decoding, batch_size, progress)
    return {name: tokenizer.decode(hypotheses[0].tokens) for name, hypotheses in found.items()}
