# SPDX-License-Identifier: BSD-3-Clause
"""Jit helpers that several kernels share."""

import triton
import triton.language as tl


@triton.jit
def round_half_even(x):
    """Nearest integer of a float32 below 2**22 in magnitude, ties to even, as `torch.round`.

    1.5 * 2**23 has a spacing of 1, so the addition itself rounds. Neither the interpreter nor every target has rint.
    """
    return (x + 12582912.0) - 12582912.0


@triton.jit
def is_finite(x):
    """Whether a float is neither infinite nor NaN: every comparison with NaN is false."""
    return tl.abs(x) < float("inf")


@triton.jit
def symmetric_scale(amax, TOP: tl.constexpr):
    """Scale that maps [-amax, amax] to [-TOP, TOP], and its inverse; 1 and 1 where the scale would be no normal float.

    Both divisions are correctly rounded, as torch's are.
    """
    scale = tl.math.div_rn(amax, TOP * 1.0)
    normal = scale >= 2.0**-126
    inverse = tl.math.div_rn(TOP * 1.0, tl.where(normal, amax, 1.0))
    return tl.where(normal, scale, 1.0), tl.where(normal, inverse, 1.0)


@triton.jit
def symmetric_codes(x, inverse, TOP: tl.constexpr):
    """Codes of x in [-TOP, TOP], 0 where x is not finite."""
    codes = tl.minimum(tl.maximum(round_half_even(x * inverse), -TOP * 1.0), TOP * 1.0)
    return tl.where(is_finite(x), codes, 0.0).to(tl.int8)


@triton.jit
def store_codes(codes_ptr, codes, offsets_s, row_mask, D: tl.constexpr, BLOCK_D: tl.constexpr, PACKED: tl.constexpr):
    """Store codes [BLOCK_S, BLOCK_D] of rows `offsets_s` [BLOCK_S]; packed: two per byte, the even channel low."""
    if PACKED:
        low, high = tl.split(tl.reshape(codes, [codes.shape[0], BLOCK_D // 2, 2]))
        byte = ((low.to(tl.uint8) & 15) | (high.to(tl.uint8) << 4)).to(tl.uint8)
        offsets_d = tl.arange(0, BLOCK_D // 2)
        mask = row_mask[:, None] & (offsets_d[None, :] < D // 2)
        tl.store(codes_ptr + offsets_s[:, None] * (D // 2) + offsets_d[None, :], byte, mask=mask)
    else:
        offsets_d = tl.arange(0, BLOCK_D)
        mask = row_mask[:, None] & (offsets_d[None, :] < D)
        tl.store(codes_ptr + offsets_s[:, None] * D + offsets_d[None, :], codes, mask=mask)
