"""What a captioner costs: milliseconds for a caption, and bytes of weights."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from capgen_utils.config import DecodingConfig
from capgen_utils.datasets import Manifest
from capgen_utils.decoding import Specials, decode_features, image_key
from capgen_utils.encoders import Encoder
from capgen_utils.features import FeatureCache, encode_images
from capgen_utils.text import Tokenizer

TIMED = 20  # images, each of them alone


def cost(
    model: Any,
    encoder: Encoder,
    manifest: Manifest,
    cache: FeatureCache,
    tokenizer: Tokenizer,
    decoding: DecodingConfig,
    dtype: torch.dtype,
    temperatures: Sequence[float] | None = None,
) -> dict[str, Any]:
    """Measure a captioner on some images of ``manifest``, one at a time.

    Args:
        model: a captioner, on its device.
        encoder: on the same device.
        manifest: the images.
        cache: their features.
        tokenizer: of the captions.
        decoding, temperatures: how captions are found.
        dtype: compute dtype of the encoder; captions are found in fp32.

    Returns:
        ``decoding_ms``: median milliseconds from one image's features to its caption; ``encoding_ms``: the same from
        its file to its features; ``captioner_megabytes`` and ``encoder_megabytes``: of the weights as they are held in
        memory; on an accelerator ``peak_megabytes``, of all that this process had on it so far; ``images`` timed.
    """
    names = [item.image for item in manifest.items if item.image not in cache.failed][:TIMED]
    specials, paths = Specials.of(tokenizer), [manifest.root / name for name in names]

    def say(place: int) -> None:
        keys = [image_key(names[place].encode())]
        decode_features(model, cache.rows([names[place]]), specials, decoding, keys=keys, temperatures=temperatures)

    return {
        "images": len(names),
        "decoding_ms": _median(say, len(names)),
        "encoding_ms": _median(lambda place: encode_images(encoder, [paths[place]], dtype), len(names)),
        "captioner_megabytes": weights_megabytes(model),
        "encoder_megabytes": weights_megabytes(encoder),
    } | _peak()


def _median(work: Callable[[int], Any], count: int) -> float:
    """Return the median milliseconds of ``work(0)`` to ``work(count - 1)``, after a first call to warm up."""
    work(0)
    times = []
    for place in range(count):
        started = time.perf_counter()
        work(place)
        times.append(time.perf_counter() - started)
    return round(1000 * statistics.median(times), 2)


def weights_megabytes(module: torch.nn.Module) -> float:
    """Return the size of a module's parameters and buffers in memory, in units of a million bytes."""
    tensors = [*module.parameters(), *module.buffers()]
    return round(sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 1e6, 1)


def _peak() -> dict[str, float]:
    if not torch.cuda.is_available():
        return {}
    return {"peak_megabytes": round(torch.cuda.max_memory_allocated() / 1e6, 1)}
