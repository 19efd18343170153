"""One batched search for every captioner: greedy, beam and diverse beam search, and sampling.

It needs only a captioner's ``start`` and ``step``, and a ``DecodingConfig`` (notebook 08).
Next-token scores are changed in the order of the transformers library: repetition penalty,
no-repeat n-grams, minimum length, banned tokens, temperature, top-k, top-p.
"""

from collections.abc import Sequence
from itertools import chain
from typing import Any, Protocol

import torch
from torch import Tensor

from capgen_utils.config import DecodingConfig
from capgen_utils.decoding.captions import Hypothesis, Specials
from capgen_utils.decoding.logits import (
    allowed,
    draw,
    forbid_repeated_ngrams,
    keep_top_k,
    keep_top_p,
    penalise_repetition,
    uniform_numbers,
)
from capgen_utils.decoding.options import check_decoding


class Steps(Protocol):
    """The methods of a captioner that decoding needs."""

    def start(self, memory: Any) -> Any:
        """Return the state before the first token, one hypothesis per image."""
        ...

    def step(self, tokens: Tensor, state: Any, attention: bool = False) -> tuple[Tensor, Any, Any]:
        """Read one token per hypothesis; see ``models.CaptionModel.step``."""
        ...


@torch.inference_mode()
def decode(
    model: Steps,
    memory: Any,
    images: int,
    specials: Specials,
    config: DecodingConfig,
    keys: Sequence[int] | None = None,
) -> list[list[Hypothesis]]:
    """Find captions for ``images`` images.

    Args:
        model: a captioner, in eval mode.
        memory: from its ``encode``.
        images: number of images in ``memory``.
        specials: token ids.
        config: ``temperatures`` samples one caption at each, a ``temperature`` above 0 samples
            ``samples`` captions; otherwise ``beam`` 1 is greedy search and a wider one beam search,
            in ``groups``.
        keys: one number per image; samples depend on it and on the seed. By default the image's
            position in ``memory``.

    Returns:
        Hypotheses per image. In the order of ``temperatures`` if there are any; otherwise best
        first: ``samples`` sampled ones, one for greedy search, up to ``beam`` distinct ones for
        beam search.

    Raises:
        CapGenError: the configuration is not possible.
    """
    check_decoding(config)
    if config.temperatures or config.temperature or config.beam == 1:
        samples = config.samples if config.temperature else 1
        temperatures = config.temperatures or (config.temperature,) * samples
        hypotheses = _Walk(model, memory, images, specials, config, temperatures, keys).run()
    else:
        hypotheses = _Beam(model, memory, images, specials, config).run()
    if config.temperatures:
        return hypotheses
    return [sorted(of_image, key=lambda h: -h.score) for of_image in hypotheses]


def device_of(state: Any) -> torch.device:
    """Return the device of a captioner's state."""
    return next(v.device for v in vars(state).values() if isinstance(v, Tensor))


class _Search:
    """State common to all searches: the captioner and the newest token of each of M hypotheses."""

    def __init__(
        self, model: Steps, memory: Any, images: int, specials: Specials, config: DecodingConfig
    ) -> None:
        self.model, self.images, self.specials, self.config = model, images, specials, config
        self.state = model.start(memory)
        self.device = device_of(self.state)
        self.tokens = torch.full((images,), specials.start, device=self.device)  # (M,)
        self.ruled = (
            config.repetition_penalty != 1 or config.no_repeat_ngram > 0 or config.min_length > 0
        )

    def read(self) -> Tensor:
        """Read the newest tokens; return the logits (M, V) of the next ones."""
        logits, self.state, _ = self.model.step(self.tokens, self.state)
        return allowed(logits, self.specials.banned)

    def rules(self, scores: Tensor, written: Tensor) -> Tensor:
        """Apply penalties and bans to scores (M, V), given the tokens so far (M, T)."""
        config = self.config
        if config.repetition_penalty != 1:
            scores = penalise_repetition(scores, written, config.repetition_penalty)
        if config.no_repeat_ngram:
            scores = forbid_repeated_ngrams(scores, written, config.no_repeat_ngram)
        if written.shape[1] < config.min_length:
            end = torch.tensor([self.specials.end], device=scores.device)
            scores = scores.index_fill(1, end, -torch.inf)
        return scores

    def ranked(self, total: float, length: int) -> float:
        """Return the score of a hypothesis of ``length`` tokens, counting its end token."""
        return total / max(1, length) ** self.config.length_penalty


