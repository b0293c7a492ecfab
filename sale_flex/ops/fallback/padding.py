# SPDX-License-Identifier: BSD-3-Clause
"""What of a batch is no padding, as tensor expressions of its bounds, and tensors filled up to whole blocks."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from sale_flex.blocks.bits import unpack_bits
from sale_flex.kernels.arguments import Grid
from sale_flex.ops.fallback.tiles import heads_in


def row_positions(bounds: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Where the rows of all query blocks stand, int32 ``[B, nq * BQ]``, and which are there and no padding."""
    index = torch.arange(grid.query_blocks * grid.block_q, dtype=torch.int32, device=bounds.device)
    at = index + bounds[:, :1]
    return at, (index < grid.q_len) & (at >= bounds[:, 1:2]) & (at < bounds[:, 2:])


def valid_keys(bounds: Tensor, grid: Grid) -> Tensor:
    """Which keys of all key blocks are there and no padding, bool ``[B, nk * BK]``."""
    at = torch.arange(grid.key_blocks * grid.block_k, dtype=torch.int32, device=bounds.device)
    return (at >= bounds[:, 1:2]) & (at < bounds[:, 2:])


def without_padding(x: Tensor, keep: Tensor) -> Tensor:
    """Rows ``[..., S, D]`` in float32, filled up to the N of bool ``[N]``, with 0 where it is False."""
    filled = pad(x.float(), (0, 0, 0, len(keep) - x.shape[-2]))
    return torch.where(keep[:, None], filled, 0.0)


def shown_blocks(visible: Tensor | None, b: int, heads: slice, blocks: slice, grid: Grid) -> Tensor | bool:
    """Blocks that mods show to query blocks, bool ``[G or 1, n, nk]``; True where there are no mods."""
    return True if visible is None else unpack_bits(visible[b, heads_in(visible, heads), blocks], grid.key_blocks)
