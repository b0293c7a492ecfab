# SPDX-License-Identifier: BSD-3-Clause
"""The full-resolution scan: which key blocks hold an element that reaches its row's limit (SALE section 3.2).

Entry point: `scan_max`. A program takes BLOCK_M query rows of one head, multiplies their codes with the codes of all
keys before the rows' local window on the int8 matrix units, and compares each block's largest product, times the
block's key scale, with the row's limit. A compare yields a bit; the bits of 32 blocks gather in one word per row and
thread before anything crosses a warp. Programs with the longest rows start first.

Nothing is masked: rows and keys are padded to whole tiles, and every block that a mask could cut (the diagonal, the
ragged end) is always kept, so its bit is never read. The one exception is a first valid key inside a block.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arguments import Grid, MaskSpec, ModLike, Structure
from .masked_relative import masked_scan
from .primitives import bit_or


@triton.jit
def _block_max(product, BLOCKS: tl.constexpr, BLOCK_K: tl.constexpr):
    """Largest product of each block in each of 4 interleaved sets of columns, ``[BLOCK_M, BLOCKS, 4]``.

    The accumulator of a matrix instruction spreads 8 neighbouring columns over 4 threads, 2 each. Keeping those 4 apart
    leaves a maximum inside one thread, and one reduction over all of its columns lets the compiler take three at once.

    Args:
        product: Products of codes, int32 ``[BLOCK_M, BLOCKS * BLOCK_K]``.
        BLOCKS: Key blocks.
        BLOCK_K: Keys a block.
    """
    rows: tl.constexpr = product.shape[0]
    tiles = tl.reshape(product, [rows, BLOCKS, BLOCK_K // 8, 4, 2])
    tiles = tl.permute(tiles, (0, 1, 3, 2, 4))
    return tl.max(tl.reshape(tiles, [rows, BLOCKS, 4, BLOCK_K // 4]), axis=3)


@triton.jit
def _reaches(product, scale_ptr, group, limit, BLOCKS: tl.constexpr, BLOCK_K: tl.constexpr):
    """Whether a block's largest product, times its key scale, reaches the row's limit: int1 ``[BLOCK_M, BLOCKS, 4]``.

    Negated, so that a NaN on either side hits. Groups before the first hold no keys: their bits mean nothing.

    Args:
        product: Products of codes, int32 ``[BLOCK_M, BLOCKS * BLOCK_K]``.
        scale_ptr: Scales of the KV head's groups of keys, float32 ``[R' / BLOCK_K]``.
        group: Group of each block, int32 ``[BLOCKS]``.
        limit: Limits of the rows, float32 ``[BLOCK_M]``.
        BLOCKS: Key blocks.
        BLOCK_K: Keys a block.
    """
    scale = tl.load(scale_ptr + tl.maximum(group, 0))
    best = _block_max(product, BLOCKS, BLOCK_K).to(tl.float32)
    return (best * scale[None, :, None] < limit[:, None, None]) == 0


@triton.jit
def _scan_max_kernel(
    query_codes_ptr, limit_ptr, key_codes_ptr, key_scale_ptr, bounds_ptr, hits_ptr,
    q_len, query_rows, key_rows, query_blocks, words, local_tokens,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    FROM_ZERO: tl.constexpr,
):  # fmt: skip
    """Hit bits of BLOCK_M / BLOCK_Q query blocks of one head.

    Args:
        query_codes_ptr: Codes of the queries, int8 ``[B, Hq, R, D]``.
        limit_ptr: What a product times its key scale must reach, float32 ``[B, Hq, R]``.
        key_codes_ptr: Codes of the smoothed keys, int8 ``[B, Hkv, R', D]``.
        key_scale_ptr: Scales of the keys' codes, float32 ``[B, Hkv, R' / BLOCK_K]``: a group's, counted from the first
            valid key.
        bounds_ptr: int32 ``[B, 3]`` = (q_offset, start, end).
        hits_ptr: Result: bits, int32 ``[B, Hq, nq, ceil(nk / 32)]``, zeros before.
        q_len: Sq.
        query_rows: R: query rows, padded.
        key_rows: R': keys, padded.
        query_blocks: nq.
        words: ``ceil(nk / 32)``.
        local_tokens: Keys up to a row's position whose blocks are not scanned.
        HEADS: Hq.
        KV_HEADS: Hkv.
        D: Channels.
        BLOCK_D: Channels, rounded up to a power of two.
        BLOCK_Q: Query rows a block.
        BLOCK_K: Keys a block.
        BLOCK_M: Query rows a program.
        BLOCK_N: Keys a step.
        FROM_ZERO: Whether every batch row's first valid key is key 0.
    """
    BLOCKS: tl.constexpr = BLOCK_N // BLOCK_K  # key blocks a step
    STEPS: tl.constexpr = 32 // BLOCKS  # steps a word
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    bh = tl.program_id(1).to(tl.int64)
    batch = bh // HEADS
    kv_head = batch * KV_HEADS + (bh % HEADS) // (HEADS // KV_HEADS)
    offset = tl.load(bounds_ptr + batch * 3)
    if FROM_ZERO:
        start = 0
    else:
        start = tl.load(bounds_ptr + batch * 3 + 1)
    end = tl.load(bounds_ptr + batch * 3 + 2)

    # Blocks from `stop` on touch the local window of the tile's last query block: kept without a look.
    first_row = offset + tile * BLOCK_M
    last_block = tl.minimum(first_row + BLOCK_M - BLOCK_Q, offset + q_len - 1)
    stop = tl.maximum(tl.maximum(last_block, start) - local_tokens + 1, 0) // BLOCK_K
    real = (first_row + BLOCK_M > start) & (first_row < end)
    stop = tl.where(real, tl.minimum(stop, tl.cdiv(end, BLOCK_K)), 0)

    rows = (tile * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    offsets_d = tl.arange(0, BLOCK_D)
    offsets_n = tl.arange(0, BLOCK_N)
    d_mask = (offsets_d < D)[None, :]
    query_pointers = query_codes_ptr + (bh * query_rows + rows)[:, None] * D + offsets_d[None, :]
    query = tl.load(query_pointers, mask=d_mask, other=0)  # [BLOCK_M, BLOCK_D]
    limit = tl.load(limit_ptr + bh * query_rows + rows)
    key_pointers = key_codes_ptr + (kv_head * key_rows + offsets_n)[:, None] * D + offsets_d[None, :]
    key_scale_ptr += kv_head * (key_rows // BLOCK_K)
    query_block = tile * (BLOCK_M // BLOCK_Q) + tl.arange(0, BLOCK_M // BLOCK_Q)
    hits_pointers = hits_ptr + (bh * query_blocks + query_block) * words
    in_step = tl.arange(0, BLOCKS)

    start_block = start // BLOCK_K
    cut = start % BLOCK_K
    first = start_block // 32 * 32
    steps = tl.cdiv(stop - first, BLOCKS)
    bits = tl.zeros([BLOCK_M, BLOCKS, 4], tl.int32)
    # One loop, not one per word: the pipeline of key loads never drains between words.
    for step in range(0, steps):
        block = first + step * BLOCKS
        pointers = key_pointers + block.to(tl.int64) * (BLOCK_K * D)
        if D == BLOCK_D:
            key = tl.load(pointers)  # [BLOCK_N, BLOCK_D]
        else:
            key = tl.load(pointers, mask=d_mask, other=0)
        product = tl.dot(query, tl.trans(key), out_dtype=tl.int32)
        group = block + in_step - start_block
        if FROM_ZERO:
            hit = _reaches(product, key_scale_ptr, group, limit, BLOCKS, BLOCK_K)
        elif cut == 0:
            hit = _reaches(product, key_scale_ptr, group, limit, BLOCKS, BLOCK_K)
        else:
            # Columns before the cut belong to the previous group. The other side's columns count as a product below
            # every real one, which can add no hit.
            before = (offsets_n % BLOCK_K < cut)[None, :]
            lowest: tl.constexpr = -(2**30)
            hit = _reaches(tl.where(before, lowest, product), key_scale_ptr, group, limit, BLOCKS, BLOCK_K)
            earlier = _reaches(tl.where(before, product, lowest), key_scale_ptr, group - 1, limit, BLOCKS, BLOCK_K)
            hit |= earlier & (group >= 1)[None, :, None]
        in_word = step % STEPS
        bits |= hit.to(tl.int32) << (in_word * BLOCKS + in_step)[None, :, None]
        if (in_word == STEPS - 1) | (step == steps - 1):
            word = tl.reduce(tl.reshape(bits, [BLOCK_M // BLOCK_Q, BLOCK_Q * BLOCKS * 4]), 1, bit_or)
            tl.store(hits_pointers + block // 32, word, mask=query_block < query_blocks)
            bits = tl.zeros([BLOCK_M, BLOCKS, 4], tl.int32)


def tile_options(head_dim: int, block_k: int) -> dict[str, int]:
    """Tile and launch options of the scan; wide heads take narrower tiles, to fit every GPU's shared memory."""
    wide = head_dim > 128
    return {
        "BLOCK_M": 128,
        "BLOCK_N": max(block_k, 64),
        "num_warps": 8 if wide else 4,
        "num_stages": 2 if wide else 3,
    }


