"""One batched search for every captioner: greedy, beam and diverse beam search, and sampling.

It needs only a captioner's ``start`` and ``step``; ``DecodingConfig`` says what to do (notebook 08).
Next-token scores are changed in the order of the transformers library: repetition penalty,
no-repeat n-grams, minimum length, banned tokens, temperature, top-k, top-p.
"""

from collections.abc import Sequence
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
        first: ``samples`` sampled ones, one for greedy search, up to ``beam`` distinct ones for beam
        search.

    Raises:
        CapGenError: the configuration is not possible.
    """
    check_decoding(config)
    if config.temperatures:
        return _Walk(model, memory, images, specials, config, config.temperatures, keys).run()
    if config.temperature or config.beam == 1:
        temperatures = (config.temperature,) * (config.samples if config.temperature else 1)
        hypotheses = _Walk(model, memory, images, specials, config, temperatures, keys).run()
    else:
        hypotheses = _Beam(model, memory, images, specials, config).run()
    return [sorted(of_image, key=lambda h: -h.score) for of_image in hypotheses]


def _device(state: Any) -> torch.device:
    return next(v.device for v in vars(state).values() if isinstance(v, Tensor))


class _Search:
    """What every search carries: the captioner, the newest token of each live hypothesis, and the
    state behind it."""

    def __init__(
        self, model: Steps, memory: Any, images: int, specials: Specials, config: DecodingConfig
    ) -> None:
        self.model, self.images, self.specials, self.config = model, images, specials, config
        self.state = model.start(memory)
        self.device = _device(self.state)
        self.tokens = torch.full((images,), specials.start, device=self.device)
        self.ruled = (
            config.repetition_penalty != 1 or config.no_repeat_ngram > 0 or config.min_length > 0
        )

    def read(self) -> Tensor:
        """Read the newest tokens; logits (M, V) of the next ones."""
        logits, self.state, _ = self.model.step(self.tokens, self.state)
        return allowed(logits, self.specials.banned)

    def rules(self, scores: Tensor, written: Tensor) -> Tensor:
        """Change scores (M, V) by what was written (M, T) before."""
        config = self.config
        if config.repetition_penalty != 1:
            scores = penalise_repetition(scores, written, config.repetition_penalty)
        if config.no_repeat_ngram:
            scores = forbid_repeated_ngrams(scores, written, config.no_repeat_ngram)
        if written.shape[1] < config.min_length:
            scores = scores.index_fill(
                1, torch.tensor([self.specials.end], device=scores.device), -torch.inf
            )
        return scores

    def ranked(self, total: float, length: int) -> float:
        """The score of a hypothesis of ``length`` tokens, its end token counted."""
        return total / max(1, length) ** self.config.length_penalty


class _Walk(_Search):
    """Greedy search and sampling: every hypothesis goes its own way, at its own temperature.

    Row ``image * len(temperatures) + n`` is an image's hypothesis n. What has ended leaves the
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
        self.each, rows, length = len(temperatures), images * len(temperatures), config.max_length
        self.alive = torch.arange(rows, device=self.device)
        self.asked = tuple(temperatures)
        self.temperatures = torch.tensor(
            temperatures, dtype=torch.float32, device=self.device
        ).repeat(images)
        self.numbers = None
        if any(temperatures):
            keys = range(images) if keys is None else keys
            self.numbers = uniform_numbers(config.seed, keys, self.each, length).to(self.device)
        self.written = torch.full((rows, length), specials.end, device=self.device)
        self.lengths = torch.zeros(rows, dtype=torch.long, device=self.device)
        self.totals = torch.zeros(rows, device=self.device)
        self.ended = torch.zeros(rows, dtype=torch.bool, device=self.device)

    def run(self) -> list[list[Hypothesis]]:
        """Return ``len(temperatures)`` hypotheses for each image."""
        for position in range(self.config.max_length):
            self._advance(position)
            if not len(self.alive):
                break
        table = zip(
            *(t.tolist() for t in (self.written, self.lengths, self.totals, self.ended)),
            strict=True,
        )
        found = [
            Hypothesis(
                tuple(ids[:length]), total, self.ranked(total, length + ended), ended, temperature
            )
            for (ids, length, total, ended), temperature in zip(
                table, self.asked * self.images, strict=True
            )
        ]
        return [found[start : start + self.each] for start in range(0, len(found), self.each)]

    def _advance(self, position: int) -> None:
        logits = self.read()
        if (
            position == 0 and self.each > 1
        ):  # the start token was read once for all hypotheses of an image
            rows = torch.arange(self.images, device=self.device).repeat_interleave(self.each)
            logits, self.state = logits[rows], self.state.select(rows)
        own = logits.log_softmax(-1)
        scores = self.rules(logits, self.written[self.alive, :position]) if self.ruled else own
        best, tokens = scores.max(-1)
        possible = best > -torch.inf  # false also where the scores are not numbers
        if self.numbers is not None:
            tokens = self._draw(
                scores, torch.where(possible, tokens, self.specials.end), self.numbers[:, position]
            )
        going = possible & (tokens != self.specials.end)
        gained = own.gather(1, tokens[:, None])[:, 0]
        self.totals[self.alive] += torch.where(possible, gained, 0)
        self.written[self.alive, position] = tokens
        self.lengths[self.alive] += going
        self.ended[self.alive] = possible & ~going
        if not going.all():
            kept = going.nonzero()[:, 0]
            self.alive, tokens = self.alive[kept], tokens[kept]
            self.state = self.state.select(kept) if len(kept) else self.state
        self.tokens = tokens

    def _draw(self, scores: Tensor, likeliest: Tensor, numbers: Tensor) -> Tensor:
        """Draw where the temperature is above 0; take the likeliest token elsewhere."""
        temperatures = self.temperatures[self.alive]
        drawing = (temperatures > 0) & (scores.amax(-1) > -torch.inf)
        scaled = scores / torch.where(temperatures > 0, temperatures, 1)[:, None]
        kept = keep_top_p(keep_top_k(scaled, self.config.top_k), self.config.top_p)
        return torch.where(drawing, draw(kept.softmax(-1), numbers[self.alive]), likeliest)


