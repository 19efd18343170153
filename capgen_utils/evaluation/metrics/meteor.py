"""METEOR in two kinds that must not be confused: nltk's, with WordNet, and version 1.5 by the
reference's Java program.

nltk follows Lavie and Agarwal 2007: equal words, equal stems, synonyms. METEOR 1.5 (Denkowski and
Lavie 2014), which papers report, also knows paraphrases and weighs function words less, so the two
differ by points.
"""

import importlib.util
import io
import os
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import nltk
import numpy as np
from nltk.corpus import wordnet
from nltk.corpus.reader.wordnet import WordNetCorpusReader
from nltk.stem.porter import PorterStemmer
from nltk.translate.meteor_score import single_meteor_score

from capgen_utils.common.files import CapGenError
from capgen_utils.evaluation.metrics.ngrams import check_images
from capgen_utils.evaluation.metrics.scores import Summed
from capgen_utils.text.ptb import tokenise

SYSTEM_WORDNET = Path("/usr/share/wordnet")  # of the packages wordnet-base and wordnet-sense-index
JAVA_PROTOCOL = "METEOR 1.5 by the COCO caption evaluation's jar, times 100"


@dataclass(frozen=True)
class Meteor:
    """One METEOR, labelled.

    Attributes:
        label: which METEOR it is, and with which WordNet.
        corpus: the score of all captions, times 100.
        images: image -> score, times 100.
        summed: what the corpus score follows from, where that is not the mean over images.
    """

    label: str
    corpus: float
    images: dict[str, float]
    summed: Summed | None = None


class _SystemWordNet(WordNetCorpusReader):
    """WordNet as Debian packs it, without what METEOR never asks for but nltk reads at once."""

    def open(self, file: str) -> Any:
        if file == "lexnames":  # the names of the lexicographers' files are in no package
            return io.StringIO("".join(f"{i:02d} file{i} 0\n" for i in range(45)))
        return super().open(file)

    def map_wn(self, version: str = "wordnet") -> None:
        """Map nothing: the way to other versions serves other languages, and needs nltk's own copy."""


class _Remembered:
    """What METEOR asks of a stemmer and a WordNet, each word once."""

    def __init__(self, wordnet: Any) -> None:
        self.stem: Callable[[str], str] = lru_cache(maxsize=None)(PorterStemmer().stem)
        self.synsets: Callable[[str], list[_Remembered]] = lru_cache(maxsize=None)(self._synonyms)
        self._wordnet = wordnet

    def _synonyms(self, word: str) -> list[Any]:
        names = {
            lemma.name() for synset in self._wordnet.synsets(word) for lemma in synset.lemmas()
        }
        return [_Synset([_Lemma(name) for name in sorted(names) if "_" not in name])]


@dataclass(frozen=True)
class _Lemma:
    word: str

    def name(self) -> str:
        return self.word


@dataclass(frozen=True)
class _Synset:
    words: list[_Lemma]

    def lemmas(self) -> list[_Lemma]:
        return self.words


def find_wordnet() -> Any:
    """Return nltk's reader of WordNet; ``None`` where there is no WordNet.

    Looked for in this order: the folder that WNSEARCHDIR names, nltk's own download, the system's
    package.
    """
    named = os.environ.get("WNSEARCHDIR")
    if named and _is_wordnet(Path(named)):
        return _open_wordnet(Path(named))
    try:
        wordnet.ensure_loaded()
        return wordnet
    except LookupError:
        return _open_wordnet(SYSTEM_WORDNET) if _is_wordnet(SYSTEM_WORDNET) else None


def _is_wordnet(folder: Path) -> bool:
    names = [
        f"{kind}.{part}" for kind in ("index", "data") for part in ("noun", "verb", "adj", "adv")
    ]
    return all(
        (folder / name).is_file() for name in [*names, "noun.exc", "verb.exc", "adj.exc", "adv.exc"]
    )


@lru_cache(maxsize=2)
def _open_wordnet(folder: Path) -> WordNetCorpusReader:
    if str(folder) not in nltk.data.path:
        nltk.data.path.append(str(folder))  # nltk opens nothing that lies elsewhere
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # says that only English is there
        return _SystemWordNet(str(folder), None)


