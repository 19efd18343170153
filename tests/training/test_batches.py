"""Batches by image, the mirrored view, and a loss that counts exactly the tokens it should."""

import math
from dataclasses import replace

import pytest
import torch
from helpers import tiny_data, tiny_model
from torch.nn import functional as F

from capgen_utils.config import TrainingConfig
from capgen_utils.data.manifest import Item
from capgen_utils.models import IGNORED, caption_loss
from capgen_utils.text.words import WordTokenizer
from capgen_utils.training.batches import (
    Batch,
    TrainingData,
    captions_of,
    chunks_by_length,
    count_targets,
    epoch_batches,
    make_batch,
)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainingData, WordTokenizer]:
    data, _, tokenizer = tiny_data(tmp_path_factory.mktemp("batches"), flip=True, train=13)
    return data, tokenizer


def test_every_image_comes_once_an_epoch_with_all_of_its_captions(prepared: tuple) -> None:
    data, tokenizer = prepared
    config = TrainingConfig(batch_images=4)
    seen: list[Item] = []
    for items, flips in epoch_batches(data, config, 0):
        assert 1 <= len(items) <= 4 and len(flips) == len(items)
        batch = make_batch(items, [False] * len(items), data, tokenizer, 16)
        assert batch.features.shape == (len(items), 9, 12)
        assert torch.equal(batch.features, data.plain.rows([i.image for i in items]))
        assert batch.image.bincount().tolist() == [len(i.captions) for i in items]
        said = [tokenizer.encode(c, 16) for i in items for c in i.captions]
        for row, ids in zip(batch.tokens.tolist(), said, strict=True):
            assert row == ids + [tokenizer.pad_id] * (len(row) - len(ids))
        seen += items
    assert sorted(i.image for i in seen) == [i.image for i in data.train.items]


def test_order_depends_on_seed_and_epoch_alone(prepared: tuple) -> None:
    data, _ = prepared

    def order(seed: int, epoch: int) -> list:
        batches = epoch_batches(data, TrainingConfig(batch_images=4, seed=seed), epoch)
        return [([i.image for i in items], flips) for items, flips in batches]

    assert order(1, 0) == order(1, 0)
    assert len({str(order(s, e)) for s in (1, 2) for e in (0, 1)}) == 4


@pytest.mark.parametrize("world", [2, 3])
def test_several_processes_share_the_same_batches(prepared: tuple, world: int) -> None:
    data, _ = prepared
    config = TrainingConfig(batch_images=4)
    alone = list(epoch_batches(data, config, 2))
    shared = [list(epoch_batches(data, config, 2, rank, world)) for rank in range(world)]
    assert {len(batches) for batches in shared} == {len(alone)}, (
        "all processes take the same number of steps"
    )
    for number, (items, flips) in enumerate(alone):
        parts = [pair for batches in shared for pair in zip(*batches[number], strict=True)]
        assert sorted((i.image, f) for i, f in parts) == sorted(
            (i.image, f) for i, f in zip(items, flips, strict=True)
        )


def test_a_mirrored_image_loses_its_captions_of_left_and_right() -> None:
    item = Item(
        "a.png",
        "train",
        ("A bar at the left .", "Leftover cake", "to its RIGHT, a dog", "a bright dog"),
    )
    assert captions_of(item, True) == ("Leftover cake", "a bright dog")
    assert captions_of(item, False) == item.captions


def test_mirrored_features_go_with_mirrored_captions(prepared: tuple) -> None:
    data, tokenizer = prepared
    items = list(data.train.items)
    batch = make_batch(items, [True] * len(items), data, tokenizer, 16)
    plain, flipped = (cache.rows([i.image for i in items]) for cache in (data.plain, data.flipped))
    for row, item in enumerate(items):
        kept = captions_of(item, True)
        expected = (
            flipped if kept else plain
        )  # with nothing left to say, an image is taken as it is
        assert torch.equal(batch.features[row], expected[row])
        assert batch.image.eq(row).sum() == len(kept or item.captions)
    sides = {tokenizer.encode(word)[1] for word in ("left", "right")}
    mirrored = [row for row, item in enumerate(items) if captions_of(item, True)]
    tokens = batch.tokens[torch.isin(batch.image, torch.tensor(mirrored))]
    assert mirrored and not sides & set(tokens.flatten().tolist())


def test_without_a_mirrored_cache_nothing_is_mirrored(prepared: tuple) -> None:
    data, _ = prepared
    plain = replace(data, flipped=None)
    assert not any(
        f for _, flips in epoch_batches(plain, TrainingConfig(batch_images=4), 0) for f in flips
    )
    flips = [
        f
        for e in range(20)
        for _, fs in epoch_batches(data, TrainingConfig(batch_images=4), e)
        for f in fs
    ]
    assert 0.4 < sum(flips) / len(flips) < 0.6


