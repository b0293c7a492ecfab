# SPDX-License-Identifier: BSD-3-Clause
"""What a call did: how many blocks each head kept of those it could see, and which path ran."""

from enum import Enum
from typing import NamedTuple

import torch
from torch import Tensor

from sale_flex.blocks.bits import count_bits
from sale_flex.blocks.geometry import visible_count
from sale_flex.kernels.arguments import Grid


class Path(Enum):
    """What computed attention."""

    FLEX = "flex_attention"
    """Compiled flex_attention on the chosen blocks."""
    TORCH_ROWS = "torch, row by row"
    """Plain torch on the chosen blocks: where a log-sum-exp is wanted on a CPU."""
    DENSE_SDPA = "dense scaled_dot_product_attention"
    """Nothing was chosen; `SaleStats.reason` says why, and so for the next two."""
    DENSE_FLEX = "dense flex_attention"
    DENSE_TORCH_ROWS = "dense torch, row by row"

    @property
    def is_dense(self) -> bool:
        """Whether nothing was chosen."""
        return self in (Path.DENSE_SDPA, Path.DENSE_FLEX, Path.DENSE_TORCH_ROWS)

    @property
    def by_rows(self) -> "Path":
        """The same, computed in torch."""
        return Path.DENSE_TORCH_ROWS if self.is_dense else Path.TORCH_ROWS


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
    dropped_blocks: Tensor
    """int64 ``[B, Hq]``: blocks that passed the threshold and found no room in their query block's index list."""
    audit: Audit
    """What was missed, by rows that were asked exactly; nothing with ``on_miss="ignore"`` and in dense calls."""

    path: Path
    """What computed attention."""
    reason: str = ""
    """Why it ran dense, or otherwise than the config says; for people."""
    dense_rows: int = 0
    """First query rows that were computed densely, by scaled_dot_product_attention, beside a sparse rest."""

    @property
    def density(self) -> Tensor:
        """float32 ``[B, Hq]``: kept over visible blocks; 1 where nothing is visible."""
        visible = self.visible_blocks
        return torch.where(visible > 0, self.kept_blocks / visible.clamp_min(1), 1.0)

    @property
    def ran_dense(self) -> bool:
        """Whether no row was sparse."""
        return self.path.is_dense

    def describe(self) -> str:
        """What ran and why, in a phrase."""
        text = self.path.value
        if self.dense_rows:
            text += f" after {self.dense_rows} dense rows"
        return f"{text}: {self.reason}" if self.reason else text


def plain_stats(
    kept: Tensor,
    lost: Tensor,
    audit: Audit | None,
    bounds: Tensor,
    grid: Grid,
    path: Path,
    reason: str,
    dense_rows: int,
) -> SaleStats:
    """Counts of a plain causal call.

    Args:
        kept: int64 ``[B, Hq]``: blocks in its lists.
        lost: int32 ``[B, Hq, nq]``: what found no room.
        audit: What was missed, or None.
        bounds: int32 ``[B, 3]``.
        grid: Lengths and blocks.
        path: What ran.
        reason: Why.
        dense_rows: First rows, whole blocks, that are in no list and are computed densely.
    """
    visible = visible_count(bounds, grid)[:, None].expand_as(kept)
    if dense_rows:
        kept = kept + visible_count(bounds, grid._replace(q_len=dense_rows))[:, None]
    return SaleStats(kept, visible, lost.sum(-1), no_audit(kept) if audit is None else audit, path, reason, dense_rows)


def masked_stats(
    kept: Tensor, lost: Tensor, audit: Audit | None, visible: Tensor, path: Path, reason: str
) -> SaleStats:
    """Counts of a call under mods: as of a plain one, `visible` being bits int32 ``[B, 1 | Hq, nq, words]``."""
    seen = count_bits(visible).sum((-2, -1)).expand_as(kept)
    return SaleStats(kept, seen, lost.sum(-1), no_audit(kept) if audit is None else audit, path, reason)


def dense_stats(bounds: Tensor, heads: int, grid: Grid, reason: str) -> SaleStats:
    """Counts of a call that ran scaled_dot_product_attention, for this reason."""
    visible = visible_count(bounds, grid)[:, None].expand(-1, heads)
    return SaleStats(visible, visible, torch.zeros_like(visible), no_audit(visible), Path.DENSE_SDPA, reason)
