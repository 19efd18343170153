"""Hypotheses (token ids with probabilities) and captions (text), without torch (notebook 08)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from capgen_utils.text.words import Tokenizer


@dataclass(frozen=True)
class Specials:
    """The token ids that decoding needs to know.

    Attributes:
        start: read before the first word, never counted as part of a caption.
        end: emitted after the last word; may be the same id as ``start``, as in GPT-2.
        banned: never emitted.
    """

    start: int
    end: int
    banned: tuple[int, ...] = ()

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "Specials":
        """Return the special ids of a tokenizer."""
        return cls(tokenizer.start_id, tokenizer.end_id, tokenizer.banned_ids)


@dataclass(frozen=True)
class Hypothesis:
    """A decoded caption.

    Attributes:
        tokens: ids without start and end token.
        log_probability: natural logarithm, summed over the tokens and the end token, under the
            model's own distribution over the tokens that are not banned. Penalties, temperature and
            truncation never change it.
        score: what hypotheses are ranked by: log-probability / length ** length_penalty, counting
            the end token. In beam search it includes the penalties that steered the search.
        ended: the end token was emitted; false if the caption was cut at the maximum length, or
            because the rules left no token to continue with.
        temperature: the sampling temperature; 0 without sampling.
    """

    tokens: tuple[int, ...]
    log_probability: float
    score: float
    ended: bool
    temperature: float = 0.0


@dataclass(frozen=True)
class Candidate:
    """One caption that was considered; ``Hypothesis`` defines the numbers.

    Attributes:
        text: the caption.
        log_probability: natural logarithm under the captioner, summed over the tokens.
        score: what the captioner ranks candidates by.
        temperature: the sampling temperature; 0 without sampling.
        clip_score: cosine similarity of image and caption, if a CLIP re-ranked; higher fits better.
        rank: position in the captioner's own order, before re-ranking.
    """

    text: str
    log_probability: float
    score: float
    temperature: float = 0.0
    clip_score: float | None = None
    rank: int = 0


@dataclass(frozen=True)
class Caption:
    """The result for one image.

    Attributes:
        text: the best caption.
        log_probability: natural logarithm, summed over its tokens.
        words: the caption token by token.
        ended: false if it was cut at the maximum length.
        candidates: all captions considered, best first; the first one is ``text``.
        tokens: the ids of ``words``.
    """

    text: str
    log_probability: float
    words: tuple[str, ...]
    ended: bool
    candidates: tuple[Candidate, ...]
    tokens: tuple[int, ...] = ()


class NextWord(NamedTuple):
    """A possible next token: its text, its probability, and whether the caption has it here."""

    text: str
    probability: float
    said: bool


def best_first(scores: Sequence[float]) -> list[int]:
    """Return the positions of ``scores`` from highest to lowest; equal ones keep their order."""
    return sorted(range(len(scores)), key=lambda i: -scores[i])


def caption_of(
    tokenizer: Tokenizer, hypotheses: Sequence[Hypothesis], scores: Sequence[float] | None = None
) -> Caption:
    """Return the caption of one image.

    Args:
        tokenizer: the captioner's.
        hypotheses: the captioner's, best first.
        scores: for re-ranking: how well each of them fits the image, the higher the better.
    """
    order = list(range(len(hypotheses))) if scores is None else best_first(scores)
    candidates = tuple(
        Candidate(
            tokenizer.decode(hypotheses[rank].tokens),
            hypotheses[rank].log_probability,
            hypotheses[rank].score,
            hypotheses[rank].temperature,
            None if scores is None else scores[rank],
            rank,
        )
        for rank in order
    )
    best = hypotheses[order[0]]
    return Caption(
        candidates[0].text,
        best.log_probability,
        tuple(tokenizer.words(best.tokens)),
        best.ended,
        candidates,
        best.tokens,
    )
