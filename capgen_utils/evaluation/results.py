"""Results files: every number with the protocol and the machine it came from."""

import datetime
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from capgen_utils.bundle import Bundle
from capgen_utils.common.device import choose_device
from capgen_utils.common.files import CapGenError, read_json, write_json
from capgen_utils.common.machine import machine, revision
from capgen_utils.config import DecodingConfig, from_dict
from capgen_utils.data.manifest import Manifest
from capgen_utils.decoding.captions import Hypothesis, Specials
from capgen_utils.decoding.options import check_decoding, describe, longest_caption
from capgen_utils.decoding.rerank import best_first, fit, image_vectors
from capgen_utils.decoding.run import decode_features, decode_manifest, image_key
from capgen_utils.evaluation.metrics import clip_score, load_captions
from capgen_utils.evaluation.scoring import NEAREST, as_lines, assess, scores, split_references
from capgen_utils.text.words import Tokenizer
from capgen_utils.vision.dual_encoder import DualEncoder
from capgen_utils.vision.encoder import Encoder
from capgen_utils.vision.features import (
    FeatureCache,
    encode_images,
    extract,
    find_cache,
    find_features,
)


@dataclass(frozen=True)
class Evaluation:
    """Captions of a split, and the results file that scores them."""

    captions: dict[str, str]
    result: dict[str, Any]


@dataclass(frozen=True)
class Choosing:
    """Who chooses among candidate captions, and who says whether that was good.

    Attributes:
        scorer: the CLIP that chooses; ``None`` takes the captioner's own first choice.
        temperatures: one candidate is drawn at each of these; ``None`` takes what the decoding
            finds.
        judge: another CLIP, which chose nothing.
    """

    scorer: DualEncoder | None = None
    temperatures: tuple[float, ...] | None = None
    judge: DualEncoder | None = None

    def describe(self) -> dict[str, Any]:
        """Return what a protocol says of it."""
        name = self.scorer.name if self.scorer is not None else None
        return {"chosen_by": name, "temperatures": self.temperatures}


def evaluate(
    bundle: Bundle,
    manifest: Manifest,
    split: str = "test",
    decoding: DecodingConfig | None = None,
    encoder_weights: Path | None = None,
    choosing: Choosing = Choosing(),
    limit: int | None = None,
    java: bool = False,
) -> Evaluation:
    """Caption a split with a bundle and score the captions.

    Args:
        bundle: loaded from its folder, so that what is scored is what ships.
        manifest: the whole dataset; features that training cached for it are used again.
        split: ``dev`` or ``test``.
        decoding: instead of the bundle's defaults.
        encoder_weights: a local weights file of the encoder.
        choosing: a CLIP that chooses among candidates, and another one that judges.
        limit: only the first images of the split; the result says so.
        java: compute METEOR 1.5 too.

    Raises:
        CapGenError: no such split; decoding that is not possible; the encoder's weights cannot be
            had.
    """
    decoding = check_decoding(decoding or bundle.decoding, longest_caption(bundle.model))
    sight = _Sight.of(bundle, manifest, manifest.split(split).limit(limit), encoder_weights)
    started = time.perf_counter()
    found = sight.caption(decoding, choosing.temperatures)
    candidates = {
        name: [bundle.tokenizer.decode(h.tokens) for h in spoken] for name, spoken in found.items()
    }
    captions = chosen(candidates, choosing.scorer, sight.vectors)
    seconds = time.perf_counter() - started
    ended = {
        name: found[name][candidates[name].index(caption)].ended
        for name, caption in captions.items()
    }
    result = {"kind": "evaluation"} | assess(captions, manifest, split, sight.whole, ended, java)
    references = split_references(captions, manifest, split)
    rules = (
        protocol(manifest, split, references, decoding)
        | choosing.describe()
        | sight_of(bundle, sight.encoder)
    )
    result["protocol"] = rules | result["protocol"]
    result["reranking"] = reranking(
        choosing, captions, candidates, references, manifest, sight.vectors
    )
    result["unfinished"] = sum(not done for done in ended.values())
    result["captions_per_second"] = round(len(captions) / seconds, 2)
    result["cost"] = sight.cost(decoding, choosing.temperatures)
    return Evaluation(captions, with_facts(result, bundle))


