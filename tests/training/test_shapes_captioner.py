"""The captioners of drawn scenes, by the real command line: they look, they are right, and the
bundle is all they need."""

import json
import platform
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import FULL_TRAINING, ShapesRun, train
from helpers import PHOTOS, run_python
from results_rules import TRUE, prediction_problems, problems

from capgen_utils import Captioner
from capgen_utils.bundle import Bundle, load_bundle
from capgen_utils.data import shapes
from capgen_utils.data.datasets import load_dataset
from capgen_utils.decoding.run import caption_manifest
from capgen_utils.presets import PRESETS
from capgen_utils.training.batches import TrainingData, chunks_by_length, count_targets, make_batch
from capgen_utils.training.shipped import take_shipped
from capgen_utils.vision.features import FeatureCache, encode_images, find_cache

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def data_of_the_reader(reader_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAPGEN_DATA", str(reader_data))


@pytest.fixture(scope="session")
def result(any_shapes_run: ShapesRun, shapes_results: Path) -> dict[str, Any]:
    return json.loads((shapes_results / f"shapes_{any_shapes_run.model}.json").read_text())


def test_what_it_says_is_true_of_the_image_and_not_of_another(result: dict[str, Any]) -> None:
    scores = result["scores"]
    assert scores["true"] >= TRUE.get(result["model"], 0.95)
    assert scores["true_shuffled"] <= 0.15
    assert {"distinct", "relation_right", "true_novel"} <= set(scores)
    assert scores["distinct"] >= 0.3 * result["protocol"]["images"]
    assert scores["BLEU-4 on the wrong images"] < 0.5 * scores["BLEU-4"]
    assert scores["unk"] == 0


def test_the_results_are_complete(result: dict[str, Any], shapes_results: Path) -> None:
    assert problems(result, platform.node()) == []
    assert result["protocol"]["images"] == result["protocol"]["images_in_split"]
    assert result["protocol"]["encoder"]
    path = shapes_results / f"shapes_{result['model']}_predictions.json"
    assert prediction_problems(path) == []
    assert len(json.loads(path.read_text())) == result["protocol"]["images"]
    assert "BLEU-4" in (shapes_results / "stdout.txt").read_text()


def test_the_log_shows_learning_and_times(any_shapes_run: ShapesRun) -> None:
    runs = [any_shapes_run.folder]
    if FULL_TRAINING:  # the log of the shipped encoder does not ship
        runs.append(any_shapes_run.data / "encoders" / "shapes_cnn-run")
    for run in runs:
        log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        assert [entry["epoch"] for entry in log] == list(range(1, len(log) + 1))
        assert log[-1]["train_loss"] < 0.7 * log[0]["train_loss"]
        seconds = [entry["seconds"] for entry in log]
        assert seconds == sorted(seconds) and seconds[-1] > 0
    info = load_bundle(any_shapes_run.bundle).info
    assert info["training_run"]["minutes"] > 0 and info["encoder"]["training_run"]["minutes"] > 0


def test_the_wrong_image_makes_the_words_unlikely(any_shapes_run: ShapesRun) -> None:
    """The loss of true captions, in nats a token, at least doubles when each belongs to another
    image."""
    bundle = Captioner.from_bundle(any_shapes_run.bundle, "cpu").bundle
    part = load_dataset("shapes").split("dev").limit(64)
    cache = features_of(bundle)
    batch = make_batch(
        part.items,
        [False] * 64,
        TrainingData(part, part, cache),
        bundle.tokenizer,
        bundle.model.config.seq_len,
    )
    losses = []
    for features in (batch.features, batch.features.roll(1, 0)):
        with torch.inference_mode():
            memory = bundle.model.encode(features.float())
            chunks = chunks_by_length(batch, bundle.tokenizer.pad_id)
            total = sum(bundle.model.loss(memory, c.inputs, c.image, c.targets) for c in chunks)
        losses.append(float(total) / int(count_targets(chunks)))
    assert losses[1] > 2 * losses[0], losses


def features_of(bundle: Bundle) -> FeatureCache:
    """Return the features of training, which evaluation finds again."""
    encoder, dtype = bundle.build_encoder(), bundle.extraction_dtype
    cache = find_cache(load_dataset("shapes"), encoder, bundle.model.feature, dtype)
    assert cache is not None
    return cache


def test_one_epoch_on_the_shipped_encoder_learns_to_say_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CAPGEN_DATA", str(tmp_path))
    take_shipped(PRESETS["shapes"])
    shutil.rmtree(tmp_path / "runs")  # the captioners; what they start from stays
    printed = train(tmp_path, "--epochs", "1", anew=False)
    run = ShapesRun(tmp_path)
    (entry,) = run.log
    assert "epoch 1" in printed and str(run.bundle) in printed
    assert entry["BLEU-4"] > 35 and entry["distinct"] > 80 and entry["unk"] == 0, entry
    assert not (tmp_path / "encoders" / "shapes_cnn-run" / "checkpoint.safetensors").exists()


def test_training_again_finds_the_run_finished(shapes_run: ShapesRun) -> None:
    before = (shapes_run.bundle / "model.safetensors").read_bytes()
    printed = train(shapes_run.data, anew=FULL_TRAINING)
    assert ("finished" if FULL_TRAINING else "nothing to train") in printed
    assert (shapes_run.bundle / "model.safetensors").read_bytes() == before


def test_the_bundle_needs_nothing_else(any_shapes_run: ShapesRun, tmp_path: Path) -> None:
    shutil.copytree(any_shapes_run.bundle, tmp_path / "b")
    manifest = load_dataset("shapes").split("test")
    paths = [str(manifest.path(item)) for item in manifest.items[:5]]
    data = tmp_path / "empty"
    here = [c.text for c in Captioner.from_bundle(any_shapes_run.bundle, "cpu").caption(paths)]
    done = run_python(
        "-m",
        "capgen_utils",
        "caption",
        "--bundle",
        str(tmp_path / "b"),
        *paths,
        CAPGEN_DATA=str(data),
    )
    assert done.returncode == 0, done.stderr
    assert not data.exists()
    scenes = shapes.load_scenes(manifest.root)
    said = [line.split(": ", 1)[1] for line in done.stdout.splitlines()]
    assert said == here, "another process, the same captions"
    true = sum(
        shapes.is_true(s, scenes[i.image]) for s, i in zip(said, manifest.items, strict=False)
    )
    assert true >= (4 if TRUE.get(any_shapes_run.model, 0.95) > 0.9 else 2)


@pytest.mark.parametrize("batch_size", [1, 32, 64])
def test_cached_and_fresh_images_get_the_same_captions(
    any_shapes_run: ShapesRun, batch_size: int
) -> None:
    captioner = Captioner.from_bundle(any_shapes_run.bundle, "cpu")
    bundle, whole = captioner.bundle, load_dataset("shapes")
    part = whole.split("test").limit(64)
    cache = features_of(bundle)
    cached = caption_manifest(bundle.model, part, cache, bundle.tokenizer, bundle.decoding)
    paths = [whole.path(item) for item in part.items]
    fresh = captioner.caption(paths, batch_size=batch_size)
    assert [c.text for c in fresh] == list(cached.values())


def test_it_looks_where_the_object_is(shapes_run: ShapesRun) -> None:
    """At a shape word, attention on the object's box is above chance."""
    captioner = Captioner.from_bundle(shapes_run.bundle, "cpu")
    manifest = load_dataset("shapes").split("test")
    scenes = shapes.load_scenes(manifest.root)
    items = [i for i in manifest.items if len(scenes[i.image].objects) == 2][:40]
    shares, areas = [], []
    for item in items:
        text = captioner.caption(manifest.path(item))[0].text
        ids = captioner.tokenizer.encode(text)
        feature = encode_images(
            captioner.encoder, [manifest.path(item)], captioner.bundle.extraction_dtype
        )["grid"]
        with torch.inference_mode():
            state = captioner.model.start(captioner.model.encode(feature.float()))
            for token, following in zip(ids[:-1], ids[1:], strict=True):
                _, state, weights = captioner.model.step(
                    torch.tensor([token]), state, attention=True
                )
                word = captioner.tokenizer.decode([following])
                objects = [o for o in scenes[item.image].objects if o.shape == word]
                if len(objects) == 1:
                    look = torch.stack(list(weights.values())).mean((0, 1, 2)).view(8, 8).numpy()
                    x0, y0, x1, y1 = (v / 8 for v in objects[0].box)
                    inside = np.zeros((8, 8), dtype=bool)
                    inside[int(y0) : int(np.ceil(y1)), int(x0) : int(np.ceil(x1))] = True
                    shares.append(look[inside].sum())
                    areas.append(inside.mean())
    assert len(shares) > 20
    assert np.mean(shares) > 1.5 * np.mean(areas)


def test_a_photograph_of_the_world_is_captioned_without_an_error(shapes_run: ShapesRun) -> None:
    assert (
        Captioner.from_bundle(shapes_run.bundle, "cpu").caption(PHOTOS / "cat_on_deck.jpg")[0].text
    )
