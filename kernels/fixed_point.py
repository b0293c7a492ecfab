# SPDX-License-Identifier: BSD-3-Clause
"""Base-2 logarithms in fixed point, and the levels that masses are compared in (docs/semantics.md, "The mass rule").

Jit helpers that `mass` and `masked_mass` share: what they decide has to be the same to the bit.

Columns of a step are loaded in an order that leaves a block's sub-blocks in one thread: the accumulator of a matrix
instruction spreads 8 neighbouring columns over 4 threads, 2 each, so 4 parts share 8 columns at a time. A part is what
one thread holds of a block in a step: all of it, unless a step has less than four blocks.
"""

import triton
import triton.language as tl

FRACTION = 16
"""Bits after the point of the fixed-point logarithms."""

CENTER = 0.0430
"""Half of what log2(1 + f) exceeds f by at most, f in [0, 1]: it centres the error of a linear mantissa."""

HIGHEST = (127 + 100) << FRACTION
"""Where logarithms saturate: at 2**100 times the exact part. An argument of kernels, not a constant of theirs: with a
constant the compiler makes two instructions of a clamp that the GPU has as one."""


@triton.jit
def round_even(x):
    """Nearest int32 of a float32 below 2**22 in magnitude, ties to even."""
    return (x + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000


@triton.jit
def clamped_fixed_point(x, LIMIT: tl.constexpr):
    """Nearest int32 of a float32, ties to even, held within -LIMIT and LIMIT: from 2**23 on floats are integers."""
    x = tl.minimum(tl.maximum(x, -1.0 * LIMIT), 1.0 * LIMIT)
    size = tl.abs(x)
    size = tl.where(size < 8388608.0, (size + 8388608.0) - 8388608.0, size).to(tl.int32)
    return tl.where(x < 0, -size, size)


@triton.jit
def level(total, base):
    """Eighths of an octave of a sum above the float whose bits are `base`, rounded down, 0 to 127."""
    return tl.minimum(tl.maximum((total.to(tl.int32, bitcast=True) - base) >> 20, 0), 127)


@triton.jit
def column_order(BLOCK_N: tl.constexpr, PART: tl.constexpr):
    """Which sub-block of a step each column holds, int32 ``[BLOCK_N]``."""
    column = tl.arange(0, BLOCK_N)
    if PART > 1:
        inside = column % (4 * PART)
        column = (column // (4 * PART) * 4 + inside % 8 // 2) * PART + inside // 8 * 2 + inside % 2
    return column


@triton.jit
def by_part(x, SIZE: tl.constexpr):
    """Columns [M, N] as ``[M, N / (4 SIZE), 4, SIZE]``, a part to a thread.

    The order of the columns is that of a matrix instruction's accumulator: 8 neighbours lie in 4 threads, 2 each.
    """
    M: tl.constexpr = x.shape[0]
    SETS: tl.constexpr = x.shape[1] // (4 * SIZE)
    if SIZE > 1:
        x = tl.permute(tl.reshape(x, [M, SETS, SIZE // 2, 4, 2]), (0, 1, 3, 2, 4))
    return tl.reshape(x, [M, SETS, 4, SIZE])


@triton.jit
def fixed_factor(row_factor, scale, LIMIT: tl.constexpr, WIDE: tl.constexpr):
    """Row factor [M] times block scale [SETS, 4], of at most LIMIT, in fixed point, and two more of their shape.

    Returns an integer; by how many bits products are shifted right before they meet it; and half of what that loses.
    Products of 8-bit codes (WIDE) are shifted by 4 to 8 bits: the factor has then 11 bits or more where it is not tiny,
    and product and factor fit an int32 together.
    """
    factor = tl.minimum(row_factor[:, None, None] * scale[None, :, :], LIMIT * 1.0)
    shift = tl.zeros_like(factor).to(tl.int32)
    half = shift
    if WIDE:
        shift = tl.minimum(tl.maximum(138 - (factor.to(tl.int32, bitcast=True) >> 23), 4), 8)
        factor *= (1 << shift).to(tl.float32)
    whole = round_even(factor)
    if WIDE:
        half = whole >> 1
    return whole, shift, half


@triton.jit
def coded_logits(
    product, square, constant, by_row, mu_scale, by_square, var_scale,
    PART: tl.constexpr, MOMENTS: tl.constexpr, WIDE: tl.constexpr, LIMIT: tl.constexpr, SQUARE_LIMIT: tl.constexpr,
    CAP: tl.constexpr,
):  # fmt: skip
    """Base-2 logits of a step's sub-blocks in fixed point, int32 ``[M, SETS, 4, PART]``.

    Args:
        product: Products of codes, int32 ``[M, N]``, columns in the order of `column_order`.
        square: Products of squares and variances, likewise; unused without MOMENTS, as are `by_square` and `var_scale`.
        constant: What is added to a logit, int32 ``[M]``.
        by_row: What products are multiplied by, besides the block's scale: float32 ``[M]``.
        mu_scale: Scales of the blocks, float32 ``[SETS, 4]``.
        by_square: The same of variances, float32 ``[M]``.
        var_scale: Their scales.
        PART: Columns of a part.
        MOMENTS: Whether there are variances.
        WIDE: Whether codes have 8 bits.
        LIMIT: Largest factor of a product.
        SQUARE_LIMIT: The same of squares and variances.
        CAP: Most that a variance adds.
    """
    constant = constant[:, None, None]
    factor, shift, half = fixed_factor(by_row, mu_scale, LIMIT, WIDE)
    if MOMENTS:
        square_by, square_shift, square_half = fixed_factor(by_square, var_scale, SQUARE_LIMIT, WIDE)
        rest = (constant + square_half)[:, :, :, None]
        second = (by_part(square, PART) >> square_shift[:, :, :, None]) * square_by[:, :, :, None] + rest
        rest = tl.minimum(second, (constant + CAP)[:, :, :, None]) + half[:, :, :, None]
    else:
        rest = (constant + half)[:, :, :, None]
    return (by_part(product, PART) >> shift[:, :, :, None]) * factor[:, :, :, None] + rest


@triton.jit
def sum_parts(logits, highest):
    """Sums over parts of the floats whose bits such logits are, float32 ``[M, SETS, 4]``.

    Args:
        logits: int32 ``[M, SETS, 4, PART]``.
        highest: Where they saturate.
    """
    bits = tl.maximum(tl.minimum(logits, highest), 0) << 7
    return tl.sum(bits.to(tl.float32, bitcast=True), axis=3)
