# SPDX-License-Identifier: BSD-3-Clause
"""Exact sink-local statistics of every row; see `sale_flex.kernels.row_limits` for the contract."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from sale_flex.blocks.bits import unpack_bits
from sale_flex.kernels.arguments import Grid, MaskSpec, Near, Structure
from sale_flex.ops.fallback.quantize import CODE_ROWS
from sale_flex.ops.fallback.structure import intervals, touched_blocks
from sale_flex.ops.fallback.tiles import (
    all_elements,
    flagged_blocks,
    heads_in,
    keys_of,
    products,
    real_rows,
    rows_of,
    tiles,
)
from sale_flex.ops.fallback.visibility import Score, scored, visible


class RowSums(NamedTuple):
    """Sink-local statistics of some rows of one batch row."""

    b: int
    heads: slice
    lines: slice
    """M rows, those behind the last one too."""
    sums: Tensor
    """float32 ``[G, M]``: ``ln sum exp`` of the logits of sink and local keys that a row sees."""
    sees: Tensor
    """bool ``[G or 1, M]``: whether a row sees any key."""


def row_limits(
    query: Tensor,
    query_scale: Tensor,
    key: Tensor,
    mean: Tensor,
    spec: MaskSpec,
    structure: Structure | None,
    score: Score | None,
    threshold: Tensor,
    scale: float,
    grid: Grid,
    near: Near,
) -> tuple[Tensor, Tensor]:
    """What rows' scores must reach, ``[B, Hq, ceil(Sq / 128) * 128]``, +inf for rows that see nothing; mean's logits.

    Without a score_mod in units of (code product x key scale), and no logits of the mean are needed.
    """
    shift = mean_logits(query, mean, scale, score)
    limit = torch.full((*query.shape[:2], grid.q_len + -grid.q_len % CODE_ROWS), torch.inf, device=query.device)
    unit = scale * pad(query_scale, (0, limit.shape[2] - grid.q_len), value=1.0)
    for b, heads, lines, sums, sees in row_sums(query, key, mean, spec, structure, score, scale, grid, near):
        reach = sums + threshold[heads, None].log()
        if score is None:
            reach /= unit[b, heads, lines]
        limit[b, heads, lines] = reach.masked_fill_(~sees, torch.inf)
    return limit, shift


def mean_logits(query: Tensor, mean: Tensor, scale: float, score: Score | None) -> Tensor:
    """Logits of the smoothing mean, float32 ``[B, Hq, ceil(Sq / 128) * 128]``; ``[B, Hq, 0]`` without a score_mod."""
    heads, rows = query.shape[1:3]
    if score is None:
        return torch.empty(*query.shape[:2], 0, device=query.device)
    of_mean = mean.repeat_interleave(heads // mean.shape[1], 1)[..., None]
    return pad((query.float() @ of_mean)[..., 0] * scale, (0, -rows % CODE_ROWS))


def row_sums(
    query: Tensor,
    key: Tensor,
    mean: Tensor,
    spec: MaskSpec,
    structure: Structure | None,
    score: Score | None,
    scale: float,
    grid: Grid,
    near: Near,
) -> Iterator[RowSums]:
    """Statistics of all rows in tiles: of logits of smoothed keys, or of keys as they are under a score_mod."""
    heads, group = query.shape[1], query.shape[1] // key.shape[1]
    device, elements = query.device, all_elements(grid)
    if structure is None:
        width = near.sink_tokens + near.local_tokens + grid.block_q + 3 * grid.block_k
        elements = min(elements, grid.block_q * width)
    for b, bounds in enumerate(spec.bounds.tolist()):
        for head, block in tiles(heads, group, grid.query_blocks, elements, device):
            lines, index = rows_of(block, grid, device)
            shared, first, sees = _first_keys(structure, b, head, lines, index, bounds, grid)
            spans = intervals(first, index + bounds[0], spec.causal, near)
            touched = touched_blocks(spans, sees, grid)
            if structure is not None:
                touched &= unpack_bits(structure.visibility.visible[b, shared, block], grid.key_blocks)
            keys = keys_of(flagged_blocks(touched), grid.block_k)[:, :, None]  # [G or 1, n, 1, J * BK]
            is_near = torch.zeros(*first.shape, keys.shape[-1], dtype=torch.bool, device=device)
            for low, high in spans:
                is_near |= (keys >= low[..., None]) & (keys <= high[..., None])
            is_near &= visible(spec, b, shared, index[..., None], keys, grid)
            kv = head.start // group
            of_keys = key[b, kv, keys[:, :, 0].long().clamp_max(grid.kv_len - 1)].float()
            part = query[b, head, lines].float()
            part = pad(part, (0, 0, 0, index.numel() - part.shape[1])).unflatten(1, index.shape)
            logits = products(part, of_keys if score is not None else of_keys - mean[b, kv]) * scale
            logits = scored(score, logits, b, head, index[..., None], keys, grid)
            sums = logits.masked_fill(~is_near, -torch.inf).logsumexp(-1)
            yield RowSums(b, head, lines, sums.flatten(1), sees.flatten(1))


def _first_keys(
    structure: Structure | None, b: int, heads: slice, lines: slice, index: Tensor, bounds: list[int], grid: Grid
) -> tuple[slice, Tensor, Tensor]:
    """Heads that stand for `heads`, their rows' first visible keys, int32 ``[G or 1, n, BQ]``, and if there is one."""
    if structure is None:
        return slice(0, 1), torch.full_like(index, bounds[1])[None], real_rows(index, bounds, grid)[None]
    ends = structure.visibility.row_kv_bounds
    shared = heads_in(ends, heads)
    first, last = ends[b, shared, :, lines].unflatten(-1, index.shape).unbind(1)
    return shared, first, last >= 0
