"""The captioner that ships: a clone without network captions photographs with it, by one command."""

import json
import sys
from pathlib import Path

import pytest
from helpers import PHOTOS, ROOT, run_python
from safetensors import safe_open

from capgen_utils.captioner import DEFAULT_BUNDLE
from capgen_utils.checkpoint import load_bundle
from capgen_utils.text import tokenise

OFFLINE = """
import socket, sys
def refuse(*args, **kwargs):
    raise OSError("this test has no network")
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = socket.create_connection = refuse
from capgen_utils.cli import main
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
    assert all(3 <= len(tokenise(caption)) <= 25 and "<" not in caption for caption in said.values())


def test_a_dog_is_called_a_dog(said: dict[str, str]) -> None:
    assert "dog" in tokenise(said["dog_panting"])


def test_the_default_bundle_is_small_and_plain() -> None:
    files = [p for p in DEFAULT_BUNDLE.rglob("*") if p.is_file()]
    assert {p.relative_to(DEFAULT_BUNDLE).as_posix() for p in files} == {
        "config.json", "model.safetensors", "tokenizer.json",
    }  # fmt: skip
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
