# SPDX-License-Identifier: BSD-3-Clause
"""The estimate of row masses, and what it decides, in tiles; see `sale_flex.kernels.mass` for the contract.

Masses are shares of a pooled row's softmax, in fixed point but for what is weighed exactly. Under a score_mod, which is
inside the exponential, they are logarithms: `mass_scored`. Products of codes are taken in float32, where they are
exact: at most 127 * 127 * 256 < 2**24.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from sale_flex.blocks.bits import pack_bits
from sale_flex.kernels.arguments import Grid, KeyMoments, MaskSpec, MassOptions, Near, Structure
from sale_flex.ops.fallback import mass_scored
from sale_flex.ops.fallback.mass_tiles import CodedKeys, Tile, mass_tiles
from sale_flex.ops.fallback.quantize import quantize_rows
from sale_flex.ops.fallback.rotation import rotated, rotation_width
from sale_flex.ops.fallback.tiles import (
    ALWAYS,
    HIDDEN,
    PARTIAL,
    WHOLE,
    any_block,
    any_in_block,
    at_blocks,
    before_local,
    put_at_blocks,
)
from sale_flex.ops.fallback.visibility import Score

LOG2E = 1.4426950408889634

FRACTION = 16
"""Bits after the point of the fixed-point logarithms."""

CENTER = 0.0430
"""How many octaves 1 + f lies above 2 ** f in the middle of its range, f in [0, 1]."""

LEVELS = 128
"""Decisions are made in steps of an eighth of an octave, from one step below the threshold up."""

ABSENT = -1e38
"""The logit of a key whose own is not finite, in an exact part: it counts for nothing there, but the row sees a key."""


class Masses(NamedTuple):
    """What the rows of a tile see in candidates, in units of their own, and what `decide` makes of it."""

    columns: Tensor
    """int64 ``[J]``: blocks that are candidates of some query block."""
    sums: Tensor
    """float32 ``[G, n, R, J]``; 0 where a block is no candidate."""
    finite: Tensor
    """bool ``[G, n, R]``: which rows are."""
    candidate: Tensor
    """bool ``[G or 1, n, R, J]``: what rows may ask for."""
    exact: Tensor
    """float32 ``[G, n, R]``: what they see in always-kept blocks: 1, or 0 where they see none."""
    unasked: Tensor
    """bool ``[G or 1, n, nk]``: blocks that are hit anyhow."""


def mass_hits(
    query: Tensor,
    key: Tensor,
    mean: Tensor,
    moments: KeyMoments,
    spec: MaskSpec,
    structure: Structure | None,
    score: Score | None,
    threshold: Tensor,
    scale: float,
    grid: Grid,
    options: MassOptions,
    near: Near,
    budget: int,
) -> tuple[Tensor, Tensor]:
    """Hit bits int32 ``[B, Hq, nq, ceil(nk / 32)]``, and int32 ``[B, Hq, nq]``: hits given up for the budget."""
    lines = (*query.shape[:2], grid.query_blocks)
    hits = torch.zeros(*lines, grid.words, dtype=torch.int32, device=query.device)
    dropped = torch.zeros(lines, dtype=torch.int32, device=query.device)
    arguments = query, key, mean, moments, spec, structure
    if score is not None:
        for tile, weights in mass_scored.log_masses(*arguments, score, scale, grid, options, near):
            limit = threshold[tile.heads, None, None]
            hit, lost = mass_scored.decide(weights, tile.flagged, limit, budget)
            hits[tile.b, tile.heads, tile.blocks] = pack_bits(hit)
            dropped[tile.b, tile.heads, tile.blocks] = lost
        return hits, dropped
    for tile, masses in row_masses(*arguments, scale, grid, options, near):
        hit, lost = decide(masses, tile.flagged[masses.columns], threshold[tile.heads, None, None], budget)
        found = masses.unasked.repeat(len(hit) // len(masses.unasked), 1, 1)
        found[..., masses.columns] |= hit
        hits[tile.b, tile.heads, tile.blocks] = pack_bits(found)
        dropped[tile.b, tile.heads, tile.blocks] = lost
    return hits, dropped


def row_masses(
    query: Tensor,
    key: Tensor,
    mean: Tensor,
    moments: KeyMoments,
    spec: MaskSpec,
    structure: Structure | None,
    scale: float,
    grid: Grid,
    options: MassOptions,
    near: Near,
) -> Iterator[tuple[Tile, Masses]]:
    """The masses of all tiles with a row that is no padding, without a score_mod; arguments as of `mass_hits`."""
    bounds = spec.bounds.tolist()
    for tile in mass_tiles(query, key, mean, moments, spec, structure, scale, grid, options, near):
        start = bounds[tile.b][1]
        at = torch.arange(grid.key_blocks, device=query.device) * grid.block_k
        candidate = (tile.kinds == PARTIAL) | (tile.kinds == WHOLE)
        if structure is None:
            # Kernels set the bits of sinks and of blocks that are not finite without asking who sees them.
            sinks = at < start + near.sink_tokens
            unasked = tile.flagged | (
                sinks & before_local(tile.blocks, bounds[tile.b], grid, near.local_tokens, at.device)
            )
            unasked = unasked[None]
        else:
            unasked = candidate & (tile.flagged | (at < start))
        # A block that padding on the left cuts is no sink where there are none. It is kept, and of the exact part.
        kinds = torch.where((tile.kinds == PARTIAL) & (at < start), ALWAYS, tile.kinds)
        yield tile, _masses(tile._replace(kinds=kinds), unasked, scale, grid, options)


def _masses(tile: Tile, unasked: Tensor, scale: float, grid: Grid, options: MassOptions) -> Masses:
    """The masses of a tile, of which blocks in `unasked` are hit anyhow."""
    kinds, near_kinds = _of_codes_where_all_is_seen(tile, grid)
    sees = tile.sees

    def of_kind(kind: int) -> Tensor:
        return sees & (near_kinds == kind).repeat_interleave(grid.block_k, -1)[:, :, None]

    exact = tile.logits.nan_to_num(ABSENT, ABSENT, ABSENT).masked_fill_(~of_kind(ALWAYS), -torch.inf)
    exact = exact.logsumexp(-1) * LOG2E  # [G, n, R]
    partial = None
    if bool((near_kinds == PARTIAL).any()):
        partial = tile.logits.masked_fill(~(of_kind(PARTIAL) & tile.logits.isfinite()), -torch.inf)
        partial = partial.unflatten(-1, (-1, grid.block_k)).logsumexp(-1) * LOG2E
    far = any_block(kinds == WHOLE)
    whole = (kinds[..., far] == WHOLE)[:, :, None]  # [G or 1, n, 1, J]
    of_far = tile.coded(far, grid.block_k // options.sub_block)
    coded, finite = coded_logits(tile.rows, of_far, options.sub_block, scale, options.bits)
    own = exact > -torch.inf
    all_own = not bool((tile.exists & ~own).any())
    unit = exact if all_own else torch.where(own, exact, _unit_without_exact(coded, whole, partial, options.sub_block))
    unit = torch.where(unit > -torch.inf, unit, 0.0)

    columns, sums = far, sums_of_logits(coded, unit, options.sub_block).masked_fill_(~whole, 0.0)
    if partial is not None:
        every = torch.zeros(*unit.shape, grid.key_blocks + 1, device=unit.device)
        every[..., far] = sums
        of_partial = (partial - unit[..., None]).clamp_max_(100).exp2_()
        every.scatter_add_(-1, tile.near[:, :, None].expand_as(of_partial), of_partial)
        columns = any_block((kinds == PARTIAL) | (kinds == WHOLE))
        sums = every[..., columns]
    candidate = ((kinds == PARTIAL) | (kinds == WHOLE))[:, :, None, columns] & tile.exists[..., None]
    if not all_own:
        # A row that sees nothing asks for nothing, if it is finite.
        candidate = candidate & (own | sums.any(-1) | ~finite)[..., None]
    return Masses(columns, sums, finite, candidate, own.float(), unasked)


def _of_codes_where_all_is_seen(tile: Tile, grid: Grid) -> tuple[Tensor, Tensor]:
    """Kinds of all blocks, and of `Tile.near`; partial ones that all rows see are whole.

    Where rows of a query block are padding no block is full, yet what all other rows see is weighed from codes.
    """
    near_kinds = at_blocks(tile.kinds, tile.near, HIDDEN)
    if not bool((near_kinds == PARTIAL).any()):
        return tile.kinds, near_kinds
    blind = any_in_block(tile.real[..., None] & ~tile.visible, grid.block_k)
    near_kinds = torch.where((near_kinds == PARTIAL) & ~blind, WHOLE, near_kinds)
    return put_at_blocks(tile.kinds, tile.near, near_kinds), near_kinds


def _unit_without_exact(coded: Tensor, whole: Tensor, partial: Tensor | None, sub_block: int) -> Tensor:
    """Half of the most that a row sees in a candidate, ``[G, n, R]``: the unit of rows that are kept nothing anyhow."""
    largest = torch.full(coded.shape[:3], -torch.inf, device=coded.device)
    if coded.shape[3]:
        of_codes = coded.amax(-1).float() / 2**FRACTION + math.log2(sub_block)
        largest = of_codes.masked_fill(~whole, -torch.inf).amax(-1)
    if partial is not None:
        largest = torch.maximum(largest, partial.logsumexp(-1))
    return largest - 1


def coded_logits(pooled: Tensor, keys: CodedKeys, sub_block: int, scale: float, bits: int) -> tuple[Tensor, Tensor]:
    """Base-2 logits of sub-blocks in fixed point: int32 ``[G, N, R, J, subs]``, and which rows are finite."""
    dim = pooled.shape[3]
    top, square_top, var_top = (7, 49, 15) if bits == 4 else (127, 126, 127)
    unit = LOG2E * 2.0**FRACTION
    width = rotation_width(dim) if sub_block == 1 else 1
    codes, row_scale = quantize_rows(rotated(pooled) if sub_block == 1 else pooled, bits, False)
    codes = codes[:, :, : pooled.shape[2]].float()  # not what fills a tile
    finite = row_scale.isfinite()
    row_scale = torch.where(finite, row_scale, 0.0)
    by_row = row_scale * _float32(scale / width * unit)
    logits = _terms(codes, keys.mean_codes, by_row, keys.mean_scale, dim * top * top, bits)
    if keys.var_codes is not None and keys.var_scale is not None:
        squares = codes.square() if bits == 4 else codes.square().add_(64).div_(128).floor_()
        factor = row_scale * row_scale * (1 if bits == 4 else 128) * _float32(scale * scale / 2 * unit)
        spread = _terms(squares, keys.var_codes, factor, keys.var_scale, dim * square_top * var_top, bits)
        logits += spread.clamp_max_(round(2 * (sub_block - 1) * LOG2E * 2**FRACTION))
    return logits, finite


def sums_of_logits(logits: Tensor, unit: Tensor, sub_block: int) -> Tensor:
    """Sums over blocks in units of ``2 ** unit``, float32 ``[G, N, R, J]``; the logits are written over.

    Args:
        logits: From `coded_logits`.
        unit: float32 ``[G, N, R]``.
        sub_block: Keys a sub-block.
    """
    bias = (_float32(127 - CENTER + math.log2(sub_block)) - unit) * 2**FRACTION
    logits += bias.clamp(-(2**29), 2**29).round().int()[..., None, None]
    # The bits of a float32: 1 + f for 2 ** f.
    values = (logits.clamp_(0, (127 + 100) << FRACTION) << 23 - FRACTION).view(torch.float32)
    return values.sum(-1)


def _terms(codes: Tensor, of_keys: Tensor, row_factor: Tensor, key_scale: Tensor, largest: int, bits: int) -> Tensor:
    """Products of codes times their scales in fixed point, int32 ``[G, N, R, J, subs]``, at most 2**29 each.

    Args:
        codes: float32 ``[G, N, R, D]``.
        of_keys: float32 ``[J, subs, D]``.
        row_factor: float32 ``[G, N, R]``.
        key_scale: float32 ``[J]``.
        largest: The largest product.
        bits: 4 or 8: products of 8 are shortened, by so much that they fit beside their factor.
    """
    product = (codes @ of_keys.flatten(0, 1).T).int().unflatten(-1, (-1, of_keys.shape[1]))
    # A scale of 0 times an infinite factor is NaN, and fmin takes the other; the product is 0 then.
    factor = torch.fmin(row_factor[..., None] * key_scale, _float32(2**29 // largest))
    if bits == 4:
        return product.mul_(factor.round_().int()[..., None])
    shift = (138 - (factor.view(torch.int32) >> 23)).clamp_(4, 8)
    factor = (factor * (1 << shift)).round_().int()
    return (product >> shift[..., None]).mul_(factor[..., None]).add_((factor >> 1)[..., None])


def decide(masses: Masses, flagged: Tensor, threshold: Tensor, budget: int) -> tuple[Tensor, Tensor]:
    """Hits, bool ``[G, N, J]``, and how many more passed the threshold than the budget takes, int32 ``[G, N]``.

    Args:
        masses: What rows see.
        flagged: bool ``[J]``: blocks that are hit anyhow, and do not count.
        threshold: float32 ``[G, 1, 1]``.
        budget: Most hits of a query block.
    """
    _, sums, finite, candidate, exact, _ = masses
    base = threshold.clamp_max(1.0)
    of_sum = _levels(sums, base[..., None])
    of_cut = _levels(base * (exact + sums.sum(-1)), base)
    never = (threshold >= 1).expand_as(of_cut)
    at_least = torch.where(finite & (threshold > 0), of_cut.masked_fill(never, LEVELS), 0)

    def hits(cut: Tensor) -> Tensor:
        return ((of_sum >= cut[..., None]) & candidate).any(2)

    hit = hits(at_least)
    wanted = (hit & ~flagged).sum(-1, dtype=torch.int32)
    count = wanted
    raised = torch.zeros_like(wanted)
    while bool((count > budget).any()):
        # Rows that are not finite ask for everything, and have to give it up first.
        raised += count > budget
        cut = (of_cut + raised[..., None]).clamp_max(LEVELS).masked_fill(~finite | never, LEVELS)
        hit = hits(torch.where((raised > 0)[..., None], cut, at_least))
        count = (hit & ~flagged).sum(-1, dtype=torch.int32)
    return hit, wanted - count


def _levels(x: Tensor, base: Tensor) -> Tensor:
    """Eighths of an octave of x above `base`, of a straight mantissa and rounded down: 1 at `base`, 0 to 127."""
    return ((x.view(torch.int32) - base.view(torch.int32) + 2**20) >> 20).clamp(0, LEVELS - 1)


def _float32(x: float) -> Tensor:
    """A constant rounded to float32, so that products with it are products of float32 numbers."""
    return torch.tensor(x, dtype=torch.float32)
