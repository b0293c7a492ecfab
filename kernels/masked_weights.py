# SPDX-License-Identifier: BSD-3-Clause
"""What blocks weigh in the softmax of pooled rows, score_mod included: jit functions of `masked_mass`.

`weigh_exactly` goes through blocks element by element, and asks who sees whom. `sum_codes`, and with a score_mod
`weigh`, take blocks that are seen as a whole by the codes of their sub-blocks' moments, gathered through a list: what
the GPU spends its time on.
"""

import triton
import triton.language as tl

from .fixed_point import by_part, coded_logits, column_order, sum_parts
from .primitives import is_finite
from .visibility import sees_key

LOG2E = tl.constexpr(1.4426950408889634)

FAST, PEAK, CAREFUL = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
"""What `weigh` does: masses of finite scores; largest logits; masses of any scores, those not finite left out. Of these
`sum_codes` knows the first two."""

ABSENT = tl.constexpr(-1e38)
"""The logit of a key whose own is not finite, in an exact part: it counts for nothing there, but the row sees a key."""


@triton.jit
def sort_candidates(
    list_ptr, sorted_ptr, count, b, head, first_row, offset, start, end, q_len, kv_len, listed_ptr, listed_words,
    mask_aux, CAUSAL: tl.constexpr, MASK: tl.constexpr, LISTED_Q: tl.constexpr, LISTED_K: tl.constexpr,
    BLOCK_K: tl.constexpr, P: tl.constexpr, ROWS: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Write partial candidates anew, those last that all rows but padding see, and return how many these are.

    Where some rows are padding no block is full, and all candidates come as partial ones. The arguments are those of
    `weigh_exactly`; `count` entries of `list_ptr` go to `sorted_ptr`.
    """
    whole = count * 0
    for slot in range(0, count):
        block = tl.load(list_ptr + slot)
        blind = tl.zeros([ROWS, BLOCK_E], tl.int32)
        for step in range(0, P * (BLOCK_K // BLOCK_E)):
            q = first_row + tl.arange(0, ROWS)[:, None] * P + step % P
            first_key = block * BLOCK_K + step // P * BLOCK_E
            real = (q < q_len) & (q + offset >= start) & (q + offset < end)
            sees = sees_key(
                b, head, q, (first_key + tl.arange(0, BLOCK_E))[None, :], first_key, offset, start, end, q_len, kv_len,
                listed_ptr, listed_words, mask_aux, CAUSAL, MASK, LISTED_Q, LISTED_K, BLOCK_E,
            )  # fmt: skip
            blind |= (real & (sees == 0)).to(tl.int32)
        is_whole = (tl.max(tl.max(blind, axis=1), axis=0) == 0).to(tl.int32)
        tl.store(sorted_ptr + tl.where(is_whole > 0, count - 1 - whole, slot - whole), block)
        whole += is_whole
    tl.debug_barrier()
    return whole


@triton.jit
def weigh_exactly(
    scratch_ptr, rows_ptr, at, key_ptr, stride_s, stride_d, full_ptr, list_ptr, always, partial,
    b, head, h, q, first_row, offset, start, end, q_len, kv_len, listed_ptr, listed_words, mask_aux, score_aux, scale,
    shift, absent,
    CAUSAL: tl.constexpr, MASK: tl.constexpr, LISTED_Q: tl.constexpr, LISTED_K: tl.constexpr, SCORE: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK_D: tl.constexpr, BLOCK_K: tl.constexpr, P: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Base-2 logarithm of rows' sums over always-kept blocks and partial candidates, [M]; the latter's are written.

    Sums are kept relative to the largest logit so far. Rows that do not exist get anything.

    Args:
        scratch_ptr: Where the logarithms of each row begin, ``[M]``.
        rows_ptr: Pooled rows.
        at: Which of them, int64 ``[M]``: ROWS of every head, head after head.
        key_ptr: Keys of the KV head.
        stride_s: From key to key.
        stride_d: From channel to channel.
        full_ptr: Words of the blocks that need no mask.
        list_ptr: Blocks.
        always: How many are always kept.
        partial: How many partial candidates follow.
        b: Batch row.
        head: The head whose sight all rows share.
        h: Heads as the score_mod takes them: a number, or ``[M, 1]``.
        q: int32 ``[M]``: the last real query row of each.
        first_row: The query block's first query row.
        offset: Key position of query row 0.
        start: First valid key.
        end: Behind the last one.
        q_len: Sq.
        kv_len: Skv.
        listed_ptr: Words of the caller's block mask.
        listed_words: Words a row of its blocks.
        mask_aux: What the mask_mod reads.
        score_aux: What the score_mod reads.
        scale: Softmax scale; without a score_mod that of base-2 logits.
        shift: What is subtracted from products first, float32 ``[M]``, without a score_mod.
        absent: The logit of a key that is seen, and whose own is not finite.
        CAUSAL: Whether a row sees keys up to its position only.
        MASK: The mask_mod, or None.
        LISTED_Q: Query rows a block of the caller's block mask; 0 without one.
        LISTED_K: Keys a block of it.
        SCORE: The score_mod, or None.
        D: Channels.
        BLOCK_D: Channels, rounded up.
        CHUNK_D: Channels a product; fewer than BLOCK_D: rows are read again in every step.
        BLOCK_K: Keys a block.
        P: Query rows a pooled row.
        ROWS: Pooled rows a query block.
        BLOCK_E: Keys a step.
    """
    M: tl.constexpr = at.shape[0]
    TILES: tl.constexpr = BLOCK_K // BLOCK_E
    WHOLE: tl.constexpr = CHUNK_D == BLOCK_D
    d = tl.arange(0, CHUNK_D)
    keys = tl.arange(0, BLOCK_E)
    if WHOLE:
        row = tl.load(rows_ptr + at[:, None] * D + d[None, :], mask=(d < D)[None, :], other=0.0)
    peak = tl.full([M], -3.4028234663852886e38, tl.float32)  # finite, so that no difference with it is NaN
    total = tl.zeros([M], tl.float32)
    block_total = total
    steps = (always + partial) * TILES
    ahead = tl.load(list_ptr)
    for step in tl.range(0, steps, num_stages=2 if WHOLE else 1):
        logits = tl.zeros([M, BLOCK_E], tl.float32)
        key_at = ahead * BLOCK_K + step % TILES * BLOCK_E + keys
        ahead = tl.load(list_ptr + tl.minimum(step + 1, steps - 1) // TILES)
        for chunk in tl.static_range(0, BLOCK_D, CHUNK_D):
            in_head = chunk + d < D
            if not WHOLE:
                row = tl.load(rows_ptr + at[:, None] * D + (chunk + d)[None, :], mask=in_head[None, :], other=0.0)
            pointers = key_ptr + key_at.to(tl.int64)[None, :] * stride_s + (chunk + d)[:, None] * stride_d
            key = tl.load(pointers, mask=in_head[:, None] & (key_at < kv_len)[None, :], other=0.0)
            logits = tl.dot(row, key, logits, input_precision="ieee")
        # Read again instead of handed on: a value that outlives two steps keeps a loop from being pipelined.
        block = tl.load(list_ptr + step // TILES)
        full = (tl.load(full_ptr + block // 32) >> (block % 32)) & 1
        first_key = block * BLOCK_K + step % TILES * BLOCK_E
        kv = (first_key + keys)[None, :]
        if SCORE is None:
            logits = (logits - shift[:, None]) * scale
        else:
            there = tl.minimum(kv, kv_len - 1)
            score, _ = tl.broadcast(
                SCORE(logits * scale, b, h, tl.maximum(q, 0)[:, None], there, score_aux).to(tl.float32), logits
            )
            logits = score * LOG2E
        logits = tl.where(is_finite(logits), logits, absent)
        if (full == 0) | (first_key + BLOCK_E > kv_len):
            if (MASK is None) and (LISTED_Q == 0):
                # The last member sees what any of them does.
                last_key = (tl.minimum(q + offset, end - 1) if CAUSAL else end - 1 + 0 * q)[:, None]
                sees = (kv >= start) & (kv <= last_key)
            else:
                # Heads see the same.
                member_q = first_row + tl.arange(0, ROWS)[:, None] * P
                sees = tl.zeros([ROWS, BLOCK_E], tl.int1)
                for member in range(0, P):
                    sees = sees | sees_key(
                        b, head, member_q + member, kv, first_key, offset, start, end, q_len, kv_len,
                        listed_ptr, listed_words, mask_aux, CAUSAL, MASK, LISTED_Q, LISTED_K, BLOCK_E,
                    )  # fmt: skip
                if M > ROWS:
                    sees = tl.reshape(tl.broadcast_to(sees[None, :, :], [M // ROWS, ROWS, BLOCK_E]), [M, BLOCK_E])
            logits = tl.where(sees, logits, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(logits, axis=1))
        factor = tl.exp2(peak - new_peak)
        peak = new_peak
        step_total = tl.sum(tl.exp2(logits - peak[:, None]), axis=1)
        total = total * factor + step_total
        if TILES > 1:
            step_total += tl.where(step % TILES == 0, 0.0, block_total * factor)
            block_total = step_total
        if step >= always * TILES:
            if step % TILES == TILES - 1:
                tl.store(scratch_ptr + (step // TILES - always), peak + tl.log2(step_total))
    return peak + tl.log2(total)


@triton.jit
def sum_codes(
    WHAT: tl.constexpr, scratch_ptr, list_ptr, count, codes, squares, mu_ptr, mu_scale_ptr, var_ptr, var_scale_ptr,
    by_row, by_square, constant, highest,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, G: tl.constexpr, BLOCK_N: tl.constexpr,
    WIDE: tl.constexpr, LIMIT: tl.constexpr, SQUARE_LIMIT: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    """Sums of rows over whole candidates in the arithmetic of `mass`, written down block by block; or largest logits.

    Args:
        WHAT: FAST, or PEAK: the largest logits in fixed point instead, int32 ``[M]``, with nothing written.
        scratch_ptr: Where the sums of each row begin, ``[M]``.
        list_ptr: Whole candidates.
        count: How many.
        codes: Codes of the rows, int8 ``[M, BLOCK_D]``.
        squares: Their squares.
        mu_ptr: Codes of the KV head's means.
        mu_scale_ptr: Their scales.
        var_ptr: Codes of its variances.
        var_scale_ptr: Their scales.
        by_row: What products with means are multiplied by, besides the block's scale: float32 ``[M]``.
        by_square: The same of variances.
        constant: What is added to a logit to make a float's exponent of it, int32 ``[M]``.
        highest: Where logits saturate.
        D: Channels.
        BLOCK_D: Channels, rounded up.
        BLOCK_K: Keys a block.
        G: Keys a sub-block.
        BLOCK_N: Sub-blocks a step.
        WIDE: Whether codes have 8 bits.
        LIMIT: Largest factor of a product of codes.
        SQUARE_LIMIT: The same of squares and variances.
        CAP: Most that a variance adds.
    """
    M: tl.constexpr = codes.shape[0]
    SUBS: tl.constexpr = BLOCK_K // G
    NB: tl.constexpr = BLOCK_N // SUBS  # key blocks a step
    PART: tl.constexpr = SUBS if BLOCK_N >= 4 * SUBS else BLOCK_N // 4  # see `fixed_point`
    PARTS: tl.constexpr = SUBS // PART
    SETS: tl.constexpr = BLOCK_N // (4 * PART)
    offsets_d = tl.arange(0, BLOCK_D)
    in_head = (offsets_d < D)[None, :]
    column = column_order(BLOCK_N, PART)
    slot_of_part = (tl.arange(0, SETS)[:, None] * 4 + tl.arange(0, 4)[None, :]) // PARTS
    sub = column % SUBS
    slot_of_column = column // SUBS

    if WHAT == PEAK:
        result = tl.full([M, 4], -(2**31), tl.int32)
    else:
        result = tl.zeros([M, 4], tl.float32)
    # What a step needs besides codes is read ahead: nothing but codes is pipelined by the compiler. Slots behind the
    # last one read it again.
    keys = tl.load(list_ptr + tl.minimum(slot_of_column, count - 1)) * SUBS + sub
    block = tl.load(list_ptr + tl.minimum(slot_of_part, count - 1))  # [SETS, 4]
    ahead = tl.load(list_ptr + tl.minimum(NB + slot_of_part, count - 1))
    mu_scale = tl.load(mu_scale_ptr + block)
    var_scale = mu_scale
    if G > 1:
        var_scale = tl.load(var_scale_ptr + block)
    for step in range(0, tl.cdiv(count, NB)):
        mu = tl.load(mu_ptr + keys[:, None] * D + offsets_d[None, :], mask=in_head, other=0)
        if G > 1:
            var = tl.load(var_ptr + keys[:, None] * D + offsets_d[None, :], mask=in_head, other=0)
        keys = tl.load(list_ptr + tl.minimum((step + 1) * NB + slot_of_column, count - 1)) * SUBS + sub
        there = step * NB + slot_of_part < count
        product = tl.dot(codes, tl.trans(mu), out_dtype=tl.int32)
        square = 0
        if G > 1:
            square = tl.dot(squares, tl.trans(var), out_dtype=tl.int32)
        logits = coded_logits(
            product, square, constant, by_row, mu_scale, by_square, var_scale,
            PART, G > 1, WIDE, LIMIT, SQUARE_LIMIT, CAP,
        )  # fmt: skip
        mu_scale = tl.load(mu_scale_ptr + ahead)
        if G > 1:
            var_scale = tl.load(var_scale_ptr + ahead)
        ahead = tl.load(list_ptr + tl.minimum((step + 2) * NB + slot_of_part, count - 1))
        if WHAT == PEAK:
            largest = tl.where(there[None, :, :], tl.max(logits, axis=3), -(2**31))
            result = tl.maximum(result, tl.max(largest, axis=1))
        else:
            total = tl.where(there[None, :, :], sum_parts(logits, highest), 0.0)
            result += tl.sum(total, axis=1)
            if PARTS > 1:
                total = tl.sum(tl.reshape(total, [M, NB, PARTS]), axis=2)
            total = tl.reshape(total, [M, NB])
            tl.store(scratch_ptr[:, None] + step * NB + tl.arange(0, NB)[None, :], total)
    if WHAT == PEAK:
        return tl.max(result, axis=1)
    return tl.sum(result, axis=1)


@triton.jit
def weigh(
    WHAT: tl.constexpr, scratch_ptr, list_ptr, count, codes, squares, mu_ptr, mu_scale_ptr, var_ptr, var_scale_ptr,
    by_row, by_square, shift, reference, b, h, q, score_aux,
    SCORE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, G: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Sums of rows over whole candidates under a score_mod, relative to 2**reference, written down block by block.

    Or largest logits.

    Args:
        WHAT: FAST, PEAK or CAREFUL.
        scratch_ptr: Where the sums of each row begin, ``[M]``.
        list_ptr: Whole candidates.
        count: How many.
        codes: Codes of the rows, int8 ``[M, BLOCK_D]``.
        squares: Their squares.
        mu_ptr: Codes of the KV head's means.
        mu_scale_ptr: Their scales.
        var_ptr: Codes of its variances.
        var_scale_ptr: Their scales.
        by_row: What products with means are multiplied by, besides the block's scale: float32 ``[M]``.
        by_square: The same of variances, for base-2 logarithms.
        shift: Logit of the smoothing mean, ``[M]``.
        reference: Base-2 logarithm, ``[M]``.
        b: Batch row, as the score_mod takes it.
        h: Heads: a number, or ``[M, 1, 1, 1]``.
        q: Query rows ``[M]``.
        score_aux: What the score_mod reads.
        SCORE: The score_mod.
        D: Channels.
        BLOCK_D: Channels, rounded up.
        BLOCK_K: Keys a block.
        G: Keys a sub-block.
        BLOCK_N: Sub-blocks a step.
    """
    M: tl.constexpr = codes.shape[0]
    SUBS: tl.constexpr = BLOCK_K // G
    NB: tl.constexpr = BLOCK_N // SUBS  # key blocks a step
    PART: tl.constexpr = SUBS if BLOCK_N >= 4 * SUBS else BLOCK_N // 4  # see `fixed_point`
    PARTS: tl.constexpr = SUBS // PART
    SETS: tl.constexpr = BLOCK_N // (4 * PART)
    offsets_d = tl.arange(0, BLOCK_D)
    in_head = (offsets_d < D)[None, :]
    column = column_order(BLOCK_N, PART)
    part = tl.arange(0, SETS)[:, None] * 4 + tl.arange(0, 4)[None, :]
    middle = (tl.arange(0, PART) * G + G // 2)[None, None, None, :]
    shift = shift[:, None, None, None]
    constant = (tl.log2(tl.full([M], G, tl.float32)) - reference)[:, None, None, None]
    bound = constant + 2.0 * (G - 1) * LOG2E
    q = q[:, None, None, None]

    if WHAT == PEAK:
        result = tl.full([M, 4], float("-inf"), tl.float32)
    else:
        result = tl.zeros([M, 4], tl.float32)
    # What a step needs besides codes is read ahead: nothing but codes is pipelined by the compiler. Slots behind the
    # last one read it again.
    sub = column % SUBS
    slot_of_column = column // SUBS
    slot_of_part = part // PARTS
    keys = tl.load(list_ptr + tl.minimum(slot_of_column, count - 1)) * SUBS + sub
    block = tl.load(list_ptr + tl.minimum(slot_of_part, count - 1))  # [SETS, 4]
    ahead = tl.load(list_ptr + tl.minimum(NB + slot_of_part, count - 1))
    mu_scale = tl.load(mu_scale_ptr + block)
    if G > 1:
        var_scale = tl.load(var_scale_ptr + block)
    for step in range(0, tl.cdiv(count, NB)):
        mu = tl.load(mu_ptr + keys[:, None] * D + offsets_d[None, :], mask=in_head, other=0)
        if G > 1:
            var = tl.load(var_ptr + keys[:, None] * D + offsets_d[None, :], mask=in_head, other=0)
        keys = tl.load(list_ptr + tl.minimum((step + 1) * NB + slot_of_column, count - 1)) * SUBS + sub
        there = step * NB + slot_of_part < count
        # Read again instead of handed on: a value that outlives two steps keeps a loop from being pipelined.
        block = tl.load(list_ptr + tl.minimum(step * NB + slot_of_part, count - 1))
        kv = (block * BLOCK_K + part % PARTS * (PART * G))[None, :, :, None] + middle
        product = tl.dot(codes, tl.trans(mu), out_dtype=tl.int32)
        logit = by_part(product, PART).to(tl.float32)
        factor = by_row[:, None, None] * mu_scale[None, :, :]
        mu_scale = tl.load(mu_scale_ptr + ahead)
        if G > 1:
            square = tl.dot(squares, tl.trans(var), out_dtype=tl.int32)
            spread = by_square[:, None, None] * var_scale[None, :, :]
            var_scale = tl.load(var_scale_ptr + ahead)
            # An infinite factor times 0 is NaN, and the minimum is the other.
            rest = tl.minimum(by_part(square, PART).to(tl.float32) * spread[:, :, :, None] + constant, bound)
        else:
            rest = constant
        ahead = tl.load(list_ptr + tl.minimum((step + 2) * NB + slot_of_part, count - 1))
        logit = logit * factor[:, :, :, None] + shift
        score, _ = tl.broadcast(SCORE(logit, b, h, q, kv, score_aux).to(tl.float32), logit)
        logit = score * LOG2E + rest
        if WHAT != FAST:
            logit = tl.where(is_finite(logit) & there[None, :, :, None], logit, float("-inf"))
        if WHAT == PEAK:
            result = tl.maximum(result, tl.max(tl.max(logit, axis=3), axis=1))
        else:
            total = tl.where(there[None, :, :], tl.sum(tl.exp2(logit), axis=3), 0.0)
            result += tl.sum(total, axis=1)
            if PARTS > 1:
                total = tl.sum(tl.reshape(total, [M, NB, PARTS]), axis=2)
            total = tl.reshape(total, [M, NB])
            tl.store(scratch_ptr[:, None] + step * NB + tl.arange(0, NB)[None, :], total)
    if WHAT == PEAK:
        return tl.max(result, axis=1)
    return tl.sum(result, axis=1)
