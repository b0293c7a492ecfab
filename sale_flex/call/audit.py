# SPDX-License-Identifier: BSD-3-Clause
"""The audit of a choice: a few rows are asked exactly what they want, and what of it was not kept.

One row of every 64 positions, from 4,096 on of every 128, from 8,192 on of every 256, is scored against all keys that
it sees, at a hundredth of dense attention's cost. What it wants are the blocks that are not always kept and that take
`WANTED` or more of its softmax. docs/decisions.md, "What an audit measures", says why it is this measure.
"""

import torch
from torch import Tensor

from sale_flex import ops
from sale_flex.call.facts import Call
from sale_flex.kernels.arguments import Structure
from sale_flex.stats import Audit

WANTED = 0.05
"""Share of a row's softmax from which on a block is wanted."""


def audit(call: Call, hits: Tensor, nonfinite: Tensor | None, structure: Structure | None) -> tuple[Tensor, Audit]:
    """What a choice missed, and the choice: with ``on_miss="dense"``, all blocks of heads that missed too much.

    Args:
        call: The call.
        hits: int32 ``[B, Hq, nq, ceil(nk / 32)]``: bits of the chosen blocks.
        nonfinite: int32 ``[B, Hkv, ceil(nk / 32)]``: bits of blocks that are kept for their values, or None.
        structure: What the call's mods make of the blocks; None in plain causal attention.
    """
    of_rows = ops.audit_rows(
        call.query,
        call.key,
        hits,
        nonfinite,
        call.spec,
        structure,
        call.score,
        call.scale,
        WANTED,
        call.grid,
        call.near,
    )
    asked, wanted, missed = of_rows.unbind(-1)  # each [B, Hq, R]
    result = Audit(
        rows=asked.sum(-1).long(),
        wanted_mass=wanted.sum(-1),
        missed_mass=missed.sum(-1),
        missed_squares=missed.square().sum(-1),
        made_dense=torch.zeros_like(asked[..., 0], dtype=torch.int64),
    )
    if call.config.on_miss != "dense":
        return hits, result
    above = result.miss > call.config.miss_bound
    return hits.masked_fill(above[..., None, None], -1), result._replace(made_dense=above.long())
