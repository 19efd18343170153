"""Results: complete, without a word about the machine's owner, and the same numbers when they are computed again."""

import json
import platform
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from helpers import CPU, ROOT, tiny_manifest, tiny_trainer
from results_rules import prediction_problems, problems

from capgen_utils.checkpoint import load_bundle
from capgen_utils.config import DecodingConfig
from capgen_utils.encoders import Encoder
from capgen_utils.features import extract
from capgen_utils.files import CapGenError
from capgen_utils.machine import machine, revision
from capgen_utils.metrics import bleu
from capgen_utils.results import Evaluation, evaluate, protocol, scores, summary, write_predictions

RESULTS = sorted((ROOT / "results").glob("**/*.json"))


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory: pytest.TempPathFactory) -> tuple[Evaluation, Path]:
    folder = tmp_path_factory.mktemp("evaluation")
    images = {"train": 10, "dev": 3, "test": 5}
    trainer = tiny_trainer(folder, epochs=1, images=images)
    trainer.train()
    bundle = load_bundle(folder / "run" / "bundle")
    manifest = tiny_manifest(folder / "images", **images)
    encoder: Encoder = trainer.encoder
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CAPGEN_DATA", str(folder / "data"))
        extract(manifest, encoder, dtype=torch.float32, device=CPU)
        patch.setattr(type(bundle), "build_encoder", lambda self, weights=None: encoder)
        return evaluate(bundle, manifest, "test", DecodingConfig(beam=1, max_length=8)), folder


def test_a_result_is_complete_and_names_no_host_and_no_path(evaluation: tuple[Evaluation, Path]) -> None:
    result = evaluation[0].result
    assert problems(result, platform.node()) == []
    assert result["protocol"]["images"] == result["protocol"]["images_in_split"] == 5
    assert result["protocol"]["references"] == sum(1 + n % 3 for n in range(13, 18))
    assert result["protocol"]["decoding"] == asdict(DecodingConfig(beam=1, max_length=8)) | {"dtype": "float32"}
    assert result["protocol"]["encoder"] == "tiny" and result["protocol"]["seed"] == 5
    assert json.loads(json.dumps(result)) == result


def test_the_rules_see_what_is_missing() -> None:
    assert len(problems({})) > 20
    assert any("path" in p for p in problems({"x": "see /somewhere/else/file.txt"}))
    assert any("host" in p for p in problems({"x": "on bigbox17"}, "bigbox17"))


def test_scores_are_those_of_the_captions(evaluation: tuple[Evaluation, Path]) -> None:
    found, folder = evaluation
    manifest = tiny_manifest(folder / "images", train=10, dev=3, test=5)
    references = {item.image: item.captions for item in manifest.split("test").items}
    assert set(found.captions) == set(references)
    assert found.result["scores"]["BLEU-1"] == pytest.approx(bleu(found.captions, references)["BLEU-1"], abs=1e-3)


def test_captions_on_the_wrong_images_score_lower(evaluation: tuple[Evaluation, Path]) -> None:
    manifest = tiny_manifest(evaluation[1] / "images", train=10, dev=3, test=5)
    part = manifest.split("test")
    perfect = {item.image: item.captions[0] for item in part.items}
    found = scores(perfect, {item.image: item.captions for item in part.items}, manifest)
    assert found["BLEU-4"] == pytest.approx(100) and found["BLEU-4 on the wrong images"] < 80
    assert found["distinct"] == 5


def test_predictions_are_in_cocos_format(evaluation: tuple[Evaluation, Path], tmp_path: Path) -> None:
    write_predictions(tmp_path / "p.json", evaluation[0].captions)
    assert prediction_problems(tmp_path / "p.json") == []
    rows = json.loads((tmp_path / "p.json").read_text())
    assert {row["image_id"]: row["caption"] for row in rows} == evaluation[0].captions


def test_the_summary_shows_the_rules_beside_the_numbers(evaluation: tuple[Evaluation, Path]) -> None:
    text = summary(evaluation[0].result)
    assert all(part in text for part in ("BLEU-4", "tiny", "5 images", "greedy", "corpus level"))


def test_an_unknown_split_is_refused(evaluation: tuple[Evaluation, Path]) -> None:
    folder = evaluation[1]
    manifest = tiny_manifest(folder / "images", train=10, dev=3, test=5)
    with pytest.raises(CapGenError, match="validation"):
        evaluate(load_bundle(folder / "run" / "bundle"), manifest, "validation")


def test_a_part_of_a_split_shows_in_the_protocol(evaluation: tuple[Evaluation, Path]) -> None:
    manifest = tiny_manifest(evaluation[1] / "images", train=10, dev=3, test=5)
    said = protocol(manifest, "test", {"013.png": ("a",)}, DecodingConfig())
    assert (said["images"], said["images_in_split"]) == (1, 5)


def test_machine_and_revision() -> None:
    found = machine()
    assert platform.node() not in json.dumps(found) or len(platform.node()) < 4
    assert found["versions"]["torch"] == torch.__version__ or found["versions"]["torch"] in torch.__version__
    assert revision() == "unknown" or len(revision().rstrip("+")) >= 7


@pytest.mark.parametrize("path", RESULTS, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_results_in_the_repository_are_complete(path: Path) -> None:
    if path.name.endswith("_predictions.json"):
        assert prediction_problems(path) == []
        return
    result = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(result, dict) and result.get("kind") == "evaluation":
        assert problems(result) == []
        assert result["protocol"]["images"] == result["protocol"]["images_in_split"], "scores of a part of the split"
        assert "+" not in result["protocol"]["revision"], "made from code that was not committed"
