"""Training a small CLIP: the loss by hand and by the library, measures by hand, and what is drawn;
then real runs."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TRAINING_LIMIT, train_on_shapes
from helpers import CPU, tiny_encoder, tiny_manifest
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from capgen_utils.common.files import CapGenError
from capgen_utils.common.hub import import_torchvision
from capgen_utils.config import ContrastiveConfig, SmallClipConfig
from capgen_utils.data.datasets import load_dataset
from capgen_utils.data.manifest import Item, Manifest
from capgen_utils.data.shapes import load_scenes
from capgen_utils.presets import PRESETS, ClipRecipe, Preset, dual_encoder_folder
from capgen_utils.text.ptb import tokenise
from capgen_utils.text.twins import hard_negatives
from capgen_utils.text.words import WordTokenizer
from capgen_utils.training import pretraining
from capgen_utils.training.batches import TrainingData
from capgen_utils.training.clip import (
    ContrastiveTrainer,
    Reconstruction,
    Texts,
    info_nce,
    measure,
    recall,
    same_texts,
    twin_accuracy,
    twin_loss,
)
from capgen_utils.training.pretraining import pretrain_dual_encoder
from capgen_utils.vision.clip import as_picture
from capgen_utils.vision.dual_encoder import DualEncoder
from capgen_utils.vision.encoders import ENCODERS
from capgen_utils.vision.features import extract

import_torchvision()
from transformers.models.clip.modeling_clip import image_text_contrastive_loss  # noqa: E402

TINY = SmallClipConfig(
    embed_size=24,
    vision_width=32,
    vision_layers=1,
    vision_heads=4,
    text_width=32,
    text_layers=1,
    text_heads=4,
    seq_len=20,
)


# --- the loss


def by_hand(logits: Tensor, positive: Tensor) -> float:
    """InfoNCE written as sums over single numbers."""

    def one_way(scores: list[list[float]], right: list[list[bool]]) -> float:
        losses = []
        for row, answers in zip(scores, right, strict=True):
            if not any(answers):
                continue
            total = math.log(sum(math.exp(value) for value in row))
            chosen = [total - value for value, answer in zip(row, answers, strict=True) if answer]
            losses.append(sum(chosen) / len(chosen))
        return sum(losses) / len(losses)

    there = one_way(logits.tolist(), positive.tolist())
    back = one_way(logits.T.tolist(), positive.T.tolist())
    return (there + back) / 2


def test_info_nce_equals_the_sums_by_hand() -> None:
    logits = torch.randn(4, 7) * 3
    positive = torch.zeros(4, 7, dtype=torch.bool)
    for image, texts in enumerate(
        [(0, 1), (1,), (2, 3, 4), (5,)]
    ):  # text 1 says two images, text 6 says none
        positive[image, list(texts)] = True
    assert info_nce(logits, positive).item() == pytest.approx(by_hand(logits, positive), rel=1e-5)


def test_without_duplicates_it_is_the_librarys_loss() -> None:
    logits = torch.randn(9, 9) * 4
    expected = image_text_contrastive_loss(logits.T)
    torch.testing.assert_close(info_nce(logits, torch.eye(9, dtype=torch.bool)), expected)


def test_a_second_image_with_the_same_caption_is_right_too() -> None:
    logits = torch.tensor([[9.0, -9.0], [9.0, -9.0], [-9.0, 9.0]])
    both = torch.tensor([[True, False], [True, False], [False, True]])
    assert info_nce(logits, both).item() == pytest.approx(math.log(2) / 4, abs=1e-4), (
        "only the two share a text"
    )
    one = torch.tensor([[True, False], [False, False], [False, True]])
    assert info_nce(logits, one) > info_nce(logits, both) - 1e-6


def test_a_text_of_no_image_is_only_a_wrong_answer() -> None:
    logits, positive = torch.zeros(2, 3), torch.tensor([[True, False, False], [False, True, False]])
    assert info_nce(logits, positive).item() == pytest.approx((math.log(3) + math.log(2)) / 2)
    logits.requires_grad_()
    info_nce(logits, positive).backward()
    assert (logits.grad[:, 2] > 0).all(), "its similarity is pushed down"


def test_the_twin_loss_is_a_choice_between_two() -> None:
    logits = torch.tensor([[3.0, 1.0, 0.5, 7.0], [2.0, 4.0, 2.5, -1.0]])
    positive = torch.tensor([[True, False, False, False], [True, False, True, False]])
    pairs = torch.tensor([[0, 1], [2, 3], [0, 2]])
    choices = [  # image, caption, twin; not image 1 with (0, 2): there the twin is true as well
        F.cross_entropy(torch.tensor([[3.0, 1.0]]), torch.tensor([0])),
        F.cross_entropy(torch.tensor([[2.0, 4.0]]), torch.tensor([0])),
        F.cross_entropy(torch.tensor([[2.5, -1.0]]), torch.tensor([0])),
        F.cross_entropy(torch.tensor([[3.0, 0.5]]), torch.tensor([0])),
    ]
    torch.testing.assert_close(twin_loss(logits, positive, pairs), torch.stack(choices).mean())
    assert twin_loss(logits, positive, pairs[:0]).item() == 0


# --- measures


def test_recall_of_a_matrix_by_hand() -> None:
    similarity = torch.tensor(
        [
            [0.9, 0.1, 0.8, 0.0],  # captions 0 and 1: first place
            [0.3, 0.9, 0.2, 0.8],  # caption 2: last
            [0.1, 0.2, 0.3, 0.25],  # caption 3: second
        ]
    )
    positive = torch.tensor(
        [[True, True, False, False], [False, False, True, False], [False, False, False, True]]
    )
    found = recall(similarity, positive)
    assert found["image to text R@1"] == pytest.approx(100 / 3)
    assert found["image to text R@5"] == pytest.approx(100)
    # Caption 0 finds its image first; 1 has image 1 and image 2 before its own; 2 is last; 3 has
    # one before it.
    assert found["text to image R@1"] == pytest.approx(25)
    assert found["text to image R@10"] == 100


def test_recall_counts_ranks_up_to_k() -> None:
    similarity = (
        torch.eye(12) * 0 - torch.arange(12.0)[None]
    )  # every image likes text 0 best, then 1, then 2 ...
    found = recall(similarity, torch.eye(12, dtype=torch.bool))
    assert [found[f"image to text R@{k}"] for k in (1, 5, 10)] == pytest.approx(
        [100 / 12, 500 / 12, 1000 / 12]
    )
    assert [found[f"text to image R@{k}"] for k in (1, 5, 10)] == [0, 0, 0], (
        "all images score the same"
    )


def test_who_says_the_same_of_all_finds_nothing() -> None:
    found = recall(torch.ones(30, 30), torch.eye(30, dtype=torch.bool))
    assert set(found.values()) == {0.0}
    perfect = recall(torch.eye(30), torch.eye(30, dtype=torch.bool))
    assert set(perfect.values()) == {100.0}


def test_the_same_text_is_right_for_each_of_its_images() -> None:
    dual = tiny_dual(["a red bar", "a blue bar"])
    texts, positive = same_texts(
        [["A red bar .", "a blue bar"], ["a red bar"], ["a blue bar", "a blue BAR"]], dual
    )
    assert len(texts) == 2 and positive.tolist() == [[True, True], [True, False], [False, True]]
    assert recall(positive.float(), positive)["text to image R@1"] == 100


class Judge:
    """Embeds texts by a table."""

    def __init__(self, table: dict[str, list[float]]) -> None:
        self.table = table

    def embed_texts(self, texts: list[str]) -> Tensor:
        """Look the texts up."""
        return torch.tensor([self.table[text] for text in texts])


def test_twins_are_counted_by_pair_and_by_image() -> None:
    images = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    captions = [["a small man"], ["a boy"], ["a dog"]]
    assert [hard_negatives(own[0]) for own in captions] == [
        ["a large man", "a small woman"],
        ["a girl"],
        [],
    ]
    judge: Any = Judge(
        {
            "a small man": [0.5, 0],
            "a large man": [0.1, 0],
            "a small woman": [0.5, 0],
            "a boy": [0, 0.3],
            "a girl": [1, 0.2],
        }
    )
    found = twin_accuracy(judge, images, captions)
    assert found["twins"] == pytest.approx(200 / 3), "a tie is lost"
    assert found["twins, all of an image"] == pytest.approx(50), "of the two images that have twins"
    assert twin_accuracy(judge, images[:1], [["a dog"]]) == {}


# --- what is drawn


def tiny_dual(captions: list[str], sizes: SmallClipConfig = TINY, seed: int = 0) -> DualEncoder:
    """Return an untrained small CLIP over all words of ``captions``."""
    torch.manual_seed(seed)
    return DualEncoder.new(sizes, tiny_encoder(), WordTokenizer.fit(captions, 1))


ITEMS = [
    Item("0", "train", ("a red bar on the left", "a small bar", "a bar")),
    Item("1", "train", ("A bar .", "a blue bar on a red ground")),
    Item("2", "train", ("a large bar",)),
]
WORDS = [c for item in ITEMS for c in item.captions] + ["right"]


def drawn(
    config: ContrastiveConfig, flips: list[bool], seed: int = 0
) -> tuple[list[str], Tensor, list[list[int]]]:
    """Return texts, positives and pairs of a batch of ``ITEMS``."""
    dual = tiny_dual(WORDS)
    texts = Texts(ITEMS, dual, mirrored=True)
    tokens, positive, pairs = texts.draw(ITEMS, flips, config, np.random.default_rng(seed))
    return [dual.tokenizer.decode(row) for row in tokens.tolist()], positive, pairs.tolist()


def test_all_captions_of_an_image_are_positives_and_so_are_identical_ones() -> None:
    said, positive, pairs = drawn(ContrastiveConfig(captions=9, twins=9), [False] * 3)
    assert len(said) == len(set(said)) == positive.shape[1], "each text stands once"
    for image, item in enumerate(ITEMS):
        own = {" ".join(tokenise(caption)) for caption in item.captions}
        assert {text for text, right in zip(said, positive[image], strict=True) if right} == own
    # "a small bar" and "a large bar" are twins of each other, and each is a caption of another
    # image.
    assert {(said[c], said[t]) for c, t in pairs} == {
        ("a red bar on the left", "a red bar on the right"),
        ("a small bar", "a large bar"),
        ("a large bar", "a small bar"),
        ("a blue bar on a red ground", "a red bar on a blue ground"),
        ("a blue bar on a red ground", "a blue ground on a red bar"),
    }
    without = positive.any(0).logical_not()
    assert {text for text, alone in zip(said, without, strict=True) if alone} == {
        "a red bar on the right",
        "a red bar on a blue ground",
        "a blue ground on a red bar",
    }


def test_as_many_captions_and_twins_as_asked_for() -> None:
    said, positive, pairs = drawn(ContrastiveConfig(captions=1, twins=0), [False] * 3)
    assert len(said) <= 3 and pairs == [] and positive.any(1).all()
    choices = {
        tuple(sorted(drawn(ContrastiveConfig(captions=1, twins=0), [False] * 3, seed)[0]))
        for seed in range(20)
    }
    assert len(choices) > 2, "other ones each time"
    assert (
        drawn(ContrastiveConfig(captions=1, twins=1), [False] * 3)[0]
        == drawn(ContrastiveConfig(captions=1, twins=1), [False] * 3)[0]
    )


def test_a_mirrored_image_loses_what_is_no_longer_true() -> None:
    said, positive, _ = drawn(ContrastiveConfig(captions=9, twins=0), [True] * 3)
    assert "a red bar on the left" not in said and positive[0].sum() == 2


def test_left_out_words_never_take_start_or_end() -> None:
    dual = tiny_dual(WORDS)
    texts, rng = Texts(ITEMS, dual, mirrored=False), np.random.default_rng(0)
    lengths = set()
    for _ in range(20):
        config = ContrastiveConfig(captions=9, twins=0, word_dropout=0.5)
        tokens, _, _ = texts.draw(ITEMS, [False] * 3, config, rng)
        for row in tokens.tolist():
            ids = [i for i in row if i != dual.tokenizer.pad_id]
            assert ids[0] == dual.tokenizer.start_id and ids[-1] == dual.tokenizer.end_id
            lengths.add(len(ids))
    assert min(lengths) == 2 and max(lengths) > 5


# --- runs

FAST: dict[str, Any] = {
    "epochs": 40,
    "batch_images": 8,
    "learning_rate": 3e-3,
    "average": 0.9,
    "patience": 40,
    "dtype": "fp32",
    "seed": 3,
    "weight_decay": 0.0,
}


def tiny_run(
    folder: Path, run: str = "run", flip: bool = False, **changes: Any
) -> ContrastiveTrainer:
    """Return a trainer on small images that are their own dev split."""
    train = tiny_manifest(folder / "images", train=12, dev=0, ragged=False)
    data = TrainingData(train, train, *features(folder, train, flip))
    config = ContrastiveConfig(**(FAST | changes))
    return ContrastiveTrainer(
        tiny_dual(list(train.captions()), seed=config.seed), data, config, folder / run, CPU
    )


def features(folder: Path, manifest: Manifest, flip: bool) -> list[Any]:
    """Return the stem's grid of the plain view and, if asked for, of the mirrored one."""
    options: dict[str, Any] = {"folder": folder / "features", "dtype": torch.float32, "device": CPU}
    return [
        extract(manifest, tiny_encoder(), "grid", view, **options)
        for view in ((False, True) if flip else (False,))
    ]


