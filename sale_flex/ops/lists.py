# SPDX-License-Identifier: BSD-3-Clause
"""Ops between a choice of blocks and attention: index lists, the mask_mod's table, attention to kept blocks."""

import torch
from torch import Tensor

from sale_flex.kernels.arguments import BlockVisibility, Grid, Length, MaskSpec, ModLike, Near
from sale_flex.ops.define import op


@op("compact")
def build_lists(
    hits: Tensor,
    nonfinite: Tensor | None,
    bounds: Tensor,
    visibility: BlockVisibility | None,
    always: Tensor | None,
    kv_heads: int,
    grid: Grid,
    near: Near,
    partial_width: Length,
    full_width: Length,
    want_kept: bool,
    leave_early: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Kept bits if wanted, counts of partial and of full blocks, indices of both, and how many found no room.

    Without `visibility` and bits of `always` kept blocks attention is causal, and they are reckoned.
    """
    lines = hits.shape[:3]
    kept = torch.empty_like(hits) if want_kept else hits.new_empty(0)
    partial_num, full_num, overflow = (hits.new_empty(lines) for _ in range(3))
    return kept, partial_num, full_num, hits.new_empty(*lines, partial_width + full_width), overflow


@op("lookup")
def kept_table(kept: Tensor, block_q: int, block_k: int, table_words: Length) -> tuple[Tensor, Tensor]:
    """What the mask_mod looks kept blocks up in: a flat table, and its sizes and strides."""
    return kept.new_empty(table_words), kept.new_empty(5)


@op(lambda *_: None)
def attended(query: Tensor, value: Tensor, partial_num: Tensor, full_num: Tensor, block_q: int, block_k: int) -> None:
    """Nothing: it tells counters of floating-point operations how many blocks attention meets."""


@op("rows")
def attend_rows(
    query: Tensor, key: Tensor, value: Tensor, kept: Tensor, spec: MaskSpec, score: ModLike, scale: float, grid: Grid
) -> tuple[Tensor, Tensor]:
    """Attention to kept blocks, ``[B, Hq, Sq, D]``, and its log-sum-exp, float32 ``[B, Hq, Sq]``."""
    output = torch.empty_like(query, memory_format=torch.contiguous_format)
    return output, query.new_empty(query.shape[:3], dtype=torch.float32)
