"""What decoding finds: token ids with their probabilities, and the captions that people read."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from capgen_utils.text.words import Tokenizer


@dataclass(frozen=True)
class Specials:
    """The ids decoding has to know.

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
        """Return those of a tokenizer."""
        return cls(tokenizer.start_id, tokenizer.end_id, tokenizer.banned_ids)


@dataclass(frozen=True)
class Hypothesis:
    """A decoded caption.

    Attributes:
        tokens: ids without start and end token.
        log_probability: natural logarithm, summed over the tokens and the end token. It is always
            that of the model's
            own distribution over the tokens that are not banned, however the caption was found: no
                penalty,
            temperature or truncation is in it.
        score: what hypotheses are ranked by: log-probability / length ** length_penalty, the end
            token counted. In beam search the penalties that steered the search are part of it.
        ended: the end token was emitted; false where the caption was cut: at the maximum length, or
            because the rules left no token to go on with.
        temperature: what it was drawn at; 0 where nothing was drawn.
    """

    tokens: tuple[int, ...]
    log_probability: float
    score: float
    ended: bool
    temperature: float = 0.0


@dataclass(frozen=True)
class Candidate:
    """One caption that was considered; see ``Hypothesis`` for what the numbers mean exactly.

    Attributes:
        text: the caption.
        log_probability: natural logarithm under the captioner, summed over its tokens.
        score: what candidates are ranked by, unless a CLIP chose among them.
        temperature: what it was drawn at; 0 where it was searched for.
        clip_score: cosine of image and caption, where a CLIP chose among them: the higher the
            better it fits.
    """

    text: str
    log_probability: float
    score: float
    temperature: float = 0.0
    clip_score: float | None = None


@dataclass(frozen=True)
class Caption:
    """The result for one image.

    Attributes:
        text: the best caption.
        log_probability: natural logarithm, summed over its tokens.
        words: the caption token by token.
        ended: false where it was cut at the maximum length.
        candidates: all captions found, best first; the first is ``text``.
        tokens: their ids, one for each of ``words``.
    """

    text: str
    log_probability: float
    words: tuple[str, ...]
    ended: bool
    candidates: tuple[Candidate, ...]
    tokens: tuple[int, ...] = ()


class NextWord(NamedTuple):
    """A token that could come next: its text, its probability, and whether the caption has it there."""

    text: str
    probability: float
    said: bool


def caption_of(
    tokenizer: Tokenizer,
    hypotheses: Sequence[Hypothesis],
    order: Sequence[int],
    scores: Sequence[float] | None = None,
) -> Caption:
    """Return the caption of one image.

    Args:
        tokenizer: of the captioner.
        hypotheses: what was found.
        order: their places, best first.
        scores: for each hypothesis how well it fits the image, where a CLIP chose.
    """
    best = hypotheses[order[0]]
    candidates = tuple(
        Candidate(
            tokenizer.decode(hypotheses[i].tokens),
            hypotheses[i].log_probability,
            hypotheses[i].score,
            hypotheses[i].temperature,
            None if scores is None else scores[i],
        )
        for i in order
    )
    words = tuple(tokenizer.words(best.tokens))
    return Caption(
        candidates[0].text, best.log_probability, words, best.ended, candidates, best.tokens
    )
