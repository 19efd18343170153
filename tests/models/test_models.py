"""The captioner contract, held by every registered model: a sixth one is tested by being
registered."""

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import TINY_SIZES, VARIANTS, tiny_config, tiny_model, tiny_shape, tiny_tokenizer
from torch import Tensor

from capgen_utils import models
from capgen_utils.common.files import CapGenError
from capgen_utils.config import DecodingConfig
from capgen_utils.decoding.captions import Specials
from capgen_utils.decoding.run import decode_features
from capgen_utils.models.base import IGNORED, Grouping, caption_loss, dropout
from capgen_utils.models.layers import attend
from capgen_utils.training.pretraining import JointCaptioner
from capgen_utils.vision.encoders import new_shapes_cnn

NAMES = sorted([*models.MODELS, *VARIANTS])
RAGGED = torch.tensor([0, 0, 0, 1, 2, 2, 4])  # image 3 has no caption, image 1 has one
SHUFFLED = torch.tensor([2, 0, 4, 0, 1, 2, 0])


def some_tokens(rows: int = 7, length: int = 9, seed: int = 1) -> Tensor:
    tokens = torch.randint(4, 16, (rows, length), generator=torch.Generator().manual_seed(seed))
    tokens[:, 0] = 1
    return tokens


def some_features(name: str = "transformer", images: int = 5) -> Tensor:
    return torch.randn(images, *tiny_shape(name), generator=torch.Generator().manual_seed(2))


