# SPDX-License-Identifier: BSD-3-Clause
"""Query rows against means of key blocks, and how each query block's exponentials are spread (FlashPrefill).

Entry point: `block_mean_energies`. Means are made first, a block's keys one after the other. A program then takes the
rows of one query block of one head, and reads the means it sees twice: for the rows' largest logits, and for sums of
exponentials relative to them. Nothing but the means and the sums is written.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arguments import Grid
from .primitives import is_finite


@triton.jit
def _block_means_kernel(
    key_ptr, stride_b, stride_h, stride_s, stride_d, bounds_ptr, means_ptr, key_blocks,
    KV_HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Means of the valid keys of some blocks of one head, rounded once; 0 where there are none.

    Args:
        key_ptr: Keys ``[B, Hkv, Skv, D]``.
        stride_b: From batch row to batch row.
        stride_h: From head to head.
        stride_s: From key to key.
        stride_d: From channel to channel.
        bounds_ptr: int32 ``[B, 3]`` = (q_offset, start, end).
        means_ptr: Result ``[B, Hkv, nk, D]``, the keys' dtype.
        key_blocks: nk.
        KV_HEADS: Hkv.
        D: Channels.
        BLOCK_D: Channels, rounded up to a power of two.
        BLOCK_K: Keys a block.
        BLOCKS: Blocks a program.
    """
    bh = tl.program_id(1).to(tl.int64)
    batch = bh // KV_HEADS
    start = tl.load(bounds_ptr + batch * 3 + 1)
    end = tl.load(bounds_ptr + batch * 3 + 2)
    blocks = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    offsets_d = tl.arange(0, BLOCK_D)
    key_ptr += batch * stride_b + bh % KV_HEADS * stride_h + offsets_d[None, :] * stride_d
    d_mask = (offsets_d < D)[None, :]
    total = tl.zeros([BLOCKS, BLOCK_D], tl.float32)
    for n in range(BLOCK_K):
        at = blocks * BLOCK_K + n
        mask = ((at >= start) & (at < end))[:, None] & d_mask
        total += tl.load(key_ptr + at.to(tl.int64)[:, None] * stride_s, mask=mask, other=0.0).to(tl.float32)
    count = tl.minimum(blocks * BLOCK_K + BLOCK_K, end) - tl.maximum(blocks * BLOCK_K, start)
    count = tl.broadcast_to(tl.maximum(count, 1).to(tl.float32)[:, None], [BLOCKS, BLOCK_D])
    means_at = means_ptr + (bh * key_blocks + blocks)[:, None] * D + offsets_d[None, :]
    mean = tl.math.div_rn(total, count).to(means_ptr.dtype.element_ty)
    tl.store(means_at, mean, mask=(blocks < key_blocks)[:, None] & d_mask)


@triton.jit
def _logits(
    query, query_ptr, stride_d, there, mean_ptr, blocks, key_blocks, scale,
    D: tl.constexpr, CHUNK_D: tl.constexpr,
):  # fmt: skip
    """Rows times means, float32 ``[BLOCK_Q, BLOCK_N]``.

    Args:
        query: The rows ``[BLOCK_Q, CHUNK_D]``, if they have no more channels; those are read again otherwise.
        query_ptr: Pointers to the rows ``[BLOCK_Q, 1]``.
        stride_d: Queries: from channel to channel.
        there: Which rows there are, int1 ``[BLOCK_Q, 1]``.
        mean_ptr: Means of the KV head ``[nk, D]``.
        blocks: Key blocks, int32 ``[BLOCK_N]``.
        key_blocks: nk.
        scale: Softmax scale.
        D: Channels.
        CHUNK_D: Channels at a time.
    """
    offsets_d = tl.arange(0, CHUNK_D)
    mean_ptr += blocks[None, :] * D + offsets_d[:, None]
    exist = (blocks < key_blocks)[None, :]
    if CHUNK_D >= D:
        mean = tl.load(mean_ptr, mask=(offsets_d < D)[:, None] & exist, other=0.0)
        result = tl.dot(query, mean, input_precision="ieee")
    else:
        result = tl.zeros([query.shape[0], blocks.shape[0]], tl.float32)
        for first in range(0, D, CHUNK_D):
            in_row = first + offsets_d < D
            part_at = query_ptr + (first + offsets_d)[None, :] * stride_d
            part = tl.load(part_at, mask=there & in_row[None, :], other=0.0)
            mean = tl.load(mean_ptr + first, mask=in_row[:, None] & exist, other=0.0)
            result = tl.dot(part, mean, result, input_precision="ieee")
    return result * scale


