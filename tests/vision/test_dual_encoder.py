"""CLIP: transformers' classes, loaded strictly; small ones on a stem; saved, loaded or refused."""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    CPU,
    PHOTOS,
    TINY_CLIP,
    run_python,
    tiny_dual,
    tiny_encoder,
    tiny_manifest,
    tiny_tokenizer,
)
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from capgen_utils.common.files import CapGenError
from capgen_utils.common.hub import import_torchvision
from capgen_utils.text.words import WordTokenizer
from capgen_utils.vision.clip import CLIP_PREPROCESSING, CLIPS, ClipVision
from capgen_utils.vision.dual_encoder import DualEncoder, pad
from capgen_utils.vision.encoder import Encoder
from capgen_utils.vision.encoders import ENCODERS, build_encoder, load_encoder_folder, save_encoder
from capgen_utils.vision.features import encode_images, extract, find_cache

import_torchvision()
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig  # noqa: E402

PHOTO = PHOTOS / "cat_on_deck.jpg"
TEXTS = [
    "word1 word2",
    "word3",
    "",
    "word0 word1 word2 word3 word4 word5 word6 word7 word8 word9 word10 word11",
]


# --- vectors


def test_vectors_have_length_one_and_come_in_order() -> None:
    dual = tiny_dual()
    photos = sorted(PHOTOS.glob("*.jpg"))[:5]
    images, texts = dual.embed_images(photos, batch_size=2), dual.embed_texts(TEXTS)
    assert images.shape == (5, 24) and texts.shape == (4, 24)
    for vectors in (images, texts):
        torch.testing.assert_close(vectors.norm(dim=1), torch.ones(len(vectors)))
        assert not vectors.requires_grad
    torch.testing.assert_close(dual.embed_images(photos[3])[0], images[3], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(dual.embed_texts([TEXTS[1]])[0], texts[1], atol=1e-5, rtol=1e-4)
    assert len(torch.unique(images.round(decimals=3), dim=0)) == 5
    assert dual.embed_texts([]).shape == (0, 24) and dual.embed_images([]).shape == (0, 24)
    torch.testing.assert_close(
        dual.similarity(images, texts), F.cosine_similarity(images[:, None], texts[None], dim=2)
    )


def test_an_unreadable_photograph_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    with pytest.raises(CapGenError, match=r"broken\.jpg"):
        tiny_dual().embed_images([PHOTO, tmp_path / "broken.jpg"])


def test_a_text_is_its_end_token_which_has_seen_all_before_it() -> None:
    dual = tiny_dual()
    tokens = dual.tokens(["word1 word2 word3", "word4"])
    assert tokens.shape == (2, 5) and tokens[1, 3:].tolist() == [0, 0]
    hidden = dual.clip.text_model(input_ids=tokens).last_hidden_state
    expected = dual.clip.text_projection(torch.stack([hidden[0, 4], hidden[1, 2]]))
    torch.testing.assert_close(dual.read(tokens), F.normalize(expected, dim=-1))
    # The same words in another order, and one word changed at each place, change the vector: all of
    # it counts.
    base = dual.embed_texts(["word1 word2 word3"])
    for other in (
        "word2 word1 word3",
        "word5 word2 word3",
        "word1 word5 word3",
        "word1 word2 word5",
    ):
        assert (base - dual.embed_texts([other])).abs().max() > 1e-3, other


def test_padding_changes_nothing() -> None:
    dual = tiny_dual()
    tokens = dual.tokens(["word1 word2"])
    torch.testing.assert_close(dual.read(F.pad(tokens, (0, 6))), dual.read(tokens))


def test_a_long_text_is_cut_at_the_longest_possible_and_keeps_its_end() -> None:
    dual = tiny_dual()
    tokens = dual.tokens([TEXTS[3] * 9])
    assert tokens.shape == (1, TINY_CLIP.seq_len) and tokens[0, -1] == dual.tokenizer.end_id


def test_the_vectors_are_the_librarys_where_it_finds_the_end_token() -> None:
    """Pixels in, ids in: CLIPModel's own forward gives the same cosines times the same scale."""
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    config = CLIPConfig(
        text_config=sizes
        | {"vocab_size": 40, "max_position_embeddings": 12, "eos_token_id": 39, "bos_token_id": 38},
        vision_config=sizes | {"image_size": 32, "patch_size": 8},
        projection_dim=20,
    )
    clip = CLIPModel(config).eval()

    class Last(WordTokenizer):
        """A vocabulary whose end token has the highest id, as CLIP's."""

        specials = ("<pad>", "<start>", "<unk>")

        def __init__(self) -> None:
            self.vocabulary = [f"w{i}" for i in range(40)]
            self._ids = {word: i for i, word in enumerate(self.vocabulary)}
            self.pad_id, self.unk_id, self.start_id, self.end_id = 0, 1, 38, 39

    images = ClipVision(
        "tiny", clip.vision_model, clip.visual_projection, replace(CLIP_PREPROCESSING, size=32)
    )
    dual = DualEncoder(clip, images, Last())
    texts, pixels = ["w5 w7", "w9 w3 w20 w11"], torch.randint(0, 256, (3, 32, 32, 3))
    mean, std = (
        torch.tensor(v).view(3, 1, 1) for v in (CLIP_PREPROCESSING.mean, CLIP_PREPROCESSING.std)
    )
    tokens = dual.tokens(texts)
    expected = clip(input_ids=tokens, pixel_values=(pixels.permute(0, 3, 1, 2) / 255 - mean) / std)
    own = dual.logits(images(pixels)["embedding"], dual.embed_texts(texts))
    torch.testing.assert_close(own, expected.logits_per_image, atol=1e-5, rtol=1e-5)
    assert images.outputs == {"embedding": (20,), "grid": (17, 32)}
    found = images(pixels)
    assert {name: tuple(value.shape[1:]) for name, value in found.items()} == images.outputs
    torch.testing.assert_close(found["grid"], expected.vision_model_output.last_hidden_state)


def test_classes_are_told_apart_by_sentences_alone() -> None:
    dual = tiny_dual()
    images = dual.embed_images(sorted(PHOTOS.glob("*.jpg"))[:3])
    labels, prompts = ["word1", "word2", "word3"], ["word4 {}", "{} word5 word6"]
    found = dual.classify(images, labels, prompts)
    torch.testing.assert_close(found.sum(1), torch.ones(3))
    means = torch.stack(
        [dual.embed_texts([p.format(label) for p in prompts]).mean(0) for label in labels]
    )
    expected = (dual.clip.logit_scale.exp() * images @ F.normalize(means, dim=-1).T).softmax(1)
    torch.testing.assert_close(found, expected)


# --- the image half as an encoder


def test_the_image_half_is_a_frozen_encoder_that_names_its_stem() -> None:
    dual = tiny_dual()
    encoder = dual.images
    assert encoder.name == dual.name == "small_clip on shapes_cnn" and not encoder.public
    described = encoder.describe()
    assert (
        described["name"] == "small_clip on shapes_cnn"
        and described["stem"]["name"] == "shapes_cnn"
    )
    assert described["settings"] == asdict(TINY_CLIP)
    assert encoder.outputs == {"embedding": (24,), "grid": (65, 32)}
    assert not any(p.requires_grad for p in dual.parameters())
    dual.train()
    assert not any(module.training for module in encoder.modules())
    json.dumps(dual.describe())


def test_its_weights_hash_covers_tower_and_stem() -> None:
    dual = tiny_dual()
    before = dual.images.weights_hash()
    with torch.no_grad():
        dual.clip.visual_projection.weight[0, 0] += 1
    changed = dual.images.weights_hash()
    with torch.no_grad():
        next(dual.images.stem.trunk.parameters())[0, 0, 0, 0] += 1  # type: ignore[union-attr]
    assert len({before, changed, dual.images.weights_hash()}) == 3
    text = dual.text_hash()
    with torch.no_grad():
        dual.clip.text_projection.weight[0, 0] += 1
    assert dual.text_hash() != text


def test_patches_cover_the_grid() -> None:
    dual = tiny_dual(sizes=replace(TINY_CLIP, patch=2))
    assert dual.images.outputs["grid"] == (17, 32) and dual.embed_images(PHOTO).shape == (1, 24)
    grid = torch.randn(1, 64, 32)
    base = dual.embed_grid(grid)
    for place in range(0, 64, 7):
        changed = grid.clone()
        changed[0, place] += 3
        assert not torch.equal(dual.embed_grid(changed), base), "each place is looked at"


@pytest.mark.parametrize(
    ("outputs", "patch"),
    [({"grid": (10, 4)}, 1), ({}, 1), ({"grid": (9, 4)}, 2), ({"grid": (9, 4)}, 4)],
)
def test_a_stem_without_a_square_grid_is_refused(outputs: dict[str, Any], patch: int) -> None:
    stem = tiny_encoder()
    stem.outputs = outputs
    with pytest.raises(CapGenError, match="square grid"):
        tiny_dual(stem, sizes=replace(TINY_CLIP, patch=patch))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_cached_grid_gives_the_embedding_that_pixels_give(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    manifest = tiny_manifest(tmp_path / "images", train=6, dev=2)
    (tmp_path / "images" / "003.png").write_bytes(b"broken")
    dual = tiny_dual(tiny_encoder())
    encoder, stem = dual.images, dual.images.stem
    assert stem is not None
    options: dict[str, Any] = {"dtype": dtype, "device": CPU, "batch_size": 3}
    for flip in (False, True):
        pixels = extract(manifest, encoder, "embedding", flip, tmp_path / "pixels", **options)
        extract(manifest, stem, "grid", flip, tmp_path / "both", **options)
        cached = extract(manifest, encoder, "embedding", flip, tmp_path / "both", **options)
        names = [item.image for item in manifest.items if item.image != "003.png"]
        assert torch.equal(pixels.rows(names), cached.rows(names)) and pixels.names == cached.names
        assert set(pixels.failed) == set(cached.failed) == {"003.png"}
        assert "small_clip_on_tiny-embedding" in cached.path.name
    again = find_cache(manifest, encoder, "embedding", dtype, True, tmp_path / "both")
    assert again is not None and again.path == cached.path
    fresh = encode_images(
        encoder, [manifest.path(i) for i in manifest.items if i.image in names], dtype
    )["embedding"]
    torch.testing.assert_close(fresh, pixels_plain(tmp_path, manifest, encoder, dtype).rows(names))
    assert torch.equal(
        dual.embed_grid(again.rows(names[:1]).new_zeros(1, 9, 12)),
        dual.embed_grid(torch.zeros(1, 9, 12)),
    )


def pixels_plain(folder: Path, manifest: Any, encoder: Encoder, dtype: torch.dtype) -> Any:
    """Return the features that were computed from pixels."""
    return extract(
        manifest, encoder, "embedding", False, folder / "pixels", dtype=dtype, device=CPU
    )


def test_the_grid_is_read_from_the_cache_and_not_computed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = tiny_manifest(tmp_path / "images", train=4, dev=1)
    dual = tiny_dual(tiny_encoder())
    options: dict[str, Any] = {"folder": tmp_path / "f", "dtype": torch.float32, "device": CPU}
    extract(manifest, dual.images.stem, "grid", **options)  # type: ignore[arg-type]
    monkeypatch.setattr(Encoder, "forward", lambda *_: pytest.fail("the stem runs again"))
    cache = extract(manifest, dual.images, "embedding", **options)
    assert cache.array.shape == (5, 24)


# --- on disk


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dual") / "clip"
    tiny_dual().save(folder)
    return folder


@pytest.fixture
def saved(original: Path, tmp_path: Path) -> Path:
    shutil.copytree(original, tmp_path / "clip")
    return tmp_path / "clip"


def test_a_fresh_process_gives_the_same_vectors(original: Path) -> None:
    script = """
import json, sys
from pathlib import Path
from capgen_utils.vision.dual_encoder import DualEncoder
dual = DualEncoder.load(Path(sys.argv[1]))
images, texts = dual.embed_images(sys.argv[2]), dual.embed_texts(json.loads(sys.argv[3]))
print(json.dumps([images.tolist(), texts.tolist()]))
"""
    done = run_python("-c", script, str(original), str(PHOTO), json.dumps(TEXTS))
    assert done.returncode == 0, done.stderr
    images, texts = map(torch.tensor, json.loads(done.stdout))
    dual = tiny_dual()
    torch.testing.assert_close(images, dual.embed_images(PHOTO), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(texts, dual.embed_texts(TEXTS), atol=1e-6, rtol=1e-5)


def test_what_is_saved_has_the_names_of_the_librarys_clip_and_a_private_stem(
    original: Path,
) -> None:
    files = sorted(p.relative_to(original).as_posix() for p in original.rglob("*") if p.is_file())
    assert files == [
        "config.json",
        "model.safetensors",
        "stem/config.json",
        "stem/model.safetensors",
        "text.safetensors",
        "tokenizer.json",
    ]
    names = set(load_file(original / "model.safetensors")) | set(
        load_file(original / "text.safetensors")
    )
    assert names == set(tiny_dual().clip.state_dict())


def test_its_folder_is_that_of_an_encoder_too(original: Path) -> None:
    encoder = load_encoder_folder(original)
    assert (
        encoder.name == "small_clip on shapes_cnn"
        and encoder.weights_hash() == tiny_dual().images.weights_hash()
    )
    out = encoder(torch.zeros(1, 64, 64, 3))
    torch.testing.assert_close(
        out["embedding"], tiny_dual().images(torch.zeros(1, 64, 64, 3))["embedding"]
    )


def test_the_image_half_alone_comes_back(tmp_path: Path) -> None:
    encoder = tiny_dual().images
    encoder.training_run = {"minutes": 1.0}
    save_encoder(tmp_path / "e", encoder)
    again = load_encoder_folder(tmp_path / "e")
    assert again.describe() == encoder.describe()
    with pytest.raises(CapGenError, match="no dual encoder"):
        DualEncoder.load(tmp_path / "e")


def test_a_public_stem_is_named_and_not_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ENCODERS, "tiny", lambda _: tiny_encoder())
    dual = tiny_dual(tiny_encoder())
    dual.images.preprocessing = replace(
        dual.images.preprocessing, resize="crop", mean=(0.1, 0.2, 0.3)
    )
    dual.save(tmp_path / "clip")
    assert not (tmp_path / "clip" / "stem").exists()
    again = DualEncoder.load(tmp_path / "clip")
    assert again.images.stem is not None and again.images.preprocessing == dual.images.preprocessing
    assert again.images.stem.preprocessing == dual.images.preprocessing, "the stem sees the images"
    torch.testing.assert_close(again.embed_images(PHOTO), dual.embed_images(PHOTO))
    monkeypatch.setitem(ENCODERS, "tiny", lambda _: tiny_encoder(seed=1))
    with pytest.raises(
        CapGenError, match="weights of tiny are not those that small_clip was trained on"
    ):
        DualEncoder.load(tmp_path / "clip")


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "model.safetensors",
        "text.safetensors",
        "tokenizer.json",
        "stem/model.safetensors",
    ],
)
@pytest.mark.parametrize("content", [None, b"", b"{", b"null", b"[]", b'{"text": {}}'])
def test_missing_and_damaged_files_are_refused(
    saved: Path, name: str, content: bytes | None
) -> None:
    if content is None:
        (saved / name).unlink()
    else:
        (saved / name).write_bytes(content)
    with pytest.raises(CapGenError):
        DualEncoder.load(saved)


