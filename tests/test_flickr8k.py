"""The real Flickr8k: read whole, encoded, captioned; and nothing of it is in the repository."""

import functools
import hashlib
import json
import re
import subprocess
from pathlib import Path

import pytest
import torch
from helpers import CPU, ROOT

from capgen_utils import Captioner
from capgen_utils.data.datasets import load_dataset
from capgen_utils.data.manifest import Manifest
from capgen_utils.text.ptb import tokenise
from capgen_utils.vision.encoders import build_encoder
from capgen_utils.vision.features import extract

pytestmark = pytest.mark.flickr8k
LONG = 8  # words: shorter captions are things that anybody might write


@pytest.fixture(scope="module")
def manifest(flickr8k: Path) -> Manifest:
    return load_dataset("flickr8k", flickr8k)


@functools.cache
def tracked() -> list[Path]:
    command = ["git", "ls-files", "-co", "--exclude-standard", "-z"]
    listed = (
        subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
        .stdout.decode()
        .split("\0")
    )
    return [ROOT / name for name in listed if name and (ROOT / name).is_file()]


def test_the_official_splits(manifest: Manifest) -> None:
    assert {s: len(manifest.split(s)) for s in manifest.split_names()} == {
        "train": 6000,
        "dev": 1000,
        "test": 1000,
    }
    assert sum(len(i.captions) for i in manifest.items) == 40_000


def test_real_photographs_are_encoded_and_differ(manifest: Manifest, tmp_path: Path) -> None:
    part = manifest.split("test").limit(64)
    cache = extract(
        part, build_encoder("efficientnet_lite0"), folder=tmp_path, dtype=torch.float32, device=CPU
    )
    assert not cache.failed and cache.array.shape == (64, 49, 1280)
    rows = cache.rows(cache.names).float().mean(1)
    assert torch.isfinite(rows).all()
    alike = torch.nn.functional.cosine_similarity(rows[:, None], rows[None], dim=-1)
    assert (alike - torch.eye(64)).max() < 0.999


def test_the_shipped_captioner_says_varied_things_of_real_photographs(manifest: Manifest) -> None:
    part = manifest.split("test").limit(64)
    said = [
        c.text
        for c in Captioner.from_bundle(device="cpu").caption([manifest.path(i) for i in part.items])
    ]
    assert len(set(said)) >= 40
    words = [set(tokenise(text)) for text in said]
    content = {w for i in part.items for c in i.captions for w in tokenise(c)} - {
        "a",
        "the",
        "in",
        "on",
        "of",
        "and",
    }
    own = [
        len(w & content & set(tokenise(" ".join(i.captions))))
        for w, i in zip(words, part.items, strict=True)
    ]
    other = [
        len(w & content & set(tokenise(" ".join(part.items[(n + 7) % 64].captions))))
        for n, w in enumerate(words)
    ]
    assert sum(own) > 1.5 * sum(other), "captions fit their own photographs better than others"


def test_no_photograph_is_in_the_repository(manifest: Manifest) -> None:
    folder = manifest.root
    sizes: dict[int, list[Path]] = {}
    for path in folder.iterdir():
        sizes.setdefault(path.stat().st_size, []).append(path)
    for path in tracked():
        if path.stat().st_size > 1000 and path.stat().st_size in sizes:
            own = hashlib.sha256(path.read_bytes()).digest()
            same = [
                p.name
                for p in sizes[path.stat().st_size]
                if hashlib.sha256(p.read_bytes()).digest() == own
            ]
            assert not same, f"{path.relative_to(ROOT)} is Flickr8k's {same}"
    names = {i.image for i in manifest.items}
    assert not [p for p in tracked() if p.name in names]


def test_no_caption_is_in_the_repository(flickr8k: Path, manifest: Manifest) -> None:
    captions = {" ".join(tokenise(c)) for c in manifest.captions()}
    long = {c for c in captions if len(c.split()) >= LONG}
    assert len(long) > 25_000
    starts = {tuple(c.split()[:LONG]) for c in long}
    lengths = sorted({len(c.split()) for c in long})
    found = []
    for path in tracked():
        if path.suffix not in (".ipynb", ".md", ".json", ".py", ".txt", ".html", ".jsonl"):
            continue
        if path.name == "tokenizer.json" or path.name.endswith("_predictions.json"):
            continue  # a vocabulary; and what our own models said
        text = path.read_text(encoding="utf-8", errors="replace")
        if path.suffix in (".ipynb", ".json"):
            text = json.dumps(json.loads(text), ensure_ascii=False)
        words = tokenise(re.sub(r"\\[nt\"]", " ", text))
        for at in range(len(words) - LONG + 1):
            if tuple(words[at : at + LONG]) in starts:
                candidates = (" ".join(words[at : at + n]) for n in lengths)
                found += [f"{path.relative_to(ROOT)}: {c}" for c in candidates if c in long]
    assert found == []
