# SPDX-License-Identifier: BSD-3-Clause
"""What every block of a plain causal call scores: the largest threshold at which its rule still hits it.

One pass instead of a scan per threshold. Scores are steps of `LADDER`, on which they say exactly what the rules' torch
implementations (`sale_flex.fallback`) decide: the mass rule compares in eighths of an octave, and so do these steps.
"""

import torch
from torch import Tensor

from sale_flex import ops
from sale_flex.bits import unpack_bits
from sale_flex.config import SaleConfig
from sale_flex.fallback import mass, row_limits, scan
from sale_flex.fallback.pool import exact_part, pool_rows
from sale_flex.geometry import Grid
from sale_flex.rules import RULES

LADDER = (*(2.0**-octave * (1 + eighth / 8) for octave in range(14, 0, -1) for eighth in range(8)), 1.0)
"""Thresholds from 2**-14 to 1, ascending: eight to an octave, evenly spaced inside it as a float's mantissa is."""

_GPU_ELEMENTS = 2**26
"""Estimates held at once on a GPU: 256 MiB in each of a few tensors."""


def block_scores(query: Tensor, key: Tensor, config: SaleConfig, bounds: Tensor, scale: float) -> Tensor:
    """Scores of all blocks under the rule of `config`, whose threshold is not used.

    At a threshold t that is 0 or on `LADDER`, a candidate block (neither hidden nor always kept) is hit if and only if
    its score is t or more. Those of other blocks mean nothing.

    Args:
        query: ``[B, Hq, Sq, D]``.
        key: ``[B, Hkv, Skv, D]``.
        config: Rule, blocks and estimate.
        bounds: int32 ``[B, 3]`` = (q_offset, start, end).
        scale: Softmax scale.

    Returns:
        float32 ``[B, Hq, nq, nk]``: 0 or a step of `LADDER`; inf for a block that is hit at every threshold, as
        non-finite ones are; -inf where nothing is a candidate.
    """
    codes = RULES[config.metric].codes(key, bounds, config)
    scores = _mass_scores if config.metric == "mass" else _relative_scores
    return scores(query, key, codes, config, bounds, scale)


