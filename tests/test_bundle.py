"""Bundles load whole or are refused: every config.json gives a bundle or a CapGenError."""

import copy
import errno
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    PHOTOS,
    VARIANTS,
    run_python,
    save_tiny_bundle,
    tiny_encoder,
    tiny_model,
    tiny_shape,
    tiny_tokenizer,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from capgen_utils import bundle as checkpoint
from capgen_utils.bundle import VERSION, Bundle, bundle_info, load_bundle, save_bundle
from capgen_utils.captioner import Captioner
from capgen_utils.common import tensors
from capgen_utils.common.files import CapGenError
from capgen_utils.config import DecodingConfig
from capgen_utils.models import MODELS
from capgen_utils.vision.encoder import Encoder
from capgen_utils.vision.preprocessing import Preprocessing

PHOTO = PHOTOS / "cat_on_deck.jpg"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundles") / "bundle"
    save_tiny_bundle(folder)
    return folder


@pytest.fixture
def bundle(original: Path, tmp_path: Path) -> Path:
    shutil.copytree(original, tmp_path / "bundle")
    return tmp_path / "bundle"


def change_config(folder: Path, path: tuple[str, ...], value: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    place = config
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    (folder / "config.json").write_text(json.dumps(config))


def use(folder: Path) -> str:
    """Load the bundle and caption an image with it."""
    return Captioner.from_bundle(folder, "cpu").caption(PHOTO)[0].text


# --- there and back


def test_a_bundle_is_loaded_as_it_was_saved(original: Path) -> None:
    model = tiny_model(tokenizer=tiny_tokenizer(), shape=(64, 32))
    loaded = load_bundle(original)
    assert not loaded.model.training and not any(p.requires_grad for p in loaded.model.parameters())
    for key, value in loaded.model.state_dict().items():
        assert value.dtype == torch.float32 and value.device.type == "cpu"
        assert torch.equal(value, model.state_dict()[key].half().float()), key
    assert loaded.decoding == DecodingConfig(beam=2, max_length=8)
    assert loaded.extraction_dtype == torch.float32
    assert loaded.tokenizer.to_json() == tiny_tokenizer().to_json()
    assert load_file(original / "model.safetensors")["embedding.weight"].dtype == torch.float16
    assert sorted(
        p.relative_to(original).as_posix() for p in original.rglob("*") if p.is_file()
    ) == [
        "config.json",
        "encoder/config.json",
        "encoder/model.safetensors",
        "model.safetensors",
        "tokenizer.json",
    ]


@pytest.mark.parametrize("name", [*MODELS, *VARIANTS])
def test_every_captioner_survives_saving_and_loading(tmp_path: Path, name: str) -> None:
    model, tokenizer = tiny_model(name), tiny_tokenizer()
    seen = {model.feature: tiny_shape(name)}
    encoder = Encoder("tiny", torch.nn.Identity(), Preprocessing(), seen)
    info = bundle_info(
        VARIANTS.get(name, (name,))[0], model, encoder, torch.float32, DecodingConfig(), "shapes"
    )
    save_bundle(tmp_path / "b", Bundle(model, tokenizer, info), encoder)
    loaded = load_bundle(tmp_path / "b").model.to("cpu")
    assert not any(tensor.is_meta for tensor in (*loaded.parameters(), *loaded.buffers()))
    features, tokens = torch.randn(2, *tiny_shape(name)), torch.tensor([[2, 5, 6], [2, 7, 8]])
    said = [m(m.encode(features), tokens, torch.arange(2)) for m in (model.half().float(), loaded)]
    torch.testing.assert_close(*said)


def test_a_new_process_gives_the_same_captions(original: Path) -> None:
    script = "import sys; from capgen_utils import Captioner\n"
    script += "c = Captioner.from_bundle(sys.argv[1], 'cpu')\n"
    script += "for r in c.caption(sys.argv[2:]): print(r.text, f'{r.log_probability:.4f}')"
    photos = sorted(PHOTOS.glob("*.jpg"))[:4]
    done = run_python("-c", script, str(original), *map(str, photos))
    assert done.returncode == 0, done.stderr
    here = Captioner.from_bundle(original, "cpu").caption(photos)
    assert done.stdout.splitlines() == [f"{r.text} {r.log_probability:.4f}" for r in here]


def test_a_private_encoder_travels_with_the_bundle(
    original: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CAPGEN_DATA", str(tmp_path / "elsewhere"))
    encoder = load_bundle(original).build_encoder()
    assert encoder.name == "shapes_cnn"
    assert encoder.weights_hash() == load_bundle(original).info["encoder"]["weights_hash"]
    assert not (tmp_path / "elsewhere").exists()


def test_a_public_encoder_does_not(tmp_path: Path) -> None:
    encoder, tokenizer = tiny_encoder(), tiny_tokenizer()
    model = tiny_model(tokenizer=tokenizer)
    info = bundle_info(
        "transformer", model, encoder, torch.bfloat16, DecodingConfig(beam=1), "flickr8k", step=3
    )
    save_bundle(tmp_path / "b", Bundle(model, tokenizer, info), encoder)
    assert not (tmp_path / "b" / "encoder").exists()
    loaded = load_bundle(tmp_path / "b")
    assert loaded.info["step"] == 3 and loaded.extraction_dtype == torch.bfloat16
    with pytest.raises(CapGenError, match="tiny"):
        loaded.build_encoder()


def test_the_stored_preprocessing_is_used(bundle: Path) -> None:
    before = use(bundle)
    change_config(bundle, ("encoder", "preprocessing", "resize"), "crop")
    change_config(bundle, ("encoder", "preprocessing", "mean"), [0.1, 0.2, 0.3])
    change_config(bundle, ("encoder", "preprocessing", "std"), [0.9, 0.8, 0.7])
    encoder = load_bundle(bundle).build_encoder()
    assert encoder.preprocessing.resize == "crop"
    pixels = torch.full((1, 64, 64, 3), 128)
    plain = load_bundle(bundle).build_encoder()
    expected = plain.trunk(
        (pixels.permute(0, 3, 1, 2) / 255 - torch.tensor([0.1, 0.2, 0.3]).view(1, 3, 1, 1))
        / torch.tensor([0.9, 0.8, 0.7]).view(1, 3, 1, 1)
    )
    torch.testing.assert_close(encoder(pixels)["pooled"], expected.mean((2, 3)))
    assert before


# --- refused


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_missing_file_is_named(bundle: Path, name: str) -> None:
    (bundle / name).unlink()
    with pytest.raises(CapGenError, match=name) as error:
        load_bundle(bundle)
    assert str(bundle) in error.value.problem and "again" in error.value.remedy


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(CapGenError, match="nowhere"):
        load_bundle(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(CapGenError, match="file"):
        load_bundle(tmp_path / "file")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_part_of_the_encoder_is_named(bundle: Path, name: str) -> None:
    (bundle / "encoder" / name).unlink()
    with pytest.raises(CapGenError, match=name.split(".")[0]):
        use(bundle)


@pytest.mark.parametrize("version", [VERSION + 1, 10**30])
def test_a_newer_bundle_is_refused_with_the_way_out(bundle: Path, version: int) -> None:
    change_config(bundle, ("version",), version)
    with pytest.raises(CapGenError, match="version") as error:
        load_bundle(bundle)
    assert "update CapGen" in error.value.remedy


@pytest.mark.parametrize("version", [0, 2, "1", None, [], 10**30])
def test_another_version_is_named(bundle: Path, version: Any) -> None:
    change_config(bundle, ("version",), version)
    with pytest.raises(CapGenError, match="version"):
        load_bundle(bundle)


@pytest.mark.parametrize("part", [0.0, 0.001, 0.1, 0.5, 0.99, 0.99999])
def test_truncated_weights_are_refused(bundle: Path, part: float) -> None:
    path = bundle / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: min(len(content) - 1, int(len(content) * part))])
    with pytest.raises(CapGenError, match=r"model\.safetensors"):
        load_bundle(bundle)


def edit_weights(path: Path, **changes: Any) -> None:
    tensors = load_file(path) | changes
    save_file({k: v for k, v in tensors.items() if v is not None}, path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"surprise": torch.ones(3)}, "surprise"),
        ({"norm.bias": None}, r"norm\.bias"),
        ({"norm.bias": torch.zeros(33)}, r"norm\.bias"),
        ({"norm.bias": torch.zeros(1, 32)}, r"norm\.bias"),
        ({"norm.bias": torch.full((32,), torch.nan)}, "finite"),
        ({"norm.bias": torch.full((32,), torch.inf)}, "finite"),
    ],
    ids=str,
)
def test_weights_that_do_not_fit_are_refused(bundle: Path, change: dict, said: str) -> None:
    edit_weights(bundle / "model.safetensors", **change)
    with pytest.raises(CapGenError, match=said):
        load_bundle(bundle)


