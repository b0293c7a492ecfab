# SPDX-License-Identifier: BSD-3-Clause
"""Pooled query rows; see `sale_flex.kernels.pool` for the contract."""

import torch
from torch import Tensor
from torch.nn.functional import pad


def pool_rows(query: Tensor, real: Tensor, pool: int, sample: bool) -> Tensor:
    """The mean of every `pool` adjacent rows, or the last of them, of those that are real.

    The sum is taken row by row, and it, the inverse of the number of rows and the result are each rounded once, the
    last to the query's dtype: its bits are those of every implementation.

    Args:
        query: ``[H, M, D]``.
        real: bool ``[N]``: which rows are no padding; N a multiple of `pool`, M or, with rows that are not there, more.
        pool: Query rows a pooled row.
        sample: Take the last real row instead of the mean.

    Returns:
        float32 ``[H, N / pool, D]``; 0 for padding.
    """
    members = pad(query.float(), (0, 0, 0, len(real) - query.shape[1])).unflatten(1, (-1, pool)).unbind(2)
    flags = real.unflatten(0, (-1, pool))
    rows = torch.zeros_like(members[0])
    for n, member in enumerate(members):
        rows = torch.where(flags[:, n, None], member if sample else rows + member, rows)
    if sample:
        return rows
    count = flags.sum(-1).clamp_min(1).float()[:, None]
    return rows.mul_(torch.ones_like(count) / count).to(query.dtype).float()
