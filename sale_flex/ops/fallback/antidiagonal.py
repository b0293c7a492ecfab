# SPDX-License-Identifier: BSD-3-Clause
"""Sums along antidiagonals; see `sale_flex.kernels.antidiagonal` for the contract."""

import torch
from torch import Tensor

from sale_flex.kernels.arguments import Grid
from sale_flex.ops.fallback.padding import row_positions, shown_blocks, valid_keys, without_padding
from sale_flex.ops.fallback.tiles import tiles


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
    """Shares of the softmax over sums, averaged over a query block's rows of sums: float32 ``[B, Hq, nq, nk]``."""
    (batch, heads), group, device = query.shape[:2], query.shape[1] // key.shape[1], query.device
    down, across = grid.block_q // stride, grid.block_k // stride
    _, real = row_positions(bounds, grid)
    valid = valid_keys(bounds, grid)
    shares = torch.empty(batch, heads, grid.query_blocks, grid.key_blocks, device=device)
    for b in range(batch):
        sums_seen = seen_sums(bounds[b], causal, grid, stride)
        for head, block in tiles(heads, group, grid.query_blocks, down * across * grid.key_blocks, device):
            lines = slice(block.start * grid.block_q, block.stop * grid.block_q)
            rows = without_padding(query[b, head, lines], real[b, lines])
            rows = rows.unflatten(1, (-1, stride)).flip(2).flatten(2)  # [G, n * down, stride * D]
            columns = without_padding(key[b, head.start // group], valid[b])
            columns = columns.unflatten(0, (-1, stride)).flatten(1)
            sums = rows @ columns.mT * (scale / stride)
            sees = sums_seen[block.start * down : block.stop * down].unflatten(0, (-1, down))
            sees = sees.unflatten(2, (-1, across))
            shown = shown_blocks(visible, b, head, block, grid)
            if isinstance(shown, Tensor):
                sees = sees & shown[:, :, None, :, None]
            sums = sums.unflatten(1, (-1, down)).unflatten(3, (-1, across))  # [G, n, down, nk, across]
            broken = sees & ~sums.isfinite()
            sums = sums.masked_fill(~sees | broken, -torch.inf)
            peak = sums.amax((-1, -2), keepdim=True)
            weights = (sums - peak.masked_fill(peak == -torch.inf, 0.0)).exp().sum(-1)  # [G, n, down, nk]
            total = weights.sum(-1, keepdim=True)
            count = (total > 0).sum(2).clamp_min(1)
            found = (weights / total.masked_fill(total == 0, 1.0)).sum(2) / count
            shares[b, head, block] = found.masked_fill(broken.any(-1).any(2), torch.inf)
    return shares


def seen_sums(bounds: Tensor, causal: bool, grid: Grid, stride: int) -> Tensor:
    """Sums of which a row sees its key, plain mods aside: bool ``[nq * BQ / stride, nk * BK / stride]``.

    Of the pairs of a sum, pair r is of the key r after the first one and the row r before the last one. The rows and
    keys that there are, and causality, each bound r on one side or both: the least that is left has to fulfil them.

    Args:
        bounds: int32 ``[3]``, a batch row's.
        causal: Whether a row sees no key behind its own position.
        grid: Lengths and blocks.
        stride: Pairs of a sum.
    """
    offset, start, end = bounds.unbind()
    last = torch.arange(grid.query_blocks * grid.block_q // stride, device=bounds.device)[:, None] * stride
    last = last + (offset + stride - 1)
    first = torch.arange(grid.key_blocks * grid.block_k // stride, device=bounds.device) * stride
    least = torch.maximum(last - torch.minimum(end, offset + grid.q_len) + 1, start - first).clamp_min(0)
    sees = (least < stride) & (least <= last - start) & (least < end - first)
    return sees & (2 * least <= last - first) if causal else sees
