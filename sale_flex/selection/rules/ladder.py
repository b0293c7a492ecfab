# SPDX-License-Identifier: BSD-3-Clause
"""Scores on a ladder of thresholds: what a rule says of every block at all thresholds, in one pass."""

import torch
from torch import Tensor

from sale_flex.kernels.arguments import Grid

LADDER = (*(2.0**-octave * (1 + eighth / 8) for octave in range(14, 0, -1) for eighth in range(8)), 1.0)
"""Thresholds from 2**-14 to 1, ascending: eight to an octave, evenly spaced inside it as a float's mantissa is."""


def steps_reached(values: Tensor, limits: Tensor) -> Tensor:
    """How many of a row's ascending limits each of its values reaches, int32: ``[..., J]`` and ``[..., 115]``."""
    return torch.searchsorted(limits.contiguous(), values.contiguous(), right=True, out_int32=True)


def scores_of(reached: Tensor) -> Tensor:
    """The largest threshold of so many reached ones; -inf for none, not even 0."""
    return torch.tensor([-torch.inf, 0.0, *LADDER, torch.inf], device=reached.device)[reached.long()]


def no_scores(query: Tensor, grid: Grid) -> Tensor:
    """Scores of blocks of which none is hit at any threshold, ``[B, Hq, nq, nk]``."""
    shape = (*query.shape[:2], grid.query_blocks, grid.key_blocks)
    return torch.full(shape, -torch.inf, device=query.device)
