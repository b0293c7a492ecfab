# SPDX-License-Identifier: BSD-3-Clause
"""Jit helpers that several kernels share."""

import triton
import triton.language as tl


@triton.jit
def is_finite(x):
    """Whether a float is neither infinite nor NaN: every comparison with NaN is false.

    Args:
        x: Floats of any shape.
    """
    return tl.abs(x) < float("inf")


@triton.jit
def bit_or(a, b):
    """Bits that are set in either, for reductions.

    Args:
        a: int32 of any shape.
        b: int32 of the same shape.
    """
    return a | b


@triton.jit
def nan_max(a, b):
    """Maximum that is NaN if either is: a reduction with it finds the largest magnitude and the non-finite at once.

    Args:
        a: Floats of any shape.
        b: Floats of the same shape.
    """
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def symmetric_scale(amax, TOP: tl.constexpr):
    """Scale that maps [-amax, amax] to [-TOP, TOP], and its inverse; 1 and 1 where the scale would be no normal float.

    Both divisions are correctly rounded, as torch's are.

    Args:
        amax: Largest magnitudes, float32 of any shape.
        TOP: Largest code.
    """
    scale = tl.math.div_rn(amax, TOP * 1.0)
    normal = scale >= 2.0**-126
    inverse = tl.math.div_rn(TOP * 1.0, tl.where(normal, amax, 1.0))
    return tl.where(normal, scale, 1.0), tl.where(normal, inverse, 1.0)


@triton.jit
def nearest_int8(x):
    """Nearest integer of a float32 in [-128, 127], ties to even as in `torch.round`.

    1.5 * 2**23 has a spacing of 1, so adding it rounds, and leaves the integer in the low bits of the sum.

    Args:
        x: float32 of any shape.
    """
    return (x + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)


def rotation_stages(dim: int) -> int:
    """Binary logarithm of the channels that `rotated` mixes: of the largest power of two that divides `dim`."""
    return (dim & -dim).bit_length() - 1


@triton.jit
def rotated(x, STAGES: tl.constexpr):
    """Rows ``[M, N]`` times Hadamard matrices over blocks of ``2 ** STAGES`` channels, not normalised.

    Codes of rotated vectors lose less, because what stands out in one channel is spread over all, and their products
    are those of the vectors, times ``2 ** STAGES``. Sums and differences of neighbours, stage by stage, as in torch.

    Args:
        x: Rows, float32 ``[M, N]``.
        STAGES: log2 of the channels that are mixed, which N is a multiple of.
    """
    M: tl.constexpr = x.shape[0]
    N: tl.constexpr = x.shape[1]
    WIDTH: tl.constexpr = 2**STAGES
    for _ in tl.static_range(STAGES):
        first, second = tl.split(tl.reshape(x, [M, N // WIDTH, WIDTH // 2, 2]))
        x = tl.permute(tl.join(first + second, first - second), (0, 1, 3, 2))
        x = tl.reshape(x, [M, N])
    return x


@triton.jit
def row_codes(x, TOP: tl.constexpr):
    """Codes of float32 rows in [-TOP, TOP], and a scale per row; 0 and NaN where one is not finite.

    Args:
        x: Rows, float32 ``[M, N]``.
        TOP: Largest code: 7 or 127.

    Returns:
        Codes int8 ``[M, N]``, scales float32 ``[M]``.
    """
    amax = tl.reduce(tl.abs(x), 1, nan_max)
    scale, inverse = symmetric_scale(amax, TOP)
    finite = is_finite(amax)
    codes = tl.where(finite[:, None], nearest_int8(x * inverse[:, None]), 0)
    return codes, tl.where(finite, scale, float("nan"))


@triton.jit
def squared_codes(codes, TOP: tl.constexpr):
    """Squares of codes as codes, int8: above 7 divided by 128 and rounded.

    Args:
        codes: int8 of any shape, in [-TOP, TOP].
        TOP: Largest code: 7 or 127.
    """
    squares = codes.to(tl.int32) * codes.to(tl.int32)
    if TOP > 7:
        squares = (squares + 64) >> 7
    return squares.to(tl.int8)


@triton.jit
def store_codes(codes_ptr, codes, offsets_s, row_mask, D: tl.constexpr, BLOCK_D: tl.constexpr, PACKED: tl.constexpr):
    """Store codes of some rows of one head; packed: two per byte, the even channel low.

    Args:
        codes_ptr: Codes of the head: int8 ``[R, D]``, packed uint8 ``[R, D / 2]``.
        codes: int8 ``[BLOCK_S, BLOCK_D]``.
        offsets_s: Rows of the head, int64 ``[BLOCK_S]``.
        row_mask: Which rows to store, int1 ``[BLOCK_S]``.
        D: Channels.
        BLOCK_D: Channels, rounded up to a power of two.
        PACKED: Whether two 4-bit codes share a byte.
    """
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