HOSTILE: list[tuple[tuple[str, ...], Any]] = [
    (("text",), None),
    (("text", "weights_hash"), "0" * 16),
    (("text", "source"), "../../etc"),
    (("name",), "small_clip"),
    (("weights_hash",), 5),
    (("settings",), None),
    (("settings", "embed_size"), 10**12),
    (("settings", "patch"), 0),
    (("settings", "patch"), 3),
    (("settings", "patch"), -8),
    (("settings", "vision_width"), 10**9),
    (("settings", "vision_heads"), 0),
    (("settings", "vision_heads"), 7),
    (("settings", "vision_layers"), 10**6),
    (("settings", "text_width"), "16"),
    (("settings", "text_layers"), True),
    (("settings", "seq_len"), 0),
    (("settings", "surprise"), 1),
    (("stem",), None),
    (("stem", "name"), "../shapes_cnn"),
    (("stem", "weights_hash"), "0" * 16),
    (("stem", "preprocessing"), None),
    (("stem", "preprocessing", "size"), 10**9),
    (("stem", "preprocessing", "std"), [0, 0, 0]),
]


@pytest.mark.parametrize(
    ("path", "value"), HOSTILE, ids=lambda v: ".".join(v) if isinstance(v, tuple) else repr(v)[:20]
)
def test_hostile_descriptions_are_refused(saved: Path, path: tuple[str, ...], value: Any) -> None:
    config = json.loads((saved / "config.json").read_text())
    place = config
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(CapGenError):
        DualEncoder.load(saved)