@pytest.fixture
def known_stem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ENCODERS, "tiny", lambda _: tiny_encoder())


@pytest.mark.usefixtures("known_stem")
def test_images_and_their_captions_find_each_other(tmp_path: Path) -> None:
    trainer = tiny_run(tmp_path, epochs=240, patience=240)
    before = measure(trainer.dual, trainer.data.dev, trainer.data.plain)
    stem = trainer.dual.images.stem.weights_hash()  # type: ignore[union-attr]
    best = trainer.train()
    after = measure(best, trainer.data.dev, trainer.data.plain)
    assert before["mean recall"] < 80 < 97 < after["mean recall"]
    assert after["twins"] >= 90 and after["score"] == pytest.approx(
        (after["mean recall"] + after["twins"]) / 2
    )
    assert best.images.stem is not None and best.images.stem.weights_hash() == stem, (
        "the stem is frozen"
    )
    run = best.images.training_run
    assert (
        run is not None
        and run["epochs"] == 240
        and run["dtype"] == "float32"
        and run["minutes"] > 0
    )
    lines = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    assert (
        len(lines) == 240
        and json.loads(lines[-1])["train_loss"] < json.loads(lines[0])["train_loss"] / 3
    )
    # Zero-shot: the colour of the bar, which no one trained it to name alone.
    items = trainer.data.dev.items
    vectors = best.embed_grid(trainer.data.plain.rows([item.image for item in items]))
    grounds = [item.captions[1].split()[0] for item in items]
    labels = sorted(set(grounds))
    found = best.classify(
        vectors, labels, ["{} with red", "{} with blue", "{} with green", "{} with white"]
    ).argmax(1)
    assert (
        np.mean([labels[i] == ground for i, ground in zip(found, grounds, strict=True)]) >= 0.4
    ), "chance is 0.25"


