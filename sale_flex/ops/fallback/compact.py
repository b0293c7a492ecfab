# SPDX-License-Identifier: BSD-3-Clause
"""From hit bits to index lists; see `sale_flex.kernels.compact` for the contract."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from sale_flex.blocks.bits import pack_bits, unpack_bits
from sale_flex.blocks.geometry import Grid, always_blocks, early_blocks, full_blocks, visible_blocks


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
    kv_heads: int,
    q_len: int,
    kv_len: int,
    block_q: int,
    block_k: int,
    sink_tokens: int,
    local_tokens: int,
    min_length: int,
    partial_width: int,
    full_width: int,
    want_kept: bool,
    leave_early: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Kept bits if wanted, counts of partial and full blocks, and the ascending indices of both side by side."""
    grid = Grid(q_len, kv_len, block_q, block_k)
    if nonfinite is not None:
        hits = hits | nonfinite.repeat_interleave(hits.shape[1] // kv_heads, 1)[:, :, None]
    always = always_blocks(bounds, grid, sink_tokens, local_tokens, min_length)[:, None]
    visible = visible_blocks(bounds, grid)[:, None]
    kept = (unpack_bits(hits, grid.key_blocks) | always) & visible
    if leave_early:
        kept &= ~early_blocks(bounds, grid, min_length)[:, None, :, None]
    full = kept & full_blocks(bounds, grid)[:, None]
    partial_num, partial = _indices(kept & ~full, partial_width)
    full_num, whole = _indices(full, full_width)
    return pack_bits(kept) if want_kept else hits.new_empty(0), partial_num, full_num, torch.cat([partial, whole], -1)


def _indices(flags: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Count and ascending indices of the first `width` set flags; a stable sort puts them first."""
    order = flags.to(torch.uint8).argsort(dim=-1, descending=True, stable=True).to(torch.int32)
    return flags.sum(-1, dtype=torch.int32).clamp_max(width), pad(order, (0, width - order.shape[-1]))
