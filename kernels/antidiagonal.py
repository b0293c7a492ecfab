# SPDX-License-Identifier: BSD-3-Clause
"""Sums of logits along antidiagonals, and how each query block's softmax is spread over them (XAttention).

Entry point: `antidiagonal_shares`. A program takes the rows of sums of some query blocks of one head, and makes their
sums twice: for the rows' largest ones and totals, and for shares. A sum is of products of whole vectors, so `STRIDE`
products of matrices, one for every pair, gather in one accumulator. Nothing but the shares is written.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arguments import Grid
from .primitives import is_finite


@triton.jit
def _sums(
    query_ptr, stride_qs, stride_qd, key_ptr, stride_ks, stride_kd, lines, columns,
    offset, start, end, q_len, unit,
    STRIDE: tl.constexpr, D: tl.constexpr, CHUNK_D: tl.constexpr,
):  # fmt: skip
    """Sums of logits, float32 ``[BLOCK_M, BLOCK_N]``; rows and keys of padding count as zeros.

    Args:
        query_ptr: Queries of the head ``[Sq, D]``.
        stride_qs: Queries: from row to row.
        stride_qd: Queries: from channel to channel.
        key_ptr: Keys of the KV head ``[Skv, D]``.
        stride_ks: Keys: from key to key.
        stride_kd: Keys: from channel to channel.
        lines: Rows of sums, int32 ``[BLOCK_M]``.
        columns: Columns of sums, int32 ``[BLOCK_N]``.
        offset: Key position of query row 0.
        start: First valid key.
        end: One past the last valid key.
        q_len: Sq.
        unit: Softmax scale over STRIDE.
        STRIDE: Pairs of a sum.
        D: Channels.
        CHUNK_D: Channels at a time.
    """
    CHUNKS: tl.constexpr = (D + CHUNK_D - 1) // CHUNK_D
    offsets_d = tl.arange(0, CHUNK_D)
    result = tl.zeros([lines.shape[0], columns.shape[0]], tl.float32)
    for step in range(STRIDE * CHUNKS):
        pair, channel = step // CHUNKS, step % CHUNKS * CHUNK_D + offsets_d
        rows = lines * STRIDE + STRIDE - 1 - pair
        real = (rows < q_len) & (offset + rows >= start) & (offset + rows < end)
        query_at = query_ptr + rows.to(tl.int64)[:, None] * stride_qs + channel[None, :] * stride_qd
        query = tl.load(query_at, mask=real[:, None] & (channel < D)[None, :], other=0.0)
        kv = columns * STRIDE + pair
        valid = (kv >= start) & (kv < end)
        key_at = key_ptr + kv.to(tl.int64)[None, :] * stride_ks + channel[:, None] * stride_kd
        key = tl.load(key_at, mask=(channel < D)[:, None] & valid[None, :], other=0.0)
        result = tl.dot(query, key, result, input_precision="ieee")
    return result * unit


@triton.jit
def _sees_sum(
    first_line, first_column, offset, start, end, q_len, visible_ptr, query_blocks, words,
    CAUSAL: tl.constexpr, HAS_VISIBLE: tl.constexpr, STRIDE: tl.constexpr, DOWN: tl.constexpr, ACROSS: tl.constexpr,
    TALL: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Which sums count: one of their pairs is of a row and a key that the row sees, int1 ``[BLOCK_M, BLOCK_N]``.

    Pair r is of the key r after the first one and the row r before the last one. The rows and keys that there are, and
    causality, each bound r on one side or both: the least that is left has to fulfil them.

    Args:
        first_line: First row of sums, of a query block.
        first_column: First column of sums, of a key block.
        offset: Key position of query row 0.
        start: First valid key.
        end: One past the last valid key.
        q_len: Sq.
        visible_ptr: Words of visible blocks of the head ``[nq, words]``; not read without HAS_VISIBLE.
        query_blocks: nq.
        words: ``ceil(nk / 32)``.
        CAUSAL: Whether a row sees keys up to its position only.
        HAS_VISIBLE: Whether the call's mods hide blocks.
        STRIDE: Pairs of a sum.
        DOWN: Rows of sums a query block.
        ACROSS: Columns of sums a key block.
        TALL: Query blocks: BLOCK_M rows of sums.
        WIDE: Key blocks: BLOCK_N columns of sums.
    """
    last = (offset + (first_line + tl.arange(0, TALL * DOWN)) * STRIDE + STRIDE - 1)[:, None]
    first = ((first_column + tl.arange(0, WIDE * ACROSS)) * STRIDE)[None, :]
    least = tl.maximum(tl.maximum(last - tl.minimum(end, offset + q_len) + 1, start - first), 0)
    sees = (least < STRIDE) & (least <= last - start) & (least < end - first)
    if CAUSAL:
        sees = sees & (2 * least <= last - first)
    if HAS_VISIBLE:
        block = (first_column // ACROSS + tl.arange(0, WIDE))[None, :]
        line = (first_line // DOWN + tl.arange(0, TALL))[:, None]
        mask = (line < query_blocks) & (block < words * 32)
        word = tl.load(visible_ptr + line.to(tl.int64) * words + block // 32, mask=mask, other=0)
        shown = ((word >> (block % 32)) & 1)[:, None, :, None]
        shown = tl.reshape(tl.broadcast_to(shown, [TALL, DOWN, WIDE, ACROSS]), sees.shape)
        sees = sees & (shown != 0)
    return sees


@triton.jit
def _antidiagonal_kernel(
    query_ptr, stride_qb, stride_qh, stride_qs, stride_qd,
    key_ptr, stride_kb, stride_kh, stride_ks, stride_kd,
    bounds_ptr, visible_ptr, shares_ptr,
    unit, q_len, query_blocks, key_blocks, words,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, VISIBLE_HEADS: tl.constexpr, CAUSAL: tl.constexpr,
    STRIDE: tl.constexpr, D: tl.constexpr, CHUNK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Shares of ``BLOCK_M * STRIDE / BLOCK_Q`` query blocks of one head.

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
        bounds_ptr: int32 ``[B, 3]`` = (q_offset, start, end).
        visible_ptr: Bits of visible blocks, int32 ``[B, Hs, nq, ceil(nk / 32)]``; not read if VISIBLE_HEADS is 0.
        shares_ptr: Result, float32 ``[B, Hq, nq, nk]``, zeros before.
        unit: Softmax scale over STRIDE.
        q_len: Sq.
        query_blocks: nq.
        key_blocks: nk.
        words: ``ceil(nk / 32)``.
        HEADS: Hq.
        KV_HEADS: Hkv.
        VISIBLE_HEADS: Hs: 1 if all heads see the same blocks, or Hq; 0 without mods.
        CAUSAL: Whether a row sees keys up to its position only.
        STRIDE: Pairs of a sum.
        D: Channels.
        CHUNK_D: Channels at a time.
        BLOCK_Q: Query rows a block.
        BLOCK_K: Keys a block.
        BLOCK_M: Rows of sums a program, whole query blocks.
        BLOCK_N: Columns of sums a step, whole key blocks.
    """
    DOWN: tl.constexpr = BLOCK_Q // STRIDE
    ACROSS: tl.constexpr = BLOCK_K // STRIDE
    TALL: tl.constexpr = BLOCK_M // DOWN
    WIDE: tl.constexpr = BLOCK_N // ACROSS
    # The longest rows first.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    bh = tl.program_id(1).to(tl.int64)
    batch = bh // HEADS
    head = bh % HEADS
    offset = tl.load(bounds_ptr + batch * 3)
    start = tl.load(bounds_ptr + batch * 3 + 1)
    end = tl.load(bounds_ptr + batch * 3 + 2)
    query_ptr += batch * stride_qb + head * stride_qh
    key_ptr += batch * stride_kb + head // (HEADS // KV_HEADS) * stride_kh
    if VISIBLE_HEADS > 0:
        visible_ptr += (batch * VISIBLE_HEADS + (head if VISIBLE_HEADS > 1 else 0)) * query_blocks * words

    lines = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    begin = start // BLOCK_K * ACROSS
    stop = end
    if CAUSAL:
        stop = tl.minimum(end, offset + tl.minimum((tile + 1) * BLOCK_M * STRIDE, q_len))
    stop = tl.cdiv(stop, STRIDE)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for first in range(begin, stop, BLOCK_N):
        sums = _sums(
            query_ptr, stride_qs, stride_qd, key_ptr, stride_ks, stride_kd, lines, first + tl.arange(0, BLOCK_N),
            offset, start, end, q_len, unit, STRIDE, D, CHUNK_D,
        )  # fmt: skip
        sees = _sees_sum(
            tile * BLOCK_M, first, offset, start, end, q_len, visible_ptr, query_blocks, words,
            CAUSAL, VISIBLE_HEADS > 0, STRIDE, DOWN, ACROSS, TALL, WIDE,
        )  # fmt: skip
        sums = tl.where(sees & is_finite(sums), sums, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(sums, axis=1))
        # A row that has seen nothing yet has the peak -inf, and -inf - -inf is NaN.
        safe = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        total = total * tl.exp(peak - safe) + tl.sum(tl.exp(sums - safe[:, None]), axis=1)
        peak = new_peak
    peak = tl.where(peak == float("-inf"), 0.0, peak)
    counts = tl.sum(tl.reshape((total > 0).to(tl.float32), [TALL, DOWN]), axis=1)
    part = 1.0 / tl.where(total > 0, total, 1.0)
    query_block = tile * TALL + tl.arange(0, TALL)
    shares_ptr += (bh * query_blocks + query_block)[:, None] * key_blocks
    for first in range(begin, stop, BLOCK_N):
        sums = _sums(
            query_ptr, stride_qs, stride_qd, key_ptr, stride_ks, stride_kd, lines, first + tl.arange(0, BLOCK_N),
            offset, start, end, q_len, unit, STRIDE, D, CHUNK_D,
        )  # fmt: skip
        sees = _sees_sum(
            tile * BLOCK_M, first, offset, start, end, q_len, visible_ptr, query_blocks, words,
            CAUSAL, VISIBLE_HEADS > 0, STRIDE, DOWN, ACROSS, TALL, WIDE,
        )  # fmt: skip
        finite = is_finite(sums)
        shares = tl.exp(tl.where(sees & finite, sums, float("-inf")) - peak[:, None]) * part[:, None]
        # What is not finite makes a block's share infinite.
        shares = tl.where(sees & (finite == 0), float("inf"), shares)
        of_blocks = tl.sum(tl.reshape(shares, [TALL, DOWN, WIDE, ACROSS]), axis=3)
        of_blocks = tl.sum(of_blocks, axis=1) / tl.maximum(counts, 1.0)[:, None]
        block = first // ACROSS + tl.arange(0, WIDE)
        mask = (query_block < query_blocks)[:, None] & (block < key_blocks)[None, :]
        tl.store(shares_ptr + block[None, :], of_blocks, mask=mask)


def antidiagonal_shares(
    query: Tensor,
    key: Tensor,
    bounds: Tensor,
    visible: Tensor | None,
    causal: bool,
    scale: float,
    grid: Grid,
    stride: int,
) -> Tensor:
    """How the softmax over sums along antidiagonals is spread over blocks of keys.

    Sum (n, m) is of the logits of row ``stride * n + stride - 1 - r`` and key ``stride * m + r``, r from 0 on, divided
    by `stride`; those with a pair of a row and a key that it sees take part in the softmax of row n.

    Args:
        query: ``[B, Hq, Sq, D]``, any strides.
        key: ``[B, Hkv, Skv, D]``, any strides, the query's dtype.
        bounds: int32 ``[B, 3]`` = (q_offset, start, end).
        visible: Bits of the blocks that the call's mods show, int32 ``[B, 1 | Hq, nq, ceil(nk / 32)]``; None without
            mods. No sum in another block takes part.
        causal: Whether a row sees keys up to its position only.
        scale: Softmax scale.
        grid: Lengths and blocks.
        stride: Pairs of a sum, a divisor of both sizes of a block.

    Returns:
        float32 ``[B, Hq, nq, nk]``: a block's shares, summed over its columns and averaged over those of its rows that
        see something; +inf where a sum that takes part is not finite.
    """
    batch, heads, q_len, dim = query.shape
    shares = query.new_zeros(batch, heads, grid.query_blocks, grid.key_blocks, dtype=torch.float32)
    # Every tile of rows and of keys takes 16 KiB at a time. Products of float32 are no matrix instruction's, and want
    # registers for every channel at a time.
    size, chunk_d = (64, 32) if query.dtype == torch.float32 else (128, 64)
    _antidiagonal_kernel[(triton.cdiv(grid.query_blocks * grid.block_q, size * stride), batch * heads)](
        query, *query.stride(), key, *key.stride(), bounds, bounds if visible is None else visible, shares,
        scale / stride, q_len, grid.query_blocks, grid.key_blocks, grid.words,
        HEADS=heads, KV_HEADS=key.shape[1], VISIBLE_HEADS=0 if visible is None else visible.shape[1], CAUSAL=causal,
        STRIDE=stride, D=dim, CHUNK_D=chunk_d, BLOCK_Q=grid.block_q, BLOCK_K=grid.block_k,
        BLOCK_M=size, BLOCK_N=size, num_warps=8, num_stages=3,
    )  # fmt: skip
    return shares
