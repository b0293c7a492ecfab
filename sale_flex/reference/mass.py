# SPDX-License-Identifier: BSD-3-Clause
"""The mass rule: the share of a pooled row's softmax that falls on a block (docs/semantics.md, "The mass rule").

Adjacent query rows are pooled to one. Of every pooled row r, blocks next to the sink and to the row itself are weighed
exactly: ``L_r``, the sum of exponentials over their keys. Every other block J is a candidate, and weighed in low bits:
``S_rJ``, the same sum over its keys divided by ``L_r``. Its mass is ``S_rJ / (1 + sum_J S_rJ)``.

Integers, and all that is rounded on the way to them, are bit for bit what any implementation has. Left to it are the
order of float32 sums, and the rounding of ``L_r``.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sale_flex.reference.common import (
    Choice,
    block_any,
    key_mean,
    quantize_rows,
    repeat_heads,
    rotate,
    rotation_width,
    visible,
)
from sale_flex.reference.moments import Moments, key_moments, quantize_moments

LOG2E = 1.4426950408889634

FRACTION = 16
"""Bits after the point of logarithms to base 2 in fixed point."""

CENTER = 0.0430
"""Octaves that 1 + f is above 2 ** f in the middle of its range: it is 0 to 0.0861 above for f in [0, 1]."""

LEVELS = 128
"""Decisions are made in steps of an eighth of an octave, from one step below the threshold up."""


class MassOptions(NamedTuple):
    """The fields of a `SaleConfig` that the estimate depends on, of any size."""

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
    sink_tokens: int
    """Blocks with one of so many first valid keys are no candidates."""
    local_tokens: int
    """Nor are blocks with one of so many keys up to a row's position."""


class PooledRows(NamedTuple):
    """One row for every `pool` query rows."""

    rows: Tensor
    """float32 ``[B, Hq, np, D]``, numbers of the query's dtype; 0 where all rows are padding."""
    position: Tensor
    """int64 ``[B, np]``: key index at which the last real row stands; -1 where all rows are padding."""


class RowMasses(NamedTuple):
    """How a pooled row's softmax is spread over the blocks, in units of its exact part ``L_r``."""

    sums: Tensor
    """``[B, Hq, np, nk]``: the candidates' ``S_rJ``; 0 for other blocks."""
    total: Tensor
    """``[B, Hq, np]``: 1, for the exact part, and the candidates' sums."""
    candidate: Tensor
    """bool ``[B, 1, np, nk]``: blocks that are estimated for this row. None for padding."""
    finite: Tensor
    """bool ``[B, Hq, np]``: whether the pooled row is; of others, sums and total mean nothing."""

    @property
    def mass(self) -> Tensor:
        """``[B, Hq, np, nk]``: the candidates' shares of the row's softmax; with `rest` they sum to 1."""
        return self.sums / self.total[..., None]

    @property
    def rest(self) -> Tensor:
        """``[B, Hq, np]``: the share of all keys that lie in no candidate."""
        return 1 / self.total


class Decision(NamedTuple):
    """What masses decide; the first three as in `KeepMap`, on candidates."""

    hit: Tensor
    margin: Tensor
    dropped: Tensor
    raised: Tensor
    """int64 ``[B, Hq, nq]``: by how many levels the budget raised the cuts."""


def mass_options(config: Any) -> MassOptions:
    """The options of a `SaleConfig`."""
    return MassOptions(
        block_size=config.block_size,
        pool=config.rule.pool,
        sample=config.rule.pool_mode == "last",
        sub_block=config.rule.sub_block,
        bits=config.rule.bits,
        sink_tokens=config.sink_tokens,
        local_tokens=config.local_tokens,
    )


def pool_rows(query: Tensor, bounds: Tensor, block_q: int, pool: int, sample: bool = False) -> PooledRows:
    """The mean of every `pool` adjacent rows, or with `sample` the last of them, of those that are no padding.

    The sum is taken in float32 from the first row to the last, multiplied by the rounded inverse of their number, and
    rounded to the query's dtype: all bits are determined.
    """
    offset, start, end = (bounds[:, n, None].long() for n in range(3))
    at = torch.arange(query.shape[2], device=query.device)[None] + offset
    real = (at >= start) & (at < end)  # [B, Sq]
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


