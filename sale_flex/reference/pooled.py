# SPDX-License-Identifier: BSD-3-Clause
"""Pooled rows, which stand for adjacent query rows, and their logits with sub-blocks of keys.

Integers, and all that is rounded on the way to them, are bit for bit what any implementation has.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sale_flex.reference.common import quantize_rows, real_rows, repeat_heads, rotate, rotation_width, scaled_products
from sale_flex.reference.moments import Moments

LOG2E = 1.4426950408889634

FRACTION = 16
"""Bits after the point of logarithms to base 2 in fixed point."""

CENTER = 0.0430
"""Octaves that 1 + f is above 2 ** f in the middle of its range: it is 0 to 0.0861 above for f in [0, 1]."""


class MassOptions(NamedTuple):
    """The fields of a `SaleConfig` that weights depend on, of any size."""

    block_size: tuple[int, int]
    """(query rows, keys) of a block."""
    pool: int
    """Query rows a pooled row, any divisor of the block's."""
    sample: bool
    """Whether a pooled row is the last of its rows instead of their mean."""
    sub_block: int
    """Keys a sub-block, any divisor of the block's; 1 is the scan of every key."""
    bits: int
    """Width of the codes, 4 or 8."""

    @property
    def rows(self) -> int:
        """Pooled rows a query block."""
        return self.block_size[0] // self.pool


class PooledRows(NamedTuple):
    """One row for every `pool` query rows."""

    rows: Tensor
    """float32 ``[B, Hq, np, D]``, numbers of the query's dtype; 0 where all rows are padding."""
    position: Tensor
    """int64 ``[B, np]``: key index at which the last real row stands; -1 where all rows are padding."""


def mass_options(config: Any) -> MassOptions:
    """The options of a `SaleConfig`."""
    return MassOptions(
        block_size=config.block_size,
        pool=config.rule.pool,
        sample=config.rule.pool_mode == "last",
        sub_block=config.rule.sub_block,
        bits=config.rule.bits,
    )


def pool_rows(query: Tensor, bounds: Tensor, block_q: int, pool: int, sample: bool = False) -> PooledRows:
    """The mean of every `pool` adjacent rows, or with `sample` the last of them, of those that are no padding.

    The sum is taken in float32 from the first row to the last, multiplied by the rounded inverse of their number, and
    rounded to the query's dtype: all bits are determined.
    """
    at = torch.arange(query.shape[2], device=query.device) + bounds[:, :1].long()
    real = real_rows(bounds, query.shape[2])
    missing = -query.shape[2] % block_q
    at, real = (torch.nn.functional.pad(x, (0, missing)).unflatten(1, (-1, pool)) for x in (at, real))
    members = torch.nn.functional.pad(query.float(), (0, 0, 0, missing)).unflatten(2, (-1, pool))
    rows = torch.zeros_like(members[:, :, :, 0])
    for n in range(pool):
        here = real[:, None, :, n, None]
        rows = torch.where(here, members[:, :, :, n] if sample else rows + members[:, :, :, n], rows)
    if not sample:
        count = real.sum(-1).clamp_min(1).float()[:, None, :, None]
        rows = (rows * (torch.ones_like(count) / count)).to(query.dtype).float()
    return PooledRows(rows, torch.where(real, at, -1).amax(-1))


def pooled_elements(elements: Tensor, options: MassOptions) -> Tensor:
    """Which keys pooled rows see, those that one of their rows sees: ``[B, H, Sq, Skv]`` to ``[B, H, np, Skv]``."""
    missing = -elements.shape[2] % options.block_size[0]
    return torch.nn.functional.pad(elements, (0, 0, 0, missing)).unflatten(2, (-1, options.pool)).any(3)


def block_logsumexp(logits: Tensor, blocks: int, block_k: int) -> Tensor:
    """Log-sum-exp over the keys of every block: ``[B, Hq, np, Skv]`` to ``[B, Hq, np, nk]``."""
    missing = blocks * block_k - logits.shape[3]
    return torch.nn.functional.pad(logits, (0, missing), value=-torch.inf).unflatten(-1, (blocks, -1)).logsumexp(-1)


def moment_logits(pooled: PooledRows, mu: Tensor, var: Tensor, sub_block: int, scale: float) -> Tensor:
    """Second-order estimate of the log-sum-exp of every sub-block's logits, ``[B, Hq, np, nk * n_sub]``.

    ``ln g + s + min(v / 2, 2 (g - 1))`` with s the mean logit and v the logits' variance, were channels independent.
    The largest of g numbers is at most ``s + sqrt((g - 1) v)`` (Samuelson), and ``v / 2`` is above that square root
    from ``v = 4 (g - 1)`` on, where both are ``2 (g - 1)``: the cap keeps the estimate below ``ln g`` and the largest
    logit that such a mean and variance allow.
    """
    heads, dtype = pooled.rows.shape[1], mu.dtype
    spread = pooled.rows.to(dtype).square() @ repeat_heads(var, heads).transpose(-1, -2) * (scale * scale / 2)
    return math.log(sub_block) + scaled_products(pooled.rows, mu, scale) + spread.clamp_max(2.0 * (sub_block - 1))


