"""Tables of results files: every system, floor and human row once, sorted, with its protocol."""

import copy
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT

from capgen_utils.common.files import CapGenError, write_json
from capgen_utils.evaluation.leaderboard import (
    by_split,
    cost_table,
    leaderboard,
    people_table,
    protocol_lines,
    read_results,
    scores_table,
)


def row(bleu: float, cider: float, **more: float) -> dict[str, Any]:
    """Return scores and intervals of a system, a floor or people."""
    values = {
        "BLEU-1": 60.0,
        "BLEU-4": bleu,
        "ROUGE-L": 45.0,
        "CIDEr-D": cider,
        "CIDEr": cider + 9,
        "distinct": 7,
    }
    ends = {name: [values[name] - 1, values[name] + 1] for name in ("BLEU-4", "CIDEr-D")}
    return {"scores": values | more, "intervals": ends}


def result(
    model: str, bleu: float, encoder: str = "resnet50", dataset: str = "photos", images: int = 9
) -> dict[str, Any]:
    """Return what a results file holds, as far as tables read it."""
    floors = {
        "constant caption": row(6.0, 5.0, distinct=1),
        "nearest neighbour": row(5.0, len(encoder)),
    }
    return row(bleu, 3 * bleu, copied=12.5) | {
        "kind": "evaluation",
        "model": model,
        "parameters": 7_400_000,
        "floors": floors,
        "people": {"references": 4, "human": row(21.0, 80.0), "system": row(bleu - 2, 3 * bleu)},
        "warnings": {} if images == 9 else {"subset": "only a part"},
        "captions_per_second": 100.0,
        "training_run": {"minutes": 12.34},
        "cost": {
            "decoding_ms": 31.4,
            "encoding_ms": 50.0,
            "captioner_megabytes": 29.6,
            "encoder_megabytes": 13.5,
        },
        "machine": {"cpu": "abacus", "cores": 2, "threads": 1, "accelerator": None, "load": 0.5},
        "protocol": {
            "dataset": dataset,
            "split": "test",
            "images": images,
            "images_in_split": 9,
            "references": 45,
            "encoder": encoder,
            "BLEU": "corpus level",
            "intervals": "95 %",
            "seed": 1,
            "revision": "abc",
            "decoding": {"beam": 5, "max_length": 25, "length_penalty": 0.5, "dtype": "float32"},
        },
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_json(tmp_path / "photos_lstm.json", result("lstm", 19.04))
    write_json(tmp_path / "photos_transformer.json", result("transformer", 22.12, "efficientnet"))
    write_json(tmp_path / "scenes_lstm.json", result("lstm", 70.0, dataset="scenes", images=3))
    write_json(tmp_path / "photos_lstm_predictions.json", [{"image_id": "1", "caption": "a dog"}])
    write_json(tmp_path / "benchmarks.json", {"kind": "benchmarks"})
    return tmp_path


def cells(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]


def test_only_evaluations_are_read(folder: Path, tmp_path: Path) -> None:
    assert list(read_results(folder)) == ["photos_lstm", "photos_transformer", "scenes_lstm"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(CapGenError, match="no results"):
        read_results(tmp_path / "empty")
    (folder / "broken.json").write_text("{")
    with pytest.raises(CapGenError, match=r"broken\.json"):
        read_results(folder)


def test_systems_and_floors_are_sorted_and_come_once(folder: Path) -> None:
    groups = by_split(read_results(folder))
    assert list(groups) == [("photos", "test"), ("scenes", "test")]
    head, _, *rows = cells(scores_table(groups["photos", "test"]))
    names = [line[0] for line in rows]
    assert names == ["`transformer`", "`lstm`", "*constant caption*", *["*nearest neighbour*"] * 2]
    assert {line[1] for line in rows[3:]} == {"resnet50", "efficientnet"}, (
        "each encoder has its own neighbours"
    )
    assert (
        rows[0][head.index("BLEU-4")] == "22.1 [21.1, 23.1]"
        and rows[0][head.index("copied")] == "12.5 %"
    )
    assert (
        rows[0][head.index("decoding")] == "beam 5, length penalty 0.5"
        and rows[0][head.index("images")] == "9"
    )
    assert "CIDEr" not in head and "CIDEr-D" in head and "true" not in head


def test_a_part_of_a_split_is_marked(folder: Path) -> None:
    found = by_split(read_results(folder))["scenes", "test"]
    head, _, first, *_ = cells(scores_table(found))
    assert first[head.index("images")] == "only 3"
    assert "- `lstm`: subset: only a part" in protocol_lines(found)


def test_drawn_scenes_are_sorted_by_truth() -> None:
    low, high = result("says nice things", 80.0), result("tells the truth", 60.0)
    low["scores"]["true"], high["scores"]["true"] = 0.5, 0.95
    head, _, first, *_ = cells(scores_table({"a": low, "b": high}))
    assert first[0] == "`tells the truth`" and first[head.index("true")] == "95.0 %"


def test_people_stand_among_systems_with_as_many_references(folder: Path) -> None:
    found = by_split(read_results(folder))["photos", "test"]
    head, _, *rows = cells(people_table(found))
    assert head[0] == "against 4 references"
    assert [line[0] for line in rows] == ["*one human*", "`transformer`", "`lstm`"]
    assert people_table({"a": result("lstm", 20.0) | {"people": None}}) == ""


def test_costs_say_where_they_were_measured(folder: Path) -> None:
    head, _, first, *_ = cells(cost_table(read_results(folder)))
    said = dict(zip(head, first, strict=True))
    assert (
        said["parameters"] == "7.4 M"
        and said["training"] == "12.3 min"
        and said["one caption"] == "31.4 ms"
    )
    assert (
        said["a caption in a batch"] == "10.0 ms"
        and said["weights: captioner + encoder"] == "30 + 14 MB"
    )
    assert said["measured on"] == "abacus, 1 of 2 cores, load 0.5"
    old = copy.deepcopy(result("lstm", 20.0))
    old |= {"cost": None, "training_run": None}
    assert cells(cost_table({"old": old}))[2][3:5] == ["-", "-"]


def test_the_whole_board_holds_every_part(folder: Path) -> None:
    text = leaderboard(folder)
    assert [line for line in text.splitlines() if line.startswith("#")] == [
        "# Leaderboard",
        "## photos, test split",
        "## scenes, test split",
        "## Cost",
    ]
    assert "Training seeds: 1; code: abc." in text


def test_the_board_in_the_repository_is_that_of_its_results() -> None:
    path = ROOT / "results" / "leaderboard.md"
    assert path.read_text(encoding="utf-8") == leaderboard(ROOT / "results"), (
        "run: capgen leaderboard"
    )
