"""``make bench``: measures extraction, training, decoding, scoring and the service.

The figures go to ``results/benchmarks.json``. Each part runs in a process of its own, so its peak
memory is its own. Times are the best of several runs.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from capgen_utils.common.device import choose_device, choose_dtype
from capgen_utils.common.files import CapGenError, write_json
from capgen_utils.common.machine import machine
from capgen_utils.data.datasets import load_dataset
from capgen_utils.presets import PRESETS

REPOSITORY = Path(__file__).resolve().parents[1]
DECODED = 256  # captioned images
STEPS = 40  # timed training steps


class PeakMemory:
    """Samples this process's anonymous memory, which excludes memory-mapped files."""

    def __init__(self) -> None:
        self.peak = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        process = psutil.Process()
        while not self._stop.wait(0.05):
            memory = process.memory_info()
            self.peak = max(self.peak, memory.rss - getattr(memory, "shared", 0))

    def __enter__(self) -> "PeakMemory":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()


def flickr8k_or_shapes(limit: int | None = None) -> Any:
    """Return Flickr8k if it is installed, else the drawn scenes; results name the dataset."""
    try:
        return load_dataset("flickr8k", limit=limit)
    except CapGenError:
        print("Flickr8k is not here: measuring on shapes; see `capgen download flickr8k`")
        return load_dataset("shapes", limit=limit)


def every_image() -> Any:
    """Return all images of the folder, even those in no split, as a manifest without captions."""
    from capgen_utils.data.manifest import Item, Manifest

    known = flickr8k_or_shapes()
    names = sorted(p.name for p in known.root.iterdir() if p.suffix.lower() in (".jpg", ".png"))
    return Manifest(known.name, known.root, tuple(Item(name, "all", ()) for name in names))


def bench_extraction() -> dict[str, Any]:
    """Images per second from image files to cached grid features, all images of the dataset."""
    from capgen_utils.vision.encoders import build_encoder
    from capgen_utils.vision.features import extract

    manifest = every_image()
    encoder = build_encoder("efficientnet_lite0")
    with tempfile.TemporaryDirectory(dir=REPOSITORY / "data") as folder:
        started = time.perf_counter()
        cache = extract(manifest, encoder, folder=Path(folder))
        seconds = time.perf_counter() - started
        size = cache.path.stat().st_size
    return {
        "dataset": manifest.name,
        "encoder": encoder.name,
        "images": len(manifest),
        "seconds": round(seconds, 1),
        "images_per_second": round(len(manifest) / seconds, 1),
        "cache_gigabytes": round(size / 1e9, 2),
        "dtype": str(choose_dtype(choose_device())).removeprefix("torch."),
    }


def bench_training() -> dict[str, Any]:
    """Steps, captions and tokens per second of the transformer on cached features."""
    from capgen_utils.training.batches import chunks_by_length, count_targets
    from capgen_utils.training.recipes import make_trainer, prepare

    manifest = flickr8k_or_shapes()
    preset = replace(PRESETS[manifest.name.split("-")[0]], flip=False)
    prepared = prepare(preset)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(prepared, "transformer", Path(folder))
        batches = trainer.batches()
        best, tokens, captions = float("inf"), 0, 0
        for number in range(STEPS):
            started = time.perf_counter()
            batch = next(batches)
            trainer._train_step(batch)
            seconds = time.perf_counter() - started
            if number and seconds < best:
                best, captions = seconds, len(batch.tokens)
                tokens = int(count_targets(chunks_by_length(batch, trainer.tokenizer.pad_id)))
    return {
        "dataset": manifest.name,
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "batch_images": trainer.config.batch_images,
        "seconds_per_step": round(best, 3),
        "captions_per_second": round(captions / best),
        "tokens_per_second": round(tokens / best),
        "dtype": str(choose_dtype(trainer.accelerator.device, trainer.config.dtype)).removeprefix(
            "torch."
        ),
    }


