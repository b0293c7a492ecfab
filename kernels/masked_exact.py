# SPDX-License-Identifier: BSD-3-Clause
"""What blocks weigh exactly in the softmax of pooled rows, score_mod included: jit functions of `masked_mass`.

`weigh_exactly` goes through blocks element by element, and asks who sees whom. Blocks that are seen as a whole are left
to `mass_loop`.
"""

import triton
import triton.language as tl

from .primitives import is_finite
from .visibility import sees_key

LOG2E = tl.constexpr(1.4426950408889634)

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