def row_codes(pooled: PooledRows, options: MassOptions) -> tuple[Tensor, Tensor, int]:
    """Codes and scales of rows as `quantize_rows` has them, and the width of the rotation if keys are single ones."""
    rows, width = pooled.rows, 1
    if options.sub_block == 1:
        rows, width = rotate(rows), rotation_width(rows.shape[3])
    return *quantize_rows(rows, options.bits), width


def squared_codes(codes: Tensor, bits: int) -> tuple[Tensor, int]:
    """Codes of squares, int64, and what they are in units of: 8-bit ones are made to fit a byte."""
    squares = codes.long().square()
    return (squares, 1) if bits == 4 else ((squares + 64) >> 7, 128)


def coded_logits(pooled: PooledRows, moments: Moments, options: MassOptions, scale: float) -> Tensor:
    """`moment_logits` from the codes and without ``ln g``, in 2 ** -16 octaves: int64 ``[B, Hq, np, nk * n_sub]``."""
    heads, dim = pooled.rows.shape[1], pooled.rows.shape[3]
    bits, by_sub = options.bits, options.block_size[1] // options.sub_block
    top, square_top, var_top = (7, 49, 15) if bits == 4 else (127, 126, 127)
    unit = LOG2E * 2.0**FRACTION
    codes, row_scale, width = row_codes(pooled, options)
    row_scale = row_scale.nan_to_num(0.0)

    def terms(codes: Tensor, of_keys: Tensor, row_factor: Tensor, key_scale: Tensor, largest: int) -> Tensor:
        # Products of codes are exact in float64. No term is above 2 ** 29: three of them fit an int32.
        product = (codes.double() @ repeat_heads(of_keys, heads).double().transpose(-1, -2)).long()
        factor = row_factor[..., None] * repeat_heads(key_scale, heads)[:, :, None]
        # A scale of 0 times an infinite factor is NaN, and fmin takes the other; the product is 0 then.
        factor = torch.fmin(factor, float32(2**29 // largest))
        if bits == 4:
            return product * factor.round().long().repeat_interleave(by_sub, -1)
        shift = product_shift(factor)
        factor = (factor * (1 << shift)).round().long().repeat_interleave(by_sub, -1)
        return (product >> shift.repeat_interleave(by_sub, -1)) * factor + (factor >> 1)

    by_row = row_scale * float32(scale / width * unit)
    logits = terms(codes, moments.mean_codes, by_row, moments.mean_scale, dim * top * top)
    if options.sub_block > 1:
        squares, square_unit = squared_codes(codes, bits)
        factor = row_scale * row_scale * square_unit * float32(scale * scale / 2 * unit)
        spread = terms(squares, moments.var_codes, factor, moments.var_scale, dim * square_top * var_top)
        logits = logits + spread.clamp_max(round(2 * (options.sub_block - 1) * unit))
    return logits


def exponentials(logits: Tensor, log_unit: Tensor, sub_block: int) -> Tensor:
    """What sub-blocks of such logits weigh, float32 ``[B, Hq, np, N]``: ``g * 2 ** logit``, up to 2 ** 100 units.

    An exponential is a float32 made of its logarithm's bits: 1 + f stands for 2 ** f.

    Args:
        logits: From `coded_logits`.
        log_unit: Base-2 logarithm of each row's unit, ``[B, Hq, np]``.
        sub_block: Keys a sub-block, g.
    """
    bias = float32(127 - CENTER + math.log2(sub_block)) - log_unit
    logits = logits + (bias * 2**FRACTION).clamp(-(2**29), 2**29).round().long()[..., None]
    return (logits.clamp(0, (127 + 100) << FRACTION) << 23 - FRACTION).int().view(torch.float32)


def product_shift(factor: Tensor) -> Tensor:
    """By how many bits products of 8-bit codes are shortened, 4 to 8, int64: so that they fit beside their factor.

    The factor, float32 and in steps of 2 ** -16 octaves, has 11 bits or more before the point then, if it is not tiny.
    A product loses less than 2 ** -4 octaves, more only where logits reach thousands, and half of it is added again.
    """
    exponent = (factor.view(torch.int32) >> 23) - 127
    return (11 - exponent).clamp(4, 8).long()


def float32(x: float) -> Tensor:
    """A constant rounded to float32, so that products with it are products of float32 numbers."""
    return torch.tensor(x, dtype=torch.float32)
