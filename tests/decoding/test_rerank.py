"""Re-ranking with CLIP, on its own and in captioners, bundles and the command line."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    PHOTOS,
    capgen,
    save_tiny_bundle,
    tiny_dual,
    tiny_encoder,
    tiny_model,
    tiny_tokenizer,
)
from torch import Tensor

from capgen_utils.bundle import Bundle, bundle_info, load_bundle, save_bundle
from capgen_utils.captioner import Captioner
from capgen_utils.common.files import CapGenError
from capgen_utils.config import DecodingConfig
from capgen_utils.data import shapes
from capgen_utils.data.datasets import load_dataset
from capgen_utils.decoding.captions import best_first
from capgen_utils.decoding.options import TEMPERATURES, with_options
from capgen_utils.decoding.rerank import fit, rerank, shared_encoder
from capgen_utils.evaluation.results import evaluate, summary
from capgen_utils.vision.dual_encoder import DualEncoder
from capgen_utils.vision.encoder import Encoder
from capgen_utils.vision.encoders import ENCODERS, new_shapes_cnn

PHOTO = PHOTOS / "cat_on_deck.jpg"
TWO = sorted(PHOTOS.glob("*.jpg"))[:2]


class Table:
    """A scorer with known vectors."""

    texts = {"red": [1.0, 0.0], "blue": [0.0, 1.0], "violet": [0.6, 0.8], "": [0.0, -1.0]}

    def __init__(self) -> None:
        self.read: list[str] = []

    def embed_images(self, images: list[Any]) -> Tensor:
        """Red, then blue, then red ..."""
        return torch.tensor([[1.0, 0.0], [0.0, 1.0]] * len(images))[: len(images)]

    def embed_texts(self, texts: list[str]) -> Tensor:
        """Look them up."""
        self.read += texts
        return torch.tensor([self.texts[text] for text in texts])

    def similarity(self, images: Tensor, texts: Tensor) -> Tensor:
        """Cosines."""
        return images @ texts.T


def test_the_fitting_caption_comes_first() -> None:
    scorer: Any = Table()
    found = rerank(
        scorer,
        ["image 1", "image 2", "image 3"],
        [["blue", "violet", "red"], ["red", "blue"], ["", "violet"]],
    )
    assert found[0] == [("red", 1.0), ("violet", pytest.approx(0.6)), ("blue", 0.0)]
    assert found[1] == [("blue", 1.0), ("red", 0.0)]
    assert [text for text, _ in found[2]] == ["violet", ""]
    assert sorted(scorer.read) == ["", "blue", "red", "violet"], "each text is read once"


def test_vectors_can_replace_images() -> None:
    scorer: Any = Table()
    assert rerank(scorer, torch.tensor([[0.0, 2.0]]), [["red", "blue"]]) == [
        [("blue", 2.0), ("red", 0.0)]
    ]


def test_equal_scores_keep_their_order_and_nothing_is_lost() -> None:
    assert best_first([0.5, 0.9, 0.5, 0.9]) == [1, 3, 0, 2]
    scorer: Any = Table()
    assert rerank(scorer, ["i"], [["blue", "red", "blue"]]) == [
        [("red", 1.0), ("blue", 0.0), ("blue", 0.0)]
    ]
    assert fit(scorer, ["i", "j"], [[], ["red"]]) == [[], [0.0]]


def test_each_image_needs_its_own_list() -> None:
    scorer: Any = Table()
    with pytest.raises(CapGenError, match="2 images and 1 lists"):
        rerank(scorer, ["a", "b"], [["red"]])


def test_reranking_implies_temperatures_unless_another_way_is_asked_for() -> None:
    def temperatures(**options: Any) -> tuple[float, ...]:
        return with_options(DecodingConfig(), rerank=True, **options).temperatures

    assert temperatures() == TEMPERATURES
    assert temperatures(top_p=0.9, max_length=5, beam=None) == TEMPERATURES
    assert temperatures(temperatures=[0.0, 2.0]) == (0.0, 2.0)
    assert temperatures(beam=4) == temperatures(candidates=4) == ()
    with pytest.raises(CapGenError, match="beam and temperatures"):
        temperatures(temperatures=[1.0], beam=4)
    stored = DecodingConfig(temperatures=(0.0, 1.0))
    assert with_options(stored).temperatures == (0.0, 1.0)
    assert with_options(stored, beam=2).temperatures == (), "a beam replaces them"


# --- captioners


def clip_bundle(
    folder: Path, scorer: DualEncoder | None = None, encoder: Encoder | None = None, **more: Any
) -> Bundle:
    """Write the bundle of a captioner with the vocabulary of ``scorer``."""
    encoder = encoder or new_shapes_cnn(32)
    tokenizer = tiny_tokenizer()
    model = tiny_model(tokenizer=tokenizer, shape=encoder.outputs["grid"])
    info = bundle_info(
        "transformer", model, encoder, torch.float32, DecodingConfig(beam=2, max_length=8), "shapes"
    )
    bundle = Bundle(model, tokenizer, info)
    save_bundle(folder, bundle, encoder, scorer=scorer, **more)
    return bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the bundle of a captioner whose scorer shares its encoder."""
    folder = tmp_path_factory.mktemp("rerank") / "bundle"
    torch.manual_seed(3)
    encoder = new_shapes_cnn(32)
    clip_bundle(folder, tiny_dual(encoder), encoder)
    return folder