@triton.jit
def _sees_mean(
    position, real, blocks, start, end, visible_ptr,
    CAUSAL: tl.constexpr, HAS_VISIBLE: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Which means each row sees, int1 ``[BLOCK_Q, BLOCK_N]``.

    Args:
        position: Where the rows stand, int32 ``[BLOCK_Q]``.
        real: Which rows are there and no padding, int1 ``[BLOCK_Q]``.
        blocks: Key blocks, int32 ``[BLOCK_N]``.
        start: First valid key.
        end: One past the last valid key.
        visible_ptr: Words of the query block's visible blocks; not read without HAS_VISIBLE.
        CAUSAL: Whether a row sees the means of blocks alone that end at or before its position.
        HAS_VISIBLE: Whether the call's mods hide blocks.
        BLOCK_K: Keys a block.
    """
    first = blocks * BLOCK_K
    sees = real[:, None] & (tl.maximum(first, start) < tl.minimum(first + BLOCK_K, end))[None, :]
    if CAUSAL:
        sees = sees & (first[None, :] + BLOCK_K - 1 <= position[:, None])
    if HAS_VISIBLE:
        words = tl.load(visible_ptr + blocks // 32, mask=first < end, other=0)
        sees = sees & (((words >> (blocks % 32)) & 1) != 0)[None, :]
    return sees


@triton.jit
def _block_mean_kernel(
    query_ptr, stride_qb, stride_qh, stride_qs, stride_qd, means_ptr, bounds_ptr, visible_ptr, energies_ptr,
    scale, q_len, query_blocks, key_blocks, words,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, VISIBLE_HEADS: tl.constexpr, CAUSAL: tl.constexpr,
    D: tl.constexpr, CHUNK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Energies of one query block of one head.

    Args:
        query_ptr: Queries ``[B, Hq, Sq, D]``.
        stride_qb: Queries: from batch row to batch row.
        stride_qh: Queries: from head to head.
        stride_qs: Queries: from row to row.
        stride_qd: Queries: from channel to channel.
        means_ptr: Means ``[B, Hkv, nk, D]``, the queries' dtype.
        bounds_ptr: int32 ``[B, 3]`` = (q_offset, start, end).
        visible_ptr: Bits of visible blocks, int32 ``[B, Hs, nq, ceil(nk / 32)]``; not read if VISIBLE_HEADS is 0.
        energies_ptr: Result, float32 ``[B, Hq, nq, nk]``, zeros before.
        scale: Softmax scale.
        q_len: Sq.
        query_blocks: nq.
        key_blocks: nk.
        words: ``ceil(nk / 32)``.
        HEADS: Hq.
        KV_HEADS: Hkv.
        VISIBLE_HEADS: Hs: 1 if all heads see the same blocks, or Hq; 0 without mods.
        CAUSAL: Whether a row sees the means of blocks alone that end at or before its position.
        D: Channels.
        CHUNK_D: Channels at a time.
        BLOCK_Q: Query rows a block.
        BLOCK_K: Keys a block.
        BLOCK_N: Key blocks a step.
    """
    # The longest rows first.
    query_block = tl.num_programs(0) - 1 - tl.program_id(0)
    bh = tl.program_id(1).to(tl.int64)
    batch = bh // HEADS
    head = bh % HEADS
    offset = tl.load(bounds_ptr + batch * 3)
    start = tl.load(bounds_ptr + batch * 3 + 1)
    end = tl.load(bounds_ptr + batch * 3 + 2)

    rows = query_block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    position = offset + rows
    real = (rows < q_len) & (position >= start) & (position < end)
    there = (rows < q_len)[:, None]
    query_ptr += batch * stride_qb + head * stride_qh + rows.to(tl.int64)[:, None] * stride_qs
    offsets_d = tl.arange(0, CHUNK_D)
    query = tl.load(query_ptr + offsets_d[None, :] * stride_qd, mask=there & (offsets_d < D)[None, :], other=0.0)
    means_ptr += (batch * KV_HEADS + head // (HEADS // KV_HEADS)) * key_blocks * D
    if VISIBLE_HEADS > 0:
        line = batch * VISIBLE_HEADS + (head if VISIBLE_HEADS > 1 else 0)
        visible_ptr += (line * query_blocks + query_block) * words
    energies_ptr += (bh * query_blocks + query_block) * key_blocks

    begin = start // BLOCK_K
    stop = tl.cdiv(end, BLOCK_K)
    if CAUSAL:
        stop = tl.minimum(stop, (offset + tl.minimum((query_block + 1) * BLOCK_Q, q_len)) // BLOCK_K)
    peak = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    for first in range(begin, stop, BLOCK_N):
        blocks = first + tl.arange(0, BLOCK_N)
        logits = _logits(query, query_ptr, stride_qd, there, means_ptr, blocks, key_blocks, scale, D, CHUNK_D)
        sees = _sees_mean(position, real, blocks, start, end, visible_ptr, CAUSAL, VISIBLE_HEADS > 0, BLOCK_K)
        peak = tl.maximum(peak, tl.max(tl.where(sees & is_finite(logits), logits, float("-inf")), axis=1))
    # A row that sees nothing has the peak -inf, and -inf - -inf is NaN.
    peak = tl.where(peak == float("-inf"), 0.0, peak)
    for first in range(begin, stop, BLOCK_N):
        blocks = first + tl.arange(0, BLOCK_N)
        logits = _logits(query, query_ptr, stride_qd, there, means_ptr, blocks, key_blocks, scale, D, CHUNK_D)
        sees = _sees_mean(position, real, blocks, start, end, visible_ptr, CAUSAL, VISIBLE_HEADS > 0, BLOCK_K)
        finite = is_finite(logits)
        weights = tl.exp(tl.where(sees & finite, logits, float("-inf")) - peak[:, None])
        broken = tl.max((sees & (finite == 0)).to(tl.int32), axis=0)
        energies = tl.where(broken > 0, float("inf"), tl.sum(weights, axis=0))
        tl.store(energies_ptr + blocks, energies, mask=blocks < stop)


def block_mean_energies(
    query: Tensor, key: Tensor, bounds: Tensor, visible: Tensor | None, causal: bool, scale: float, grid: Grid
) -> Tensor:
    """How much of its rows' exponentials each query block has on every mean key.

    Args:
        query: ``[B, Hq, Sq, D]``, any strides.
        key: ``[B, Hkv, Skv, D]``, any strides, the query's dtype.
        bounds: int32 ``[B, 3]`` = (q_offset, start, end).
        visible: Bits of the blocks that the call's mods show, int32 ``[B, 1 | Hq, nq, ceil(nk / 32)]``; None without
            mods.
        causal: Whether a row sees the mean of a block only once it sees its last key.
        scale: Softmax scale.
        grid: Lengths and blocks.

    Returns:
        float32 ``[B, Hq, nq, nk]``: exponentials of the rows' logits relative to each row's largest, summed over the
        rows; 0 where no row sees a mean, +inf where one sees a logit that is not finite.
    """
    batch, heads, q_len, dim = query.shape
    energies = query.new_zeros(batch, heads, grid.query_blocks, grid.key_blocks, dtype=torch.float32)
    # Rows of at most 32 KiB fit every supported GPU's shared memory, beside means as wide. Products of float32 are no
    # matrix instruction's, and want registers for every channel at a time.
    chunk_d = 32 if query.dtype == torch.float32 else 16384 // grid.block_q
    _block_mean_kernel[(grid.query_blocks, batch * heads)](
        query, *query.stride(), block_means(key, bounds, grid), bounds, bounds if visible is None else visible,
        energies, scale, q_len, grid.query_blocks, grid.key_blocks, grid.words,
        HEADS=heads, KV_HEADS=key.shape[1], VISIBLE_HEADS=0 if visible is None else visible.shape[1], CAUSAL=causal,
        D=dim, CHUNK_D=min(triton.next_power_of_2(dim), chunk_d),
        BLOCK_Q=grid.block_q, BLOCK_K=grid.block_k, BLOCK_N=64,
        num_warps=8 if grid.block_q > 64 else 4, num_stages=2,
    )  # fmt: skip
    return energies


def block_means(key: Tensor, bounds: Tensor, grid: Grid) -> Tensor:
    """The mean of every block's valid keys, ``[B, Hkv, nk, D]`` in the keys' dtype; 0 where there is none.

    The sum is taken key by key in float32, and it, the division and the result are each rounded once.

    Args:
        key: ``[B, Hkv, Skv, D]``, any strides.
        bounds: int32 ``[B, 3]`` = (q_offset, start, end).
        grid: Lengths and blocks.
    """
    batch, heads, _, dim = key.shape
    means = key.new_empty(batch, heads, grid.key_blocks, dim)
    _block_means_kernel[(triton.cdiv(grid.key_blocks, 8), batch * heads)](
        key, *key.stride(), bounds, means, grid.key_blocks,
        KV_HEADS=heads, D=dim, BLOCK_D=triton.next_power_of_2(dim), BLOCK_K=grid.block_k, BLOCKS=8, num_warps=4,
    )  # fmt: skip
    return means
