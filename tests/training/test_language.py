"""Where GPT-2's weights come from: a checkpoint, its rows chosen by the tokenizer, or a small one
trained here."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_config, tiny_model, tiny_tokenizer
from hub_helpers import (
    POSITIONS,
    VOCABULARY,
    WIDTH,
    gpt2_class,
    published_config,
    published_weights,
    write_gpt2,
)
from safetensors.torch import load_file, save_file

from capgen_utils.bundle import load_bundle
from capgen_utils.common.files import CapGenError
from capgen_utils.config import MINI, ClipGpt2Config, Recipe
from capgen_utils.data import shapes
from capgen_utils.data.datasets import load_dataset
from capgen_utils.models import TransformerCaptioner, build_model
from capgen_utils.models.base import IGNORED
from capgen_utils.models.clip_gpt2 import (
    ClipGpt2Captioner,
    load_language_model,
)
from capgen_utils.presets import PRESETS, Preset, mini_folder
from capgen_utils.text.bpe import BpeTokenizer
from capgen_utils.text.vocabulary import tokenizer_from_json
from capgen_utils.training.batches import TrainingData, chunks_by_length, make_batch
from capgen_utils.training.pretraining import (
    LanguageModel,
    NoImage,
    documents,
    initialise,
    pretrain_language_model,
)
from capgen_utils.training.recipes import make_trainer, prepare

CAPTIONS = ("A red bar, left of two 2-tone circles.", "a dog's café")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder in the hub's layout."""
    return write_gpt2(tmp_path)


def captioner_for(vocabulary: int = VOCABULARY, **changes: Any) -> ClipGpt2Captioner:
    sizes = {
        "n_embd": WIDTH,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": POSITIONS,
        "seq_len": 10,
    } | changes
    return ClipGpt2Captioner(tiny_config("clip_gpt2", **sizes), vocabulary, (9, 12), 0)


# --- from a checkpoint


@pytest.mark.parametrize("tied", [False, True])
def test_a_checkpoints_weights_make_the_captioner_speak_as_it_did(folder: Path, tied: bool) -> None:
    captioner = captioner_for(tied_head=tied).eval()
    load_language_model(captioner, folder)
    tokens = torch.randint(0, VOCABULARY, (3, 9))
    with torch.inference_mode():
        said = captioner(captioner.encode(torch.randn(3, 9, 12)), tokens, torch.arange(3))
        expected = gpt2_class().from_pretrained(folder)(tokens).logits
    torch.testing.assert_close(said, expected, atol=1e-5, rtol=1e-5)
    assert not captioner.gpt2.wte.weight.requires_grad, "what is frozen stays frozen"
    weights = published_weights()
    assert all(torch.equal(t, weights[name]) for name, t in captioner.gpt2.state_dict().items())


@pytest.mark.parametrize("tied", [False, True])
def test_rows_follow_the_tokenizers_id_map(folder: Path, tied: bool) -> None:
    ids = [0, 3, 4, 9, 19]
    captioner = captioner_for(len(ids), tied_head=tied)
    load_language_model(captioner, folder, ids)
    expected = published_weights()["wte.weight"][ids]
    assert torch.equal(captioner.gpt2.wte.weight, expected)
    if not tied:
        assert torch.equal(captioner.head.weight, expected)


def test_a_trimmed_byte_pair_table_takes_its_rows_of_the_full_one(folder: Path) -> None:
    tokenizer = BpeTokenizer.fit(CAPTIONS, "gpt2")
    table = torch.randn(50_257, WIDTH)
    save_file(
        published_weights() | {"wte.weight": table}, folder / "model.safetensors", {"format": "pt"}
    )
    (folder / "config.json").write_text(json.dumps(published_config(vocab_size=len(table))))
    captioner = captioner_for(len(tokenizer), language_model=str(folder))
    initialise(captioner, PRESETS["shapes"], tokenizer)
    full = BpeTokenizer.full("gpt2")
    for caption in CAPTIONS:
        own = captioner.gpt2.wte(torch.tensor(tokenizer.encode(caption)))
        assert torch.equal(own, table[full.encode(caption)])
    assert torch.equal(captioner.gpt2.wte.weight[tokenizer.end_id], table[50_256])


