# SPDX-License-Identifier: BSD-3-Clause
"""From hit bits to the index lists of a BlockMask.

Entry point: `build_lists`. A program takes one query block of one head, walks its key blocks in chunks, adds what is
always kept, drops what no row sees, and appends the ascending indices to the partial or the full list. Under mods, what
is visible, full and always kept comes as bits; in plain causal attention it is reckoned from positions, with the
arithmetic of `sale_flex.blocks.geometry`, which the tests compare it with.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arguments import BlockVisibility, Grid, Near
from .primitives import is_finite


@triton.jit
def _flags(words, bit_of):
    """Bits of words, int1 ``[N, 32]``.

    Args:
        words: int32 ``[N]``.
        bit_of: 0 to 31, int32 ``[32]``.
    """
    return ((words[:, None] >> bit_of[None, :]) & 1) == 1


@triton.jit
def _build_lists_kernel(
    hits_ptr, nonfinite_ptr, bounds_ptr, visible_ptr, whole_ptr, always_ptr,
    kept_ptr, partial_num_ptr, full_num_ptr, lists_ptr, overflow_ptr,
    q_len, kv_len, query_blocks, key_blocks, words, sink_tokens, local_tokens, min_length, partial_width, full_width,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    STRUCTURE_HEADS: tl.constexpr, HAS_NONFINITE: tl.constexpr, WANT_KEPT: tl.constexpr, LEAVE_EARLY: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """Kept bits and index lists of one query block.

    Args:
        hits_ptr: Bits of a rule's hits, int32 ``[B, Hq, nq, ceil(nk / 32)]``.
        nonfinite_ptr: Bits of blocks with a value that is not finite, int32 ``[B, Hkv, ceil(nk / 32)]``; not read
            unless HAS_NONFINITE.
        bounds_ptr: int32 ``[B, 3]`` = (q_offset, start, end).
        visible_ptr: Bits of visible blocks, int32 ``[B, Hs, nq, ceil(nk / 32)]``; not read if STRUCTURE_HEADS is 0,
            nor are the next two.
        whole_ptr: Bits of full blocks, int32 ``[B, Hs, nq, ceil(nk / 32)]``.
        always_ptr: Bits of always-kept blocks, int32 ``[B, Hs, nq, ceil(nk / 32)]``.
        kept_ptr: Result: bits of kept blocks, int32 ``[B, Hq, nq, ceil(nk / 32)]``; not written unless WANT_KEPT.
        partial_num_ptr: Result: how many partial blocks are listed, int32 ``[B, Hq, nq]``.
        full_num_ptr: Result: how many full blocks are listed, int32 ``[B, Hq, nq]``.
        lists_ptr: Result: indices of partial blocks, then of full ones, int32
            ``[B, Hq, nq, partial_width + full_width]``.
        overflow_ptr: Result: how many kept blocks found no room, int32 ``[B, Hq, nq]``.
        q_len: Sq.
        kv_len: Skv.
        query_blocks: nq.
        key_blocks: nk.
        words: ``ceil(nk / 32)``.
        sink_tokens: First valid keys whose blocks are always kept.
        local_tokens: Keys up to each row's position whose blocks are always kept.
        min_length: Query blocks with a row fewer than this many tokens after the first valid key are early: they keep
            all they see.
        partial_width: Room for partial blocks, in blocks.
        full_width: Room for full blocks, in blocks.
        HEADS: Hq.
        KV_HEADS: Hkv.
        BLOCK_Q: Query rows a block.
        BLOCK_K: Keys a block.
        STRUCTURE_HEADS: Hs: 1 if all heads see the same, or Hq; 0 in plain causal attention.
        HAS_NONFINITE: Whether `nonfinite_ptr` is there.
        WANT_KEPT: Whether the kept bits are wanted.
        LEAVE_EARLY: Whether early query blocks keep nothing instead of everything.
        CHUNK: Key blocks looked at together.
    """
    row = tl.program_id(0).to(tl.int64)  # (batch * HEADS + head) * query_blocks + query block
    query_block = (row % query_blocks).to(tl.int32)
    bh = row // query_blocks
    batch = bh // HEADS
    kv_head = batch * KV_HEADS + (bh % HEADS) // (HEADS // KV_HEADS)
    offset = tl.load(bounds_ptr + batch * 3)
    start = tl.load(bounds_ptr + batch * 3 + 1)
    end = tl.load(bounds_ptr + batch * 3 + 2)

    first = offset + query_block * BLOCK_Q
    last = offset + tl.minimum((query_block + 1) * BLOCK_Q, q_len) - 1
    low = tl.maximum(first, start)  # first and last position that is no padding
    high = tl.minimum(last, end - 1)
    early = low - start < min_length
    # Bits of what mods show: of the head's own line, or of the one line of all heads.
    shared = batch if STRUCTURE_HEADS == 1 else bh
    line = (shared * query_blocks + query_block) * words

    partial_count = 0
    full_count = 0
    partial_ptr = lists_ptr + row * (partial_width + full_width)
    full_ptr = partial_ptr + partial_width
    bit_of = tl.arange(0, 32)
    for word in range(0, words, CHUNK // 32):
        word_at = word + tl.arange(0, CHUNK // 32)
        bits = tl.load(hits_ptr + row * words + word_at, mask=word_at < words, other=0)
        if HAS_NONFINITE:
            bits |= tl.load(nonfinite_ptr + kv_head * words + word_at, mask=word_at < words, other=0)
        block = word_at[:, None] * 32 + bit_of[None, :]  # [CHUNK / 32, 32]
        key_first = block * BLOCK_K
        key_next = key_first + BLOCK_K
        hit = _flags(bits, bit_of)
        if STRUCTURE_HEADS > 0:
            there = word_at < words
            visible = _flags(tl.load(visible_ptr + line + word_at, mask=there, other=0), bit_of)
            always = _flags(tl.load(always_ptr + line + word_at, mask=there, other=0), bit_of)
            full = _flags(tl.load(whole_ptr + line + word_at, mask=there, other=0), bit_of)
        else:
            visible = (key_first <= high) & (key_next > start) & (low <= high) & (block < key_blocks)
            sink = tl.maximum(key_first, start) < start + sink_tokens
            always = sink | (key_next > low - local_tokens + 1) | early
            full = (key_first >= start) & (tl.minimum(key_next, kv_len) - 1 <= first) & (last < end)
        kept = (always | hit) & visible
        if LEAVE_EARLY:
            kept = kept & (early == 0)
        if WANT_KEPT:
            packed = tl.sum(kept.to(tl.int32) << bit_of[None, :], axis=1)
            tl.store(kept_ptr + row * words + word_at, packed, mask=word_at < words)

        block = tl.reshape(block, [CHUNK])
        full = tl.reshape(kept & full, [CHUNK]).to(tl.int32)
        partial = tl.reshape(kept, [CHUNK]).to(tl.int32) - full
        # One running sum serves both lists: a chunk has fewer than 2**15 blocks.
        both = tl.cumsum(full + (partial << 16), 0)
        full_at = full_count + (both & 0xFFFF) - full
        partial_at = partial_count + (both >> 16) - partial
        tl.store(full_ptr + full_at, block, mask=(full == 1) & (full_at < full_width))
        tl.store(partial_ptr + partial_at, block, mask=(partial == 1) & (partial_at < partial_width))
        full_count += tl.sum(full, 0)
        partial_count += tl.sum(partial, 0)
    full_room = tl.minimum(full_count, full_width)
    partial_room = tl.minimum(partial_count, partial_width)
    tl.store(full_num_ptr + row, full_room)
    tl.store(partial_num_ptr + row, partial_room)
    tl.store(overflow_ptr + row, full_count - full_room + partial_count - partial_room)


@triton.jit
def _nonfinite_blocks_kernel(
    value_ptr, stride_b, stride_h, stride_s, stride_d, bounds_ptr, flags_ptr, words,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One word of 32 blocks' flags of one head.

    Args:
        value_ptr: Values ``[B, Hkv, Skv, D]``.
        stride_b: From batch row to batch row.
        stride_h: From head to head.
        stride_s: From key to key.
        stride_d: From channel to channel.
        bounds_ptr: int32 ``[B, 3]`` = (q_offset, start, end).
        flags_ptr: Result, int32 ``[B, Hkv, ceil(nk / 32)]``.
        words: ``ceil(nk / 32)``.
        HEADS: Hkv.
        D: Channels.
        BLOCK_D: Channels, rounded up to a power of two.
        BLOCK_K: Keys a block.
    """
    word = tl.program_id(0)
    bh = tl.program_id(1).to(tl.int64)
    batch = bh // HEADS
    start = tl.load(bounds_ptr + batch * 3 + 1)
    end = tl.load(bounds_ptr + batch * 3 + 2)
    value_ptr += batch * stride_b + (bh % HEADS) * stride_h
    offsets_d = tl.arange(0, BLOCK_D)
    bits = 0
    for block in range(0, 32):
        at = (word * 32 + block) * BLOCK_K + tl.arange(0, BLOCK_K)
        mask = ((at >= start) & (at < end))[:, None] & (offsets_d < D)[None, :]
        pointers = value_ptr + at.to(tl.int64)[:, None] * stride_s + offsets_d[None, :] * stride_d
        value = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
        bits |= tl.max((is_finite(value) == 0).to(tl.int32)) << block
    tl.store(flags_ptr + bh * words + word, bits)