def test_unreadable_images_are_left_out(prepared: tuple) -> None:
    data, _ = prepared
    broken, broken_dev = data.train.items[2].image, data.dev.items[0].image
    failed = replace(data.plain, failed={broken: "damaged", broken_dev: "damaged"})
    left = replace(data, plain=failed).readable()
    assert len(left.train) == len(data.train) - 1 and len(left.dev) == len(data.dev) - 1
    assert broken not in {i.image for i in left.train.items}
    flipped = replace(data.flipped, failed={broken: "damaged"})
    assert len(replace(data, flipped=flipped).readable().train) == len(data.train) - 1


# --- the loss


def test_the_loss_of_a_hand_built_example() -> None:
    """Two captions, <start> A <end> and <start> B A <end>: five targets. Padding and start tokens
    are none."""
    start, end, a, b, pad = 1, 2, 3, 4, 0
    tokens = torch.tensor([[start, a, end, pad], [start, b, a, end]])
    batch = Batch(torch.zeros(2, 1), tokens, torch.tensor([0, 1]))
    # The model gives the right word 1/2 after <start>, 1/4 later, 1/8 for the end token.
    right = {0: 0.5, 1: 0.25, 2: 0.125}
    total = 0.0
    chunks = chunks_by_length(batch, pad)
    for chunk in chunks:
        assert not (chunk.targets == start).any() and (chunk.inputs[:, 0] == start).all()
        logits = torch.full((*chunk.targets.shape, 5), -torch.inf)
        for m, row in enumerate(chunk.targets.tolist()):
            for t, target in enumerate(row):
                if target == IGNORED:
                    logits[m, t] = 0.0
                    continue
                share = right[2] if target == end else right[min(t, 1)]
                logits[m, t, target] = math.log(share)
                logits[m, t, (target + 1) % 5] = math.log(1 - share)
        total += caption_loss(logits, chunk.targets).item()
    # A: 1/2, end: 1/8, B: 1/2, A: 1/4, end: 1/8
    assert math.isclose(
        total, math.log(2) + math.log(8) + math.log(2) + math.log(4) + math.log(8), rel_tol=1e-6
    )
    assert int(count_targets(chunks)) == 5


def test_label_smoothing_is_spread_over_the_vocabulary() -> None:
    logits, targets = torch.randn(2, 3, 5), torch.tensor([[1, 2, IGNORED], [4, IGNORED, IGNORED]])
    steps = logits.log_softmax(-1)
    expected = -sum(
        0.9 * steps[m, t, targets[m, t]] + 0.1 * steps[m, t].mean()
        for m, t in ((0, 0), (0, 1), (1, 0))
    )
    torch.testing.assert_close(caption_loss(logits, targets, 0.1), expected)
    half = caption_loss(logits.bfloat16(), targets)
    assert half.dtype == torch.float32, "the sum is taken in fp32"


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 50])
def test_chunks_are_the_same_captions_and_the_same_loss(prepared: tuple, count: int) -> None:
    data, tokenizer = prepared
    items = list(data.train.items)
    batch = make_batch(items, [False] * len(items), data, tokenizer, 16)
    model = tiny_model(tokenizer=tokenizer)

    def loss(parts: list) -> tuple[float, int]:
        with torch.no_grad():
            memory = model.encode(batch.features.float())
            losses = [caption_loss(model(memory, c.inputs, c.image), c.targets) for c in parts]
        return sum(x.item() for x in losses), int(count_targets(parts))

    chunks = chunks_by_length(batch, tokenizer.pad_id, count)
    assert len(chunks) == min(count, len(batch.tokens))
    assert sum(len(c.image) for c in chunks) == len(batch.tokens)
    assert [c.inputs.shape[1] for c in chunks] == sorted(c.inputs.shape[1] for c in chunks)
    whole, tokens = loss(chunks_by_length(batch, tokenizer.pad_id, 1))
    parts, same_tokens = loss(chunks)
    assert (
        same_tokens
        == tokens
        == sum(len(tokenizer.encode(c, 16)) - 1 for i in items for c in i.captions)
    )
    assert math.isclose(parts, whole, rel_tol=1e-5)


def test_the_end_token_is_a_target_of_every_caption_also_of_cut_ones(prepared: tuple) -> None:
    data, tokenizer = prepared
    items = list(data.train.items)
    batch = make_batch(items, [False] * len(items), data, tokenizer, 6)
    chunks = chunks_by_length(batch, tokenizer.pad_id)
    assert sum(int((c.targets == tokenizer.end_id).sum()) for c in chunks) == len(batch.tokens)
    assert max(c.inputs.shape[1] for c in chunks) <= 5
    assert not any((c.inputs == tokenizer.end_id).any() and c.inputs.shape[1] == 1 for c in chunks)


def test_logits_are_shifted_once() -> None:
    """A model that repeats its input token is right exactly where a caption repeats a word."""
    tokens = torch.tensor([[1, 3, 3, 4, 2]])
    (chunk,) = chunks_by_length(
        Batch(torch.zeros(1, 1), tokens, torch.zeros(1, dtype=torch.long)), 0, 1
    )
    logits = F.one_hot(chunk.inputs, 5).float() * 100
    assert caption_loss(logits, chunk.targets).item() == pytest.approx(
        300
    )  # 1->3, 3->4 and 4->2 are wrong
