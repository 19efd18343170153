"""Files are read or refused; a wrong protocol is refused or named."""

import json
from pathlib import Path
from typing import Any

import pytest
from caption_helpers import proper

from capgen_utils.common.files import CapGenError
from capgen_utils.evaluation.metrics import labels, load_captions, load_references


def test_a_proper_evaluation_needs_no_label() -> None:
    said, written = proper()
    assert labels(said, written, split_images=list(said), training_images=["other.jpg"]) == {}
    assert labels(said, written) == {}


def test_each_wrong_protocol_has_its_label() -> None:
    said, written = proper()
    split = [*said, "missing.jpg"]

    def found(
        said: dict[str, str] = said, written: dict[str, list[str]] = written, **more: Any
    ) -> dict[str, str]:
        return labels(said, written, **more)

    assert "24 of the split's 25" in found(split_images=split)["subset"]
    assert "1 of 24" in found(training_images={"0.jpg", "other.jpg"})["training images"]
    assert list(found(written={name: captions[:1] for name, captions in written.items()})) == [
        "few references"
    ]
    assert "4 to 5" in found(written=written | {"0.jpg": written["0.jpg"][:4]})["few references"]
    assert (
        "1 references"
        in found(written=written | {"0.jpg": [*written["0.jpg"][:4], "a <UNK> dog"]})[
            "<unk> in references"
        ]
    )
    for token in ("<unk>", "<end>", "endseq", "<|endoftext|>"):
        assert list(found(said=said | {"0.jpg": f"a dog {token}"})) == ["special tokens"]
    assert "1 of 24" in found(said=said | {"0.jpg": " . "})["empty captions"]
    same = said | {name: "A dog ." for name in list(said)[:3]} | {"5.jpg": "a dog"}
    assert "4 of 24 images: 'a dog'" in found(said=same)["repeated caption"]


def test_a_few_equal_captions_are_no_matter() -> None:
    said, written = proper()
    assert labels(said | dict.fromkeys(["0.jpg", "1.jpg"], "a dog"), written) == {}


def test_other_images_and_none_at_all_are_refused() -> None:
    said, written = proper()
    for wrong in ({}, said | {"other.jpg": "a dog"}, dict(list(said.items())[1:])):
        with pytest.raises(CapGenError, match="same images"):
            labels(wrong, written)


# --- files


def written(folder: Path, value: Any) -> Path:
    path = folder / "file.json"
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "value",
    [
        [{"image_id": 1, "caption": "a dog"}, {"image_id": "2", "caption": "a cat", "score": 1}],
        {"1": "a dog", "2": "a cat"},
        {"1": ["a dog"], "2": ["a cat"]},
    ],
)
def test_captions_are_read_from_cocos_format_and_from_mappings(tmp_path: Path, value: Any) -> None:
    assert load_captions(written(tmp_path, value)) == {"1": "a dog", "2": "a cat"}


@pytest.mark.parametrize(
    "value",
    [
        {
            "images": [],
            "annotations": [
                {"image_id": 1, "id": 7, "caption": "a"},
                {"image_id": 2, "id": 8, "caption": "b"},
                {"image_id": 1, "id": 9, "caption": "c"},
            ],
        },
        [
            {"image_id": "1", "caption": "a"},
            {"image_id": 2, "caption": "b"},
            {"image_id": 1, "caption": "c"},
        ],
        {"1": ["a", "c"], "2": ["b"]},
    ],
)
def test_references_are_read_from_cocos_format_and_from_mappings(
    tmp_path: Path, value: Any
) -> None:
    assert load_references(written(tmp_path, value)) == {"1": ["a", "c"], "2": ["b"]}


@pytest.mark.parametrize(
    "value",
    [
        '{"1": "a dog", "1": "a cat"}',
        [{"image_id": 1, "caption": "a"}, {"image_id": "1", "caption": "b"}],
        [{"image_id": 1}],
        [{"caption": "a"}],
        [{"image_id": True, "caption": "a"}],
        [{"image_id": 1.5, "caption": "a"}],
        [["1", "a"]],
        {"1": 5},
        {"1": ["a", "b"]},
        {"1": []},
        {"1": None},
        "5",
        "null",
        "not json",
        "[" * 100_000,
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_captions_are_refused(tmp_path: Path, value: Any) -> None:
    with pytest.raises(CapGenError):
        load_captions(written(tmp_path, value))


@pytest.mark.parametrize(
    "value",
    [
        '{"1": ["a"], "1": ["b"]}',
        {"1": "a"},
        {"1": []},
        {"1": [5]},
        [{"image_id": 1, "caption": None}],
        {"annotations": 5},
        {"annotations": [5]},
        "7",
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_references_are_refused(tmp_path: Path, value: Any) -> None:
    with pytest.raises(CapGenError):
        load_references(written(tmp_path, value))


@pytest.mark.parametrize("load", [load_captions, load_references])
def test_files_that_cannot_be_read_are_refused(tmp_path: Path, load: Any) -> None:
    for path in (tmp_path / "missing.json", tmp_path):
        with pytest.raises(CapGenError, match="cannot read"):
            load(path)
    path = tmp_path / "latin.json"
    path.write_bytes(b'{"1": "caf\xe9"}')
    with pytest.raises(CapGenError, match="not valid JSON"):
        load(path)
