# SPDX-License-Identifier: BSD-3-Clause
"""From hit bits to index lists; see `sale_flex.kernels.compact` for the contract."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from sale_flex.fallback.bits import pack_bits, unpack_bits
from sale_flex.geometry import Grid, always_blocks, full_blocks, visible_blocks


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Kept bits, and count and ascending indices of the partial and the full blocks."""
    grid = Grid(q_len, kv_len, block_q, block_k)
    if nonfinite is not None:
        hits = hits | nonfinite.repeat_interleave(hits.shape[1] // kv_heads, 1)[:, :, None]
    always = always_blocks(bounds, grid, sink_tokens, local_tokens, min_length)[:, None]
    visible = visible_blocks(bounds, grid)[:, None]
    kept = (unpack_bits(hits, grid.key_blocks) | always) & visible
    full = kept & full_blocks(bounds, grid)[:, None]
    return (pack_bits(kept), *_indices(kept & ~full), *_indices(full))


def _indices(flags: Tensor) -> tuple[Tensor, Tensor]:
    """Count and ascending indices of the set flags; a stable sort puts them first."""
    order = flags.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)
    return flags.sum(-1, dtype=torch.int32), order.to(torch.int32)
