"""Results files: complete, without private names, and reproducible from their captions."""

import json
import platform
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import CPU, ROOT, tiny_encoder, tiny_manifest, tiny_trainer
from results_rules import SCORES, attention_problems, prediction_problems, problems

from capgen_utils.bundle import load_bundle
from capgen_utils.captioner import Captioner
from capgen_utils.common.files import CapGenError, write_json
from capgen_utils.common.machine import machine, revision
from capgen_utils.config import DecodingConfig
from capgen_utils.data.datasets import load_dataset
from capgen_utils.evaluation.metrics import bleu, diversity, load_captions
from capgen_utils.evaluation.results import (
    Evaluation,
    evaluate,
    predictions_path,
    protocol,
    read_result,
    rescore,
    summary,
    write_predictions,
)
from capgen_utils.evaluation.scoring import scores, split_references
from capgen_utils.vision.encoder import Encoder
from capgen_utils.vision.features import extract

RESULTS = sorted((ROOT / "results").glob("**/*.json"))


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory: pytest.TempPathFactory) -> tuple[Evaluation, Path]:
    folder = tmp_path_factory.mktemp("evaluation")
    images = {"train": 10, "dev": 3, "test": 5}
    trainer = tiny_trainer(folder, epochs=1, images=images)
    trainer.train()
    manifest = tiny_manifest(folder / "images", **images)
    encoder: Encoder = trainer.encoder
    captioner = Captioner(load_bundle(folder / "run" / "bundle"), encoder, CPU)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CAPGEN_DATA", str(folder / "data"))
        extract(manifest, encoder, dtype=torch.float32, device=CPU)
        return evaluate(captioner, manifest, "test", beam=1, max_length=8), folder


def captioner_of(folder: Path) -> Captioner:
    """Return the trained captioner, with an encoder that no bundle can hold."""
    return Captioner(load_bundle(folder / "run" / "bundle"), tiny_encoder(), CPU)


def test_a_result_is_complete_without_host_names_and_paths(
    evaluation: tuple[Evaluation, Path],
) -> None:
    result = evaluation[0].result
    assert problems(result, platform.node()) == []
    assert result["protocol"]["images"] == result["protocol"]["images_in_split"] == 5
    assert result["protocol"]["references"] == sum(1 + n % 3 for n in range(13, 18))
    decoding = DecodingConfig(beam=1, max_length=8).to_json() | {"dtype": "float32"}
    assert result["protocol"]["decoding"] == decoding
    assert result["protocol"]["encoder"] == "tiny" and result["protocol"]["seed"] == 5
    assert json.loads(json.dumps(result)) == result


def test_the_rules_find_missing_parts() -> None:
    assert len(problems({})) > 20
    assert any("path" in p for p in problems({"x": "see /somewhere/else/file.txt"}))
    assert any("host" in p for p in problems({"x": "on bigbox17"}, "bigbox17"))


def test_scores_are_those_of_the_captions(evaluation: tuple[Evaluation, Path]) -> None:
    found, folder = evaluation
    manifest = tiny_manifest(folder / "images", train=10, dev=3, test=5)
    references = {item.image: item.captions for item in manifest.split("test").items}
    assert set(found.captions) == set(references)
    assert found.result["scores"]["BLEU-1"] == pytest.approx(
        bleu(found.captions, references)["BLEU-1"], abs=1e-3
    )


def test_captions_on_the_wrong_images_score_lower(evaluation: tuple[Evaluation, Path]) -> None:
    manifest = tiny_manifest(evaluation[1] / "images", train=10, dev=3, test=5)
    part = manifest.split("test")
    perfect = {item.image: item.captions[0] for item in part.items}
    found = scores(perfect, {item.image: item.captions for item in part.items}, manifest)
    assert found["BLEU-4"] == pytest.approx(100) and found["BLEU-4 on the wrong images"] < 80
    assert found["distinct"] == 5


def test_predictions_have_cocos_format(evaluation: tuple[Evaluation, Path], tmp_path: Path) -> None:
    write_predictions(tmp_path / "p.json", evaluation[0].captions)
    assert prediction_problems(tmp_path / "p.json") == []
    rows = json.loads((tmp_path / "p.json").read_text())
    assert {row["image_id"]: row["caption"] for row in rows} == evaluation[0].captions


