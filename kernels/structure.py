# SPDX-License-Identifier: BSD-3-Clause
"""What the rows of a call under mods see, block by block, and the lists of blocks to weigh.

Entry points: `block_structure` and `candidate_blocks`. The first asks the mask about every element that positions and
the caller's promise leave open, and nothing of it is reduced on the way: each element of a tile keeps one bit per key
block in a word of its own, and 32 blocks later one OR and one AND over the tile give the words of visible and of full
blocks, the lowest and the highest bit each row's first and last key. The second sorts blocks by what has to be known.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arguments import BlockVisibility, CandidateBlocks, Grid, MaskSpec, ModLike, Near
from .primitives import bit_or
from .visibility import allowed, at_head, listed_arguments, mod_arguments, sees_key

NOTHING = 2**30
"""First key of a row that sees none; its last is -1."""

WORDS = 4
"""Words of 32 key blocks that a program looks at: a long row's are spread over the GPU."""

LIST_WORDS = 64
"""Words that a program of the lists looks at together."""


@triton.jit
def _and(a, b):
    """Bits that are set in both, for reductions.

    Args:
        a: int32 of any shape.
        b: int32 of the same shape.
    """
    return a & b


@triton.jit
def _highest_bit(x):
    """Index of the highest set bit of an int32 that is not 0: the exponent of a float that can not round up to more.

    Args:
        x: int32 of any shape.
    """
    x = x.to(tl.uint32, bitcast=True)
    return ((x ^ (x & (x >> 1))).to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127


@triton.jit
def _structure_kernel(
    bounds_ptr, listed_ptr, listed_b, listed_h, listed_words, mask_aux, range_aux, visible_ptr, full_ptr, rows_ptr,
    q_len, kv_len, query_blocks, words, heads,
    CAUSAL: tl.constexpr, MASK: tl.constexpr, RANGE: tl.constexpr, LISTED_Q: tl.constexpr, LISTED_K: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """WORDS words of one query block of one head, and what they say of its rows' first and last key.

    Args:
        bounds_ptr: int32 ``[B, 3]`` = (q_offset, start, end).
        listed_ptr: The caller's block mask as bits, int32 ``[1 or B, 1 or Hs, nq', ceil(nk' / 32)]``; not read if
            LISTED_Q is 0.
        listed_b: Words of the caller's block mask from batch row to batch row; 0 if all share it.
        listed_h: Words of the caller's block mask from head to head; 0 if all share it.
        listed_words: Words a row of blocks of the caller's block mask.
        mask_aux: What the mask_mod reads.
        range_aux: What RANGE reads.
        visible_ptr: Result: bits of visible blocks, int32 ``[B, Hs, nq, ceil(nk / 32)]``, zeros before.
        full_ptr: Result: bits of full blocks, int32 ``[B, Hs, nq, ceil(nk / 32)]``, zeros before.
        rows_ptr: Result: first and last key that each row sees, int32 ``[B, Hs, 2, nq * BLOCK_Q]``, 2**30 and -1
            before.
        q_len: Sq.
        kv_len: Skv.
        query_blocks: nq.
        words: ``ceil(nk / 32)``.
        heads: Hs.
        CAUSAL: Whether a row sees keys up to its position only.
        MASK: The mask_mod, or None.
        RANGE: Function that gives the first and the last key that rows of a query block may see, or None.
        LISTED_Q: Query rows a block of the caller's block mask; 0 without one.
        LISTED_K: Keys a block of the caller's block mask.
        BLOCK_Q: Query rows a block.
        BLOCK_K: Keys a block.
        WORDS: Words a program.
    """
    query_block = tl.program_id(0) % query_blocks
    first_word = tl.program_id(0) // query_blocks * WORDS
    bh = tl.program_id(1)
    b = bh // heads
    h = bh % heads
    offset = tl.load(bounds_ptr + b * 3)
    start = tl.load(bounds_ptr + b * 3 + 1)
    end = tl.minimum(tl.load(bounds_ptr + b * 3 + 2), kv_len)
    listed_ptr = at_head(listed_ptr, b, h, listed_b, listed_h, LISTED_Q)

    first_row = query_block * BLOCK_Q
    last_row = tl.minimum(first_row + BLOCK_Q, q_len) - 1
    low = start
    high = end
    if CAUSAL:
        high = tl.minimum(high, offset + last_row + 1)
    if RANGE is not None:
        range_first, range_last = RANGE(b, h, first_row, last_row, range_aux)
        low = tl.maximum(low, range_first).to(tl.int32)
        high = tl.minimum(high, range_last + 1).to(tl.int32)
    low = low // BLOCK_K
    high = tl.cdiv(high, BLOCK_K)
    # Between these blocks only mask and block mask can hide anything.
    real = (offset + first_row >= start) & (offset + last_row < end) & (first_row + BLOCK_Q <= q_len)
    open_high = end // BLOCK_K
    if CAUSAL:
        open_high = tl.minimum(open_high, (offset + first_row + 1) // BLOCK_K)
    open_low = tl.cdiv(start, BLOCK_K)

    rows = first_row + tl.arange(0, BLOCK_Q)
    q = rows[:, None]
    column = tl.arange(0, BLOCK_K)[None, :]
    one = tl.full([1, 1], 1, tl.int32)
    first = tl.full([BLOCK_Q], 2**30, tl.int32)
    last = tl.full([BLOCK_Q], -1, tl.int32)
    at = (bh.to(tl.int64) * query_blocks + query_block) * words
    last_block = (kv_len - 1) // BLOCK_K
    low = tl.maximum(low, first_word * 32)
    high = tl.minimum(high, (first_word + WORDS) * 32)
    for word in range(low // 32, tl.where(low < high, tl.cdiv(high, 32), 0)):
        begin = tl.maximum(low, word * 32)
        stop = tl.minimum(high, word * 32 + 32)
        open_begin = tl.minimum(tl.maximum(open_low, begin), stop)
        open_stop = tl.where(real, tl.minimum(tl.maximum(open_high, open_begin), stop), open_begin)
        bits = tl.zeros([BLOCK_Q, BLOCK_K], tl.int32)
        for block in range(begin, open_begin):
            sees = sees_key(
                b, h, q, block * BLOCK_K + column, block * BLOCK_K, offset, start, end, q_len, kv_len,
                listed_ptr, listed_words, mask_aux, CAUSAL, MASK, LISTED_Q, LISTED_K, BLOCK_K,
            )  # fmt: skip
            bits = tl.where(sees, bits | (one << (block % 32)), bits)
        for block in range(open_begin, open_stop):
            sees = allowed(
                b, h, q, block * BLOCK_K + column, block * BLOCK_K, listed_ptr, listed_words, mask_aux,
                MASK, LISTED_Q, LISTED_K, BLOCK_K,
            )  # fmt: skip
            bits = tl.where(sees, bits | (one << (block % 32)), bits)
        for block in range(open_stop, stop):
            sees = sees_key(
                b, h, q, block * BLOCK_K + column, block * BLOCK_K, offset, start, end, q_len, kv_len,
                listed_ptr, listed_words, mask_aux, CAUSAL, MASK, LISTED_Q, LISTED_K, BLOCK_K,
            )  # fmt: skip
            bits = tl.where(sees, bits | (one << (block % 32)), bits)

        tl.store(visible_ptr + at + word, tl.reduce(tl.reduce(bits, 1, bit_or), 0, bit_or))
        # Elements outside the tensors do not keep a block from being full.
        behind = (last_block * BLOCK_K + column >= kv_len) & (last_block // 32 == word)
        filled = tl.where(q < q_len, bits | tl.where(behind, one << (last_block % 32), 0), -1)
        tl.store(full_ptr + at + word, tl.reduce(tl.reduce(filled, 1, _and), 0, _and))
        lowest = (word * 32 + _highest_bit(bits & -bits)) * BLOCK_K + column
        highest = (word * 32 + _highest_bit(bits)) * BLOCK_K + column
        first = tl.minimum(first, tl.min(tl.where(bits != 0, lowest, 2**30), axis=1))
        last = tl.maximum(last, tl.max(tl.where(bits != 0, highest, -1), axis=1))
    ends = rows_ptr + bh.to(tl.int64) * 2 * query_blocks * BLOCK_Q + rows
    tl.atomic_min(ends, first, mask=last >= 0, sem="relaxed")
    tl.atomic_max(ends + query_blocks * BLOCK_Q, last, mask=last >= 0, sem="relaxed")


@triton.jit
def _bits_below(count):
    """Words whose lowest `count` bits are set; a count below 0 is 0, above 32 is 32.

    Args:
        count: int32 of any shape.
    """
    one = count * 0 + 1
    return tl.where(count >= 32, -1, (one << tl.minimum(tl.maximum(count, 0), 31)) - 1)


@triton.jit
def _span(low, high, block, BLOCK_K: tl.constexpr):
    """Blocks that intervals of keys meet, as words, int32 ``[N, W]``. An interval whose ends cross is empty.

    Args:
        low: First keys, int32 ``[N, 1]``.
        high: Last keys, int32 ``[N, 1]``.
        block: First block of each word, int32 ``[1, W]``.
        BLOCK_K: Keys a block.
    """
    some = (low <= high) & (high >= 0)
    low = tl.where(some, tl.maximum(low, 0) // BLOCK_K, 0)
    high = tl.where(some, high // BLOCK_K + 1, 0)
    return _bits_below(high - block) & ~_bits_below(low - block)


@triton.jit
def _bit_count(x):
    """How many bits of an int32 are set.

    Args:
        x: int32 of any shape.
    """
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    x += x >> 8
    return (x + (x >> 16)) & 63


@triton.jit
def _lists_kernel(
    visible_ptr, full_ptr, rows_ptr, bounds_ptr, always_ptr, counts_ptr, lists_ptr,
    query_blocks, key_blocks, words, heads, sink_tokens, local_tokens, min_length,
    CAUSAL: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """Words, counts and lists of one query block of one head, WORDS words at a time.

    Args:
        visible_ptr: Bits of visible blocks, int32 ``[B, Hs, nq, ceil(nk / 32)]``.
        full_ptr: Bits of full blocks, int32 ``[B, Hs, nq, ceil(nk / 32)]``.
        rows_ptr: First and last key that each row sees, int32 ``[B, Hs, 2, nq * BLOCK_Q]``: 2**30 and -1 if it sees
            none.
        bounds_ptr: int32 ``[B, 3]`` = (q_offset, start, end).
        always_ptr: Result: bits of always-kept blocks, int32 ``[B, Hs, nq, ceil(nk / 32)]``.
        counts_ptr: Result: how many blocks are always kept, partial and whole candidates, int32 ``[B, Hs, nq, 3]``.
        lists_ptr: Result: blocks, int32 ``[B, Hs, nq, nk]``: always kept, partial, whole; what follows is not written.
        query_blocks: nq.
        key_blocks: nk.
        words: ``ceil(nk / 32)``.
        heads: Hs.
        sink_tokens: Keys from a row's first one on whose blocks are always kept.
        local_tokens: Keys up to a row's position (without CAUSAL, also from it on) whose blocks are always kept.
        min_length: Rows whose last key lies fewer than this many tokens after the first one keep all that lies between.
        CAUSAL: Whether local keys end at the row's position.
        BLOCK_Q: Query rows a block.
        BLOCK_K: Keys a block.
        WORDS: Words looked at together.
    """
    line = tl.program_id(0).to(tl.int64)  # (batch * heads + head) * query_blocks + query block
    query_block = (line % query_blocks).to(tl.int32)
    bh = line // query_blocks
    b = bh // heads
    offset = tl.load(bounds_ptr + b * 3)
    start = tl.load(bounds_ptr + b * 3 + 1)
    end = tl.load(bounds_ptr + b * 3 + 2)
    row = query_block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    ends = rows_ptr + bh * 2 * query_blocks * BLOCK_Q + row
    first = tl.load(ends)
    last = tl.load(ends + query_blocks * BLOCK_Q)
    sees = last >= 0
    position = offset + row
    # Intervals of rows that see nothing cross.
    early_high = tl.where(last - first < min_length, last, -1)
    first_high = tl.maximum(tl.where(sees, first + sink_tokens - 1, -1), early_high)[:, None]
    first = first[:, None]
    local_low = tl.where(sees, position - local_tokens + 1, 2**30)[:, None]
    local_high = (position if CAUSAL else position + local_tokens - 1)[:, None]
    whole_low = tl.cdiv(start, BLOCK_K)
    whole_high = end // BLOCK_K

    visible_ptr += line * words
    full_ptr += line * words
    always_ptr += line * words
    always_count = 0
    partial_count = 0
    whole_count = 0
    for word in range(0, words, WORDS):
        word_at = word + tl.arange(0, WORDS)
        mask = word_at < words
        visible = tl.load(visible_ptr + word_at, mask=mask, other=0)
        full = tl.load(full_ptr + word_at, mask=mask, other=0)
        block = word_at * 32
        near = _span(first, first_high, block[None, :], BLOCK_K) | _span(local_low, local_high, block[None, :], BLOCK_K)
        always = tl.reduce(near, 0, bit_or) & visible
        whole = visible & ~always & full & _bits_below(whole_high - block) & ~_bits_below(whole_low - block)
        tl.store(always_ptr + word_at, always, mask=mask)
        always_count += tl.sum(_bit_count(always))
        whole_count += tl.sum(_bit_count(whole))
        partial_count += tl.sum(_bit_count(visible & ~always & ~whole))
    tl.store(counts_ptr + line * 3, always_count)
    tl.store(counts_ptr + line * 3 + 1, partial_count)
    tl.store(counts_ptr + line * 3 + 2, whole_count)

    tl.debug_barrier()
    always_at = lists_ptr + line * key_blocks
    partial_at = always_at + always_count
    whole_at = partial_at + partial_count
    bit = tl.arange(0, 32)[None, :]
    before = _bits_below(bit)
    for word in range(0, words, WORDS):
        word_at = word + tl.arange(0, WORDS)
        mask = word_at < words
        visible = tl.load(visible_ptr + word_at, mask=mask, other=0)
        if tl.max((visible != 0).to(tl.int32)) > 0:
            always = tl.load(always_ptr + word_at, mask=mask, other=0)
            full = tl.load(full_ptr + word_at, mask=mask, other=0)
            block = word_at * 32
            whole = visible & ~always & full & _bits_below(whole_high - block) & ~_bits_below(whole_low - block)
            partial = visible & ~always & ~whole
            # One running sum serves all lists: words together have fewer than 2**20 blocks.
            always_number = _bit_count(always).to(tl.int64)
            partial_number = _bit_count(partial).to(tl.int64)
            whole_number = _bit_count(whole).to(tl.int64)
            numbers = always_number + (partial_number << 20) + (whole_number << 40)
            slots = tl.cumsum(numbers, 0) - numbers  # of each word's first
            in_always = ((always[:, None] >> bit) & 1) == 1
            in_partial = ((partial[:, None] >> bit) & 1) == 1
            kind = tl.where(in_always, always[:, None], tl.where(in_partial, partial[:, None], whole[:, None]))
            slot = tl.where(in_always, slots[:, None], tl.where(in_partial, slots[:, None] >> 20, slots[:, None] >> 40))
            slot = (slot & (2**20 - 1)).to(tl.int32) + _bit_count(kind & before)
            list_at = tl.where(in_always, always_at, tl.where(in_partial, partial_at, whole_at))
            tl.store(list_at + slot, block[:, None] + bit, mask=((visible[:, None] >> bit) & 1) == 1)
            always_at += tl.sum(always_number)
            partial_at += tl.sum(partial_number)
            whole_at += tl.sum(whole_number)


def block_structure(spec: MaskSpec, key_range: ModLike, heads: int, grid: Grid) -> BlockVisibility:
    """Bits of visible and of full blocks, and the first and the last key that every row sees.

    Args:
        spec: Who sees whom; its mask is the mask_mod as jit function and what it reads, or None.
        key_range: A function of the first and the last row of a query block, in the same form, that gives the first and
            the last key that one of them may see, or None. A promise: other keys are not looked at.
        heads: Hs: 1 if all heads see the same, or Hq.
        grid: Lengths and blocks.

    Returns:
        Bit ``j % 32`` of word ``j // 32`` is key block j, and elements outside the tensors do not keep a block from
        being full.
    """
    batch, query_blocks, words = spec.bounds.shape[0], grid.query_blocks, grid.words
    visible, full = (spec.bounds.new_zeros(batch, heads, query_blocks, words) for _ in range(2))
    rows = spec.bounds.new_full((batch, heads, 2, query_blocks * grid.block_q), -1)
    rows[:, :, 0] = NOTHING
    listed, listed_b, listed_h, listed_words = listed_arguments(spec)
    mask_function, mask_aux = mod_arguments(spec.mask)
    range_function, range_aux = mod_arguments(key_range)
    _structure_kernel[(query_blocks * triton.cdiv(words, WORDS), batch * heads)](
        spec.bounds, listed, listed_b, listed_h, listed_words, mask_aux, range_aux, visible, full, rows,
        grid.q_len, grid.kv_len, query_blocks, words, heads,
        CAUSAL=spec.causal, MASK=mask_function, RANGE=range_function,
        LISTED_Q=0 if spec.listed is None else spec.listed_q, LISTED_K=spec.listed_k,
        BLOCK_Q=grid.block_q, BLOCK_K=grid.block_k, WORDS=WORDS,
        num_warps=min(16, grid.block_q * grid.block_k // 512), maxnreg=128,
    )  # fmt: skip
    return BlockVisibility(visible, full, rows)


def candidate_blocks(
    visibility: BlockVisibility, bounds: Tensor, causal: bool, grid: Grid, near: Near
) -> CandidateBlocks:
    """Blocks that are always kept, and every query block's list: partial candidates have to be weighed by element.

    Args:
        visibility: From `block_structure`.
        bounds: int32 ``[B, 3]``.
        causal: Whether local keys end at the row.
        grid: Lengths and blocks.
        near: Which blocks are always kept.
    """
    visible = visibility.visible
    batch, heads, query_blocks, words = visible.shape
    always = torch.empty_like(visible)
    counts = visible.new_empty(batch, heads, query_blocks, 3)
    lists = visible.new_empty(batch, heads, query_blocks, grid.key_blocks)
    _lists_kernel[(batch * heads * query_blocks,)](
        *visibility, bounds, always, counts, lists, query_blocks, grid.key_blocks, words, heads, *near,
        CAUSAL=causal, BLOCK_Q=grid.block_q, BLOCK_K=grid.block_k,
        WORDS=min(LIST_WORDS, max(4, triton.next_power_of_2(words))), num_warps=4,
    )  # fmt: skip
    return CandidateBlocks(always, counts, lists)