def test_reading_the_grid_back_weighs_all_that_varies() -> None:
    dual, grids = tiny_dual(["a red circle"]), torch.randn(200, 9, 12)
    grids[..., 0] = grids[..., 0] * 30 + 7  # loud
    grids[..., 1] = 3.0  # silent
    reader = Reconstruction(dual, grids)
    white = (grids.flatten(0, 1) - reader.mean) @ reader.whiten
    torch.testing.assert_close(white.mean(0), torch.zeros(12), atol=1e-4, rtol=0)
    spread = white.var(0, correction=0)
    assert 0.9 < spread.max() <= 1 and spread.max() / spread.median() < 30, (
        "heard, though 900 times as quiet"
    )
    assert spread.min() < 1e-6, "nothing is made of nothing"
    # A vector that tells nothing leaves all of the variance; one that tells all of it, none.
    with torch.no_grad():
        reader.read.bias.zero_()
        assert reader(torch.zeros(200, 24), as_picture(grids)).item() == pytest.approx(1, abs=1e-3)
        one = white.unflatten(0, (200, 9))[0].flatten()
        reader.read.bias.copy_(one)
        assert reader(torch.zeros(1, 24), as_picture(grids[:1])).item() == pytest.approx(
            0, abs=1e-6
        )


@pytest.mark.usefixtures("known_stem")
def test_an_image_half_that_only_looks_learns_what_stands_where_and_no_words(
    tmp_path: Path,
) -> None:
    trainer = tiny_run(tmp_path, looking=30, epochs=1, reconstruction=1.0)
    before = {key: value.clone() for key, value in trainer.weights.state_dict().items()}
    for _ in range(30):
        trainer._run_epoch(tqdm(disable=True))
    history = trainer.progress.history
    assert history[-1]["train_loss"] < 0.6 * history[0]["train_loss"]
    assert not any("twins" in entry for entry in history), (
        "nothing is compared before there are words"
    )
    moved = {
        key.split(".")[0]
        for key, value in trainer.weights.state_dict().items()
        if not value.equal(before[key])
    }
    assert moved == {"vision_model", "visual_projection"}
    trainer.train()
    history = trainer.progress.history
    assert len(history) == 31 and "twins" in history[-1] and trainer.progress.best_epoch == 30
    assert not trainer.weights.text_projection.weight.equal(before["text_projection.weight"])


