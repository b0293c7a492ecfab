# SPDX-License-Identifier: BSD-3-Clause
"""Masses, and what they decide: levels, cuts, and how a budget raises them."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

LEVELS = 128
"""Decisions are made in steps of an eighth of an octave, from one step below the threshold up."""


class RowMasses(NamedTuple):
    """How pooled rows' softmax is spread over the blocks, in a unit of the row's own: its exact part, if any."""

    sums: Tensor
    """``[B, Hq, np, nk]``: the candidates'; 0 for other blocks."""
    exact: Tensor
    """``[B, Hq, np]``: 1 for the exact part, 0 where all that the row sees is in candidates."""
    total: Tensor
    """``[B, Hq, np]``: the exact part and the candidates' sums."""
    candidate: Tensor
    """bool ``[B, Hq, np, nk]``: blocks that are weighed for this row. None for rows that see nothing."""
    finite: Tensor
    """bool ``[B, Hq, np]``: whether the pooled row is; of others, sums and total mean nothing."""
    unit: Tensor
    """``[B, Hq, np]``: base-2 logarithm of the unit."""

    @property
    def mass(self) -> Tensor:
        """``[B, Hq, np, nk]``: the candidates' shares of the row's softmax; with `rest` they sum to 1."""
        return self.sums / self.total[..., None]

    @property
    def rest(self) -> Tensor:
        """``[B, Hq, np]``: the share of all keys that lie in no candidate."""
        return self.exact / self.total


class Decision(NamedTuple):
    """What masses decide; the first three as in `KeepMap`, on candidates."""

    hit: Tensor
    margin: Tensor
    dropped: Tensor
    raised: Tensor
    """int64 ``[B, Hq, nq]``: by how many levels the budget raised the cuts."""


def decide(masses: RowMasses, threshold: Tensor, unasked: Tensor, rows: int, budget: int | None) -> Decision:
    """Which blocks their masses hit; `unasked` blocks do not count for the budget.

    A level is a float's bits from the threshold's on, in eighths of an octave of a straight mantissa, rounded down: 1
    at the threshold, 0 below it and 127 at most. A block is hit if the level of a pooled row's sum is not below the
    level of the row's cut, the threshold times its total. Where that makes more blocks than the budget, cuts rise level
    by level, as often as it takes, and rows that are not finite ask for nothing.

    Args:
        masses: Of all pooled rows.
        threshold: float32 ``[Hq, 1]``.
        unasked: bool ``[B, Hq, nq, nk]``.
        rows: Pooled rows a query block.
        budget: Most hits of a query block.
    """

    def by_block(x: Tensor) -> Tensor:
        return x.unflatten(2, (-1, rows))

    def level(x: Tensor) -> Tensor:
        # Steps of 2 ** 20 in the bits of a float32, whose mantissa has 23.
        above = x.float().view(torch.int32).double() - base.view(torch.int32).double()[..., None]
        return above / 2**20 + 1

    base = threshold.clamp_max(1.0).expand_as(masses.total).contiguous()
    of_sum = level(masses.sums.contiguous()).clamp(0, LEVELS - 1e-3)  # [B, Hq, np, nk]
    of_cut = level((base * masses.total)[..., None]).clamp(0, LEVELS - 1e-3)  # [B, Hq, np, 1]
    never = (threshold >= 1)[..., None]
    nonfinite = ~masses.finite[..., None]
    always = nonfinite | (threshold == 0)[..., None]  # until the budget raises the cut

    def hits(raised: Tensor) -> Tensor:
        """What is hit with cuts that many levels higher, ``[B, Hq, nq]``."""
        of_row = raised.repeat_interleave(rows, 2)[..., None]
        hit = of_sum.floor() >= (of_cut.floor() + of_row).clamp_max(LEVELS)
        hit = torch.where(of_row == 0, hit & ~never | always, hit & ~never & ~nonfinite)
        return by_block(hit & masses.candidate).any(3)

    hit, dropped, raised = within_budget(hits, by_block(masses.total)[..., 0].shape, unasked, budget)
    of_row = raised.repeat_interleave(rows, 2)[..., None]
    margin = _level_margin(of_sum, of_cut + of_row) / 16
    margin = margin.masked_fill(never | nonfinite, -torch.inf).masked_fill(always & (of_row == 0), torch.inf)
    margin = margin.masked_fill(~masses.candidate, -torch.inf)
    return Decision(hit, by_block(margin).amax(3), dropped, raised)


def within_budget(
    hits: Callable[[Tensor], Tensor], shape: Sequence[int], unasked: Tensor, budget: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """What is hit with the lowest cuts that leave no query block more than the budget.

    Args:
        hits: What is hit, bool ``[B, Hq, nq, nk]``, with cuts so many steps higher, int64 ``[B, Hq, nq]``.
        shape: ``(B, Hq, nq)``.
        unasked: bool ``[B, Hq, nq, nk]``: blocks that do not count.
        budget: Most hits of a query block; None for all.

    Returns:
        What is hit, what is no more, and by how many steps cuts were raised.
    """
    raised = torch.zeros(shape, dtype=torch.int64, device=unasked.device)
    asked = hit = hits(raised)
    while budget is not None and bool((over := (hit & ~unasked).sum(-1) > budget).any()):
        raised = raised + over
        hit = hits(raised)
    return hit, asked & ~hit & ~unasked, raised


def _level_margin(a: Tensor, b: Tensor) -> Tensor:
    """How far both a and b have to move for ``floor(a) >= floor(b)`` to change; negative where it does not hold.

    A nat is at most 16 levels: that is the slope of a straight mantissa where it is steepest.
    """
    # It does not hold if a whole number n has a < n <= b. Where none has, the nearest to both are about the middle.
    middle = ((a + b) / 2).floor()
    holds = torch.minimum(torch.maximum(a - middle, middle - b), torch.maximum(a - middle - 1, middle + 1 - b))
    # Where some have, a moves up to the last of some of them, and b down to below the first of the others.
    first, last = a.floor() + 1, b.floor()
    split = ((a + b - 1) / 2).floor()
    moves = []
    for n in (split, split + 1):
        n = torch.minimum(torch.maximum(n, first - 1), last)
        moves.append(torch.maximum(torch.where(n >= first, n - a, 0.0), torch.where(n < last, b - n - 1, 0.0)))
    return torch.where(a.floor() >= b.floor(), holds, -torch.minimum(*moves))
