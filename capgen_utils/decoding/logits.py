"""What is done to the scores of next tokens before one is chosen, and how one is drawn: plain
functions on (M, V)."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

SHORTLIST = 256  # tokens that mostly hold the nucleus, so that few rows are sorted whole


def allowed(logits: Tensor, banned: Sequence[int]) -> Tensor:
    """Return logits (M, V) in fp32, banned tokens at -inf; fp32 logits are overwritten."""
    logits = logits.float()
    if banned:
        logits[:, list(banned)] = -torch.inf
    return logits


def log_probabilities(logits: Tensor, banned: Sequence[int]) -> Tensor:
    """Return log-softmax (M, V) in fp32 over the tokens that may be emitted; banned ones get -inf."""
    return allowed(logits, banned).log_softmax(-1)


def penalise_repetition(scores: Tensor, written: Tensor, penalty: float) -> Tensor:
    """Make each token of ``written`` (M, T) less likely: divide its score in (M, V), or multiply it
    where negative.

    The penalty of CTRL (arXiv 1909.05858) in the library's form. On logits it divides what is
    positive; on log-probabilities, as in beam search, it always multiplies.
    """
    said = scores.gather(1, written)
    return scores.scatter(1, written, torch.where(said < 0, said * penalty, said / penalty))


def forbid_repeated_ngrams(scores: Tensor, written: Tensor, size: int) -> Tensor:
    """Return scores (M, V) with -inf for tokens that would repeat a run of ``size`` tokens of
    ``written`` (M, T)."""
    length = written.shape[1]
    if length < size:
        return scores
    ngrams = written.unfold(1, size, 1)  # (M, T - size + 1, size)
    last = written[:, length + 1 - size :]  # the tokens that the next one would complete
    row, place = (ngrams[..., :-1] == last[:, None]).all(-1).nonzero(as_tuple=True)
    scores = scores.clone()
    scores[row, ngrams[row, place, -1]] = -torch.inf
    return scores


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Return logits (M, V) with all but the ``k`` highest of each row at -inf; 0 keeps all."""
    if not 0 < k < logits.shape[1]:
        return logits
    return logits.masked_fill(logits < logits.topk(k).values[:, -1:], -torch.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Return logits (M, V) with all outside the nucleus at -inf (arXiv 1904.09751).

    The nucleus are the most likely tokens, as few as hold a probability of ``p`` together.
    """
    if p >= 1:
        return logits
    probabilities = logits.softmax(-1)
    likely = probabilities.topk(min(SHORTLIST, logits.shape[1])).values  # highest first
    least, flat = _least_likely(likely, p), likely.sum(-1) < p
    if flat.any():
        least[flat] = _least_likely(probabilities[flat].sort(descending=True).values, p)
    return logits.masked_fill(probabilities < least, -torch.inf)


def _least_likely(likely: Tensor, p: float) -> Tensor:
    """Return the lowest probability (M, 1) in the nucleus of sorted ones (M, K)."""
    before = likely.cumsum(-1) - likely  # what the more likely ones hold
    return likely.masked_fill(before >= p, torch.inf).amin(-1, keepdim=True)


def draw(probabilities: Tensor, numbers: Tensor) -> Tensor:
    """Draw a token (M,) from each row of ``probabilities`` (M, V) by inverting its cumulative
    distribution.

    Args:
        probabilities: rows need not sum to 1.
        numbers: (M,) uniform from 0 to 1, 1 left out.
    """
    cumulative = probabilities.cumsum(-1)
    total = cumulative[:, -1:]
    below = torch.minimum(numbers[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, below, right=True)[:, 0]


def uniform_numbers(seed: int, keys: Sequence[int], samples: int, length: int) -> Tensor:
    """Return uniform numbers (len(keys) * samples, length); each row hangs on seed, key and number
    of the sample only.

    So what is drawn for an image is independent of the images beside it and of how many samples
    there are.
    """
    rows = [
        np.random.default_rng([seed, key, sample]).random(length, dtype=np.float32)
        for key in keys
        for sample in range(samples)
    ]
    return torch.from_numpy(np.stack(rows))