def test_a_captioner_reranks_with_clip(bundle: Path) -> None:
    captioner = Captioner.from_bundle(bundle, "cpu")
    for caption, photo in zip(captioner.caption(TWO, rerank=True), TWO, strict=True):
        texts = [candidate.text for candidate in caption.candidates]
        scores = [candidate.clip_score for candidate in caption.candidates]
        assert len(texts) == len(TEMPERATURES) and caption.text == texts[0]
        assert sorted(c.temperature for c in caption.candidates) == sorted(TEMPERATURES)
        assert scores == sorted(scores, reverse=True) and len(set(scores)) > 1  # type: ignore[type-var]
        expected = dict(rerank(captioner.scorer, [photo], [texts])[0])
        assert {
            t: pytest.approx(s, abs=1e-4) for t, s in zip(texts, scores, strict=True)
        } == expected
        first = next(c for c in caption.candidates if c.temperature == 0)
        assert first.text == captioner.caption(photo, beam=1)[0].text, (
            "at temperature 0 stands the greedy caption"
        )
        best = caption.candidates[0]
        assert (
            caption.log_probability == best.log_probability
            and " ".join(caption.words) == caption.text
        )
    again = captioner.caption(TWO, rerank=True, batch_size=1)
    assert [c.text for c in again] == [c.text for c in captioner.caption(TWO, rerank=True)]
    assert all(c.clip_score is None for c in captioner.caption(PHOTO)[0].candidates)


def test_candidates_can_come_from_temperatures_a_beam_or_samples(bundle: Path) -> None:
    captioner = Captioner.from_bundle(bundle, "cpu")
    two = captioner.caption(PHOTO, rerank=True, temperatures=(0.0, 3.0), seed=4)[0]
    assert sorted(c.temperature for c in two.candidates) == [0.0, 3.0]
    beam = captioner.caption(PHOTO, rerank=True, beam=3)[0]
    plain = captioner.caption(PHOTO, beam=3)[0]
    assert {c.text for c in beam.candidates} == {c.text for c in plain.candidates}
    scores = dict(rerank(captioner.scorer, [PHOTO], [[c.text for c in plain.candidates]])[0])
    assert beam.text == max(scores, key=lambda text: scores[text])
    assert (
        len(captioner.caption(PHOTO, rerank=True, temperature=1.0, candidates=5)[0].candidates) == 5
    )
    with pytest.raises(CapGenError, match="--rerank"):
        captioner.caption(PHOTO, temperatures=(0.0, 1.0))
    with pytest.raises(CapGenError, match="temperature of -1"):
        captioner.caption(PHOTO, rerank=True, temperatures=(-1.0,))


