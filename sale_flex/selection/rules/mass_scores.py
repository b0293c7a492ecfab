# SPDX-License-Identifier: BSD-3-Clause
"""Scores of the mass rule, for calibration."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from sale_flex.kernels.arguments import Structure
from sale_flex.ops.fallback import mass, mass_scored
from sale_flex.selection.rules.in_torch import mods_in_torch
from sale_flex.selection.rules.ladder import LADDER, no_scores, scores_of, steps_reached

if TYPE_CHECKING:
    from sale_flex.call.facts import Call
    from sale_flex.selection.rules.mass import Mass


def block_scores(rule: "Mass", call: "Call", structure: Structure | None) -> Tensor:
    """`mass.mass_hits` at all thresholds, float32 ``[B, Hq, nq, nk]``: the same tiles, so sums have the same order.

    At a threshold t that is 0 or on `LADDER`, a candidate block (neither hidden nor always kept) is hit if and only if
    its score is t or more. Non-finite blocks, hit at every threshold, score inf. Steps are eighths of an octave of a
    straight mantissa, and so are the levels in which the rule compares.
    """
    scores = no_scores(call.query, call.grid)
    spec, score = mods_in_torch(call)
    of_call = call.query, call.key, *rule.codes(call), spec, structure
    behind = call.scale, call.grid, rule.mass_options(call), call.near
    if score is not None:
        for tile, logs in mass_scored.log_masses(*of_call, score, *behind):
            scores[tile.b, tile.heads, tile.blocks] = _of_logarithms(logs, tile.flagged)
        return scores
    for tile, masses in mass.row_masses(*of_call, *behind):
        scores[tile.b, tile.heads, tile.blocks] = _of_levels(masses)
    return scores


def _of_levels(masses: mass.Masses) -> Tensor:
    """Scores ``[G, n, nk]`` as `mass.decide` compares."""
    reached = steps_reached(_eighths(masses.sums), _mass_limits(masses.sums, masses.finite, masses.exact))
    reached.masked_fill_(~masses.candidate, 0)
    found = torch.where(masses.unasked, torch.inf, -torch.inf).repeat(len(reached) // len(masses.unasked), 1, 1)
    found[..., masses.columns] = torch.maximum(found[..., masses.columns], scores_of(reached.amax(2)))
    return found


def _mass_limits(sums: Tensor, finite: Tensor, exact: Tensor) -> Tensor:
    """Least `_eighths` with which a block of a row is hit, for 0, every step and infinity: int32 ``[..., R, 115]``."""
    steps = torch.tensor(LADDER, device=sums.device)
    cut = _eighths(steps * (exact + sums.sum(-1))[..., None])
    # Levels end at 127, one of which lies below the threshold.
    limits = torch.minimum(cut, _eighths(steps) + (mass.LEVELS - 2))
    limits[..., -1] = _NEVER  # a threshold of 1 hits nothing
    limits = pad(pad(limits, (1, 0), value=-_NEVER), (0, 1), value=_NEVER)
    return limits.masked_fill_(~finite[..., None], -_NEVER)


_NEVER = 2**30
"""Beyond every `_eighths` of a float32, which are below 2**11."""


def _eighths(x: Tensor) -> Tensor:
    """Eighths of an octave of a float32 that is 0 or more, of a straight mantissa and rounded down, int32."""
    return x.view(torch.int32) >> 20


def _of_logarithms(masses: mass_scored.LogMasses, flagged: Tensor) -> Tensor:
    """Scores ``[G, n, nk]`` as `mass_scored.decide` compares."""
    weights, finite, candidate = masses
    limits = mass_scored.cuts(masses, torch.tensor(LADDER, device=weights.device))
    # No key is no mass, of which threshold 0 alone asks for nothing.
    limits = limits.clamp_min(torch.finfo(torch.float32).min)
    limits[..., -1] = torch.inf  # a threshold of 1 hits nothing
    limits = pad(pad(limits, (1, 0), value=-torch.inf), (0, 1), value=torch.inf)
    found = scores_of(steps_reached(weights, limits).amax(2))
    found.masked_fill_(flagged | ~finite.all(-1)[..., None], torch.inf)
    return found.masked_fill_(~candidate, -torch.inf)
