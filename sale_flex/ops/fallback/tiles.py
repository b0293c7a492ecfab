# SPDX-License-Identifier: BSD-3-Clause
"""Tiles of the attention map: some query blocks of heads that share keys, and what kinds of key blocks they have."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

from sale_flex.kernels.arguments import Grid, Structure

TILE_ELEMENTS = 2**22
"""Elements of the attention map held at once on a CPU: 16 MiB in each of a few tensors."""

_GPU_ELEMENTS = 2**26
"""The same on a GPU, where a tile's launches cost more than its sums: 256 MiB."""

ALWAYS, PARTIAL, WHOLE, HIDDEN = range(4)
"""Kinds of blocks, in the order of `CandidateBlocks`, and the blocks in no run of it."""


def tiles(
    heads: int, group: int, query_blocks: int, elements: int, device: torch.device
) -> Iterator[tuple[slice, slice]]:
    """Heads and query blocks that fit into a tile, at least one of each; never heads of two groups.

    Args:
        heads: Query heads.
        group: Heads that share keys.
        query_blocks: Query blocks there are.
        elements: Elements held for one query block of one head.
        device: Where.
    """
    room = _GPU_ELEMENTS if device.type == "cuda" else TILE_ELEMENTS
    together = min(group, max(1, room // elements))
    blocks = max(1, room // (together * elements))
    for first in range(0, heads, group):
        for head in range(first, first + group, together):
            for block in range(0, query_blocks, blocks):
                yield (
                    slice(head, min(head + together, first + group)),
                    slice(block, min(block + blocks, query_blocks)),
                )


def all_elements(grid: Grid) -> int:
    """Elements of one query block and all keys."""
    return grid.block_q * max(grid.key_blocks, 1) * grid.block_k


def rows_of(blocks: slice, grid: Grid, device: torch.device) -> tuple[slice, Tensor]:
    """The rows of query blocks, those behind the last one too: as a slice, and as int32 indices ``[n, BQ]``."""
    lines = slice(blocks.start * grid.block_q, blocks.stop * grid.block_q)
    index = torch.arange(lines.start, lines.stop, dtype=torch.int32, device=device)
    return lines, index.view(-1, grid.block_q)


def keys_of(blocks: Tensor, size: int) -> Tensor:
    """Indices of the keys (or sub-blocks) of key blocks, int32 ``[..., J * size]``, those behind the last one too."""
    return (blocks[..., None] * size + torch.arange(size, device=blocks.device)).flatten(-2).int()


def real_rows(index: Tensor, bounds: list[int], grid: Grid) -> Tensor:
    """Which query rows, by index, are there and no padding."""
    offset, start, end = bounds
    return (index < grid.q_len) & (index + offset >= start) & (index + offset < end)


def heads_in(structure: Tensor, heads: slice) -> slice:
    """Where a tensor ``[B, Hs, ...]`` has what belongs to these query heads: one head may stand for all."""
    return heads if structure.shape[1] > 1 else slice(0, 1)


def kinds_of(
    structure: Structure | None,
    b: int,
    heads: slice,
    blocks: slice,
    bounds: list[int],
    grid: Grid,
    sink_tokens: int,
    local_tokens: int,
    device: torch.device,
) -> Tensor:
    """The kind of every key block, int64 ``[G or 1, n, nk]``."""
    if structure is None:
        return _span_kinds(blocks, bounds, grid, sink_tokens, local_tokens, device)
    candidates = structure.candidates
    shared = heads_in(candidates.counts, heads)
    return _listed_kinds(candidates.counts[b, shared, blocks], candidates.blocks[b, shared, blocks])


def _span_kinds(
    blocks: slice, bounds: list[int], grid: Grid, sink_tokens: int, local_tokens: int, device: torch.device
) -> Tensor:
    """Of plain causal attention: candidates are a span."""
    _, start, _ = bounds
    _, index = rows_of(blocks, grid, device)
    real = real_rows(index, bounds, grid)
    position = index + bounds[0]
    last = torch.where(real, position, -1).amax(-1)
    at = torch.arange(grid.key_blocks, device=device) * grid.block_k
    visible = (at + grid.block_k > start) & (at <= last[:, None])
    sink = at.clamp_min(start) < start + sink_tokens
    candidate = visible & ~sink & before_local(blocks, bounds, grid, local_tokens, device)
    kinds = torch.where(candidate, torch.where(at >= start, WHOLE, PARTIAL), torch.where(visible, ALWAYS, HIDDEN))
    return kinds[None]


def before_local(blocks: slice, bounds: list[int], grid: Grid, local_tokens: int, device: torch.device) -> Tensor:
    """Key blocks before the local windows of all rows of a query block of plain causal attention, bool ``[n, nk]``."""
    _, index = rows_of(blocks, grid, device)
    low = (index[:, 0] + bounds[0]).clamp_min(bounds[1])
    stop = (low - local_tokens + 1).clamp_min(0) // grid.block_k
    stop = torch.where(real_rows(index, bounds, grid).any(-1), stop, 0)
    return torch.arange(grid.key_blocks, device=device) < stop[:, None]


def _listed_kinds(counts: Tensor, blocks: Tensor) -> Tensor:
    """Of ``[..., 3]`` counts and ``[..., nk]`` blocks."""
    size = blocks.shape[-1]
    edges = counts.cumsum(-1)[..., None, :]
    kind = (torch.arange(size, device=blocks.device)[:, None] >= edges).sum(-1)
    # What lies behind the last run means nothing, and goes to a column that is cut off.
    column = torch.where(kind == HIDDEN, size, blocks.long())
    kinds = torch.full((*blocks.shape[:-1], size + 1), HIDDEN, device=blocks.device)
    return kinds.scatter_(-1, column, kind)[..., :size]


def any_block(flags: Tensor) -> Tensor:
    """Indices of the blocks that are flagged for some head and query block, of bool ``[..., nk]``."""
    return flags.flatten(0, -2).any(0).nonzero()[:, 0]


def flagged_blocks(flags: Tensor) -> Tensor:
    """Every query block's flagged blocks of bool ``[..., nk]``: ascending, int64 ``[..., J]``, filled up with nk."""
    blocks = flags.shape[-1]
    count = flags.sum(-1, keepdim=True)
    width = int(count.max()) if count.numel() else 0
    order = flags.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)[..., :width]
    return torch.where(torch.arange(width, device=flags.device) < count, order, blocks)


def at_blocks(x: Tensor, blocks: Tensor, fill: int | float) -> Tensor:
    """Elements ``[..., J]`` of ``[..., nk]`` at blocks; `fill` where a block is nk."""
    return pad(x, (0, 1), value=fill).gather(-1, blocks)


def put_at_blocks(x: Tensor, blocks: Tensor, values: Tensor) -> Tensor:
    """``[..., nk]`` with values ``[..., J]`` put at blocks; what belongs to a block nk is dropped."""
    return pad(x, (0, 1)).scatter_(-1, blocks.expand_as(values), values)[..., :-1]


def products(rows: Tensor, keys: Tensor) -> Tensor:
    """``[G, n, M, D]`` rows times ``[G or 1, n, W, D]`` keys: ``[G, n, M, W]``."""
    if keys.shape[0] > 1:
        return rows @ keys.transpose(-1, -2)
    # Not by broadcasting, which would copy the keys for every head.
    folded = rows.transpose(0, 1).flatten(1, 2) @ keys[0].transpose(-1, -2)
    return folded.unflatten(1, (len(rows), -1)).transpose(0, 1)


def any_in_block(flags: Tensor, block_k: int) -> Tensor:
    """Whether a query block's rows have a flag in a block: bool ``[..., M, J * block_k]`` to ``[..., J]``."""
    return flags.unflatten(-1, (-1, block_k)).any(-1).any(-2)
