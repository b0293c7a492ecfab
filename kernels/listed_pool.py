# SPDX-License-Identifier: BSD-3-Clause
"""Pooled query rows of a programmed call: the rows themselves, their codes, and the logit of the smoothing mean.

Entry point: `listed_pool`. The arithmetic is that of `pool.pool_queries`, to the bit; what a row's own sink and local
keys weigh is left to `listed_mass`, because it depends on the score_mod and the mask. Memory-bound.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .primitives import rotated, rotation_stages, row_codes, squared_codes


@triton.jit
def _listed_pool_kernel(
    query_ptr, stride_b, stride_h, stride_s, stride_d, mean_ptr, bounds_ptr,
    rows_ptr, codes_ptr, squares_ptr, scale_ptr, shift_ptr,
    logit_scale, q_len, row_count, tiles, heads, group,
    D: tl.constexpr, BLOCK_D: tl.constexpr, P: tl.constexpr, SAMPLE: tl.constexpr, TOP: tl.constexpr,
    SQUARES: tl.constexpr, STAGES: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """BLOCK_R pooled rows of one head.

    Args:
        query_ptr: Queries ``[B, Hq, Sq, D]``.
        stride_b: From batch row to batch row.
        stride_h: From head to head.
        stride_s: From row to row.
        stride_d: From channel to channel.
        mean_ptr: Smoothing mean, float32 ``[B, Hkv, D]``.
        bounds_ptr: int32 ``[B, 3]`` = (q_offset, start, end).
        rows_ptr: Result: pooled rows ``[B, Hq, R, D]``, the queries' dtype.
        codes_ptr: Result: codes of the rows, int8 ``[B, Hq, R, D]``.
        squares_ptr: Result: codes of `squared_codes`, int8 ``[B, Hq, R, D]``; not written unless SQUARES.
        scale_ptr: Result: scales of the codes, float32 ``[B, Hq, R]``; NaN for a row that is not finite.
        shift_ptr: Result: logits of the smoothing mean, float32 ``[B, Hq, R]``.
        logit_scale: Softmax scale.
        q_len: Sq.
        row_count: R.
        tiles: Programs a head.
        heads: Hq.
        group: Query heads a KV head.
        D: Channels.
        BLOCK_D: Channels, rounded up to a power of two.
        P: Query rows a pooled row.
        SAMPLE: Whether the last real row of a pool stands for it, instead of the mean.
        TOP: Largest code: 7 or 127.
        SQUARES: Whether squares of codes are wanted; codes are then not rotated.
        STAGES: Stages of the rotation: log2 of the channels that it mixes; not used if SQUARES.
        BLOCK_R: Pooled rows a program.
    """
    bh = (tl.program_id(0) // tiles).to(tl.int64)
    batch = bh // heads
    offset = tl.load(bounds_ptr + batch * 3)
    start = tl.load(bounds_ptr + batch * 3 + 1)
    end = tl.load(bounds_ptr + batch * 3 + 2)
    row = tl.program_id(0) % tiles * BLOCK_R + tl.arange(0, BLOCK_R)
    offsets_d = tl.arange(0, BLOCK_D)
    in_head = (offsets_d < D)[None, :]
    query_ptr += batch * stride_b + (bh % heads) * stride_h + offsets_d[None, :] * stride_d
    pooled = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    count = tl.zeros([BLOCK_R], tl.int32)
    for member in tl.static_range(P):
        source = row * P + member
        real = (source < q_len) & (offset + source >= start) & (offset + source < end)
        query = tl.load(query_ptr + source.to(tl.int64)[:, None] * stride_s, mask=real[:, None] & in_head, other=0.0)
        query = query.to(tl.float32)
        if SAMPLE:
            pooled = tl.where(real[:, None], query, pooled)
        else:
            pooled += query
        count += real.to(tl.int32)
    if not SAMPLE:
        pooled *= tl.math.div_rn(1.0, tl.maximum(count, 1).to(tl.float32))[:, None]
    rounded = pooled.to(rows_ptr.dtype.element_ty)
    pooled = rounded.to(tl.float32)

    codes, code_scale = row_codes(pooled if SQUARES else rotated(pooled, STAGES), TOP)
    at = bh * row_count + row
    there = row < row_count
    elements = at[:, None] * D + offsets_d[None, :]
    mask = there[:, None] & in_head
    tl.store(rows_ptr + elements, rounded, mask=mask)
    tl.store(codes_ptr + elements, codes, mask=mask)
    if SQUARES:
        tl.store(squares_ptr + elements, squared_codes(codes, TOP), mask=mask)
    tl.store(scale_ptr + at, code_scale, mask=there)
    mean = tl.load(mean_ptr + bh // group * D + offsets_d, mask=offsets_d < D, other=0.0)
    tl.store(shift_ptr + at, tl.sum(pooled * mean[None, :], axis=1) * logit_scale, mask=there)


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
    """Pooled rows of all query blocks.

    Args:
        query: ``[B, Hq, Sq, D]``, any strides.
        mean: float32 ``[B, Hkv, D]``, the smoothing mean.
        bounds: int32 ``[B, 3]``.
        scale: Softmax scale.
        block_q: Query rows a block.
        pool: Query rows a pooled row, a divisor of `block_q`.
        sample: Take the last real row of each pool instead of the mean.
        bits: 4 or 8.
        squares: Whether the squares of the codes are wanted, as moments want them; codes that meet single keys are
            rotated like those.

    Returns:
        Rows ``[B, Hq, R, D]`` in the query's dtype, ``R = nq * block_q / pool``, 0 where no row is real; their codes
        int8; squares of the codes int8, in 8 bits divided by 128 and rounded (R = 0 if not wanted); scales float32
        ``[B, Hq, R]`` (NaN: a row that is not finite); and float32 ``[B, Hq, R]``: `scale` times row times `mean`.
    """
    batch, heads, q_len, dim = query.shape
    count = triton.cdiv(q_len, block_q) * block_q // pool
    rows = query.new_empty(batch, heads, count, dim)
    codes = query.new_empty(batch, heads, count, dim, dtype=torch.int8)
    square_codes = query.new_empty(batch, heads, count if squares else 0, dim, dtype=torch.int8)
    code_scale, shift = (query.new_empty(batch, heads, count, dtype=torch.float32) for _ in range(2))
    tile = 32
    tiles = triton.cdiv(count, tile)
    _listed_pool_kernel[(tiles * batch * heads,)](
        query, *query.stride(), mean, bounds, rows, codes, square_codes, code_scale, shift,
        scale, q_len, count, tiles, heads, heads // mean.shape[1],
        D=dim, BLOCK_D=triton.next_power_of_2(dim), P=pool, SAMPLE=sample, TOP=2 ** (bits - 1) - 1, SQUARES=squares,
        STAGES=rotation_stages(dim), BLOCK_R=tile, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return rows, codes, square_codes, code_scale, shift
