# SPDX-License-Identifier: BSD-3-Clause
"""Which candidate blocks of a call under mods take more than a share of a pooled row's softmax.

Entry point: `masked_mass`, for `mass.mass_hits`. A program takes the pooled rows of one query block, of a few heads
that share keys, and walks the query block's lists. Always-kept blocks and partial candidates are weighed element by
element, whole candidates by the codes of their sub-blocks' moments, gathered through the list. Masses are written down,
relative to a reference of each row, and compared with the row's cut once its total is known. Programs are persistent,
so that what is written down is bounded by the GPU's size.

Without a score_mod, arithmetic and decisions are those of `mass`: integers up to the masses, which are floats of their
bits, and levels. A level of masses is a float that they have to reach, so that scratch holds masses in any case.

With a score_mod the reference is what all exact parts weigh. A row whose codes exceed it beyond float32, or whose
score_mod gives what is not finite, is noticed in its total; its tile is then weighed again, carefully, relative to the
largest logit. Masses below 2**-126 of the reference count as none.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arguments import Grid, KeyMoments, MaskSpec, MassOptions, ModLike, Structure
from .fixed_point import CENTER, FRACTION, HIGHEST, clamped_fixed_point, level
from .masked_exact import ABSENT, sort_candidates, weigh_exactly
from .mass_loop import CAREFUL, FAST, PEAK, sum_candidates
from .pool import LOG2E, pool_rows
from .primitives import rotation_stages
from .visibility import at_head, listed_arguments, mod_arguments


@triton.jit
def _decide(
    scratch_ptr, scratch_stride, cut_ptr, all_hit, list_ptr, count, first_block, flags_ptr, hits_ptr, hits_stride,
    ROWS: tl.constexpr, CHUNK: tl.constexpr, WRITE: tl.constexpr,
):  # fmt: skip
    """How many candidates of each head are hit, flags not counted, int32 ``[H]``; their bits are set if WRITE.

    Args:
        scratch_ptr: Masses of the first head's first row; the other rows and heads follow.
        scratch_stride: From row to row.
        cut_ptr: What masses of each row have to reach, float32 ``[H * ROWS]``.
        all_hit: Whether every candidate of a head is hit, ``[H]``.
        list_ptr: Candidates.
        count: How many.
        first_block: Blocks before it are hit in any case.
        flags_ptr: Words of blocks that are hit in any case.
        hits_ptr: The first head's words.
        hits_stride: From head to head.
        ROWS: Rows of a head.
        CHUNK: Masses of a row of every head looked at together.
        WRITE: Whether to set bits.
    """
    UNROLL: tl.constexpr = 8 if ROWS > 8 else ROWS
    HEADS: tl.constexpr = all_hit.shape[0]
    SLOTS: tl.constexpr = CHUNK // HEADS
    member = tl.arange(0, HEADS)
    cuts_at = (cut_ptr + member * ROWS)[:, None]
    rows_at = (scratch_ptr + member * (ROWS * scratch_stride))[:, None]
    words_at = (hits_ptr + member * hits_stride)[:, None]
    counts = tl.zeros([HEADS, SLOTS], tl.int32)
    for first in range(0, count, SLOTS):
        slot = (first + tl.arange(0, SLOTS))[None, :]
        there = slot < count
        hit = tl.zeros([HEADS, SLOTS], tl.int1) | all_hit[:, None]
        for row in range(0, ROWS, UNROLL):
            for unrolled in tl.static_range(UNROLL):
                mass = tl.load(rows_at + (row + unrolled) * scratch_stride + slot, mask=there, other=0.0)
                hit = hit | (mass >= tl.load(cuts_at + row + unrolled))
        block = tl.load(list_ptr + slot, mask=there, other=0)
        flag = ((tl.load(flags_ptr + block // 32, mask=there, other=0) >> (block % 32)) & 1) == 1
        flag = flag | (block < first_block)
        counts += (there & hit & (flag == 0)).to(tl.int32)
        if WRITE:
            bit = tl.full([1, SLOTS], 1, tl.int32) << (block % 32)
            words, bit = tl.broadcast(words_at + block // 32, bit)
            tl.atomic_or(words, bit, mask=there & (hit | flag), sem="relaxed")
    return tl.sum(counts, axis=1)


@triton.jit
def _mass_of_level(level, base):
    """The least float32 of a level of 1 or more, above the float whose bits are `base`; of 128 none is."""
    return tl.where(level < 128, (base + (level << 20)).to(tl.float32, bitcast=True), float("inf"))


@triton.jit
def _store_raised(cut_ptr, cut, base, raised, of_member, LEVELS: tl.constexpr):
    """Store cuts [M], raised by eighths of an octave, of each head [H], whose rows `of_member` [H, M] says.

    With LEVELS cuts are levels above the float whose bits are `base`.
    """
    raised = tl.sum(tl.where(of_member, raised[:, None], 0), axis=0)
    tl.debug_barrier()
    if LEVELS:
        cut = _mass_of_level(cut + raised, base)
    else:
        cut = cut * tl.exp2(raised * 0.125)
    tl.store(cut_ptr + tl.arange(0, cut.shape[0]), cut)
    tl.debug_barrier()


@triton.jit
def _masked_mass_kernel(
    key_ptr, stride_b, stride_h, stride_s, stride_d, mu_ptr, mu_scale_ptr, var_ptr, var_scale_ptr, flags_ptr,
    rows_ptr, codes_ptr, squares_ptr, code_scale_ptr, shift_ptr, counts_ptr, lists_ptr, full_ptr, bounds_ptr,
    listed_ptr, listed_b, listed_h, listed_words, mask_aux, score_aux, threshold_ptr,
    scratch_ptr, hits_ptr, dropped_ptr,
    q_len, kv_len, tiles, query_blocks, key_blocks, words, sub_rows, scratch_stride,
    logit_scale, inverse_scale, code_factor, square_factor, bias, highest, budget,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, STRUCTURE_HEADS: tl.constexpr, TOGETHER: tl.constexpr,
    CAUSAL: tl.constexpr, MASK: tl.constexpr, LISTED_Q: tl.constexpr, LISTED_K: tl.constexpr, SCORE: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    G: tl.constexpr, P: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
    CHUNK: tl.constexpr, WIDE: tl.constexpr, LIMIT: tl.constexpr, SQUARE_LIMIT: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    """Hit words of query blocks, tile after tile: TOGETHER heads that share keys, and a list, of one query block."""
    ROWS: tl.constexpr = BLOCK_Q // P  # pooled rows a query block
    GROUPS: tl.constexpr = HEADS // TOGETHER
    LEVELS: tl.constexpr = SCORE is None
    MOST: tl.constexpr = 128 if LEVELS else 2048  # a raise of cuts, in eighths of an octave, that leaves no hit
    # A program's scratch: the cut of every row, the masses of every row, and a list of candidates.
    cut_ptr = scratch_ptr + tl.program_id(0).to(tl.int64) * (BLOCK_M * (scratch_stride + 1) + scratch_stride)
    scratch_ptr = cut_ptr + BLOCK_M
    sorted_ptr = (scratch_ptr + BLOCK_M * scratch_stride).to(tl.pointer_type(tl.int32))
    rows = tl.arange(0, BLOCK_M)
    offsets_d = tl.arange(0, BLOCK_D)
    in_head = (offsets_d < D)[None, :]
    masses_ptr = scratch_ptr + rows * scratch_stride
    groups = tiles // query_blocks
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        query_block = query_blocks - 1 - tile // groups
        b = tile % groups // GROUPS
        head = tile % groups % GROUPS * TOGETHER
        kv_head = (b * KV_HEADS + head // (HEADS // KV_HEADS)).to(tl.int64)
        offset = tl.load(bounds_ptr + b * 3)
        start = tl.load(bounds_ptr + b * 3 + 1)
        end = tl.load(bounds_ptr + b * 3 + 2)
        line = (b * STRUCTURE_HEADS + (head if STRUCTURE_HEADS > 1 else 0)).to(tl.int64) * query_blocks + query_block
        always = tl.load(counts_ptr + line * 3)
        partial = tl.load(counts_ptr + line * 3 + 1)
        whole = tl.load(counts_ptr + line * 3 + 2)
        list_ptr = lists_ptr + line * key_blocks

        # Rows beyond the tile's heads repeat the last head's, and do not exist.
        of_head = tl.minimum(rows // ROWS, TOGETHER - 1)
        row = query_block * ROWS + rows % ROWS
        at = (b * HEADS + head + of_head).to(tl.int64) * (query_blocks * ROWS) + row
        q = tl.minimum(tl.minimum(row * P + P, q_len), end - offset) - 1  # the last real row
        exists = (q >= tl.maximum(row * P, start - offset)) & (rows < TOGETHER * ROWS)
        q = tl.where(exists, q, -1)
        code_scale = tl.load(code_scale_ptr + at)
        finite = code_scale == code_scale
        asks = exists & finite
        code_scale = tl.where(finite, code_scale, 0.0)
        shift = tl.where(finite, tl.load(shift_ptr + at), 0.0)
        if TOGETHER > 1:
            h = head + of_head[:, None]
        else:
            h = head
        key_at = key_ptr + b.to(tl.int64) * stride_b + (head // (HEADS // KV_HEADS)).to(tl.int64) * stride_h
        listed_at = at_head(listed_ptr, b, head, listed_b, listed_h, LISTED_Q)
        candidates_ptr = list_ptr + always
        first_block = 0
        cut_block = 0
        if LEVELS:
            if (whole == 0) & (partial > 0):
                whole = sort_candidates(
                    candidates_ptr, sorted_ptr, partial, b, head, query_block * BLOCK_Q, offset, start, end, q_len,
                    kv_len, listed_at, listed_words, mask_aux, CAUSAL, MASK, LISTED_Q, LISTED_K, BLOCK_K, P, ROWS, 32,
                )  # fmt: skip  # a step of few keys: what is kept for the next tile costs registers
                partial -= whole
                candidates_ptr = sorted_ptr
            # A block that padding on the left cuts is no sink where there are none. It is kept, and of the exact part.
            first_block = tl.cdiv(start, BLOCK_K)
            cut_block = (tl.load(candidates_ptr, mask=partial > 0, other=first_block) < first_block).to(tl.int32)
            shift *= inverse_scale
        exact = weigh_exactly(
            masses_ptr, rows_ptr, at, key_at, stride_s, stride_d, full_ptr + line * words, list_ptr,
            always + cut_block, 0 if LEVELS else partial,
            b, head, h, q, query_block * BLOCK_Q, offset, start, end, q_len, kv_len,
            listed_at, listed_words, mask_aux, score_aux, logit_scale, shift, ABSENT if LEVELS else float("-inf"),
            CAUSAL, MASK, LISTED_Q, LISTED_K, SCORE, D, BLOCK_D, CHUNK_D, BLOCK_K, P, ROWS, BLOCK_E,
        )  # fmt: skip
        if LEVELS:
            of_partial = tl.full([BLOCK_M], float("-inf"), tl.float32)
            if partial > cut_block:
                of_partial = weigh_exactly(
                    masses_ptr + cut_block, rows_ptr, at, key_at, stride_s, stride_d, full_ptr + line * words,
                    candidates_ptr + cut_block, 0, partial - cut_block,
                    b, head, h, q, query_block * BLOCK_Q, offset, start, end, q_len, kv_len,
                    listed_at, listed_words, mask_aux, score_aux, logit_scale, shift, float("-inf"),
                    CAUSAL, MASK, LISTED_Q, LISTED_K, SCORE, D, BLOCK_D, CHUNK_D, BLOCK_K, P, ROWS, BLOCK_E,
                )  # fmt: skip

        codes = tl.load(codes_ptr + at[:, None] * D + offsets_d[None, :], mask=in_head, other=0)  # [BLOCK_M, BLOCK_D]
        if G > 1:
            squares = tl.load(squares_ptr + at[:, None] * D + offsets_d[None, :], mask=in_head, other=0)
        else:
            squares = codes
        code_at, scale_at = kv_head * sub_rows * D, kv_head * (sub_rows // (BLOCK_K // G))
        moments = mu_ptr + code_at, mu_scale_ptr + scale_at, var_ptr + code_at, var_scale_ptr + scale_at
        of_rows = codes, squares, code_scale * code_factor, code_scale * code_scale * square_factor
        if LEVELS:
            scored = highest
            constant = clamped_fixed_point((bias - exact) * 65536.0, 2**29)
            total = tl.where(exact == float("-inf"), 0.0, 1.0)
            reference = exact
            if tl.max((asks & (total == 0.0)).to(tl.int32)) > 0:
                # A row that sees nothing in what is always kept counts in halves of the most that it sees elsewhere.
                largest = of_partial
                if whole > 0:
                    peak = sum_candidates(
                        PEAK, True, masses_ptr + partial, candidates_ptr + partial, whole, of_rows, moments,
                        tl.zeros_like(constant), (), scored,
                        SCORE, D, BLOCK_D, BLOCK_K, G, BLOCK_N, WIDE, LIMIT, SQUARE_LIMIT, CAP,
                    )  # fmt: skip
                    of_codes = peak.to(tl.float32) * 2.0**-16 + tl.log2(tl.full([BLOCK_M], G, tl.float32))
                    largest = tl.maximum(largest, of_codes)
                largest = tl.where(largest == float("-inf"), 0.0, largest - 1.0)
                reference = tl.where(exact == float("-inf"), largest, exact)
                constant = clamped_fixed_point((bias - reference) * 65536.0, 2**29)
        else:
            if TOGETHER > 1:
                h = head + of_head[:, None, None, None]
            scored = (shift, b, h, tl.maximum(q, 0), score_aux)
            reference = tl.where(exact == float("-inf"), 0.0, exact)
            constant = reference
            total = tl.exp2(exact - reference)
        if whole > 0:
            total += sum_candidates(
                FAST, True, masses_ptr + partial, candidates_ptr + partial, whole, of_rows, moments, constant, (),
                scored, SCORE, D, BLOCK_D, BLOCK_K, G, BLOCK_N, WIDE, LIMIT, SQUARE_LIMIT, CAP,
            )  # fmt: skip
        if not LEVELS:
            # Below the bound, which only a row without an exact part reaches, small masses may have become nothing.
            trusted = (total >= 2.0**-24) & (total < float("inf"))
            if (whole > 0) & (tl.max((asks & (trusted == 0)).to(tl.int32)) > 0):
                peak = sum_candidates(
                    PEAK, True, masses_ptr + partial, candidates_ptr + partial, whole, of_rows, moments,
                    tl.zeros_like(reference), (), scored,
                    SCORE, D, BLOCK_D, BLOCK_K, G, BLOCK_N, WIDE, LIMIT, SQUARE_LIMIT, CAP,
                )  # fmt: skip
                peak = tl.maximum(peak, exact)
                reference = tl.where(peak == float("-inf"), 0.0, peak)
                tl.debug_barrier()
                total = tl.exp2(exact - reference)
                total += sum_candidates(
                    CAREFUL, True, masses_ptr + partial, candidates_ptr + partial, whole, of_rows, moments, reference,
                    (), scored, SCORE, D, BLOCK_D, BLOCK_K, G, BLOCK_N, WIDE, LIMIT, SQUARE_LIMIT, CAP,
                )  # fmt: skip
        tl.debug_barrier()
        for slot in range(cut_block, partial):
            weight = tl.load(masses_ptr + slot) - reference
            if LEVELS:
                weight = tl.exp2(tl.minimum(weight, 100.0))
                total += weight
            else:
                weight = tl.exp2(weight)
            tl.store(masses_ptr + slot, weight)

        threshold = tl.load(threshold_ptr + head + of_head)
        base = 0
        if LEVELS:
            # From one level below the threshold on. A row that sees nothing asks for nothing.
            base = tl.minimum(threshold, 1.0).to(tl.int32, bitcast=True) - (1 << 20)
            cut = level(tl.minimum(threshold, 1.0) * total, base)
            cut = tl.where((asks == 0) | (threshold >= 1.0) | (total == 0.0), 128, cut)
            tl.store(cut_ptr + rows, _mass_of_level(cut, base))
        else:
            cut = total * tl.where(threshold > 0, threshold, 2.0**-100)
            never = (asks == 0) | (threshold >= 1.0)
            cut = tl.where(never, float("inf"), tl.maximum(cut, 2.0**-126))
            tl.store(cut_ptr + rows, cut)
        # Until the budget raises cuts, a row that is not finite asks for everything, and so does threshold 0.
        greedy = (exists & (finite == 0)) | (threshold == 0.0)
        tl.debug_barrier()
        flags_at = flags_ptr + kv_head * words
        member = tl.arange(0, TOGETHER)
        of_member = rows[None, :] // ROWS == member[:, None]
        all_hit = tl.max((of_member & greedy[None, :]).to(tl.int32), axis=1) > 0
        hits_line = (b * HEADS + head).to(tl.int64) * query_blocks + query_block
        hits_at = hits_ptr + hits_line * words
        hits_stride = query_blocks * words
        wanted = _decide(
            scratch_ptr, scratch_stride, cut_ptr, all_hit, candidates_ptr, partial + whole, first_block, flags_at,
            hits_at, hits_stride, ROWS, CHUNK, True,
        )  # fmt: skip
        dropped = tl.zeros([TOGETHER], tl.int32)
        if tl.max(wanted) > budget:
            # The least raises, in eighths of an octave, that are enough: what is hit gets less with them.
            low = dropped + 1
            high = tl.where(wanted > budget, MOST, 0)
            count = wanted
            while tl.max(high - low) > 0:
                middle = (low + high) // 2
                _store_raised(cut_ptr, cut, base, middle, of_member, LEVELS)
                here = _decide(
                    scratch_ptr, scratch_stride, cut_ptr, dropped > 0, candidates_ptr, partial + whole, first_block,
                    flags_at, hits_at, hits_stride, ROWS, CHUNK, False,
                )  # fmt: skip
                fits = (here <= budget) & (low < high)
                low = tl.where((here > budget) & (low < high), middle + 1, low)
                high = tl.where(fits, middle, high)
                count = tl.where(fits, here, count)
            # At the last raise nothing but flags is hit, and it is never looked at.
            dropped = wanted - tl.where(high == MOST, 0, count)
            for word in range(0, words, CHUNK // TOGETHER):
                word_at = (word + tl.arange(0, CHUNK // TOGETHER))[None, :]
                cleared = tl.zeros([TOGETHER, CHUNK // TOGETHER], tl.int32)
                tl.store(hits_at + member[:, None] * hits_stride + word_at, cleared, mask=word_at < words)
            _store_raised(cut_ptr, cut, base, high, of_member, LEVELS)
            _decide(
                scratch_ptr, scratch_stride, cut_ptr, all_hit & (high == 0), candidates_ptr, partial + whole,
                first_block, flags_at, hits_at, hits_stride, ROWS, CHUNK, True,
            )  # fmt: skip
        tl.store(dropped_ptr + hits_line + member * query_blocks, dropped)
        tl.debug_barrier()


def heads_together(group: int, rows: int) -> int:
    """How many of the `group` heads that share keys make a tile: a power of two that divides them."""
    return min(group & -group, max(1, 64 // rows))


def tile_options(head_dim: int, element_size: int, rows: int, together: int, subs: int, block_k: int) -> dict[str, int]:
    """Tile and launch options for `together` heads of `rows` pooled rows a query block, `subs` sub-blocks a key block.

    Wide heads take smaller tiles, to fit every GPU's shared memory.
    """
    wide = head_dim > 128
    block_m = max(rows * together, 16)
    block_n = 128 if subs > 16 and not wide else 64
    channels = triton.next_power_of_2(head_dim)
    return {
        "BLOCK_M": block_m,
        # A step has at least one key block.
        "BLOCK_N": max(block_n if block_m >= 64 else block_n // 2, subs),
        "BLOCK_E": min(block_k, 64),
        "CHUNK_D": channels if channels * element_size <= 256 else 8192 // (max(block_m, 64) * element_size),
        "num_warps": max(1, min(4, block_m // 16)),
        "num_stages": (1 if block_m > 64 else 2) if wide else 3,
        "maxnreg": 168 if block_m <= 64 else 255,
    }


def resident_programs(device: torch.device, block_m: int) -> int:
    """Programs that a GPU runs at once, as far as registers let it; a few where there is none (the interpreter)."""
    if device.type != "cuda":
        return 4
    a_multiprocessor = 2 if block_m > 64 else 3 if block_m == 64 else 6
    return a_multiprocessor * torch.cuda.get_device_properties(device).multi_processor_count


def masked_mass(
    query: Tensor,
    key: Tensor,
    mean: Tensor,
    moments: KeyMoments,
    spec: MaskSpec,
    structure: Structure,
    score: ModLike,
    threshold: Tensor,
    scale: float,
    grid: Grid,
    options: MassOptions,
    budget: int,
) -> tuple[Tensor, Tensor]:
    """`mass.mass_hits` of a call under mods; a bit of 0 in `structure.visibility.full` is right, only slower."""
    batch, heads, _, dim = query.shape
    kv_heads, kv_len = key.shape[1:3]
    sub_block, pool, bits = options.sub_block, options.pool, options.bits
    rows, codes, square_codes, code_scale, shift = pool_rows(
        query, mean, spec.bounds, scale, grid.block_q, pool, options.sample, bits, sub_block > 1
    )
    counts, lists = structure.candidates.counts, structure.candidates.blocks
    query_blocks, key_blocks, words = grid.query_blocks, grid.key_blocks, moments.nonfinite.shape[2]
    hits = query.new_zeros(batch, heads, query_blocks, words, dtype=torch.int32)
    dropped = query.new_empty(batch, heads, query_blocks, dtype=torch.int32)
    group = heads // kv_heads
    rows_q = grid.block_q // pool
    # Heads that see different things have lists of their own.
    together = heads_together(group, rows_q) if counts.shape[1] == 1 else 1
    launch = tile_options(dim, key.element_size(), rows_q, together, grid.block_k // sub_block, grid.block_k)
    tiles = query_blocks * batch * heads // together
    programs = min(tiles, resident_programs(key.device, launch["BLOCK_M"]))
    # A step's masses are written whole.
    step_blocks = max(1, launch["BLOCK_N"] * sub_block // grid.block_k)
    stride = triton.cdiv(key_blocks + step_blocks, 16) * 16
    scratch = query.new_empty(programs, launch["BLOCK_M"] * (stride + 1) + stride, dtype=torch.float32)
    listed, listed_b, listed_h, listed_words = listed_arguments(spec)
    mask_function, mask_aux = mod_arguments(spec.mask)
    score_function, score_aux = mod_arguments(score)
    top, square_top, var_top = (7, 49, 15) if bits == 4 else (127, 126, 127)
    code_factor = scale / (1 if sub_block > 1 else 2 ** rotation_stages(dim))
    square_factor = scale * scale / 2 * LOG2E * (1.0 if bits == 4 else 128.0)
    if score is None:
        code_factor *= LOG2E * 2.0**FRACTION
        square_factor *= 2.0**FRACTION
    _masked_mass_kernel[(programs,)](
        key, *key.stride(), *moments, rows, codes, square_codes, code_scale, shift,
        counts, lists, structure.visibility.full, spec.bounds,
        listed, listed_b, listed_h, listed_words, mask_aux, score_aux, threshold, scratch, hits, dropped,
        grid.q_len, kv_len, tiles, query_blocks, key_blocks, words, moments.mean_codes.shape[2], stride,
        scale if score is not None else scale * LOG2E, 1 / scale, code_factor, square_factor,
        127 - CENTER + math.log2(sub_block), HIGHEST, budget,
        HEADS=heads, KV_HEADS=kv_heads, STRUCTURE_HEADS=counts.shape[1], TOGETHER=together,
        CAUSAL=spec.causal, MASK=mask_function, LISTED_Q=0 if spec.listed is None else spec.listed_q,
        LISTED_K=spec.listed_k, SCORE=score_function, D=dim, BLOCK_D=triton.next_power_of_2(dim),
        BLOCK_Q=grid.block_q, BLOCK_K=grid.block_k, G=sub_block, P=pool, CHUNK=512, WIDE=bits == 8,
        LIMIT=2**29 // (dim * top * top), SQUARE_LIMIT=2**29 // (dim * square_top * var_top),
        CAP=round(2 * (sub_block - 1) * LOG2E * 2**FRACTION), enable_fp_fusion=score is not None, **launch,
    )  # fmt: skip
    return hits, dropped