def candidate_span(bounds: Tensor, q_len: int, options: MassOptions) -> tuple[Tensor, Tensor]:
    """First candidate key block, int64 ``[B]``, and one past the last one of every query block, int64 ``[B, nq]``.

    Between them lie the blocks whose keys are all valid, visible to every real row, and neither sink nor local. A query
    block of padding has none.
    """
    block_q, block_k = options.block_size
    offset, start, end = (bounds[:, n].long() for n in range(3))
    at = torch.arange(q_len + -q_len % block_q, device=bounds.device)[None] + offset[:, None]
    real = (at >= start[:, None]) & (at < end[:, None]) & (at < offset[:, None] + q_len)
    low = torch.where(real, at, -1).unflatten(1, (-1, block_q))
    low = low.masked_fill(low < 0, 2**31).amin(-1)
    stop = torch.where(low < 2**31, (low - options.local_tokens + 1).clamp_min(0) // block_k, 0)
    return (start + options.sink_tokens + block_k - 1) // block_k, stop


def exact_part(
    pooled: PooledRows,
    key: Tensor,
    mean: Tensor,
    bounds: Tensor,
    candidate: Tensor,
    block_k: int,
    scale: float,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """``ln L_r``: the log-sum-exp of a pooled row over visible keys in no candidate block, ``[B, Hq, np]``.

    Keys whose logit is not finite count as absent; -inf where there is none.
    """
    logits = pooled_logits(pooled, key.to(dtype) - mean.to(dtype)[:, :, None], scale)
    seen = _pooled_visible(pooled, bounds, key.shape[2])
    estimated = candidate.repeat_interleave(block_k, -1)[..., : key.shape[2]]
    return logits.masked_fill(~(seen & ~estimated & logits.isfinite()), -torch.inf).logsumexp(-1)


def exact_masses(
    query: Tensor, key: Tensor, bounds: Tensor, options: MassOptions, scale: float | None = None
) -> Tensor:
    """Shares of the pooled rows' softmax that fall on blocks, from exact logits: float64 ``[B, Hq, np, nk]``."""
    block_q, block_k = options.block_size
    scale = query.shape[3] ** -0.5 if scale is None else scale
    pooled = pool_rows(query, bounds, block_q, options.pool, options.sample)
    logits = pooled_logits(pooled, key.double(), scale)
    seen = _pooled_visible(pooled, bounds, key.shape[2])
    weights = logits.masked_fill(~seen, -torch.inf).softmax(-1).masked_fill(~seen, 0.0)
    weights = torch.nn.functional.pad(weights, (0, -key.shape[2] % block_k))
    return weights.unflatten(-1, (-1, block_k)).sum(-1)


def row_masses(
    query: Tensor,
    key: Tensor,
    mean: Tensor,
    bounds: Tensor,
    options: MassOptions,
    scale: float | None = None,
    dtype: torch.dtype = torch.float32,
    quantised: bool = True,
    moments: Moments | None = None,
) -> RowMasses:
    """How every pooled row's softmax is spread, as the estimate has it.

    Args:
        query: ``[B, Hq, Sq, D]``.
        key: ``[B, Hkv, Skv, D]``.
        mean: float32 ``[B, Hkv, D]``, the smoothing mean.
        bounds: int32 ``[B, 3]``.
        options: Sizes and widths.
        scale: Softmax scale; by default ``D ** -0.5``.
        dtype: float32 or float64, for what is not determined to the bit.
        quantised: False for the same formula without codes and fixed point: what the codes stand for.
        moments: Codes to use instead of those of `quantize_moments`.
    """
    block_q, block_k = options.block_size
    scale = query.shape[3] ** -0.5 if scale is None else scale
    pooled = pool_rows(query, bounds, block_q, options.pool, options.sample)
    first, stop = candidate_span(bounds, query.shape[2], options)
    block = torch.arange(-(-key.shape[2] // block_k), device=key.device)
    candidate = (block >= first[:, None, None]) & (block < stop[..., None])  # [B, nq, nk]
    candidate = candidate.repeat_interleave(block_q // options.pool, 1) & (pooled.position >= 0)[..., None]
    candidate = candidate[:, None]
    log_exact = exact_part(pooled, key, mean, bounds, candidate, block_k, scale, dtype)
    if quantised:
        if moments is None:
            moments = quantize_moments(key, mean, bounds, block_k, options.sub_block, options.bits)
        coded = coded_logits(pooled, moments, block_k, options.sub_block, scale, options.bits)
        values = exponentials(coded, log_exact * LOG2E, options.sub_block).to(dtype)
    else:
        mu, var = key_moments(key, mean, bounds, block_k, options.sub_block, dtype)
        values = (moment_logits(pooled, mu, var, options.sub_block, scale) - log_exact[..., None]).exp()
    sums = values.unflatten(-1, (len(block), -1)).sum(-1).masked_fill(~candidate, 0.0)
    return RowMasses(sums, 1 + sums.sum(-1), candidate, pooled.rows.isfinite().all(-1))


def moment_logits(pooled: PooledRows, mu: Tensor, var: Tensor, sub_block: int, scale: float) -> Tensor:
    """Second-order estimate of the log-sum-exp of every sub-block's logits, ``[B, Hq, np, nk * n_sub]``.

    ``ln g + s + min(v / 2, 2 (g - 1))`` with s the mean logit and v the logits' variance, were channels independent.
    The largest of g numbers is at most ``s + sqrt((g - 1) v)`` (Samuelson), and ``v / 2`` is above that square root
    from ``v = 4 (g - 1)`` on, where both are ``2 (g - 1)``: the cap keeps the estimate below ``ln g`` and the largest
    logit that such a mean and variance allow.
    """
    heads, dtype = pooled.rows.shape[1], mu.dtype
    spread = pooled.rows.to(dtype).square() @ repeat_heads(var, heads).transpose(-1, -2) * (scale * scale / 2)
    return math.log(sub_block) + pooled_logits(pooled, mu, scale) + spread.clamp_max(2.0 * (sub_block - 1))


def coded_logits(pooled: PooledRows, moments: Moments, block_k: int, sub_block: int, scale: float, bits: int) -> Tensor:
    """`moment_logits` from the codes and without ``ln g``, in 2 ** -16 octaves: int64 ``[B, Hq, np, nk * n_sub]``."""
    heads, dim = pooled.rows.shape[1], pooled.rows.shape[3]
    top, square_top, var_top = (7, 49, 15) if bits == 4 else (127, 126, 127)
    unit = LOG2E * 2.0**FRACTION
    rows, width = (rotate(pooled.rows), rotation_width(dim)) if sub_block == 1 else (pooled.rows, 1)
    codes, row_scale = quantize_rows(rows, bits)
    row_scale = row_scale.nan_to_num(0.0)

    def terms(codes: Tensor, of_keys: Tensor, row_factor: Tensor, key_scale: Tensor, largest: int) -> Tensor:
        # Products of codes are exact in float64. No term is above 2 ** 29: three of them fit an int32.
        product = (codes.double() @ repeat_heads(of_keys, heads).double().transpose(-1, -2)).long()
        factor = row_factor[..., None] * repeat_heads(key_scale, heads)[:, :, None]
        # A scale of 0 times an infinite factor is NaN, and fmin takes the other; the product is 0 then.
        factor = torch.fmin(factor, _float32(2**29 // largest))
        by_sub = block_k // sub_block
        if bits == 4:
            return product * factor.round().long().repeat_interleave(by_sub, -1)
        shift = product_shift(factor)
        factor = (factor * (1 << shift)).round().long().repeat_interleave(by_sub, -1)
        return (product >> shift.repeat_interleave(by_sub, -1)) * factor + (factor >> 1)

    by_row = row_scale * _float32(scale / width * unit)
    logits = terms(codes, moments.mean_codes, by_row, moments.mean_scale, dim * top * top)
    if sub_block > 1:
        squares = codes.long().square()
        squares = squares if bits == 4 else (squares + 64) >> 7
        factor = row_scale * row_scale * (1 if bits == 4 else 128) * _float32(scale * scale / 2 * unit)
        spread = terms(squares, moments.var_codes, factor, moments.var_scale, dim * square_top * var_top)
        logits = logits + spread.clamp_max(round(2 * (sub_block - 1) * LOG2E * 2**FRACTION))
    return logits


def exponentials(logits: Tensor, log_unit: Tensor, sub_block: int) -> Tensor:
    """What sub-blocks of such logits weigh, float32 ``[B, Hq, np, N]``: ``g * 2 ** logit``, up to 2 ** 100 units.

    An exponential is a float32 made of its logarithm's bits: 1 + f stands for 2 ** f.

    Args:
        logits: From `coded_logits`.
        log_unit: Base-2 logarithm of each row's unit, ``[B, Hq, np]``.
        sub_block: Keys a sub-block, g.
    """
    bias = _float32(127 - CENTER + math.log2(sub_block)) - log_unit
    logits = logits + (bias * 2**FRACTION).clamp(-(2**29), 2**29).round().long()[..., None]
    return (logits.clamp(0, (127 + 100) << FRACTION) << 23 - FRACTION).int().view(torch.float32)


def product_shift(factor: Tensor) -> Tensor:
    """By how many bits products of 8-bit codes are shortened, 4 to 8, int64: so that they fit beside their factor.

    The factor, float32 and in steps of 2 ** -16 octaves, has 11 bits or more before the point then, if it is not tiny.
    A product loses less than 2 ** -4 octaves, more only where logits reach thousands, and half of it is added again.
    """
    exponent = (factor.view(torch.int32) >> 23) - 127
    return (11 - exponent).clamp(4, 8).long()


def mass_choice(
    query: Tensor,
    key: Tensor,
    bounds: Tensor,
    config: Any,
    scale: float,
    dtype: torch.dtype = torch.float32,
    budget: int | None = None,
    moments: Moments | None = None,
) -> Choice:
    """The blocks that take at least the threshold of some pooled row's softmax.

    Asked for without a mass are blocks with a key that is not finite, and a block that padding on the left cuts: it is
    no candidate, and no sink if there are none. A pooled row that is not finite asks for all its candidates.

    Args:
        query: ``[B, Hq, Sq, D]``.
        key: ``[B, Hkv, Skv, D]``.
        bounds: int32 ``[B, 3]``.
        config: The fields of `sale_flex.SaleConfig`.
        scale: Softmax scale.
        dtype: float32 or float64.
        budget: Most candidates that a query block may ask for by their masses; None for all.
        moments: Codes to use instead of those of `quantize_moments`.
    """
    options = mass_options(config)
    block_q, block_k = options.block_size
    mean = key_mean(key, bounds, config.smooth_tokens)
    if moments is None:
        moments = quantize_moments(key, mean, bounds, block_k, options.sub_block, options.bits)
    masses = row_masses(query, key, mean, bounds, options, scale, dtype, moments=moments)
    first, stop = candidate_span(bounds, query.shape[2], options)
    block = torch.arange(moments.nonfinite.shape[2], device=key.device)
    before = (block < first[:, None, None]) & (block < stop[..., None])  # [B, nq, nk]
    seen = block_any(visible(bounds, query.shape[2], key.shape[2]), block_q, block_k)
    unasked = (repeat_heads(moments.nonfinite, query.shape[1])[:, :, None] | before[:, None]) & seen[:, None]
    threshold = torch.as_tensor(config.rule.threshold, dtype=torch.float32, device=key.device).expand(query.shape[1])
    hit, margin, dropped, _ = decide(masses, threshold[:, None], unasked, block_q // options.pool, budget)
    return Choice(hit | unasked, margin.masked_fill(unasked, torch.inf), dropped)


def decide(masses: RowMasses, threshold: Tensor, unasked: Tensor, rows: int, budget: int | None) -> Decision:
    """Which blocks their masses hit; `unasked` blocks do not count for the budget.

    A level is a float's bits from the threshold's on, in eighths of an octave of a straight mantissa, rounded down: 1
    at the threshold, 0 below it and 127 at most. A block is hit if the level of a pooled row's sum is not below the
    level of the row's cut, the threshold times its total. Where that makes more blocks than the budget, cuts rise level
    by level, as often as it takes, and rows that are not finite ask for nothing.

    Args:
        masses: Of all pooled rows.
        threshold: float32 ``[Hq, 1]``.
        unasked: bool ``[B, Hq, nq, nk]``.
        rows: Pooled rows a query block.
        budget: Most hits of a query block.
    """

    def by_block(x: Tensor) -> Tensor:
        return x.unflatten(2, (-1, rows))

    def level(x: Tensor) -> Tensor:
        # Steps of 2 ** 20 in the bits of a float32, whose mantissa has 23.
        above = x.float().view(torch.int32).double() - base.view(torch.int32).double()[..., None]
        return above / 2**20 + 1

    base = threshold.clamp_max(1.0).expand_as(masses.total).contiguous()
    of_sum = level(masses.sums.contiguous()).clamp(0, LEVELS - 1e-3)  # [B, Hq, np, nk]
    of_cut = level((base * masses.total)[..., None]).clamp(0, LEVELS - 1e-3)  # [B, Hq, np, 1]
    never = (threshold >= 1)[..., None]
    nonfinite = ~masses.finite[..., None]
    always = nonfinite | (threshold == 0)[..., None]  # until the budget raises the cut

    def hits(raised: Tensor) -> Tensor:
        """What is hit with cuts that many levels higher, ``[B, Hq, nq]``."""
        of_row = raised.repeat_interleave(rows, 2)[..., None]
        hit = of_sum.floor() >= (of_cut.floor() + of_row).clamp_max(LEVELS)
        hit = torch.where(of_row == 0, hit & ~never | always, hit & ~never & ~nonfinite)
        return by_block(hit & masses.candidate).any(3)

    raised = torch.zeros_like(by_block(masses.total)[..., 0], dtype=torch.int64)
    asked = hit = hits(raised)
    while budget is not None and bool((over := (hit & ~unasked).sum(-1) > budget).any()):
        raised = raised + over
        hit = hits(raised)
    of_row = raised.repeat_interleave(rows, 2)[..., None]
    margin = _level_margin(of_sum, of_cut + of_row) / 16
    margin = margin.masked_fill(never | nonfinite, -torch.inf).masked_fill(always & (of_row == 0), torch.inf)
    margin = margin.masked_fill(~masses.candidate, -torch.inf)
    return Decision(hit, by_block(margin).amax(3), asked & ~hit & ~unasked, raised)


def _level_margin(a: Tensor, b: Tensor) -> Tensor:
    """How far both a and b have to move for ``floor(a) >= floor(b)`` to change; negative where it does not hold.

    A nat is at most 16 levels: that is the slope of a straight mantissa where it is steepest.
    """
    # It does not hold if a whole number n has a < n <= b. Where none has, the nearest to both are about the middle.
    middle = ((a + b) / 2).floor()
    holds = torch.minimum(torch.maximum(a - middle, middle - b), torch.maximum(a - middle - 1, middle + 1 - b))
    # Where some have, a moves up to the last of some of them, and b down to below the first of the others.
    first, last = a.floor() + 1, b.floor()
    split = ((a + b - 1) / 2).floor()
    moves = []
    for n in (split, split + 1):
        n = torch.minimum(torch.maximum(n, first - 1), last)
        moves.append(torch.maximum(torch.where(n >= first, n - a, 0.0), torch.where(n < last, b - n - 1, 0.0)))
    return torch.where(a.floor() >= b.floor(), holds, -torch.minimum(*moves))


def pooled_logits(pooled: PooledRows, key: Tensor, scale: float) -> Tensor:
    """``scale * row . key`` in the key's dtype, ``[B, Hq, np, N]``."""
    return pooled.rows.to(key.dtype) @ repeat_heads(key, pooled.rows.shape[1]).transpose(-1, -2) * scale


def _pooled_visible(pooled: PooledRows, bounds: Tensor, kv_len: int) -> Tensor:
    """Which keys the last real row of each pool sees, bool ``[B, 1, np, Skv]``."""
    at = torch.arange(kv_len, device=bounds.device)
    return ((at >= bounds[:, 1, None, None]) & (at <= pooled.position[..., None]))[:, None]


def _float32(x: float) -> Tensor:
    """A constant rounded to float32, so that products with it are products of float32 numbers."""
    return torch.tensor(x, dtype=torch.float32)
