"""METEOR in two versions that must not be confused: nltk's, and 1.5 in Java. See notebook 09.

nltk follows Lavie and Agarwal 2007: equal words, equal stems, synonyms from WordNet. METEOR 1.5
(Denkowski and Lavie 2014), which papers report, also knows paraphrases and gives function words
less weight, so the two differ by points. It runs the reference's Java program.
"""

import importlib.util
import io
import os
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nltk
import numpy as np
from nltk.corpus import wordnet
from nltk.corpus.reader.wordnet import WordNetCorpusReader
from nltk.stem.porter import PorterStemmer
from nltk.translate.meteor_score import single_meteor_score

from capgen_utils.common.files import CapGenError
from capgen_utils.evaluation.metrics.scores import Summed, check_images
from capgen_utils.text.ptb import tokenise

SYSTEM_WORDNET = Path("/usr/share/wordnet")  # Debian's wordnet-base and wordnet-sense-index
JAVA_PROTOCOL = "METEOR 1.5 by the COCO caption evaluation's jar, times 100"
# Version 1.5's parameters for English: the weights of precision, fragmentation and content words,
# and of matches by equal words, equal stems, synonyms and paraphrases.
_ALPHA, _BETA, _GAMMA, _DELTA = 0.85, 0.2, 0.6, 0.75
_WEIGHTS = np.array([1.0, 0.6, 0.8, 0.6])


@dataclass(frozen=True)
class Meteor:
    """A METEOR score with its label.

    Attributes:
        label: the version of METEOR, and of WordNet.
        corpus: the score of all captions, times 100.
        images: image -> score, times 100.
        summed: the sums from which the corpus score follows, if it is not the mean over images.
    """

    label: str
    corpus: float
    images: dict[str, float]
    summed: Summed | None = None


# --- nltk's METEOR


class _SystemWordNet(WordNetCorpusReader):
    """Debian's WordNet, without the files that nltk reads at once and METEOR never needs."""

    def open(self, file: str) -> Any:
        if file == "lexnames":  # no package holds the names of the lexicographers' files
            return io.StringIO("".join(f"{i:02d} file{i} 0\n" for i in range(45)))
        return super().open(file)

    def map_wn(self, version: str = "wordnet") -> None:
        """Map nothing: other versions serve other languages and need nltk's own copy."""


