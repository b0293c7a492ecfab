# SPDX-License-Identifier: BSD-3-Clause
"""The mass rule under a score_mod: masses are logarithms, compared as they are; see `sale_flex.kernels.mass`."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from sale_flex.kernels.arguments import Grid, KeyMoments, MaskSpec, MassOptions, Near, Structure
from sale_flex.ops.fallback.mass_tiles import Tile, mass_tiles
from sale_flex.ops.fallback.quantize import quantize_rows
from sale_flex.ops.fallback.rotation import rotated, rotation_width
from sale_flex.ops.fallback.tiles import PARTIAL, WHOLE, any_block, keys_of, put_at_blocks
from sale_flex.ops.fallback.visibility import Score, scored

STEP = math.log(2) / 8
"""How far a budget raises cuts at a time, in nats: an eighth of an octave."""

FLOOR = -100 * math.log(2)
"""Where the cut of threshold 0 stands below the total when a budget begins to raise it, in nats."""


class LogMasses(NamedTuple):
    """What the rows of a tile see in blocks."""

    weights: Tensor
    """float32 ``[G, n, R, nk]``: natural logarithms; -inf in hidden blocks."""
    finite: Tensor
    """bool ``[G, n, R]``: which rows are, and those that are not there."""
    candidate: Tensor
    """bool ``[G or 1, n, nk]``."""


def log_masses(
    query: Tensor,
    key: Tensor,
    mean: Tensor,
    moments: KeyMoments,
    spec: MaskSpec,
    structure: Structure | None,
    score: Score,
    scale: float,
    grid: Grid,
    options: MassOptions,
    near: Near,
) -> Iterator[tuple[Tile, LogMasses]]:
    """The masses of all tiles with a row that is no padding; arguments as of `mass.mass_hits`."""
    group = query.shape[1] // key.shape[1]
    for tile in mass_tiles(query, key, None, moments, spec, structure, scale, grid, options, near):
        logits = scored(score, tile.logits, tile.b, tile.heads, tile.last[..., None], tile.keys[:, :, None], grid)
        logits = logits.masked_fill(~(tile.sees & logits.isfinite()), -torch.inf)
        of_near = logits.unflatten(-1, (-1, grid.block_k)).logsumexp(-1)
        weights = torch.full((*tile.rows.shape[:3], grid.key_blocks), -torch.inf, device=query.device)
        weights = put_at_blocks(weights, tile.near[:, :, None], of_near)
        whole = tile.kinds == WHOLE
        far = any_block(whole)
        shift = (tile.rows @ mean[tile.b, tile.heads.start // group]) * scale
        of_far, finite = _coded(tile, far, shift, score, scale, grid, options)
        weights[..., far] = torch.where(whole[:, :, None, far], of_far, weights[..., far])
        weights.masked_fill_(~tile.exists[..., None], -torch.inf)
        yield tile, LogMasses(weights, finite | ~tile.exists, whole | (tile.kinds == PARTIAL))


def _coded(
    tile: Tile, blocks: Tensor, shift: Tensor, score: Score, scale: float, grid: Grid, options: MassOptions
) -> tuple[Tensor, Tensor]:
    """Log-sum-exp of rows over blocks of which they see all keys, ``[G, n, R, J]``, and which rows are finite.

    A sub-block's score is taken at its middle key.

    Args:
        tile: Rows.
        blocks: int64 ``[J]``.
        shift: float32 ``[G, n, R]``: the logit of the smoothing mean.
        score: The score_mod.
        scale: Softmax scale.
        grid: Lengths and blocks.
        options: Widths.
    """
    sub_block, subs = options.sub_block, grid.block_k // options.sub_block
    keys = tile.coded(blocks, subs)
    codes, code_scale = quantize_rows(rotated(tile.rows) if sub_block == 1 else tile.rows, options.bits, False)
    codes = codes[:, :, : tile.rows.shape[2]].float()
    width = rotation_width(codes.shape[-1]) if sub_block == 1 else 1
    logits = _product(codes, keys.mean_codes, code_scale * (scale / width), keys.mean_scale) + shift[..., None]
    middle = keys_of(blocks, subs) * sub_block + sub_block // 2
    logits = scored(score, logits, tile.b, tile.heads, tile.last[..., None], middle, grid)
    logits = torch.where(logits.isfinite(), logits, -torch.inf)
    if keys.var_codes is not None and keys.var_scale is not None:
        squares = codes.square() if options.bits == 4 else codes.square().add_(64).div_(128).floor_()
        unit = (1 if options.bits == 4 else 128) * (scale * scale / 2)
        spread = _product(squares, keys.var_codes, code_scale * code_scale * unit, keys.var_scale)
        # An infinite factor times 0 is NaN, and fmin takes the bound.
        logits = logits + torch.fmin(spread, torch.tensor(2.0 * (sub_block - 1)))
    sums = (logits + math.log(sub_block)).unflatten(-1, (-1, subs)).logsumexp(-1)
    return sums, code_scale.isfinite()


def _product(codes: Tensor, of_keys: Tensor, row_factor: Tensor, key_scale: Tensor) -> Tensor:
    """``[G, n, R, D]`` times ``[J, subs, D]`` codes, times their scales ``[G, n, R]`` and ``[J]``."""
    factor = row_factor[..., None] * key_scale.repeat_interleave(of_keys.shape[1])
    return (codes @ of_keys.flatten(0, 1).T) * factor


def decide(masses: LogMasses, flagged: Tensor, threshold: Tensor, budget: int) -> tuple[Tensor, Tensor]:
    """Hits, bool ``[G, n, nk]``, and how many more passed the threshold than the budget takes, int32 ``[G, n]``.

    Args:
        masses: What rows see.
        flagged: bool ``[nk]``: blocks that are hit anyhow, and do not count.
        threshold: float32 ``[G, 1, 1]``.
        budget: Most hits of a query block.
    """
    weights, finite, candidate = masses
    cut = cuts(masses, threshold[..., None])
    never = ~finite | (threshold >= 1)
    # A row that sees nothing has a cut of -inf: its weights are -inf too, and reach nothing.
    above = torch.where((weights > -torch.inf) & ~never[..., None], weights - cut, -torch.inf).amax(2)
    unasked = (~finite.all(-1) | (threshold == 0)[..., 0])[..., None]  # until the budget raises the cut
    hit = candidate & (unasked | (above >= 0))
    wanted = (hit & ~flagged).sum(-1, dtype=torch.int32)
    count, raised = wanted, torch.zeros_like(wanted)
    while bool((over := count > budget).any()):
        raised += over
        hit = torch.where((raised > 0)[..., None], candidate & (above >= raised[..., None] * STEP), hit)
        count = (hit & ~flagged).sum(-1, dtype=torch.int32)
    return hit | (candidate & flagged), wanted - count


def cuts(masses: LogMasses, threshold: Tensor) -> Tensor:
    """What weights must reach, ``[G, n, R, T]``, for T thresholds, or thresholds that broadcast with that."""
    return masses.weights.logsumexp(-1, keepdim=True) + torch.where(threshold > 0, threshold.log(), FLOOR)
