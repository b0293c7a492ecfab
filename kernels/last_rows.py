# SPDX-License-Identifier: BSD-3-Clause
"""The last rows' softmax over all keys, summed by key and by distance (FlexPrefill's verticals and slashes).

Entry point: `last_row_sums`. A first kernel finds the logarithms of the rows' sums of exponentials, a part of the keys
a program. A second one has a tile of keys: it writes the shares of all rows, and their sums by key. A third one has a
range of distances and reads the shares along the diagonals. Every sum has one program and one order, so that it is the
same every time. Heads go through in strips, so that the memory of shares is bounded.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arguments import Grid, MaskSpec, ModLike
from .primitives import is_finite
from .visibility import at_head, listed_arguments, mod_arguments, sees_key

LOG2E = tl.constexpr(1.4426950408889634)

RANGE_BYTES = 64 * 2**20
"""Memory of the shares of the heads that go through at once."""

PART = 2048
"""Keys that a program of the first kernel visits."""


@triton.jit
def _last_rows(row, offset, start, end, q_len, last):
    """Query rows of the last ones that are no padding, int32 ``[M]``, 0 where there is none; int1 ``[M]``.

    Args:
        row: Which of the last ones, int32 ``[M]``.
        offset: Key position of query row 0.
        start: First valid key.
        end: One past the last valid key.
        q_len: Sq.
        last: How many there are at most.
    """
    q = tl.minimum(q_len, end - offset) - last + row
    there = (row < last) & (q >= tl.maximum(start - offset, 0))
    return tl.where(there, q, 0), there


@triton.jit
def _load_rows(query_ptr, stride_qs, stride_qd, q, there, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows of one head, ``[M, BLOCK_D]``.

    Args:
        query_ptr: Queries of the head ``[Sq, D]``.
        stride_qs: From row to row.
        stride_qd: From channel to channel.
        q: Rows, int32 ``[M]``.
        there: Which of them to load, int1 ``[M]``.
        D: Channels.
        BLOCK_D: Channels, rounded up to a power of two.
    """
    offsets_d = tl.arange(0, BLOCK_D)
    pointers = query_ptr + q.to(tl.int64)[:, None] * stride_qs + offsets_d[None, :] * stride_qd
    return tl.load(pointers, mask=there[:, None] & (offsets_d < D)[None, :], other=0.0)


