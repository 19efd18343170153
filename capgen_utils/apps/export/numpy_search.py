"""Greedy and beam search in numpy, without torch: the captions of ``decoding`` (notebook 11)."""

from typing import Any, NamedTuple

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


def search(
    state: Any, images: int, specials: Specials, config: DecodingConfig
) -> list[list[Hypothesis]]:
    """Find captions for ``images`` images, which step together but are searched independently.

    Args:
        state: before the first token, one hypothesis per image; see ``onnx_captioner.OnnxState``.
        images: how many.
        specials: token ids.
        config: beam, lengths and length penalty; beam 1 is greedy search.

    Returns:
        Hypotheses per image, best first: one for greedy search, otherwise up to ``beam`` distinct
        ones.

    Raises:
        CapGenError: the configuration is not possible, or needs torch.
    """
    require_search(check_decoding(config))
    searches = [_Search(config, specials.end) for _ in range(images)]
    alive, tokens = list(range(images)), np.full(images, specials.start, dtype=np.int64)  # (M,)
    for position in range(config.max_length):
        logits, state = state.step(tokens)  # (M, V)
        logits = logits.astype(np.float32)
        logits[:, list(specials.banned)] = -np.inf
        logits -= logits.max(-1, keepdims=True)
        own = logits - np.log(np.exp(logits).sum(-1, keepdims=True))  # (M, V) log-probabilities
        steps = own.copy()
        if position < config.min_length:
            steps[:, specials.end] = -np.inf
        rows, chosen, going, first = [], [], [], 0
        for image in alive:
            one, count = searches[image], len(searches[image].live)
            sources, words = one.advance(own[first : first + count], steps[first : first + count])
            if position + 1 == config.max_length:
                for hypothesis in one.live:
                    one.finish(hypothesis, False)  # cut short
            elif sources:
                going.append(image)
                rows += [first + source for source in sources]
                chosen += words
            first += count
        if not going:
            break
        alive, tokens, state = going, np.array(chosen, dtype=np.int64), state.select(np.array(rows))
    return [one.hypotheses() for one in searches]


def require_search(config: DecodingConfig) -> None:
    """Refuse what needs torch.

    Raises:
        CapGenError: the configuration asks for sampling, penalties or groups.
    """
    changed = [n for n in _ONLY_WITH_TORCH if getattr(config, n) != getattr(DecodingConfig, n)]
    if changed:
        raise CapGenError(
            f"a captioner without torch has no {changed[0].replace('_', ' ')}: it knows greedy and "
            "beam search only",
            "leave that option out, or use the bundle instead of the exported folder",
        )


class _Live(NamedTuple):
    """An unfinished hypothesis: its tokens so far and their log-probability."""

    words: tuple[int, ...] = ()
    total: np.float32 = np.float32(0)


class _Search:
    """The search for one image; ``decoding.search`` explains the rules."""

    def __init__(self, config: DecodingConfig, end: int) -> None:
        self.config, self.end, self.size = config, end, config.beam
        self.live = [_Live()]
        self.finished: list[Hypothesis] = []

    def advance(self, own: np.ndarray, steps: np.ndarray) -> tuple[list[int], list[int]]:
        """Extend the hypotheses by one token.

        Args:
            own: (K, V) log-probabilities.
            steps: the same after the rules.

        Returns:
            For each hypothesis that lives on: the one it continues, and its new token.
        """
        before = np.array([[hypothesis.total] for hypothesis in self.live], dtype=np.float32)
        totals = (steps + before).ravel()  # (K * V,)
        count = 1 if self.size == 1 else min(2 * self.size, len(totals))
        lives: list[tuple[int, int, _Live]] = []
        for rank, index in enumerate(np.argsort(-totals, kind="stable")[:count].tolist()):
            if not np.isfinite(totals[index]):
                continue
            source, token = divmod(index, steps.shape[1])
            words, total = self.live[source].words, self.live[source].total + own[source, token]
            if token != self.end:
                lives.append((source, token, _Live((*words, token), total)))
            elif rank < self.size:
                self.finish(_Live(words, total), True)
        if not lives and not self.finished:
            self.finish(self.live[0], False)
        lives = lives[: self.size]
        if lives and len(self.finished) >= self.size:
            leader = lives[0][2]
            if self._ranked(leader.total, len(leader.words)) <= self.hypotheses()[-1].score:
                lives = []  # done: nothing alive can, at its present length, replace the worst
        self.live = [hypothesis for _, _, hypothesis in lives]
        return [source for source, _, _ in lives], [token for _, token, _ in lives]

    def finish(self, hypothesis: _Live, ended: bool) -> None:
        """Keep a caption: with its end token, or cut short."""
        (words, total), length = hypothesis, len(hypothesis.words) + ended
        self.finished.append(Hypothesis(words, float(total), self._ranked(total, length), ended))

    def _ranked(self, total: np.float32, length: int) -> float:
        return float(total) / max(1, length) ** self.config.length_penalty

    def hypotheses(self) -> list[Hypothesis]:
        """Return the finished hypotheses, best first, at most as many as the beam holds."""
        return sorted(self.finished, key=lambda h: -h.score)[: self.size]
