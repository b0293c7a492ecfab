# SPDX-License-Identifier: BSD-3-Clause
"""Sums of the last rows' softmax by key and by distance; see `sale_flex.kernels.last_rows` for the contract."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from sale_flex.kernels.arguments import Grid, MaskSpec
from sale_flex.ops.fallback.tiles import tiles
from sale_flex.ops.fallback.visibility import Score, scored, visible


def last_row_sums(
    query: Tensor, key: Tensor, spec: MaskSpec, score: Score | None, scale: float, grid: Grid, last: int, span: int
) -> tuple[Tensor, Tensor]:
    """Sums over the last rows, float32: by key ``[B, Hq, Skv]``, by distance ``[B, Hq, span]``."""
    batch, heads, kv_len, device = len(query), query.shape[1], grid.kv_len, query.device
    group = heads // key.shape[1]
    keys = torch.arange(kv_len, dtype=torch.int32, device=device)
    by_key = torch.zeros(batch, heads, kv_len, device=device)
    by_distance = torch.zeros(batch, heads, span, device=device)
    for b, (offset, start, end) in enumerate(spec.bounds.tolist()):
        stop = min(grid.q_len, end - offset)
        first = max(0, start - offset, stop - last)
        if first >= stop:
            continue
        q = torch.arange(first, stop, dtype=torch.int32, device=device)[:, None]
        distances = torch.arange(first + offset - kv_len + 1, stop + offset, device=device) % span
        for head, _ in tiles(heads, group, 1, len(q) * kv_len, device):
            logits = query[b, head, first:stop].float() @ key[b, head.start // group].float().T * scale
            logits = scored(score, logits, b, head, q, keys, grid)
            hidden = ~visible(spec, b, head, q, keys, grid) | ~logits.isfinite()
            shares = logits.masked_fill(hidden, -torch.inf).softmax(-1).nan_to_num(0.0)
            by_key[b, head] = shares.sum(1)
            by_distance[b, head].index_add_(1, distances, _diagonal_sums(shares))
    return by_key, by_distance


def _diagonal_sums(x: Tensor) -> Tensor:
    """Sums ``[G, M + N - 1]`` of the diagonals of ``[G, M, N]``, from that of the first row and the last column on."""
    rows, columns = x.shape[1:]
    # In rows that are longer by M, and shorter by one again, each row stands one to the right of the row above it.
    skewed = pad(x.flip(-1), (0, rows)).flatten(1)[:, : rows * (rows + columns - 1)]
    return skewed.unflatten(1, (rows, rows + columns - 1)).sum(1)