class _Beam(_Search):
    """Beam search for many images at once, in one group or several that keep apart (arXiv
    1610.02424).

    A block is one group of one image: up to ``beam / groups`` live hypotheses. Every step scores
    all of them together.
    Of a block, the best continuations are looked at, twice as many as it holds: those that end
    among the first half are finished, the best others live on. It is done, and its rows leave the
    batch, when it has found as many as it holds and the best live one, ranked at its present
    length, is no better than the worst of them (the library's ``early_stopping=False``). From the
    second group of an image on, a token's log-probability is lowered by ``diversity`` for each
    hypothesis of the groups before that goes on with it (Hamming diversity).
    """

    def __init__(
        self, model: Steps, memory: Any, images: int, specials: Specials, config: DecodingConfig
    ) -> None:
        super().__init__(model, memory, images, specials, config)
        blocks, device = images * config.groups, self.device
        self.size = config.beam // config.groups
        self.alive = torch.arange(
            blocks, device=device
        )  # image * groups + group of each live block
        self.rows = torch.arange(images, device=device).repeat_interleave(config.groups)[
            :, None
        ]  # of the state
        self.scores = torch.zeros(
            blocks, 1, device=device
        )  # (live blocks, hypotheses): what ranks them
        self.own = torch.zeros(blocks, 1, device=device)  # log-probabilities without penalties
        self.written = torch.zeros(blocks, 1, 0, dtype=torch.long, device=device)
        self.finished: list[list[Hypothesis]] = [[] for _ in range(blocks)]
        self.best = torch.full(
            (blocks, self.size), -torch.inf, device=device
        )  # scores of finished ones, best first

    def run(self) -> list[list[Hypothesis]]:
        """Return up to ``beam`` distinct hypotheses for each image."""
        for position in range(self.config.max_length):
            self._advance()
            self._compact(last=position == self.config.max_length - 1)
            if not len(self.alive):
                break
        return [self._of_image(image) for image in range(self.images)]

    def _of_image(self, image: int) -> list[Hypothesis]:
        blocks = self.finished[image * self.config.groups : (image + 1) * self.config.groups]
        found = [h for block in blocks for h in sorted(block, key=lambda h: -h.score)[: self.size]]
        distinct: dict[tuple[int, ...], Hypothesis] = {}
        for hypothesis in sorted(
            found, key=lambda h: -h.score
        ):  # two groups may have come to the same caption
            distinct.setdefault(hypothesis.tokens, hypothesis)
        return list(distinct.values())

    def _advance(self) -> None:
        own = self.read().log_softmax(-1)  # (rows of the state, V)
        steps = self.rules(own, self.written.flatten(0, 1)[: len(own)]) if self.ruled else own
        if self.config.groups == 1:
            scores, source, token = self._continue(steps, self.rows, self.scores)
        else:
            scores, source, token = self._continue_in_groups(steps)
        gained = own[self.rows.gather(1, source), token]
        own_totals = self.own.gather(1, source) + gained
        ends = token == self.specials.end
        self._collect(scores, own_totals, source, ends)
        scores, kept = self._live(scores, ends)
        stuck = ~(scores[:, 0] > -torch.inf)  # also where the scores are not numbers
        if stuck.any():
            self._keep_stuck(stuck)
        source, token = source.gather(1, kept), token.gather(1, kept)
        before = self.written.gather(1, source[..., None].expand(-1, -1, self.written.shape[2]))
        self.written = torch.cat([before, token[..., None]], dim=2)
        self.scores, self.own = scores, own_totals.gather(1, kept)
        self.rows = self.rows.gather(1, source)  # where each live hypothesis comes from

    def _continue(
        self, steps: Tensor, rows: Tensor, totals: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the best continuations of blocks: total scores, hypotheses they continue, tokens;
        (blocks, count).

        Args:
            steps: (R, V) scores of next tokens.
            rows: (blocks, hypotheses), the row of ``steps`` of each hypothesis.
            totals: (blocks, hypotheses), scores so far.
        """
        count = min(2 * self.size, steps.shape[1])
        values, ids = steps.topk(count, dim=1)  # each hypothesis's best hold the best of all
        scores, place = (
            (totals[..., None] + values[rows])
            .flatten(1)
            .topk(min(2 * self.size, rows.shape[1] * count))
        )
        return scores, place // count, ids[rows].flatten(1).gather(1, place)

    def _continue_in_groups(self, steps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As ``_continue`` for all blocks, group after group: later ones shun the tokens of earlier
        ones."""
        image, group = self.alive // self.config.groups, self.alive % self.config.groups
        shunned = steps.new_zeros(self.images, steps.shape[1])
        order, found = [], []
        for number in range(self.config.groups):
            blocks = (group == number).nonzero()[:, 0]
            rows = self.rows[blocks]
            lowered = (
                steps[rows.flatten()] - shunned[image[blocks].repeat_interleave(rows.shape[1])]
            )
            own_rows = torch.arange(rows.numel(), device=self.device).view_as(rows)
            scores, source, token = self._continue(lowered, own_rows, self.scores[blocks])
            live, kept = self._live(scores, token == self.specials.end)
            shunned.index_put_(
                (image[blocks][:, None].expand_as(kept), token.gather(1, kept)),
                self.config.diversity * live.isfinite().float(),
                accumulate=True,
            )
            order.append(blocks)
            found.append((scores, source, token))
        place = torch.cat(order).argsort()
        scores, source, token = (torch.cat(parts)[place] for parts in zip(*found, strict=True))
        return scores, source, token

    def _live(self, scores: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
        """Return scores and places of the continuations that live on, best first."""
        going = scores.masked_fill(ends, -torch.inf).topk(min(self.size, scores.shape[1]))
        return going.values, going.indices

    def _collect(self, scores: Tensor, own: Tensor, source: Tensor, ends: Tensor) -> None:
        """Store the hypotheses that end among the best continuations of their block, as many as it
        holds."""
        length = self.written.shape[2] + 1
        first, ended = (
            scores[:, : self.size],
            ends[:, : self.size] & scores[:, : self.size].isfinite(),
        )
        ranked = (first / length**self.config.length_penalty).masked_fill(~ended, -torch.inf)
        self.best[self.alive] = (
            torch.cat([self.best[self.alive], ranked], dim=1).topk(self.size).values
        )
        block, rank = ended.nonzero(as_tuple=True)
        ids = self.written[block, source[block, rank]]
        self._store(block, ids, first[block, rank], own[block, rank], True)

    def _store(self, block: Tensor, ids: Tensor, scores: Tensor, own: Tensor, ended: bool) -> None:
        length = ids.shape[1] + ended
        table = zip(*(t.tolist() for t in (self.alive[block], ids, scores, own)), strict=True)
        for owner, tokens, score, log_probability in table:
            found = Hypothesis(tuple(tokens), log_probability, self.ranked(score, length), ended)
            self.finished[owner].append(found)

    def _keep_stuck(self, stuck: Tensor) -> None:
        """Where no token may follow and nothing has finished, keep the best hypothesis as a caption
        cut short."""
        empty = torch.tensor(
            [not self.finished[i] for i in self.alive.tolist()], device=self.device
        )
        block = (stuck & empty).nonzero()[:, 0]
        self._store(block, self.written[block, 0], self.scores[block, 0], self.own[block, 0], False)

    def _compact(self, last: bool) -> None:
        """Drop the blocks that are done; at the end, keep what is unfinished as captions cut short."""
        best, length = self.scores[:, 0], self.written.shape[2]
        if last:
            block, rank = (self.scores > -torch.inf).nonzero(as_tuple=True)
            self._store(
                block,
                self.written[block, rank],
                self.scores[block, rank],
                self.own[block, rank],
                False,
            )
        done = best / length**self.config.length_penalty <= self.best[self.alive, -1]
        kept = (~done & (best > -torch.inf) & (not last)).nonzero()[:, 0]
        if len(kept) < len(done):
            self.alive, self.rows = self.alive[kept], self.rows[kept]
            self.scores, self.own, self.written = (
                self.scores[kept],
                self.own[kept],
                self.written[kept],
            )
        if len(kept):
            self.tokens = self.written[:, :, -1].flatten()
            self.state = self.state.select(self.rows.flatten())
            self.rows = torch.arange(self.rows.numel(), device=self.device).view_as(self.rows)
