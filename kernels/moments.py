# SPDX-License-Identifier: BSD-3-Clause
"""Low-bit codes of the mean and the variance of sub-blocks of keys, or of single keys (docs/semantics.md).

Entry point: `quantize_moments`. A program takes a few key blocks of one head and visits the keys of its sub-blocks one
after the other, all sub-blocks side by side: sums in a fixed order, so that the codes equal torch's. Two passes over
the keys, the second from cache. Memory-bound.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arguments import KeyMoments
from .primitives import is_finite, nan_max, nearest_int8, rotated, rotation_stages, symmetric_scale

STEP_ROWS = 256
"""Codes are stored with their sub-blocks padded to a multiple of this, so that the estimate loads whole tiles."""


@triton.jit
def _block_scale(x, TOP: tl.constexpr, BLOCKS: tl.constexpr, SUBS: tl.constexpr):
    """Scale, inverse and finiteness of every key block's largest magnitude, each ``[BLOCKS]``.

    Args:
        x: Moments of sub-blocks, float32 ``[BLOCKS * SUBS, N]``.
        TOP: Largest code.
        BLOCKS: Key blocks.
        SUBS: Sub-blocks a key block.
    """
    amax = tl.reduce(tl.reduce(tl.abs(tl.reshape(x, [BLOCKS, SUBS, x.shape[1]])), 2, nan_max), 1, nan_max)
    scale, inverse = symmetric_scale(amax, TOP)
    return scale, inverse, is_finite(amax)


@triton.jit
def _store_codes(codes_ptr, x, inverse, keep, offsets, D: tl.constexpr, BLOCKS: tl.constexpr, SUBS: tl.constexpr):
    """Round x times its block's inverse scale, 0 in blocks not to keep, and store it in rows `offsets`.

    Args:
        codes_ptr: Codes of the head, int8 ``[R, D]``.
        x: Moments of sub-blocks, float32 ``[BLOCKS * SUBS, N]``.
        inverse: Inverse scales, float32 ``[BLOCKS]``.
        keep: Which blocks to keep, int1 ``[BLOCKS]``.
        offsets: Rows of the codes, int64 ``[BLOCKS * SUBS]``.
        D: Channels.
        BLOCKS: Key blocks.
        SUBS: Sub-blocks a key block.
    """
    dims: tl.constexpr = x.shape[1]
    offsets_d = tl.arange(0, dims)
    x = tl.reshape(x, [BLOCKS, SUBS, dims])
    codes = tl.where(keep[:, None, None], nearest_int8(x * inverse[:, None, None]), 0)
    codes = tl.reshape(codes, [BLOCKS * SUBS, dims])
    tl.store(codes_ptr + offsets[:, None] * D + offsets_d[None, :], codes, mask=(offsets_d < D)[None, :])


@triton.jit
def _quantize_moments_kernel(
    key_ptr, stride_b, stride_h, stride_s, stride_d,
    mean_ptr, bounds_ptr, mu_ptr, mu_scale_ptr, var_ptr, var_scale_ptr, nonfinite_ptr,
    heads, sub_rows, words,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, G: tl.constexpr, BLOCKS: tl.constexpr,
    TOP: tl.constexpr, VAR_TOP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Codes of BLOCKS key blocks of one head; those of single keys are rotated.

    Args:
        key_ptr: Keys ``[B, H, S, D]``.
        stride_b: From batch row to batch row.
        stride_h: From head to head.
        stride_s: From key to key.
        stride_d: From channel to channel.
        mean_ptr: Smoothing mean, float32 ``[B, H, D]``.
        bounds_ptr: int32 ``[B, 3]`` = (q_offset, start, end).
        mu_ptr: Result: codes of means, int8 ``[B, H, R, D]``.
        mu_scale_ptr: Result: scales of means, float32 ``[B, H, R * G / BLOCK_K]``.
        var_ptr: Result: codes of variances, int8 ``[B, H, R, D]``; not written if G is 1.
        var_scale_ptr: Result: scales of variances, float32 ``[B, H, R * G / BLOCK_K]``; not written if G is 1.
        nonfinite_ptr: Result: bits of blocks that are not finite, int32 ``[B, H, ceil(nk / 32)]``, zeros before.
        heads: H.
        sub_rows: R: sub-blocks, padded.
        words: ``ceil(nk / 32)``.
        D: Channels.
        BLOCK_D: Channels, rounded up to a power of two.
        BLOCK_K: Keys a block.
        G: Keys a sub-block.
        BLOCKS: Key blocks a program.
        TOP: Largest code of a mean: 7 or 127.
        VAR_TOP: Largest code of a variance: 15 or 127.
        STAGES: Stages of the rotation: log2 of the channels that it mixes; not used unless G is 1.
    """
    SUBS: tl.constexpr = BLOCK_K // G
    ROWS: tl.constexpr = BLOCKS * SUBS
    bh = tl.program_id(1).to(tl.int64)
    batch = bh // heads
    start = tl.load(bounds_ptr + batch * 3 + 1)
    end = tl.load(bounds_ptr + batch * 3 + 2)
    sub = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    offsets_d = tl.arange(0, BLOCK_D)
    in_head = (offsets_d < D)[None, :]
    center = tl.load(mean_ptr + bh * D + offsets_d, mask=offsets_d < D, other=0.0)[None, :]
    key_ptr += (bh // heads) * stride_b + (bh % heads) * stride_h + offsets_d[None, :] * stride_d

    mu = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for member in tl.static_range(G):
        at = sub * G + member
        mask = ((at >= start) & (at < end))[:, None] & in_head
        key = tl.load(key_ptr + at[:, None] * stride_s, mask=mask, other=0.0).to(tl.float32)
        mu += tl.where(mask, key - center, 0.0)
    mu *= 1.0 / G
    if G == 1:
        mu = rotated(mu, STAGES)
    scale, inverse, finite = _block_scale(mu, TOP, BLOCKS, SUBS)
    if G > 1:
        var = tl.zeros([ROWS, BLOCK_D], tl.float32)
        for member in tl.static_range(G):
            at = sub * G + member
            mask = ((at >= start) & (at < end))[:, None] & in_head
            key = tl.load(key_ptr + at[:, None] * stride_s, mask=mask, other=0.0).to(tl.float32)
            off = tl.where(mask, key - center, 0.0) - mu
            var += off * off
        var *= 1.0 / G
        var_scale, var_inverse, var_finite = _block_scale(var, VAR_TOP, BLOCKS, SUBS)
        finite = finite & var_finite

    whole = (block * BLOCK_K >= start) & ((block + 1) * BLOCK_K <= end)
    keep = whole & finite
    _store_codes(mu_ptr + bh * sub_rows * D, mu, inverse, keep, sub, D, BLOCKS, SUBS)
    tl.store(mu_scale_ptr + bh * (sub_rows // SUBS) + block, tl.where(keep, scale, 0.0))
    if G > 1:
        _store_codes(var_ptr + bh * sub_rows * D, var, var_inverse, keep, sub, D, BLOCKS, SUBS)
        tl.store(var_scale_ptr + bh * (sub_rows // SUBS) + block, tl.where(keep, var_scale, 0.0))
    bad = (finite == 0) & (block < words * 32)
    bit = tl.full([BLOCKS], 1, tl.int32) << (block % 32)
    tl.atomic_or(nonfinite_ptr + bh * words + block // 32, bit, mask=bad, sem="relaxed")


def quantize_moments(key: Tensor, mean: Tensor, bounds: Tensor, block_k: int, sub_block: int, bits: int) -> KeyMoments:
    """Codes of the mean and the variance of every sub-block of ``key - mean``, with a scale per key block each.

    Blocks with a key that is not valid, and blocks whose moments are not finite, have codes and scales 0.

    Args:
        key: ``[B, H, S, D]``, any strides.
        mean: float32 ``[B, H, D]``, contiguous.
        bounds: int32 ``[B, 3]``.
        block_k: Keys a block.
        sub_block: Keys a sub-block, a divisor of `block_k`; 1: codes of the keys themselves, behind a Hadamard rotation
            (`primitives.rotated`), and no variance.
        bits: 4 or 8: means in [-7, 7] and variances in [0, 15], or [-127, 127] and [0, 127].

    Returns:
        Codes of means int8 ``[B, H, R, D]``, R the sub-blocks padded to a multiple of 256; their scales float32
        ``[B, H, R * sub_block / block_k]``; the same of variances (R = 0 without); and int32 ``[B, H, ceil(nk / 32)]``:
        bits of the blocks with a valid key that is not finite.
    """
    batch, heads, kv_len, dim = key.shape
    subs = block_k // sub_block
    words = triton.cdiv(triton.cdiv(kv_len, block_k), 32)
    rows = triton.cdiv(triton.cdiv(kv_len, block_k) * subs, STEP_ROWS) * STEP_ROWS
    var_rows = rows if sub_block > 1 else 0
    mu, var = (key.new_empty(batch, heads, n, dim, dtype=torch.int8) for n in (rows, var_rows))
    mu_scale, var_scale = (key.new_empty(batch, heads, n // subs, dtype=torch.float32) for n in (rows, var_rows))
    nonfinite = key.new_zeros(batch, heads, words, dtype=torch.int32)
    blocks = max(1, 16 // subs)
    _quantize_moments_kernel[(rows // (blocks * subs), batch * heads)](
        key, *key.stride(), mean, bounds, mu, mu_scale, var, var_scale, nonfinite,
        heads, rows, words,
        D=dim, BLOCK_D=triton.next_power_of_2(dim), BLOCK_K=block_k, G=sub_block, BLOCKS=blocks,
        TOP=2 ** (bits - 1) - 1, VAR_TOP=15 if bits == 4 else 127, STAGES=rotation_stages(dim),
        num_warps=8, enable_fp_fusion=False,
    )  # fmt: skip
    return KeyMoments(mu, mu_scale, var, var_scale, nonfinite)