def test_a_stem_with_a_stem_is_refused(saved: Path) -> None:
    shutil.rmtree(saved / "stem")
    shutil.copytree(saved, saved.parent / "copy")
    shutil.copytree(saved.parent / "copy", saved / "stem")
    with pytest.raises(CapGenError):
        load_encoder_folder(saved)


@pytest.mark.parametrize("name", ["model.safetensors", "text.safetensors"])
def test_changed_weights_are_refused(saved: Path, name: str) -> None:
    tensors = load_file(saved / name)
    key = next(key for key, value in tensors.items() if value.ndim == 2)
    save_file(tensors | {key: tensors[key] + 1}, saved / name)
    with pytest.raises(CapGenError, match="weights are not those"):
        DualEncoder.load(saved)
    save_file({k: v for k, v in tensors.items() if k != key}, saved / name)
    with pytest.raises(CapGenError, match="does not fit"):
        DualEncoder.load(saved)


def test_weights_that_lose_nothing_are_stored_in_half(tmp_path: Path) -> None:
    dual = tiny_dual()
    dual.clip.half().float()
    dual.save(tmp_path / "half")
    stored = load_file(tmp_path / "half" / "text.safetensors") | load_file(
        tmp_path / "half" / "model.safetensors"
    )
    assert {value.dtype for value in stored.values()} == {torch.float16}
    again = DualEncoder.load(tmp_path / "half")
    assert all(
        torch.equal(value, again.clip.state_dict()[key])
        for key, value in dual.clip.state_dict().items()
    )


