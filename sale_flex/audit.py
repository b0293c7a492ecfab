# SPDX-License-Identifier: BSD-3-Clause
"""The audit of a choice: a few rows are asked exactly what they want, and what of it was not kept.

One row of every 64 positions, from 4,096 on of every 128, from 8,192 on of every 256, is scored against all keys that
it sees, at a hundredth of dense attention's cost. What it wants are the blocks that are not always kept and that take
`WANTED` or more of its softmax. docs/decisions.md, "What an audit measures", says why it is this measure.
"""

import torch
from torch import Tensor

from sale_flex import listed_ops
from sale_flex.config import SaleConfig
from sale_flex.sight import Mod, Sight
from sale_flex.stats import Audit

WANTED = 0.05
"""Share of a row's softmax from which on a block is wanted."""


def audit(
    query: Tensor,
    key: Tensor,
    hits: Tensor,
    nonfinite: Tensor | None,
    always: Tensor | None,
    rows: Tensor | None,
    sight: Sight,
    score: Mod,
    scale: float,
    config: SaleConfig,
    min_length: int,
) -> tuple[Tensor, Audit]:
    """What a choice missed, and the choice: with ``on_miss="dense"``, all blocks of heads that missed too much.

    Args:
        query: ``[B, Hq, Sq, D]``.
        key: ``[B, Hkv, Skv, D]``.
        hits: int32 ``[B, Hq, nq, ceil(nk / 32)]``: bits of the chosen blocks.
        nonfinite: int32 ``[B, Hkv, ceil(nk / 32)]``: bits of blocks that are kept for their values, or None.
        always: Bits of always-kept blocks, see `sale_flex.sight.Lists`; None: those of plain causal attention.
        rows: First and last key of every row, see `sale_flex.sight.Structure`; None with `always`.
        sight: Who sees whom.
        score: The score_mod.
        scale: Softmax scale.
        config: Blocks, sink, local window, and what a miss has for a consequence.
        min_length: Rows fewer than this many keys after their first one are early, in tokens.
    """
    of_rows = listed_ops.audit_rows(
        query,
        key,
        hits,
        nonfinite,
        always,
        rows,
        *sight,
        *score,
        scale,
        WANTED,
        *config.block_size,
        config.sink_tokens,
        config.local_tokens,
        min_length,
    )
    asked, wanted, missed = of_rows.unbind(-1)  # each [B, Hq, R]
    result = Audit(
        rows=asked.sum(-1).long(),
        wanted_mass=wanted.sum(-1),
        missed_mass=missed.sum(-1),
        missed_squares=missed.square().sum(-1),
        made_dense=torch.zeros_like(asked[..., 0], dtype=torch.int64),
    )
    if config.on_miss != "dense":
        return hits, result
    above = result.miss > config.miss_bound
    return hits.masked_fill(above[..., None, None], -1), result._replace(made_dense=above.long())
