# SPDX-License-Identifier: BSD-3-Clause
"""What a call did: how many blocks each head kept of those it could see, and which path ran."""

from typing import NamedTuple

import torch
from torch import Tensor

from sale_flex.geometry import Grid, visible_count

_ON_OTHERS = " on the others"
"""How the path ends of a call that was dense on its first rows alone."""


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
    partial_num: Tensor, full_num: Tensor, dropped: Tensor | None, bounds: Tensor, grid: Grid, path: str
) -> SaleStats:
    """Counts of a block mask from its list lengths and what found no room in them, int32 ``[B, Hq, nq]`` all three."""
    kept = (partial_num + full_num).sum(-1)
    lost = torch.zeros_like(kept) if dropped is None else dropped.sum(-1)
    return SaleStats(kept, visible_count(bounds, grid)[:, None].expand_as(kept), path, lost)


def dense_stats(bounds: Tensor, heads: int, grid: Grid, path: str) -> SaleStats:
    """Counts of a call that ran dense."""
    visible = visible_count(bounds, grid)[:, None].expand(-1, heads)
    return SaleStats(visible, visible, path, torch.zeros_like(visible))


def with_dense_rows(stats: SaleStats, bounds: Tensor, early: Grid) -> SaleStats:
    """Add the blocks of the grid's rows, which the mask left out and dense attention computes."""
    return stats._replace(
        kept_blocks=stats.kept_blocks + visible_count(bounds, early)[:, None],
        path=f"dense sdpa on the first {early.q_len} rows, {stats.path}{_ON_OTHERS}",
    )
