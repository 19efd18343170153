"""Sinusoidal position encodings for sequences and grids (notebook 05)."""

import math

import torch
from torch import Tensor


def sinusoids(places: Tensor, width: int) -> Tensor:
    """Sines and cosines of ``places`` (N,) at wavelengths from 2 pi to 10000 x 2 pi: (N, width)."""
    rates = 10000 ** (-torch.arange(0, width, 2) / width)
    angles = places[:, None] * rates  # (N, width / 2)
    return torch.cat([angles.sin(), angles.cos()], dim=1)[:, :width]


def grid_sinusoids(positions: int, width: int) -> Tensor:
    """Sines and cosines of row and column, half of the width each, for a square grid; one axis for
    any other."""
    side = math.isqrt(positions)
    if side * side != positions:
        return sinusoids(torch.arange(positions), width)
    row, column = torch.arange(positions) // side, torch.arange(positions) % side
    return torch.cat([sinusoids(row, width // 2), sinusoids(column, width - width // 2)], dim=1)
