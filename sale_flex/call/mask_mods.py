# SPDX-License-Identifier: BSD-3-Clause
"""The mask_mods of a SALE block mask: which positions see each other, and which blocks were kept.

The kept bits are looked up in a flat table. Its length is the same for all short calls, and strides and block sizes are
values of a tensor, so that no number that torch.compile could take for a dynamic one is part of the mask_mod's code:
Inductor's C++ template for flex_attention confuses the names of such symbols (torch 2.13 to 2.15 do).
"""

from torch import Tensor

from sale_flex import ops
from sale_flex.mods import MaskMod
from sale_flex.mods.held import mark_static

_TABLE_WORDS = 2**20
"""Length of the table of a call that needs no more: 4 MiB, enough for 32 heads of 60,000 tokens in 64x64 blocks."""


def visible(bounds: Tensor) -> MaskMod:
    """The mask_mod of positions: causal, valid, and the query no padding. `bounds` is int32 ``[B, 3]``."""
    mark_static(bounds)

    def is_visible(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        position = q_idx + bounds[b, 0]
        return (kv_idx >= bounds[b, 1]) & (kv_idx <= position) & (position < bounds[b, 2])

    return is_visible


def valid(bounds: Tensor) -> MaskMod:
    """`visible` without causality: the key is valid, and the query no padding."""
    mark_static(bounds)

    def is_valid(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        position = q_idx + bounds[b, 0]
        start, end = bounds[b, 1], bounds[b, 2]
        return (kv_idx >= start) & (kv_idx < end) & (position >= start) & (position < end)

    return is_valid


def kept_block(kept: Tensor, block_q: int, block_k: int) -> MaskMod:
    """The mask_mod of a selection: whether the element's block is kept.

    Args:
        kept: int32 ``[1 | B, 1 | Hq, nq, ceil(nk / 32)]``: bits of the blocks.
        block_q: Query rows a block, a power of two.
        block_k: Keys a block, a power of two.
    """
    words = _TABLE_WORDS if kept.numel() <= _TABLE_WORDS else kept.numel()
    table, layout = ops.kept_table(kept, block_q, block_k, words)
    mark_static(layout)
    if words == _TABLE_WORDS:
        mark_static(table)

    def is_in_kept_block(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        query_block, block = q_idx >> layout[3], kv_idx >> layout[4]
        word = table[b * layout[0] + h * layout[1] + query_block * layout[2] + (block >> 5)]
        return ((word >> (block & 31)) & 1) == 1

    return is_in_kept_block
