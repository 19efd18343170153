"""Rules on next-token scores, and sampling: plain functions on (M, V) (notebook 08)."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

SHORTLIST = 256  # tokens; usually enough for the nucleus, so that few rows are fully sorted


def allowed(logits: Tensor, banned: Sequence[int]) -> Tensor:
    """Return logits (M, V) in fp32, banned tokens at -inf; fp32 logits are overwritten."""
    logits = logits.float()
    if banned:
        logits[:, list(banned)] = -torch.inf
    return logits


def log_probabilities(logits: Tensor, banned: Sequence[int]) -> Tensor:
    """Return log-softmax (M, V) in fp32 over the allowed tokens; banned ones get -inf."""
    return allowed(logits, banned).log_softmax(-1)


def penalise_repetition(scores: Tensor, written: Tensor, penalty: float) -> Tensor:
    """Return scores (M, V) in which the tokens of ``written`` (M, T) are less likely.

    The penalty of CTRL (arXiv 1909.05858) as in the transformers library: positive scores are
    divided by it, negative ones multiplied. Log-probabilities, as in beam search, are all negative.
    """
    repeated = scores.gather(1, written)  # (M, T)
    lowered = torch.where(repeated < 0, repeated * penalty, repeated / penalty)
    return scores.scatter(1, written, lowered)


def forbid_repeated_ngrams(scores: Tensor, written: Tensor, size: int) -> Tensor:
    """Return scores (M, V) with -inf for tokens that would repeat an n-gram of ``written`` (M, T).

    ``size`` is n.
    """
    length = written.shape[1]
    if length < size:
        return scores
    ngrams = written.unfold(1, size, 1)  # (M, T - size + 1, size)
    last = written[:, length + 1 - size :]  # (M, size - 1), the start of the next n-gram
    row, position = (ngrams[..., :-1] == last[:, None]).all(-1).nonzero(as_tuple=True)
    scores = scores.clone()
    scores[row, ngrams[row, position, -1]] = -torch.inf
    return scores


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Return logits (M, V) with all but the ``k`` highest of each row at -inf; 0 keeps all."""
    if not 0 < k < logits.shape[1]:
        return logits
    return logits.masked_fill(logits < logits.topk(k).values[:, -1:], -torch.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Return logits (M, V) with all tokens outside the nucleus at -inf (arXiv 1904.09751).

    The nucleus is the smallest set of most likely tokens with a total probability of ``p``.
    """
    if p >= 1:
        return logits
    probabilities = logits.softmax(-1)  # (M, V)
    likely = probabilities.topk(min(SHORTLIST, logits.shape[1])).values  # (M, K), highest first
    least, flat = _least_likely(likely, p), likely.sum(-1) < p
    if flat.any():
        least[flat] = _least_likely(probabilities[flat].sort(descending=True).values, p)
    return logits.masked_fill(probabilities < least, -torch.inf)


def _least_likely(likely: Tensor, p: float) -> Tensor:
    """Return the lowest probability (M, 1) in the nucleus of sorted ones (M, K)."""
    before = likely.cumsum(-1) - likely  # total probability of the more likely tokens
    return likely.masked_fill(before >= p, torch.inf).amin(-1, keepdim=True)


def draw(probabilities: Tensor, numbers: Tensor) -> Tensor:
    """Sample a token (M,) from each row of ``probabilities`` (M, V) by inverse transform sampling.

    Args:
        probabilities: rows need not sum to 1.
        numbers: (M,) uniform in [0, 1).
    """
    cumulative = probabilities.cumsum(-1)  # (M, V)
    total = cumulative[:, -1:]  # (M, 1)
    below = torch.minimum(numbers[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, below, right=True)[:, 0]


def uniform_numbers(seed: int, keys: Sequence[int], samples: int, length: int) -> Tensor:
    """Return uniform numbers in [0, 1), (len(keys) * samples, length).

    Each row depends only on the seed, the key and the number of the sample. So samples of an image
    depend neither on the other images of the batch nor on how many samples there are.
    """
    rows = [
        np.random.default_rng([seed, key, sample]).random(length, dtype=np.float32)
        for key in keys
        for sample in range(samples)
    ]
    return torch.from_numpy(np.stack(rows))