# --- published checkpoints

# openai/clip-vit-large-patch14's sizes; the library's defaults are those of
# openai/clip-vit-base-patch32.
LARGE = CLIPConfig(
    text_config={
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_attention_heads": 12,
        "projection_dim": 768,
    },
    vision_config={
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "patch_size": 14,
        "projection_dim": 768,
    },
    projection_dim=768,
)


def published_names(layers: dict[str, int]) -> set[str]:
    """Return the names of a published CLIP's tensors, written down from the layout and not from the
    library."""
    names = {"logit_scale", "visual_projection.weight", "text_projection.weight"}
    names |= {f"vision_model.embeddings.{n}" for n in ("class_embedding", "patch_embedding.weight")}
    names |= {f"{m}.embeddings.position_embedding.weight" for m in ("vision_model", "text_model")}
    names |= {"text_model.embeddings.token_embedding.weight"}
    norms = [
        "vision_model.pre_layrnorm",
        "vision_model.post_layernorm",
        "text_model.final_layer_norm",
    ]
    parts = [f"self_attn.{p}_proj" for p in ("q", "k", "v", "out")] + ["mlp.fc1", "mlp.fc2"]
    parts += ["layer_norm1", "layer_norm2"]
    norms += [
        f"{m}.encoder.layers.{i}.{p}"
        for m, count in layers.items()
        for i in range(count)
        for p in parts
    ]
    return names | {f"{n}.{kind}" for n in norms for kind in ("weight", "bias")}


