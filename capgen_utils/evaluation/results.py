"""Results files: every score with the protocol and the machine behind it (notebook 09)."""

import datetime
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from capgen_utils.bundle import Bundle
from capgen_utils.captioner import Captioner
from capgen_utils.common.files import CapGenError, from_dict, read_json, write_json
from capgen_utils.common.machine import machine, revision
from capgen_utils.config import DecodingConfig
from capgen_utils.data.manifest import Manifest
from capgen_utils.decoding.captions import Caption
from capgen_utils.decoding.options import check_decoding, describe, with_options
from capgen_utils.decoding.run import decode_features
from capgen_utils.evaluation.metrics import clip_score, load_captions
from capgen_utils.evaluation.scoring import NEAREST, as_lines, assess, scores, split_references
from capgen_utils.vision.dual_encoder import DualEncoder
from capgen_utils.vision.features import encode_images, find_cache, find_features

BATCH = 64  # images that are captioned together
TIMED = 20  # images, one at a time


@dataclass(frozen=True)
class Evaluation:
    """Captions of a split, and the contents of the results file that scores them."""

    captions: dict[str, str]
    result: dict[str, Any]


def evaluate(
    captioner: Captioner,
    manifest: Manifest,
    split: str = "test",
    *,
    rerank: bool = False,
    judge: DualEncoder | None = None,
    limit: int | None = None,
    java: bool = False,
    **options: Any,
) -> Evaluation:
    """Caption a split and score the captions.

    Args:
        captioner: loaded from its bundle, so that the scores are those of what ships.
        manifest: the whole dataset; its cached training features are reused.
        split: ``dev`` or ``test``.
        rerank: let the captioner's CLIP choose the captions.
        judge: another CLIP, to measure with CLIPScore what re-ranking gained.
        limit: only the first images of the split; the result says so.
        java: compute METEOR 1.5 too.
        options: replace the captioner's decoding defaults, see ``Captioner.caption``.

    Raises:
        CapGenError: no such split; impossible decoding options; no CLIP to re-rank with.
    """
    decoding = with_options(captioner.decoding, rerank, **options)
    check_decoding(decoding, captioner.longest)
    part = manifest.split(split).limit(limit)
    dtype = captioner.bundle.extraction_dtype
    whole = find_cache(manifest, captioner.encoder, captioner.model.feature, dtype)
    reader = captioner.reading(part, whole)
    failed = reader.cache.failed if reader.cache is not None else {}
    names = [item.image for item in part.items if item.image not in failed]
    started = time.perf_counter()
    captioned: dict[str, Caption] = {}
    for start in tqdm(range(0, len(names), BATCH), desc="captioning", unit="batch"):
        batch = names[start : start + BATCH]
        captioned |= zip(batch, reader.caption(batch, rerank=rerank, **options), strict=True)
    seconds = time.perf_counter() - started
    captions = {name: caption.text for name, caption in captioned.items()}
    ended = {name: caption.ended for name, caption in captioned.items()}
    references = split_references(captions, manifest, split)
    rules = protocol(captioner, manifest, split, len(captions), decoding) | {
        "references": sum(map(len, references.values())),
        "chosen_by": reader.scorer.name if rerank else None,
        "temperatures": list(decoding.temperatures) or None,
    }
    result = {"kind": "evaluation"} | assess(captions, manifest, split, whole, ended, java)
    result["protocol"] = rules | result["protocol"]
    result["reranking"] = _reranking(reader, judge, captioned, references, manifest, rules)
    result["unfinished"] = len(captioned) - sum(ended.values())
    result["captions_per_second"] = round(len(captions) / seconds, 2)
    result["cost"] = _cost(reader, part, names[:TIMED], decoding)
    return Evaluation(captions, with_facts(result, captioner.bundle))