def nonfinite_blocks(value: Tensor, bounds: Tensor, block_k: int) -> Tensor:
    """Key blocks with a valid value that is not finite: bits, int32 ``[B, Hkv, ceil(nk / 32)]``."""
    batch, heads, kv_len, dim = value.shape
    words = triton.cdiv(triton.cdiv(kv_len, block_k), 32)
    flags = value.new_empty(batch, heads, words, dtype=torch.int32)
    _nonfinite_blocks_kernel[(words, batch * heads)](
        value, *value.stride(), bounds, flags, words,
        HEADS=heads, D=dim, BLOCK_D=triton.next_power_of_2(dim), BLOCK_K=block_k, num_warps=8,
    )  # fmt: skip
    return flags


def build_lists(
    hits: Tensor,
    nonfinite: Tensor | None,
    bounds: Tensor,
    visibility: BlockVisibility | None,
    always: Tensor | None,
    kv_heads: int,
    grid: Grid,
    near: Near,
    partial_width: int,
    full_width: int,
    want_kept: bool,
    leave_early: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Kept bits and the lists of partial and full blocks.

    Args:
        hits: int32 ``[B, Hq, nq, ceil(nk / 32)]`` from a rule.
        nonfinite: int32 ``[B, Hkv, ceil(nk / 32)]`` from `nonfinite_blocks`, or None.
        bounds: int32 ``[B, 3]``.
        visibility: From `block_structure`; None in plain causal attention.
        always: Always-kept blocks, from `candidate_blocks`; None with `visibility`.
        kv_heads: Hkv.
        grid: Lengths and blocks.
        near: Which blocks are always kept; without `visibility`.
        partial_width: Room for partial blocks, in blocks; what finds none is left out.
        full_width: Room for full blocks.
        want_kept: Whether the kept bits are wanted.
        leave_early: Whether query blocks that `near.min_length` is about keep nothing instead of everything; without
            `visibility`.

    Returns:
        Kept bits int32 as `hits`, or none; counts of partial and of full blocks, int32 ``[B, Hq, nq]``; int32
        ``[B, Hq, nq, partial_width + full_width]``: indices of the partial blocks, then of the full ones; and int32
        ``[B, Hq, nq]``: how many kept blocks found no room. Indices ascend; entries past the count are not written.
    """
    batch, heads, query_blocks, words = hits.shape
    kept = torch.empty_like(hits) if want_kept else hits.new_empty(0)
    partial_num, full_num, overflow = (hits.new_empty(batch, heads, query_blocks) for _ in range(3))
    lists = hits.new_empty(batch, heads, query_blocks, partial_width + full_width)
    visible, full = (None, None) if visibility is None else (visibility.visible, visibility.full)
    _build_lists_kernel[(batch * heads * query_blocks,)](
        hits, nonfinite, bounds, visible, full, always, kept, partial_num, full_num, lists, overflow,
        grid.q_len, grid.kv_len, query_blocks, grid.key_blocks, words, *near, partial_width, full_width,
        HEADS=heads, KV_HEADS=kv_heads, BLOCK_Q=grid.block_q, BLOCK_K=grid.block_k,
        STRUCTURE_HEADS=0 if visible is None else visible.shape[1], HAS_NONFINITE=nonfinite is not None,
        WANT_KEPT=want_kept, LEAVE_EARLY=leave_early and visible is None,
        CHUNK=min(256, max(64, triton.next_power_of_2(grid.key_blocks))), num_warps=1,
    )  # fmt: skip
    return kept, partial_num, full_num, lists, overflow