class _Walk(_Search):
    """Greedy search and sampling: hypotheses are independent, each with its own temperature.

    Row ``image * len(temperatures) + n`` is hypothesis n of an image; finished rows leave the
    batch.
    """

    def __init__(
        self,
        model: Steps,
        memory: Any,
        images: int,
        specials: Specials,
        config: DecodingConfig,
        temperatures: Sequence[float],
        keys: Sequence[int] | None,
    ) -> None:
        super().__init__(model, memory, images, specials, config)
        device, length = self.device, config.max_length
        self.each = len(temperatures)  # hypotheses per image
        rows = images * self.each
        self.alive = torch.arange(rows, device=device)  # (M,) the rows still in the batch
        self.asked = tuple(temperatures) * images  # of each row
        self.temperatures = torch.tensor(self.asked, dtype=torch.float32, device=device)  # (rows,)
        self.numbers = None
        if any(temperatures):
            keys = range(images) if keys is None else keys
            self.numbers = uniform_numbers(config.seed, keys, self.each, length).to(device)
        self.written = torch.full((rows, length), specials.end, device=device)  # (rows, T)
        self.lengths = torch.zeros(rows, dtype=torch.long, device=device)
        self.totals = torch.zeros(rows, device=device)  # log-probabilities
        self.ended = torch.zeros(rows, dtype=torch.bool, device=device)

    def run(self) -> list[list[Hypothesis]]:
        """Return ``len(temperatures)`` hypotheses per image."""
        for position in range(self.config.max_length):
            self._advance(position)
            if not len(self.alive):
                break
        columns = (self.written, self.lengths, self.totals, self.ended)
        table = zip(*(column.tolist() for column in columns), self.asked, strict=True)
        hypotheses = [
            Hypothesis(
                tuple(ids[:length]), total, self.ranked(total, length + ended), ended, temperature
            )
            for ids, length, total, ended, temperature in table
        ]
        starts = range(0, len(hypotheses), self.each)
        return [hypotheses[start : start + self.each] for start in starts]

    def _advance(self, position: int) -> None:
        logits = self.read()  # (M, V)
        if position == 0 and self.each > 1:
            # The start token was read once per image; now every hypothesis gets its row.
            rows = torch.arange(self.images, device=self.device).repeat_interleave(self.each)
            logits, self.state = logits[rows], self.state.select(rows)
        own = logits.log_softmax(-1)  # (M, V)
        scores = self.rules(logits, self.written[self.alive, :position]) if self.ruled else own
        best, tokens = scores.max(-1)  # (M,)
        possible = best > -torch.inf  # also false for NaN
        if self.numbers is not None:
            likeliest = torch.where(possible, tokens, self.specials.end)
            drawn = self._draw(scores, self.numbers[self.alive, position])
            drawing = (self.temperatures[self.alive] > 0) & possible
            tokens = torch.where(drawing, drawn, likeliest)
        going = possible & (tokens != self.specials.end)
        gained = own.gather(1, tokens[:, None])[:, 0]  # (M,)
        self.totals[self.alive] += torch.where(possible, gained, 0)
        self.written[self.alive, position] = tokens
        self.lengths[self.alive] += going
        self.ended[self.alive] = possible & ~going
        if not going.all():
            kept = going.nonzero()[:, 0]
            self.alive, tokens = self.alive[kept], tokens[kept]
            self.state = self.state.select(kept) if len(kept) else self.state
        self.tokens = tokens

    def _draw(self, scores: Tensor, numbers: Tensor) -> Tensor:
        """Sample a token (M,) from scores (M, V), each row at its own temperature."""
        temperatures = self.temperatures[self.alive]  # (M,)
        scaled = scores / torch.where(temperatures > 0, temperatures, 1)[:, None]
        kept = keep_top_p(keep_top_k(scaled, self.config.top_k), self.config.top_p)
        return draw(kept.softmax(-1), numbers)


