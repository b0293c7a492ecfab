# SPDX-License-Identifier: BSD-3-Clause
"""From hit bits of a programmed call to the index lists of a BlockMask.

Entry point: `listed_compact`. As in `compact`, a program takes one query block of one head and appends ascending
indices to the partial or the full list; what is visible, full and always kept comes as bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _listed_compact_kernel(
    hits_ptr, nonfinite_ptr, visible_ptr, full_ptr, always_ptr,
    kept_ptr, partial_num_ptr, full_num_ptr, lists_ptr, dropped_ptr,
    query_blocks, words, partial_width, full_width,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, STRUCTURE_HEADS: tl.constexpr, HAS_NONFINITE: tl.constexpr,
    WANT_KEPT: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Kept bits and index lists of one query block.

    Args:
        hits_ptr: Bits of a rule's hits, int32 ``[B, Hq, nq, ceil(nk / 32)]``.
        nonfinite_ptr: Bits of blocks with a value that is not finite, int32 ``[B, Hkv, ceil(nk / 32)]``; not read
            unless HAS_NONFINITE.
        visible_ptr: Bits of visible blocks, int32 ``[B, Hs, nq, ceil(nk / 32)]``.
        full_ptr: Bits of full blocks, int32 ``[B, Hs, nq, ceil(nk / 32)]``.
        always_ptr: Bits of always-kept blocks, int32 ``[B, Hs, nq, ceil(nk / 32)]``.
        kept_ptr: Result: bits of kept blocks, int32 ``[B, Hq, nq, ceil(nk / 32)]``; not written unless WANT_KEPT.
        partial_num_ptr: Result: how many partial blocks are listed, int32 ``[B, Hq, nq]``.
        full_num_ptr: Result: how many full blocks are listed, int32 ``[B, Hq, nq]``.
        lists_ptr: Result: indices of partial blocks, then of full ones, int32
            ``[B, Hq, nq, partial_width + full_width]``.
        dropped_ptr: Result: how many kept blocks found no room, int32 ``[B, Hq, nq]``.
        query_blocks: nq.
        words: ``ceil(nk / 32)``.
        partial_width: Room for partial blocks, in blocks.
        full_width: Room for full blocks, in blocks.
        HEADS: Hq.
        KV_HEADS: Hkv.
        STRUCTURE_HEADS: Hs: 1 if all heads see the same, or Hq.
        HAS_NONFINITE: Whether `nonfinite_ptr` is there.
        WANT_KEPT: Whether the kept bits are wanted.
        CHUNK: Key blocks looked at together.
    """
    row = tl.program_id(0).to(tl.int64)  # (batch * HEADS + head) * query_blocks + query block
    bh = row // query_blocks
    batch = bh // HEADS
    head = bh % HEADS
    kv_head = batch * KV_HEADS + head // (HEADS // KV_HEADS)
    shared = batch * STRUCTURE_HEADS + (head if STRUCTURE_HEADS > 1 else 0)
    line = (shared * query_blocks + row % query_blocks) * words
    partial_count = 0
    full_count = 0
    partial_ptr = lists_ptr + row * (partial_width + full_width)
    full_ptr_out = partial_ptr + partial_width
    for word in range(0, words, CHUNK // 32):
        word_at = word + tl.arange(0, CHUNK // 32)
        mask = word_at < words
        bits = tl.load(hits_ptr + row * words + word_at, mask=mask, other=0)
        bits |= tl.load(always_ptr + line + word_at, mask=mask, other=0)
        if HAS_NONFINITE:
            bits |= tl.load(nonfinite_ptr + kv_head * words + word_at, mask=mask, other=0)
        bits &= tl.load(visible_ptr + line + word_at, mask=mask, other=0)
        if WANT_KEPT:
            tl.store(kept_ptr + row * words + word_at, bits, mask=mask)
        full_bits = bits & tl.load(full_ptr + line + word_at, mask=mask, other=0)

        bit_of = tl.arange(0, 32)[None, :]
        block = tl.reshape(word_at[:, None] * 32 + bit_of, [CHUNK])
        full = tl.reshape((full_bits[:, None] >> bit_of) & 1, [CHUNK])
        partial = tl.reshape((bits[:, None] >> bit_of) & 1, [CHUNK]) - full
        # One running sum serves both lists: a chunk has fewer than 2**15 blocks.
        both = tl.cumsum(full + (partial << 16), 0)
        full_at = full_count + (both & 0xFFFF) - full
        partial_at = partial_count + (both >> 16) - partial
        tl.store(full_ptr_out + full_at, block, mask=(full == 1) & (full_at < full_width))
        tl.store(partial_ptr + partial_at, block, mask=(partial == 1) & (partial_at < partial_width))
        full_count += tl.sum(full, 0)
        partial_count += tl.sum(partial, 0)
    full_num = tl.minimum(full_count, full_width)
    partial_num = tl.minimum(partial_count, partial_width)
    tl.store(full_num_ptr + row, full_num)
    tl.store(partial_num_ptr + row, partial_num)
    tl.store(dropped_ptr + row, full_count - full_num + partial_count - partial_num)


def listed_compact(
    hits: Tensor,
    nonfinite_values: Tensor | None,
    visible: Tensor,
    full: Tensor,
    always: Tensor,
    kv_heads: int,
    partial_width: int,
    full_width: int,
    key_blocks: int,
    want_kept: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Kept bits and the lists of partial and full blocks.

    Args:
        hits: int32 ``[B, Hq, nq, ceil(nk / 32)]`` from a rule.
        nonfinite_values: int32 ``[B, Hkv, ceil(nk / 32)]`` from `nonfinite_blocks`, or None.
        visible: int32 ``[B, 1 or Hq, nq, ceil(nk / 32)]`` from `block_structure`.
        full: int32 ``[B, 1 or Hq, nq, ceil(nk / 32)]`` from `block_structure`.
        always: int32 ``[B, 1 or Hq, nq, ceil(nk / 32)]`` from `block_lists`.
        kv_heads: Hkv.
        partial_width: Room for partial blocks, in blocks; what finds none is left out.
        full_width: Room for full blocks.
        key_blocks: nk.
        want_kept: Whether the kept bits are wanted.

    Returns:
        Kept bits int32 as `hits`, or none; counts of partial and of full blocks, int32 ``[B, Hq, nq]``; int32
        ``[B, Hq, nq, partial_width + full_width]``: ascending indices of the partial blocks, then of the full ones,
        entries past the counts not written; and int32 ``[B, Hq, nq]``: kept blocks that found no room.
    """
    batch, heads, query_blocks, words = hits.shape
    kept = torch.empty_like(hits) if want_kept else hits.new_empty(0)
    partial_num, full_num, dropped = (hits.new_empty(batch, heads, query_blocks) for _ in range(3))
    lists = hits.new_empty(batch, heads, query_blocks, partial_width + full_width)
    _listed_compact_kernel[(batch * heads * query_blocks,)](
        hits, nonfinite_values, visible, full, always, kept, partial_num, full_num, lists, dropped,
        query_blocks, words, partial_width, full_width,
        HEADS=heads, KV_HEADS=kv_heads, STRUCTURE_HEADS=visible.shape[1],
        HAS_NONFINITE=nonfinite_values is not None, WANT_KEPT=want_kept,
        CHUNK=min(256, max(64, triton.next_power_of_2(key_blocks))), num_warps=1,
    )  # fmt: skip
    return kept, partial_num, full_num, lists, dropped