def test_changed_weights_of_the_encoder_are_refused(bundle: Path) -> None:
    path = bundle / "encoder" / "model.safetensors"
    key = next(iter(load_file(path)))
    edit_weights(path, **{key: load_file(path)[key] + 1e-3})
    with pytest.raises(CapGenError, match="weights"):
        use(bundle)


def test_another_encoder_is_refused(bundle: Path) -> None:
    change_config(bundle, ("encoder", "weights_hash"), "0" * 16)
    with pytest.raises(CapGenError, match="not those that the captioner was trained on"):
        use(bundle)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"version": 1}']
)
@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "encoder/config.json", "encoder/model.safetensors"]
)
def test_damaged_files_are_refused(bundle: Path, name: str, content: bytes) -> None:
    (bundle / name).write_bytes(content)
    with pytest.raises(CapGenError):
        use(bundle)


HOSTILE: list[tuple[tuple[str, ...], Any]] = [
    (("model",), "joint"),
    (("model",), "__class__"),
    (("model",), ["transformer"]),
    (("architecture", "d_model"), 10**12),
    (("architecture", "d_model"), "256"),
    (("architecture", "d_model"), None),
    (("architecture", "d_model"), -32),
    (("architecture", "d_model"), 32.0),
    (("architecture", "d_model"), [32]),
    (("architecture", "n_head"), 0),
    (("architecture", "n_head"), -4),
    (("architecture", "n_head"), None),
    (("architecture", "n_decode"), 10**6),
    (("architecture", "n_decode"), 0),
    (("architecture", "n_decode"), True),
    (("architecture", "fc_dim"), 10**12),
    (("architecture", "seq_len"), 10**12),
    (("architecture", "seq_len"), "9"),
    (("architecture", "surprise"), 1),
    (("architecture",), []),
    (("architecture", "dropout"), "much"),
    (("architecture", "cnn_backbone"), 5),
    (("feature",), {}),
    (("feature", "shape"), []),
    (("feature", "shape"), [64]),
    (("feature", "shape"), [64, 32, 1]),
    (("feature", "shape"), [10**12, 10**12]),
    (("feature", "shape"), [-64, 32]),
    (("feature", "shape"), "64"),
    (("feature", "shape"), [64.5, 32]),
    (("feature", "shape"), [[64], 32]),
    (("feature", "output"), "pixels"),
    (("encoder",), []),
    (("encoder", "name"), 5),
    (("encoder", "name"), "../../etc"),
    (("encoder", "weights_hash"), 5),
    (("encoder", "preprocessing"), []),
    (("encoder", "preprocessing"), {}),
    (("encoder", "preprocessing", "size"), 10**9),
    (("encoder", "preprocessing", "size"), 128),
    (("encoder", "preprocessing", "size"), None),
    (("encoder", "preprocessing", "size"), "64"),
    (("encoder", "preprocessing", "size"), -5),
    (("encoder", "preprocessing", "mean"), 5),
    (("encoder", "preprocessing", "mean"), ["a", "b", "c"]),
    (("encoder", "preprocessing", "mean"), [0.5]),
    (("encoder", "preprocessing", "std"), [0, 0, 0]),
    (("encoder", "preprocessing", "std"), [0.5, 0.5, 0.0]),
    (("encoder", "preprocessing", "std"), [None] * 3),
    (("encoder", "preprocessing", "std"), [float("nan")] * 3),
    (("encoder", "preprocessing", "resize"), ["crop"]),
    (("encoder", "preprocessing", "surprise"), 1),
    (("extraction_dtype",), "int8"),
    (("extraction_dtype",), []),
    (("extraction_dtype",), None),
    (("decoding",), []),
    (("decoding", "beam"), 10**9),
    (("decoding", "beam"), 0),
    (("decoding", "beam"), None),
    (("decoding", "beam"), "5"),
    (("decoding", "beam"), 2.5),
    (("decoding", "beam"), True),
    (("decoding", "max_length"), 10**9),
    (("decoding", "max_length"), -1),
    (("decoding", "max_length"), None),
    (("decoding", "length_penalty"), 1e308),
    (("decoding", "length_penalty"), float("nan")),
    (("decoding", "length_penalty"), "1"),
    (("decoding", "surprise"), 1),
    (("decoding", "temperature"), -1),
    (("decoding", "temperature"), "hot"),
    (("decoding", "top_k"), -1),
    (("decoding", "top_p"), 0.0),
    (("decoding", "top_p"), 2),
    (("decoding", "repetition_penalty"), 0),
    (("decoding", "no_repeat_ngram"), 2.5),
    (("decoding", "groups"), 0),
    (("decoding", "groups"), 7),
    (("decoding", "min_length"), 10**6),
    (("decoding", "samples"), 10**9),
    (("decoding", "seed"), -1),
    (("decoding", "seed"), 10**30),
    (("preset",), []),
    (("training",), "x"),
    (("training",), []),
]