def test_the_scorer_shares_the_captioners_features(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    captioner = Captioner.from_bundle(bundle, "cpu")
    scorer, encoder = captioner.scorer, captioner.encoder
    assert (
        shared_encoder(scorer, encoder, "grid") is not None
        and shared_encoder(scorer, encoder, "pooled") is None
    )
    assert shared_encoder(scorer, scorer.images, "embedding") is not None
    assert shared_encoder(tiny_dual(new_shapes_cnn(32)), encoder, "grid") is None, "another stem"
    monkeypatch.setattr(
        DualEncoder, "embed_images", lambda *_: pytest.fail("the images are encoded twice")
    )
    assert captioner.caption(PHOTO, rerank=True)


def test_a_scorer_with_another_encoder_encodes_the_images_itself(
    bundle: Path, tmp_path: Path
) -> None:
    torch.manual_seed(8)
    other = tiny_dual(new_shapes_cnn(64))
    other.save(tmp_path / "other")
    captioner = Captioner.from_bundle(bundle, "cpu", scorer=tmp_path / "other")
    caption = captioner.caption(PHOTO, rerank=True)[0]
    texts = [c.text for c in caption.candidates]
    expected = dict(rerank(other, [PHOTO], [texts])[0])
    assert {c.text: pytest.approx(c.clip_score, abs=1e-5) for c in caption.candidates} == expected


def test_a_bundle_without_a_scorer_says_how_to_get_one(tmp_path: Path) -> None:
    save_tiny_bundle(tmp_path / "plain")
    with pytest.raises(CapGenError, match="no CLIP") as error:
        Captioner.from_bundle(tmp_path / "plain", "cpu").caption(PHOTO, rerank=True)
    assert "capgen pretrain" in error.value.remedy and "--scorer" in error.value.remedy
    with pytest.raises(CapGenError, match="nowhere"):
        Captioner.from_bundle(tmp_path / "plain", "cpu", scorer=tmp_path / "nowhere")


# --- bundles


def files(folder: Path) -> set[str]:
    """Return the names of the files and folders in ``folder``."""
    return {path.name for path in folder.iterdir()}


def test_a_bundle_with_encoder_and_scorer_survives_a_move(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert files(bundle) == {
        "config.json",
        "tokenizer.json",
        "model.safetensors",
        "encoder",
        "scorer",
    }
    before = Captioner.from_bundle(bundle, "cpu").caption(TWO, rerank=True)
    moved = shutil.copytree(bundle, tmp_path / "far" / "away")
    monkeypatch.setenv("CAPGEN_DATA", str(tmp_path / "empty"))
    monkeypatch.chdir(tmp_path)
    after = Captioner.from_bundle(moved, "cpu").caption(TWO, rerank=True)
    assert after == before
    (moved / "scorer" / "text.safetensors").write_bytes(b"damaged")
    with pytest.raises(CapGenError, match=r"text\.safetensors"):
        Captioner.from_bundle(moved, "cpu").caption(PHOTO, rerank=True)
    assert Captioner.from_bundle(moved, "cpu").caption(PHOTO)[0].text, (
        "who does not ask for it does not need it"
    )


def test_an_encoder_that_is_half_of_the_scorer_is_stored_once(tmp_path: Path) -> None:
    dual = tiny_dual(new_shapes_cnn(32))
    clip_bundle(tmp_path / "b", dual, dual.images)
    assert files(tmp_path / "b") == {
        "config.json",
        "tokenizer.json",
        "model.safetensors",
        "encoder",
    }
    assert (tmp_path / "b" / "encoder" / "text.safetensors").is_file()
    loaded = load_bundle(tmp_path / "b")
    assert loaded.build_encoder().name == "small_clip on shapes_cnn"
    scorer = loaded.build_scorer()
    assert scorer is not None and torch.equal(
        scorer.embed_texts(["word1"]), dual.embed_texts(["word1"])
    )
    assert (
        Captioner.from_bundle(tmp_path / "b", "cpu")
        .caption(PHOTO, rerank=True)[0]
        .candidates[0]
        .clip_score
    )


def test_a_public_stem_is_not_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ENCODERS, "tiny", lambda _: tiny_encoder())
    dual = tiny_dual(tiny_encoder())
    clip_bundle(tmp_path / "b", dual, tiny_encoder())
    assert files(tmp_path / "b") == {"config.json", "tokenizer.json", "model.safetensors", "scorer"}
    assert not (tmp_path / "b" / "scorer" / "stem").exists()
    captioner = Captioner.from_bundle(tmp_path / "b", "cpu")
    assert captioner.caption(PHOTO, rerank=True)[0].candidates[0].clip_score is not None


# --- the command line


def test_the_command_line_reranks(bundle: Path) -> None:
    asked = ("caption", PHOTO, "--bundle", bundle, "--device", "cpu", "--rerank", "--json")
    done = capgen(*asked)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    scores = [candidate["clip_score"] for candidate in said["candidates"]]
    assert said["caption"] == said["candidates"][0]["text"] and scores == sorted(
        scores, reverse=True
    )
    assert {candidate["temperature"] for candidate in said["candidates"]} == set(TEMPERATURES)
    expected = Captioner.from_bundle(bundle, "cpu").caption(PHOTO, rerank=True)[0]
    assert said["caption"] == expected.text
    few = capgen(
        "caption",
        PHOTO,
        "--bundle",
        bundle,
        "--device",
        "cpu",
        "--rerank",
        "--temperatures",
        "0",
        "1.5",
        "--json",
    )
    assert {candidate["temperature"] for candidate in json.loads(few.stdout)["candidates"]} == {
        0,
        1.5,
    }


def test_the_command_line_without_a_scorer(tmp_path: Path) -> None:
    save_tiny_bundle(tmp_path / "plain")
    done = capgen("caption", PHOTO, "--bundle", tmp_path / "plain", "--rerank")
    assert done.returncode == 2 and "--scorer" in done.stderr
    tiny_dual(new_shapes_cnn(32)).save(tmp_path / "scorer")
    done = capgen(
        "caption",
        PHOTO,
        "--bundle",
        tmp_path / "plain",
        "--rerank",
        "--scorer",
        tmp_path / "scorer",
    )
    assert done.returncode == 0 and done.stdout.strip(), done.stderr


# --- evaluation


def test_an_evaluation_reports_the_scorer_and_the_judge(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CAPGEN_DATA", str(tmp_path / "data"))
    shapes.generate(tmp_path / "shapes", 40)
    manifest = load_dataset("shapes", tmp_path / "shapes")
    loaded = load_bundle(bundle)
    scorer, judge = loaded.build_scorer(), tiny_dual(new_shapes_cnn(64))
    captioner = Captioner.from_bundle(bundle, "cpu")
    first = evaluate(captioner, manifest, beam=1)
    assert first.result["reranking"] is None and first.result["protocol"]["chosen_by"] is None
    found = evaluate(captioner, manifest, rerank=True, judge=judge)
    said = found.result["reranking"]
    assert (
        said["scorer"] == "small_clip on shapes_cnn"
        and said["scorer_weights"] != said["judge_weights"]
    )
    assert (
        said["candidates"] == len(TEMPERATURES)
        and found.result["protocol"]["chosen_by"] == said["scorer"]
    )
    assert said["scores without"] == first.result["scores"], (
        "without re-ranking it is greedy search"
    )
    assert 0 < said["changed"] <= 1
    # The scorer is content with its choice; what the judge says is computed from the captions and
    # nothing else.
    assert scorer is not None
    names = list(found.captions)
    paths = [manifest.root / name for name in names]
    means = [
        np.mean(
            [scores[0] for scores in fit(scorer, paths, [[run.captions[name]] for name in names])]
        )
        for run in (first, found)
    ]
    assert means[1] > means[0]
    images, texts = (
        judge.embed_images(paths),
        judge.embed_texts([found.captions[name] for name in names]),
    )
    expected = 100 * 2.5 * (images * texts).sum(1).clamp(min=0).mean().item()
    assert said["CLIPScore"] == pytest.approx(expected, abs=0.1)
    assert {"CLIPScore without", "CLIPScore of a human caption"} <= set(said)
    assert "re-ranked by small_clip on shapes_cnn" in summary(
        found.result
    ) and "CLIPScore" in summary(found.result)
    json.dumps(found.result)


def test_evaluate_reranks_on_the_command_line(bundle: Path, tmp_path: Path) -> None:
    shapes.generate(tmp_path / "shapes", 40)
    tiny_dual(new_shapes_cnn(64)).save(tmp_path / "judge")
    done = capgen(
        "evaluate",
        "--bundle",
        bundle,
        "--data",
        tmp_path / "shapes",
        "--output",
        tmp_path / "out",
        "--rerank",
        "--temperatures",
        "0",
        "1",
        "--judge",
        tmp_path / "judge",
        "--name",
        "chosen",
        CAPGEN_DATA=str(tmp_path / "data"),
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "out" / "chosen.json").read_text())
    assert result["protocol"]["temperatures"] == [0, 1] and result["reranking"]["CLIPScore"] >= 0
    assert "re-ranked by" in done.stdout
