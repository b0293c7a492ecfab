# SPDX-License-Identifier: BSD-3-Clause
"""Kept bits as the flat table that a mask_mod looks blocks up in.

Entry point: `kept_table`. A copy, and five numbers that say how to index it: one launch instead of one per number.
"""

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _kept_table_kernel(
    kept_ptr, table_ptr, layout_ptr, words, table_words, stride_b, stride_h, stride_q,
    LOG_Q: tl.constexpr, LOG_K: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Copy CHUNK words, zeros past the last one; the first program also writes the layout.

    Args:
        kept_ptr: Kept bits, int32 ``[words]``.
        table_ptr: Result: the table, int32 ``[table_words]``.
        layout_ptr: Result: int32 ``[5]``: the three strides, LOG_Q and LOG_K.
        words: Words of the kept bits.
        table_words: Words of the table.
        stride_b: Words from batch row to batch row of the kept bits; 0 if all share them.
        stride_h: Words from head to head of the kept bits; 0 if all share them.
        stride_q: Words from query block to query block of the kept bits; 0 if there is one.
        LOG_Q: log2 of the query rows a block.
        LOG_K: log2 of the keys a block.
        CHUNK: Words a program.
    """
    at = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    tl.store(table_ptr + at, tl.load(kept_ptr + at, mask=at < words, other=0), mask=at < table_words)
    if tl.program_id(0) == 0:
        tl.store(layout_ptr, stride_b)
        tl.store(layout_ptr + 1, stride_h)
        tl.store(layout_ptr + 2, stride_q)
        tl.store(layout_ptr + 3, LOG_Q)
        tl.store(layout_ptr + 4, LOG_K)


def kept_table(kept: Tensor, block_q: int, block_k: int, table_words: int) -> tuple[Tensor, Tensor]:
    """Kept bits as a flat table, and how to find a block in it.

    Args:
        kept: int32 ``[1 | B, 1 | Hq, nq, ceil(nk / 32)]``, contiguous, fewer than 2**31 words.
        block_q: Query rows a block, a power of two.
        block_k: Keys a block, a power of two.
        table_words: Length of the table, at least the words of `kept`.

    Returns:
        int32 ``[table_words]``, and int32 ``[5]``: strides of batch row, head and query block (0 where there is one for
        all), log2 of `block_q` and of `block_k`.
    """
    table = kept.new_empty(table_words)
    layout = kept.new_empty(5)
    chunk = 4096
    strides = [0 if size == 1 else stride for size, stride in zip(kept.shape[:3], kept.stride())]
    _kept_table_kernel[(triton.cdiv(table_words, chunk),)](
        kept, table, layout, kept.numel(), table_words, *strides,
        LOG_Q=block_q.bit_length() - 1, LOG_K=block_k.bit_length() - 1, CHUNK=chunk, num_warps=4,
    )  # fmt: skip
    return table, layout
