"""Attention by word: sums, merged byte pairs, rollout, and maps on pixels."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import PHOTOS, save_tiny_bundle, tiny_encoder, tiny_model, tiny_tokenizer
from show_helpers import maps_of
from torch import Tensor

from capgen_utils.bundle import Bundle
from capgen_utils.captioner import Captioner
from capgen_utils.common.files import CapGenError
from capgen_utils.config import DecodingConfig
from capgen_utils.decoding.captions import Specials
from capgen_utils.decoding.run import word_attention
from capgen_utils.evaluation.attention import (
    MEAN,
    ROLLOUT,
    Word,
    caption_maps,
    layer_attention,
    on_grid,
    rollout,
    words_of,
)
from capgen_utils.text.bpe import BpeTokenizer
from capgen_utils.text.words import WordTokenizer

PATHS = sorted(PHOTOS.glob("*.jpg"))[:3]
LOOKING = ["attend_tell", "transformer", "clip_gpt2", "clip_gpt2, no gate"]
CAPTION = "word3 word1 word4 word1 word5"


def tiny_captioner(model: str, shape: tuple[int, ...] | None = None) -> Captioner:
    encoder, tokenizer = tiny_encoder(), tiny_tokenizer()
    info = {
        "extraction_dtype": "float32",
        "decoding": {"beam": 2, "max_length": 8, "min_length": 2},
    }
    return Captioner(
        Bundle(tiny_model(model, tokenizer, shape), tokenizer, info), encoder, torch.device("cpu")
    )


def shares(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)).softmax(-1)


# --- maps


@pytest.mark.parametrize("model", LOOKING)
def test_every_map_of_every_word_sums_to_one(model: str) -> None:
    captioner = tiny_captioner(model)
    for maps, said in zip(caption_maps(captioner, PATHS), captioner.caption(PATHS), strict=True):
        assert (
            maps.caption == said.text
            and maps.tokens == said.tokens
            and tuple(maps.texts) == said.words
        )
        for choice in (*maps.choices(heads=True), MEAN, ROLLOUT):
            assert maps.of(choice).shape == (len(maps.words), 9)
            torch.testing.assert_close(maps.of(choice).sum(-1), torch.ones(len(maps.words)))


@pytest.mark.parametrize("model", LOOKING)
def test_maps_equal_the_captioners_own_weights(model: str) -> None:
    captioner = tiny_captioner(model)
    (maps,) = caption_maps(captioner, PATHS[:1])
    caption, looked = captioner.attention(PATHS[0])
    assert caption.text == maps.caption
    for layer, weights in looked.items():
        torch.testing.assert_close(maps.heads(layer), weights)
        torch.testing.assert_close(maps.of(layer), weights.mean(1))
        for head in range(weights.shape[1] if weights.shape[1] > 1 else 0):
            torch.testing.assert_close(maps.of(f"{layer} head{head}"), weights[:, head])
    torch.testing.assert_close(maps.of(MEAN), torch.stack(list(looked.values())).mean((0, 2)))
    assert not maps.elsewhere().any(), "no class token"


def test_mean_and_rollout_of_one_layer_equal_it() -> None:
    (maps,) = caption_maps(tiny_captioner("attend_tell"), PATHS[:1])
    assert maps.choices(heads=True) == ["attention"]
    torch.testing.assert_close(maps.of(MEAN), maps.of("attention"))
    torch.testing.assert_close(maps.of(ROLLOUT), maps.of("attention"))


def test_the_choices_are_layers_heads_mean_and_rollout() -> None:
    (maps,) = caption_maps(tiny_captioner("transformer"), PATHS[:1])
    assert maps.choices() == ["layer0", "layer1", MEAN, ROLLOUT]
    assert len(maps.choices(heads=True)) == 4 + 8
    for wrong in ("layer2", "layer0 head4", "attention"):
        with pytest.raises(CapGenError, match="layer0 head3"):
            maps.of(wrong)


@pytest.mark.parametrize("model", LOOKING)
def test_given_captions_are_read_the_same_in_any_batch(model: str) -> None:
    captioner = tiny_captioner(model)
    given = [CAPTION, "word2", "word7 word0"]
    together = caption_maps(captioner, PATHS, given)
    alone = [
        caption_maps(captioner, [path], [text])[0] for path, text in zip(PATHS, given, strict=True)
    ]
    assert [maps.caption for maps in together] == given
    for one, other in zip(together, alone, strict=True):
        for choice in one.choices(heads=True):
            torch.testing.assert_close(one.of(choice), other.of(choice))
    halves = caption_maps(captioner, PATHS, given, batch_size=2)
    torch.testing.assert_close(halves[2].of(MEAN), together[2].of(MEAN))


@pytest.mark.parametrize(
    ("captions", "message"),
    [([CAPTION], "1 captions"), (["", "", ""], "empty"), ([CAPTION * 9] * 3, "too long")],
)
def test_captions_that_do_not_fit_are_refused(captions: list[str], message: str) -> None:
    captions = [text.replace("word5word3", "word5 word3") for text in captions]
    with pytest.raises(CapGenError, match=message):
        caption_maps(tiny_captioner("transformer"), PATHS, captions)


@pytest.mark.parametrize("model", ["show_tell", "clip_prefix"])
def test_a_captioner_without_attention_is_refused(model: str) -> None:
    encoder, tokenizer = tiny_encoder(), tiny_tokenizer()
    built = tiny_model(model, tokenizer)
    encoder.outputs["embedding"] = (12,)
    forward = type(encoder).forward
    encoder.forward = lambda pixels: (
        (out := forward(encoder, pixels)) | {"embedding": out["pooled"]}
    )  # type: ignore[method-assign]
    info = {
        "extraction_dtype": "float32",
        "decoding": {"beam": 1, "max_length": 6, "min_length": 1},
    }
    captioner = Captioner(Bundle(built, tokenizer, info), encoder, torch.device("cpu"))
    with pytest.raises(CapGenError, match=f"{model} has no attention"):
        caption_maps(captioner, PATHS[:1])


# --- the class token


def test_the_class_token_is_dropped_and_the_rest_sums_to_one() -> None:
    weights = torch.tensor([[0.5, 0.1, 0.1, 0.1, 0.2], [1.0, 0.0, 0.0, 0.0, 0.0]])
    expected = torch.tensor([[0.2, 0.2, 0.2, 0.4], [0.25, 0.25, 0.25, 0.25]])
    torch.testing.assert_close(on_grid(weights), expected)
    square = shares(3, 49)
    assert on_grid(square) is square
    assert on_grid(shares(2, 257)).shape == (2, 256) and on_grid(shares(2, 50)).shape == (2, 49)
    with pytest.raises(CapGenError, match="square grid"):
        on_grid(shares(2, 52))


def test_clips_class_token_is_left_out_of_maps() -> None:
    captioner = tiny_captioner("clip_gpt2", (10, 12))
    encode = captioner.encoder.forward

    def with_class_token(pixels: Tensor) -> dict[str, Tensor]:
        grid = encode(pixels)["grid"] / 20  # all cells get a share
        return {"grid": torch.cat([grid.mean(1, keepdim=True), grid], 1)}

    captioner.encoder.forward = with_class_token  # type: ignore[method-assign]
    (maps,) = caption_maps(captioner, PATHS[:1])
    for choice in maps.choices(heads=True):
        assert maps.of(choice).shape == (len(maps.words), 9)
        torch.testing.assert_close(maps.of(choice).sum(-1), torch.ones(len(maps.words)))
    assert maps.weights["layer0"].shape[-1] == 10 and (maps.elsewhere() > 0).all()
    assert maps.on_pixels(0, (30, 20), ROLLOUT).shape == (20, 30)


def test_heads_are_averaged_before_the_class_token_is_dropped() -> None:
    busy, idle = torch.tensor([0.0, 1.0, 0, 0, 0]), torch.tensor([0.98, 0, 0, 0, 0.02])
    maps = maps_of({"layer0": torch.stack([busy, idle])[None].expand(3, -1, -1)})
    torch.testing.assert_close(maps.of("layer0")[0], torch.tensor([1 / 1.02, 0, 0, 0.02 / 1.02]))
    torch.testing.assert_close(maps.of("layer0 head1")[0], torch.tensor([0, 0, 0, 1.0]))
    torch.testing.assert_close(maps.elsewhere(), torch.full((3,), 0.49))


# --- rollout


def test_rollout_by_hand() -> None:
    cross = [torch.tensor([[1.0, 0.0], [0.5, 0.5]]), torch.tensor([[0.0, 1.0], [1.0, 0.0]])]
    own = [torch.tensor([[1.0, 0.0], [0.5, 0.5]]), torch.tensor([[1.0, 0.0], [1.0, 0.0]])]
    # layer 0: nothing was seen before, so R = C / 2: [[0.5, 0], [0.25, 0.25]]
    # layer 1, words: (A R + R) / 2 = [[0.5, 0], [0.375, 0.125]]; image: (C + R) / 2 = [[0.25, 0.5],
    # [0.6875, 0.0625]]
    expected = torch.tensor([[0.25 / 0.75, 0.5 / 0.75], [0.6875 / 0.75, 0.0625 / 0.75]])
    torch.testing.assert_close(rollout(cross, own), expected)
    torch.testing.assert_close(rollout(cross[:1], own[:1]), cross[0])


def test_rollout_follows_the_image_through_earlier_words() -> None:
    cross = [torch.tensor([[1.0, 0.0], [0.0, 1.0]])] * 2
    deaf, listening = torch.eye(2), torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    assert rollout(cross, [deaf, deaf])[1, 0] == 0
    assert rollout(cross, [deaf, listening])[1, 0] > 0.1
    assert rollout(cross, [listening, deaf])[1, 0] == 0, (
        "in the first layer no word has seen anything yet"
    )


@pytest.mark.parametrize("model", ["transformer", "clip_gpt2", "clip_gpt2, no gate"])
@torch.inference_mode()
def test_reading_a_whole_caption_equals_reading_it_word_by_word(model: str) -> None:
    built, tokenizer = tiny_model(model), tiny_tokenizer()
    memory = built.encode(torch.randn(1, 9, 12, generator=torch.Generator().manual_seed(1)))
    said = tokenizer.encode(CAPTION)[1:-1]
    cross, own = layer_attention(built, memory, torch.tensor([[tokenizer.start_id, *said[:-1]]]))
    (stepped,) = word_attention(built, memory, [said], Specials.of(tokenizer))
    for weights, expected in zip(cross, stepped.values(), strict=True):
        torch.testing.assert_close(weights, expected.mean(1), atol=1e-5, rtol=1e-4)
    for weights in own:
        torch.testing.assert_close(weights.sum(-1), torch.ones(len(said)))
        assert not weights.triu(1).any(), "no word hears a later one"
        assert weights[-1, :-1].sum() > 0


# --- words


@pytest.fixture(scope="module", params=["gpt2", "clip"])
def pairs(request: pytest.FixtureRequest) -> BpeTokenizer:
    """A byte-pair tokenizer with three whole words; it spells all others."""
    return BpeTokenizer.fit(["a red on"], request.param)


def test_tokens_belong_to_their_word(pairs: BpeTokenizer) -> None:
    text = "a red umbrella on 3.5 cafés, don't"
    tokens = pairs.encode(text)[1:-1]
    words = words_of(pairs, tokens)
    assert [word.text for word in words] == pairs.decode(tokens).split()
    assert [word.first for word in words] == [0, *(word.last for word in words[:-1])], (
        "no gap, no overlap"
    )
    assert words[-1].last == len(tokens)
    umbrella = words[2]
    assert umbrella.text == "umbrella" and umbrella.last - umbrella.first > 1
    assert pairs.decode(tokens[umbrella.first : umbrella.last]) == "umbrella"


def test_contractions_are_one_word() -> None:
    tokenizer = WordTokenizer(["the", "dog", "'s", "do", "n't", "bone"])
    tokens = tokenizer.encode("the dog's bone don't")[1:-1]
    assert words_of(tokenizer, tokens) == [
        Word("the", 0, 1),
        Word("dog's", 1, 3),
        Word("bone", 3, 4),
        Word("don't", 4, 6),
    ]
    assert words_of(tokenizer, []) == []


def test_the_maps_of_a_words_tokens_are_averaged(pairs: BpeTokenizer) -> None:
    torch.manual_seed(0)
    model = tiny_model("clip_gpt2", pairs, (9, 12))
    info = {"extraction_dtype": "float32", "decoding": {"beam": 1, "max_length": 8}}
    captioner = Captioner(Bundle(model, pairs, info), tiny_encoder(), torch.device("cpu"))
    (maps,) = caption_maps(captioner, PATHS[:1], ["red star"])
    assert maps.texts == ["red", "star"]
    memory = captioner.memory(PATHS[:1])
    (looked,) = word_attention(model, memory, [maps.tokens], captioner.specials)
    for place, word in enumerate(maps.words):
        expected = looked["layer1"][word.first : word.last].mean((0, 1))
        torch.testing.assert_close(maps.of("layer1")[place], expected)
    torch.testing.assert_close(maps.of(ROLLOUT).sum(-1), torch.ones(2))
    assert len(maps.tokens) > 2


# --- on pixels


def test_a_map_covers_the_pixels_that_the_encoder_saw() -> None:
    weights = torch.full((3, 1, 49), 0.001)
    weights[1, 0, 0] = 1
    maps = maps_of({"layer0": weights})
    level = maps.on_pixels(1, (200, 100))
    assert level.shape == (100, 200)
    y, x = np.unravel_index(level.argmax(), level.shape)
    assert y < 100 / 7 and x < 200 / 7


def test_a_bundle_on_disk_gives_the_same_maps(tmp_path: Path) -> None:
    save_tiny_bundle(tmp_path / "b", DecodingConfig(beam=2, max_length=8, min_length=2))
    captioner: Any = Captioner.from_bundle(tmp_path / "b", "cpu")
    (maps,) = caption_maps(captioner, PATHS[:1], beam=3)
    assert maps.of(MEAN).shape == (len(maps.words), 64)
    assert maps.caption == captioner.caption(PATHS[0], beam=3)[0].text
