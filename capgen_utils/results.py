"""Results files: every number with the protocol and the machine it came from."""

import datetime
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from capgen_utils.checkpoint import Bundle
from capgen_utils.config import DecodingConfig, choose_device, from_dict
from capgen_utils.datasets import Manifest
from capgen_utils.decoding import check_decoding, decode_manifest, describe, longest_caption
from capgen_utils.dual_encoder import DualEncoder
from capgen_utils.features import extract, find_cache
from capgen_utils.files import write_json
from capgen_utils.machine import machine, revision
from capgen_utils.metrics import BLEU_PROTOCOL, bleu, clip_score, diversity
from capgen_utils.rerank import best_first, fit, image_vectors
from capgen_utils.shapes import judge, load_scenes, scenes_file


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
        temperatures: one candidate is drawn at each of these; ``None`` takes what the decoding finds.
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
) -> Evaluation:
    """Caption a split with a bundle and score the captions.

    Args:
        bundle: loaded from its folder, so that what is scored is what ships.
        manifest: the whole dataset; features that training cached for it are used again.
        split: ``dev`` or ``test``.
        decoding: instead of the bundle's defaults.
        encoder_weights: a local weights file of the encoder.
        choosing: a CLIP that chooses among candidates, and another one that judges.

    Raises:
        CapGenError: no such split; decoding that is not possible; the encoder's weights cannot be had.
    """
    decoding = check_decoding(decoding or bundle.decoding, longest_caption(bundle.model))
    part = manifest.split(split)
    device = choose_device()
    encoder = bundle.build_encoder(encoder_weights).to(device)
    output, dtype = bundle.model.feature, bundle.extraction_dtype
    cache = find_cache(manifest, encoder, output, dtype) or extract(part, encoder, output, dtype=dtype)
    model = bundle.model.to(device)
    started = time.perf_counter()
    found = decode_manifest(
        model, part, cache, bundle.tokenizer, decoding, progress=True, temperatures=choosing.temperatures
    )
    candidates = {name: [bundle.tokenizer.decode(h.tokens) for h in spoken] for name, spoken in found.items()}

    def vectors(clip: DualEncoder) -> Any:
        return image_vectors(clip.to(device), encoder, output, cache, part, list(candidates), dtype)

    captions = chosen(candidates, choosing.scorer, vectors)
    seconds = time.perf_counter() - started
    references = {item.image: item.captions for item in part.items if item.image in captions}
    result = {
        "kind": "evaluation",
        "scores": scores(captions, references, manifest),
        "reranking": reranking(choosing, captions, candidates, references, manifest, vectors),
        "protocol": protocol(manifest, split, references, decoding) | choosing.describe() | {"encoder": encoder.name},
        "captions_per_second": round(len(captions) / seconds, 2),
    }
    return Evaluation(captions, _with_facts(result, bundle))


def _with_facts(result: dict[str, Any], bundle: Bundle) -> dict[str, Any]:
    """Add what is known of the captioner, its training and this machine."""
    info = bundle.info
    result["protocol"] |= {
        "encoder_weights": info["encoder"]["weights_hash"],
        "extraction_dtype": info["extraction_dtype"],
        "seed": (info.get("training") or {}).get("seed"),
        "revision": revision(),
    }
    return result | {
        "model": info["model"],
        "preset": info.get("preset"),
        "parameters": sum(p.numel() for p in bundle.model.parameters()),
        "training": info.get("training"),
        "training_run": info.get("training_run"),
        "pretraining_run": info["encoder"].get("training_run"),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": machine(),
    }


def chosen(
    candidates: Mapping[str, Sequence[str]], scorer: DualEncoder | None, vectors: Callable[[DualEncoder], Any]
) -> dict[str, str]:
    """Return for each image the caption that ``scorer`` chooses; the first one where there is no scorer."""
    if scorer is None:
        return {name: texts[0] for name, texts in candidates.items()}
    fits = fit(scorer, vectors(scorer), list(candidates.values()))
    return {name: texts[best_first(own)[0]] for (name, texts), own in zip(candidates.items(), fits, strict=True)}