def test_the_summary_shows_the_rules_beside_the_numbers(
    evaluation: tuple[Evaluation, Path],
) -> None:
    text = summary(evaluation[0].result)
    assert all(part in text for part in ("BLEU-4", "tiny", "5 images", "greedy", "corpus level"))
    assert all(
        row in text for row in ("constant caption", "random training caption", "nearest neighbour")
    )
    assert "WARNING: few references" in text


def test_the_cost_of_a_caption_is_measured(evaluation: tuple[Evaluation, Path]) -> None:
    spent = evaluation[0].result["cost"]
    assert spent["images"] == 5 and spent["decoding_ms"] > 0 and spent["encoding_ms"] > 0
    bundle = load_bundle(evaluation[1] / "run" / "bundle")
    values = [*bundle.model.parameters(), *bundle.model.buffers()]
    assert spent["captioner_megabytes"] == round(
        sum(v.numel() * v.element_size() for v in values) / 1e6, 1
    )
    assert evaluation[0].result["unfinished"] in range(6)


# --- scored again


@pytest.fixture
def stored(
    evaluation: tuple[Evaluation, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    monkeypatch.setenv("CAPGEN_DATA", str(evaluation[1] / "data"))
    write_json(tmp_path / "tiny.json", evaluation[0].result)
    write_predictions(predictions_path(tmp_path / "tiny.json"), evaluation[0].captions)
    return tmp_path / "tiny.json"


def test_rescoring_gives_the_same_scores_and_keeps_the_rest(
    stored: Path, evaluation: tuple[Evaluation, Path]
) -> None:
    manifest = tiny_manifest(evaluation[1] / "images", train=10, dev=3, test=5)
    before = evaluation[0].result
    again = rescore(stored, manifest)
    assert again.captions == evaluation[0].captions
    for part in (
        "scores",
        "intervals",
        "floors",
        "people",
        "warnings",
        "protocol",
        "training_run",
        "cost",
        "machine",
    ):
        assert again.result[part] == before[part], part
    assert set(again.result) == set(before) | {"rescored"} and set(again.result["rescored"]) == {
        "date",
        "revision",
    }
    assert "nearest neighbour" in again.result["floors"], (
        "the features of training were found without the encoder"
    )


def test_rescoring_adds_what_an_old_file_lacks(
    stored: Path, evaluation: tuple[Evaluation, Path]
) -> None:
    manifest = tiny_manifest(evaluation[1] / "images", train=10, dev=3, test=5)
    old = evaluation[0].result
    kept = {
        key: old[key]
        for key in old
        if key not in ("intervals", "floors", "people", "warnings", "findings")
    }
    write_json(stored, kept | {"scores": {"BLEU-4": 99.0}})
    assert rescore(stored, manifest).result["scores"] == old["scores"]


def test_rescoring_refuses_files_that_do_not_fit(
    stored: Path, evaluation: tuple[Evaluation, Path]
) -> None:
    manifest = tiny_manifest(evaluation[1] / "images", train=10, dev=3, test=5)
    with pytest.raises(CapGenError, match="not other"):
        rescore(stored, replace(manifest, name="other"))
    write_predictions(
        predictions_path(stored), evaluation[0].captions | {"strange.png": "a square"}
    )
    with pytest.raises(CapGenError, match=r"strange\.png"):
        rescore(stored, manifest)
    predictions_path(stored).unlink()
    with pytest.raises(CapGenError, match="cannot read"):
        rescore(stored, manifest)
    stored.write_text('{"kind": "benchmarks"}')
    with pytest.raises(CapGenError, match="does not hold the results"):
        read_result(stored)


def test_an_unknown_split_is_refused(evaluation: tuple[Evaluation, Path]) -> None:
    folder = evaluation[1]
    manifest = tiny_manifest(folder / "images", train=10, dev=3, test=5)
    with pytest.raises(CapGenError, match="validation"):
        evaluate(captioner_of(folder), manifest, "validation")


def test_a_part_of_a_split_shows_in_the_protocol(evaluation: tuple[Evaluation, Path]) -> None:
    manifest = tiny_manifest(evaluation[1] / "images", train=10, dev=3, test=5)
    said = protocol(captioner_of(evaluation[1]), manifest, "test", 1, DecodingConfig())
    assert (said["images"], said["images_in_split"]) == (1, 5)


def test_a_limit_is_named_beside_the_scores(
    evaluation: tuple[Evaluation, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = evaluation[1]
    monkeypatch.setenv("CAPGEN_DATA", str(folder / "data"))
    captioner = captioner_of(folder)
    manifest = tiny_manifest(folder / "images", train=10, dev=3, test=5)
    found = evaluate(captioner, manifest, "test", limit=2, beam=1, max_length=8).result
    assert (found["protocol"]["images"], found["protocol"]["images_in_split"]) == (2, 5)
    assert "only 2 of the split's 5" in found["warnings"]["subset"]
    seen = evaluate(captioner, manifest, "train", beam=1, max_length=8).result
    assert "10 of 10 images are training images" in seen["warnings"]["training images"]


def test_machine_and_revision() -> None:
    found = machine()
    assert platform.node() not in json.dumps(found) or len(platform.node()) < 4
    assert (
        found["versions"]["torch"] == torch.__version__
        or found["versions"]["torch"] in torch.__version__
    )
    assert revision() == "unknown" or len(revision().rstrip("+")) >= 7


EVALUATIONS = [path for path in RESULTS if predictions_path(path).is_file()]


@pytest.mark.parametrize("path", EVALUATIONS, ids=lambda p: p.stem)
def test_scores_in_the_repository_follow_from_the_captions(
    path: Path, request: pytest.FixtureRequest
) -> None:
    result = read_result(path)
    rules = result["protocol"]
    folder = request.getfixturevalue("flickr8k") if rules["dataset"] == "flickr8k" else None
    manifest = load_dataset(rules["dataset"], folder)
    captions = load_captions(predictions_path(path))
    found = scores(captions, split_references(captions, manifest, rules["split"]), manifest)
    assert found.keys() >= SCORES
    for name in found.keys() & result["scores"].keys():
        assert result["scores"][name] == pytest.approx(found[name], abs=1e-3), (
            f"{name}: capgen evaluate --rescore"
        )


@pytest.mark.parametrize("path", RESULTS, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_results_in_the_repository_are_complete(path: Path) -> None:
    if path.name.endswith("_predictions.json"):
        assert prediction_problems(path) == []
        return
    result = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(result, dict) and result.get("kind") == "evaluation":
        assert problems(result) == []
        assert result["protocol"]["images"] == result["protocol"]["images_in_split"], (
            "scores of a part of the split"
        )
        assert "+" not in result["protocol"]["revision"], "made from code that was not committed"
        predictions = load_captions(predictions_path(path))
        assert len(predictions) == result["protocol"]["images"]
        assert diversity(predictions)["distinct"] == result["scores"]["distinct"], (
            "captions and scores belong together"
        )
        assert result["people"], "people have captioned these images more than once"
    if isinstance(result, dict) and result.get("kind") == "attention":
        assert attention_problems(result) == []
        assert "+" not in result["protocol"]["revision"], "made from code that was not committed"
        assert path.stem == f"{result['protocol']['dataset']}_{result['model']}_attention"
        assert "pointing" in result or result["protocol"]["dataset"] != "shapes", (
            "the places of things are known"
        )


BARS = {
    "show_tell": 16,
    "attend_tell": 19,
    "transformer": 18,
    "clip_prefix": 14,
    "clip_gpt2": 18,
}  # BLEU-4, Flickr8k


@pytest.mark.parametrize("model", BARS)
def test_results_reach_the_promised_scores(model: str) -> None:
    drawn = read_result(ROOT / "results" / f"shapes_{model}.json")
    assert drawn["scores"]["true"] >= (0.90 if model == "clip_prefix" else 0.95)
    assert drawn["scores"]["true_shuffled"] <= 0.15 and drawn["training_run"]["minutes"] < 3
    assert (
        read_result(ROOT / "results" / f"flickr8k_{model}.json")["scores"]["BLEU-4"] >= BARS[model]
    )


def test_the_rules_for_attention_find_problems() -> None:
    paths = [path for path in RESULTS if path.name.endswith("_attention.json")]
    result = json.loads(paths[0].read_text(encoding="utf-8"))
    assert attention_problems(result) == []
    choice = next(iter(result["deletion"]))
    result["deletion"][choice]["over patch"]["more"] = 2
    del result["protocol"]["share"]
    result["model"] = ""
    result["training"] = {"run": "/" + "home/me/runs/a"}
    problems_found = " ".join(attention_problems(result))
    for part in ("protocol lacks share", "lacks model", "outside its interval", "holds the path"):
        assert part in problems_found
    assert len(attention_problems({})) > 20
