# SPDX-License-Identifier: BSD-3-Clause
"""Low-bit codes of queries and keys (SALE section 3.1; docs/semantics.md, "Codes").

Entry points: `quantize_rows` (a scale per query row) and `quantize_groups` (smoothed keys, a scale per group of keys
counted from the first valid one). A program takes one tile of rows, or one group, of one head. Memory-bound: every
element is read once and its code written once. Multiply and add are not fused: rounding twice, as torch does, keeps the
codes of all implementations equal.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .primitives import is_finite, nan_max, nearest_int8, row_codes, store_codes, symmetric_scale

CODE_ROWS = 128
"""Codes are stored with their rows padded to a multiple of this, so that the scan loads whole tiles unmasked."""


@triton.jit
def _quantize_rows_kernel(
    x_ptr, stride_b, stride_h, stride_s, stride_d,
    codes_ptr, scale_ptr,
    heads, rows, padded_rows,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, TOP: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Codes and scale of BLOCK_S rows of one head.

    Args:
        x_ptr: Rows ``[B, H, S, D]``.
        stride_b: From batch row to batch row.
        stride_h: From head to head.
        stride_s: From row to row.
        stride_d: From channel to channel.
        codes_ptr: Result: codes, int8 ``[B, H, R, D]``, packed uint8 ``[B, H, R, D / 2]``.
        scale_ptr: Result: scales, float32 ``[B, H, S]``; NaN for a row that is not finite.
        heads: H.
        rows: S.
        padded_rows: R: rows, padded.
        D: Channels.
        BLOCK_D: Channels, rounded up to a power of two.
        BLOCK_S: Rows a program.
        TOP: Largest code: 7 or 127.
        PACKED: Whether two 4-bit codes share a byte.
    """
    offsets_s = (tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)).to(tl.int64)
    bh = tl.program_id(1).to(tl.int64)
    offsets_d = tl.arange(0, BLOCK_D)
    x_ptr += (bh // heads) * stride_b + (bh % heads) * stride_h
    mask = (offsets_s < rows)[:, None] & (offsets_d < D)[None, :]
    x = tl.load(x_ptr + offsets_s[:, None] * stride_s + offsets_d[None, :] * stride_d, mask=mask, other=0.0)
    x = x.to(tl.float32)  # [BLOCK_S, BLOCK_D]
    codes, scale = row_codes(x, TOP)
    store_codes(
        codes_ptr + bh * padded_rows * (D // 2 if PACKED else D), codes, offsets_s, offsets_s < padded_rows,
        D, BLOCK_D, PACKED,
    )  # fmt: skip
    tl.store(scale_ptr + bh * rows + offsets_s, scale, mask=offsets_s < rows)


@triton.jit
def _quantize_groups_kernel(
    key_ptr, stride_b, stride_h, stride_s, stride_d,
    mean_ptr, bounds_ptr, codes_ptr, scale_ptr,
    heads, padded_rows, groups,
    D: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr, TOP: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Codes and the one scale of a group of GROUP smoothed keys of one head.

    Args:
        key_ptr: Keys ``[B, H, S, D]``.
        stride_b: From batch row to batch row.
        stride_h: From head to head.
        stride_s: From key to key.
        stride_d: From channel to channel.
        mean_ptr: Smoothing mean, float32 ``[B, H, D]``.
        bounds_ptr: int32 ``[B, 3]`` = (q_offset, start, end).
        codes_ptr: Result: codes, int8 ``[B, H, R, D]``, packed uint8 ``[B, H, R, D / 2]``, zeros before; rows of keys
            that are not valid are not written.
        scale_ptr: Result: scales, float32 ``[B, H, groups]``; NaN for a group that is not finite.
        heads: H.
        padded_rows: R: keys, padded.
        groups: ``R / GROUP``.
        D: Channels.
        BLOCK_D: Channels, rounded up to a power of two.
        GROUP: Keys a scale, counted from the first valid one.
        TOP: Largest code: 7 or 127.
        PACKED: Whether two 4-bit codes share a byte.
    """
    group = tl.program_id(0)
    bh = tl.program_id(1).to(tl.int64)
    batch = bh // heads
    start = tl.load(bounds_ptr + batch * 3 + 1)
    end = tl.load(bounds_ptr + batch * 3 + 2)
    offsets_s = (start + group * GROUP + tl.arange(0, GROUP)).to(tl.int64)
    offsets_d = tl.arange(0, BLOCK_D)
    key_ptr += batch * stride_b + (bh % heads) * stride_h
    valid = offsets_s < end
    mask = valid[:, None] & (offsets_d < D)[None, :]
    x = tl.load(key_ptr + offsets_s[:, None] * stride_s + offsets_d[None, :] * stride_d, mask=mask, other=0.0)
    mean = tl.load(mean_ptr + bh * D + offsets_d, mask=offsets_d < D, other=0.0)
    x = tl.where(mask, x.to(tl.float32) - mean[None, :], 0.0)  # [GROUP, BLOCK_D]
    amax = tl.reduce(tl.reduce(tl.abs(x), 1, nan_max), 0, nan_max)
    scale, inverse = symmetric_scale(amax, TOP)
    finite = is_finite(amax)
    codes = tl.where(finite, nearest_int8(x * inverse), 0)
    store_codes(codes_ptr + bh * padded_rows * (D // 2 if PACKED else D), codes, offsets_s, valid, D, BLOCK_D, PACKED)
    tl.store(scale_ptr + bh * groups + group, tl.where(finite, scale, float("nan")))


def quantize_rows(x: Tensor, bits: int, packed: bool = False) -> tuple[Tensor, Tensor]:
    """Codes with a scale per row.

    Args:
        x: ``[B, H, S, D]``, any strides, float32, float16 or bfloat16.
        bits: 4 or 8.
        packed: Two 4-bit codes per byte, uint8 ``[..., D / 2]``.

    Returns:
        int8 ``[B, H, ceil(S / 128) * 128, D]`` (rows past S are 0) and float32 ``[B, H, S]`` (NaN: a non-finite row).
    """
    batch, heads, rows, dim = x.shape
    padded = triton.cdiv(rows, CODE_ROWS) * CODE_ROWS
    codes = _empty_codes(x, padded, packed)
    scale = x.new_empty(batch, heads, rows, dtype=torch.float32)
    block_s = 32
    _quantize_rows_kernel[(padded // block_s, batch * heads)](
        x, *x.stride(), codes, scale, heads, rows, padded,
        D=dim, BLOCK_D=triton.next_power_of_2(dim), BLOCK_S=block_s, TOP=2 ** (bits - 1) - 1, PACKED=packed,
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return codes, scale


def quantize_groups(
    key: Tensor, mean: Tensor, bounds: Tensor, group: int, bits: int, packed: bool = False
) -> tuple[Tensor, Tensor]:
    """Codes of ``key - mean`` with a scale per group of keys counted from the first valid one.

    Args:
        key: ``[B, H, S, D]``, any strides.
        mean: float32 ``[B, H, D]``, contiguous.
        bounds: int32 ``[B, 3]``.
        group: Keys per scale, a power of two.
        bits: 4 or 8.
        packed: Two 4-bit codes per byte, uint8 ``[..., D / 2]``.

    Returns:
        int8 ``[B, H, R, D]``, R = ceil(S / 128) * 128 (keys that are not valid are 0), and float32
        ``[B, H, R / group]``.
    """
    batch, heads, rows, dim = key.shape
    padded = triton.cdiv(rows, CODE_ROWS) * CODE_ROWS
    groups = padded // group
    codes = _empty_codes(key, padded, packed).zero_()
    scale = key.new_empty(batch, heads, groups, dtype=torch.float32)
    _quantize_groups_kernel[(groups, batch * heads)](
        key, *key.stride(), mean, bounds, codes, scale, heads, padded, groups,
        D=dim, BLOCK_D=triton.next_power_of_2(dim), GROUP=group, TOP=2 ** (bits - 1) - 1, PACKED=packed,
        num_warps=8, enable_fp_fusion=False,
    )  # fmt: skip
    return codes, scale


def _empty_codes(x: Tensor, rows: int, packed: bool) -> Tensor:
    batch, heads, _, dim = x.shape
    if packed:
        return x.new_empty(batch, heads, rows, dim // 2, dtype=torch.uint8)
    return x.new_empty(batch, heads, rows, dim, dtype=torch.int8)
