"""The full table: floors from training captions alone, people, METEOR, and anyone's files."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import CPU, need, tiny_encoder, tiny_manifest

from capgen_utils.common.files import CapGenError
from capgen_utils.data import shapes
from capgen_utils.data.datasets import load_dataset
from capgen_utils.data.manifest import Item, Manifest
from capgen_utils.evaluation import baselines
from capgen_utils.evaluation.baselines import best_constant, nearest_captions, random_captions
from capgen_utils.evaluation.metrics import find_wordnet, has_meteor_java, meteor_nltk, score
from capgen_utils.evaluation.scoring import (
    CONSTANT,
    METEOR_JAVA,
    METEOR_NLTK,
    NEAREST,
    RANDOM,
    MoreMetrics,
    as_lines,
    assess,
    mean_features,
    score_files,
)
from capgen_utils.vision.features import FeatureCache, extract

NOUNS = ["dog", "cat", "man", "woman", "boy", "girl", "horse", "bird"]


def people(folder: Path, train: int = 12, test: int = 6) -> Manifest:
    """Return images with five captions each, no two alike."""
    items = [
        Item(
            f"{i:02d}.png",
            "train" if i < train else "test",
            tuple(
                f"a {NOUNS[i % 8]} and a {NOUNS[(i + k + 1) % 8]} in "
                f"{'picture' if i < train else 'photo'} {k} ."
                for k in range(5)
            ),
        )
        for i in range(train + test)
    ]
    return Manifest("people", folder, tuple(items))


def said_of(manifest: Manifest, caption: str = "a {} in the picture") -> dict[str, str]:
    return {
        item.image: caption.format(NOUNS[i % 5])
        for i, item in enumerate(manifest.split("test").items)
    }


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    return people(tmp_path)


def random_features(manifest: Manifest, seed: int = 0) -> FeatureCache:
    array = np.random.default_rng(seed).normal(size=(len(manifest), 4, 6)).astype(np.float16)
    return FeatureCache(
        Path("features.npy"), tuple(item.image for item in manifest.items), array, {}
    )


# --- the table


def test_scores_are_those_of_the_metrics_and_lie_in_their_intervals(manifest: Manifest) -> None:
    said = said_of(manifest)
    found = assess(said, manifest, "test")
    references = {item.image: item.captions for item in manifest.split("test").items}
    for name, value in score(said, references).items():
        assert found["scores"][name] == pytest.approx(value, abs=1e-4)
        low, high = found["intervals"][name]
        assert low <= found["scores"][name] <= high
    assert json.loads(json.dumps(found)) == found
    assert found["warnings"] == {} and found["findings"] == []


def test_floors_are_made_of_training_captions_alone(manifest: Manifest) -> None:
    features = random_features(manifest)
    found = assess(said_of(manifest), manifest, "test", features)["floors"]
    assert list(found) == [CONSTANT, RANDOM, NEAREST]
    training = {item.image: item.captions for item in manifest.split("train").items}
    references = {item.image: item.captions for item in manifest.split("test").items}
    constant = best_constant(training)
    assert found[CONSTANT]["sha256"] == hashlib.sha256(constant.encode()).hexdigest()
    assert constant not in json.dumps(found), "the dataset's captions stay where they are"
    rows = features.array.astype(np.float32).mean(axis=1)
    near = nearest_captions(list(references), rows[12:], list(training), rows[:12], training)
    for name, captions in (
        (CONSTANT, dict.fromkeys(references, constant)),
        (RANDOM, random_captions(references, training)),
        (NEAREST, near),
    ):
        assert found[name]["scores"]["CIDEr-D"] == pytest.approx(
            score(captions, references)["CIDEr-D"], abs=1e-4
        )
        assert set(found[name]["intervals"]) <= set(found[name]["scores"]) and found[name]["rule"]
    assert found[CONSTANT]["scores"]["distinct"] == 1


def test_other_test_captions_do_not_change_what_the_floors_say(manifest: Manifest) -> None:
    other = ("something else", "and more")
    items = tuple(
        item if item.split == "train" else replace(item, captions=other) for item in manifest.items
    )
    changed = replace(manifest, items=items)
    first, second = (
        assess(said_of(manifest), each, "test")["floors"][CONSTANT] for each in (manifest, changed)
    )
    assert first["sha256"] == second["sha256"] and first["scores"] != second["scores"]


def test_rows_that_cannot_be_made_are_left_out(manifest: Manifest) -> None:
    said = said_of(manifest)
    assert NEAREST not in assess(said, manifest, "test")["floors"]
    part = replace(manifest, items=manifest.split("test").items)
    alone = assess(said, part, "test", random_features(part))
    assert alone["floors"] == {} and "copied" not in alone["scores"]
    single = replace(
        part, items=tuple(replace(item, captions=item.captions[:1]) for item in part.items)
    )
    assert assess(said, single, "test")["people"] is None


def test_an_image_without_features_is_not_a_neighbour(manifest: Manifest) -> None:
    features = random_features(manifest)
    features.failed["00.png"] = "damaged"
    assert NEAREST in assess(said_of(manifest), manifest, "test", features)["floors"]
    features.failed["12.png"] = "damaged"
    assert NEAREST not in assess(said_of(manifest), manifest, "test", features)["floors"]


def test_people_and_the_system_are_scored_against_as_many_references(manifest: Manifest) -> None:
    found = assess(said_of(manifest), manifest, "test")["people"]
    assert found["references"] == 4
    references = {item.image: item.captions for item in manifest.split("test").items}
    human = baselines.human_row(references)["BLEU-4"]
    assert found["human"]["scores"]["BLEU-4"] == pytest.approx(human.value, abs=1e-4)
    assert found["human"]["intervals"]["BLEU-4"] == pytest.approx([human.low, human.high], abs=1e-4)
    own = baselines.beside_people(said_of(manifest), references)["BLEU-1"].value
    assert found["system"]["scores"]["BLEU-1"] == pytest.approx(own, abs=1e-4)


def test_grids_are_averaged_and_vectors_are_not(tmp_path: Path) -> None:
    small = tiny_manifest(tmp_path / "images")
    caches = [
        extract(
            small,
            tiny_encoder(),
            name,
            folder=tmp_path / "features",
            dtype=torch.float32,
            device=CPU,
        )
        for name in ("grid", "pooled")
    ]
    names = [item.image for item in small.items]
    grid, pooled = (mean_features(cache, names) for cache in caches)
    assert grid.shape == pooled.shape == (len(small), 12)
    np.testing.assert_allclose(grid, pooled, atol=1e-2, rtol=1e-2)


def test_collapse_and_copying_are_found_and_stored(manifest: Manifest) -> None:
    copied = manifest.items[0].captions[0]
    found = assess(said_of(manifest, copied), manifest, "test")
    assert [one["name"] for one in found["findings"]] == ["collapse", "copying"]
    assert "repeated caption" in found["warnings"] and found["scores"]["copied"] == 100
    same = {item.image: item.captions[1:] for item in manifest.split("train").items}
    items = tuple(
        replace(item, captions=same["00.png"]) if item.split == "test" else item
        for item in manifest.items
    )
    again = assess(said_of(manifest, copied), replace(manifest, items=items), "test")
    assert [one["name"] for one in again["findings"]] == ["collapse"], (
        "people say nothing else either"
    )


def test_drawn_scenes_know_what_is_true(tmp_path: Path) -> None:
    shapes.generate(tmp_path / "shapes", 60)
    drawn = load_dataset("shapes", tmp_path / "shapes")
    perfect = {item.image: item.captions[0] for item in drawn.split("test").items}
    found = assess(perfect, drawn, "test")
    assert found["scores"]["true"] == 1
    assert (
        found["floors"][CONSTANT]["scores"]["true"]
        < 0.5
        > found["floors"][RANDOM]["scores"]["true"]
    )


def test_captions_of_other_images_are_refused(manifest: Manifest) -> None:
    for wrong in ({"00.png": "a dog"}, {}, said_of(manifest) | {"nowhere.png": "a dog"}):
        with pytest.raises(CapGenError, match="people/test"):
            assess(wrong, manifest, "test")


# --- METEOR


def test_meteor_of_nltk_is_labelled_and_each_pair_is_compared_once(
    manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    need("WordNet", find_wordnet() is not None)
    said, references = (
        said_of(manifest),
        {item.image: item.captions for item in manifest.split("test").items},
    )
    found = assess(said, manifest, "test")
    assert found["scores"][METEOR_NLTK] == pytest.approx(
        meteor_nltk(said, references).corpus, abs=1e-4
    )
    assert "not METEOR 1.5" in found["protocol"][METEOR_NLTK] and METEOR_NLTK in found["intervals"]
    assert METEOR_NLTK in found["people"]["human"]["scores"]
    more = MoreMetrics()
    first = more(said, references)
    from capgen_utils.evaluation.metrics import meteor

    monkeypatch.setattr(
        meteor, "single_meteor_score", lambda *a, **k: pytest.fail("compared again")
    )
    assert more(said, references) == first


def test_without_wordnet_there_is_no_meteor(
    manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("capgen_utils.evaluation.scoring.find_wordnet", lambda: None)
    found = assess(said_of(manifest), manifest, "test")
    assert METEOR_NLTK not in found["scores"] and METEOR_NLTK not in found["protocol"]


def test_without_java_the_metrics_are_refused_before_anything_is_computed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(CapGenError, match="METEOR 1.5 needs Java"):
        MoreMetrics(java=True)


def test_meteor_of_java_is_the_corpus_score(manifest: Manifest) -> None:
    need("Java and pycocoevalcap", has_meteor_java())
    from capgen_utils.evaluation.metrics import meteor_java

    said = said_of(manifest)
    found = assess(said, manifest, "test", java=True)
    references = {item.image: item.captions for item in manifest.split("test").items}
    assert found["scores"][METEOR_JAVA] == pytest.approx(
        meteor_java(said, references).corpus, abs=1e-4
    )
    assert (
        "METEOR 1.5" in found["protocol"][METEOR_JAVA]
        and METEOR_JAVA in found["people"]["human"]["scores"]
    )
    low, high = found["intervals"][METEOR_JAVA]
    assert low <= found["scores"][METEOR_JAVA] <= high


# --- files


def write(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value))
    return path


@pytest.fixture
def files(tmp_path: Path, manifest: Manifest) -> tuple[Path, Path, Path]:
    """Return predictions and references in COCO's formats, and captions of training images."""
    rows = [{"image_id": image, "caption": caption} for image, caption in said_of(manifest).items()]
    test, train = (
        {i.image: list(i.captions) for i in manifest.split(s).items} for s in ("test", "train")
    )
    annotations = [
        {"image_id": image, "caption": c} for image, captions in test.items() for c in captions
    ]
    return (
        write(tmp_path / "said.json", rows),
        write(tmp_path / "written.json", {"annotations": annotations, "images": []}),
        write(tmp_path / "train.json", train),
    )


