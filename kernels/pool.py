# SPDX-License-Identifier: BSD-3-Clause
"""Pooled query rows: their codes, and what their own sink and local keys weigh (docs/semantics.md, "The mass rule").

Entry points: `pool_queries`, and for calls under mods `pool_rows`. A program of the first takes a few rows of some
heads, pools their rows, quantises them, and takes the exact softmax sum over the keys that are no candidates: the
sink's blocks, and those from the local window on. Heads that share keys go together, so that a tile of keys is read
once for them. The second leaves that sum to `masked_mass`, because it depends on the mods.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arguments import Grid, MassOptions, Near
from .primitives import is_finite, rotated, rotation_stages, row_codes, squared_codes

LOG2E = 1.4426950408889634


@triton.jit
def _accumulate(
    peak, total, query, key_ptr, stride_s, stride_d, at, stop, shift, scale, allowed, D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Fold the base-2 logits of one tile of keys into the running maximum `peak` and sum `total`, and return both.

    Args:
        peak: Largest logit so far, float32 ``[BLOCK_R]``.
        total: Sum of exponentials so far, relative to `peak`, float32 ``[BLOCK_R]``.
        query: Rows ``[BLOCK_R, BLOCK_D]``, the keys' dtype.
        key_ptr: Keys of the KV head ``[Skv, D]``.
        stride_s: From key to key.
        stride_d: From channel to channel.
        at: Keys of the tile, int32 ``[BLOCK_N]``.
        stop: One past the last key to read.
        shift: Rows times the smoothing mean, float32 ``[BLOCK_R]``.
        scale: Softmax scale times log2(e).
        allowed: Which keys count for each row, int1 ``[BLOCK_R, BLOCK_N]``.
        D: Channels.
        BLOCK_D: Channels, rounded up to a power of two.
    """
    offsets_d = tl.arange(0, BLOCK_D)
    mask = (offsets_d < D)[:, None] & (at < stop)[None, :]
    pointers = key_ptr + at.to(tl.int64)[None, :] * stride_s + offsets_d[:, None] * stride_d
    key = tl.load(pointers, mask=mask, other=0.0)  # [BLOCK_D, BLOCK_N]
    logits = (tl.dot(query, key, input_precision="ieee") - shift[:, None]) * scale
    logits = tl.where(allowed & is_finite(logits), logits, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(logits, axis=1))
    # A row that has seen nothing yet has the peak -inf, and -inf - -inf is NaN.
    safe = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    total = total * tl.exp2(peak - safe) + tl.sum(tl.exp2(logits - safe[:, None]), axis=1)
    return new_peak, total


@triton.jit
def _pooled(
    query_ptr, stride_h, stride_s, head, row, offset, start, end, q_len, in_head, P: tl.constexpr,
    SAMPLE: tl.constexpr,
):  # fmt: skip
    """Pooled rows in the queries' dtype ``[R, BLOCK_D]``, and the position of each one's last real row, -1 for none.

    Args:
        query_ptr: The batch row's queries, at the channels of the tile: pointers ``[1, BLOCK_D]``.
        stride_h: From head to head.
        stride_s: From row to row.
        head: Query heads, int64 ``[R]``.
        row: Pooled rows of the call, ``[R]``.
        offset: Key position of query row 0.
        start: First valid key.
        end: One past the last valid key.
        q_len: Sq.
        in_head: Which channels there are, int1 ``[1, BLOCK_D]``.
        P: Query rows a pooled row.
        SAMPLE: Whether the last real row of a pool stands for it, instead of the mean.
    """
    pooled = tl.zeros([row.shape[0], in_head.shape[1]], tl.float32)
    count = tl.zeros([row.shape[0]], tl.int32)
    position = tl.full([row.shape[0]], -1, tl.int32)
    for member in tl.static_range(P):
        source = row * P + member
        real = (source < q_len) & (offset + source >= start) & (offset + source < end)
        pointers = query_ptr + (head * stride_h + source.to(tl.int64) * stride_s)[:, None]
        query = tl.load(pointers, mask=real[:, None] & in_head, other=0.0).to(tl.float32)
        if SAMPLE:
            pooled = tl.where(real[:, None], query, pooled)
        else:
            pooled += query
        count += real.to(tl.int32)
        position = tl.where(real, offset + source, position)
    if not SAMPLE:
        pooled *= tl.math.div_rn(1.0, tl.maximum(count, 1).to(tl.float32))[:, None]
    return pooled.to(query_ptr.dtype.element_ty), position


