# SPDX-License-Identifier: BSD-3-Clause
"""From hit bits to index lists; see `sale_flex.kernels.compact` for the contract."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from sale_flex.blocks.bits import pack_bits, unpack_bits
from sale_flex.blocks.geometry import always_blocks, early_blocks, full_blocks, visible_blocks
from sale_flex.kernels.arguments import BlockVisibility, Grid, Near


def nonfinite_blocks(value: Tensor, bounds: Tensor, block_k: int) -> Tensor:
    """Key blocks with a valid value that is not finite: bits, int32 ``[B, Hkv, ceil(nk / 32)]``."""
    at = torch.arange(value.shape[2], device=value.device)
    valid = (at >= bounds[:, 1, None]) & (at < bounds[:, 2, None])
    bad = ~value.isfinite().all(-1) & valid[:, None]
    return pack_bits(pad(bad, (0, -bad.shape[-1] % block_k)).unflatten(-1, (-1, block_k)).any(-1))


def build_lists(
    hits: Tensor,
    nonfinite: Tensor | None,
    bounds: Tensor,
    visibility: BlockVisibility | None,
    always: Tensor | None,
    kv_heads: int,
    grid: Grid,
    near: Near,
    partial_width: int,
    full_width: int,
    want_kept: bool,
    leave_early: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Kept bits if wanted, counts of partial and full blocks, their ascending indices, and blocks without room."""
    if visibility is None or always is None:
        kept, visible, full = (
            flags[:, None]
            for flags in (always_blocks(bounds, grid, *near), visible_blocks(bounds, grid), full_blocks(bounds, grid))
        )
        if leave_early:
            visible = visible & ~early_blocks(bounds, grid, near.min_length)[:, None, :, None]
    else:
        kept, visible, full = (unpack_bits(bits, grid.key_blocks) for bits in (always, *visibility[:2]))
    if nonfinite is not None:
        hits = hits | nonfinite.repeat_interleave(hits.shape[1] // kv_heads, 1)[:, :, None]
    kept = (kept | unpack_bits(hits, grid.key_blocks)) & visible
    partial_num, partial, partial_lost = _indices(kept & ~full, partial_width)
    full_num, whole, full_lost = _indices(kept & full, full_width)
    lists = torch.cat([partial, whole], -1)
    words = pack_bits(kept) if want_kept else hits.new_empty(0)
    return words, partial_num, full_num, lists, partial_lost + full_lost


def _indices(flags: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Count and ascending indices of the first `width` set flags, which a stable sort puts first; how many more."""
    order = flags.to(torch.uint8).argsort(dim=-1, descending=True, stable=True).to(torch.int32)
    count = flags.sum(-1, dtype=torch.int32)
    room = count.clamp_max(width)
    return room, pad(order, (0, width - order.shape[-1])), count - room
