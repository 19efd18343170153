"""From a preset to a trained captioner, on a few shapes and in a few steps."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from capgen_utils import Captioner
from capgen_utils.bundle import load_bundle
from capgen_utils.common.files import CapGenError
from capgen_utils.config import (
    SMALL_CLIP,
    ClipPrefixConfig,
    ContrastiveConfig,
    DecodingConfig,
    Recipe,
    SmallClipConfig,
)
from capgen_utils.data import shapes
from capgen_utils.models.clip_prefix import ClipPrefixCaptioner
from capgen_utils.presets import PRESETS, ClipRecipe, Preset
from capgen_utils.text.ptb import tokenise
from capgen_utils.training.pretraining import pretrain_encoder
from capgen_utils.training.recipes import Prepared, make_trainer, prepare


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Preset]:
    """A folder of 40 scenes, and the shapes preset in small."""
    folder = tmp_path_factory.mktemp("recipes")
    shapes.generate(folder / "shapes", 40)
    preset = PRESETS["shapes"]
    assert preset.pretraining is not None
    tiny = replace(preset.recipe("transformer").config, d_model=32, fc_dim=64, n_decode=1)
    changed = {"epochs": 1, "batch_images": 8, "dtype": "fp32"}
    return folder, replace(
        preset,
        models={"transformer": Recipe(tiny)},
        training=replace(preset.training, **changed),
        pretraining=replace(preset.pretraining, **changed),
        decoding=DecodingConfig(beam=1, max_length=10),
    )


def test_from_drawings_to_captions(
    small: tuple[Path, Preset], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, preset = small
    monkeypatch.setenv("CAPGEN_DATA", str(folder / "data"))
    prepared = prepare(preset, folder / "shapes")
    encoder_files = folder / "data" / "encoders" / "shapes_cnn"
    written = (encoder_files / "model.safetensors").stat().st_mtime_ns
    train_words = {w for c in prepared.manifest.split("train").captions() for w in tokenise(c)}
    assert set(prepared.tokenizer.to_json()["words"]) == train_words, (
        "from the training captions alone"
    )
    assert (
        prepared.data.flipped is None
        and len(prepared.data.train) == 32
        and len(prepared.data.dev) == 4
    )
    assert not any(p.requires_grad for p in prepared.encoder.parameters())

    trainer = make_trainer(prepared, "transformer", folder / "run")
    progress = trainer.train()
    assert progress.epoch == 1
    bundle = load_bundle(folder / "run" / "bundle")
    assert bundle.info["preset"] == "shapes" and bundle.info["encoder"]["name"] == "shapes_cnn"
    photo = prepared.manifest.path(prepared.manifest.split("test").items[0])
    assert Captioner.from_bundle(folder / "run" / "bundle", "cpu").caption(photo)

    again = prepare(preset, folder / "shapes")
    assert (encoder_files / "model.safetensors").stat().st_mtime_ns == written, (
        "the encoder is trained once"
    )
    assert again.encoder.weights_hash() == prepared.encoder.weights_hash()
    assert again.data.plain.path == prepared.data.plain.path


def test_pretraining_changes_the_encoder_and_leaves_no_captioner_in_it(
    small: tuple[Path, Preset],
) -> None:
    folder, preset = small
    target = pretrain_encoder(preset, folder / "shapes", folder / "encoder")
    described = json.loads((target / "config.json").read_text())
    assert described["name"] == "shapes_cnn" and not described["public"]
    from safetensors.torch import load_file

    from capgen_utils.vision.encoders import load_encoder_folder, new_shapes_cnn

    tensors = load_file(target / "model.safetensors")
    assert set(tensors) == set(new_shapes_cnn().trunk.state_dict())
    assert preset.pretraining is not None
    torch.manual_seed(preset.pretraining.seed)
    assert not torch.equal(tensors["0.weight"], new_shapes_cnn().trunk[0].weight)
    assert load_encoder_folder(target).weights_hash() == described["weights_hash"]


def test_a_limit_is_a_quick_look(
    small: tuple[Path, Preset], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, preset = small
    monkeypatch.setenv("CAPGEN_DATA", str(folder / "data"))
    prepared = prepare(preset, folder / "shapes", limit=3)
    assert len(prepared.data.train) == 3 and len(prepared.data.dev) == 3


def test_only_some_encoders_are_trained_here() -> None:
    with pytest.raises(CapGenError, match="no pre-training"):
        pretrain_encoder(PRESETS["flickr8k"])


def test_a_model_that_the_preset_does_not_know() -> None:
    with pytest.raises(CapGenError, match="transformer"):
        PRESETS["shapes"].recipe("lstm9000")


# --- CLIP's words

SEEN = SmallClipConfig(
    embed_size=16,
    patch=4,
    vision_width=16,
    vision_layers=1,
    vision_heads=2,
    text_width=24,
    text_layers=2,
    text_heads=2,
    seq_len=30,
)


@pytest.fixture
def with_clip(small: tuple[Path, Preset], monkeypatch: pytest.MonkeyPatch) -> Prepared:
    """What a CLIP prefix captioner needs, its small CLIP included."""
    folder, preset = small
    monkeypatch.setenv("CAPGEN_DATA", str(folder / "data"))
    config = ClipPrefixConfig(seq_len=26, d_model=24, n_decode=1, n_head=2, fc_dim=32)
    models = {"clip_prefix": Recipe(config, SMALL_CLIP, "clip")}
    clip = ClipRecipe(SEEN, ContrastiveConfig(epochs=1, batch_images=8, dtype="fp32"))
    return prepare(
        replace(preset, models=models, clip=clip), folder / "shapes", model="clip_prefix"
    )


def captioner_of(prepared: Prepared, folder: Path, **changes: object) -> ClipPrefixCaptioner:
    config = replace(prepared.recipe.config, **changes)
    model = make_trainer(prepared, "clip_prefix", folder, model_config=config).model
    assert isinstance(model, ClipPrefixCaptioner)
    return model


def test_a_clip_prefix_starts_from_its_clips_words(with_clip: Prepared, tmp_path: Path) -> None:
    assert with_clip.scorer is not None and with_clip.scorer.images is with_clip.encoder
    table = with_clip.scorer.clip.text_model.embeddings.token_embedding.weight
    own = captioner_of(with_clip, tmp_path).embedding.weight.detach()
    torch.testing.assert_close(own / own.std(), table / table.std())
    assert own.std() == pytest.approx(24**-0.5, rel=1e-4)
    # Into another width angles are kept, as well as it allows: exactly, where it is wider.
    wider = captioner_of(with_clip, tmp_path, d_model=48).embedding.weight.detach()
    cosines = torch.nn.functional.cosine_similarity
    few, others = wider[:5, None], wider[None, 5:9]
    torch.testing.assert_close(
        cosines(few, others, dim=2), cosines(table[:5, None], table[None, 5:9], dim=2)
    )


def test_or_reads_them_by_its_clips_frozen_tower(with_clip: Prepared, tmp_path: Path) -> None:
    assert with_clip.scorer is not None
    model = captioner_of(with_clip, tmp_path, text_inputs="tower")
    assert model.tower is not None and not any(p.requires_grad for p in model.tower.parameters())
    assert (model.config.tower_layers, model.config.tower_width, model.config.tower_positions) == (
        2,
        24,
        30,
    )
    captions = [list(with_clip.manifest.split("dev").captions())[0]]
    tokens = with_clip.scorer.tokens(captions)
    empty = torch.zeros(2, 1, 2, 0, 12)
    hidden, _, _ = model.tower(tokens, empty, empty)
    expected = with_clip.scorer.clip.text_model(input_ids=tokens).last_hidden_state
    torch.testing.assert_close(hidden, expected, atol=1e-5, rtol=1e-5)


def test_a_tower_of_other_sizes_is_refused(with_clip: Prepared) -> None:
    assert with_clip.scorer is not None
    config = replace(
        with_clip.recipe.config, text_inputs="tower", tower_layers=1, tower_width=24, tower_heads=2
    )
    model = ClipPrefixCaptioner(config, len(with_clip.tokenizer), (16,), 0)
    with pytest.raises(CapGenError, match="other sizes"):
        model.start_from(with_clip.scorer.clip.text_model, range(len(with_clip.tokenizer)))