@pytest.mark.parametrize(
    ("name", "config", "vision_layers", "parameters", "vision"),
    [
        ("clip-vit-base-patch32", CLIPConfig(), 12, 151_277_313, 87_456_000),
        ("clip-vit-large-patch14", LARGE, 24, 427_616_513, 303_179_776),
    ],
)
def test_the_key_sets_and_shapes_of_the_published_clips(
    name: str, config: CLIPConfig, vision_layers: int, parameters: int, vision: int
) -> None:
    with torch.device("meta"):
        clip = CLIPModel(config)
        encoder = ClipVision(name, clip.vision_model, clip.visual_projection, CLIP_PREPROCESSING)
    shapes = {key: tuple(value.shape) for key, value in clip.state_dict().items()}
    assert set(shapes) == published_names({"vision_model": vision_layers, "text_model": 12})
    assert shapes["text_model.embeddings.token_embedding.weight"] == (
        49_408,
        config.text_config.hidden_size,
    )
    assert shapes["text_model.embeddings.position_embedding.weight"] == (
        77,
        config.text_config.hidden_size,
    )
    assert sum(p.numel() for p in clip.parameters()) == parameters
    assert sum(p.numel() for p in clip.vision_model.parameters()) == vision
    assert encoder.outputs == CLIPS[name] and encoder.public
    own = {key for key in shapes if key.split(".")[0] in ("vision_model", "visual_projection")}
    assert set(encoder.trunk.state_dict()) == own, "the image half has the published names"