def test_files_in_any_form_score_the_same(
    files: tuple[Path, Path, Path], manifest: Manifest, tmp_path: Path
) -> None:
    said = said_of(manifest)
    references = {item.image: list(item.captions) for item in manifest.split("test").items}
    plain = score_files(write(tmp_path / "a.json", said), write(tmp_path / "b.json", references))
    assert score_files(*files[:2]).scores == plain.scores
    assert plain.scores["BLEU-4"] == pytest.approx(score(said, references)["BLEU-4"])
    assert plain.differences == {} and plain.warnings == {}
    assert {"BLEU-1", "BLEU-4", "ROUGE-L", "CIDEr-D", "CIDEr", "distinct"} <= set(plain.scores)


def test_training_files_show_what_was_copied_and_seen(
    files: tuple[Path, Path, Path], manifest: Manifest
) -> None:
    said, written, training = files
    assert score_files(said, written, training).scores["copied"] == 0
    everything = {item.image: list(item.captions) for item in manifest.items}
    write(training, everything)
    found = score_files(said, written, training)
    assert "6 of 6 images are training images" in found.warnings["training images"]


def test_a_second_system_is_compared_on_the_same_samples(
    files: tuple[Path, Path, Path], manifest: Manifest, tmp_path: Path
) -> None:
    better = write(
        tmp_path / "better.json", {i.image: i.captions[0] for i in manifest.split("test").items}
    )
    found = score_files(better, files[1], against=files[0]).differences["CIDEr-D"]
    assert found.low > 0 and found.wins == 1
    assert score_files(files[0], files[1], against=files[0]).differences["BLEU-4"].value == 0


def test_lines_show_counts_values_and_intervals() -> None:
    lines = as_lines([("distinct", 782, None), ("BLEU-4", 22.123, (20.1, 24.9))])
    assert lines[0].split() == ["distinct", "782"] and lines[1].split() == [
        "BLEU-4",
        "22.12",
        "[20.10,",
        "24.90]",
    ]