def bench_decoding() -> dict[str, Any]:
    """Captions per second of the shipped bundle on cached features, fp32, greedy and beam 5."""
    from capgen_utils.bundle import load_bundle
    from capgen_utils.captioner import DEFAULT_BUNDLE
    from capgen_utils.decoding.run import caption_manifest
    from capgen_utils.vision.features import extract

    bundle = load_bundle(DEFAULT_BUNDLE)
    part = flickr8k_or_shapes(limit=DECODED).split("test")
    device = choose_device()
    model = bundle.model.to(device)
    rates: dict[str, Any] = {"dataset": part.name, "images": len(part), "dtype": "float32"}
    with tempfile.TemporaryDirectory() as folder:
        encoder = bundle.build_encoder().to(device)
        cache = extract(part, encoder, folder=Path(folder), dtype=bundle.extraction_dtype)
        for beam in (1, 5):
            best = float("inf")
            for _ in range(3):
                started = time.perf_counter()
                caption_manifest(
                    model, part, cache, bundle.tokenizer, replace(bundle.decoding, beam=beam), 32
                )
                best = min(best, time.perf_counter() - started)
            rates[f"captions_per_second_beam_{beam}"] = round(len(part) / best, 1)
    return rates


def bench_library() -> dict[str, Any]:
    """Captions per second beside the library's ``generate``."""
    from benchmarks.decoding import bench_library

    return bench_library()


def bench_metrics() -> dict[str, Any]:
    """Seconds for all metrics, diversity and intervals of captions with five references each.

    The captions are human, each assigned to the image after its own. METEOR is timed separately, if
    WordNet is installed.
    """
    from capgen_utils.evaluation.metrics import (
        diversity,
        find_wordnet,
        meteor_nltk,
        score_with_intervals,
    )
    from capgen_utils.evaluation.metrics.resampling import RESAMPLES
    from capgen_utils.text.ptb import forget_words

    part = flickr8k_or_shapes().split("test")
    references = {item.image: list(item.captions) for item in part.items}
    following = {
        item.image: part.items[place - 1].captions[0] for place, item in enumerate(part.items)
    }
    reader = find_wordnet()

    def seconds(work: Callable[[], Any]) -> float:
        times = []
        for _ in range(3):
            forget_words()  # no caption is tokenised yet
            started = time.perf_counter()
            work()
            times.append(time.perf_counter() - started)
        return round(min(times), 2)

    return {
        "dataset": part.name,
        "images": len(part),
        "references": sum(map(len, references.values())),
        "resamples": RESAMPLES,
        "seconds": seconds(
            lambda: (score_with_intervals(following, references), diversity(following))
        ),
        "seconds_meteor": seconds(lambda: meteor_nltk(following, references, reader))
        if reader is not None
        else None,
    }


def bench_service() -> dict[str, Any]:
    """Rates, latencies and memory of ``capgen serve`` under load; wrong and lost answers."""
    from benchmarks.load import bench_service

    return bench_service()


PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "extraction": bench_extraction,
    "training": bench_training,
    "decoding": bench_decoding,
    "library": bench_library,
    "metrics": bench_metrics,
    "service": bench_service,
}


def run_part(name: str) -> None:
    """Run one part and print its figures as the last line of standard output."""
    with PeakMemory() as memory:
        figures = PARTS[name]()
    figures["peak_anonymous_gigabytes"] = round(memory.peak / 1e9, 2)
    print(json.dumps(figures))


def main() -> int:
    """Run all parts, or those named, and merge their figures into the results file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", help=f"any of {', '.join(PARTS)}; default: all")
    parser.add_argument("--output", type=Path, default=REPOSITORY / "results" / "benchmarks.json")
    parser.add_argument("--inside", choices=PARTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        run_part(options.inside)
        return 0
    unknown = sorted(set(options.parts) - set(PARTS))
    if unknown:
        parser.error(f"there is no part {unknown[0]!r}; choose from {', '.join(PARTS)}")
    results = (
        json.loads(options.output.read_text())
        if options.output.exists()
        else {"kind": "benchmarks"}
    )
    for name in options.parts or PARTS:
        print(f"== {name}")
        before = machine()  # the load before the part starts
        run = subprocess.run(
            [sys.executable, __file__, "--inside", name], stdout=subprocess.PIPE, text=True
        )
        if run.returncode:
            return run.returncode
        results[name] = json.loads(run.stdout.splitlines()[-1]) | {"machine": before}
        print(json.dumps(results[name], indent=2))
        write_json(options.output, results)
    print(f"written: {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
