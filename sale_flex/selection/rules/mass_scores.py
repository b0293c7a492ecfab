# SPDX-License-Identifier: BSD-3-Clause
"""Scores of the mass rule in plain causal attention, for calibration."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sale_flex.blocks.bits import unpack_bits
from sale_flex.ops.fallback import mass
from sale_flex.ops.fallback.pool import exact_part, pool_rows
from sale_flex.selection.rules.ladder import LADDER, no_scores, scores_of, steps_reached, tile_elements

if TYPE_CHECKING:
    from sale_flex.call.facts import Call
    from sale_flex.selection.rules.mass import Mass


def block_scores(rule: "Mass", call: "Call") -> Tensor:
    """`mass.mass_hits` at all thresholds, float32 ``[B, Hq, nq, nk]``: the same tiles, so sums have the same order.

    At a threshold t that is 0 or on `LADDER`, a candidate block (neither hidden nor always kept) is hit if and only if
    its score is t or more. Non-finite blocks, hit at every threshold, score inf. Steps are eighths of an octave of a
    straight mantissa, and so are the levels in which the rule compares.
    """
    query, key, scale, grid, config = call.query, call.key, call.scale, call.grid, call.config
    mean, mean_codes, mean_scale, var_codes, var_scale, nonfinite = rule.codes(call)
    block_q, block_k = config.block_size
    sample, pool, sub_block = rule.pool_mode == "last", rule.pool, rule.sub_block
    heads, kv_heads = query.shape[1], key.shape[1]
    subs, group = block_k // sub_block, heads // kv_heads
    scores = no_scores(query, grid)
    flags = unpack_bits(nonfinite, grid.key_blocks)
    widest = max(grid.key_blocks * subs, min(config.sink_tokens + block_k, grid.kv_len))
    widest += config.local_tokens + block_q + block_k
    blocks = max(1, tile_elements(mass.TILE_ELEMENTS, query) // (group * block_q // pool * widest))
    at = torch.arange(grid.key_blocks, device=query.device)
    for b, row in enumerate(call.bounds.tolist()):
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
                sums, finite = mass.block_sums(pooled, exact, keys, sub_block, scale, rule.bits)
                sums.masked_fill_(~allowed, 0.0)
                reached = steps_reached(_eighths(sums), _mass_limits(sums, finite))
                reached.masked_fill_(~(allowed & (tile.position >= 0)[..., None]), 0)
                found = torch.where(before | flags[b, head], torch.inf, -torch.inf).repeat(group, 1, 1)
                found[..., columns] = torch.maximum(found[..., columns], scores_of(reached.amax(2)))
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