@pytest.mark.parametrize(
    ("path", "value"), HOSTILE, ids=lambda v: ".".join(v) if isinstance(v, tuple) else repr(v)[:20]
)
def test_hostile_values_are_refused(bundle: Path, path: tuple[str, ...], value: Any) -> None:
    change_config(bundle, path, value)
    with pytest.raises(CapGenError):
        use(bundle)


def test_a_bundle_from_before_these_decoding_options_loads(bundle: Path) -> None:
    change_config(bundle, ("decoding",), {"beam": 2, "max_length": 8, "length_penalty": 0.5})
    assert load_bundle(bundle).decoding == DecodingConfig(beam=2, max_length=8, length_penalty=0.5)


@pytest.mark.parametrize(
    "settings_of_encoder", [None, [], {}, {"width": 10**9}, {"width": "32"}, {"width": True}]
)
def test_hostile_encoders_are_refused(bundle: Path, settings_of_encoder: Any) -> None:
    path = bundle / "encoder" / "config.json"
    config = json.loads(path.read_text()) | {"settings": settings_of_encoder}
    path.write_text(json.dumps(config))
    with pytest.raises(CapGenError):
        use(bundle)


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="reads peak memory as Linux counts it"
)
def test_huge_sizes_are_refused_before_allocating_memory(original: Path, tmp_path: Path) -> None:
    sizes = {"d_model": 4096, "fc_dim": 16384, "n_decode": 64, "n_head": 8, "seq_len": 1024}
    folder = tmp_path / "huge"
    shutil.copytree(original, folder)
    for key, value in sizes.items():
        change_config(folder, ("architecture", key), value)
    change_config(folder, ("feature", "shape"), [10**5, 10**5])
    script = """
import resource, sys
from pathlib import Path
from capgen_utils.bundle import load_bundle
from capgen_utils.common.files import CapGenError
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    load_bundle(Path(sys.argv[1]))
except CapGenError:
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    done = run_python("-c", script, str(folder))
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 300, "megabytes"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=4,
)


def places(value: Any, path: tuple = ()) -> list[tuple]:
    found = [path] if path else []
    pairs = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, inner in pairs:
        found += places(inner, (*path, key))
    return found


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_change_of_the_configuration_loads_or_is_refused(
    original: Path, data: st.DataObject
) -> None:
    config = json.loads((original / "config.json").read_text())
    path = data.draw(st.sampled_from(places(config)))
    value = data.draw(JSON | st.integers(-(10**12), 10**12) | st.just("delete"))
    changed = copy.deepcopy(config)
    place = changed
    for key in path[:-1]:
        place = place[key]
    if value == "delete":
        del place[path[-1]]
    else:
        place[path[-1]] = value
    folder = original.parent / "changed"
    if not folder.exists():
        shutil.copytree(original, folder)
    (folder / "config.json").write_text(json.dumps(changed))
    try:
        loaded = load_bundle(folder)
        loaded.build_encoder()
    except CapGenError:
        return
    assert loaded.decoding.beam <= 100


# --- saving


def content_of(folder: Path) -> dict[str, bytes]:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }


@pytest.mark.parametrize(
    "moment", ["mkdir", "save_file", "write_json", "replace", "second replace"]
)
def test_a_failing_save_leaves_the_old_bundle(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    before, new = content_of(bundle), load_bundle(bundle)
    calls = [0]

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    replace = os.replace

    def second(*args: Any) -> None:
        calls[0] += "model" not in str(args) and "json" not in str(args)
        if calls[0] == 2:
            full()
        replace(*args)

    with monkeypatch.context() as patch:
        if moment == "mkdir":
            patch.setattr("tempfile.mkdtemp", full)
        elif moment in ("replace", "second replace"):
            patch.setattr(os, "replace", full if moment == "replace" else second)
        else:
            patch.setattr(tensors if moment == "save_file" else checkpoint, moment, full)
        with pytest.raises(CapGenError, match="No space left"):
            save_bundle(bundle, new)
    assert content_of(bundle) == before
    assert [p.name for p in bundle.parent.iterdir()] == ["bundle"], "nothing half-written stays"


@pytest.mark.skipif(sys.platform == "win32", reason="limits file sizes as POSIX does")
@pytest.mark.parametrize("what", ["bundle", "checkpoint"])
def test_a_full_disk_while_writing_tensors_is_explained(
    bundle: Path, tmp_path: Path, what: str
) -> None:
    script = """
import resource, sys, torch
from pathlib import Path
from capgen_utils.bundle import load_bundle, save_bundle
from capgen_utils.common.files import CapGenError
from capgen_utils.common.tensors import save_checkpoint
bundle = load_bundle(Path(sys.argv[1]))
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    if sys.argv[2] == "bundle":
        save_bundle(Path(sys.argv[1]), bundle)
    else:
        checkpoint = Path(sys.argv[1]).parent / "checkpoint.safetensors"
        save_checkpoint(checkpoint, {"a": torch.ones(100_000)}, {})
except CapGenError as error:
    print("explained:", error)
"""
    before = content_of(bundle)
    done = run_python("-c", script, str(bundle), what)
    assert done.returncode == 0, done.stderr
    assert "explained:" in done.stdout
    assert content_of(bundle) == before
    assert [p.name for p in bundle.parent.iterdir()] == ["bundle"]


def test_saving_again_replaces_everything(bundle: Path) -> None:
    (bundle / "stale.txt").touch()
    new = load_bundle(bundle)
    save_bundle(bundle, new, load_bundle(bundle).build_encoder())
    assert not (bundle / "stale.txt").exists()
    assert use(bundle)