def test_fewer_positions_are_enough(folder: Path) -> None:
    captioner = captioner_for(n_positions=POSITIONS - 2)
    load_language_model(captioner, folder)
    assert torch.equal(
        captioner.gpt2.wpe.weight, published_weights()["wpe.weight"][: POSITIONS - 2]
    )


@pytest.mark.parametrize(
    ("sizes", "ids", "named"),
    [
        ({"n_layer": 1}, None, "n_layer 2"),
        ({"n_head": 2}, None, "n_head 4"),
        ({"n_embd": 32}, None, f"n_embd {WIDTH}"),
        ({"n_positions": POSITIONS + 1}, None, f"n_positions {POSITIONS}"),
        ({"vocabulary": VOCABULARY + 1}, None, "vocabulary"),
        ({}, list(range(1, VOCABULARY + 1)), "vocabulary"),
        ({}, [-1, *range(VOCABULARY - 1)], "vocabulary"),
        ({}, [1, 2], "vocabulary"),
    ],
)
def test_a_gpt2_of_other_sizes_is_refused(
    folder: Path, sizes: dict[str, int], ids: list[int] | None, named: str
) -> None:
    with pytest.raises(CapGenError, match=named) as error:
        load_language_model(captioner_for(**sizes), folder, ids)
    assert all(f"({way})" in error.value.remedy for way in (1, 2, 3))


@pytest.mark.parametrize(
    "change",
    [
        {"activation_function": "relu"},
        {"scale_attn_by_inverse_layer_idx": True},
        {"layer_norm_epsilon": 1e-3},
        {"n_inner": 64 - 1},
        {"tie_word_embeddings": False},
    ],
    ids=str,
)
def test_a_gpt2_that_computes_something_else_is_refused(
    folder: Path, change: dict[str, Any]
) -> None:
    (folder / "config.json").write_text(json.dumps(published_config(**change)))
    with pytest.raises(CapGenError) as error:
        load_language_model(captioner_for(), folder)
    assert f"({3})" in error.value.remedy