def reranking(
    choosing: Choosing,
    captions: Mapping[str, str],
    candidates: Mapping[str, Sequence[str]],
    references: Mapping[str, Any],
    manifest: Manifest,
    vectors: Callable[[DualEncoder], Any],
) -> dict[str, Any] | None:
    """Return what choosing changed: the scores of the first candidates, and what the judge says of both.

    Returns:
        ``None`` where nobody chose and nobody judged.
    """
    scorer, judge = choosing.scorer, choosing.judge
    first = {name: texts[0] for name, texts in candidates.items()}
    result: dict[str, Any] = {}
    if scorer is not None:
        result |= {"scorer": scorer.name, "scorer_weights": scorer.weights_hash()}
        result |= {"temperatures": choosing.temperatures, "candidates": max(map(len, candidates.values()))}
        result["changed"] = round(sum(captions[name] != first[name] for name in first) / len(first), 4)
        result["scores without"] = scores(first, references, manifest)
    if judge is not None:
        images = vectors(judge).numpy()
        sets = {"CLIPScore": captions} | ({"CLIPScore without": first} if scorer is not None else {})
        sets["CLIPScore of a human caption"] = {name: references[name][0] for name in captions}
        result |= {"judge": judge.name, "judge_weights": judge.weights_hash()} | {
            name: round(float(clip_score(images, judge.embed_texts([own[i] for i in captions]).numpy()).mean()), 4)
            for name, own in sets.items()
        }
    return result or None


def scores(captions: Mapping[str, str], references: Mapping[str, Any], manifest: Manifest) -> dict[str, float]:
    """Return BLEU, BLEU-4 of the same captions on the wrong images, diversity, and truth where scenes are known."""
    names = sorted(captions)
    wrong = {name: captions[names[(i + 1) % len(names)]] for i, name in enumerate(names)}
    result = bleu(captions, references)
    result["BLEU-4 on the wrong images"] = bleu(wrong, references)["BLEU-4"]
    result |= diversity(captions)
    if scenes_file(manifest.root).is_file():
        scenes = load_scenes(manifest.root)
        result |= judge(captions, {Path(name).name: scenes[Path(name).name] for name in captions})
    return {key: round(value, 4) for key, value in result.items()}


def protocol(manifest: Manifest, split: str, references: Mapping[str, Any], decoding: DecodingConfig) -> dict[str, Any]:
    """Return how a score was made: what has to be equal before two of them may be compared."""
    whole = sum(item.split == split for item in manifest.items)
    return {
        "dataset": manifest.name,
        "split": split,
        "images": len(references),
        "images_in_split": whole,
        "references": sum(map(len, references.values())),
        "BLEU": BLEU_PROTOCOL,
        "decoding": asdict(decoding) | {"dtype": "float32"},
    }


def write_predictions(path: Path, captions: Mapping[str, str]) -> None:
    """Write captions in COCO's results format: a list of ``image_id`` and ``caption``."""
    write_json(path, [{"image_id": name, "caption": caption} for name, caption in sorted(captions.items())])


def summary(result: Mapping[str, Any]) -> str:
    """Return the scores as lines of text with the protocol beside them."""
    rules = result["protocol"]
    lines = [f"{result['model']} on {rules['dataset']}/{rules['split']}: {rules['images']} images, "
             f"{rules['references']} references, encoder {rules['encoder']}"]  # fmt: skip
    lines += [f"  {name:28s} {value:10.2f}" for name, value in result["scores"].items()]
    decoding = {key: value for key, value in rules["decoding"].items() if key != "dtype"}
    ways = describe(from_dict(DecodingConfig, decoding))
    if rules.get("temperatures"):
        ways = f"one caption drawn at each of the temperatures {', '.join(f'{t:g}' for t in rules['temperatures'])}"
    chosen_by = f"; {rules['chosen_by']} chose" if rules.get("chosen_by") else ""
    lines.append(f"  {ways}{chosen_by}; BLEU: {rules['BLEU']}")
    for name, value in (result.get("reranking") or {}).items():
        if isinstance(value, float):
            lines.append(f"  {name:28s} {value:10.2f}")
    return "\n".join(lines)
