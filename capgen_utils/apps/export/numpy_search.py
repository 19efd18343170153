"""Greedy and beam search in numpy, for captioners that run without torch: the same captions as
``decoding`` finds."""

from dataclasses import dataclass, field
from typing import Any, Protocol, Self

import numpy as np

from capgen_utils.common.files import CapGenError
from capgen_utils.config import DecodingConfig
from capgen_utils.decoding.captions import Hypothesis, Specials
from capgen_utils.decoding.options import check_decoding

_ONLY_WITH_TORCH = (
    "temperature",
    "temperatures",
    "repetition_penalty",
    "no_repeat_ngram",
    "groups",
)


class State(Protocol):
    """What a captioner remembers of M hypotheses."""

    def step(self, tokens: np.ndarray) -> tuple[np.ndarray, Self]:
        """Read ``tokens`` (M,), one for each hypothesis; logits (M, V) of the next ones, and the
        state after them."""
        ...

    def select(self, rows: np.ndarray) -> Self:
        """Return the state of hypotheses ``rows`` (M',): reordered, dropped or repeated."""
        ...


def search(
    state: State, images: int, specials: Specials, config: DecodingConfig
) -> list[list[Hypothesis]]:
    """Find captions for ``images`` images, which step together and choose each for itself.

    Args:
        state: before the first token, one hypothesis an image.
        images: how many.
        specials: token ids.
        config: beam, lengths and length penalty; beam 1 is greedy search.

    Returns:
        For each image its hypotheses, best first: one for greedy search, else up to ``beam``
            distinct ones.

    Raises:
        CapGenError: a configuration that is not possible, or one that draws, penalises or keeps
            groups apart.
    """
    require_search(check_decoding(config))
    searches = [_Search(config, specials.end) for _ in range(images)]
    alive, tokens = list(range(images)), np.full(images, specials.start, dtype=np.int64)
    for position in range(config.max_length):
        logits, state = state.step(tokens)
        steps = _log_probabilities(logits, specials, position < config.min_length)
        rows, chosen, going, first = [], [], [], 0
        for image in alive:
            one, count = searches[image], len(searches[image].live)
            sources, words = one.advance(*(table[first : first + count] for table in steps))
            if position + 1 == config.max_length:
                one.cut()
            elif sources:
                going.append(image)
                rows += [first + source for source in sources]
                chosen += words
            first += count
        if not going:
            break
        alive, tokens, state = going, np.array(chosen, dtype=np.int64), state.select(np.array(rows))
    return [one.found() for one in searches]


def require_search(config: DecodingConfig) -> None:
    """Refuse what needs torch.

    Raises:
        CapGenError: the configuration draws, penalises or keeps groups apart.
    """
    default = DecodingConfig()
    wanted = [name for name in _ONLY_WITH_TORCH if getattr(config, name) != getattr(default, name)]
    if wanted:
        raise CapGenError(
            f"a captioner without torch has no {wanted[0].replace('_', ' ')}: it searches, greedily or with a beam",
            "leave that option out, or use the bundle instead of the exported folder",
        )


def _log_probabilities(
    logits: np.ndarray, specials: Specials, too_short: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Logits (M, V) -> log-softmax over what may be said, and the same without the end where that
    is too early."""
    allowed = logits.astype(np.float32)
    allowed[:, list(specials.banned)] = -np.inf
    allowed -= allowed.max(-1, keepdims=True)
    own = allowed - np.log(np.exp(allowed).sum(-1, keepdims=True))
    steps = own.copy() if too_short else own
    if too_short:
        steps[:, specials.end] = -np.inf
    return own, steps


@dataclass
class _Live:
    """A hypothesis that goes on: its words so far, and their log-probability."""

    words: tuple[int, ...] = ()
    total: np.float32 = field(default_factory=lambda: np.float32(0))


class _Search:
    """The search for one image; the rules are those of ``decoding``, where they are explained."""

    def __init__(self, config: DecodingConfig, end: int) -> None:
        self.config, self.end, self.size = config, end, config.beam
        self.live = [_Live()]
        self.finished: list[Hypothesis] = []

    def advance(self, own: np.ndarray, steps: np.ndarray) -> tuple[list[int], list[int]]:
        """Go on by one token.

        Args:
            own: (hypotheses, V) log-probabilities.
            steps: the same after the rules.

        Returns:
            For each hypothesis that lives on: the one it continues, and its new token.
        """
        totals = (steps + np.array([[one.total] for one in self.live], dtype=np.float32)).ravel()
        looked_at = 1 if self.size == 1 else min(2 * self.size, len(totals))
        best = np.argsort(-totals, kind="stable")[:looked_at]
        sources, tokens = best // steps.shape[1], best % steps.shape[1]
        lives: list[tuple[int, int, _Live]] = []
        for rank, (source, token) in enumerate(zip(sources.tolist(), tokens.tolist(), strict=True)):
            before = self.live[source]
            total = before.total + own[source, token]
            if not np.isfinite(totals[best[rank]]):
                continue
            if token != self.end:
                lives.append((source, token, _Live((*before.words, token), total)))
            elif rank < self.size:
                self._finish(_Live(before.words, total), True)
        if not lives and not self.finished:
            self._finish(self.live[0], False)
        lives = lives[: self.size]
        self.live = [one for _, _, one in lives]
        if self._done():
            self.live = []
        kept = lives[: len(self.live)]
        return [source for source, _, _ in kept], [token for _, token, _ in kept]

    def _done(self) -> bool:
        """Whether nothing that lives can, as it stands, push out the worst of as many as the beam
        holds."""
        if not self.live or len(self.finished) < self.size:
            return not self.live
        worst = sorted((h.score for h in self.finished), reverse=True)[self.size - 1]
        return self._ranked(self.live[0].total, len(self.live[0].words)) <= worst

    def cut(self) -> None:
        """Keep what is unfinished as captions cut short."""
        for one in self.live:
            self._finish(one, False)

    def _finish(self, one: _Live, ended: bool) -> None:
        score = self._ranked(one.total, len(one.words) + ended)
        self.finished.append(Hypothesis(one.words, float(one.total), score, ended))

    def _ranked(self, total: Any, length: int) -> float:
        return float(total) / max(1, length) ** self.config.length_penalty

    def found(self) -> list[Hypothesis]:
        """Return the hypotheses, best first."""
        return sorted(self.finished, key=lambda h: -h.score)[: self.size]
