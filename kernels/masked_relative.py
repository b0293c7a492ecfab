# SPDX-License-Identifier: BSD-3-Clause
"""The relative rule of a call under mods: what rows' scores must reach, and which candidate blocks do.

Entry points: `masked_limits`, for `row_limits.row_limits`, and `masked_scan`, for `scan.scan_max`. A program of the
first takes rows of one query block of one head and walks its always-kept blocks, which hold all sink and local keys;
the second takes a query block, multiplies its codes with those of the candidates' keys on the int8 matrix units, and
looks at every score after the score_mod. Whole candidates, which all rows see, are not masked.

Without a score_mod limits are in units of products of codes times the keys' scales, as in plain causal attention; with
one they are logits, and scores get back what smoothing took from them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arguments import Grid, MaskSpec, ModLike, Near, Structure
from .primitives import bit_or, is_finite, nan_max
from .quantize import CODE_ROWS
from .visibility import at_head, listed_arguments, mod_arguments, sees_key


@triton.jit
def _masked_limits_kernel(
    query_ptr, stride_qb, stride_qh, stride_qs, stride_qd, key_ptr, stride_kb, stride_kh, stride_ks, stride_kd,
    mean_ptr, query_scale_ptr, counts_ptr, lists_ptr, rows_ptr, bounds_ptr,
    listed_ptr, listed_b, listed_h, listed_words, mask_aux, score_aux, threshold_ptr, limit_ptr, shift_ptr,
    scale, q_len, kv_len, limit_rows, query_blocks, key_blocks, sink_tokens, local_tokens,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, STRUCTURE_HEADS: tl.constexpr,
    CAUSAL: tl.constexpr, MASK: tl.constexpr, LISTED_Q: tl.constexpr, LISTED_K: tl.constexpr, SCORE: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Limits of BLOCK_M rows of one head.

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
        query_scale_ptr: Scales of the queries' codes, float32 ``[B, Hq, Sq]``; not read with a score_mod.
        counts_ptr: How many blocks are always kept, partial and whole candidates, int32 ``[B, Hs, nq, 3]``.
        lists_ptr: Blocks: always kept, partial, whole; int32 ``[B, Hs, nq, nk]``.
        rows_ptr: First and last key that each row sees, int32 ``[B, Hs, 2, nq * BLOCK_Q]``.
        bounds_ptr: int32 ``[B, 3]`` = (q_offset, start, end).
        listed_ptr: The caller's block mask as bits, int32 ``[1 or B, 1 or Hs, nq', ceil(nk' / 32)]``; not read if
            LISTED_Q is 0.
        listed_b: Words of the caller's block mask from batch row to batch row; 0 if all share it.
        listed_h: Words of the caller's block mask from head to head; 0 if all share it.
        listed_words: Words a row of blocks of the caller's block mask.
        mask_aux: What the mask_mod reads.
        score_aux: What the score_mod reads.
        threshold_ptr: Relative attention score, float32 ``[Hq]``.
        limit_ptr: Result: what scores of a row must reach, float32 ``[B, Hq, R]``; +inf if it sees nothing.
        shift_ptr: Result: logits of the smoothing mean, float32 ``[B, Hq, R]``; not written without a score_mod.
        scale: Softmax scale.
        q_len: Sq.
        kv_len: Skv.
        limit_rows: R: query rows, padded; no fewer than those of all query blocks.
        query_blocks: nq.
        key_blocks: nk.
        sink_tokens: Keys from a row's first one on that are in the statistics.
        local_tokens: Keys up to a row's position (without CAUSAL, also from it on) that are in the statistics.
        HEADS: Hq.
        KV_HEADS: Hkv.
        STRUCTURE_HEADS: Hs: 1 if all heads see the same, or Hq.
        CAUSAL: Whether a row sees keys up to its position only.
        MASK: The mask_mod, or None.
        LISTED_Q: Query rows a block of the caller's block mask; 0 without one.
        LISTED_K: Keys a block of the caller's block mask.
        SCORE: The score_mod, or None.
        D: Channels.
        BLOCK_D: Channels, rounded up to a power of two.
        BLOCK_Q: Query rows a block.
        BLOCK_K: Keys a block.
        BLOCK_M: Query rows a program, a divisor of BLOCK_Q.
        BLOCK_N: Keys a step, a divisor of BLOCK_K.
    """
    TILES: tl.constexpr = BLOCK_K // BLOCK_N
    bh = tl.program_id(1).to(tl.int64)
    b = tl.program_id(1) // HEADS
    head = tl.program_id(1) % HEADS
    kv_head = head // (HEADS // KV_HEADS)
    offset = tl.load(bounds_ptr + b * 3)
    start = tl.load(bounds_ptr + b * 3 + 1)
    end = tl.load(bounds_ptr + b * 3 + 2)
    structure = (b * STRUCTURE_HEADS + (head if STRUCTURE_HEADS > 1 else 0)).to(tl.int64)
    # Behind the last query block there are rows that see nothing.
    line = structure * query_blocks + tl.minimum(tl.program_id(0) * BLOCK_M // BLOCK_Q, query_blocks - 1)
    always = tl.load(counts_ptr + line * 3)
    list_ptr = lists_ptr + line * key_blocks
    listed_ptr = at_head(listed_ptr, b, head, listed_b, listed_h, LISTED_Q)

    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    there = rows < q_len
    ends = rows_ptr + structure * 2 * query_blocks * BLOCK_Q + rows
    in_blocks = rows < query_blocks * BLOCK_Q
    first = tl.load(ends, mask=in_blocks, other=0)
    last = tl.load(ends + query_blocks * BLOCK_Q, mask=in_blocks, other=-1)
    position = offset + rows
    offsets_d = tl.arange(0, BLOCK_D)
    query_ptr += b.to(tl.int64) * stride_qb + head.to(tl.int64) * stride_qh
    pointers = query_ptr + rows.to(tl.int64)[:, None] * stride_qs + offsets_d[None, :] * stride_qd
    query = tl.load(pointers, mask=there[:, None] & (offsets_d < D)[None, :], other=0.0)  # [BLOCK_M, BLOCK_D]
    mean_at = mean_ptr + (b * KV_HEADS + kv_head).to(tl.int64) * D
    mean = tl.load(mean_at + offsets_d, mask=offsets_d < D, other=0.0)
    shift = tl.sum(query.to(tl.float32) * mean[None, :], axis=1)
    key_ptr += b.to(tl.int64) * stride_kb + kv_head.to(tl.int64) * stride_kh

    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for step in range(0, always * TILES):
        first_key = tl.load(list_ptr + step // TILES) * BLOCK_K + step % TILES * BLOCK_N
        kv = first_key + tl.arange(0, BLOCK_N)
        key_at = key_ptr + kv.to(tl.int64)[None, :] * stride_ks + offsets_d[:, None] * stride_kd
        key = tl.load(key_at, mask=(offsets_d < D)[:, None] & (kv < kv_len)[None, :], other=0.0)
        logits = tl.dot(query, key, input_precision="ieee")
        kv = kv[None, :]
        if SCORE is None:
            logits = (logits - shift[:, None]) * scale
        else:
            logits *= scale
            score = SCORE(logits, b, head, tl.minimum(rows, q_len - 1)[:, None], tl.minimum(kv, kv_len - 1), score_aux)
            logits, _ = tl.broadcast(score.to(tl.float32), logits)
        near = kv < first[:, None] + sink_tokens
        if CAUSAL:
            near = near | (kv > position[:, None] - local_tokens)
        else:
            near = near | ((kv > position[:, None] - local_tokens) & (kv < position[:, None] + local_tokens))
        near = near & sees_key(
            b, head, rows[:, None], kv, first_key, offset, start, end, q_len, kv_len,
            listed_ptr, listed_words, mask_aux, CAUSAL, MASK, LISTED_Q, LISTED_K, BLOCK_N,
        )  # fmt: skip
        logits = tl.where(near, logits, float("-inf"))
        # A NaN reaches the limit by way of the sum, and so does an infinity: inf - inf is NaN, and not taken.
        new_peak = tl.maximum(peak, tl.max(logits, axis=1))
        safe = tl.where(is_finite(new_peak), new_peak, 0.0)
        total = total * tl.exp(peak - safe) + tl.sum(tl.exp(logits - safe[:, None]), axis=1)
        peak = new_peak
    threshold = tl.load(threshold_ptr + head)
    limit = tl.where(threshold > 0, peak + tl.log(total) + tl.log(threshold), float("-inf"))
    if SCORE is None:
        limit /= scale * tl.load(query_scale_ptr + bh * q_len + rows, mask=there, other=1.0)
    else:
        tl.store(shift_ptr + bh * limit_rows + rows, shift * scale)
    tl.store(limit_ptr + bh * limit_rows + rows, tl.where(last >= 0, limit, float("inf")))


@triton.jit
def _masked_scan_kernel(
    query_codes_ptr, query_scale_ptr, key_codes_ptr, key_scale_ptr, limit_ptr, shift_ptr, counts_ptr, lists_ptr,
    bounds_ptr, listed_ptr, listed_b, listed_h, listed_words, mask_aux, score_aux, hits_ptr,
    scale, q_len, kv_len, query_rows, key_rows, query_blocks, key_blocks, words,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, STRUCTURE_HEADS: tl.constexpr,
    CAUSAL: tl.constexpr, MASK: tl.constexpr, LISTED_Q: tl.constexpr, LISTED_K: tl.constexpr, SCORE: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Hit bits of one query block of one head.

    Args:
        query_codes_ptr: Codes of the queries, int8 ``[B, Hq, R, D]``.
        query_scale_ptr: Scales of the queries' codes, float32 ``[B, Hq, Sq]``; read with a score_mod.
        key_codes_ptr: Codes of the smoothed keys, int8 ``[B, Hkv, R', D]``.
        key_scale_ptr: Scales of the keys' codes, float32 ``[B, Hkv, R' / BLOCK_K]``: a group's, counted from the first
            valid key.
        limit_ptr: What scores of a row must reach, float32 ``[B, Hq, R]``.
        shift_ptr: Logits of the smoothing mean, float32 ``[B, Hq, R]``; read with a score_mod.
        counts_ptr: How many blocks are always kept, partial and whole candidates, int32 ``[B, Hs, nq, 3]``.
        lists_ptr: Blocks: always kept, partial, whole; int32 ``[B, Hs, nq, nk]``.
        bounds_ptr: int32 ``[B, 3]`` = (q_offset, start, end).
        listed_ptr: The caller's block mask as bits, int32 ``[1 or B, 1 or Hs, nq', ceil(nk' / 32)]``; not read if
            LISTED_Q is 0.
        listed_b: Words of the caller's block mask from batch row to batch row; 0 if all share it.
        listed_h: Words of the caller's block mask from head to head; 0 if all share it.
        listed_words: Words a row of blocks of the caller's block mask.
        mask_aux: What the mask_mod reads.
        score_aux: What the score_mod reads.
        hits_ptr: Result: bits, int32 ``[B, Hq, nq, ceil(nk / 32)]``, zeros before.
        scale: Softmax scale.
        q_len: Sq.
        kv_len: Skv.
        query_rows: R: query rows, padded.
        key_rows: R': keys, padded.
        query_blocks: nq.
        key_blocks: nk.
        words: ``ceil(nk / 32)``.
        HEADS: Hq.
        KV_HEADS: Hkv.
        STRUCTURE_HEADS: Hs: 1 if all heads see the same, or Hq.
        CAUSAL: Whether a row sees keys up to its position only.
        MASK: The mask_mod, or None.
        LISTED_Q: Query rows a block of the caller's block mask; 0 without one.
        LISTED_K: Keys a block of the caller's block mask.
        SCORE: The score_mod, or None.
        D: Channels.
        BLOCK_D: Channels, rounded up to a power of two.
        BLOCK_Q: Query rows a block.
        BLOCK_K: Keys a block.
    """
    query_block = tl.num_programs(0) - 1 - tl.program_id(0)
    bh = tl.program_id(1).to(tl.int64)
    b = tl.program_id(1) // HEADS
    head = tl.program_id(1) % HEADS
    kv_head = (b * KV_HEADS + head // (HEADS // KV_HEADS)).to(tl.int64)
    offset = tl.load(bounds_ptr + b * 3)
    start = tl.load(bounds_ptr + b * 3 + 1)
    end = tl.load(bounds_ptr + b * 3 + 2)
    line = (b * STRUCTURE_HEADS + (head if STRUCTURE_HEADS > 1 else 0)).to(tl.int64) * query_blocks + query_block
    always = tl.load(counts_ptr + line * 3)
    partial = tl.load(counts_ptr + line * 3 + 1)
    whole = tl.load(counts_ptr + line * 3 + 2)
    list_ptr = lists_ptr + line * key_blocks + always
    listed_ptr = at_head(listed_ptr, b, head, listed_b, listed_h, LISTED_Q)

    rows = query_block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    real = (rows < q_len) & (offset + rows >= start) & (offset + rows < end)
    q = tl.minimum(rows, q_len - 1)[:, None]
    offsets_d = tl.arange(0, BLOCK_D)
    d_mask = (offsets_d < D)[None, :]
    codes_at = query_codes_ptr + (bh * query_rows + rows)[:, None] * D + offsets_d[None, :]
    codes = tl.load(codes_at, mask=d_mask, other=0)  # [BLOCK_Q, BLOCK_D]
    limit = tl.load(limit_ptr + bh * query_rows + rows)
    if SCORE is not None:
        by_row = tl.load(query_scale_ptr + bh * q_len + rows, mask=rows < q_len, other=0.0) * scale
        shift = tl.load(shift_ptr + bh * query_rows + rows)
    key_codes_ptr += kv_head * key_rows * D
    key_scale_ptr += kv_head * (key_rows // BLOCK_K)
    hits_ptr += (bh * query_blocks + query_block) * words
    column = tl.arange(0, BLOCK_K)

    # A bit per slot of the list and row, looked at together when a word is full: slot s is bit s % 32.
    bits = tl.zeros([BLOCK_Q], tl.int32)
    slots = tl.arange(0, 32)
    count = partial + whole
    ahead = tl.load(list_ptr, mask=count > 0, other=0)  # read a step ahead, so that codes can be as well
    for slot in range(0, count):
        key_rows_at = (ahead * BLOCK_K + column)[:, None] * D
        key_codes = tl.load(key_codes_ptr + key_rows_at + offsets_d[None, :], mask=d_mask, other=0)
        ahead = tl.load(list_ptr + tl.minimum(slot + 1, count - 1))
        block = tl.load(list_ptr + slot)
        kv = block * BLOCK_K + column
        product = tl.dot(codes, tl.trans(key_codes), out_dtype=tl.int32).to(tl.float32)
        of_key = tl.load(key_scale_ptr + tl.maximum(kv - start, 0) // BLOCK_K)
        if SCORE is None:
            estimate = product * of_key[None, :]
        else:
            estimate = product * (of_key[None, :] * by_row[:, None]) + shift[:, None]
            score = SCORE(estimate, b, head, q, tl.minimum(kv, kv_len - 1)[None, :], score_aux)
            estimate, _ = tl.broadcast(score.to(tl.float32), estimate)
        if slot < partial:
            sees = sees_key(
                b, head, rows[:, None], kv[None, :], block * BLOCK_K, offset, start, end, q_len, kv_len,
                listed_ptr, listed_words, mask_aux, CAUSAL, MASK, LISTED_Q, LISTED_K, BLOCK_K,
            )  # fmt: skip
            # Negated, so that a NaN on either side hits.
            hit = tl.max((sees & ((estimate < limit[:, None]) == 0)).to(tl.int32), axis=1)
        else:
            hit = (real & ((tl.reduce(estimate, 1, nan_max) < limit) == 0)).to(tl.int32)
        bits |= hit << (slot % 32)
        if (slot % 32 == 31) | (slot == count - 1):
            word = tl.reduce(bits, 0, bit_or)
            slot_at = slot // 32 * 32 + slots
            mask = (slot_at < count) & (((word >> slots) & 1) == 1)
            at = tl.load(list_ptr + slot_at, mask=mask, other=0)
            tl.atomic_or(hits_ptr + at // 32, tl.full([32], 1, tl.int32) << (at % 32), mask=mask, sem="relaxed")
            bits = tl.zeros([BLOCK_Q], tl.int32)


def masked_limits(
    query: Tensor,
    query_scale: Tensor,
    key: Tensor,
    mean: Tensor,
    spec: MaskSpec,
    structure: Structure,
    score: ModLike,
    threshold: Tensor,
    scale: float,
    grid: Grid,
    near: Near,
) -> tuple[Tensor, Tensor]:
    """`row_limits.row_limits` of a call under mods: sink and local keys lie in blocks that are always kept."""
    batch, heads, q_len, dim = query.shape
    counts, lists = structure.candidates.counts, structure.candidates.blocks
    padded = triton.cdiv(q_len, CODE_ROWS) * CODE_ROWS
    limit = query.new_empty(batch, heads, padded, dtype=torch.float32)
    shift = query.new_empty(batch, heads, 0 if score is None else padded, dtype=torch.float32)
    listed, listed_b, listed_h, listed_words = listed_arguments(spec)
    mask_function, mask_aux = mod_arguments(spec.mask)
    score_function, score_aux = mod_arguments(score)
    # Tiles as in `row_limits`.
    block_d = triton.next_power_of_2(dim)
    block_m = max(16, min(64, 16384 // (block_d * query.element_size())))
    _masked_limits_kernel[(padded // block_m, batch * heads)](
        query, *query.stride(), key, *key.stride(), mean, query_scale, counts, lists,
        structure.visibility.row_kv_bounds, spec.bounds,
        listed, listed_b, listed_h, listed_words, mask_aux, score_aux, threshold, limit, shift,
        scale, q_len, key.shape[2], padded, grid.query_blocks, grid.key_blocks, near.sink_tokens, near.local_tokens,
        HEADS=heads, KV_HEADS=key.shape[1], STRUCTURE_HEADS=counts.shape[1],
        CAUSAL=spec.causal, MASK=mask_function, LISTED_Q=0 if spec.listed is None else spec.listed_q,
        LISTED_K=spec.listed_k, SCORE=score_function, D=dim, BLOCK_D=block_d, BLOCK_Q=grid.block_q,
        BLOCK_K=grid.block_k, BLOCK_M=block_m, BLOCK_N=max(16, min(grid.block_k, block_m // 2)),
        num_warps=4, num_stages=1,
    )  # fmt: skip
    return limit, shift


def scan_options(head_dim: int, block_q: int, block_k: int) -> dict[str, int]:
    """Launch options of the scan; wide heads are loaded less far ahead, to fit every GPU's shared memory."""
    wide = head_dim > 128
    return {"num_warps": 8 if block_q * block_k > 8192 else 4, "num_stages": 2 if wide else 3}


def masked_scan(
    query_codes: Tensor,
    query_scale: Tensor,
    key_codes: Tensor,
    key_scale: Tensor,
    limit: Tensor,
    shift: Tensor,
    spec: MaskSpec,
    structure: Structure,
    score: ModLike,
    scale: float,
    grid: Grid,
) -> Tensor:
    """`scan.scan_max` of a call under mods."""
    batch, heads, query_rows, dim = query_codes.shape
    counts, lists = structure.candidates.counts, structure.candidates.blocks
    hits = counts.new_zeros(batch, heads, grid.query_blocks, grid.words)
    listed, listed_b, listed_h, listed_words = listed_arguments(spec)
    mask_function, mask_aux = mod_arguments(spec.mask)
    score_function, score_aux = mod_arguments(score)
    _masked_scan_kernel[(grid.query_blocks, batch * heads)](
        query_codes, query_scale, key_codes, key_scale, limit, shift, counts, lists, spec.bounds,
        listed, listed_b, listed_h, listed_words, mask_aux, score_aux, hits,
        scale, grid.q_len, grid.kv_len, query_rows, key_codes.shape[2], grid.query_blocks, grid.key_blocks, grid.words,
        HEADS=heads, KV_HEADS=key_codes.shape[1], STRUCTURE_HEADS=counts.shape[1],
        CAUSAL=spec.causal, MASK=mask_function, LISTED_Q=0 if spec.listed is None else spec.listed_q,
        LISTED_K=spec.listed_k, SCORE=score_function, D=dim, BLOCK_D=triton.next_power_of_2(dim),
        BLOCK_Q=grid.block_q, BLOCK_K=grid.block_k, **scan_options(dim, grid.block_q, grid.block_k),
    )  # fmt: skip
    return hits