def meteor_nltk(
    hypotheses: Mapping[str, str],
    references: Mapping[str, Sequence[str]],
    reader: Any = None,
    known: dict[tuple[str, str], float] | None = None,
) -> Meteor:
    """Return nltk's METEOR (Lavie and Agarwal 2007), the best over an image's references, mean over
    images.

    Args:
        hypotheses: image -> generated caption.
        references: image -> its human captions, as they were written.
        reader: nltk's reader of WordNet; by default what ``find_wordnet`` finds.
        known: scores of (reference, caption); those that are missing are added. Give the same one
            to several calls on the same captions, and each pair is compared once.

    Raises:
        CapGenError: WordNet is not there; the two name different images, or there is nothing to
            score.
    """
    check_images(hypotheses, references)
    reader = find_wordnet() if reader is None else reader
    if reader is None:
        raise CapGenError(
            "METEOR needs WordNet, which is not on this machine",
            "run: python -m nltk.downloader wordnet; or: apt install wordnet-base wordnet-sense-index; "
            "or let WNSEARCHDIR name the folder that holds its index.noun",
        )
    words = _Remembered(reader)
    known = {} if known is None else known
    images = {}
    for image, caption in hypotheses.items():
        for pair in ((reference, caption) for reference in references[image]):
            if pair not in known:
                known[pair] = single_meteor_score(
                    *map(tokenise, pair), stemmer=words, wordnet=words
                )
        images[image] = 100 * max(known[reference, caption] for reference in references[image])
    label = f"METEOR of nltk {nltk.__version__} with WordNet {reader.get_version()}, times 100; not METEOR 1.5"
    return Meteor(label, sum(images.values()) / len(images), images)


def has_meteor_java() -> bool:
    """Return whether METEOR 1.5 can run: Java, and the package pycocoevalcap, which brings the
    program."""
    return (
        shutil.which("java") is not None and importlib.util.find_spec("pycocoevalcap") is not None
    )


# The parameters that version 1.5 uses for English: how much precision, fragments and words with
# content count, and how much matches of equal words, equal stems, synonyms and paraphrases do.
_ALPHA, _BETA, _GAMMA, _DELTA = 0.85, 0.2, 0.6, 0.75


_WEIGHTS = np.array([1.0, 0.6, 0.8, 0.6])


def meteor_of_sums(sums: np.ndarray) -> np.ndarray:
    """Return METEOR 1.5, times 100, from the program's statistics (Denkowski and Lavie 2014).

    Args:
        sums: (..., 23): words of caption and reference; function words of both; for each of the
            four kinds of matches those of words with content in caption and reference, and of
            function words in both; chunks; matched words of both.

    Returns:
        (...).
    """
    words, function = sums[..., 0:2], sums[..., 2:4]
    matches = sums[..., 4:20].reshape(
        *sums.shape[:-1], 4, 2, 2
    )  # (..., kind, content or function, caption or not)
    found = np.einsum("k,...kct,c->...t", _WEIGHTS, matches, [_DELTA, 1 - _DELTA])
    said = _DELTA * (words - function) + (1 - _DELTA) * function
    precision, recall = np.moveaxis(_ratio(found, said), -1, 0)
    both = _ratio(precision * recall, _ALPHA * precision + (1 - _ALPHA) * recall)
    fragments = _ratio(sums[..., 20], sums[..., 21:23].mean(axis=-1))
    return np.asarray(100 * both * (1 - _GAMMA * fragments**_BETA))


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.zeros(np.shape(part)), where=whole > 0)


class MeteorJava:
    """METEOR 1.5 by the reference's Java program, which starts once and stays for all calls.

    Raises:
        CapGenError: Java or pycocoevalcap is missing.
    """

    def __init__(self) -> None:
        if not has_meteor_java():
            raise CapGenError(
                "METEOR 1.5 needs Java and the package pycocoevalcap",
                "install Java 8 or newer and run: pip install pycocoevalcap; or use nltk's METEOR",
            )
        from pycocoevalcap.meteor.meteor import Meteor as Program

        self._program = Program()

    def __call__(
        self, hypotheses: Mapping[str, str], references: Mapping[str, Sequence[str]]
    ) -> Meteor:
        """Return METEOR 1.5 of captions; see ``meteor_java``."""
        check_images(hypotheses, references)
        rows = {
            image: self._statistics(caption, references[image])
            for image, caption in hypotheses.items()
        }
        table = np.array(list(rows.values()))
        images = dict(zip(rows, meteor_of_sums(table).tolist(), strict=True))
        corpus = float(meteor_of_sums(table.sum(axis=0)))
        return Meteor(JAVA_PROTOCOL, corpus, images, Summed(rows, meteor_of_sums))

    def _statistics(self, caption: str, references: Sequence[str]) -> list[float]:
        """Let the program compare a caption with its references."""
        written = [" ".join(tokenise(reference)) for reference in references]
        row = [
            float(value)
            for value in self._program._stat(" ".join(tokenise(caption)), written).split()
        ]
        whole = row[21] == row[0] and row[22] == row[1]
        if whole and row[20] == 1:
            row[20] = (
                0.0  # all of both in one piece: nothing is fragmented, and the program counts no chunk
            )
        return row


def meteor_java(hypotheses: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> Meteor:
    """Return METEOR 1.5; its corpus score adds up matches over all captions and is not the mean
    over images.

    Args:
        hypotheses: image -> generated caption.
        references: image -> its human captions, as they were written.

    Raises:
        CapGenError: Java or pycocoevalcap is missing; the two name different images, or there is
            nothing to score.
    """
    check_images(hypotheses, references)
    return MeteorJava()(hypotheses, references)
