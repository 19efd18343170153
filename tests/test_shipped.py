"""The captioners that ship: a clone without network captions photographs by one command."""

import json
import sys
from pathlib import Path

import pytest
from helpers import PHOTOS, ROOT, run_python
from results_rules import TRUE
from safetensors import safe_open

from capgen_utils.apps.authoring.course import find_notebooks, run_notebook
from capgen_utils.bundle import load_bundle
from capgen_utils.captioner import DEFAULT_BUNDLE, Captioner
from capgen_utils.data.datasets import load_dataset
from capgen_utils.data.manifest import Manifest
from capgen_utils.data.shapes import is_true, load_scenes
from capgen_utils.presets import PRESETS
from capgen_utils.text.ptb import tokenise
from capgen_utils.training.shipped import SHIPPED

OFFLINE = """
import socket, sys
def refuse(*args, **kwargs):
    raise OSError("this test has no network")
socket.socket.connect = socket.socket.connect_ex = refuse
socket.getaddrinfo = socket.create_connection = refuse
from capgen_utils.apps.cli.main import main
sys.exit(main(sys.argv[1:]))
"""
BUNDLES = sorted(p.parent for p in (ROOT / "data" / "bundles").glob("*/config.json"))


@pytest.fixture(scope="module")
def said() -> dict[str, str]:
    photos = sorted(PHOTOS.glob("*.jpg"))
    done = run_python("-c", OFFLINE, "caption", "--json", *map(str, photos), HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["image"] for row in rows] == [str(p) for p in photos]
    return {Path(row["image"]).stem: row["caption"] for row in rows}


def test_the_sample_photographs_get_different_captions(said: dict[str, str]) -> None:
    assert len(set(said.values())) >= 0.8 * len(said), said
    assert all(
        3 <= len(tokenise(caption)) <= 25 and "<" not in caption for caption in said.values()
    )


def test_a_dog_is_called_a_dog(said: dict[str, str]) -> None:
    assert "dog" in tokenise(said["dog_panting"])


def test_the_default_bundle_is_small_and_plain() -> None:
    files = [p for p in DEFAULT_BUNDLE.rglob("*") if p.is_file()]
    assert {p.relative_to(DEFAULT_BUNDLE).as_posix() for p in files} == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    }
    assert sum(p.stat().st_size for p in files) <= 20_000_000
    with safe_open(DEFAULT_BUNDLE / "model.safetensors", framework="pt") as stream:
        assert {stream.get_slice(k).get_dtype() for k in stream.keys()} == {"F16"}  # noqa: SIM118


def test_the_default_bundle_says_what_it_is() -> None:
    info = load_bundle(DEFAULT_BUNDLE).info
    assert info["preset"] == "flickr8k" and info["dataset"] == "flickr8k"
    assert info["encoder"]["name"] == "efficientnet_lite0" and info["encoder"]["public"] is True
    assert info["dev"]["BLEU-4"] > 15 and info["training_run"]["minutes"] > 0
    assert "training" in info and sys.version_info


@pytest.mark.parametrize("folder", BUNDLES, ids=lambda p: p.name)
def test_every_bundle_in_the_repository_loads(folder: Path) -> None:
    bundle = load_bundle(folder)
    assert bundle.build_encoder().weights_hash() == bundle.info["encoder"]["weights_hash"]
    assert not [p for p in folder.rglob("*") if p.suffix in (".pt", ".pth", ".pkl", ".bin")]
    text = (folder / "config.json").read_text()
    assert "/home/" not in text and "/work" not in text and "/root" not in text


@pytest.fixture(scope="module")
def scenes_manifest(private_data: Path) -> Manifest:
    return load_dataset("shapes")


@pytest.mark.parametrize("model", PRESETS["shapes"].models)
def test_captioners_of_drawn_scenes_are_nearly_as_right_as_before_they_were_made_small(
    model: str, scenes_manifest: Manifest
) -> None:
    captioner = Captioner.from_bundle(SHIPPED / f"shapes_{model}", "cpu")
    scenes = load_scenes(scenes_manifest.root)
    items = [item for item in scenes_manifest.split("test").items if not scenes[item.image].novel]
    captions = captioner.caption([scenes_manifest.path(item) for item in items], beam=3)
    true = sum(
        is_true(caption.text, scenes[item.image])
        for caption, item in zip(captions, items, strict=True)
    )
    assert true / len(items) >= TRUE.get(model, 0.95) - 0.01


@pytest.mark.slow
@pytest.mark.notebooks
@pytest.mark.timeout(600)
@pytest.mark.parametrize("number", ["03", "06", "07"])
def test_a_notebook_goes_straight_on_without_training(
    number: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CAPGEN_DATA", str(tmp_path))
    (path,) = find_notebooks(number)
    outcome = run_notebook(path, "shapes", tmp_path / "pages", train=False)
    assert not outcome.error, outcome.error
    assert "ready without training: show_tell, attend_tell" in outcome.page.read_text(
        encoding="utf-8"
    )
    assert not list(tmp_path.rglob("checkpoint.safetensors")), "nothing was trained"
