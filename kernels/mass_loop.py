# SPDX-License-Identifier: BSD-3-Clause
"""The loop of the mass kernels: what blocks that are seen as a whole weigh in the softmax of pooled rows.

`sum_candidates` takes codes of a few pooled rows through candidate blocks by the codes of their sub-blocks' moments, or
of their keys: what the GPU spends its time on. Blocks come from a span, in plain causal attention, or from a list.
Without a score_mod an estimate is integer arithmetic (`fixed_point`), the same to the bit for both.
"""

import triton
import triton.language as tl

from .fixed_point import by_part, coded_logits, column_order, level, sum_parts
from .primitives import is_finite

LOG2E = tl.constexpr(1.4426950408889634)

FAST, PEAK, CAREFUL = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
"""What `sum_candidates` does: masses of finite scores; largest logits; under a score_mod, masses of any scores, those
that are not finite left out."""


@triton.jit
def _codes(codes_ptr, offsets, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Codes at some offsets, int8 ``[N, BLOCK_D]``, 0 in channels that a head does not have."""
    if D == BLOCK_D:
        codes = tl.load(codes_ptr + offsets)
    else:
        codes = tl.load(codes_ptr + offsets, mask=(tl.arange(0, BLOCK_D) < D)[None, :], other=0)
    return codes


@triton.jit
def sum_candidates(
    WHAT: tl.constexpr, LIST: tl.constexpr, scratch_ptr, candidates, count, rows, moments, constant, span, scored,
    SCORE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, G: tl.constexpr,
    BLOCK_N: tl.constexpr, WIDE: tl.constexpr, LIMIT: tl.constexpr, SQUARE_LIMIT: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    """Sums of rows over candidates, float32 ``[M]``, those of each block written down; or largest logits.

    Args:
        WHAT: FAST, PEAK or CAREFUL. PEAK gives the largest logits, int32 ``[M]`` in fixed point or under a score_mod
            float32, and writes nothing.
        LIST: Whether candidates are a list of blocks instead of a span.
        scratch_ptr: Where sums go. Of a list: floats, a row's from its pointer ``[M]`` on. Of a span: their levels,
            four steps in an int32 ``[ceil(steps / 4), M, NB]``.
        candidates: The list, ``[count]``; or the span's first block.
        count: Blocks of the list; or steps of the span.
        rows: Codes of the rows, int8 ``[M, BLOCK_D]``; their squares, likewise, not used if G is 1; what products with
            means are multiplied by, besides the block's scale, float32 ``[M]``; the same of variances.
        moments: Where codes of the means of the KV head's sub-blocks are, ``[N, D]``, and their scales; codes of the
            variances, and scales. Of a span: from its first block on.
        constant: What is added to a logit to make a float's exponent of it, int32 ``[M]``; under a score_mod the
            base-2 logarithm that sums are relative to, float32 ``[M]``.
        span: Of a span: the float whose bits are level 0; which step holds the first candidate of all rows, and from
            which one on some rows have none; the first candidate; one past the last of each row, ``[M]``.
        scored: Where logits saturate. Under a score_mod instead: logits of the smoothing mean ``[M]``; batch row and
            heads as the score_mod takes them, a number or ``[M, 1, 1, 1]``; query rows ``[M]``; what it reads.
        SCORE: The score_mod, of a list, or None.
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
    codes, squares, by_row, by_square = rows
    mu_ptr, mu_scale_ptr, var_ptr, var_scale_ptr = moments
    M: tl.constexpr = codes.shape[0]
    SUBS: tl.constexpr = BLOCK_K // G
    NB: tl.constexpr = BLOCK_N // SUBS  # key blocks a step
    PART: tl.constexpr = SUBS if BLOCK_N >= 4 * SUBS else BLOCK_N // 4  # see `fixed_point`
    PARTS: tl.constexpr = SUBS // PART
    SETS: tl.constexpr = BLOCK_N // (4 * PART)
    offsets_d = tl.arange(0, BLOCK_D)[None, :]
    column = column_order(BLOCK_N, PART)
    part = tl.arange(0, SETS)[:, None] * 4 + tl.arange(0, 4)[None, :]
    slot = part // PARTS  # of the step's blocks

    # What a step needs besides codes is read ahead: nothing but codes is pipelined by the compiler. What is behind the
    # last block reads that again.
    if LIST:
        steps = tl.cdiv(count, NB)
        sub = column % SUBS
        slot_of_column = column // SUBS
        keys = tl.load(candidates + tl.minimum(slot_of_column, count - 1)) * SUBS + sub
        block = tl.load(candidates + tl.minimum(slot, count - 1))  # [SETS, 4]
        ahead = tl.load(candidates + tl.minimum(NB + slot, count - 1))
    else:
        steps = count
        base, closed_steps, open_steps, low_block, high_block = span
        key_offsets = column[:, None] * D + offsets_d
        packed = tl.zeros([M, SETS, 4 // PARTS], tl.int32)
        noted = tl.arange(0, M)[:, None] * NB + tl.arange(0, NB)[None, :]
        block = slot
    if SCORE is None:
        highest = scored
    else:
        shift, b, h, q, score_aux = scored
        shift = shift[:, None, None, None]
        q = q[:, None, None, None]
        middle = (tl.arange(0, PART) * G + G // 2)[None, None, None, :]
        constant = (tl.log2(tl.full([M], G, tl.float32)) - constant)[:, None, None, None]
        bound = constant + 2.0 * (G - 1) * LOG2E
    mu_scale = tl.load(mu_scale_ptr + block)
    var_scale = mu_scale
    if G > 1:
        var_scale = tl.load(var_scale_ptr + block)
    if WHAT != PEAK:
        result = tl.zeros([M, 4], tl.float32)
    elif SCORE is None:
        result = tl.full([M, 4], -(2**31), tl.int32)
    else:
        result = tl.full([M, 4], float("-inf"), tl.float32)
    for step in range(0, steps):
        if LIST:
            offsets = keys[:, None] * D + offsets_d
            keys = tl.load(candidates + tl.minimum((step + 1) * NB + slot_of_column, count - 1)) * SUBS + sub
            there = (step * NB + slot < count)[None, :, :]
        else:
            offsets = step * (BLOCK_N * D) + key_offsets
            ahead = tl.minimum(step + 1, steps - 1) * NB + slot
        mu = _codes(mu_ptr, offsets, D, BLOCK_D)
        square = 0
        if G > 1:
            square = tl.dot(squares, tl.trans(_codes(var_ptr, offsets, D, BLOCK_D)), out_dtype=tl.int32)
        product = tl.dot(codes, tl.trans(mu), out_dtype=tl.int32)
        if SCORE is None:
            logits = coded_logits(
                product, square, constant, by_row, mu_scale, by_square, var_scale,
                PART, G > 1, WIDE, LIMIT, SQUARE_LIMIT, CAP,
            )  # fmt: skip
        else:
            # Read again instead of handed on: a value that outlives two steps keeps a loop from being pipelined.
            block = tl.load(candidates + tl.minimum(step * NB + slot, count - 1))
            kv = (block * BLOCK_K + part % PARTS * (PART * G))[None, :, :, None] + middle
            rest = constant
            if G > 1:
                spread = by_square[:, None, None] * var_scale[None, :, :]
                # An infinite factor times 0 is NaN, and the minimum is the other.
                rest = tl.minimum(by_part(square, PART).to(tl.float32) * spread[:, :, :, None] + constant, bound)
            factor = by_row[:, None, None] * mu_scale[None, :, :]
            logits = by_part(product, PART).to(tl.float32) * factor[:, :, :, None] + shift
            score, _ = tl.broadcast(SCORE(logits, b, h, q, kv, score_aux).to(tl.float32), logits)
            logits = score * LOG2E + rest
            if WHAT != FAST:
                logits = tl.where(is_finite(logits) & there[:, :, :, None], logits, float("-inf"))
        mu_scale = tl.load(mu_scale_ptr + ahead)
        if G > 1:
            var_scale = tl.load(var_scale_ptr + ahead)
        if LIST:
            ahead = tl.load(candidates + tl.minimum((step + 2) * NB + slot, count - 1))
        if WHAT == PEAK:
            largest = tl.max(logits, axis=3)
            if SCORE is None:
                largest = tl.where(there, largest, -(2**31))
            result = tl.maximum(result, tl.max(largest, axis=1))
        else:
            if SCORE is None:
                total = sum_parts(logits, highest)  # [M, SETS, 4]
            else:
                total = tl.sum(tl.exp2(logits), axis=3)
            if LIST:
                total = tl.where(there, total, 0.0)
            elif (step < closed_steps) | (step >= open_steps):
                here = (candidates + step * NB + slot)[None, :, :]
                total = tl.where((here >= low_block) & (here < high_block[:, None, None]), total, 0.0)
            result += tl.sum(total, axis=1)
            if PARTS > 1:
                total = tl.sum(tl.reshape(total, [M, SETS, 4 // PARTS, PARTS]), axis=3)
            if LIST:
                tl.store(scratch_ptr[:, None] + step * NB + tl.arange(0, NB)[None, :], tl.reshape(total, [M, NB]))
            else:
                packed += level(total, base) << (step % 4 * 8)
                if (step % 4 == 3) | (step == steps - 1):
                    tl.store(scratch_ptr + step // 4 * (M * NB) + noted, tl.reshape(packed, [M, NB]))
                    packed = tl.zeros_like(packed)
    if WHAT == PEAK:
        return tl.max(result, axis=1)
    return tl.sum(result, axis=1)