@pytest.fixture(scope="module")
def hub_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a small CLIP in the hub's layout."""
    torch.manual_seed(1)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    text = CLIPTextConfig(
        **sizes,
        vocab_size=len(tiny_tokenizer()),
        max_position_embeddings=16,
        eos_token_id=2,
        bos_token_id=1,
        pad_token_id=0,
    ).to_dict()
    clip = CLIPModel(
        CLIPConfig(
            text_config=text,
            vision_config=sizes | {"image_size": 64, "patch_size": 16},
            projection_dim=20,
        )
    )
    folder = tmp_path_factory.mktemp("hub") / "tiny-clip"
    clip.save_pretrained(folder)
    return folder


def test_a_checkpoint_in_the_hubs_layout_loads_strictly(hub_folder: Path, tmp_path: Path) -> None:
    dual = DualEncoder.from_pretrained(hub_folder, tiny_tokenizer())
    stored = load_file(hub_folder / "model.safetensors")
    assert (
        set(stored)
        == published_names({"vision_model": 2, "text_model": 2})
        == set(dual.clip.state_dict())
    )
    assert all(torch.equal(value, stored[key]) for key, value in dual.clip.state_dict().items())
    assert dual.name == "tiny-clip" and dual.images.preprocessing == replace(
        CLIP_PREPROCESSING, size=64
    )
    assert dual.embed_images(PHOTO).shape == (1, 20) and dual.embed_texts(TEXTS).shape == (4, 20)
    # Older releases of the library stored a constant too.
    old = shutil.copytree(hub_folder, tmp_path / "old")
    places = {
        f"{m}.embeddings.position_ids": torch.arange(n)[None]
        for m, n in (("vision_model", 17), ("text_model", 16))
    }
    save_file(stored | places, old / "model.safetensors", {"format": "pt"})
    again = DualEncoder.from_pretrained(old, tiny_tokenizer())
    assert all(torch.equal(value, stored[key]) for key, value in again.clip.state_dict().items())
    # Not to the bit: where weights lie in memory decides on some processors in which order they are
    # added.
    torch.testing.assert_close(again.embed_images(PHOTO), dual.embed_images(PHOTO))