def _reranking(
    captioner: Captioner,
    judge: DualEncoder | None,
    captioned: Mapping[str, Caption],
    references: Mapping[str, Sequence[str]],
    manifest: Manifest,
    rules: Mapping[str, Any],
) -> dict[str, Any] | None:
    """Return what re-ranking changed, and the mean CLIPScores by a CLIP that chose nothing.

    Returns:
        ``None`` without re-ranking and without a ``judge``.
    """
    result: dict[str, Any] = {}
    texts = {"CLIPScore": {name: caption.text for name, caption in captioned.items()}}
    if rules["chosen_by"] is not None:
        first = {
            name: next(c.text for c in caption.candidates if c.rank == 0)
            for name, caption in captioned.items()
        }  # the captioner's own choices
        changed = sum(text != first[name] for name, text in texts["CLIPScore"].items())
        texts["CLIPScore without"] = first
        result = {
            "scorer": captioner.scorer.name,
            "scorer_weights": captioner.scorer.weights_hash(),
            "temperatures": rules["temperatures"],
            "candidates": max(len(caption.candidates) for caption in captioned.values()),
            "changed": round(changed / len(captioned), 4),
            "scores without": scores(first, references, manifest),
        }
    if judge is not None:
        names, judge = list(captioned), judge.to(captioner.device)
        batches = [names[start : start + BATCH] for start in range(0, len(names), BATCH)]
        images = torch.cat([captioner.clip_vectors(judge, batch) for batch in batches]).numpy()
        texts["CLIPScore of a human caption"] = {name: references[name][0] for name in names}
        result |= {"judge": judge.name, "judge_weights": judge.weights_hash()}
        for row, captions in texts.items():
            embedded = judge.embed_texts([captions[name] for name in names]).numpy()
            result[row] = round(float(clip_score(images, embedded).mean()), 4)
    return result or None


def protocol(
    captioner: Captioner, manifest: Manifest, split: str, images: int, decoding: DecodingConfig
) -> dict[str, Any]:
    """Return how the captions of ``images`` images were made; only equal ones can be compared."""
    stored = {name: value for name, value in asdict(decoding).items() if name != "temperatures"}
    info = captioner.bundle.info
    return {
        "dataset": manifest.name,
        "split": split,
        "images": images,
        "images_in_split": sum(item.split == split for item in manifest.items),
        "decoding": stored | {"dtype": "float32"},
        "encoder": captioner.encoder.name,
        "encoder_weights": info["encoder"]["weights_hash"],
        "feature": captioner.model.feature,
        "extraction_dtype": info["extraction_dtype"],
    }


def with_facts(result: dict[str, Any], bundle: Bundle) -> dict[str, Any]:
    """Return ``result`` with facts on the captioner, its training and this machine.

    Args:
        result: holds a ``protocol``, to which the seed and the revision of the code are added.
        bundle: the captioner.
    """
    info = bundle.info
    result["protocol"] |= {"seed": (info.get("training") or {}).get("seed"), "revision": revision()}
    return result | {
        "model": info["model"],
        "preset": info.get("preset"),
        "parameters": sum(p.numel() for p in bundle.model.parameters()),
        "training": info.get("training"),
        "training_run": info.get("training_run"),
        "pretraining_run": info["encoder"].get("training_run"),
        "date": _today(),
        "machine": machine(),
    }


def _today() -> str:
    return datetime.datetime.now(datetime.UTC).date().isoformat()


def predictions_path(path: Path) -> Path:
    """Return the file of captions that belongs to a results file, in the same folder."""
    return path.with_name(f"{path.stem}_predictions.json")


def read_result(path: Path) -> dict[str, Any]:
    """Read a results file.

    Raises:
        CapGenError: unreadable, or not the results of an evaluation.
    """
    result = read_json(path, "name a results file that `capgen evaluate` wrote")
    evaluation = isinstance(result, dict) and result.get("kind") == "evaluation"
    rules = result.get("protocol") if evaluation else None
    if not isinstance(rules, dict) or not {"dataset", "split", "encoder"} <= set(rules):
        raise CapGenError(
            f"{path} does not hold the results of an evaluation",
            "name one that `capgen evaluate` wrote",
        )
    return result


def rescore(path: Path, manifest: Manifest, java: bool = False) -> Evaluation:
    """Score the captions of a results file again, without decoding; the rest of it is kept.

    Args:
        path: the results file; its captions are in the same folder.
        manifest: the whole dataset.
        java: compute METEOR 1.5 too.

    Raises:
        CapGenError: a file is missing or damaged, or the captions belong to another dataset or
            split.
    """
    result, captions = read_result(path), load_captions(predictions_path(path))
    rules = result["protocol"]
    if manifest.name != rules["dataset"]:
        raise CapGenError(
            f"{path} is about {rules['dataset']}, not {manifest.name}",
            "name the folder of that dataset",
        )
    weights, dtype = rules.get("encoder_weights", ""), rules.get("extraction_dtype", "")
    features = find_features(manifest, rules["encoder"], weights, dtype, rules.get("feature"))
    scored = assess(captions, manifest, rules["split"], features, None, java)
    scored |= {
        "protocol": rules | scored["protocol"],
        "rescored": {"date": _today(), "revision": revision()},
    }
    return Evaluation(captions, result | scored)


