# SPDX-License-Identifier: BSD-3-Clause
"""Ops that say what a call's mods make of the grid of blocks."""

import torch
from torch import Tensor

from sale_flex.blocks.bits import pack_bits
from sale_flex.kernels.arguments import BlockVisibility, CandidateBlocks, Grid, Length, MaskSpec, ModLike, Near
from sale_flex.ops.codes import ceil_div
from sale_flex.ops.define import op


@op("structure")
def block_structure(spec: MaskSpec, key_range: ModLike, heads: Length, grid: Grid) -> BlockVisibility:
    """Visible and full blocks, and what rows see, for Hs = `heads` heads.

    `key_range` promises where a mask_mod hides everything: a program ``(b, h, first_q, last_q) -> (first, last key)``.
    """
    bounds, batch = spec.bounds, spec.bounds.shape[0]
    words = (batch, heads, grid.query_blocks, grid.words)
    ends = bounds.new_empty(batch, heads, 2, grid.query_blocks * grid.block_q)
    return BlockVisibility(bounds.new_empty(words), bounds.new_empty(words), ends)


@op("structure")
def candidate_blocks(
    visibility: BlockVisibility, bounds: Tensor, causal: bool, grid: Grid, near: Near
) -> CandidateBlocks:
    """Every query block's visible blocks: always kept, and candidates of a rule."""
    visible = visibility.visible
    lines = visible.shape[:3]
    lists = visible.new_empty(*lines, grid.key_blocks)
    return CandidateBlocks(torch.empty_like(visible), visible.new_empty(*lines, 3), lists)


def _block_mask_bits(
    partial_num: Tensor, partial_idx: Tensor, full_num: Tensor | None, full_idx: Tensor | None, key_blocks: int
) -> Tensor:
    lines = partial_num.shape
    flags = torch.zeros(*lines, key_blocks + 1, dtype=torch.bool, device=partial_num.device)
    for num, index in ((partial_num, partial_idx), (full_num, full_idx)):
        if num is None or index is None:
            continue
        slot = torch.arange(index.shape[-1], device=index.device)
        # What stands behind the count goes to a column that is cut off.
        flags.scatter_(-1, torch.where(slot < num[..., None], index, key_blocks).long(), True)
    return pack_bits(flags[..., :key_blocks])


@op(_block_mask_bits)
def block_mask_bits(
    partial_num: Tensor, partial_idx: Tensor, full_num: Tensor | None, full_idx: Tensor | None, key_blocks: Length
) -> Tensor:
    """Bits of the blocks in a BlockMask's lists, int32 ``[B, H, nq, ceil(nk / 32)]``."""
    return partial_num.new_empty(*partial_num.shape, ceil_div(key_blocks, 32))
