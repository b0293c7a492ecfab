# SPDX-License-Identifier: BSD-3-Clause
"""Ops that say how a query block's softmax is spread over blocks of keys: what rules after several papers compare.

Each takes a call's positions, and of its mods the blocks that they show: bits int32 ``[B, 1 | Hq, nq, ceil(nk / 32)]``,
or None in plain causal attention. What is not finite is +inf: such a block is kept.
"""

import torch
from torch import Tensor

from sale_flex.kernels.arguments import Grid
from sale_flex.ops.define import op


def _blocks(query: Tensor, grid: Grid) -> Tensor:
    return query.new_empty(*query.shape[:2], grid.query_blocks, grid.key_blocks, dtype=torch.float32)


@op("antidiagonal")
def antidiagonal_shares(
    query: Tensor,
    key: Tensor,
    bounds: Tensor,
    visible: Tensor | None,
    causal: bool,
    scale: float,
    grid: Grid,
    stride: int,
) -> Tensor:
    """Shares of the softmax over sums along antidiagonals, averaged over rows: float32 ``[B, Hq, nq, nk]``."""
    return _blocks(query, grid)


@op("block_mean")
def block_mean_energies(
    query: Tensor, key: Tensor, bounds: Tensor, visible: Tensor | None, causal: bool, scale: float, grid: Grid
) -> Tensor:
    """Exponentials of rows' logits with mean keys, relative to each row's largest, summed: ``[B, Hq, nq, nk]``."""
    return _blocks(query, grid)