@triton.jit
def _pool_queries_kernel(
    query_ptr, stride_qb, stride_qh, stride_qs, stride_qd,
    key_ptr, stride_kb, stride_kh, stride_ks, stride_kd,
    mean_ptr, bounds_ptr, codes_ptr, squares_ptr, scale_ptr, reference_ptr,
    logit_scale, q_len, first_row, padded_rows, sink_tokens, local_tokens,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    P: tl.constexpr, SAMPLE: tl.constexpr, TOP: tl.constexpr, SQUARES: tl.constexpr, STAGES: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """BLOCK_R / TOGETHER pooled rows of TOGETHER heads that share keys, from pooled row `first_row` of the call on.

    Args:
        query_ptr: Queries ``[B, Hq, Sq, D]``.
        stride_qb: Queries: from batch row to batch row.
        stride_qh: Queries: from head to head.
        stride_qs: Queries: from row to row.
        stride_qd: Queries: from channel to channel.
        key_ptr: Keys ``[B, Hkv, Skv, D]``, the queries' dtype.
        stride_kb: Keys: from batch row to batch row.
        stride_kh: Keys: from head to head.
        stride_ks: Keys: from key to key.
        stride_kd: Keys: from channel to channel.
        mean_ptr: Smoothing mean, float32 ``[B, Hkv, D]``.
        bounds_ptr: int32 ``[B, 3]`` = (q_offset, start, end).
        codes_ptr: Result: codes of pooled rows, int8 ``[B, Hq, R, D]``.
        squares_ptr: Result: codes of `squared_codes`, int8 ``[B, Hq, R, D]``; not written unless SQUARES.
        scale_ptr: Result: scales of the codes, float32 ``[B, Hq, R]``; NaN for a row that is not finite.
        reference_ptr: Result: log2 of the sums over the exact part, float32 ``[B, Hq, R]``; +inf for padding.
        logit_scale: Softmax scale times log2(e).
        q_len: Sq.
        first_row: Pooled row of the call that is row 0 of the results.
        padded_rows: R: pooled rows of this launch, padded.
        sink_tokens: First valid keys whose blocks are no candidates.
        local_tokens: Keys up to a row's position whose blocks are no candidates.
        HEADS: Hq.
        KV_HEADS: Hkv.
        D: Channels.
        BLOCK_D: Channels, rounded up to a power of two.
        P: Query rows a pooled row.
        SAMPLE: Whether the last real row of a pool stands for it, instead of the mean.
        TOP: Largest code: 7 or 127.
        SQUARES: Whether squares of codes are wanted; codes are then not rotated.
        STAGES: Stages of the rotation: log2 of the channels that it mixes; not used if SQUARES.
        BLOCK_Q: Query rows a block.
        BLOCK_K: Keys a block.
        BLOCK_R: Rows a program.
        BLOCK_N: Keys a step.
        TOGETHER: Heads a program.
    """
    ROWS: tl.constexpr = BLOCK_R // TOGETHER
    first_head = tl.program_id(1).to(tl.int64) * TOGETHER
    batch = first_head // HEADS
    kv_head = first_head % HEADS // (HEADS // KV_HEADS)
    offset = tl.load(bounds_ptr + batch * 3)
    start = tl.load(bounds_ptr + batch * 3 + 1)
    end = tl.load(bounds_ptr + batch * 3 + 2)

    local_row = tl.program_id(0) * ROWS + tl.arange(0, BLOCK_R) % ROWS
    row = first_row + local_row
    bh = first_head + tl.arange(0, BLOCK_R) // ROWS
    offsets_d = tl.arange(0, BLOCK_D)
    query_ptr += batch * stride_qb + offsets_d[None, :] * stride_qd
    in_head = (offsets_d < D)[None, :]
    rounded, position = _pooled(
        query_ptr, stride_qh, stride_qs, bh % HEADS, row, offset, start, end, q_len, in_head, P, SAMPLE
    )
    pooled = rounded.to(tl.float32)
    codes, code_scale = row_codes(pooled if SQUARES else rotated(pooled, STAGES), TOP)
    out = bh * padded_rows + local_row
    tl.store(codes_ptr + out[:, None] * D + offsets_d[None, :], codes, mask=in_head)
    if SQUARES:
        squares_at = squares_ptr + out[:, None] * D + offsets_d[None, :]
        tl.store(squares_at, squared_codes(codes, TOP), mask=in_head)
    tl.store(scale_ptr + out, code_scale)

    # Keys in candidate blocks, from `sink_end` up to the row's `near`, are left to the estimate.
    sink_end = tl.cdiv(start + sink_tokens, BLOCK_K) * BLOCK_K
    low = tl.maximum(offset + row * P // BLOCK_Q * BLOCK_Q, start)
    near = tl.maximum(tl.maximum(low - local_tokens + 1, 0) // BLOCK_K * BLOCK_K, sink_end)
    mean = tl.load(mean_ptr + (batch * KV_HEADS + kv_head) * D + offsets_d, mask=offsets_d < D, other=0.0)
    shift = tl.sum(pooled * mean[None, :], axis=1)
    key_ptr += batch * stride_kb + kv_head * stride_kh
    peak = tl.full([BLOCK_R], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    last = tl.max(position)
    sink_first = start // BLOCK_N
    sink_tiles = tl.maximum(tl.cdiv(tl.minimum(sink_end, last + 1), BLOCK_N) - sink_first, 0)
    local_first = tl.min(near) // BLOCK_N
    local_tiles = tl.maximum(tl.cdiv(last + 1, BLOCK_N) - local_first, 0)
    for tile in range(0, sink_tiles + local_tiles):
        first = tl.where(tile < sink_tiles, sink_first + tile, local_first + tile - sink_tiles) * BLOCK_N
        at = first + tl.arange(0, BLOCK_N)
        in_sink = (at >= start) & (at < sink_end) & (tile < sink_tiles)
        in_window = (at[None, :] >= near[:, None]) & (tile >= sink_tiles)
        allowed = (in_sink[None, :] | in_window) & (at[None, :] <= position[:, None])
        peak, total = _accumulate(
            peak, total, rounded, key_ptr, stride_ks, stride_kd, at, last + 1, shift, logit_scale, allowed, D, BLOCK_D
        )
    # Padding is +inf above everything, so that it hits nothing.
    reference = tl.where(position >= 0, peak + tl.log2(total), float("inf"))
    tl.store(reference_ptr + out, reference)


@triton.jit
def _pool_rows_kernel(
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
    query_ptr += batch * stride_b + offsets_d[None, :] * stride_d
    head = tl.zeros([BLOCK_R], tl.int64) + bh % heads
    rounded, _ = _pooled(query_ptr, stride_h, stride_s, head, row, offset, start, end, q_len, in_head, P, SAMPLE)
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


def tile_options(head_dim: int, element_size: int) -> dict[str, int]:
    """Tile and launch options; wide rows take smaller tiles, to fit every GPU's shared memory."""
    wide = head_dim * element_size > 256
    return {"BLOCK_R": 32 if wide else 64, "BLOCK_N": 32 if wide else 64, "num_warps": 4, "num_stages": 2}


def pool_queries(
    query: Tensor,
    key: Tensor,
    mean: Tensor,
    bounds: Tensor,
    scale: float,
    grid: Grid,
    options: MassOptions,
    near: Near,
    first_block: int,
    blocks: int,
    row_multiple: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pooled rows of the query blocks from `first_block` on, and the base-2 logarithm of their exact part.

    Args:
        query: ``[B, Hq, Sq, D]``, any strides.
        key: ``[B, Hkv, Skv, D]``, any strides.
        mean: float32 ``[B, Hkv, D]``, the smoothing mean.
        bounds: int32 ``[B, 3]``.
        scale: Softmax scale.
        grid: Lengths and blocks.
        options: How rows are pooled and coded. Moments want the squares of the codes as well; codes that meet single
            keys are rotated like those.
        near: Blocks that are no candidates.
        first_block: First query block.
        blocks: How many query blocks.
        row_multiple: The results have rows up to a multiple of this, at least 64, a power of two.

    Returns:
        Codes int8 ``[B, Hq, R, D]``; their squares, in 8 bits divided by 128 and rounded (R = 0 if not wanted); scales
        float32 ``[B, Hq, R]`` (NaN: a row that is not finite); and the reference float32 ``[B, Hq, R]``: log2 of the
        sum of exponentials over visible keys in no candidate block, +inf for padding.
    """
    batch, heads, q_len, dim = query.shape
    rows, squares = grid.block_q // options.pool, options.sub_block > 1
    padded = triton.cdiv(blocks * rows, row_multiple) * row_multiple
    codes = query.new_empty(batch, heads, padded, dim, dtype=torch.int8)
    square_codes = query.new_empty(batch, heads, padded if squares else 0, dim, dtype=torch.int8)
    code_scale, reference = (query.new_empty(batch, heads, padded, dtype=torch.float32) for _ in range(2))
    launch = tile_options(dim, query.element_size())
    group = heads // key.shape[1]
    together = min(group & -group, launch["BLOCK_R"] // 16)  # a power of two that divides the group
    _pool_queries_kernel[(padded // (launch["BLOCK_R"] // together), batch * heads // together)](
        query, *query.stride(), key, *key.stride(), mean, bounds, codes, square_codes, code_scale, reference,
        scale * LOG2E, q_len, first_block * rows, padded, near.sink_tokens, near.local_tokens,
        HEADS=heads, KV_HEADS=key.shape[1], D=dim, BLOCK_D=triton.next_power_of_2(dim),
        P=options.pool, SAMPLE=options.sample, TOP=2 ** (options.bits - 1) - 1, SQUARES=squares,
        STAGES=rotation_stages(dim), BLOCK_Q=grid.block_q, BLOCK_K=grid.block_k, TOGETHER=together,
        enable_fp_fusion=False, **launch,
    )  # fmt: skip
    return codes, square_codes, code_scale, reference


def pool_rows(
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
    """Pooled rows of all query blocks; what their own sink and local keys weigh depends on the mods.

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
    _pool_rows_kernel[(tiles * batch * heads,)](
        query, *query.stride(), mean, bounds, rows, codes, square_codes, code_scale, shift,
        scale, q_len, count, tiles, heads, heads // mean.shape[1],
        D=dim, BLOCK_D=triton.next_power_of_2(dim), P=pool, SAMPLE=sample, TOP=2 ** (bits - 1) - 1, SQUARES=squares,
        STAGES=rotation_stages(dim), BLOCK_R=tile, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return rows, codes, square_codes, code_scale, shift
