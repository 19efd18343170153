"""Corpus BLEU, against nltk and by hand, and what it hides."""

import math
import warnings

import pytest
from nltk.translate.bleu_score import corpus_bleu

from capgen_utils.files import CapGenError
from capgen_utils.metrics import bleu, diversity
from capgen_utils.text import tokenise

REFERENCES = {
    "1": ["A black dog runs across the green grass .", "The dog is running on grass ."],
    "2": ["Two children play with a red ball .", "Kids are playing with a ball in the park ."],
    "3": ["A man rides a bike down a steep hill .", "Someone is riding a bicycle ."],
}
SPOKEN = {
    "1": "a dog runs across the grass",
    "2": "two kids play with a red ball",
    "3": "a man rides a bike on the street",
}


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_bleu_is_nltks_on_the_same_words(n: int) -> None:
    names = sorted(SPOKEN)
    expected = corpus_bleu(
        [[tokenise(r) for r in REFERENCES[k]] for k in names], [tokenise(SPOKEN[k]) for k in names], weights=[1 / n] * n
    )
    assert bleu(SPOKEN, REFERENCES)[f"BLEU-{n}"] == pytest.approx(100 * expected)


def test_bleu_by_hand() -> None:
    """Spoken: the the the cat. Reference: the cat is on the mat. Clipped unigrams 3/4, bigrams 1/3, shorter by 2."""
    scores = bleu({"1": "the the the cat"}, {"1": ["The cat is on the mat ."]})
    brevity = math.exp(1 - 6 / 4)
    assert scores["BLEU-1"] == pytest.approx(100 * brevity * 3 / 4)
    assert scores["BLEU-2"] == pytest.approx(100 * brevity * math.sqrt(3 / 4 * 1 / 3))


def test_it_is_of_the_corpus_not_a_mean_of_sentences() -> None:
    two = bleu({"1": "a b c d e f", "2": "p q r s"}, {"1": ["a b c d e f"], "2": ["t u v w"]})
    assert two["BLEU-1"] == pytest.approx(60)
    assert two["BLEU-4"] == pytest.approx(100 * (6 / 10 * 5 / 8 * 4 / 6 * 3 / 4) ** 0.25)


def test_perfect_captions_score_100_however_they_are_punctuated() -> None:
    perfect = {name: captions[0] for name, captions in REFERENCES.items()}
    assert all(v == pytest.approx(100) for v in bleu(perfect, REFERENCES).values())
    loud = {name: caption.upper().replace(" .", "!") for name, caption in perfect.items()}
    assert all(v == pytest.approx(100) for v in bleu(loud, REFERENCES).values())


@pytest.mark.parametrize("spoken", [{}, {"1": "a"}, SPOKEN | {"4": "a"}, {**SPOKEN, "2b": SPOKEN["2"]}])
def test_other_images_are_refused(spoken: dict[str, str]) -> None:
    with pytest.raises(CapGenError):
        bleu(spoken, REFERENCES)


def test_without_a_common_4_gram_the_score_is_0_and_nothing_warns() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores = bleu({"1": "a dog on a hill"}, {"1": ["a cat on the hill"]})
        assert scores["BLEU-1"] > 0 and round(scores["BLEU-4"], 6) == 0
        assert round(bleu({"1": "zebra"}, {"1": ["a cat"]})["BLEU-1"], 6) == 0
        assert bleu(dict.fromkeys(SPOKEN, ""), REFERENCES) == {f"BLEU-{n}": 0.0 for n in (1, 2, 3, 4)}
        some = bleu(SPOKEN | {"3": " . "}, REFERENCES)
        assert 0 < some["BLEU-4"] < bleu(SPOKEN, REFERENCES)["BLEU-4"]


def test_diversity_by_hand() -> None:
    counted = diversity({"1": "A dog .", "2": "a dog", "3": "a <unk> cat"})
    assert counted == {"distinct": 2, "words_used": 4, "mean_length": pytest.approx(7 / 3), "unk": 1}
    assert diversity({})["mean_length"] == 0