@pytest.mark.usefixtures("known_stem")
def test_a_vector_from_which_captions_are_said_learns_to_hold_them(tmp_path: Path) -> None:
    trainer = tiny_run(tmp_path, epochs=40, captioning=1.0)
    said: list[float] = []
    say = ContrastiveTrainer._say

    def heard(self: ContrastiveTrainer, images: Tensor, tokens: Tensor, positive: Tensor) -> Tensor:
        value = say(self, images, tokens, positive)
        own: Any = self.learners["speaker"]
        losses = []  # caption by caption, without padding
        for image, column in positive.nonzero().tolist():
            ids = [i for i in tokens[column].tolist() if i != self.dual.tokenizer.pad_id]
            memory = own.encode(images[image : image + 1])
            scores = own(memory, torch.tensor([ids[:-1]]), torch.tensor([0]))[0].log_softmax(-1)
            losses += [-scores[place, word] for place, word in enumerate(ids[1:])]
        if not own.training and not said:
            torch.testing.assert_close(value, torch.stack(losses).mean(), atol=1e-4, rtol=1e-4)
        said.append(value.item())
        return value

    trainer.learners.eval()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ContrastiveTrainer, "_say", heard)
        best = trainer.train()
    assert sum(said[-4:]) < 0.6 * sum(said[:4])
    assert not any("speaker" in key for key in best.clip.state_dict())
    assert not list((tmp_path / "run" / "best").rglob("*speaker*"))


