"""The feature cache: whole or not there, resumed after a kill, refused when stale or damaged."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    CPU,
    run_and_kill,
    run_script,
    tiny_encoder,
    tiny_manifest,
    tiny_model,
    tiny_tokenizer,
)
from PIL import Image

from capgen_utils.common.files import CapGenError
from capgen_utils.config import DecodingConfig
from capgen_utils.data.manifest import Manifest
from capgen_utils.decoding.captions import Specials
from capgen_utils.decoding.run import decode_features
from capgen_utils.vision import features
from capgen_utils.vision.features import (
    FeatureCache,
    cache_key,
    encode_images,
    extract,
    find_cache,
    open_cache,
)


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    return tiny_manifest(tmp_path / "images")


def extracted(manifest: Manifest, folder: Path, **options: Any) -> FeatureCache:
    values = {"folder": folder / "features", "dtype": torch.float32, "device": CPU, "batch_size": 5}
    encoder = options.pop("encoder", None) or tiny_encoder()
    return extract(manifest, encoder, **(values | options))


def files_of(folder: Path) -> list[str]:
    return sorted(p.name for p in (folder / "features").iterdir())


def test_rows_come_in_order_memory_mapped_in_float16(manifest: Manifest, tmp_path: Path) -> None:
    cache = extracted(manifest, tmp_path)
    assert isinstance(cache.array, np.memmap) and cache.array.dtype == np.float16
    assert not cache.array.flags.writeable
    assert cache.array.shape == (16, 9, 12)
    assert cache.names == tuple(i.image for i in manifest.items)
    paths = [manifest.path(i) for i in manifest.items]
    fresh = encode_images(tiny_encoder(), paths, torch.float32)["grid"]
    torch.testing.assert_close(torch.from_numpy(np.array(cache.array)), fresh, atol=2e-3, rtol=2e-3)
    names = [cache.names[i] for i in (7, 0, 7, 15)]
    assert torch.equal(cache.rows(names), torch.from_numpy(np.array(cache.array[[7, 0, 7, 15]])))
    assert len({cache.array[i].tobytes() for i in range(16)}) == 16
    rows = cache.rows(names[:1])
    rows += 1  # what is handed out is a copy
    assert not torch.equal(rows, cache.rows(names[:1]))


def test_a_second_call_reads_and_does_not_compute(
    manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = extracted(manifest, tmp_path)
    monkeypatch.setattr(features, "encode_pixels", lambda *a: pytest.fail("computed again"))
    again = extracted(manifest, tmp_path)
    assert again.path == first.path and np.array_equal(again.array, first.array)
    assert files_of(tmp_path) == sorted([first.path.name, first.path.with_suffix(".json").name])


def test_each_output_is_its_own_cache(manifest: Manifest, tmp_path: Path) -> None:
    grid, pooled = (extracted(manifest, tmp_path, output=name) for name in ("grid", "pooled"))
    np.testing.assert_allclose(
        grid.array.astype(np.float32).mean(1), pooled.array, atol=1e-2, rtol=1e-2
    )
    with pytest.raises(CapGenError, match="grid, pooled"):
        extracted(manifest, tmp_path, output="words")


def test_the_mirrored_view_mirrors_the_pixels(manifest: Manifest, tmp_path: Path) -> None:
    plain, flipped = extracted(manifest, tmp_path), extracted(manifest, tmp_path, flip=True)
    assert plain.path != flipped.path
    mirrored = [
        Image.open(manifest.path(i)).transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        for i in manifest.items
    ]
    expected = encode_images(tiny_encoder(), mirrored, torch.float32)["grid"]
    torch.testing.assert_close(
        torch.from_numpy(np.array(flipped.array)), expected, atol=2e-3, rtol=2e-3
    )
    assert not np.allclose(plain.array, flipped.array, atol=1e-2)


@pytest.mark.parametrize("batch_size", [1, 3, 16, 100])
def test_the_batch_size_changes_nothing(
    manifest: Manifest, tmp_path: Path, batch_size: int
) -> None:
    first = extracted(manifest, tmp_path)
    other = extracted(manifest, tmp_path / "other", batch_size=batch_size)
    np.testing.assert_allclose(first.array, other.array, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("batch_size", [1, 4, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cached_and_fresh_photographs_get_the_same_captions(
    manifest: Manifest, tmp_path: Path, batch_size: int, dtype: torch.dtype
) -> None:
    cache = extracted(manifest, tmp_path, batch_size=16, dtype=dtype)
    model, tokenizer = tiny_model(), tiny_tokenizer()
    specials = Specials(tokenizer.start_id, tokenizer.end_id, tokenizer.banned_ids)
    paths = [manifest.path(i) for i in manifest.items]
    fresh = torch.cat(
        [
            encode_images(tiny_encoder(), paths[start : start + batch_size], dtype)["grid"]
            for start in range(0, len(paths), batch_size)
        ]
    )
    config = DecodingConfig(beam=2, max_length=10)
    said = [
        [h[0].tokens for h in decode_features(model, rows, specials, config)]
        for rows in (cache.rows(cache.names), fresh)
    ]
    assert said[0] == said[1]
    assert len(set(said[0])) > 1


# --- interrupted


@pytest.mark.parametrize("count", [1, 4, 11])
def test_a_killed_extraction_goes_on_and_ends_byte_equal(tmp_path: Path, count: int) -> None:
    whole = Path(run_script("extraction", tmp_path / "whole"))
    folder = tmp_path / "killed"
    run_and_kill("extraction", folder, count=count, delay=0.05)
    assert [
        p.suffix for p in (folder / "features").iterdir() if p.suffix in (".npy", ".json")
    ] == []
    resumed = Path(run_script("extraction", folder))
    assert resumed.name == whole.name and resumed.read_bytes() == whole.read_bytes()
    meta, expected = (json.loads(p.with_suffix(".json").read_text()) for p in (resumed, whole))
    assert (
        list(meta.pop("failed")) == list(expected.pop("failed")) == ["003.png"]
    )  # the reasons name the folder
    assert meta == expected
    assert sorted(p.suffix for p in (folder / "features").iterdir()) == [".json", ".npy"]


def interrupted(
    manifest: Manifest, folder: Path, monkeypatch: pytest.MonkeyPatch, batches: int = 2
) -> Path:
    """Stop an extraction after some batches; returns the unfinished file."""
    run, calls = features.encode_pixels, [0]

    def stop(*arguments: Any) -> Any:
        calls[0] += 1
        if calls[0] > batches:
            raise KeyboardInterrupt
        return run(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(features, "encode_pixels", stop)
        extracted(manifest, folder)
    (partial,) = (folder / "features").glob("*.partial")
    return partial


@pytest.mark.parametrize("extra", [0, 1, 107, 215, 216, 217])
def test_a_torn_row_is_written_again(
    manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, extra: int
) -> None:
    expected = extracted(manifest, tmp_path / "whole").path.read_bytes()
    partial = interrupted(manifest, tmp_path, monkeypatch)
    header = 128
    assert partial.stat().st_size == header + 10 * 216, "two batches of five rows"
    os.truncate(partial, header + 3 * 216 + extra)
    assert extracted(manifest, tmp_path).path.read_bytes() == expected


@pytest.mark.parametrize("size", [0, 1, 100, 127, 128])
def test_a_torn_header_is_written_again(
    manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    expected = extracted(manifest, tmp_path / "whole").path.read_bytes()
    os.truncate(interrupted(manifest, tmp_path, monkeypatch), size)
    assert extracted(manifest, tmp_path).path.read_bytes() == expected


def test_failures_before_and_after_an_interruption_are_kept(
    manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("001.png", "007.png", "012.png"):
        (tmp_path / "images" / name).write_bytes(b"damaged")
    partial = interrupted(manifest, tmp_path, monkeypatch)
    kept = json.loads(partial.with_suffix(".failed").read_text())
    assert len(kept) == 2  # the third is of the batch that was not written any more
    assert sorted(extracted(manifest, tmp_path).failed) == ["001.png", "007.png", "012.png"]


def test_a_write_error_leaves_nothing_that_looks_complete(
    manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full:
        """A file on a disk that is full after 500 bytes."""

        def __init__(self, stream: Any) -> None:
            self.stream = stream

        def __enter__(self) -> "Full":
            return self

        def __exit__(self, *error: object) -> None:
            self.stream.close()

        def __getattr__(self, name: str) -> Any:
            return getattr(self.stream, name)

        def write(self, content: bytes) -> int:
            if self.stream.tell() + len(content) > 1500:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return self.stream.write(content)

    with monkeypatch.context() as patch:
        patch.setattr(features, "open", lambda *a, **k: Full(open(*a, **k)), raising=False)  # noqa: SIM115
        with pytest.raises(CapGenError, match="No space left") as error:
            extracted(manifest, tmp_path)
    assert "disk space" in error.value.remedy
    assert not [p for p in (tmp_path / "features").iterdir() if p.suffix in (".npy", ".json")]
    expected = extracted(manifest, tmp_path / "whole").path.read_bytes()
    assert extracted(manifest, tmp_path).path.read_bytes() == expected


def test_too_small_a_disk_is_said_before_work_begins(
    manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(features, "encode_pixels", lambda *a: pytest.fail("began to work"))
    with pytest.raises(CapGenError, match="needs .* GB") as error:
        extracted(manifest, tmp_path)
    assert "CAPGEN_DATA" in error.value.remedy


# --- stale and damaged


def stale_image(manifest: Manifest, options: dict[str, Any]) -> None:
    with open(manifest.path(manifest.items[3]), "ab") as stream:
        stream.write(b"one more byte")


def stale_weights(manifest: Manifest, options: dict[str, Any]) -> None:
    options["encoder"] = tiny_encoder(seed=1)


def stale_preprocessing(manifest: Manifest, options: dict[str, Any]) -> None:
    options["encoder"] = tiny_encoder()
    options["encoder"].preprocessing = replace(options["encoder"].preprocessing, resize="crop")


def stale_view(manifest: Manifest, options: dict[str, Any]) -> None:
    options["flip"] = True


def stale_dtype(manifest: Manifest, options: dict[str, Any]) -> None:
    options["dtype"] = torch.bfloat16


STALE = {
    "files": stale_image,
    "weights": stale_weights,
    "preprocessing": stale_preprocessing,
    "view": stale_view,
    "dtype": stale_dtype,
}


@pytest.mark.parametrize("what", STALE)
def test_what_changes_the_features_makes_a_cache_unfit(
    manifest: Manifest, tmp_path: Path, what: str
) -> None:
    first = extracted(manifest, tmp_path)
    options: dict[str, Any] = {}
    STALE[what](manifest, options)
    encoder = options.get("encoder") or tiny_encoder()
    key = cache_key(
        manifest, encoder, "grid", options.get("flip", False), options.get("dtype", torch.float32)
    )
    with pytest.raises(CapGenError, match=f"stale: {what} changed"):
        open_cache(first.path, key)
    assert extracted(manifest, tmp_path, **options).path != first.path, (
        "it is extracted anew, beside the old one"
    )


def test_other_images_are_another_cache(manifest: Manifest, tmp_path: Path) -> None:
    paths = {
        extracted(m, tmp_path).path
        for m in (manifest, manifest.split("train"), manifest.split("dev"))
    }
    assert len(paths) == 3


@pytest.mark.parametrize("size", [0, 100, 128, 1000, -1, +5])
def test_a_truncated_cache_is_refused(manifest: Manifest, tmp_path: Path, size: int) -> None:
    path = extracted(manifest, tmp_path).path
    whole = path.stat().st_size
    os.truncate(path, size if size not in (-1, 5) else whole + size)
    with pytest.raises(CapGenError, match="truncated") as error:
        extracted(manifest, tmp_path)
    assert "delete" in error.value.remedy
    path.unlink()
    with pytest.raises(CapGenError, match="truncated"):
        extracted(manifest, tmp_path)


@pytest.mark.parametrize("place", [5, 200, 3000])
def test_a_damaged_byte_is_found_on_request(manifest: Manifest, tmp_path: Path, place: int) -> None:
    path = extracted(manifest, tmp_path).path
    assert open_cache(path, verify=True).path == path
    content = bytearray(path.read_bytes())
    content[place] ^= 0x40
    path.write_bytes(content)
    with pytest.raises(CapGenError, match="damaged"):
        open_cache(path, verify=True)


def other_shape(meta: dict) -> None:
    meta["shape"] = [16, 12, 9]


def other_type(meta: dict) -> None:
    meta["shape"] = "16"


def fewer_names(meta: dict) -> None:
    meta["names"].pop()


def no_crc(meta: dict) -> None:
    del meta["crc32"]


@pytest.mark.parametrize("damage", [other_shape, fewer_names, no_crc])
def test_a_description_that_does_not_fit_is_refused(
    manifest: Manifest, tmp_path: Path, damage: Callable[[dict], None]
) -> None:
    path = extracted(manifest, tmp_path).path
    meta = json.loads(path.with_suffix(".json").read_text())
    damage(meta)
    path.with_suffix(".json").write_text(json.dumps(meta))
    with pytest.raises(CapGenError):
        extracted(manifest, tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"x"', "{}"])
def test_a_description_that_is_none_is_refused(
    manifest: Manifest, tmp_path: Path, text: str
) -> None:
    path = extracted(manifest, tmp_path).path
    path.with_suffix(".json").write_text(text)
    with pytest.raises(CapGenError, match="json"):
        extracted(manifest, tmp_path)


def test_find_cache_finds_what_extract_wrote(
    manifest: Manifest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CAPGEN_DATA", str(tmp_path / "data"))
    encoder = tiny_encoder()
    assert find_cache(manifest, encoder, "grid", torch.float32) is None
    cache = extract(manifest, encoder, dtype=torch.float32, device=CPU)
    assert cache.path.is_relative_to(tmp_path / "data" / "features")
    found = find_cache(manifest, encoder, "grid", torch.float32)
    assert found is not None and found.path == cache.path


# --- unreadable images


def test_unreadable_images_are_counted_named_and_have_no_features(
    manifest: Manifest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "images" / "002.png").write_bytes(b"")
    (tmp_path / "images" / "013.png").unlink()
    cache = extracted(manifest, tmp_path)
    assert sorted(cache.failed) == ["002.png", "013.png"]
    assert "002.png" in cache.failed["002.png"]
    assert "2 of 16" in capsys.readouterr().out
    good = [n for n in cache.names if n not in cache.failed]
    assert torch.isfinite(cache.rows(good)).all()
    with pytest.raises(CapGenError, match=r"002\.png"):
        cache.rows(["001.png", "002.png"])
    with pytest.raises(CapGenError, match="unknown"):
        cache.rows(["unknown"])
    assert sorted(extracted(manifest, tmp_path).failed) == ["002.png", "013.png"], (
        "also when read again"
    )


def test_not_one_readable_image_is_an_error(manifest: Manifest, tmp_path: Path) -> None:
    for item in manifest.items:
        manifest.path(item).write_bytes(b"damaged")
    with pytest.raises(CapGenError, match="no image of"):
        extracted(manifest, tmp_path)
    assert not [
        p for p in (tmp_path / "features").iterdir() if p.suffix in (".npy", ".json", ".partial")
    ]
