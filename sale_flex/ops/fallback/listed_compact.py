# SPDX-License-Identifier: BSD-3-Clause
"""From hit bits of a programmed call to index lists; see `sale_flex.kernels.listed_compact` for the contract."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from sale_flex.blocks.bits import unpack_bits


def listed_compact(
    hits: Tensor,
    nonfinite_values: Tensor | None,
    visible: Tensor,
    full: Tensor,
    always: Tensor,
    kv_heads: int,
    partial_width: int,
    full_width: int,
    key_blocks: int,
    want_kept: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Kept bits if wanted, counts of partial and full blocks, their ascending indices, and blocks without room."""
    kept = hits | always
    if nonfinite_values is not None:
        kept = kept | nonfinite_values.repeat_interleave(hits.shape[1] // kv_heads, 1)[:, :, None]
    kept = kept & visible
    partial_num, partial, partial_lost = _indices(unpack_bits(kept & ~full, key_blocks), partial_width)
    full_num, whole, full_lost = _indices(unpack_bits(kept & full, key_blocks), full_width)
    lists = torch.cat([partial, whole], -1)
    return kept if want_kept else hits.new_empty(0), partial_num, full_num, lists, partial_lost + full_lost


def _indices(flags: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Count and ascending indices of the first `width` set flags, and how many more there are."""
    order = flags.to(torch.uint8).argsort(dim=-1, descending=True, stable=True).to(torch.int32)
    count = flags.sum(-1, dtype=torch.int32)
    room = count.clamp_max(width)
    return room, pad(order, (0, width - order.shape[-1])), count - room
