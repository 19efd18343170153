"""Agreement of metrics with people, on a made file of the same format as Flickr8k's expert
annotations."""

from pathlib import Path

import numpy as np
import pytest
from scipy.stats import kendalltau

from capgen_utils.common.files import CapGenError
from capgen_utils.evaluation.metrics import (
    agreement,
    agreement_table,
    judged_pairs,
    read_judgements,
)

CAPTIONS = {
    "1.jpg#0": "a dog runs on the grass",
    "1.jpg#1": "the dog is running",
    "2.jpg#0": "a man rides a red bike",
    "2.jpg#1": "a cyclist on a bike",
    "3.jpg#0": "a dog and a man on the grass",
    "3.jpg#1": "someone walks a dog",
}
REFERENCES = {f"{i}.jpg": [CAPTIONS[f"{i}.jpg#0"], CAPTIONS[f"{i}.jpg#1"]] for i in (1, 2, 3)}
ROWS = [
    ("1.jpg", "2.jpg#0", (1, 1, 1)),
    ("1.jpg", "3.jpg#0", (3, 3, 2)),
    ("1.jpg", "1.jpg#0", (4, 4, 4)),  # its own
    ("2.jpg", "1.jpg#0", (1, 1, 2)),
    ("2.jpg", "3.jpg#0", (2, 1, 1)),
    ("3.jpg", "1.jpg#0", (3, 4, 3)),
    ("3.jpg", "1.jpg#1", (3, 3, 3)),
    ("3.jpg", "2.jpg#1", (1, 2, 1)),
]


def file(folder: Path, lines: list[str]) -> Path:
    path = folder / "ExpertAnnotations.txt"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def made(tmp_path: Path) -> Path:
    return file(
        tmp_path,
        ["\t".join([image, candidate, *map(str, ratings)]) for image, candidate, ratings in ROWS],
    )


def test_the_file_is_read_line_by_line(made: Path) -> None:
    judgements = read_judgements(made)
    assert [(j.image, j.candidate, j.ratings) for j in judgements] == ROWS
    assert [j.is_own for j in judgements].count(True) == 1 and judgements[2].is_own


def test_pairs_with_an_image_s_own_caption_are_left_out(made: Path) -> None:
    kept, hypotheses, references = judged_pairs(read_judgements(made), CAPTIONS, REFERENCES)
    assert len(kept) == len(hypotheses) == len(references) == 7
    assert (
        hypotheses[kept[0].pair] == CAPTIONS["2.jpg#0"]
        and references[kept[0].pair] == REFERENCES["1.jpg"]
    )
    assert not any(j.image == j.candidate.split("#")[0] for j in kept)


def test_every_metric_has_a_tau_and_an_oracle_has_the_highest(made: Path) -> None:
    judgements = read_judgements(made)
    kept = [j for j in judgements if not j.is_own]
    oracle = {j.pair: sum(j.ratings) / 3 for j in kept}
    taus = agreement(
        judgements,
        CAPTIONS,
        REFERENCES,
        {"oracle": oracle, "contrary": {k: -v for k, v in oracle.items()}},
    )
    assert set(taus) == {
        "BLEU-1",
        "BLEU-2",
        "BLEU-3",
        "BLEU-4",
        "ROUGE-L",
        "CIDEr-D",
        "CIDEr",
        "oracle",
        "contrary",
    }
    assert max(taus, key=lambda name: taus[name]) == "oracle" and taus["contrary"] == pytest.approx(
        -taus["oracle"]
    )
    assert taus["ROUGE-L"] > 0
    ratings = np.array([rating for j in kept for rating in j.ratings])
    expected = kendalltau(
        [oracle[j.pair] for j in kept for _ in j.ratings], ratings, variant="c"
    ).statistic
    assert taus["oracle"] == pytest.approx(100 * expected)


def test_tau_c_by_hand(tmp_path: Path) -> None:
    """Four ratings 1, 1, 2, 2 and scores in their order: 4 concordant pairs of 4 captions, 2
    classes: tau-c is 1."""
    path = file(
        tmp_path,
        [
            f"1.jpg\t{c}\t{r}"
            for c, r in (("2.jpg#0", 1), ("2.jpg#1", 1), ("3.jpg#0", 2), ("3.jpg#1", 2))
        ],
    )
    judgements = read_judgements(path)
    scores = {j.pair: float(sum(j.ratings)) for j in judgements}
    assert agreement(judgements, CAPTIONS, REFERENCES, {"m": scores})["m"] == pytest.approx(100)


def test_the_table_shows_the_best_first() -> None:
    lines = agreement_table({"BLEU-4": 30.04, "CIDEr-D": 43.91}).splitlines()
    assert lines[2:] == ["| CIDEr-D | 43.9 |", "| BLEU-4 | 30.0 |"]
    assert "tau-c" in lines[0]


@pytest.mark.parametrize(
    "line",
    [
        "1.jpg 2.jpg#0 1 1 1",
        "1.jpg\t2.jpg#0",
        "1.jpg\t2.jpg#0\t1\t5\t1",
        "1.jpg\t2.jpg#0\t1\tx\t1",
        "1.jpg\t2.jpg\t1\t1\t1",
        "\t2.jpg#0\t1\t1\t1",
        "1.jpg\t2.jpg#0\t1\t0\t1",
        "x",
    ],
)
def test_a_line_of_another_form_is_refused_with_its_number(tmp_path: Path, line: str) -> None:
    with pytest.raises(CapGenError, match="line 2"):
        read_judgements(file(tmp_path, ["1.jpg\t2.jpg#0\t1\t1\t1", line]))


def test_files_and_pairs_that_cannot_be_used_are_refused(tmp_path: Path, made: Path) -> None:
    with pytest.raises(CapGenError, match="no judgement"):
        read_judgements(file(tmp_path, [""]))
    with pytest.raises(CapGenError, match="cannot read"):
        read_judgements(tmp_path / "missing.txt")
    judgements = read_judgements(
        file(tmp_path, ["1.jpg\t2.jpg#0\t1\t1\t1", "1.jpg\t9.jpg#0\t1\t1\t1"])
    )
    with pytest.raises(CapGenError, match="unknown"):
        judged_pairs(judgements, CAPTIONS, REFERENCES)
    with pytest.raises(CapGenError, match="once"):
        judged_pairs(judgements[:1] * 2, CAPTIONS, REFERENCES)
    with pytest.raises(CapGenError):
        judged_pairs([], CAPTIONS, REFERENCES)
    with pytest.raises(CapGenError, match="METEOR"):
        agreement(judgements[:1], CAPTIONS, REFERENCES, {"METEOR": {}})
