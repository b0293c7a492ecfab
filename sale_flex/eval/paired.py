# SPDX-License-Identifier: BSD-3-Clause
"""A rise beside dense attention on the same tokens, with a confidence interval."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

SEGMENT = 256
"""Tokens that are drawn together: neighbours' losses go together."""

DRAWS = 2000
CONFIDENCE = 0.95


class Rise(NamedTuple):
    """Of a mean loss, in nats."""

    mean: float
    low: float
    high: float
    """Where the mean lies with 95 % confidence, as far as these texts stand for others."""

    def __str__(self) -> str:
        return f"{self.mean:+.4f} [{self.low:+.4f}, {self.high:+.4f}]"


def segment_sums(losses: Tensor) -> list[float]:
    """Sums of a sequence's losses, float32 ``[targets]``, over segments; the last one is shorter."""
    return [part.double().sum().item() for part in losses.split(SEGMENT)]


def rise_of(sparse: Sequence[Sequence[float]], dense: Sequence[Sequence[float]], targets: Sequence[int]) -> Rise:
    """The rise in mean loss, by a paired bootstrap over segments with a seed of its own.

    Args:
        sparse: `segment_sums` of every sequence.
        dense: Those of dense attention on the same sequences.
        targets: Predicted tokens of every sequence.

    Raises:
        ValueError: They are of different sequences, or of none.
    """
    sizes = [[min(SEGMENT, count - first) for first in range(0, count, SEGMENT)] for count in targets]
    if not sizes or not ([len(x) for x in sparse] == [len(x) for x in dense] == [len(x) for x in sizes]):
        raise ValueError("sparse and dense must be losses of the same tokens, one sequence or more.")
    sums, base, counts = (torch.tensor([x for part in of for x in part]).double() for of in (sparse, dense, sizes))
    rises = sums - base
    drawn = torch.randint(len(rises), (DRAWS, len(rises)), generator=torch.Generator().manual_seed(0))
    means = rises[drawn].sum(1) / counts[drawn].sum(1)
    tail = (1 - CONFIDENCE) / 2
    low, high = means.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return Rise((rises.sum() / counts.sum()).item(), low, high)