@pytest.mark.parametrize(
    "source", ["no/such/folder", Path("gpt2-medium"), "capgen-tests/no-such-model"]
)
def test_what_cannot_be_had_is_said_with_three_ways(
    source: str | Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_answer(*_: Any) -> None:
        raise OSError("nobody answers")

    monkeypatch.setattr("capgen_utils.common.hub._ask", no_answer)
    for ask in (
        lambda: load_language_model(captioner_for(), source),
        lambda: ClipGpt2Captioner.fit_config(replace(ClipGpt2Config(), language_model=str(source))),
    ):
        with pytest.raises(CapGenError) as error:
            ask()
        remedy = error.value.remedy
        assert "network" in remedy and "local folder" in remedy and MINI in remedy


def test_sizes_are_those_of_the_gpt2_that_is_named(folder: Path) -> None:
    config = ClipGpt2Config(language_model=str(folder), reduction=2)
    sizes = {"n_embd": WIDTH, "n_layer": 2, "n_head": 4, "n_positions": POSITIONS}
    assert ClipGpt2Captioner.fit_config(config) == replace(config, **sizes)
    assert (
        ClipGpt2Captioner.fit_config(
            replace(config, n_positions=5, language_model=str(folder))
        ).n_positions
        == 5
    )
    mini, other = replace(config, language_model=MINI), tiny_config("transformer")
    assert ClipGpt2Captioner.fit_config(mini) is mini
    assert TransformerCaptioner.fit_config(other) is other
    (folder / "config.json").write_text(json.dumps(published_config(n_layer="2")))
    with pytest.raises(CapGenError, match="not that of a GPT-2"):
        ClipGpt2Captioner.fit_config(replace(config, language_model=str(folder)))


def test_other_captioners_are_left_as_they_are() -> None:
    model = tiny_model("transformer")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    initialise(model, PRESETS["shapes"], tiny_tokenizer())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


# --- gpt2-mini


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 scenes with their captions."""
    target = tmp_path_factory.mktemp("language") / "shapes"
    shapes.generate(target, 40)
    return target


def tiny_preset(**changes: Any) -> Preset:
    """Return ``shapes`` with a language model that is trained in a second."""
    preset = PRESETS["shapes"]
    config = tiny_config("clip_gpt2", seq_len=32, n_positions=40, language_model=MINI, **changes)
    fast = {"batch_images": 8, "learning_rate": 5e-3, "dtype": "fp32"}
    recipes = {**preset.models, "clip_gpt2": Recipe(config, tokenizer="gpt2")}
    return replace(
        preset,
        models=recipes,
        language=replace(preset.language, epochs=4, **fast),
        training=replace(preset.training, epochs=1, **fast),
    )


@pytest.fixture(scope="module")
def mini(scenes: Path) -> Path:
    """The language model of ``tiny_preset``."""
    before = torch.get_rng_state()
    made = pretrain_language_model(tiny_preset(), scenes, scenes.parent / "mini")
    assert torch.equal(torch.get_rng_state(), before), (
        "whether it had to be trained must not change what follows"
    )
    return made


def test_pretraining_learns_and_keeps_the_epoch_with_the_lowest_dev_loss(mini: Path) -> None:
    run = mini.parent / "mini-run"
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    losses = [entry["dev_loss"] for entry in log]
    assert losses[-1] < losses[0] - 0.5 and log[-1]["train_loss"] < log[0]["train_loss"] - 0.5
    assert all("BLEU-4" not in entry and "samples" not in entry for entry in log), (
        "nothing is captioned"
    )
    info = json.loads((run / "bundle" / "config.json").read_text())
    assert info["dev"]["dev_loss"] == min(losses)


def test_its_folder_is_read_by_the_library_and_says_the_same(mini: Path, scenes: Path) -> None:
    tokenizer = tokenizer_from_json(json.loads((mini / "tokenizer.json").read_text()))
    train = load_dataset("shapes", scenes).split("train")
    assert tokenizer.to_json() == BpeTokenizer.fit(train.captions(), "gpt2").to_json(), (
        "from the training captions"
    )
    model = gpt2_class().from_pretrained(mini)
    assert (model.config.eos_token_id, model.config.pad_token_id) == (
        tokenizer.end_id,
        tokenizer.pad_id,
    )
    own = LanguageModel(
        tiny_preset().recipe("clip_gpt2").config, len(tokenizer), tokenizer.pad_id
    ).eval()
    best = load_file(mini.parent / "mini-run" / "bundle" / "model.safetensors")
    own.load_state_dict({name: tensor.float() for name, tensor in best.items()})
    caption = next(train.captions())
    tokens = torch.tensor([tokenizer.encode(caption)])
    with torch.inference_mode():
        expected = model(tokens).logits
        said = own(own.encode(torch.zeros(1, 0)), tokens, torch.zeros(1, dtype=torch.long))
        torch.testing.assert_close(said, expected, atol=1e-5, rtol=1e-5)
        state = own.start(NoImage(torch.zeros(1, 0)))
        for position in range(tokens.shape[1]):
            logits, state, _ = own.step(tokens[:, position], state)
            torch.testing.assert_close(logits, expected[:, position], atol=1e-4, rtol=1e-4)


def test_later_calls_find_it(mini: Path, scenes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "capgen_utils.training.pretraining.Trainer", lambda *_: pytest.fail("trained again")
    )
    assert pretrain_language_model(tiny_preset(), scenes, mini) == mini
    with pytest.raises(CapGenError, match="n_embd") as error:
        pretrain_language_model(tiny_preset(n_embd=64), scenes, mini)
    assert str(mini) in error.value.remedy


def test_the_captions_of_an_image_are_one_document() -> None:
    image = torch.tensor([1, 0, 1])
    tokens = torch.tensor(
        [[1, 5, 6], [1, 7, 0], [1, 8, 0]]
    )  # 1 starts and ends a caption, 0 is padding
    targets = torch.tensor([[5, 6, 1], [7, 1, IGNORED], [8, 1, IGNORED]])
    inputs, wanted = documents(tokens, targets, image, shuffle=False)
    assert inputs.tolist() == [[1, 7, 0, 0, 0], [1, 5, 6, 1, 8]]
    assert wanted.tolist() == [[7, 1, IGNORED, IGNORED, IGNORED], [5, 6, 1, 8, 1]]
    orders = {
        tuple(documents(tokens, targets, image, shuffle=True)[0][1].tolist()) for _ in range(20)
    }
    assert orders == {(1, 5, 6, 1, 8), (1, 8, 1, 5, 6)}

    model = LanguageModel(tiny_config("clip_gpt2"), 16, 0).eval()
    memory = model.encode(torch.zeros(2, 0))
    said = model(
        memory, torch.tensor([[1, 5, 6, 1, 8], [1, 7, 0, 0, 0]]), torch.arange(2)
    ).log_softmax(-1)
    right = [(0, 0, 5), (0, 1, 6), (0, 2, 1), (0, 3, 8), (0, 4, 1), (1, 0, 7), (1, 1, 1)]
    expected = -sum(said[place] for place in right)
    torch.testing.assert_close(model.loss(memory, tokens, image, targets), expected)
    short = LanguageModel(tiny_config("clip_gpt2", n_positions=16), 16, 0).eval()
    rows = torch.full((9, 3), 4)  # 27 tokens of one image: more than there are positions
    loss = short.loss(memory, rows, torch.zeros(9, dtype=torch.long), rows)
    assert loss.isfinite() and loss < 9 * 3 * 4


def test_presets_with_a_published_gpt2_train_none() -> None:
    with pytest.raises(CapGenError, match="gpt2-medium"):
        pretrain_language_model(PRESETS["coco"])


def test_everything_after_the_end_token_is_padding(scenes: Path) -> None:
    train = load_dataset("shapes", scenes).split("train")
    tokenizer = BpeTokenizer.fit(train.captions(), "gpt2")
    items = train.items[:6]

    rows: Any = type("Rows", (), {"rows": staticmethod(lambda names: torch.zeros(len(names), 0))})
    data = TrainingData(train, train, rows)  # without features
    batch = make_batch(items, [False] * len(items), data, tokenizer, 32)
    for chunk in chunks_by_length(batch, tokenizer.pad_id):
        for row in chunk.targets:
            end = (row == tokenizer.end_id).nonzero()[:, 0]
            assert len(end) == 1, "the start token, which is the same, is no target"
            assert (row[int(end[0]) + 1 :] == IGNORED).all() and (
                row[: int(end[0])] != IGNORED
            ).all()


def test_the_captioner_starts_from_it_and_goes_on_with_the_same_vocabulary(
    mini: Path, scenes: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CAPGEN_DATA", str(tmp_path))
    preset = replace(tiny_preset(), pretraining=None, encoder="shapes_cnn")
    mini_folder(preset).parent.mkdir(parents=True)
    mini_folder(preset).symlink_to(mini)
    monkeypatch.setattr(
        "capgen_utils.training.pretraining.build_encoder", lambda *_: shapes_encoder()
    )
    prepared = prepare(preset, scenes, model="clip_gpt2")
    trainer = make_trainer(prepared, "clip_gpt2", tmp_path / "run")
    table = load_file(mini / "model.safetensors")["transformer.wte.weight"]
    assert torch.equal(trainer.model.gpt2.wte.weight.cpu(), table)
    again = make_trainer(prepared, "clip_gpt2", tmp_path / "run")
    assert all(
        torch.equal(a, b)
        for a, b in zip(trainer.model.parameters(), again.model.parameters(), strict=True)
    )
    assert trainer.train().epoch == 1
    trained = load_bundle(tmp_path / "run" / "bundle").model
    assert torch.equal(trained.gpt2.wte.weight, table.half().float()), "frozen"
    assert not torch.equal(trained.head.weight, table.half().float())

    few = prepare(
        preset, scenes, model="clip_gpt2", limit=2
    )  # a quick look: a part of the vocabulary
    ids, all_ids = few.tokenizer.original_ids, prepared.tokenizer.original_ids
    assert len(ids) < len(all_ids)
    rows = [all_ids.index(i) for i in ids]
    assert torch.equal(
        make_trainer(few, "clip_gpt2", tmp_path / "few").model.gpt2.wte.weight.cpu(), table[rows]
    )

    captioner = build_model("clip_gpt2", trainer.model.config, tiny_tokenizer(), (64, 128))
    with pytest.raises(CapGenError, match="another vocabulary"):
        initialise(captioner, preset, tiny_tokenizer())


def shapes_encoder() -> Any:
    from capgen_utils.vision.encoders import new_shapes_cnn

    torch.manual_seed(0)
    return new_shapes_cnn()
