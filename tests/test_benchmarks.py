"""What `make bench` compares is comparable: both decoders say the same, and every part is one that
runs."""

import random
from pathlib import Path
from types import ModuleType

import pytest
import torch
from helpers import load_benchmark, tiny_manifest

from capgen_utils.config import ClipGpt2Config


@pytest.fixture(scope="module")
def decoding() -> ModuleType:
    return load_benchmark("decoding")


@pytest.mark.parametrize(("beam", "fixed"), [(1, False), (3, False), (1, True), (3, True)])
def test_our_decoder_and_the_library_s_say_the_same(
    decoding: ModuleType, monkeypatch: pytest.MonkeyPatch, beam: int, fixed: bool
) -> None:
    monkeypatch.setattr(decoding, "REPEATS", 1)
    torch.manual_seed(0)
    config = ClipGpt2Config(
        seq_len=decoding.LONGEST + 1, dropout=0.0, n_embd=16, n_layer=1, n_head=2, n_positions=64
    )
    model = decoding.TokenGpt2(config, decoding.VOCABULARY, decoding.WORD).eval()
    with torch.no_grad():  # so that images differ and captions end
        model.gpt2.wte.weight.mul_(20)
    images = torch.arange(decoding.IMAGE, decoding.IMAGE + 4)
    found = decoding.compare(model, decoding.library_model(model), images, beam, fixed)
    assert found["equal_captions"] == "4 of 4" and found["ratio"] > 0
    if fixed:
        assert found["words"]["mean"] >= decoding.LONGEST - 1


def test_made_up_captions_are_like_flickr8k_s(decoding: ModuleType) -> None:
    rows = decoding.made_up_captions(random.Random(0))
    assert len(rows) == 5 * decoding.IMAGES and all(row[-1] == decoding.END for row in rows)
    assert len({row[0] for row in rows}) == decoding.IMAGES
    assert max(map(len, rows)) <= decoding.LONGEST and 8 < sum(map(len, rows)) / len(rows) - 2 < 11


def test_every_part_of_the_benchmark_is_named_and_documented() -> None:
    run = load_benchmark("run")
    assert set(run.PARTS) == {"extraction", "training", "decoding", "library", "metrics", "service"}
    assert all(part.__doc__ for part in run.PARTS.values())


def test_scoring_is_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run = load_benchmark("run")
    monkeypatch.setattr(
        run, "flickr8k_or_shapes", lambda: tiny_manifest(tmp_path / "images", test=6, ragged=False)
    )
    found = run.bench_metrics()
    assert (found["images"], found["references"]) == (6, 18) and found["seconds"] >= 0
