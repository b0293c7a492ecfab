# SPDX-License-Identifier: BSD-3-Clause
"""Where the sparse path begins to pay: a cost model per GPU family, and the default of `SaleConfig.min_length`.

The position depends on the device and the head_dim alone, never on lengths, heads or batch: a row must choose the same
blocks in a chunk and in one shot, alone and in a batch.
"""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

KEPT_KEYS = 3600
"""Expected density times length: the fast estimate on a trained model keeps 0.44 of 8K and 0.11 of 32K tokens at 0.01.

The default keeps less and estimates longer; by the same model it breaks even no later.
"""

CPU_LENGTH = 1024
"""Without a GPU there is no time to gain; the sparse path runs wherever it may."""


class Costs(NamedTuple):
    """Milliseconds of 32 query heads and 8 KV heads of 128 channels, batch 1, n tokens."""

    dense: float
    """Per n squared: dense causal SDPA, the fastest backend."""
    flex: float
    """Per n squared and density: compiled flex_attention."""
    estimate: float
    """Per n squared: the fast estimate."""
    per_token: float
    """Per n: pooling, moments and index lists."""
    fixed: float
    """Launches, and what small grids leave idle."""


FAMILIES = {
    9: Costs(dense=1.27e-8, flex=2.07e-8, estimate=3.8e-10, per_token=1.1e-5, fixed=0.15),
}
"""By major compute capability; the H200's figures stand for 9. Others take those until someone measures them."""

LEAST, MOST = 8192, 65536
"""Tokens that `break_even_length` answers at least and at most on a GPU."""


def dense_prefix(query: Tensor, min_length: int | None) -> int:
    """`SaleConfig.min_length`, or for None the break-even position of the query's device."""
    return break_even_length(query.device, query.shape[3]) if min_length is None else min_length


def rows_of_dense_blocks(min_length: int, block_q: int, q_len: int) -> int:
    """How many rows the whole query blocks hold that `min_length` makes dense, of a call from key 0 on; 0 if all."""
    rows = -(-min_length // block_q) * block_q
    return rows if rows < q_len else 0


def break_even_length(device: torch.device | str, head_dim: int = 128) -> int:
    """Tokens from which on the sparse path costs less than dense attention, a multiple of 1024.

    Args:
        device: Where the call runs; only its type and compute capability count.
        head_dim: Channels of a head.
    """
    device = torch.device(device)
    if device.type != "cuda":
        return CPU_LENGTH
    return _solve(FAMILIES.get(torch.cuda.get_device_capability(device)[0], FAMILIES[9]), head_dim)


@cache
def _solve(costs: Costs, head_dim: int) -> int:
    """Smallest length between LEAST and MOST at which the model's sparse path is no dearer than its dense one."""
    width = head_dim / 128
    for length in range(LEAST, MOST, 1024):
        density = min(1.0, KEPT_KEYS / length)
        sparse = (costs.flex * density + costs.estimate) * width * length**2 + costs.per_token * length + costs.fixed
        if sparse <= costs.dense * width * length**2:
            return length
    return MOST
