# SPDX-License-Identifier: BSD-3-Clause
"""The smoothing mean of the keys: the average of the first valid ones (SALE section 3.1, over a prefix).

Entry point: `key_mean`. One program a head. The sum is taken in float64 and rounded once, so that its bits do not
depend on the order of additions.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .primitives import is_finite


@triton.jit
def _key_mean_kernel(
    key_ptr, stride_b, stride_h, stride_s, stride_d, bounds_ptr, mean_ptr, heads, smooth_tokens,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Mean of one head's first valid keys.

    Args:
        key_ptr: Keys ``[B, Hkv, Skv, D]``.
        stride_b: From batch row to batch row.
        stride_h: From head to head.
        stride_s: From key to key.
        stride_d: From channel to channel.
        bounds_ptr: int32 ``[B, 3]`` = (q_offset, start, end).
        mean_ptr: Result, float32 ``[B, Hkv, D]``.
        heads: Hkv.
        smooth_tokens: Length of the prefix, in tokens.
        D: Channels.
        BLOCK_D: Channels, rounded up to a power of two.
        BLOCK_S: Keys a step.
    """
    bh = tl.program_id(0).to(tl.int64)
    batch = bh // heads
    start = tl.load(bounds_ptr + batch * 3 + 1)
    stop = tl.minimum(start + smooth_tokens, tl.load(bounds_ptr + batch * 3 + 2))
    offsets_d = tl.arange(0, BLOCK_D)
    key_ptr += batch * stride_b + (bh % heads) * stride_h + offsets_d[None, :] * stride_d
    total = tl.zeros([BLOCK_S, BLOCK_D], tl.float64)
    for first in range(start, stop, BLOCK_S):
        at = first + tl.arange(0, BLOCK_S)
        mask = (at < stop)[:, None] & (offsets_d < D)[None, :]
        key = tl.load(key_ptr + at.to(tl.int64)[:, None] * stride_s, mask=mask, other=0.0).to(tl.float32)
        total += tl.where(is_finite(key), key, 0.0).to(tl.float64)
    mean = tl.sum(total, axis=0) / tl.maximum(stop - start, 1).to(tl.float64)
    tl.store(mean_ptr + bh * D + offsets_d, mean.to(tl.float32), mask=offsets_d < D)


def key_mean(key: Tensor, bounds: Tensor, smooth_tokens: int) -> Tensor:
    """Mean of the first `smooth_tokens` valid keys, of those there are.

    Args:
        key: ``[B, Hkv, Skv, D]``, any strides.
        bounds: int32 ``[B, 3]``.
        smooth_tokens: Length of the prefix; 0 gives zeros.

    Returns:
        float32 ``[B, Hkv, D]``. Non-finite elements count as 0.
    """
    batch, heads, _, dim = key.shape
    mean = key.new_empty(batch, heads, dim, dtype=torch.float32)
    block_d = triton.next_power_of_2(dim)
    _key_mean_kernel[(batch * heads,)](
        key, *key.stride(), bounds, mean, heads, smooth_tokens,
        D=dim, BLOCK_D=block_d, BLOCK_S=16384 // block_d, num_warps=16,
    )  # fmt: skip
    return mean
