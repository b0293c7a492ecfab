# SPDX-License-Identifier: BSD-3-Clause
"""Scores of the relative rule in plain causal attention, for calibration."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sale_flex import ops
from sale_flex.ops.fallback import row_limits, scan
from sale_flex.selection.rules.ladder import LADDER, no_scores, scores_of, steps_reached, tile_elements

if TYPE_CHECKING:
    from sale_flex.call.facts import Call
    from sale_flex.selection.rules.relative import Relative


def block_scores(rule: "Relative", call: "Call") -> Tensor:
    """`scan.scan_max` and `row_limits.row_limits` at all thresholds, float32 ``[B, Hq, nq, nk]``.

    At a threshold t that is 0 or on `LADDER`, a candidate block (neither hidden nor always kept) is hit if and only if
    its score is t or more; blocks that are hit at every threshold score inf.
    """
    query, key, scale, grid, config, bounds = call.query, call.key, call.scale, call.grid, call.config, call.bounds
    mean, key_codes, key_scale = rule.codes(call)
    query_codes, query_scale = ops.quantize_rows(query, rule.bits)
    sums = torch.zeros(query.shape[:3], device=query.device)
    tiles = row_limits.row_sums(query, key, mean, bounds, scale, config.sink_tokens, config.local_tokens)
    for b, here, of_rows in tiles:
        sums[b, :, here] = of_rows
    heads, kv_heads = query.shape[1], key.shape[1]
    block_q, block_k = config.block_size
    group = heads // kv_heads
    scores = no_scores(query, grid)
    rows = max(1, tile_elements(scan.TILE_ELEMENTS, query) // (grid.kv_len * group * block_q)) * block_q
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
                reached = steps_reached(largest, limits).masked_fill_(group_of < 0, 0)
                reached = torch.nn.functional.pad(reached, (0, 0, 0, -reached.shape[1] % block_q))
                found = scores_of(reached.unflatten(1, (-1, block_q)).amax(2))
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