@dataclass(frozen=True)
class _Sight:
    """A captioner in front of images: all on one device, features extracted.

    Attributes:
        bundle: the captioner.
        encoder: its encoder.
        part: the images.
        cache: their features.
        whole: those of the whole dataset, where they have been extracted.
    """

    bundle: Bundle
    encoder: Encoder
    part: Manifest
    cache: FeatureCache
    whole: FeatureCache | None

    @classmethod
    def of(
        cls, bundle: Bundle, manifest: Manifest, part: Manifest, weights: Path | None
    ) -> "_Sight":
        """Extract what is missing; ``weights`` is a local weights file of the encoder."""
        device = choose_device()
        encoder = bundle.build_encoder(weights).to(device)
        bundle.model.to(device)
        output, dtype = bundle.model.feature, bundle.extraction_dtype
        whole = find_cache(manifest, encoder, output, dtype)
        return cls(
            bundle, encoder, part, whole or extract(part, encoder, output, dtype=dtype), whole
        )

    def caption(
        self, decoding: DecodingConfig, temperatures: Sequence[float] | None
    ) -> dict[str, list[Hypothesis]]:
        """Find captions of every image."""
        bundle = self.bundle
        return decode_manifest(
            bundle.model,
            self.part,
            self.cache,
            bundle.tokenizer,
            decoding,
            progress=True,
            temperatures=temperatures,
        )

    def vectors(self, clip: DualEncoder) -> torch.Tensor:
        """Return a CLIP's vectors (B, E) of the images."""
        bundle, names = (
            self.bundle,
            [item.image for item in self.part.items if item.image not in self.cache.failed],
        )
        clip = clip.to(choose_device())
        output, dtype = bundle.model.feature, bundle.extraction_dtype
        return image_vectors(clip, self.encoder, output, self.cache, self.part, names, dtype)

    def cost(
        self, decoding: DecodingConfig, temperatures: Sequence[float] | None
    ) -> dict[str, Any]:
        """Measure what a caption costs."""
        bundle, dtype = self.bundle, self.bundle.extraction_dtype
        return cost(
            bundle.model,
            self.encoder,
            self.part,
            self.cache,
            bundle.tokenizer,
            decoding,
            dtype,
            temperatures,
        )


def sight_of(bundle: Bundle, encoder: Encoder) -> dict[str, Any]:
    """Return what a protocol says of what a captioner sees: its encoder, and how features came from
    it."""
    return {
        "encoder": encoder.name,
        "encoder_weights": bundle.info["encoder"]["weights_hash"],
        "feature": bundle.model.feature,
        "extraction_dtype": bundle.info["extraction_dtype"],
    }


def with_facts(result: dict[str, Any], bundle: Bundle) -> dict[str, Any]:
    """Add what is known of the captioner, its training and this machine to ``result``, which holds
    a ``protocol``."""
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
    """Return where the captions lie that a results file scores: beside it."""
    return path.with_name(f"{path.stem}_predictions.json")


def read_result(path: Path) -> dict[str, Any]:
    """Read a results file.

    Raises:
        CapGenError: unreadable, or not the results of an evaluation.
    """
    result = read_json(path, "name a results file that `capgen evaluate` wrote")
    rules = (
        result.get("protocol")
        if isinstance(result, dict) and result.get("kind") == "evaluation"
        else None
    )
    if not isinstance(rules, dict) or not {"dataset", "split", "encoder"} <= set(rules):
        raise CapGenError(
            f"{path} does not hold the results of an evaluation",
            "name one that `capgen evaluate` wrote",
        )
    return result


def rescore(path: Path, manifest: Manifest, java: bool = False) -> Evaluation:
    """Score the captions beside a results file again; nothing is decoded, and what the file says
    else is kept.

    Args:
        path: the results file; its captions lie beside it.
        manifest: the whole dataset that they are of.
        java: compute METEOR 1.5 too.

    Raises:
        CapGenError: a file is missing or damaged, or the captions are not of this dataset and
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
    found = assess(captions, manifest, rules["split"], features, None, java)
    found["protocol"] = rules | found["protocol"]
    return Evaluation(
        captions, result | found | {"rescored": {"date": _today(), "revision": revision()}}
    )


def chosen(
    candidates: Mapping[str, Sequence[str]],
    scorer: DualEncoder | None,
    vectors: Callable[[DualEncoder], Any],
) -> dict[str, str]:
    """Return for each image the caption that ``scorer`` chooses; the first one where there is no
    scorer."""
    if scorer is None:
        return {name: texts[0] for name, texts in candidates.items()}
    fits = fit(scorer, vectors(scorer), list(candidates.values()))
    return {
        name: texts[best_first(own)[0]]
        for (name, texts), own in zip(candidates.items(), fits, strict=True)
    }


def reranking(
    choosing: Choosing,
    captions: Mapping[str, str],
    candidates: Mapping[str, Sequence[str]],
    references: Mapping[str, Any],
    manifest: Manifest,
    vectors: Callable[[DualEncoder], Any],
) -> dict[str, Any] | None:
    """Return what choosing changed: the scores of the first candidates, and what the judge says of
    both.

    Returns:
        ``None`` where nobody chose and nobody judged.
    """
    scorer, judge = choosing.scorer, choosing.judge
    first = {name: texts[0] for name, texts in candidates.items()}
    result: dict[str, Any] = {}
    if scorer is not None:
        result |= {"scorer": scorer.name, "scorer_weights": scorer.weights_hash()}
        result |= {
            "temperatures": choosing.temperatures,
            "candidates": max(map(len, candidates.values())),
        }
        result["changed"] = round(
            sum(captions[name] != first[name] for name in first) / len(first), 4
        )
        result["scores without"] = scores(first, references, manifest)
    if judge is not None:
        images = vectors(judge).numpy()
        sets = {"CLIPScore": captions} | (
            {"CLIPScore without": first} if scorer is not None else {}
        )
        sets["CLIPScore of a human caption"] = {name: references[name][0] for name in captions}
        result |= {"judge": judge.name, "judge_weights": judge.weights_hash()} | {
            name: round(
                float(
                    clip_score(images, judge.embed_texts([own[i] for i in captions]).numpy()).mean()
                ),
                4,
            )
            for name, own in sets.items()
        }
    return result or None


def protocol(
    manifest: Manifest, split: str, references: Mapping[str, Any], decoding: DecodingConfig
) -> dict[str, Any]:
    """Return how captions were made and what they are held against: both have to be equal to
    compare two scores."""
    whole = sum(item.split == split for item in manifest.items)
    return {
        "dataset": manifest.name,
        "split": split,
        "images": len(references),
        "images_in_split": whole,
        "references": sum(map(len, references.values())),
        "decoding": asdict(decoding) | {"dtype": "float32"},
    }


def write_predictions(path: Path, captions: Mapping[str, str]) -> None:
    """Write captions in COCO's results format: a list of ``image_id`` and ``caption``."""
    write_json(
        path, [{"image_id": name, "caption": caption} for name, caption in sorted(captions.items())]
    )


