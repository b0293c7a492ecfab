# SPDX-License-Identifier: BSD-3-Clause
"""Which key blocks take more than a share of some pooled row's softmax (docs/semantics.md, "The mass rule").

Entry point: `mass_hits`. Calls under mods, whose candidates are lists, go to `masked_mass`. In plain causal attention
one kernel goes from integer products to decisions. A program takes a tile of pooled rows of one head, multiplies their
codes with the codes of all candidate blocks on the int8 matrix units, and turns the int32 accumulators into
exponentials by integer arithmetic alone: a multiply-add per product, a clamp, a shift, and the bits are those of a
float32. Block sums are noted in scratch memory, and compared with the row's threshold once its total is known. Programs
are persistent, so that scratch is bounded by the GPU's size, and take the longest rows first.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arguments import Grid, KeyMoments, MaskSpec, MassOptions, ModLike, Near, Structure
from .fixed_point import (
    CENTER,
    FRACTION,
    HIGHEST,
    clamped_fixed_point,
    level,
)
from .masked_mass import masked_mass
from .mass_loop import FAST, sum_candidates
from .pool import LOG2E, pool_queries
from .primitives import rotation_stages

RANGE_BYTES = 2**28
"""Codes of pooled rows held at once, in bytes: longer calls go through in ranges of query blocks."""


@triton.jit
def _decide(
    scratch_ptr, cut_ptr, first, steps, low_block, high_block, flags_ptr, hits_ptr, words, in_call,
    M: tl.constexpr, NB: tl.constexpr, BLOCKS_Q: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Write the hit words of BLOCKS_Q query blocks, and return how many candidates each hits, flags not counted.

    Args:
        scratch_ptr: Levels of block sums, int32 ``[ceil(steps / 4), M, NB]``: byte s of a word is step s of the four.
        cut_ptr: Level that hits, int32 ``[M]``: 0 always, 128 never.
        first: Key block of the first step's first column, a multiple of CHUNK.
        steps: Steps there are.
        low_block: First candidate.
        high_block: One past the last candidate of each query block, ``[BLOCKS_Q]``.
        flags_ptr: Words of the KV head's non-finite blocks.
        hits_ptr: Where each query block's words start, ``[BLOCKS_Q]``.
        words: Words a query block.
        in_call: Which query blocks there are, ``[BLOCKS_Q]``.
        M: Rows of the tile.
        NB: Key blocks a step.
        BLOCKS_Q: Query blocks of the tile.
        CHUNK: Key blocks looked at together.
    """
    ROWS_Q: tl.constexpr = M // BLOCKS_Q
    UNROLL: tl.constexpr = 8 if ROWS_Q > 8 else ROWS_Q
    GROUPS: tl.constexpr = CHUNK // (4 * NB)
    column = tl.arange(0, GROUPS * NB)
    group = column // NB
    first_row = tl.arange(0, BLOCKS_Q) * ROWS_Q
    offsets = first_row[:, None] * NB + (group * (M * NB) + column % NB)[None, :]
    count = tl.zeros([BLOCKS_Q], tl.int32)
    highs: tl.constexpr = 0x80808080 - 2**32
    for word in range(0, words, CHUNK // 32):
        block = word * 32 + tl.arange(0, CHUNK)
        flag = (tl.load(flags_ptr + block // 32, mask=block < words * 32, other=0) >> (block % 32)) & 1
        flag = tl.where(block < low_block, 1, flag)
        hit = tl.zeros([BLOCKS_Q, CHUNK], tl.int32)
        if (word * 32 >= first) & (word * 32 < first + steps * NB):
            first_group = (word * 32 - first) // (4 * NB)
            noted = ((first_group + group) * 4 < steps)[None, :]
            reached = tl.zeros([BLOCKS_Q, GROUPS * NB], tl.int32)
            for row in range(0, ROWS_Q, UNROLL):
                for member in tl.static_range(UNROLL):
                    at = (first_group * M + row + member) * NB
                    levels = tl.load(scratch_ptr + at + offsets, mask=noted, other=0)
                    cut = tl.load(cut_ptr + row + member + first_row)
                    # Four comparisons at once: a byte of 128 + level - cut keeps its highest bit if level >= cut.
                    reached |= (levels | highs) - (cut * 0x01010101)[:, None]
            reached = tl.reshape(reached, [BLOCKS_Q, GROUPS, 1, NB]) >> (7 + 8 * tl.arange(0, 4))[None, None, :, None]
            candidate = (block >= low_block)[None, :] & (block[None, :] < high_block[:, None])
            hit = tl.where(candidate, tl.reshape(reached & 1, [BLOCKS_Q, CHUNK]), 0)
            count += tl.sum(hit * (1 - flag)[None, :], axis=1)
        hit |= flag[None, :]
        bits = tl.sum(tl.reshape(hit, [BLOCKS_Q, CHUNK // 32, 32]) << tl.arange(0, 32)[None, None, :], axis=2)
        word_at = word + tl.arange(0, CHUNK // 32)
        tl.store(hits_ptr[:, None] + word_at[None, :], bits, mask=in_call[:, None] & (word_at < words)[None, :])
    return count


@triton.jit
def _mass_hits_kernel(
    codes_ptr, squares_ptr, code_scale_ptr, reference_ptr, mu_ptr, mu_scale_ptr, var_ptr, var_scale_ptr,
    flags_ptr, bounds_ptr, threshold_ptr, scratch_ptr, hits_ptr, dropped_ptr,
    q_len, batch_heads, first_block, stop_block, padded_rows, sub_rows, query_blocks, words, scratch_stride,
    row_factor, square_factor, bias, highest, sink_tokens, local_tokens, budget,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, G: tl.constexpr, P: tl.constexpr,
    WIDE: tl.constexpr, LIMIT: tl.constexpr, SQUARE_LIMIT: tl.constexpr, CAP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Hit words of the query blocks from `first_block` to `stop_block`, tile after tile."""
    ROWS_Q: tl.constexpr = BLOCK_Q // P  # pooled rows a query block
    BLOCKS_Q: tl.constexpr = BLOCK_M // ROWS_Q
    SUBS: tl.constexpr = BLOCK_K // G
    NB: tl.constexpr = BLOCK_N // SUBS  # key blocks a step

    # A program's scratch: the level that hits of every row, then the levels of its blocks.
    cut_ptr = scratch_ptr + tl.program_id(0).to(tl.int64) * scratch_stride
    scratch_ptr = cut_ptr + BLOCK_M
    offsets_d = tl.arange(0, BLOCK_D)
    d_mask = (offsets_d < D)[None, :]
    rows = tl.arange(0, BLOCK_M)

    row_tiles = tl.cdiv(stop_block - first_block, BLOCKS_Q)
    for tile in range(tl.program_id(0), row_tiles * batch_heads, tl.num_programs(0)):
        bh = (tile % batch_heads).to(tl.int64)
        row_tile = row_tiles - 1 - tile // batch_heads
        batch = bh // HEADS
        kv_head = batch * KV_HEADS + (bh % HEADS) // (HEADS // KV_HEADS)
        offset = tl.load(bounds_ptr + batch * 3)
        start = tl.load(bounds_ptr + batch * 3 + 1)
        end = tl.load(bounds_ptr + batch * 3 + 2)

        query_block = first_block + row_tile * BLOCKS_Q + tl.arange(0, BLOCKS_Q)
        first_row = offset + query_block * BLOCK_Q
        low = tl.maximum(first_row, start)
        real = (query_block < stop_block) & (low < end) & (tl.minimum(first_row + BLOCK_Q, offset + q_len) > start)
        low_block = tl.cdiv(start + sink_tokens, BLOCK_K)
        high_block = tl.where(real, tl.maximum(low - local_tokens + 1, 0) // BLOCK_K, 0)
        first = tl.minimum(low_block, sub_rows // SUBS - 1) // CHUNK * CHUNK  # where the first scales are read
        steps = tl.cdiv(tl.maximum(tl.max(high_block) - first, 0), NB)
        # Steps before and from these on hold blocks that are no candidates of every query block of the tile.
        closed_steps = tl.cdiv(low_block - first, NB)
        open_steps = (tl.min(tl.where(real, high_block, 2**30)) - first) // NB

        at = bh * padded_rows + row_tile * BLOCK_M + rows
        codes = tl.load(codes_ptr + at[:, None] * D + offsets_d[None, :], mask=d_mask, other=0)  # [BLOCK_M, BLOCK_D]
        code_scale = tl.load(code_scale_ptr + at)
        finite = code_scale == code_scale
        code_scale = tl.where(finite, code_scale, 0.0)
        constant = clamped_fixed_point((bias - tl.load(reference_ptr + at)) * 65536.0, 2**29)
        threshold = tl.load(threshold_ptr + bh % HEADS)
        # From one level below the threshold on, so that what does not reach it is below every cut.
        base = tl.minimum(threshold, 1.0).to(tl.int32, bitcast=True) - (1 << 20)
        by_row = code_scale * row_factor
        squares, by_square = codes, by_row
        if G > 1:
            squares = tl.load(squares_ptr + at[:, None] * D + offsets_d[None, :], mask=d_mask, other=0)
            by_square = code_scale * code_scale * square_factor

        high_of_row = tl.reshape(high_block[:, None] + tl.zeros([BLOCKS_Q, ROWS_Q], tl.int32), [BLOCK_M])
        at = kv_head * (sub_rows // SUBS) + first
        moments = mu_ptr + at * SUBS * D, mu_scale_ptr + at, var_ptr + at * SUBS * D, var_scale_ptr + at
        span = base, closed_steps, open_steps, low_block, high_of_row
        of_rows = codes, squares, by_row, by_square
        sums = sum_candidates(
            FAST, False, scratch_ptr, first, steps, of_rows, moments, constant, span, highest,
            None, D, BLOCK_D, BLOCK_K, G, BLOCK_N, WIDE, LIMIT, SQUARE_LIMIT, CAP,
        )  # fmt: skip

        whole = 1.0 + sums
        cut = level(tl.minimum(threshold, 1.0) * whole, base)
        cut = tl.where(finite, tl.where(threshold < 1.0, cut, 128), 0)
        in_call = query_block < stop_block
        hits_at = hits_ptr + (bh * query_blocks + query_block) * words
        flags_at = flags_ptr + kv_head * words
        tl.store(cut_ptr + rows, cut)
        tl.debug_barrier()
        count = _decide(
            scratch_ptr, cut_ptr, first, steps, low_block, high_block, flags_at, hits_at, words, in_call,
            BLOCK_M, NB, BLOCKS_Q, CHUNK,
        )  # fmt: skip
        wanted = count
        raised = tl.zeros([BLOCKS_Q], tl.int32)
        while tl.max(count) > budget:
            raised += (count > budget).to(tl.int32)
            of_row = tl.reshape(raised[:, None] + tl.zeros([BLOCKS_Q, ROWS_Q], tl.int32), [BLOCK_M])
            tl.store(cut_ptr + rows, tl.where((of_row > 0) & (finite == 0), 128, tl.minimum(cut + of_row, 128)))
            tl.debug_barrier()
            count = _decide(
                scratch_ptr, cut_ptr, first, steps, low_block, high_block, flags_at, hits_at, words, in_call,
                BLOCK_M, NB, BLOCKS_Q, CHUNK,
            )  # fmt: skip
        tl.store(dropped_ptr + bh * query_blocks + query_block, wanted - count, mask=in_call)
        tl.debug_barrier()


def tile_options(head_dim: int, rows: int, subs: int, moments: bool) -> dict[str, int]:
    """Tile and launch options; `rows` pooled rows a query block, `subs` sub-blocks (or keys) a key block.

    Wide heads take smaller tiles, to fit every GPU's shared memory.
    """
    wide = head_dim > 128
    block_m = max(rows, 128 if moments and not wide else 64)
    return {
        "BLOCK_M": block_m,
        "BLOCK_N": 64 if moments or (wide and subs <= 64) else 128,
        "num_warps": 4,
        "num_stages": (1 if block_m > 64 else 2) if wide else 3,
    }


def resident_programs(device: torch.device, block_m: int) -> int:
    """Programs that a GPU runs at once, as far as registers let it; a few where there is none (the interpreter)."""
    if device.type != "cuda":
        return 4
    return (3 if block_m <= 64 else 2) * torch.cuda.get_device_properties(device).multi_processor_count


def mass_hits(
    query: Tensor,
    key: Tensor,
    mean: Tensor,
    moments: KeyMoments,
    spec: MaskSpec,
    structure: Structure | None,
    score: ModLike,
    threshold: Tensor,
    scale: float,
    grid: Grid,
    options: MassOptions,
    near: Near,
    budget: int,
) -> tuple[Tensor, Tensor]:
    """Candidate blocks whose estimated mass in some pooled row passes the threshold, as bits.

    Args:
        query: ``[B, Hq, Sq, D]``, any strides.
        key: ``[B, Hkv, Skv, D]``, any strides.
        mean: float32 ``[B, Hkv, D]`` from `key_mean`.
        moments: From `quantize_moments` with the same blocks, `sub_block` and `bits`.
        spec: Who sees whom.
        structure: From `block_structure` and `candidate_blocks`; None in plain causal attention, where candidates are a
            span of blocks between sink and local window.
        score: score_mod as jit function and what it reads, or None.
        threshold: float32 ``[Hq]``: share of a row's probability; 0 hits all candidates, 1 and more none.
        scale: Softmax scale.
        grid: Lengths and blocks.
        options: How masses are estimated.
        near: Which blocks are no candidates; without `structure`.
        budget: Candidates a query block may hit at most; where more pass, its rows' cuts rise.

    Returns:
        int32 ``[B, Hq, nq, ceil(nk / 32)]``, and int32 ``[B, Hq, nq]``: hits given up for the budget.
    """
    if structure is not None:
        return masked_mass(query, key, mean, moments, spec, structure, score, threshold, scale, grid, options, budget)
    batch, heads, q_len, dim = query.shape
    query_blocks, words = grid.query_blocks, moments.nonfinite.shape[2]
    hits = query.new_empty(batch, heads, query_blocks, words, dtype=torch.int32)
    dropped = query.new_empty(batch, heads, query_blocks, dtype=torch.int32)

    sub_block, bits = options.sub_block, options.bits
    subs, rows, top = grid.block_k // sub_block, grid.block_q // options.pool, 2 ** (bits - 1) - 1
    square_top, var_top, square_unit = (126, 127, 128.0) if bits == 8 else (49, 15, 1.0)
    launch = tile_options(dim, rows, subs, sub_block > 1)
    tile_blocks = launch["BLOCK_M"] // rows
    range_blocks = max(RANGE_BYTES // (batch * heads * rows * dim) // tile_blocks, 1) * tile_blocks
    largest = triton.cdiv(min(range_blocks, query_blocks), tile_blocks) * batch * heads
    programs = min(largest, resident_programs(query.device, launch["BLOCK_M"]))
    # A level is a byte, and four steps of a row share words.
    groups = triton.cdiv(moments.mean_codes.shape[2], 4 * launch["BLOCK_N"])
    scratch_words = launch["BLOCK_M"] * (1 + groups * (launch["BLOCK_N"] // subs))
    scratch = query.new_empty(programs, scratch_words, dtype=torch.int32)
    unit = LOG2E * 2.0**FRACTION
    width = 1 if sub_block > 1 else 2 ** rotation_stages(dim)
    for first in range(0, query_blocks, range_blocks):
        blocks = min(range_blocks, query_blocks - first)
        codes, squares, code_scale, reference = pool_queries(
            query, key, mean, spec.bounds, scale, grid, options, near, first, blocks, launch["BLOCK_M"]
        )
        _mass_hits_kernel[(min(programs, triton.cdiv(blocks, tile_blocks) * batch * heads),)](
            codes, squares, code_scale, reference, *moments, spec.bounds, threshold, scratch, hits, dropped,
            q_len, batch * heads, first, first + blocks, codes.shape[2], moments.mean_codes.shape[2], query_blocks,
            words, scratch.stride(0), scale / width * unit, scale * scale / 2 * unit * square_unit,
            127 - CENTER + math.log2(sub_block), HIGHEST, near.sink_tokens, near.local_tokens, budget,
            HEADS=heads, KV_HEADS=key.shape[1], D=dim, BLOCK_D=triton.next_power_of_2(dim),
            BLOCK_Q=grid.block_q, BLOCK_K=grid.block_k, G=sub_block, P=options.pool,
            WIDE=bits == 8, LIMIT=2**29 // (dim * top * top), SQUARE_LIMIT=2**29 // (dim * square_top * var_top),
            CAP=round(2 * (sub_block - 1) * LOG2E * 2**FRACTION), CHUNK=512, enable_fp_fusion=False, **launch,
        )  # fmt: skip
    return hits, dropped
