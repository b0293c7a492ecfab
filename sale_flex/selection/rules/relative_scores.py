# SPDX-License-Identifier: BSD-3-Clause
"""Scores of the relative rule, for calibration."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from sale_flex import ops
from sale_flex.kernels.arguments import Structure
from sale_flex.ops.fallback import row_limits, scan
from sale_flex.selection.rules.in_torch import mods_in_torch
from sale_flex.selection.rules.ladder import LADDER, no_scores, scores_of, steps_reached

if TYPE_CHECKING:
    from sale_flex.call.facts import Call
    from sale_flex.selection.rules.relative import Relative


def block_scores(rule: "Relative", call: "Call", structure: Structure | None) -> Tensor:
    """`scan.scan_max` and `row_limits.row_limits` at all thresholds, float32 ``[B, Hq, nq, nk]``.

    At a threshold t that is 0 or on `LADDER`, a candidate block (neither hidden nor always kept) is hit if and only if
    its score is t or more; blocks that are hit at every threshold score inf.
    """
    query, key, scale, grid = call.query, call.key, call.scale, call.grid
    mean, key_codes, key_scale = rule.codes(call)
    query_codes, query_scale = ops.quantize_rows(query, rule.bits, False)
    spec, score = mods_in_torch(call)
    sums = torch.zeros(query_codes.shape[:3], device=query.device)
    for tile in row_limits.row_sums(query, key, mean, spec, structure, score, scale, grid, call.near):
        sums[tile.b, tile.heads, tile.lines] = tile.sums
    shift = row_limits.mean_logits(query, mean, scale, score)
    # A row's unit of limits: that of logits under a score_mod.
    unit = scale * pad(query_scale, (0, sums.shape[2] - grid.q_len), value=1.0)
    if score is not None:
        unit = torch.ones_like(unit)
    thresholds = torch.tensor([0.0, *LADDER, torch.inf], device=query.device).log()
    scores = no_scores(query, grid)
    codes = query_codes, query_scale, key_codes, key_scale
    for peaks in scan.row_peaks(*codes, shift, spec, structure, score, scale, grid, call.near.local_tokens):
        at = peaks.b, peaks.heads, peaks.lines
        limits = (sums[at][..., None] + thresholds) / unit[at][..., None]
        # What is NaN hits, on either side.
        limits = limits.masked_fill_(limits.isnan(), -torch.inf).unflatten(1, peaks.largest.shape[1:3])
        largest = peaks.largest.masked_fill(peaks.largest.isnan(), torch.inf)
        reached = steps_reached(largest, limits).masked_fill_(~peaks.sees, 0)
        found = torch.full((*reached.shape[:2], grid.key_blocks), -torch.inf, device=query.device)
        found[..., peaks.columns] = scores_of(reached.amax(2))
        scores[peaks.b, peaks.heads, peaks.blocks] = found
    return scores