def find_wordnet() -> Any:
    """Return nltk's reader of WordNet, or ``None`` without a WordNet.

    Searched in this order: the folder named by WNSEARCHDIR, nltk's own download, the system's
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
    return all(
        (folder / name).is_file()
        for kind in ("noun", "verb", "adj", "adv")
        for name in (f"index.{kind}", f"data.{kind}", f"{kind}.exc")
    )


@lru_cache(maxsize=2)
def _open_wordnet(folder: Path) -> WordNetCorpusReader:
    if str(folder) not in nltk.data.path:
        nltk.data.path.append(str(folder))  # nltk opens no files elsewhere
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns that it speaks only English
        return _SystemWordNet(str(folder), None)


def meteor_nltk(
    hypotheses: Mapping[str, str],
    references: Mapping[str, Sequence[str]],
    reader: Any = None,
    known: dict[tuple[str, str], float] | None = None,
) -> Meteor:
    """Return nltk's METEOR (Lavie and Agarwal 2007): each image's best reference, mean over images.

    Args:
        hypotheses: image -> generated caption.
        references: image -> its human captions, as they were written.
        reader: nltk's reader of WordNet; by default that of ``find_wordnet``.
        known: scores of (reference, caption); missing ones are added. Pass the same mapping to
            several calls on the same captions, and each pair is compared once.

    Raises:
        CapGenError: there is no WordNet; the two name different images, or there is nothing to
            score.
    """
    check_images(hypotheses, references)
    reader = find_wordnet() if reader is None else reader
    if reader is None:
        raise CapGenError(
            "METEOR needs WordNet, which is not on this machine",
            "run: python -m nltk.downloader wordnet; or: apt install wordnet-base "
            "wordnet-sense-index; or let WNSEARCHDIR name the folder that holds its index.noun",
        )
    # A stemmer and a WordNet that look each word up once.
    words = SimpleNamespace(
        stem=lru_cache(maxsize=None)(PorterStemmer().stem),
        synsets=lru_cache(maxsize=None)(reader.synsets),
    )
    known = {} if known is None else known
    images = {}
    for image, caption in hypotheses.items():
        for reference in references[image]:
            if (reference, caption) not in known:
                known[reference, caption] = single_meteor_score(
                    tokenise(reference), tokenise(caption), stemmer=words, wordnet=words
                )
        images[image] = 100 * max(known[reference, caption] for reference in references[image])
    return Meteor(
        f"METEOR of nltk {nltk.__version__} with WordNet {reader.get_version()}, times 100; "
        "not METEOR 1.5",
        sum(images.values()) / len(images),
        images,
    )


# --- METEOR 1.5


def has_meteor_java() -> bool:
    """Return whether METEOR 1.5 can run: it needs Java, and its program in pycocoevalcap."""
    return bool(importlib.util.find_spec("pycocoevalcap") and shutil.which("java"))


def meteor_of_sums(sums: np.ndarray) -> np.ndarray:
    """Return METEOR 1.5, times 100, from the program's statistics (Denkowski and Lavie 2014).

        METEOR = (1 - gamma (chunks / matches)^beta) P R / (alpha P + (1 - alpha) R)

    P and R weigh matches by their kind and content words by delta.

    Args:
        sums: (..., 23): words of caption and reference; function words of both; for each of the
            four kinds of matches the content words in caption and reference, then the function
            words in both; chunks; matched words of both.

    Returns:
        (...).
    """
    words, function = sums[..., 0:2], sums[..., 2:4]
    # (..., kind, content or function, caption or reference)
    matches = sums[..., 4:20].reshape(*sums.shape[:-1], 4, 2, 2)
    matched = np.einsum("k,...kct,c->...t", _WEIGHTS, matches, [_DELTA, 1 - _DELTA])
    total = _DELTA * (words - function) + (1 - _DELTA) * function
    precision, recall = np.moveaxis(_ratio(matched, total), -1, 0)
    mean = _ratio(precision * recall, _ALPHA * precision + (1 - _ALPHA) * recall)
    fragments = _ratio(sums[..., 20], sums[..., 21:23].mean(axis=-1))
    return np.asarray(100 * mean * (1 - _GAMMA * fragments**_BETA))


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Return the quotient, 0 where the denominator is 0."""
    zeros = np.zeros(np.shape(numerator))
    return np.divide(numerator, denominator, out=zeros, where=denominator > 0)


def java_program() -> Any:
    """Start the reference's Java program; it ends with the returned object.

    Raises:
        CapGenError: Java or pycocoevalcap is missing.
    """
    if not has_meteor_java():
        raise CapGenError(
            "METEOR 1.5 needs Java and the package pycocoevalcap",
            "install Java 8 or newer and run: pip install pycocoevalcap; or use nltk's METEOR",
        )
    from pycocoevalcap.meteor.meteor import Meteor as Program

    return Program()


def meteor_java(
    hypotheses: Mapping[str, str],
    references: Mapping[str, Sequence[str]],
    program: Any = None,
) -> Meteor:
    """Return METEOR 1.5; its corpus score adds up the matches of all captions: it is not a mean.

    Args:
        hypotheses: image -> generated caption.
        references: image -> its human captions, as they were written.
        program: from ``java_program``; ``None`` starts one for this call.

    Raises:
        CapGenError: Java or pycocoevalcap is missing; the two name different images, or there is
            nothing to score.
    """
    check_images(hypotheses, references)
    program = java_program() if program is None else program
    rows = {}
    for image, caption in hypotheses.items():
        written = [" ".join(tokenise(reference)) for reference in references[image]]
        row = [*map(float, program._stat(" ".join(tokenise(caption)), written).split())]
        # If all words of both match in one chunk, nothing is fragmented: the program counts 0.
        if row[20] == 1 and row[21] == row[0] and row[22] == row[1]:
            row[20] = 0.0
        rows[image] = row
    table = np.array(list(rows.values()))  # (I, 23)
    images = dict(zip(rows, meteor_of_sums(table).tolist(), strict=True))
    corpus = float(meteor_of_sums(table.sum(axis=0)))
    return Meteor(JAVA_PROTOCOL, corpus, images, Summed(rows, meteor_of_sums))