@pytest.mark.parametrize(
    "damage",
    [
        "missing",
        "no weights",
        "other model",
        "a tensor less",
        "a tensor more",
        "another shape",
        "not finite",
    ],
)
def test_the_three_ways_are_named_where_there_is_no_clip(
    hub_folder: Path, tmp_path: Path, damage: str
) -> None:
    folder = tmp_path / "clip"
    if damage != "missing":
        shutil.copytree(hub_folder, folder)
    stored = load_file(hub_folder / "model.safetensors")
    if damage == "no weights":
        (folder / "model.safetensors").unlink()
    elif damage == "other model":
        config = json.loads((folder / "config.json").read_text()) | {"model_type": "gpt2"}
        (folder / "config.json").write_text(json.dumps(config))
    elif damage != "missing":
        key = "visual_projection.weight"
        changes = {
            "a tensor less": {k: v for k, v in stored.items() if k != key},
            "a tensor more": stored | {"surprise.weight": torch.zeros(2)},
            "another shape": stored | {key: torch.zeros(3, 3)},
            "not finite": stored | {key: torch.full_like(stored[key], torch.nan)},
        }
        save_file(changes[damage], folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CapGenError) as error:
        DualEncoder.from_pretrained(folder, tiny_tokenizer())
    assert all(
        way in error.value.remedy
        for way in ("(1)", "hub", "(2)", "local folder", "(3)", "small_clip")
    )


@pytest.mark.parametrize("name", CLIPS)
def test_published_image_encoders_are_known_by_name(
    hub_folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(CapGenError, match=f"not {name}") as error:
        build_encoder(name, hub_folder)
    assert "(3)" in error.value.remedy
    monkeypatch.setitem(CLIPS, name, {"embedding": (20,), "grid": (17, 32)})
    encoder = build_encoder(name, hub_folder)
    assert encoder.name == name and encoder.public and encoder.preprocessing.resize == "crop"
    assert not any("text" in key for key in encoder.state_dict())


def test_a_published_clip_is_saved_by_its_source_alone(
    hub_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dual = DualEncoder.from_pretrained(hub_folder, tiny_tokenizer())
    dual.save(tmp_path / "scorer")
    assert [p.name for p in (tmp_path / "scorer").iterdir()] == ["config.json"]
    with pytest.raises(CapGenError, match="tokens"):  # this one does not read CLIP's table
        DualEncoder.load(tmp_path / "scorer")
    monkeypatch.setattr(
        "capgen_utils.vision.dual_encoder.BpeTokenizer.full", lambda *_, **__: tiny_tokenizer()
    )
    again = DualEncoder.load(tmp_path / "scorer")
    assert torch.equal(again.embed_texts(TEXTS), dual.embed_texts(TEXTS))
    moved = shutil.move(hub_folder, tmp_path / "moved")
    try:
        assert DualEncoder.load(tmp_path / "scorer", Path(moved)).text_hash() == dual.text_hash()
        with pytest.raises(CapGenError, match=r"\(3\)"):
            DualEncoder.load(tmp_path / "scorer")
    finally:
        shutil.move(moved, hub_folder)


def test_rows_of_ids_become_a_padded_tensor() -> None:
    assert pad([[1, 2, 3], [4]], 9).tolist() == [[1, 2, 3], [4, 9, 9]]
    assert pad([], 0).shape == (0, 0)