def scan_max(
    query_codes: Tensor,
    query_scale: Tensor,
    key_codes: Tensor,
    key_scale: Tensor,
    limit: Tensor,
    shift: Tensor,
    spec: MaskSpec,
    structure: Structure | None,
    score: ModLike,
    scale: float,
    grid: Grid,
    local_tokens: int,
    no_left_padding: bool,
) -> Tensor:
    """Candidate blocks with an element that reaches its row's limit, as bits.

    Args:
        query_codes: int8 ``[B, Hq, R, D]`` from `quantize_rows`, R the padded rows.
        query_scale: float32 ``[B, Hq, Sq]``, likewise.
        key_codes: int8 ``[B, Hkv, R', D]`` from `quantize_groups`, in groups of a block's keys.
        key_scale: float32 ``[B, Hkv, R' / block_k]``.
        limit: float32 ``[B, Hq, R]`` from `row_limits`.
        shift: float32 ``[B, Hq, R]``, likewise.
        spec: Who sees whom; its mask is the mask_mod as jit function and what it reads, or None.
        structure: From `block_structure` and `candidate_blocks`; None in plain causal attention.
        score: score_mod as jit function and what it reads, or None.
        scale: Softmax scale.
        grid: Lengths and blocks.
        local_tokens: Blocks in the local window are not scanned.
        no_left_padding: The caller knows that every batch row's first valid key is key 0, so that blocks and groups of
            keys are the same.

    Returns:
        int32 ``[B, Hq, nq, ceil(nk / 32)]``: bit ``j % 32`` of word ``j // 32`` is key block j. Bits of blocks that are
        always kept or not visible mean nothing.
    """
    if structure is not None:
        return masked_scan(
            query_codes, query_scale, key_codes, key_scale, limit, shift, spec, structure, score, scale, grid
        )
    batch, heads, query_rows, dim = query_codes.shape
    hits = query_codes.new_zeros(batch, heads, grid.query_blocks, grid.words, dtype=torch.int32)
    _scan_max_kernel[(query_rows // 128, batch * heads)](
        query_codes, limit, key_codes, key_scale, spec.bounds, hits,
        grid.q_len, query_rows, key_codes.shape[2], grid.query_blocks, grid.words, local_tokens,
        HEADS=heads, KV_HEADS=key_codes.shape[1], D=dim, BLOCK_D=triton.next_power_of_2(dim),
        BLOCK_Q=grid.block_q, BLOCK_K=grid.block_k, FROM_ZERO=no_left_padding, **tile_options(dim, grid.block_k),
    )  # fmt: skip
    return hits
