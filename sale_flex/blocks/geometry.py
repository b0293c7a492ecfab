# SPDX-License-Identifier: BSD-3-Clause
"""Positions on the grid of blocks: what a query block sees, what is always kept, what is full (docs/semantics.md).

Bounds are int32 ``[B, 3]`` = (q_offset, start, end). Everything is a tensor expression of them: no value is read.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from sale_flex.kernels.arguments import Grid


class Spans(NamedTuple):
    """Positions of every query block's rows, int64 ``[B, nq]``, inclusive. Empty (low > high) if all are padding."""

    first: Tensor
    """First row."""
    last: Tensor
    """Last row."""
    low: Tensor
    """First row that is no padding."""
    high: Tensor
    """Last row that is no padding."""


def audit_slots(tokens: int) -> int:
    """Groups of positions, of which one row each is audited, that end within `tokens`: an int or a symbol."""
    slots = torch.sym_min(tokens // 64, 64) + torch.sym_min(torch.sym_max(tokens - 4096, 0) // 128, 32)
    return slots + torch.sym_max(tokens - 8192, 0) // 256


def spans(bounds: Tensor, grid: Grid) -> Spans:
    """Positions of every query block's rows."""
    offset, start, end = bounds.long().unsqueeze(-1).unbind(1)  # each [B, 1]
    block = torch.arange(grid.query_blocks, device=bounds.device)[None]
    first = offset + block * grid.block_q
    last = offset + ((block + 1) * grid.block_q).clamp_max(grid.q_len) - 1
    return Spans(first, last, torch.maximum(first, start), torch.minimum(last, end - 1))


def visible_blocks(bounds: Tensor, grid: Grid) -> Tensor:
    """Blocks in which some row sees some key, bool ``[B, nq, nk]``."""
    rows = spans(bounds, grid)
    first, after = _key_edges(bounds, grid)
    start = bounds[:, 1, None, None]
    return (first <= rows.high[..., None]) & (after > start) & (rows.low <= rows.high)[..., None]


def visible_count(bounds: Tensor, grid: Grid) -> Tensor:
    """How many blocks are visible, int64 ``[B]``, without a tensor over key blocks."""
    rows = spans(bounds, grid)
    first_block = (bounds[:, 1, None] // grid.block_k).long()
    count = rows.high // grid.block_k - first_block + 1
    return torch.where(rows.low <= rows.high, count, 0).sum(-1)


def always_blocks(bounds: Tensor, grid: Grid, sink_tokens: int, local_tokens: int, min_length: int) -> Tensor:
    """Blocks that are kept, if visible, whatever the rule says, bool ``[B, nq, nk]``."""
    rows = spans(bounds, grid)
    first, after = _key_edges(bounds, grid)
    start = bounds[:, 1, None, None]
    sink = torch.maximum(first, start) < start + sink_tokens
    local = after > rows.low[..., None] - local_tokens + 1
    return sink | local | early_blocks(bounds, grid, min_length)[..., None]


def early_blocks(bounds: Tensor, grid: Grid, min_length: int) -> Tensor:
    """Query blocks with a row fewer than `min_length` keys after the first valid one, bool ``[B, nq]``."""
    return spans(bounds, grid).low - bounds[:, 1, None] < min_length


def full_blocks(bounds: Tensor, grid: Grid) -> Tensor:
    """Blocks in which every row sees every key inside the tensors, bool ``[B, nq, nk]``."""
    rows = spans(bounds, grid)
    first, after = _key_edges(bounds, grid)
    _, start, end = (bounds[:, n, None, None] for n in range(3))
    return (first >= start) & (after.clamp_max(grid.kv_len) - 1 <= rows.first[..., None]) & (rows.last[..., None] < end)


def _key_edges(bounds: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """First key and one past the last key of every key block, int64 ``[1, 1, nk]``."""
    first = torch.arange(grid.key_blocks, device=bounds.device)[None, None] * grid.block_k
    return first, first + grid.block_k