def write_predictions(path: Path, captions: Mapping[str, str]) -> None:
    """Write captions in COCO's results format: a list of ``image_id`` and ``caption``."""
    write_json(
        path,
        [{"image_id": name, "caption": caption} for name, caption in sorted(captions.items())],
    )


def ways_of(rules: Mapping[str, Any]) -> str:
    """Return in words how the captions of a protocol were found."""
    stored = {name: value for name, value in rules["decoding"].items() if name != "dtype"}
    stored["temperatures"] = rules.get("temperatures") or ()
    words = describe(from_dict(DecodingConfig, stored))
    return f"{words}; re-ranked by {rules['chosen_by']}" if rules.get("chosen_by") else words


def summary(result: Mapping[str, Any]) -> str:
    """Return the scores as lines of text, with the protocol and the baselines."""
    rules, ends = result["protocol"], result["intervals"]
    lines = [
        f"{result['model']} on {rules['dataset']}/{rules['split']}: {rules['images']} images, "
        f"{rules['references']} references, encoder {rules['encoder']}"
    ]
    lines += as_lines((name, value, ends.get(name)) for name, value in result["scores"].items())
    lines.append(f"  {ways_of(rules)}; BLEU: {rules['BLEU']}; intervals: {rules['intervals']}")
    reranking = (result.get("reranking") or {}).items()
    lines += as_lines((name, value, None) for name, value in reranking if isinstance(value, float))
    baselines = list(result["floors"].items())
    if result["people"]:
        left = result["people"]["references"]
        baselines += [(f"a human against {left} others", result["people"]["human"])]
        baselines += [(f"the system against {left}", result["people"]["system"])]
    for name in ("BLEU-4", "CIDEr-D"):
        lines.append(f"baselines, in {name}:")
        lines += as_lines(
            (row, each["scores"][name], each["intervals"][name]) for row, each in baselines
        )
    if NEAREST not in result["floors"]:
        lines.append(f"  no {NEAREST}: the features of the training images are not cached")
    lines += [f"WARNING: {name}: {sentence}" for name, sentence in result["warnings"].items()]
    lines += [
        f"WARNING: {finding['name']}: {finding['text']}\n  -> {finding['remedy']}"
        for finding in result["findings"]
    ]
    return "\n".join(lines)


def _cost(
    captioner: Captioner, part: Manifest, names: Sequence[str], decoding: DecodingConfig
) -> dict[str, Any]:
    """Measure a captioner that reads cached features, one image at a time.

    Returns:
        ``decoding_ms``: median milliseconds from an image's features to its caption;
        ``encoding_ms``: from its file to its features; ``captioner_megabytes`` and
        ``encoder_megabytes``: of the weights in memory; on CUDA ``peak_megabytes``, the most that
        this process has allocated; ``images``: how many were timed.
    """
    encoder, dtype = captioner.encoder, captioner.bundle.extraction_dtype

    def decode_one(name: str) -> None:
        features, keys = captioner.see([name])
        decode_features(captioner.model, features, captioner.specials, decoding, keys)

    def milliseconds(work: Callable[[str], Any]) -> float:
        """Return the median of ``work`` per name, after one call to warm up."""
        work(names[0])
        times = []
        for name in names:
            started = time.perf_counter()
            work(name)
            times.append(time.perf_counter() - started)
        return round(1000 * statistics.median(times), 2)

    result = {
        "images": len(names),
        "decoding_ms": milliseconds(decode_one),
        "encoding_ms": milliseconds(lambda name: encode_images(encoder, [part.root / name], dtype)),
        "captioner_megabytes": _megabytes(captioner.model),
        "encoder_megabytes": _megabytes(encoder),
    }
    if torch.cuda.is_available():
        result["peak_megabytes"] = round(torch.cuda.max_memory_allocated() / 1e6, 1)
    return result


def _megabytes(module: torch.nn.Module) -> float:
    """Return the size of a module's parameters and buffers in memory, in 10**6 bytes."""
    tensors = [*module.parameters(), *module.buffers()]
    return round(sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 1e6, 1)