def test_looking_needs_something_to_learn_by(tmp_path: Path) -> None:
    with pytest.raises(CapGenError, match="no loss to learn from"):
        tiny_run(tmp_path, looking=2)


@pytest.mark.usefixtures("known_stem")
@pytest.mark.parametrize("flip", [False, True])
def test_a_run_that_was_stopped_ends_as_one_that_was_not(
    tmp_path: Path, flip: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {
        "flip": flip,
        "epochs": 4,
        "feature_dropout": 0.3,
        "word_dropout": 0.2,
    }
    if flip:
        options |= {"epochs": 3, "looking": 1, "reconstruction": 0.5, "captioning": 0.5}
    whole = tiny_run(tmp_path, "whole", **options).train()
    stopped = tiny_run(tmp_path, "stopped", **options)

    class Stop(Exception):
        """The power is gone."""

    def until_the_third_epoch(trainer: ContrastiveTrainer, bar: Any) -> None:
        if trainer.progress.epoch == 2:
            raise Stop
        run_epoch(trainer, bar)

    run_epoch = ContrastiveTrainer._run_epoch
    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(ContrastiveTrainer, "_run_epoch", until_the_third_epoch)
        stopped.train()
    torch.manual_seed(99)
    resumed = tiny_run(tmp_path, "stopped", **options)
    again = resumed.train()
    assert resumed.progress.epoch == 4 and len(resumed.progress.history) == 4
    for key, value in whole.clip.state_dict().items():
        assert torch.equal(value, again.clip.state_dict()[key]), key


@pytest.mark.usefixtures("known_stem")
def test_a_run_of_other_settings_is_not_continued(tmp_path: Path) -> None:
    tiny_run(tmp_path, epochs=1).train()
    with pytest.raises(CapGenError, match="other settings"):
        tiny_run(tmp_path, epochs=2).train()


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    trainer = tiny_run(tmp_path)
    with torch.no_grad():
        trainer.weights.visual_projection.weight.fill_(torch.nan)
    with pytest.raises(CapGenError, match="the loss is nan"):
        trainer.train()


@pytest.mark.usefixtures("known_stem")
def test_patience_ends_a_run_that_gets_no_better(tmp_path: Path) -> None:
    trainer = tiny_run(tmp_path, epochs=30, learning_rate=1e-9, patience=2)
    trainer.train()
    assert trainer.progress.epoch < 30 and trainer.progress.epoch - trainer.progress.best_epoch >= 2


@pytest.fixture
def tiny_preset(known_stem: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Preset:
    """Return a preset whose data set is a few small images."""
    manifest = tiny_manifest(tmp_path / "images", train=12, dev=6, test=6, ragged=False)
    monkeypatch.setattr(pretraining, "load_dataset", lambda *_: manifest)
    monkeypatch.setenv("CAPGEN_DATA", str(tmp_path / "data"))
    training = ContrastiveConfig(**(FAST | {"epochs": 2}))
    judge = ClipRecipe(replace(TINY, text_width=16), replace(training, seed=9), "word")
    return Preset(
        "tiny",
        "tiny",
        "tiny",
        flip=True,
        min_count=1,
        clip=ClipRecipe(TINY, training, "word"),
        judge=judge,
    )


def test_a_preset_trains_its_small_clip_once(tiny_preset: Preset, tmp_path: Path) -> None:
    folder = pretrain_dual_encoder(tiny_preset)
    assert (
        folder == dual_encoder_folder(tiny_preset) == tmp_path / "data" / "encoders" / "tiny_clip"
    )
    dual = DualEncoder.load(folder)
    assert dual.name == "small_clip on tiny"
    run = dual.images.training_run
    assert run is not None and set(run) >= {"minutes", "dev", "test"}
    stem = extract(pretraining.load_dataset("tiny"), tiny_encoder(), "grid")
    scores = measure(dual, pretraining.load_dataset("tiny").split("test"), stem)
    assert run["test"] == {key: round(value, 2) for key, value in scores.items()}, (
        "of the weights that are kept"
    )
    written = (folder / "model.safetensors").stat().st_mtime_ns
    shutil.rmtree(folder.parent / "tiny_clip-run")
    assert (
        pretrain_dual_encoder(tiny_preset) == folder
        and (folder / "model.safetensors").stat().st_mtime_ns == written
    )


def test_the_judge_is_another_one(tiny_preset: Preset) -> None:
    clip, judge = (
        DualEncoder.load(pretrain_dual_encoder(tiny_preset, judge=judge)) for judge in (False, True)
    )
    assert (
        judge.clip.config.text_config.hidden_size == 16 != clip.clip.config.text_config.hidden_size
    )
    assert dual_encoder_folder(tiny_preset, judge=True).name == "tiny_judge"


def test_judges_share_neither_seed_nor_width_nor_vocabulary() -> None:
    for preset in PRESETS.values():
        assert preset.clip.training.seed != preset.judge.training.seed
        assert preset.clip.tokenizer != preset.judge.tokenizer
        assert preset.clip.sizes.text_width != preset.judge.sizes.text_width
        assert preset.clip.sizes.vision_width != preset.judge.sizes.vision_width


# --- the shapes preset


@pytest.mark.slow
@pytest.mark.timeout(TRAINING_LIMIT)
def test_on_shapes_a_true_caption_is_preferred_to_its_twins(
    reader_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_on_shapes(reader_data, "clip_prefix")
    monkeypatch.setenv("CAPGEN_DATA", str(reader_data))
    dual = DualEncoder.load(dual_encoder_folder(PRESETS["shapes"]))
    manifest = load_dataset("shapes")
    cache = extract(manifest, dual.images.stem, "grid")  # type: ignore[arg-type]
    scenes = load_scenes(manifest.root)
    test = manifest.split("test")
    ordinary = replace(
        test, items=tuple(item for item in test.items if not scenes[Path(item.image).name].novel)
    )
    scores = measure(dual, ordinary, cache)
    assert scores["twins"] >= 95, scores
