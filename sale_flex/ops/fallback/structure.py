# SPDX-License-Identifier: BSD-3-Clause
"""What mods make of the grid of blocks: visible and full ones, always-kept ones, candidates.

See `sale_flex.kernels.structure` for the contract. Work is done in tiles: some query blocks of some heads against all
keys.
"""

import torch
from torch import Tensor

from sale_flex.blocks.bits import pack_bits, unpack_bits
from sale_flex.kernels.arguments import BlockVisibility, CandidateBlocks, Grid, MaskSpec, Near
from sale_flex.ops.fallback.tiles import (
    ALWAYS,
    HIDDEN,
    PARTIAL,
    WHOLE,
    all_elements,
    any_in_block,
    keys_of,
    rows_of,
    tiles,
)
from sale_flex.ops.fallback.visibility import Range, visible

NOTHING = 2**30
"""First key of a row that sees none; its last is -1."""


def block_structure(spec: MaskSpec, key_range: Range | None, heads: int, grid: Grid) -> BlockVisibility:
    """Bits of visible and of full blocks, and the first and the last key that every row sees.

    `key_range` only promises where a mask hides everything; asking the mask costs little here.
    """
    bounds, block_k = spec.bounds, grid.block_k
    device, blocks = bounds.device, grid.query_blocks
    words = torch.zeros(len(bounds), heads, blocks, grid.words, dtype=torch.int32, device=device)
    full = torch.zeros_like(words)
    ends = torch.zeros(len(bounds), heads, 2, blocks * grid.block_q, dtype=torch.int32, device=device)
    keys = keys_of(torch.arange(grid.key_blocks, device=device), block_k)
    for b in range(len(bounds)):
        for head, block in tiles(heads, heads, blocks, all_elements(grid), device):
            lines, index = rows_of(block, grid, device)
            q = index[..., None]
            sees = visible(spec, b, head, q, keys, grid)  # [G, n, BQ, nk * BK]
            outside = (q >= grid.q_len) | (keys >= grid.kv_len)
            words[b, head, block] = pack_bits(any_in_block(sees, block_k))
            full[b, head, block] = pack_bits(~any_in_block(~(sees | outside), block_k))
            ends[b, head, 0, lines] = torch.where(sees, keys, NOTHING).amin(-1).flatten(1)
            ends[b, head, 1, lines] = torch.where(sees, keys, -1).amax(-1).flatten(1)
    return BlockVisibility(words, full, ends)


def candidate_blocks(
    visibility: BlockVisibility, bounds: Tensor, causal: bool, grid: Grid, near: Near
) -> CandidateBlocks:
    """Bits of always-kept blocks, and every query block's runs: always kept, partial candidates, whole candidates."""
    words, full, rows = visibility
    device = words.device
    always = torch.zeros_like(words)
    counts = words.new_zeros(*words.shape[:3], 3)
    lists = words.new_zeros(*words.shape[:3], grid.key_blocks)
    at = torch.arange(grid.key_blocks, dtype=torch.int32, device=device) * grid.block_k
    for b, (_, start, end) in enumerate(bounds.tolist()):
        inside = (at >= start) & (at + grid.block_k <= end)
        heads = words.shape[1]
        for head, block in tiles(heads, heads, grid.query_blocks, all_elements(grid), device):
            lines, index = rows_of(block, grid, device)
            first, last = rows[b, head, :, lines].unflatten(-1, index.shape).unbind(1)  # [G, n, BQ]
            spans = intervals(first, index + bounds[b, 0], causal, near)
            spans.append((first, torch.where(last - first < near.min_length, last, -1)))
            sees = unpack_bits(words[b, head, block], grid.key_blocks)
            keep = touched_blocks(spans, last >= 0, grid) & sees
            candidate = torch.where(unpack_bits(full[b, head, block], grid.key_blocks) & inside, WHOLE, PARTIAL)
            kinds = torch.where(keep, ALWAYS, torch.where(sees, candidate, HIDDEN))
            always[b, head, block] = pack_bits(keep)
            counts[b, head, block] = torch.stack([(kinds == kind).sum(-1) for kind in range(HIDDEN)], -1).int()
            lists[b, head, block] = kinds.argsort(dim=-1, stable=True).int()
    return CandidateBlocks(always, counts, lists)


def intervals(first: Tensor, at: Tensor, causal: bool, near: Near) -> list[tuple[Tensor, Tensor]]:
    """Sink and local keys of rows: first and last, empty where they cross. Of rows that see nothing, they mean nothing.

    Args:
        first: int32 ``[G, n, BQ]``: the first key that a row sees.
        at: int32 ``[n, BQ]``: key index at which it stands.
        causal: Whether local keys end at the row; if not, as many begin there.
        near: How many there are.
    """
    at = at.expand_as(first)
    return [
        (first, first + (near.sink_tokens - 1)),
        (at - (near.local_tokens - 1), at if causal else at + (near.local_tokens - 1)),
    ]


def touched_blocks(spans: list[tuple[Tensor, Tensor]], sees: Tensor, grid: Grid) -> Tensor:
    """Blocks with a key in the interval of some row that sees anything, bool ``[G, n, nk]``.

    Args:
        spans: First and last key of intervals, int32 ``[G, n, BQ]`` each.
        sees: bool ``[G, n, BQ]``: whether a row sees anything.
        grid: Lengths and blocks.
    """
    at = torch.arange(grid.key_blocks, dtype=torch.int32, device=sees.device) * grid.block_k
    touched = torch.zeros(*sees.shape, grid.key_blocks, dtype=torch.bool, device=sees.device)
    for low, high in spans:
        low, high = low[..., None], high[..., None]
        touched |= (low <= high) & (low < at + grid.block_k) & (high >= at)
    return (touched & sees[..., None]).any(-2)