class _Beam(_Search):
    """Beam search for many images at once, in one group or several diverse ones (arXiv 1610.02424).

    A block is one group of one image: up to ``beam / groups`` live hypotheses. Each step scores all
    blocks together. Among the best continuations of a block, twice as many as it holds, those that
    end in the first half are finished and the best others live on. A block is done, and its rows
    leave the batch, when it has finished as many as it holds and its best live hypothesis, ranked
    at its present length, is no better than the worst of them (``early_stopping=False`` in the
    transformers library). From the second group of an image on, a token's log-probability is
    lowered by ``diversity`` for each hypothesis of an earlier group that continues with it (Hamming
    diversity).
    """

    def __init__(
        self, model: Steps, memory: Any, images: int, specials: Specials, config: DecodingConfig
    ) -> None:
        super().__init__(model, memory, images, specials, config)
        blocks, device = images * config.groups, self.device
        self.size = config.beam // config.groups
        # B live blocks of K hypotheses; block number = image * groups + group.
        self.alive = torch.arange(blocks, device=device)  # (B,)
        image = torch.arange(images, device=device).repeat_interleave(config.groups)
        self.rows = image[:, None]  # (B, K) row of the state
        self.scores = torch.zeros(blocks, 1, device=device)  # (B, K) what ranks hypotheses
        self.own = torch.zeros(blocks, 1, device=device)  # (B, K) log-probability, no penalties
        self.written = torch.zeros(blocks, 1, 0, dtype=torch.long, device=device)  # (B, K, T)
        self.finished: list[list[Hypothesis]] = [[] for _ in range(blocks)]
        # (blocks, size) scores of finished hypotheses, best first
        self.best = torch.full((blocks, self.size), -torch.inf, device=device)

    def run(self) -> list[list[Hypothesis]]:
        """Return up to ``beam`` distinct hypotheses per image, best first."""
        for position in range(self.config.max_length):
            self._advance()
            self._drop_done_blocks(last=position == self.config.max_length - 1)
            if not len(self.alive):
                break
        best = [sorted(block, key=lambda h: -h.score)[: self.size] for block in self.finished]
        result = []
        for first in range(0, len(best), self.config.groups):
            of_image = chain(*best[first : first + self.config.groups])
            distinct: dict[tuple[int, ...], Hypothesis] = {}  # two groups may find the same caption
            for hypothesis in sorted(of_image, key=lambda h: -h.score):
                distinct.setdefault(hypothesis.tokens, hypothesis)
            result.append(list(distinct.values()))
        return result

    def _advance(self) -> None:
        own = self.read().log_softmax(-1)  # (rows of the state, V)
        steps = self.rules(own, self.written.flatten(0, 1)[: len(own)])
        if self.config.groups == 1:
            scores, source, token = self._continue(steps, self.rows, self.scores)
        else:
            scores, source, token = self._continue_in_groups(steps)
        gained = own[self.rows.gather(1, source), token]  # (B, 2 * size)
        own_totals = self.own.gather(1, source) + gained
        ends = token == self.specials.end
        self._finish_ended(scores, own_totals, source, ends)
        scores, kept = self._live(scores, ends)  # (B, K)
        stuck = ~(scores[:, 0] > -torch.inf)  # no token may follow; also true for NaN
        if stuck.any():  # with nothing finished, the best hypothesis becomes a caption cut short
            unfinished = [not self.finished[block] for block in self.alive.tolist()]
            block = (stuck & torch.tensor(unfinished, device=self.device)).nonzero()[:, 0]
            self._store(
                block, self.written[block, 0], self.scores[block, 0], self.own[block, 0], False
            )
        source, token = source.gather(1, kept), token.gather(1, kept)  # (B, K)
        before = self.written.gather(1, source[..., None].expand(-1, -1, self.written.shape[2]))
        self.written = torch.cat([before, token[..., None]], dim=2)  # (B, K, T + 1)
        self.scores, self.own = scores, own_totals.gather(1, kept)
        self.rows = self.rows.gather(1, source)  # the row that each live hypothesis continues

    def _continue(
        self, steps: Tensor, rows: Tensor, totals: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the best continuations of blocks: total scores, hypotheses, tokens; (B, count).

        Args:
            steps: (R, V) scores of next tokens.
            rows: (B, K), the row of ``steps`` of each hypothesis.
            totals: (B, K), scores so far.
        """
        count = min(2 * self.size, steps.shape[1])
        # The best of a block are among the best of each of its hypotheses.
        values, ids = steps.topk(count, dim=1)  # (R, count)
        candidates = (totals[..., None] + values[rows]).flatten(1)  # (B, K * count)
        scores, index = candidates.topk(min(2 * self.size, rows.shape[1] * count))
        return scores, index // count, ids[rows].flatten(1).gather(1, index)

    def _continue_in_groups(self, steps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As ``_continue``, group after group: later groups avoid the tokens of earlier ones."""
        image, group = self.alive // self.config.groups, self.alive % self.config.groups  # (B,)
        penalty = steps.new_zeros(self.images, steps.shape[1])  # (images, V)
        continuations = []
        for number in range(self.config.groups):
            blocks = (group == number).nonzero()[:, 0]  # (b,)
            rows = self.rows[blocks]  # (b, K)
            of_row = image[blocks].repeat_interleave(rows.shape[1])  # (b * K,)
            lowered = steps[rows.flatten()] - penalty[of_row]  # (b * K, V)
            own_rows = torch.arange(rows.numel(), device=self.device).view_as(rows)
            scores, source, token = self._continue(lowered, own_rows, self.scores[blocks])
            live, kept = self._live(scores, token == self.specials.end)  # (b, K)
            penalty.index_put_(
                (image[blocks][:, None].expand_as(kept), token.gather(1, kept)),
                self.config.diversity * live.isfinite().float(),
                accumulate=True,
            )
            continuations.append((blocks, scores, source, token))
        blocks, scores, source, token = map(torch.cat, zip(*continuations, strict=True))
        back = blocks.argsort()
        return scores[back], source[back], token[back]

    def _live(self, scores: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
        """Return scores and indices (B, K) of the continuations that live on, best first."""
        going = scores.masked_fill(ends, -torch.inf).topk(min(self.size, scores.shape[1]))
        return going.values, going.indices

    def _finish_ended(self, scores: Tensor, own: Tensor, source: Tensor, ends: Tensor) -> None:
        """Store the hypotheses that end among the best ``size`` continuations of their block."""
        length = self.written.shape[2] + 1
        first = scores[:, : self.size]
        ended = ends[:, : self.size] & first.isfinite()
        ranked = (first / length**self.config.length_penalty).masked_fill(~ended, -torch.inf)
        both = torch.cat([self.best[self.alive], ranked], dim=1)
        self.best[self.alive] = both.topk(self.size).values
        block, rank = ended.nonzero(as_tuple=True)
        ids = self.written[block, source[block, rank]]  # (hypotheses, T)
        self._store(block, ids, first[block, rank], own[block, rank], True)

    def _store(self, block: Tensor, ids: Tensor, scores: Tensor, own: Tensor, ended: bool) -> None:
        """Add hypotheses (N,) with their ids (N, T) to the finished ones of their blocks (N,)."""
        length = ids.shape[1] + ended
        table = zip(*(t.tolist() for t in (self.alive[block], ids, scores, own)), strict=True)
        for owner, tokens, score, log_probability in table:
            self.finished[owner].append(
                Hypothesis(tuple(tokens), log_probability, self.ranked(score, length), ended)
            )

    def _drop_done_blocks(self, last: bool) -> None:
        """Drop blocks that are done; at the end, keep live hypotheses as captions cut short."""
        best, length = self.scores[:, 0], self.written.shape[2]  # (B,)
        if last:
            live = (self.scores > -torch.inf).nonzero(as_tuple=True)
            self._store(live[0], self.written[live], self.scores[live], self.own[live], False)
        done = best / length**self.config.length_penalty <= self.best[self.alive, -1]
        kept = (~done & (best > -torch.inf) & (not last)).nonzero()[:, 0]
        self.alive, self.rows, self.written = self.alive[kept], self.rows[kept], self.written[kept]
        self.scores, self.own = self.scores[kept], self.own[kept]
        if len(kept):
            self.tokens = self.written[:, :, -1].flatten()  # (M,)
            self.state = self.state.select(self.rows.flatten())
            self.rows = torch.arange(self.rows.numel(), device=self.device).view_as(self.rows)
