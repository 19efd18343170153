"""Sinusoidal position encodings (arXiv 1706.03762) for sequences and grids (notebook 05)."""

import math

import torch
from torch import Tensor


def sinusoids(positions: Tensor, width: int) -> Tensor:
    """Encode ``positions`` (N,) as sines and cosines: (N, width).

    The wavelengths rise from 2 pi to 10000 x 2 pi.
    """
    rates = 10000 ** (-torch.arange(0, width, 2) / width)
    angles = positions[:, None] * rates  # (N, width / 2)
    return torch.cat([angles.sin(), angles.cos()], dim=1)[:, :width]


def grid_sinusoids(positions: int, width: int) -> Tensor:
    """Encode the cells of a grid: (positions, width).

    Row and column get half of the width each. A grid that is not square is encoded as a sequence.
    """
    side = math.isqrt(positions)
    if side * side != positions:
        return sinusoids(torch.arange(positions), width)
    row, column = torch.arange(positions) // side, torch.arange(positions) % side
    return torch.cat([sinusoids(row, width // 2), sinusoids(column, width - width // 2)], dim=1)