@triton.jit
def _logits(
    query, key_ptr, stride_ks, stride_kd, first_key, b, head, q, there, offset, start, end, scale, q_len, kv_len,
    listed_ptr, listed_words, mask_aux, score_aux,
    CAUSAL: tl.constexpr, MASK: tl.constexpr, LISTED_Q: tl.constexpr, LISTED_K: tl.constexpr, SCORE: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Logits of rows and a tile of keys, times log2(e), float32 ``[M, BLOCK_N]``; -inf if hidden or not finite.

    Args:
        query: Rows ``[M, BLOCK_D]``.
        key_ptr: Keys of the KV head ``[Skv, D]``.
        stride_ks: From key to key.
        stride_kd: From channel to channel.
        first_key: First key of the tile, a multiple of BLOCK_N.
        b: Batch row.
        head: Query head.
        q: Query rows, int32 ``[M]``.
        there: Which of them there are, int1 ``[M]``.
        offset: Key position of query row 0.
        start: First valid key.
        end: One past the last valid key.
        scale: Softmax scale.
        q_len: Sq.
        kv_len: Skv.
        listed_ptr: Words of the caller's block mask of the batch row and head; not read if LISTED_Q is 0.
        listed_words: Words a row of blocks of the caller's block mask.
        mask_aux: What the mask_mod reads.
        score_aux: What the score_mod reads.
        CAUSAL: Whether a row sees keys up to its position only.
        MASK: The mask_mod, or None.
        LISTED_Q: Query rows a block of the caller's block mask; 0 without one.
        LISTED_K: Keys a block of the caller's block mask.
        SCORE: The score_mod, or None.
        D: Channels.
        BLOCK_D: Channels, rounded up to a power of two.
        BLOCK_N: Keys of the tile.
    """
    offsets_d = tl.arange(0, BLOCK_D)
    kv = first_key + tl.arange(0, BLOCK_N)
    pointers = key_ptr + kv.to(tl.int64)[None, :] * stride_ks + offsets_d[:, None] * stride_kd
    key = tl.load(pointers, mask=(offsets_d < D)[:, None] & (kv < kv_len)[None, :], other=0.0)
    logits = tl.dot(query, key, input_precision="ieee")
    kv, q = kv[None, :], q[:, None]
    if SCORE is None:
        logits *= scale * LOG2E
    else:
        score = SCORE(logits * scale, b, head, q, tl.minimum(kv, kv_len - 1), score_aux)
        score, _ = tl.broadcast(score.to(tl.float32), logits)
        logits = score * LOG2E
    sees = sees_key(
        b, head, q, kv, first_key, offset, start, end, q_len, kv_len, listed_ptr, listed_words, mask_aux,
        CAUSAL, MASK, LISTED_Q, LISTED_K, BLOCK_N,
    )  # fmt: skip
    return tl.where(sees & there[:, None] & is_finite(logits), logits, float("-inf"))


@triton.jit
def _log_sums_kernel(
    query_ptr, stride_qb, stride_qh, stride_qs, stride_qd, key_ptr, stride_kb, stride_kh, stride_ks, stride_kd,
    bounds_ptr, listed_ptr, listed_b, listed_h, listed_words, mask_aux, score_aux, sums_ptr,
    scale, q_len, kv_len, last, parts,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, CAUSAL: tl.constexpr, MASK: tl.constexpr, LISTED_Q: tl.constexpr,
    LISTED_K: tl.constexpr, SCORE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Natural logarithms of the sums of exponentials of a tile of rows over a part of the keys.

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
        listed_ptr: The caller's block mask as bits, int32 ``[1 or B, 1 or Hs, nq', ceil(nk' / 32)]``; not read if
            LISTED_Q is 0.
        listed_b: Words of the caller's block mask from batch row to batch row; 0 if all share it.
        listed_h: Words of the caller's block mask from head to head; 0 if all share it.
        listed_words: Words a row of blocks of the caller's block mask.
        mask_aux: What the mask_mod reads.
        score_aux: What the score_mod reads.
        sums_ptr: Result, float32 ``[B, Hq, parts, tiles * BLOCK_M]``, -inf where a row sees nothing.
        scale: Softmax scale.
        q_len: Sq.
        kv_len: Skv.
        last: Rows there are at most.
        parts: Parts of the keys.
        HEADS: Hq.
        KV_HEADS: Hkv.
        CAUSAL: Whether a row sees keys up to its position only.
        MASK: The mask_mod, or None.
        LISTED_Q: Query rows a block of the caller's block mask; 0 without one.
        LISTED_K: Keys a block of the caller's block mask.
        SCORE: The score_mod, or None.
        D: Channels.
        BLOCK_D: Channels, rounded up to a power of two.
        BLOCK_M: Rows of a tile.
        BLOCK_N: Keys a step.
        PART: Keys of a part, a multiple of BLOCK_N.
    """
    part = tl.program_id(0) % parts
    tile = tl.program_id(0) // parts
    b = tl.program_id(1) // HEADS
    head = tl.program_id(1) % HEADS
    offset = tl.load(bounds_ptr + b * 3)
    start = tl.load(bounds_ptr + b * 3 + 1)
    end = tl.load(bounds_ptr + b * 3 + 2)
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    q, there = _last_rows(row, offset, start, end, q_len, last)
    query_ptr += b.to(tl.int64) * stride_qb + head.to(tl.int64) * stride_qh
    key_ptr += b.to(tl.int64) * stride_kb + (head // (HEADS // KV_HEADS)).to(tl.int64) * stride_kh
    listed_ptr = at_head(listed_ptr, b, head, listed_b, listed_h, LISTED_Q)
    query = _load_rows(query_ptr, stride_qs, stride_qd, q, there, D, BLOCK_D)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for first_key in range(part * PART, tl.minimum((part + 1) * PART, kv_len), BLOCK_N):
        logits = _logits(
            query, key_ptr, stride_ks, stride_kd, first_key, b, head, q, there, offset, start, end, scale, q_len,
            kv_len, listed_ptr, listed_words, mask_aux, score_aux,
            CAUSAL, MASK, LISTED_Q, LISTED_K, SCORE, D, BLOCK_D, BLOCK_N,
        )  # fmt: skip
        before = peak
        peak = tl.maximum(before, tl.max(logits, axis=1))
        # Where nothing is seen, -inf - -inf would be NaN.
        safe = tl.where(peak == float("-inf"), 0.0, peak)
        total = total * tl.exp2(before - safe) + tl.sum(tl.exp2(logits - safe[:, None]), axis=1)
    safe = tl.where(peak == float("-inf"), 0.0, peak)
    tiles = tl.num_programs(0) // parts
    sums_ptr += (tl.program_id(1).to(tl.int64) * parts + part) * tiles * BLOCK_M
    tl.store(sums_ptr + row, (safe + tl.log2(total)) / LOG2E)


@triton.jit
def _shares_kernel(
    query_ptr, stride_qb, stride_qh, stride_qs, stride_qd, key_ptr, stride_kb, stride_kh, stride_ks, stride_kd,
    bounds_ptr, listed_ptr, listed_b, listed_h, listed_words, mask_aux, score_aux, sums_ptr, shares_ptr, by_key_ptr,
    scale, q_len, kv_len, last, tiles, first_head,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, CAUSAL: tl.constexpr, MASK: tl.constexpr, LISTED_Q: tl.constexpr,
    LISTED_K: tl.constexpr, SCORE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Shares of a tile of keys in every row's softmax, and their sums.

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
        listed_ptr: The caller's block mask as bits, int32 ``[1 or B, 1 or Hs, nq', ceil(nk' / 32)]``; not read if
            LISTED_Q is 0.
        listed_b: Words of the caller's block mask from batch row to batch row; 0 if all share it.
        listed_h: Words of the caller's block mask from head to head; 0 if all share it.
        listed_words: Words a row of blocks of the caller's block mask.
        mask_aux: What the mask_mod reads.
        score_aux: What the score_mod reads.
        sums_ptr: Natural logarithms of the rows' sums of exponentials, float32 ``[B, Hq, tiles * BLOCK_M]``.
        shares_ptr: Result, float32 ``[heads of this launch, tiles * BLOCK_M, Skv]``.
        by_key_ptr: Result, float32 ``[B, Hq, Skv]``.
        scale: Softmax scale.
        q_len: Sq.
        kv_len: Skv.
        last: Rows there are at most.
        tiles: Tiles of rows.
        first_head: First head of this launch, counted through all batch rows.
        HEADS: Hq.
        KV_HEADS: Hkv.
        CAUSAL: Whether a row sees keys up to its position only.
        MASK: The mask_mod, or None.
        LISTED_Q: Query rows a block of the caller's block mask; 0 without one.
        LISTED_K: Keys a block of the caller's block mask.
        SCORE: The score_mod, or None.
        D: Channels.
        BLOCK_D: Channels, rounded up to a power of two.
        BLOCK_M: Rows of a tile.
        BLOCK_N: Keys a program.
    """
    first_key = tl.program_id(0) * BLOCK_N
    kv = first_key + tl.arange(0, BLOCK_N)
    line = (first_head + tl.program_id(1)).to(tl.int64)
    b = (first_head + tl.program_id(1)) // HEADS
    head = (first_head + tl.program_id(1)) % HEADS
    offset = tl.load(bounds_ptr + b * 3)
    start = tl.load(bounds_ptr + b * 3 + 1)
    end = tl.load(bounds_ptr + b * 3 + 2)
    query_ptr += b.to(tl.int64) * stride_qb + head.to(tl.int64) * stride_qh
    key_ptr += b.to(tl.int64) * stride_kb + (head // (HEADS // KV_HEADS)).to(tl.int64) * stride_kh
    listed_ptr = at_head(listed_ptr, b, head, listed_b, listed_h, LISTED_Q)
    sums_ptr += line * tiles * BLOCK_M
    shares_ptr += tl.program_id(1).to(tl.int64) * tiles * BLOCK_M * kv_len
    total = tl.zeros([BLOCK_N], tl.float32)
    for tile in range(0, tiles):
        row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        q, there = _last_rows(row, offset, start, end, q_len, last)
        query = _load_rows(query_ptr, stride_qs, stride_qd, q, there, D, BLOCK_D)
        logits = _logits(
            query, key_ptr, stride_ks, stride_kd, first_key, b, head, q, there, offset, start, end, scale, q_len,
            kv_len, listed_ptr, listed_words, mask_aux, score_aux,
            CAUSAL, MASK, LISTED_Q, LISTED_K, SCORE, D, BLOCK_D, BLOCK_N,
        )  # fmt: skip
        log_sum = tl.load(sums_ptr + row) * LOG2E
        # Where nothing is seen, -inf - -inf would be NaN.
        log_sum = tl.where(log_sum == float("-inf"), 0.0, log_sum)
        share = tl.exp2(logits - log_sum[:, None])
        total += tl.sum(share, axis=0)
        pointers = shares_ptr + row.to(tl.int64)[:, None] * kv_len + kv[None, :]
        tl.store(pointers, share, mask=(row < last)[:, None] & (kv < kv_len)[None, :])
    tl.store(by_key_ptr + line * kv_len + kv, total, mask=kv < kv_len)


@triton.jit
def _diagonals_kernel(
    shares_ptr, bounds_ptr, by_distance_ptr, q_len, kv_len, last, tiles, span, first_head,
    HEADS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Sums of shares along the diagonals of a range of distances.

    Args:
        shares_ptr: From `_shares_kernel`, float32 ``[heads of this launch, tiles * BLOCK_M, Skv]``.
        bounds_ptr: int32 ``[B, 3]`` = (q_offset, start, end).
        by_distance_ptr: Result, float32 ``[B, Hq, span]``.
        q_len: Sq.
        kv_len: Skv.
        last: Rows there are at most.
        tiles: Tiles of rows.
        span: Distances count modulo this: Skv at least, twice that if some are negative.
        first_head: First head of this launch, counted through all batch rows.
        HEADS: Hq.
        BLOCK_M: Rows of a tile, a multiple of BLOCK_R.
        BLOCK_R: Rows a step.
        BLOCK_N: Distances a program.
    """
    distance = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    line = (first_head + tl.program_id(1)).to(tl.int64)
    b = (first_head + tl.program_id(1)) // HEADS
    offset = tl.load(bounds_ptr + b * 3)
    start = tl.load(bounds_ptr + b * 3 + 1)
    end = tl.load(bounds_ptr + b * 3 + 2)
    shares_ptr += tl.program_id(1).to(tl.int64) * tiles * BLOCK_M * kv_len
    total = tl.zeros([BLOCK_N], tl.float32)
    for first_row in range(0, last, BLOCK_R):
        row = first_row + tl.arange(0, BLOCK_R)
        q, there = _last_rows(row, offset, start, end, q_len, last)
        kv = (q + offset)[:, None] - distance[None, :]
        kv = tl.where(kv < 0, kv + span, kv)
        pointers = shares_ptr + row.to(tl.int64)[:, None] * kv_len + kv
        inside = there[:, None] & (kv >= 0) & (kv < kv_len)
        total += tl.sum(tl.load(pointers, mask=inside, other=0.0), axis=0)
    tl.store(by_distance_ptr + line * span + distance, total, mask=distance < span)


def last_row_sums(
    query: Tensor, key: Tensor, spec: MaskSpec, score: ModLike, scale: float, grid: Grid, last: int, span: int
) -> tuple[Tensor, Tensor]:
    """The softmax of every batch row's last rows that are no padding, summed over rows.

    Logits that are not finite count as hidden; a row that sees nothing else has no softmax, and adds nothing.

    Args:
        query: ``[B, Hq, Sq, D]``, any strides.
        key: ``[B, Hkv, Skv, D]``, any strides, the query's dtype.
        spec: Who sees whom; its mask is the mask_mod as jit function and what it reads, or None.
        score: score_mod as jit function and what it reads, or None.
        scale: Softmax scale.
        grid: Lengths.
        last: Rows of a batch row, at most.
        span: Distances, of a row's position from a key's, count modulo this: Skv at least; twice that without
            causality, where some are negative.

    Returns:
        float32 ``[B, Hq, Skv]``, sums by key, and float32 ``[B, Hq, span]``, sums by distance.
    """
    batch, heads, q_len, dim = query.shape
    kv_len = key.shape[2]
    block_d = triton.next_power_of_2(dim)
    # 32 KiB of rows and two tiles of 16 KiB of keys fit every supported GPU's shared memory.
    of_row = block_d * query.element_size()
    block_m, block_n = min(64, 32768 // of_row), min(64, 16384 // of_row)
    tiles, parts = triton.cdiv(last, block_m), triton.cdiv(kv_len, PART)
    listed, listed_b, listed_h, listed_words = listed_arguments(spec)
    mask_function, mask_aux = mod_arguments(spec.mask)
    score_function, score_aux = mod_arguments(score)
    arguments = (
        query, *query.stride(), key, *key.stride(), spec.bounds,
        listed, listed_b, listed_h, listed_words, mask_aux, score_aux,
    )  # fmt: skip
    options = {
        "HEADS": heads, "KV_HEADS": key.shape[1], "CAUSAL": spec.causal, "MASK": mask_function,
        "LISTED_Q": 0 if spec.listed is None else spec.listed_q, "LISTED_K": spec.listed_k, "SCORE": score_function,
        "D": dim, "BLOCK_D": block_d, "BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": 4, "num_stages": 2,
    }  # fmt: skip
    sums = query.new_empty(batch, heads, parts, tiles * block_m, dtype=torch.float32)
    _log_sums_kernel[(parts * tiles, batch * heads)](
        *arguments, sums, scale, q_len, kv_len, last, parts, PART=PART, **options
    )
    sums = sums.logsumexp(2)
    by_key = query.new_empty(batch, heads, kv_len, dtype=torch.float32)
    by_distance = query.new_empty(batch, heads, span, dtype=torch.float32)
    at_once = min(batch * heads, max(1, RANGE_BYTES // (tiles * block_m * kv_len * 4)))
    shares = query.new_empty(at_once * tiles * block_m * kv_len, dtype=torch.float32)
    for first in range(0, batch * heads, at_once):
        count = min(at_once, batch * heads - first)
        _shares_kernel[(triton.cdiv(kv_len, block_n), count)](
            *arguments, sums, shares, by_key, scale, q_len, kv_len, last, tiles, first, **options
        )
        _diagonals_kernel[(triton.cdiv(span, 128), count)](
            shares, spec.bounds, by_distance, q_len, kv_len, last, tiles, span, first,
            HEADS=heads, BLOCK_M=block_m, BLOCK_R=16, BLOCK_N=128, num_warps=4,
        )  # fmt: skip
    return by_key, by_distance