def ways_of(rules: Mapping[str, Any]) -> str:
    """Return in words how the captions of a protocol were found."""
    decoding = {key: value for key, value in rules["decoding"].items() if key != "dtype"}
    ways = describe(from_dict(DecodingConfig, decoding))
    if rules.get("temperatures"):
        ways = f"one caption drawn at each of the temperatures {', '.join(f'{t:g}' for t in rules['temperatures'])}"
    return f"{ways}; {rules['chosen_by']} chose" if rules.get("chosen_by") else ways


def summary(result: Mapping[str, Any]) -> str:
    """Return the scores as lines of text with the protocol beside them, and what they are held
    against."""
    rules, ends = result["protocol"], result["intervals"]
    lines = [
        f"{result['model']} on {rules['dataset']}/{rules['split']}: {rules['images']} images, "
        f"{rules['references']} references, encoder {rules['encoder']}"
    ]
    lines += as_lines((name, value, ends.get(name)) for name, value in result["scores"].items())
    lines.append(f"  {ways_of(rules)}; BLEU: {rules['BLEU']}; intervals: {rules['intervals']}")
    changed = (result.get("reranking") or {}).items()
    lines += as_lines((name, value, None) for name, value in changed if isinstance(value, float))
    for name in ("BLEU-4", "CIDEr-D"):
        lines.append(f"held against, in {name}:")
        lines += as_lines(
            (row, each["scores"][name], each["intervals"][name]) for row, each in _rows(result)
        )
    if NEAREST not in result["floors"]:
        lines.append(f"  no {NEAREST}: the features of the training images are not in the cache")
    lines += [f"WARNING: {name}: {sentence}" for name, sentence in result["warnings"].items()]
    lines += [
        f"WARNING: {one['name']}: {one['text']}\n  -> {one['remedy']}" for one in result["findings"]
    ]
    return "\n".join(lines)


def _rows(result: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Return what scores are held against: floors, people, and the system against as many
    references as people."""
    rows = list(result["floors"].items())
    if result["people"]:
        left = result["people"]["references"]
        rows += [(f"a human against {left} others", result["people"]["human"])]
        rows += [(f"the system against {left}", result["people"]["system"])]
    return rows


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
        ``decoding_ms``: median milliseconds from one image's features to its caption;
            ``encoding_ms``: the same from
        its file to its features; ``captioner_megabytes`` and ``encoder_megabytes``: of the weights
        as they are held in memory; on an accelerator ``peak_megabytes``, of all that this process
        had on it so far; ``images`` timed.
    """
    names = [item.image for item in manifest.items if item.image not in cache.failed][:TIMED]
    specials, paths = Specials.of(tokenizer), [manifest.root / name for name in names]

    def say(place: int) -> None:
        keys = [image_key(names[place].encode())]
        decode_features(
            model,
            cache.rows([names[place]]),
            specials,
            decoding,
            keys=keys,
            temperatures=temperatures,
        )

    return {
        "images": len(names),
        "decoding_ms": _median(say, len(names)),
        "encoding_ms": _median(
            lambda place: encode_images(encoder, [paths[place]], dtype), len(names)
        ),
        "captioner_megabytes": weights_megabytes(model),
        "encoder_megabytes": weights_megabytes(encoder),
    } | _peak()


def _median(work: Callable[[int], Any], count: int) -> float:
    """Return the median milliseconds of ``work(0)`` to ``work(count - 1)``, after a first call to
    warm up."""
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
