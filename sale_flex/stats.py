# SPDX-License-Identifier: BSD-3-Clause
"""What a call did: how many blocks each head kept of those it could see, and which path ran."""

from typing import NamedTuple

import torch
from torch import Tensor

from sale_flex.geometry import Grid, visible_count

_ON_OTHERS = " on the others"
"""How the path ends of a call that was dense on its first rows alone."""


class Audit(NamedTuple):
    """What rows that were asked exactly said of the choice, ``[B, Hq]`` each; 0 where nobody was asked.

    One row of every 64 positions (further on of every 128 and 256) is scored against all keys that it sees, unless its
    query block is early or the call dense. It *wants* the blocks with 5 % or more of its softmax that are not always
    kept. Sums add up over calls.
    """

    rows: Tensor
    """int64: rows that were asked."""
    wanted_mass: Tensor
    """float32: sum over them of the probability on blocks that they want."""
    missed_mass: Tensor
    """float32: of that, what lies on blocks that were not kept."""
    missed_squares: Tensor
    """float32: sum over rows of the square of what each missed."""
    made_dense: Tensor
    """int64: 1 where the head kept all blocks because it missed too much (``on_miss="dense"``)."""

    @property
    def miss(self) -> Tensor:
        """float32 in [0, 1): ``missed_squares / (wanted_mass + 1)``.

        A row that misses all it wants counts for what it wants, one that misses a little for next to nothing; and one
        more row is reckoned that wanted all and missed nothing, so that no head is judged by a row or two. Above
        `SaleConfig.miss_bound` a head's choice is not to be trusted.
        """
        return self.missed_squares / (self.wanted_mass + 1)


def no_audit(like: Tensor) -> Audit:
    """Of a call in which nobody was asked; `like` is ``[B, Hq]``."""
    count = torch.zeros_like(like, dtype=torch.int64)
    mass = torch.zeros_like(like, dtype=torch.float32)
    return Audit(count, mass, mass, mass, count)


class SaleStats(NamedTuple):
    """Counts of one call, fixed in shape and left on the device: reading them is what waits for the device."""

    kept_blocks: Tensor
    """int64 ``[B, Hq]``: blocks that attention computes."""
    visible_blocks: Tensor
    """int64 ``[B, Hq]``: blocks in which some query sees some key, what dense attention computes."""
    path: str
    """What ran: ``"triton scan + flex"``, ``"torch scan + flex"``, with mods ``"... scan under mods + flex"``,
    ``"dense sdpa: ..."`` or ``"dense flex: ..."`` with the reason, or both,
    ``"dense sdpa on the first N rows, ... on the others"``."""
    dropped_blocks: Tensor
    """int64 ``[B, Hq]``: blocks that passed the threshold and found no room in their query block's index list."""
    audit: Audit
    """What was missed, by rows that were asked exactly; nothing with ``on_miss="ignore"`` and in dense calls."""

    @property
    def density(self) -> Tensor:
        """float32 ``[B, Hq]``: kept over visible blocks; 1 where nothing is visible."""
        visible = self.visible_blocks
        return torch.where(visible > 0, self.kept_blocks / visible.clamp_min(1), 1.0)

    @property
    def ran_dense(self) -> bool:
        """Whether no row was sparse."""
        return self.path.startswith("dense") and not self.path.endswith(_ON_OTHERS)


def mask_stats(
    partial_num: Tensor,
    full_num: Tensor,
    dropped: Tensor | None,
    bounds: Tensor,
    grid: Grid,
    path: str,
    audit: Audit | None,
) -> SaleStats:
    """Counts of a block mask from its list lengths and what found no room in them, int32 ``[B, Hq, nq]`` all three."""
    kept = (partial_num + full_num).sum(-1)
    lost = torch.zeros_like(kept) if dropped is None else dropped.sum(-1)
    visible = visible_count(bounds, grid)[:, None].expand_as(kept)
    return SaleStats(kept, visible, path, lost, no_audit(kept) if audit is None else audit)


def dense_stats(bounds: Tensor, heads: int, grid: Grid, path: str) -> SaleStats:
    """Counts of a call that ran dense."""
    visible = visible_count(bounds, grid)[:, None].expand(-1, heads)
    return SaleStats(visible, visible, path, torch.zeros_like(visible), no_audit(visible))


def with_dense_rows(stats: SaleStats, bounds: Tensor, early: Grid) -> SaleStats:
    """Add the blocks of the grid's rows, which the mask left out and dense attention computes."""
    return stats._replace(
        kept_blocks=stats.kept_blocks + visible_count(bounds, early)[:, None],
        path=f"dense sdpa on the first {early.q_len} rows, {stats.path}{_ON_OTHERS}",
    )
