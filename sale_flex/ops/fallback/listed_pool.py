# SPDX-License-Identifier: BSD-3-Clause
"""Pooled query rows of a programmed call; see `sale_flex.kernels.listed_pool` for the contract."""

import torch
from torch import Tensor

from sale_flex.ops.fallback.pool import pool_rows
from sale_flex.ops.fallback.quantize import quantize_rows
from sale_flex.ops.fallback.rotation import rotated


def listed_pool(
    query: Tensor,
    mean: Tensor,
    bounds: Tensor,
    scale: float,
    block_q: int,
    pool: int,
    sample: bool,
    bits: int,
    squares: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Pooled rows, their codes, the squares of those (or none), the codes' scales, and logits of the smoothing mean."""
    heads, q_len = query.shape[1:3]
    blocks = -(-q_len // block_q)
    index = torch.arange(blocks * block_q, device=query.device)
    pooled = []
    for b, (offset, start, end) in enumerate(bounds.tolist()):
        real = (index < q_len) & (index + offset >= start) & (index + offset < end)
        pooled.append(pool_rows(query[b], real, pool, sample))
    rows = torch.stack(pooled)
    codes, code_scale = quantize_rows(rows if squares else rotated(rows), bits)
    codes = codes[:, :, : rows.shape[2]]
    squared = codes.new_empty(*codes.shape[:2], 0, codes.shape[3])  # an op's outputs share no memory
    if squares:
        wide = codes.int().square()
        squared = (wide if bits == 4 else (wide + 64) >> 7).to(torch.int8)
    shift = (rows @ mean.repeat_interleave(heads // mean.shape[1], 1)[..., None])[..., 0] * scale
    return rows.to(query.dtype), codes.contiguous(), squared.contiguous(), code_scale, shift
