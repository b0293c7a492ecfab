# SPDX-License-Identifier: BSD-3-Clause
"""What a choice of blocks missed, by a few rows of every head that are asked exactly.

Entry point: `audit_rows`. A first kernel takes a tile of audited rows and a span of key blocks, and writes the base-2
logarithm of every row's sum of exponentials in each block, on the matrix units of the inputs' dtype. A second
one reads them: the row's total, and the shares of the blocks that were kept or not. Rows go through in ranges, so that
memory is bounded.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arguments import Grid, MaskSpec, ModLike, Near, Structure
from .primitives import is_finite
from .visibility import at_head, listed_arguments, mod_arguments, sees_key

LOG2E = tl.constexpr(1.4426950408889634)

RANGE_BYTES = 64 * 2**20
"""Memory of the blocks' logarithms of the rows that go through at once."""

SPAN = 8
"""Key blocks that a program of the first kernel weighs."""


def slots_before(tokens: int) -> int:
    """Groups of positions that end within the first `tokens`: of 64 up to 4,096, of 128 up to 8,192, of 256 behind."""
    return min(tokens // 64, 64) + min(max(tokens - 4096, 0) // 128, 32) + max(tokens - 8192, 0) // 256


@triton.jit
def _audited_position(slot):
    """Position of the row that is audited of each group, counted from the first valid key, int32 ``[M]``.

    Args:
        slot: Numbers of the groups, int32 ``[M]``.
    """
    first = tl.where(slot < 64, slot * 64, tl.where(slot < 96, (slot - 32) * 128, (slot - 64) * 256))
    shift = tl.where(slot < 64, 26, tl.where(slot < 96, 25, 24)).to(tl.uint32)
    # Multiples of the golden ratio: places within the groups are spread evenly, and depend on the position alone.
    return first + ((slot.to(tl.uint32) * 2654435769) >> shift).to(tl.int32)


@triton.jit
def _audited(
    tile, b, structure, rows_ptr, bounds_ptr, q_len, query_rows, min_length,
    LISTED_ROWS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr,
    TOGETHER: tl.constexpr,
):  # fmt: skip
    """Which rows a tile audits, and the key blocks that any of them sees.

    Args:
        tile: Number of the tile, counted from the first group that the call may meet.
        b: Batch row.
        structure: Batch row and structure head, ``b * Hs + head``, int64.
        rows_ptr: First and last key that each row sees, int32 ``[B, Hs, 2, nq * BLOCK_Q]``; not read unless
            LISTED_ROWS.
        bounds_ptr: int32 ``[B, 3]`` = (q_offset, start, end).
        q_len: Sq.
        query_rows: ``nq * BLOCK_Q``.
        min_length: A row is audited if its last key lies at least this many tokens after its first one. Without
            LISTED_ROWS this is asked of the first row of its query block that is no padding.
        LISTED_ROWS: Whether `rows_ptr` says what rows see; otherwise they are plain causal.
        BLOCK_Q: Query rows a block.
        BLOCK_K: Keys a block.
        BLOCK_M: Rows of a tile: TOGETHER for each audited position.
        TOGETHER: Heads that share a tile: each position is there once for each of them, side by side.

    Returns:
        Query rows, int32 ``[BLOCK_M]``, 0 where the call has none; whether they are audited, int1 ``[BLOCK_M]``; the
        first of the key blocks, and one past the last: 0 if the tile audits nothing.
    """
    offset = tl.load(bounds_ptr + b * 3)
    start = tl.load(bounds_ptr + b * 3 + 1)
    end = tl.load(bounds_ptr + b * 3 + 2)
    before = tl.maximum(offset - start, 0)
    slot = tl.minimum(before >> 6, 64) + tl.minimum(tl.maximum(before - 4096, 0) >> 7, 32)
    slot += tl.maximum(before - 8192, 0) >> 8
    at = start + _audited_position(slot + tile * (BLOCK_M // TOGETHER) + tl.arange(0, BLOCK_M) // TOGETHER)
    q = at - offset
    there = (q >= 0) & (q < q_len) & (at < end)
    q = tl.where(there, q, 0)
    if LISTED_ROWS:
        ends = rows_ptr + structure * 2 * query_rows + q
        first = tl.load(ends)
        last = tl.load(ends + query_rows)
        there = there & (last >= 0) & (last - first >= min_length)
    else:
        first = start + 0 * q
        last = at
        low = tl.maximum(offset + q // BLOCK_Q * BLOCK_Q, start)
        there = there & (low - start >= min_length)
    low_block = tl.min(tl.where(there, first, 2**30)) // BLOCK_K
    high_block = tl.max(tl.where(there, last, -1)) // BLOCK_K + 1
    return q, there, low_block, tl.where(tl.max(there.to(tl.int32)) > 0, high_block, 0)


@triton.jit
def _weigh_kernel(
    query_ptr, stride_qb, stride_qh, stride_qs, stride_qd, key_ptr, stride_kb, stride_kh, stride_ks, stride_kd,
    rows_ptr, bounds_ptr, listed_ptr, listed_b, listed_h, listed_words, mask_aux, score_aux, logs_ptr,
    scale, q_len, kv_len, query_rows, key_blocks, min_length, first_tile, tiles,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, STRUCTURE_HEADS: tl.constexpr,
    CAUSAL: tl.constexpr, MASK: tl.constexpr, LISTED_Q: tl.constexpr, LISTED_K: tl.constexpr, SCORE: tl.constexpr,
    LISTED_ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TOGETHER: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """Base-2 logarithms of the sums of exponentials of every row of a tile in each of SPAN key blocks.

    A tile's rows are those of TOGETHER heads that share keys, the heads of a position side by side.

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
        rows_ptr: First and last key that each row sees, int32 ``[B, Hs, 2, nq * BLOCK_Q]``; not read unless
            LISTED_ROWS.
        bounds_ptr: int32 ``[B, 3]`` = (q_offset, start, end).
        listed_ptr: The caller's block mask as bits, int32 ``[1 or B, 1 or Hs, nq', ceil(nk' / 32)]``; not read if
            LISTED_Q is 0.
        listed_b: Words of the caller's block mask from batch row to batch row; 0 if all share it.
        listed_h: Words of the caller's block mask from head to head; 0 if all share it.
        listed_words: Words a row of blocks of the caller's block mask.
        mask_aux: What the mask_mod reads.
        score_aux: What the score_mod reads.
        logs_ptr: Result, float32 ``[B, Hq / TOGETHER, tiles, nk, BLOCK_M]``; blocks that no row of the tile can see are
            not written.
        scale: Softmax scale.
        q_len: Sq.
        kv_len: Skv.
        query_rows: ``nq * BLOCK_Q``.
        key_blocks: nk.
        min_length: A row is audited if its last key lies at least this many tokens after its first one. Without
            LISTED_ROWS this is asked of the first row of its query block that is no padding.
        first_tile: Number of the first tile of this launch.
        tiles: Tiles of this launch.
        HEADS: Hq.
        KV_HEADS: Hkv.
        STRUCTURE_HEADS: Hs: 1 if all heads see the same, or Hq.
        CAUSAL: Whether a row sees keys up to its position only.
        MASK: The mask_mod, or None.
        LISTED_Q: Query rows a block of the caller's block mask; 0 without one.
        LISTED_K: Keys a block of the caller's block mask.
        SCORE: The score_mod, or None.
        LISTED_ROWS: Whether `rows_ptr` says what rows see; otherwise they are plain causal.
        D: Channels.
        BLOCK_D: Channels, rounded up to a power of two.
        BLOCK_Q: Query rows a block.
        BLOCK_K: Keys a block.
        BLOCK_M: Rows of a tile: TOGETHER for each audited position.
        BLOCK_N: Keys a step, a divisor of BLOCK_K.
        TOGETHER: Heads that share a tile: each position is there once for each of them, side by side.
        SPAN: Key blocks a program.
    """
    TILES: tl.constexpr = BLOCK_K // BLOCK_N
    group = tl.program_id(1).to(tl.int64)
    b = tl.program_id(1) // (HEADS // TOGETHER)
    head = tl.program_id(1) % (HEADS // TOGETHER) * TOGETHER
    tile = tl.program_id(0) % tiles
    structure = (b * STRUCTURE_HEADS + (head if STRUCTURE_HEADS > 1 else 0)).to(tl.int64)
    q, there, low_block, high_block = _audited(
        first_tile + tile, b, structure, rows_ptr, bounds_ptr, q_len, query_rows, min_length,
        LISTED_ROWS, BLOCK_Q, BLOCK_K, BLOCK_M, TOGETHER,
    )  # fmt: skip
    low_block = tl.maximum(low_block, tl.program_id(0) // tiles * SPAN)
    high_block = tl.minimum(high_block, (tl.program_id(0) // tiles + 1) * SPAN)
    offset = tl.load(bounds_ptr + b * 3)
    start = tl.load(bounds_ptr + b * 3 + 1)
    end = tl.load(bounds_ptr + b * 3 + 2)
    at = q + offset
    lowest = tl.min(tl.where(there, at, 2**30))
    # Heads that see differently are not together.
    listed_ptr = at_head(listed_ptr, b, head, listed_b, listed_h, LISTED_Q)
    h = head + tl.arange(0, BLOCK_M) % TOGETHER

    offsets_d = tl.arange(0, BLOCK_D)
    query_ptr += b.to(tl.int64) * stride_qb
    row_at = h.to(tl.int64) * stride_qh + q.to(tl.int64) * stride_qs
    pointers = query_ptr + row_at[:, None] + offsets_d[None, :] * stride_qd
    query = tl.load(pointers, mask=there[:, None] & (offsets_d < D)[None, :], other=0.0)  # [BLOCK_M, BLOCK_D]
    key_ptr += b.to(tl.int64) * stride_kb + (head // (HEADS // KV_HEADS)).to(tl.int64) * stride_kh
    logs_ptr += (group * tiles + tile) * key_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for step in range(low_block * TILES, high_block * TILES):
        first_key = step * BLOCK_N
        kv = first_key + tl.arange(0, BLOCK_N)
        key_at = key_ptr + kv.to(tl.int64)[None, :] * stride_ks + offsets_d[:, None] * stride_kd
        key = tl.load(key_at, mask=(offsets_d < D)[:, None] & (kv < kv_len)[None, :], other=0.0)
        logits = tl.dot(query, key, input_precision="ieee")
        kv = kv[None, :]
        if SCORE is None:
            logits *= scale * LOG2E
        else:
            score = SCORE(logits * scale, b, h[:, None], q[:, None], tl.minimum(kv, kv_len - 1), score_aux)
            score, _ = tl.broadcast(score.to(tl.float32), logits)
            logits = score * LOG2E
        logits = tl.where(is_finite(logits), logits, float("-inf"))
        if (MASK is None) and (LISTED_Q == 0):
            last_key = first_key + BLOCK_N - 1
            if (first_key < start) | (last_key >= tl.minimum(end, kv_len)) | (CAUSAL & (last_key > lowest)):
                sees = (kv >= start) & (kv < tl.minimum(end, kv_len))
                if CAUSAL:
                    sees = sees & (kv <= at[:, None])
                logits = tl.where(sees, logits, float("-inf"))
        else:
            sees = sees_key(
                b, head, q[:, None], kv, first_key, offset, start, end, q_len, kv_len,
                listed_ptr, listed_words, mask_aux, CAUSAL, MASK, LISTED_Q, LISTED_K, BLOCK_N,
            )  # fmt: skip
            logits = tl.where(sees, logits, float("-inf"))
        if TILES > 1:
            begins = step % TILES == 0
            total = tl.where(begins, 0.0, total)
            before = tl.where(begins, float("-inf"), peak)
            peak = tl.maximum(before, tl.max(logits, axis=1))
        else:
            peak = tl.max(logits, axis=1)
        # Where nothing is seen, -inf - -inf would be NaN.
        safe = tl.where(peak == float("-inf"), 0.0, peak)
        of_tile = tl.sum(tl.exp2(logits - safe[:, None]), axis=1)
        if TILES > 1:
            total = total * tl.exp2(before - safe) + of_tile
        else:
            total = of_tile
        if step % TILES == TILES - 1:
            tl.store(logs_ptr + step // TILES * BLOCK_M, safe + tl.log2(total))


@triton.jit
def _share_kernel(
    logs_ptr, hits_ptr, nonfinite_ptr, always_ptr, rows_ptr, bounds_ptr, audit_ptr,
    least, q_len, query_rows, query_blocks, key_blocks, words, slots, sink_tokens, local_tokens, min_length,
    first_tile, tiles,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, STRUCTURE_HEADS: tl.constexpr, LISTED_ROWS: tl.constexpr,
    FLAGS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr,
    TOGETHER: tl.constexpr,
):  # fmt: skip
    """Of each row of a tile: whether it is audited, what it wants in blocks, and what of that was not kept.

    Args:
        logs_ptr: From `_weigh_kernel`, float32 ``[B, Hq / TOGETHER, tiles, nk, BLOCK_M]``.
        hits_ptr: Bits of the chosen blocks, int32 ``[B, Hq, nq, ceil(nk / 32)]``.
        nonfinite_ptr: Bits of the blocks that are kept besides, int32 ``[B, Hkv, ceil(nk / 32)]``; not read unless
            FLAGS.
        always_ptr: Bits of the blocks that are always kept, int32 ``[B, Hs, nq, ceil(nk / 32)]``; not read unless
            LISTED_ROWS.
        rows_ptr: First and last key that each row sees, int32 ``[B, Hs, 2, nq * BLOCK_Q]``; not read unless
            LISTED_ROWS.
        bounds_ptr: int32 ``[B, 3]`` = (q_offset, start, end).
        audit_ptr: Result, float32 ``[B, Hq, slots, 3]``.
        least: Share of a row's softmax that a block must have to be wanted.
        q_len: Sq.
        query_rows: ``nq * BLOCK_Q``.
        query_blocks: nq.
        key_blocks: nk.
        words: ``ceil(nk / 32)``.
        slots: Groups that the call may meet.
        sink_tokens: First valid keys whose blocks are always kept; not used if LISTED_ROWS.
        local_tokens: Keys up to a row's position whose blocks are always kept; not used if LISTED_ROWS.
        min_length: A row is audited if its last key lies at least this many tokens after its first one. Without
            LISTED_ROWS this is asked of the first row of its query block that is no padding.
        first_tile: Number of the first tile of this launch.
        tiles: Tiles of this launch.
        HEADS: Hq.
        KV_HEADS: Hkv.
        STRUCTURE_HEADS: Hs: 1 if all heads see the same, or Hq.
        LISTED_ROWS: Whether `rows_ptr` says what rows see; otherwise they are plain causal.
        FLAGS: Whether `nonfinite_ptr` is there.
        BLOCK_Q: Query rows a block.
        BLOCK_K: Keys a block.
        BLOCK_M: Rows of a tile: TOGETHER for each audited position.
        TOGETHER: Heads that share a tile: each position is there once for each of them, side by side.
    """
    group = tl.program_id(1).to(tl.int64)
    b = tl.program_id(1) // (HEADS // TOGETHER)
    head = tl.program_id(1) % (HEADS // TOGETHER) * TOGETHER
    tile = tl.program_id(0)
    structure = (b * STRUCTURE_HEADS + (head if STRUCTURE_HEADS > 1 else 0)).to(tl.int64)
    q, there, low_block, high_block = _audited(
        first_tile + tile, b, structure, rows_ptr, bounds_ptr, q_len, query_rows, min_length,
        LISTED_ROWS, BLOCK_Q, BLOCK_K, BLOCK_M, TOGETHER,
    )  # fmt: skip
    row = tl.arange(0, BLOCK_M)
    logs_ptr += (group * tiles + tile) * key_blocks * BLOCK_M + row[None, :]
    first_word = low_block // 32
    last_word = tl.cdiv(high_block, 32)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for word in range(first_word, last_word):
        block = (word * 32 + tl.arange(0, 32))[:, None]
        inside = (block >= low_block) & (block < high_block)
        log = tl.load(logs_ptr + block * BLOCK_M, mask=inside, other=float("-inf"))  # [32, BLOCK_M]
        new_peak = tl.maximum(peak, tl.max(log, axis=0))
        safe = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        total = total * tl.exp2(peak - safe) + tl.sum(tl.exp2(log - safe[None, :]), axis=0)
        peak = new_peak
    total = tl.where(total > 0, peak + tl.log2(total), 0.0)

    query_block = (q // BLOCK_Q).to(tl.int64)
    offset = tl.load(bounds_ptr + b * 3)
    start = tl.load(bounds_ptr + b * 3 + 1)
    near = tl.maximum(tl.maximum(offset + q // BLOCK_Q * BLOCK_Q, start) - local_tokens + 1, 0) // BLOCK_K
    sink_blocks = tl.cdiv(start + sink_tokens, BLOCK_K)
    of_head = (b * HEADS + head + row % TOGETHER).to(tl.int64)
    hits_ptr += (of_head * query_blocks + query_block) * words
    always_ptr += (structure * query_blocks + query_block) * words
    nonfinite_ptr += (b * KV_HEADS + head // (HEADS // KV_HEADS)).to(tl.int64) * words
    wanted = tl.zeros([BLOCK_M], tl.float32)
    missed = tl.zeros([BLOCK_M], tl.float32)
    for word in range(first_word, last_word):
        bit = tl.arange(0, 32)[:, None]
        block = word * 32 + bit
        inside = (block >= low_block) & (block < high_block)
        log = tl.load(logs_ptr + block * BLOCK_M, mask=inside, other=float("-inf"))
        share = tl.exp2(log - total[None, :])
        kept = tl.load(hits_ptr + word)  # [BLOCK_M]
        if FLAGS:
            kept = kept | tl.load(nonfinite_ptr + word)
        if LISTED_ROWS:
            far = ((tl.load(always_ptr + word)[None, :] >> bit) & 1) == 0
        else:
            far = (block >= sink_blocks) & (block < near[None, :])
        share = tl.where(far & (share >= least), share, 0.0)
        wanted += tl.sum(share, axis=0)
        missed += tl.sum(tl.where(((kept[None, :] >> bit) & 1) == 0, share, 0.0), axis=0)
    slot = (first_tile + tile) * (BLOCK_M // TOGETHER) + row // TOGETHER
    audit_ptr += (of_head * slots + slot) * 3
    tl.store(audit_ptr, there.to(tl.float32), mask=slot < slots)
    tl.store(audit_ptr + 1, tl.where(there, wanted, 0.0), mask=slot < slots)
    tl.store(audit_ptr + 2, tl.where(there, missed, 0.0), mask=slot < slots)


def audit_rows(
    query: Tensor,
    key: Tensor,
    hits: Tensor,
    nonfinite: Tensor | None,
    spec: MaskSpec,
    structure: Structure | None,
    score: ModLike,
    scale: float,
    least: float,
    grid: Grid,
    near: Near,
) -> Tensor:
    """What audited rows want of the blocks that are not kept in any case, and what of that the choice missed.

    Positions, counted from the first valid key, fall into groups of n = 64, from 4,096 on of 128, from 8,192 on of
    256. Of the g-th one the row at place ``floor(n * frac(g * phi))`` is audited, phi the golden ratio in 32 bits,
    unless it is early.

    Args:
        query: ``[B, Hq, Sq, D]``, any strides.
        key: ``[B, Hkv, Skv, D]``, any strides, the query's dtype.
        hits: int32 ``[B, Hq, nq, ceil(nk / 32)]``: bits of the chosen blocks.
        nonfinite: int32 ``[B, Hkv, ceil(nk / 32)]``: bits of blocks that are kept besides, or None.
        spec: Who sees whom; its mask is the mask_mod as jit function and what it reads, or None.
        structure: From `block_structure` and `candidate_blocks`; None in plain causal attention.
        score: score_mod as jit function and what it reads, or None.
        scale: Softmax scale.
        least: Share of a row's softmax that a block must have to be wanted.
        grid: Lengths and blocks.
        near: Which blocks are kept in any case. Rows that keep all they see are early.

    Returns:
        float32 ``[B, Hq, slots_before(Sq) + 2, 3]``: of the row of every group that the call may meet, whether it was
        audited (1 or 0), the mass of its wanted blocks, and the mass of those that were not kept.
    """
    batch, heads, q_len, dim = query.shape
    query_blocks, words = hits.shape[2:]
    slots = slots_before(q_len) + 2
    audit = query.new_empty(batch, heads, slots, 3, dtype=torch.float32)
    block_d = triton.next_power_of_2(dim)
    # 32 KiB of rows and two tiles of 16 KiB of keys fit every supported GPU's shared memory.
    of_row = block_d * query.element_size()
    block_m, block_n = min(64, 32768 // of_row), min(64, 16384 // of_row, grid.block_k)
    # Where there is no tensor, `bounds` stands for it, and is not read.
    always = ends = bounds = spec.bounds
    structure_heads = 1
    if structure is not None:
        always, ends = structure.candidates.always, structure.visibility.row_kv_bounds
        structure_heads = always.shape[1]
    share = heads // key.shape[1]
    together = 1 if structure_heads > 1 else min(share & -share, 8)
    tiles = triton.cdiv(slots, block_m // together)
    groups = batch * heads // together
    at_once = min(tiles, max(1, RANGE_BYTES // (groups * grid.key_blocks * block_m * 4)))
    logs = query.new_empty(groups * at_once * grid.key_blocks * block_m, dtype=torch.float32)
    listed, listed_b, listed_h, listed_words = listed_arguments(spec)
    mask_function, mask_aux = mod_arguments(spec.mask)
    score_function, score_aux = mod_arguments(score)
    shared = {
        "HEADS": heads, "KV_HEADS": key.shape[1], "STRUCTURE_HEADS": structure_heads,
        "LISTED_ROWS": structure is not None, "BLOCK_Q": grid.block_q, "BLOCK_K": grid.block_k, "BLOCK_M": block_m,
        "TOGETHER": together, "num_warps": 4,
    }  # fmt: skip
    for first in range(0, tiles, at_once):
        count = min(at_once, tiles - first)
        _weigh_kernel[(count * triton.cdiv(grid.key_blocks, SPAN), groups)](
            query, *query.stride(), key, *key.stride(), ends, bounds,
            listed, listed_b, listed_h, listed_words, mask_aux, score_aux, logs,
            scale, q_len, key.shape[2], query_blocks * grid.block_q, grid.key_blocks, near.min_length, first, count,
            CAUSAL=spec.causal, MASK=mask_function, LISTED_Q=0 if spec.listed is None else spec.listed_q,
            LISTED_K=spec.listed_k, SCORE=score_function, D=dim, BLOCK_D=block_d, BLOCK_N=block_n, SPAN=SPAN,
            num_stages=2, **shared,
        )  # fmt: skip
        _share_kernel[(count, groups)](
            logs, hits, bounds if nonfinite is None else nonfinite, always, ends, bounds,
            audit, least, q_len, query_blocks * grid.block_q, query_blocks, grid.key_blocks, words, slots, *near, first,
            count, FLAGS=nonfinite is not None, **shared,
        )  # fmt: skip
    return audit
