"""The COCO caption evaluation itself, as the package pycocoevalcap runs it, and captions to try it
on."""

import importlib.util
import random
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from helpers import need


def need_reference() -> None:
    """Skip where the reference evaluation cannot run."""
    need("the package pycocoevalcap", importlib.util.find_spec("pycocoevalcap"))
    need("Java", shutil.which("java"))


def tokenise_by_reference(captions: Sequence[str], folder: Path) -> list[list[str]]:
    """Return the words of each caption as the reference's scorers see them.

    The command and the list of punctuation are the package's own; the one Java process reads all
    captions, each behind an empty line's worth of text, since the program looks beyond the end of a
    line.
    """
    import pycocoevalcap.tokenizer.ptbtokenizer as reference

    jar = Path(reference.__file__).parent / reference.STANFORD_CORENLP_3_4_1_JAR
    path = folder / "captions.txt"
    path.write_text(
        "".join(" ".join(c.splitlines()) + "\nzzz\n" for c in captions), encoding="utf-8"
    )
    command = [
        "java",
        "-Dfile.encoding=UTF-8",
        "-cp",
        str(jar),
        "edu.stanford.nlp.process.PTBTokenizer",
    ]
    done = subprocess.run(
        [*command, "-preserveLines", "-lowerCase", str(path)],
        capture_output=True,
        timeout=300,
        check=True,
    )
    lines = done.stdout.decode().split("\n")[: 2 * len(captions) : 2]
    kept = (
        " ".join(w for w in line.rstrip().split(" ") if w not in reference.PUNCTUATIONS)
        for line in lines
    )
    return [line.split() for line in kept]


def scores_by_reference(
    tasks: Sequence[tuple[Mapping[str, str], Mapping[str, Sequence[str]]]], folder: Path
) -> list[dict[str, float]]:
    """Return the reference's scores, times 100, of each task: hypotheses and references; one Java
    process for all.

    What it calls CIDEr is CIDEr-D. CIDEr is the same without what the D stands for: nothing
    clipped, and no penalty for length.
    """
    strings = list(
        {
            c: 0
            for said, written in tasks
            for c in [*said.values(), *(c for v in written.values() for c in v)]
        }
    )
    words = dict(zip(strings, map(" ".join, tokenise_by_reference(strings, folder)), strict=True))
    results = []
    for said, written in tasks:
        hypotheses = {image: [words[caption]] for image, caption in said.items()}
        references = {
            image: [words[caption] for caption in captions] for image, captions in written.items()
        }
        results.append(_score_words(hypotheses, references))
    return results


def _score_words(
    hypotheses: dict[str, list[str]], references: dict[str, list[str]]
) -> dict[str, float]:
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider import cider_scorer
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    bleu, _ = Bleu(4).compute_score(references, hypotheses, verbose=0)
    scores = {f"BLEU-{n}": value for n, value in enumerate(bleu, 1)}
    scores["ROUGE-L"], _ = Rouge().compute_score(references, hypotheses)
    scores["CIDEr-D"], _ = Cider().compute_score(references, hypotheses)
    cider_scorer.min = lambda hypothesis, reference: hypothesis  # type: ignore[attr-defined]
    try:
        scores["CIDEr"], _ = Cider(sigma=1e9).compute_score(references, hypotheses)
    finally:
        del cider_scorer.min  # type: ignore[attr-defined]
    return {name: 100 * float(value) for name, value in scores.items()}


WORDS = """
    a the dog dogs woman man's men's runs running red can't don't won't shouldn't cannot Cannot
    CANNOT gonna gotta wanna it's It's they're we've I'd he'll I'm o'clock rock'n'roll 'n' 'em
    'tis 'Twas y'all O'Brien D'Angelo d'oh ma'am c'mon Mr. Mrs. St. Dr. Jr. U.S. D.C. R.V. a.m.
    p.m. e.g. i.e. etc. vs. No. Jan. Oct. Inc. Ill. ill. Miss. miss. ft. X. I. 5 10 28 1,000 3.5
    1/2 2nd 4-wheel 4x4 3-D 10-year-old 5.5-inch 24/7 12:30 5pm 50% $5 #5 US$5 '80s 80's 1990s
    t-shirt T-shirt x-ray e-mail re-do black-and-white and/or w/ a/c & AT&T at&t R&B black&white @
    #tag @name * + = % ( ) [ ] { } " ' `` '' ` , . ; : ! ? !! ?! ... -- - --- _ < > <unk> <b> </i>
    :) ;-) :( & &amp; / ~ 12-inch colour grey centre theatre travelling jewellery moustache
    pyjamas favourite neighbours tyre kerb programme realise cafe\u0301 caf\xe9 na\xefve \xfcber
    \xa35 5\u20ac \xbd 5\xb0 it\u2019s don\u2019t \u201chello\u201d \u2018hello\u2019. \u2014
    \u2013 \u2026 'hello' "hello" (hello) hello, hello. hello! hello? hello; hello... hello--
    hello.there hello,there hello/there ...hello wasn't. it's, dogs' 'cause 'till n't 's 'll
    'since 'sup foo.jpg foo@bar.org www.example.org http://example.org/a?b=c
"""
PIECES = WORDS.split()


def generated_captions(count: int, seed: int) -> Iterator[str]:
    """Yield strings that a tokenizer can trip over: words, contractions, quotes, digits, spellings,
    marks."""
    chance = random.Random(seed)
    for _ in range(count):
        words = chance.choices(PIECES, k=chance.randint(1, 9))
        for i in range(len(words)):
            if chance.random() < 0.15:
                words[i] = chance.choice(["'", '"', "(", "-", "#", "...", "``"]) + words[i]
            if chance.random() < 0.2:
                words[i] += chance.choice(
                    ["'", '"', ")", "-", ".", ",", "!", "?", "'s", ";", ":", "''"]
                )
        yield " ".join(words)