def tensors_of(value: Any) -> list[Tensor]:
    """Return all tensors that a memory or state holds, however it is built."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return [t for v in value.values() for t in tensors_of(v)]
    if isinstance(value, (list, tuple)):
        return [t for v in value for t in tensors_of(v)]
    return (
        [t for v in vars(value).values() for t in tensors_of(v)]
        if hasattr(value, "__dict__")
        else []
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "image", [RAGGED, SHUFFLED, torch.arange(5)], ids=["ragged", "shuffled", "one each"]
)
@torch.inference_mode()
def test_stepping_equals_reading_all_at_once(name: str, image: Tensor) -> None:
    model, tokens = tiny_model(name), some_tokens(len(image))
    memory = model.encode(some_features(name))
    whole = model(memory, tokens, image)
    assert whole.shape == (len(image), 9, 16)
    state = model.start(memory).select(image)
    for position in range(tokens.shape[1]):
        logits, state, weights = model.step(tokens[:, position], state)
        torch.testing.assert_close(logits, whole[:, position], atol=1e-4, rtol=1e-4)
        assert not weights


@pytest.mark.parametrize("name", NAMES)
@torch.inference_mode()
def test_each_caption_sees_its_own_image_only(name: str) -> None:
    model, tokens, features = tiny_model(name), some_tokens(), some_features(name)
    together = model(model.encode(features), tokens, SHUFFLED)
    for row, image in enumerate(SHUFFLED.tolist()):
        alone = model(
            model.encode(features[image : image + 1]),
            tokens[row : row + 1],
            torch.zeros(1, dtype=torch.long),
        )
        torch.testing.assert_close(together[row], alone[0], atol=1e-4, rtol=1e-4)
    features[2] += 1
    changed = (model(model.encode(features), tokens, SHUFFLED) - together).abs().amax((1, 2)) > 1e-3
    assert changed.tolist() == (SHUFFLED == 2).tolist()


@pytest.mark.parametrize("name", NAMES)
@torch.inference_mode()
def test_no_word_sees_the_words_after_it(name: str) -> None:
    model, tokens = tiny_model(name), some_tokens()
    memory = model.encode(some_features(name))
    before = model(memory, tokens, RAGGED)
    changed = tokens.clone()
    changed[:, 5] = torch.where(tokens[:, 5] == 4, 5, 4)
    after = model(memory, changed, RAGGED)
    torch.testing.assert_close(before[:, :5], after[:, :5], atol=1e-5, rtol=1e-5)
    assert (before[:, 5] - after[:, 5]).abs().amax(-1).min() > 1e-3


@pytest.mark.parametrize("name", NAMES)
@torch.inference_mode()
def test_padding_and_the_other_captions_change_nothing(name: str) -> None:
    model, tokens = tiny_model(name), some_tokens()
    memory = model.encode(some_features(name))
    padded = torch.cat([tokens, torch.zeros(7, 4, dtype=torch.long)], 1)
    short = model(memory, tokens, RAGGED)
    torch.testing.assert_close(model(memory, padded, RAGGED)[:, :9], short, atol=1e-4, rtol=1e-4)
    rows = torch.tensor([5, 1, 3])
    torch.testing.assert_close(
        model(memory, tokens[rows], RAGGED[rows]), short[rows], atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("name", NAMES)
@torch.inference_mode()
def test_select_reorders_drops_and_repeats(name: str) -> None:
    model, tokens = tiny_model(name), some_tokens()
    memory = model.encode(some_features(name))
    state = model.start(memory).select(RAGGED)
    for position in range(4):
        logits, state, _ = model.step(tokens[:, position], state)
    straight, _, _ = model.step(tokens[:, 4], state)
    for rows in ([6, 5, 4, 3, 2, 1, 0], [2, 2, 2, 0, 4], [3], [6, 0, 6]):
        chosen = torch.tensor(rows)
        again, _, _ = model.step(tokens[chosen, 4], state.select(chosen))
        torch.testing.assert_close(again, straight[chosen], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
@torch.inference_mode()
def test_an_images_tensors_are_shared_not_copied(name: str) -> None:
    model = tiny_model(name)
    images = 8
    memory = model.encode(some_features(name, images))
    shared = {t.data_ptr() for t in tensors_of(memory) if t.is_floating_point()}
    assert shared, "a memory holds tensors"
    state = model.start(memory)
    rows = torch.arange(images).repeat_interleave(5)  # five hypotheses an image
    for image_rows in (
        rows,
        torch.arange(len(rows)).flip(0),
        torch.arange(25),
    ):  # the last leaves 5 of 8 images
        state = state.select(image_rows)
        pointers = {t.data_ptr() for t in tensors_of(state)}
        assert shared <= pointers, "select copied what belongs to the images"
        _, state, _ = model.step(torch.full((len(image_rows),), 5), state)
    few = state.select(torch.tensor([0]))
    assert not shared & {t.data_ptr() for t in tensors_of(few)}, (
        "seven of eight images are gone, yet they are kept"
    )
    full = sum(t.numel() for t in tensors_of(memory))
    assert sum(t.numel() for t in tensors_of(few.memory)) < full / 2


@pytest.mark.parametrize("name", NAMES)
@torch.inference_mode()
def test_attention_weights_are_shares_and_do_not_change_the_words(name: str) -> None:
    model, tokens = tiny_model(name), some_tokens()
    features = some_features(name)
    plain = model.start(model.encode(features)).select(RAGGED)
    looking = model.start(model.encode(features)).select(RAGGED)
    for position in range(4):
        expected, plain, _ = model.step(tokens[:, position], plain)
        logits, looking, weights = model.step(tokens[:, position], looking, attention=True)
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
        for values in weights.values():
            assert values.ndim == 3 and values.shape[0] == 7 and values.shape[2] == 9
            assert (values >= 0).all()
            torch.testing.assert_close(values.sum(-1), torch.ones(values.shape[:2]))
    if name == "transformer":
        assert sorted(weights) == ["layer0", "layer1"]
        assert weights["layer0"].shape == (7, 4, 9)


@torch.inference_mode()
def test_attention_weights_are_those_of_the_captions_own_image() -> None:
    model, tokens, features = tiny_model(), some_tokens(), some_features()
    _, _, together = model.step(
        tokens[:, 0], model.start(model.encode(features)).select(SHUFFLED), attention=True
    )
    for row, image in enumerate(SHUFFLED.tolist()):
        state = model.start(model.encode(features[image : image + 1]))
        _, _, alone = model.step(tokens[row : row + 1, 0], state, attention=True)
        torch.testing.assert_close(
            together["layer0"][row], alone["layer0"][0], atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("name", NAMES)
def test_hyperparameters_have_defaults_and_survive_json(name: str) -> None:
    name, config = VARIANTS.get(name, (name,))[0], tiny_config(name)
    kind = models.MODELS[name].Config
    assert models.model_config(name, dict(vars(config))) == config
    assert models.model_config(name, {}) == kind()
    with pytest.raises(CapGenError, match="surprise"):
        models.model_config(name, {"surprise": 1})


def test_unknown_models_are_refused() -> None:
    for ask in (
        lambda: models.model_config("lstm9000", {}),
        lambda: models.build_model("lstm9000", None, tiny_tokenizer(), (9, 12)),
    ):
        with pytest.raises(CapGenError, match="transformer"):
            ask()


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(CapGenError, match="n_head"):
        tiny_model(d_model=30, n_head=4)


# --- training


@pytest.mark.parametrize("name", NAMES)
def test_eight_images_are_learned_by_heart(name: str) -> None:
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    model = tiny_model(name, tokenizer).train()
    features = some_features(name, 8)
    generator = torch.Generator().manual_seed(0)
    captions = [
        [1, *torch.randint(4, 16, (n,), generator=generator).tolist(), 2]
        for n in (3, 4, 5, 6, 3, 4, 5, 6)
    ]
    tokens = torch.zeros(8, 8, dtype=torch.long)
    for row, caption in zip(tokens, captions, strict=True):
        row[: len(caption)] = torch.tensor(caption)
    targets = tokens[:, 1:].masked_fill(tokens[:, 1:] == 0, IGNORED)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    started = time.perf_counter()
    for _ in range(200):
        loss = caption_loss(model(model.encode(features), tokens[:, :-1], torch.arange(8)), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss.item() < 0.5:
            break
    assert time.perf_counter() - started < 60
    specials = Specials(1, 2, tokenizer.banned_ids)
    found = decode_features(model.eval(), features, specials, DecodingConfig(beam=1, max_length=10))
    right = {
        f[0].tokens
        for f, caption in zip(found, captions, strict=True)
        if f[0].tokens == tuple(caption[1:-1])
    }
    assert len(right) >= 6


@pytest.mark.parametrize("name", [n for n in NAMES if hasattr(tiny_config(n), "word_dropout")])
def test_word_dropout_hides_words_only_while_training(name: str) -> None:
    tokens, features = some_tokens(), some_features(name)
    plain, hiding = tiny_model(name), tiny_model(name, word_dropout=0.5)

    def read(model: models.CaptionModel, given: Tensor = tokens) -> Tensor:
        with torch.no_grad():
            return model(model.encode(features), given, RAGGED)

    torch.testing.assert_close(read(hiding), read(plain))
    plain.train(), hiding.train()
    assert not torch.allclose(read(hiding), read(plain))
    all_hidden = tiny_model(name, word_dropout=1.0).train()
    unknown = tokens.clone()
    unknown[:, 1:] = 3  # the start token stays
    torch.testing.assert_close(read(all_hidden), read(plain, unknown))


@pytest.mark.parametrize("name", NAMES)
def test_dropout_acts_only_while_training(name: str) -> None:
    model, features, tokens = tiny_model(name, dropout=0.5), some_features(name), some_tokens()

    def read() -> Tensor:
        with torch.no_grad():
            return model(model.encode(features), tokens, RAGGED)

    assert torch.equal(read(), read())
    torch.testing.assert_close(
        read(), tiny_model(name)(tiny_model(name).encode(features), tokens, RAGGED)
    )
    model.train()
    assert not torch.allclose(read(), read())


@pytest.mark.parametrize("name", NAMES)
def test_every_weight_learns(name: str) -> None:
    model = tiny_model(name).train()
    logits = model(model.encode(some_features(name)), some_tokens(), RAGGED)
    caption_loss(logits, some_tokens(seed=3)).backward()
    idle = [
        k
        for k, p in model.named_parameters()
        if p.requires_grad and (p.grad is None or not p.grad.abs().sum())
    ]
    assert idle == []


def test_the_joint_captioner_is_the_encoder_followed_by_the_captioner() -> None:
    torch.manual_seed(0)
    encoder = new_shapes_cnn(32)
    captioner = tiny_model(shape=(64, 32))
    joint = JointCaptioner(encoder, captioner).eval()
    pixels = torch.randint(0, 255, (3, 64, 64, 3)).float()
    tokens, image = some_tokens(3), torch.arange(3)
    expected = captioner(captioner.encode(encoder(pixels)["grid"]), tokens, image)
    torch.testing.assert_close(joint(joint.encode(pixels), tokens, image), expected)
    joint.train()(joint.encode(pixels), tokens, image).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in encoder.trunk.parameters())
    assert not encoder.training


# --- the parts


@pytest.mark.parametrize(
    "image", [RAGGED, SHUFFLED, torch.arange(5).repeat_interleave(2), torch.tensor([3])]
)
def test_grouping_puts_the_captions_of_an_image_together_and_back(image: Tensor) -> None:
    grouping = Grouping(image, 5)
    rows = torch.arange(len(image) * 3.0).view(-1, 3) + 1
    grouped = grouping.gather(rows)
    for i in range(5):
        own = rows[image == i]
        assert torch.equal(grouped[i, : len(own)], own)
        assert not grouped[i, len(own) :].any()
    assert torch.equal(grouping.scatter(grouped), rows)


@pytest.mark.parametrize("causal", [False, True])
def test_attend_is_the_formula_also_under_autocast(causal: bool) -> None:
    q, k, v = (torch.randn(2, 4, 6, 8) for _ in range(3))
    scores = q @ k.transpose(-1, -2) / 8**0.5
    if causal:
        scores = scores.masked_fill(torch.ones(6, 6).triu(1).bool(), -torch.inf)
    expected = scores.softmax(-1) @ v
    torch.testing.assert_close(attend(q, k, v, causal), expected, atol=1e-5, rtol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(attend(q, k, v, causal).float(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("probability", [0.1, 0.3, 0.5, 0.9])
def test_dropout_drops_the_right_share_and_keeps_the_mean(probability: float) -> None:
    x = torch.ones(1000, 1003, requires_grad=True)
    y = dropout(x, probability, True)
    dropped = (y == 0).float().mean().item()
    assert abs(dropped - probability) < 0.005
    assert abs(y.mean().item() - 1) < 0.005
    assert len(y.unique()) == 2
    y.sum().backward()
    assert torch.equal(x.grad, y.detach()), (
        "the gradient passes where the value passed, scaled alike"
    )
    rows = (y == 0).float().mean(1)
    assert (rows - probability).abs().max() < 0.1, "no row is treated apart"
    neighbours = ((y[:, 1:] == 0) & (y[:, :-1] == 0)).float().mean().item()
    assert abs(neighbours - probability**2) < 0.01, "neighbours are dropped independently"


@pytest.mark.parametrize(
    "make", [lambda x: x, lambda x: x.t(), lambda x: x[:, :1], lambda x: x[:0]]
)
def test_dropout_of_any_layout_and_size(make: Callable[[Tensor], Tensor]) -> None:
    x = make(torch.rand(64, 31) + 1)
    y = dropout(x, 0.5, True)
    assert y.shape == x.shape
    torch.testing.assert_close(y[y != 0], x[y != 0] * 2)


def test_dropout_is_nothing_in_use_and_repeats_with_the_seed() -> None:
    x = torch.randn(50, 50)
    assert dropout(x, 0.5, False) is x or torch.equal(dropout(x, 0.5, False), x)
    assert torch.equal(dropout(x, 0.0, True), x)
    torch.manual_seed(4)
    first = dropout(x, 0.5, True)
    torch.manual_seed(4)
    assert torch.equal(dropout(x, 0.5, True), first)
    assert not torch.equal(dropout(x, 0.5, True), first)
    assert dropout(x.bfloat16(), 0.5, True).dtype == torch.bfloat16


def test_tiny_sizes_are_known() -> None:
    assert set(TINY_SIZES) >= {"seq_len", "d_model"}


def test_shifted_moves_each_image_by_a_few_pixels_and_repeats_its_edge() -> None:
    from capgen_utils.training.pretraining import shifted

    torch.manual_seed(0)
    pixels = torch.arange(20.0 * 20).view(1, 20, 20, 1).expand(64, -1, -1, 3)
    moved = shifted(pixels, 3)
    assert moved.shape == pixels.shape
    centres = moved[:, 10, 10, 0]
    rows, columns = (centres // 20 - 10).long(), (centres % 20 - 10).long()
    assert set(rows.tolist()) == set(columns.tolist()) == set(range(-3, 4))
    for image, row, column in zip(moved, rows.tolist(), columns.tolist(), strict=True):
        expected = pixels[0, max(0, row) : 20 + min(0, row), max(0, column) : 20 + min(0, column)]
        inside = image[max(0, -row) : 20 - max(0, row), max(0, -column) : 20 - max(0, column)]
        assert torch.equal(inside, expected), (row, column)
    assert moved.min() >= pixels.min() and moved.max() <= pixels.max()
