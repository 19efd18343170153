"""One batched engine for every captioner: greedy and beam search over ``start`` and ``step``."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm.auto import tqdm

from capgen_utils.config import DecodingConfig
from capgen_utils.datasets import Manifest
from capgen_utils.features import FeatureCache
from capgen_utils.files import CapGenError
from capgen_utils.text import Tokenizer


class Steps(Protocol):
    """The part of a captioner that decoding needs."""

    def start(self, memory: Any) -> Any:
        """Return the state before the first token, one hypothesis an image."""
        ...

    def step(self, tokens: Tensor, state: Any, attention: bool = False) -> tuple[Tensor, Any, Any]:
        """Read one token for each hypothesis; see ``models.CaptionModel.step``."""
        ...


@dataclass(frozen=True)
class Specials:
    """The ids decoding has to know: where a caption begins and ends, and what is never emitted."""

    start: int
    end: int
    banned: tuple[int, ...] = ()


@dataclass(frozen=True)
class Hypothesis:
    """A decoded caption.

    Attributes:
        tokens: ids without start and end token.
        log_probability: natural logarithm, summed over the tokens and the end token.
        score: what hypotheses were ranked by: log-probability / length ** length_penalty.
        ended: the end token was emitted; false where the caption was cut at the maximum length.
    """

    tokens: tuple[int, ...]
    log_probability: float
    score: float
    ended: bool


@torch.inference_mode()
def decode(
    model: Steps, memory: Any, images: int, specials: Specials, config: DecodingConfig
) -> list[list[Hypothesis]]:
    """Search captions for ``images`` images.

    Args:
        model: a captioner, in eval mode.
        memory: from its ``encode``.
        images: number of images in ``memory``.
        specials: token ids.
        config: ``beam`` 1 is greedy search.

    Returns:
        For each image its hypotheses, best first: one for greedy search, up to ``beam`` for beam search.

    Raises:
        CapGenError: a beam or length below 1.
    """
    if config.beam < 1 or config.max_length < 1:
        raise CapGenError(
            f"beam {config.beam} and maximum length {config.max_length} are not possible",
            "both are 1 or more",
        )
    if config.beam == 1:
        return [[hypothesis] for hypothesis in _greedy(model, memory, images, specials, config)]
    return _Beam(model, memory, images, specials, config).run()


def log_probabilities(logits: Tensor, banned: Sequence[int]) -> Tensor:
    """Return log-softmax (M, V) in fp32 over the tokens that may be emitted; banned ones get -inf."""
    logits = logits.float()
    if banned:
        logits[:, list(banned)] = -torch.inf
    return logits.log_softmax(-1)


def _greedy(model: Steps, memory: Any, images: int, specials: Specials, config: DecodingConfig) -> list[Hypothesis]:
    state = model.start(memory)
    device = _device(state)
    alive = torch.arange(images, device=device)  # which image each live row belongs to
    tokens = torch.full((images,), specials.start, device=device)
    written = torch.full((images, config.max_length), specials.end, device=device)
    totals = torch.zeros(images, device=device)
    for position in range(config.max_length):
        logits, state, _ = model.step(tokens, state)
        best, tokens = log_probabilities(logits, specials.banned).max(-1)
        totals[alive] += best
        written[alive, position] = tokens
        going = tokens != specials.end
        if not going.all():
            rows = going.nonzero()[:, 0]
            alive, tokens, state = alive[rows], tokens[rows], state.select(rows)
        if not len(alive):
            break
    unfinished = set(alive.tolist())
    return [
        _hypothesis(written[i].tolist(), totals[i].item(), i not in unfinished, specials, config) for i in range(images)
    ]


def _device(state: Any) -> torch.device:
    return next(v.device for v in vars(state).values() if isinstance(v, Tensor))


def _hypothesis(
    ids: Sequence[int], log_probability: float, ended: bool, specials: Specials, config: DecodingConfig
) -> Hypothesis:
    tokens = tuple(ids[: ids.index(specials.end)] if specials.end in ids else ids)
    length = len(tokens) + ended
    return Hypothesis(tokens, log_probability, log_probability / length**config.length_penalty, ended)


class _Beam:
    """Beam search for many images at once.

    Every step scores all live hypotheses together. The 2 x beam best continuations of an image are looked at:
    those that end are finished hypotheses, the best ``beam`` others live on. An image is done, and its rows leave
    the batch, when ``beam`` hypotheses have finished and the best live one, ranked at its present length, is no
    better than the worst of them (the library's ``early_stopping=False``).
    """

    def __init__(self, model: Steps, memory: Any, images: int, specials: Specials, config: DecodingConfig) -> None:
        self.model, self.specials, self.config = model, specials, config
        self.state = model.start(memory)
        self.device = _device(self.state)
        self.alive = list(range(images))  # which image each block of live rows belongs to
        self.finished: list[list[Hypothesis]] = [[] for _ in range(images)]
        self.scores = torch.zeros(images, 1, device=self.device)  # (live images, hypotheses)
        self.written = torch.zeros(images, 1, 0, dtype=torch.long, device=self.device)
        self.tokens = torch.full((images,), specials.start, device=self.device)

    def run(self) -> list[list[Hypothesis]]:
        for position in range(self.config.max_length):
            self._advance(last=position == self.config.max_length - 1)
            if not self.alive:
                break
        return [sorted(found, key=lambda h: -h.score)[: self.config.beam] for found in self.finished]

    def _advance(self, last: bool) -> None:
        logits, self.state, _ = self.model.step(self.tokens, self.state)
        step = log_probabilities(logits, self.specials.banned)
        size = step.shape[-1]
        hypotheses = self.scores.shape[1]
        total = self.scores[..., None] + step.view(len(self.alive), hypotheses, size)
        count = min(2 * self.config.beam, hypotheses * size)
        scores, flat = total.flatten(1).topk(count, dim=1)  # (live images, count)
        source, token = flat // size, flat % size
        ends = token == self.specials.end
        self._collect(scores, source, ends)
        kept = scores.masked_fill(ends, -torch.inf).topk(min(self.config.beam, count), dim=1).indices
        self.scores = scores.masked_fill(ends, -torch.inf).gather(1, kept)
        source, token = source.gather(1, kept), token.gather(1, kept)
        before = self.written.gather(1, source[..., None].expand(-1, -1, self.written.shape[2]))
        self.written = torch.cat([before, token[..., None]], dim=2)
        base = torch.arange(len(self.alive), device=self.device)[:, None] * hypotheses
        self._compact(base + source, token, last)

    def _collect(self, scores: Tensor, source: Tensor, ends: Tensor) -> None:
        """Store the hypotheses that end among the best ``beam`` continuations of their image."""
        ranked = ends[:, : self.config.beam] & scores[:, : self.config.beam].isfinite()
        for block, rank in ranked.nonzero().tolist():
            ids = self.written[block, source[block, rank]].tolist()
            found = _hypothesis(ids, scores[block, rank].item(), True, self.specials, self.config)
            self.finished[self.alive[block]].append(found)

    def _compact(self, rows: Tensor, token: Tensor, last: bool) -> None:
        """Drop the images that are done; at the end, keep what is unfinished as captions cut short."""
        if last:
            self._finish_last()
            return
        best = self.scores.max(1).values.tolist()
        blocks = [i for i, image in enumerate(self.alive) if not self._is_done(self.finished[image], best[i])]
        keep = torch.tensor(blocks, dtype=torch.long, device=self.device)
        self.alive = [self.alive[i] for i in blocks]
        self.scores, self.written = self.scores[keep], self.written[keep]
        self.tokens = token[keep].flatten()
        if blocks:
            self.state = self.state.select(rows[keep].flatten())

    def _is_done(self, finished: list[Hypothesis], best: float) -> bool:
        if best == -torch.inf:
            return True
        if len(finished) < self.config.beam:
            return False
        worst = sorted((h.score for h in finished), reverse=True)[self.config.beam - 1]
        return best / self.written.shape[2] ** self.config.length_penalty <= worst

    def _finish_last(self) -> None:
        """All tokens are used up: hypotheses that still live are taken as they are, cut short."""
        for block, image in enumerate(self.alive):
            for rank in range(self.scores.shape[1]):
                score = self.scores[block, rank].item()
                if score > -torch.inf:
                    ids = self.written[block, rank].tolist()
                    self.finished[image].append(_hypothesis(ids, score, False, self.specials, self.config))
        self.alive = []


def decode_features(
    model: Any, features: Tensor, specials: Specials, config: DecodingConfig, dtype: torch.dtype = torch.float32
) -> list[list[Hypothesis]]:
    """Encode ``features`` (B, ...) and search captions; fp32 unless asked otherwise."""
    device = next(model.parameters()).device
    reduced = dtype != torch.float32
    with torch.inference_mode(), torch.autocast(device.type, dtype=dtype) if reduced else nullcontext():
        memory = model.encode(features.to(device).float())
        return decode(model, memory, len(features), specials, config)


def caption_manifest(
    model: Any,
    manifest: Manifest,
    cache: FeatureCache,
    tokenizer: Tokenizer,
    decoding: DecodingConfig,
    batch_size: int = 64,
    progress: bool = False,
) -> dict[str, str]:
    """Caption every image of ``manifest`` from cached features: image -> best caption."""
    specials = Specials(tokenizer.start_id, tokenizer.end_id, tokenizer.banned_ids)
    names = [item.image for item in manifest.items if item.image not in cache.failed]
    captions: dict[str, str] = {}
    for start in tqdm(range(0, len(names), batch_size), desc="captioning", unit="batch", disable=not progress):
        part = names[start : start + batch_size]
        found = decode_features(model, cache.rows(part), specials, decoding)
        captions |= {name: tokenizer.decode(best[0].tokens) for name, best in zip(part, found, strict=True)}
    return captions