def _mass_scores(
    query: Tensor, key: Tensor, codes: tuple[Tensor, ...], config: SaleConfig, bounds: Tensor, scale: float
) -> Tensor:
    """`mass.mass_hits` at all thresholds: the same tiles, so that sums are taken in the same order."""
    mean, mean_codes, mean_scale, var_codes, var_scale, nonfinite = codes
    block_q, block_k = config.block_size
    sample = config.query_stride is not None
    pool = config.query_pool if config.query_stride is None else config.query_stride
    sub_block = config.sub_block if config.estimator == "moments" else 1
    heads, kv_heads = query.shape[1], key.shape[1]
    grid = Grid(query.shape[2], key.shape[2], block_q, block_k)
    subs, group = block_k // sub_block, heads // kv_heads
    scores = _nothing(query, grid)
    flags = unpack_bits(nonfinite, grid.key_blocks)
    widest = max(grid.key_blocks * subs, min(config.sink_tokens + block_k, grid.kv_len))
    widest += config.local_tokens + block_q + block_k
    blocks = max(1, _at_once(mass.TILE_ELEMENTS, query) // (group * block_q // pool * widest))
    at = torch.arange(grid.key_blocks, device=query.device)
    for b, row in enumerate(bounds.tolist()):
        for block in range(0, grid.query_blocks, blocks):
            here = slice(block, min(block + blocks, grid.query_blocks))
            tile = mass.tile_of(here, row, grid, pool, config.sink_tokens, config.local_tokens, query.device)
            if tile is None:
                continue
            columns = slice(tile.first, max(int(tile.stop.max()), tile.first))
            allowed = (at[columns] < tile.stop[:, None])[:, None]  # [N, 1, J]
            before = (at < tile.stop[:, None]) & (at < tile.first)
            subs_at = slice(columns.start * subs, columns.stop * subs)
            lines = slice(here.start * block_q, here.stop * block_q)
            for head in range(kv_heads):
                shared = slice(head * group, (head + 1) * group)
                pooled = pool_rows(query[b, shared, lines], tile.real, pool, sample)
                pooled = pooled.unflatten(1, (-1, block_q // pool))  # [G, N, R, D]
                exact = exact_part(
                    pooled, tile.position, key[b, head], mean[b, head], row[1], tile.sink_stop, tile.local_start, scale
                )
                keys = mass.Keys(
                    mean_codes[b, head, subs_at].float().unflatten(0, (-1, subs)),
                    mean_scale[b, head, columns],
                    var_codes[b, head, subs_at].float().unflatten(0, (-1, subs)) if sub_block > 1 else None,
                    var_scale[b, head, columns] if sub_block > 1 else None,
                )
                sums, finite = mass.block_sums(pooled, exact, keys, sub_block, scale, config.bits)
                sums.masked_fill_(~allowed, 0.0)
                reached = _steps_reached(_eighths(sums), _mass_limits(sums, finite))
                reached.masked_fill_(~(allowed & (tile.position >= 0)[..., None]), 0)
                found = torch.where(before | flags[b, head], torch.inf, -torch.inf).repeat(group, 1, 1)
                found[..., columns] = torch.maximum(found[..., columns], _scores_of(reached.amax(2)))
                scores[b, shared, here] = found
    return scores


def _mass_limits(sums: Tensor, finite: Tensor) -> Tensor:
    """Least `_eighths` with which a block of a row is hit, for 0, every step and infinity: int32 ``[..., R, 115]``."""
    steps = torch.tensor(LADDER, device=sums.device)
    cut = _eighths(steps * (1 + sums.sum(-1, keepdim=True)))
    # Levels end at 127, one of which lies below the threshold.
    limits = torch.minimum(cut, _eighths(steps) + (mass.LEVELS - 2))
    limits[..., -1] = _NEVER  # a threshold of 1 hits nothing
    limits = torch.nn.functional.pad(limits, (1, 0), value=-_NEVER)
    limits = torch.nn.functional.pad(limits, (0, 1), value=_NEVER)
    return limits.masked_fill_(~finite[..., None], -_NEVER)


_NEVER = 2**30
"""Beyond every `_eighths` of a float32, which are below 2**11."""


def _eighths(x: Tensor) -> Tensor:
    """Eighths of an octave of a float32 that is 0 or more, of a straight mantissa and rounded down, int32."""
    return x.view(torch.int32) >> 20


def _relative_scores(
    query: Tensor, key: Tensor, codes: tuple[Tensor, ...], config: SaleConfig, bounds: Tensor, scale: float
) -> Tensor:
    """`scan.scan_max` and `row_limits.row_limits` at all thresholds."""
    mean, key_codes, key_scale = codes
    query_codes, query_scale = ops.quantize_rows(query, config.bits)
    sums = torch.zeros(query.shape[:3], device=query.device)
    tiles = row_limits.row_sums(query, key, mean, bounds, scale, config.sink_tokens, config.local_tokens)
    for b, here, of_rows in tiles:
        sums[b, :, here] = of_rows
    heads, kv_heads = query.shape[1], key.shape[1]
    grid = Grid(query.shape[2], key.shape[2], *config.block_size)
    block_q, block_k = config.block_size
    group = heads // kv_heads
    scores = _nothing(query, grid)
    rows = max(1, _at_once(scan.TILE_ELEMENTS, query) // (grid.kv_len * group * block_q)) * block_q
    for b, (offset, start, end) in enumerate(bounds.tolist()):
        position = offset + torch.arange(grid.q_len, device=query.device)
        for row in range(0, grid.q_len, rows):
            here = slice(row, min(row + rows, grid.q_len))
            last = here.stop - 1
            last_block = max(offset + last - last % block_q, start)
            stop = min(max(last_block - config.local_tokens + 1, 0) // block_k, -(-end // block_k))
            if stop <= start // block_k or offset + last < start or offset + row >= end:
                continue
            for head in range(kv_heads):
                shared = slice(head * group, (head + 1) * group)
                keys = key_codes[b, head, : stop * block_k].float()
                product = (query_codes[b, shared, here].float() @ keys.T).unflatten(-1, (stop, block_k))
                limits = _relative_limits(sums[b, shared, here], query_scale[b, shared, here], scale)
                limits[:, (position[here] < start) | (position[here] >= end)] = torch.inf
                group_of = torch.arange(stop, device=query.device) - start // block_k
                largest = _largest(product, key_scale[b, head], group_of, start % block_k)
                reached = _steps_reached(largest, limits).masked_fill_(group_of < 0, 0)
                reached = torch.nn.functional.pad(reached, (0, 0, 0, -reached.shape[1] % block_q))
                found = _scores_of(reached.unflatten(1, (-1, block_q)).amax(2))
                scores[b, shared, row // block_q : row // block_q + found.shape[1], :stop] = found
    return scores


def _relative_limits(sums: Tensor, query_scale: Tensor, scale: float) -> Tensor:
    """Limits of rows for 0, every step and infinity, ``[G, M, 115]``; -inf where one is NaN, which hits."""
    thresholds = torch.tensor([0.0, *LADDER, torch.inf], device=sums.device)
    limits = (sums[..., None] + thresholds.log()) / (scale * query_scale[..., None])
    return limits.masked_fill_(limits.isnan(), -torch.inf)


def _largest(product: Tensor, key_scale: Tensor, group_of: Tensor, cut: int) -> Tensor:
    """Largest scaled product of every row in every block, ``[G, M, nk]``; inf where it is NaN, which hits.

    A first valid key inside a block cuts every block in two: the columns before the cut belong to the previous group.
    """
    found = product[..., cut:].amax(-1) * key_scale[group_of.clamp_min(0)]
    found.masked_fill_(found.isnan(), torch.inf)
    if cut:
        other = product[..., :cut].amax(-1) * key_scale[(group_of - 1).clamp_min(0)]
        other.masked_fill_(other.isnan(), torch.inf).masked_fill_(group_of < 1, -torch.inf)
        found = torch.maximum(found, other)
    return found


def _steps_reached(values: Tensor, limits: Tensor) -> Tensor:
    """How many of a row's ascending limits each of its values reaches, int32: ``[..., J]`` and ``[..., 115]``."""
    return torch.searchsorted(limits.contiguous(), values.contiguous(), right=True, out_int32=True)


def _scores_of(reached: Tensor) -> Tensor:
    """The largest threshold of so many reached ones; -inf for none, not even 0."""
    return torch.tensor([-torch.inf, 0.0, *LADDER, torch.inf], device=reached.device)[reached.long()]


def _at_once(elements: int, query: Tensor) -> int:
    """Elements of a tile: what the rules take on a CPU, and more where a tile's launches cost more than its sums."""
    return max(elements, _GPU_ELEMENTS) if query.is_cuda else elements


def _nothing(query: Tensor, grid: Grid) -> Tensor:
    shape = (*query.shape[:2], grid.query_blocks, grid.key_blocks)
    return torch.full(shape, -torch.inf, device=query.device)
