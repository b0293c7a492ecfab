# SPDX-License-Identifier: BSD-3-Clause
"""Pooled query rows and what their sink and local keys weigh; see `sale_flex.kernels.pool` for the contract."""

import torch
from torch import Tensor
from torch.nn.functional import pad

LOG2E = 1.4426950408889634


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


def exact_part(
    rows: Tensor,
    position: Tensor,
    key: Tensor,
    mean: Tensor,
    start: int,
    sink_stop: Tensor,
    local_start: Tensor,
    scale: float,
) -> Tensor:
    """Base-2 logarithm of the rows' sums of exponentials over visible keys that are no candidates.

    Args:
        rows: float32 ``[G, N, R, D]``: R pooled rows of each of N query blocks, of the G query heads of a KV head.
        position: int64 ``[N, R]``: key index of each row's last real row, -1 for padding.
        key: ``[Skv, D]``.
        mean: float32 ``[D]``.
        start: First valid key.
        sink_stop: int64 ``[N]``: from `start` up to here lie the keys before the candidates.
        local_start: int64 ``[N]``: from here on, `sink_stop` or later, lie those behind them.
        scale: Softmax scale.

    Returns:
        float32 ``[G, N, R]``; -inf where no key has a finite logit.
    """
    last = int(position.max())
    sink_keys = key[start : max(int(sink_stop.max()), start)].float() - mean
    at = start + torch.arange(sink_keys.shape[0], device=key.device)
    sink = (rows @ sink_keys.T).mul_(scale)
    sink.masked_fill_(~((at < sink_stop[:, None, None]) & (at <= position[..., None])), -torch.inf)

    width = max(int((position.amax(-1) + 1 - local_start).max()), 1)
    at = local_start[:, None] + torch.arange(width, device=key.device)  # [N, W]
    local_keys = key[at.clamp_max(last)].float() - mean  # [N, W, D]
    local = (rows @ local_keys.transpose(-1, -2)).mul_(scale)
    local.masked_fill_(at[:, None] > position[..., None], -torch.inf)
    logits = torch.cat([sink, local], -1)
    return logits.masked_fill_(~logits.isfinite(), -torch.inf).logsumexp(-1) * LOG2E
