"""METEOR: nltk's with any WordNet, and the reference's 1.5."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import need
from nltk.translate.meteor_score import meteor_score

from capgen_utils.common.files import CapGenError
from capgen_utils.evaluation.metrics import (
    Statistics,
    Summed,
    find_wordnet,
    has_meteor_java,
    meteor,
    meteor_java,
    meteor_nltk,
)
from capgen_utils.text.ptb import tokenise

REFERENCES = {
    "1": ["A black dog runs across the green grass .", "The dog is running on a lawn ."],
    "2": ["Two children play with a red ball .", "Kids are playing with a ball in the park ."],
}
SPOKEN = {"1": "a hound running over grass", "2": "two kids played with some red ball"}
METEOR_15 = {"1": 20.1575, "2": 42.1595, "corpus": 36.6200}  # what the program printed, times 100


class Lemma:
    def __init__(self, name: str) -> None:
        self._name = name

    def name(self) -> str:
        return self._name


class Synset:
    def __init__(self, *names: str) -> None:
        self._names = names

    def lemmas(self) -> list[Lemma]:
        return [Lemma(name) for name in self._names]


class Thesaurus:
    """A WordNet of a few words."""

    words = (
        ("dog", "hound", "domestic_dog"),
        ("child", "kid"),
        ("children", "kids"),
        ("lawn", "grass"),
    )

    def synsets(self, word: str) -> list[Synset]:
        return [Synset(*names) for names in self.words if word in names]

    def get_version(self) -> str:
        return "0.1"


def test_it_is_nltks_the_best_reference_of_each_image() -> None:
    found = meteor_nltk(SPOKEN, REFERENCES, Thesaurus())
    for image, caption in SPOKEN.items():
        theirs = meteor_score(
            [tokenise(r) for r in REFERENCES[image]], tokenise(caption), wordnet=Thesaurus()
        )
        assert found.images[image] == pytest.approx(100 * theirs) and found.images[image] > 20
    assert found.corpus == pytest.approx(sum(found.images.values()) / 2)


def test_synonyms_and_stems_count() -> None:
    same, synonym, stem, other = (
        meteor_nltk({"1": caption}, {"1": ["the dog runs"]}, Thesaurus()).corpus
        for caption in ("the dog runs", "the hound runs", "the dog running", "the cat runs")
    )
    assert same == synonym == stem > other > 0


def test_an_empty_caption_scores_0() -> None:
    assert meteor_nltk({"1": " . "}, {"1": ["the dog runs"]}, Thesaurus()).corpus == 0


def test_the_label_says_which_meteor_and_which_wordnet() -> None:
    label = meteor_nltk(SPOKEN, REFERENCES, Thesaurus()).label
    assert "nltk" in label and "WordNet 0.1" in label and "not METEOR 1.5" in label
    assert "1.5" in meteor.JAVA_PROTOCOL


def no_wordnet(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    class Missing:
        def ensure_loaded(self) -> None:
            raise LookupError

    monkeypatch.delenv("WNSEARCHDIR", raising=False)
    monkeypatch.setattr(meteor, "wordnet", Missing())
    monkeypatch.setattr(meteor, "SYSTEM_WORDNET", folder)


def test_without_wordnet_the_remedy_names_the_ways_to_get_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    no_wordnet(monkeypatch, tmp_path)
    assert find_wordnet() is None
    with pytest.raises(CapGenError, match="WordNet.*\n.*nltk.downloader wordnet.*wordnet-base"):
        meteor_nltk(SPOKEN, REFERENCES)


def write_wordnet(folder: Path) -> None:
    """Write the smallest WordNet: the noun "dog" with its synonym "hound", as Debian lays the files
    out."""
    folder.mkdir()
    header = "  1 made for a test\n"
    data = f"{len(header):08d} 05 n 03 dog 0 domestic_dog 0 hound 0 000 | a dog\n"
    index = "".join(
        f"{word} n 1 0 1 0 {len(header):08d}  \n" for word in ("dog", "domestic_dog", "hound")
    )
    for part in ("noun", "verb", "adj", "adv"):
        (folder / f"data.{part}").write_text(header + (data if part == "noun" else ""))
        (folder / f"index.{part}").write_text(header + (index if part == "noun" else ""))
        (folder / f"{part}.exc").write_text("")


@pytest.mark.parametrize("named", [True, False])
def test_wordnet_of_the_system_is_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, named: bool
) -> None:
    folder = tmp_path / "wordnet"
    write_wordnet(folder)
    no_wordnet(monkeypatch, tmp_path / "nothing" if named else folder)
    if named:
        monkeypatch.setenv("WNSEARCHDIR", str(folder))
    reader: Any = find_wordnet()
    assert [lemma.name() for lemma in reader.synsets("dogs")[0].lemmas()] == [
        "dog",
        "domestic_dog",
        "hound",
    ]
    monkeypatch.setattr(reader, "get_version", lambda: "made")
    assert meteor_nltk({"1": "a hound"}, {"1": ["a dog"]}, reader).corpus == pytest.approx(93.75)


def test_with_the_real_wordnet() -> None:
    need("WordNet", find_wordnet())
    found = meteor_nltk(SPOKEN, REFERENCES)
    assert "WordNet 3" in found.label
    assert found.images["1"] > meteor_nltk(SPOKEN, REFERENCES, Thesaurus()).images["1"] - 1e-9
    assert 40 < found.corpus < 90


def test_meteor_15_of_the_reference() -> None:
    need("Java and pycocoevalcap", has_meteor_java())
    found = meteor_java(
        SPOKEN | {"3": "a man rides"}, REFERENCES | {"3": ["a man rides", "nothing"]}
    )
    assert found.images["3"] == pytest.approx(100) and "1.5" in found.label
    assert found.images | {"corpus": found.corpus} == pytest.approx(
        METEOR_15 | {"3": 100}, abs=0.01
    )
    assert found.corpus != pytest.approx(sum(found.images.values()) / 3, abs=1), (
        "it adds up matches, not scores"
    )


def test_meteor_15_of_sums_is_what_the_program_computes() -> None:
    need("Java and pycocoevalcap", has_meteor_java())
    from pycocoevalcap.meteor.meteor import Meteor as Program

    said = SPOKEN | {
        "3": "a man rides",
        "4": "unheard of",
        "5": "the dog is running on a lawn",
        "6": "a",
    }
    written = REFERENCES | {
        "3": ["a man rides", "nothing"],
        "4": ["a dog"],
        "5": REFERENCES["1"],
        "6": ["a dog"],
    }
    found = meteor_java(said, written)
    lists = {image: [" ".join(tokenise(caption))] for image, caption in said.items()}
    references = {
        image: [" ".join(tokenise(caption)) for caption in captions]
        for image, captions in written.items()
    }
    corpus, each = Program().compute_score(references, lists)
    assert found.corpus == pytest.approx(100 * corpus, abs=1e-6)
    assert list(found.images.values()) == pytest.approx([100 * value for value in each], abs=1e-6)


def test_a_sample_s_meteor_15_is_that_of_the_sampled_captions() -> None:
    rows = {  # of the program, for two captions; the second matches nothing
        "1": [11, 13, 5, 6, 3, 3, 4, 4, 0, 0, 0, 0, 1, 1, 0, 0, 0, 1, 1, 1, 3, 9, 10],
        "2": [2, 2, 1, 1, *[0] * 16, 0, 0, 0],
    }
    statistics = Statistics.of(
        SPOKEN, REFERENCES, {"METEOR 1.5": Summed(rows, meteor.meteor_of_sums)}
    )
    twice = statistics.of_samples(np.array([[2.0, 0.0], [0.0, 2.0], [1.0, 1.0]]))["METEOR 1.5"]
    assert twice[0] == pytest.approx(float(meteor.meteor_of_sums(np.array(rows["1"], dtype=float))))
    assert twice[1] == 0 < twice[2] < twice[0] < 100
    with pytest.raises(CapGenError, match="other images"):
        Statistics.of(
            SPOKEN, REFERENCES, {"METEOR 1.5": Summed({"1": rows["1"]}, meteor.meteor_of_sums)}
        )


def test_without_java_meteor_15_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meteor.shutil, "which", lambda name: None)
    with pytest.raises(CapGenError, match="Java.*\n.*pip install pycocoevalcap"):
        meteor_java(SPOKEN, REFERENCES)


@pytest.mark.parametrize("metric", [meteor_nltk, meteor_java])
def test_other_images_are_refused(metric: Any) -> None:
    with pytest.raises(CapGenError, match="same images"):
        metric({"1": "a dog"}, REFERENCES)
