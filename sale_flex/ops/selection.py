# SPDX-License-Identifier: BSD-3-Clause
"""Ops that choose blocks, and the one that asks what a choice missed.

Each takes a call as it is: its `MaskSpec`, what that makes of the blocks, and its score_mod. Where `structure` is None,
attention is plain causal attention and candidates are a span of blocks between sink and local window.
"""

import torch
from torch import Tensor

from sale_flex.blocks.geometry import audit_slots
from sale_flex.kernels.arguments import Grid, KeyMoments, Length, MaskSpec, MassOptions, ModLike, Near, Structure
from sale_flex.ops.codes import ceil_div
from sale_flex.ops.define import op


@op("mass")
def mass_hits(
    query: Tensor,
    key: Tensor,
    mean: Tensor,
    moments: KeyMoments,
    spec: MaskSpec,
    structure: Structure | None,
    score: ModLike,
    threshold: Tensor,
    scale: float,
    grid: Grid,
    options: MassOptions,
    near: Near,
    budget: Length,
) -> tuple[Tensor, Tensor]:
    """The mass rule: hit bits int32 ``[B, Hq, nq, ceil(nk / 32)]``, and int32 ``[B, Hq, nq]`` hits given up."""
    lines = (*query.shape[:2], grid.query_blocks)
    hits = query.new_empty(*lines, moments.nonfinite.shape[2], dtype=torch.int32)
    return hits, query.new_empty(lines, dtype=torch.int32)


@op("row_limits")
def row_limits(
    query: Tensor,
    query_scale: Tensor,
    key: Tensor,
    mean: Tensor,
    spec: MaskSpec,
    structure: Structure | None,
    score: ModLike,
    threshold: Tensor,
    scale: float,
    grid: Grid,
    near: Near,
) -> tuple[Tensor, Tensor]:
    """The relative rule: what scores must reach, float32 ``[B, Hq, ceil(Sq / 128) * 128]``; logits of the mean.

    The latter, float32 of the same shape, are wanted under a score_mod alone: ``[B, Hq, 0]`` without one.
    """
    batch, heads, q_len, _ = query.shape
    rows = ceil_div(q_len, 128) * 128
    limit = query.new_empty(batch, heads, rows, dtype=torch.float32)
    return limit, query.new_empty(batch, heads, 0 if score is None else rows, dtype=torch.float32)


@op("scan")
def scan_max(
    query_codes: Tensor,
    query_scale: Tensor,
    key_codes: Tensor,
    key_scale: Tensor,
    limit: Tensor,
    shift: Tensor,
    spec: MaskSpec,
    structure: Structure | None,
    score: ModLike,
    scale: float,
    grid: Grid,
    local_tokens: int,
    no_left_padding: bool,
) -> Tensor:
    """The relative rule: hit bits, int32 ``[B, Hq, nq, ceil(nk / 32)]``."""
    lines = (*query_codes.shape[:2], grid.query_blocks)
    return query_codes.new_empty(*lines, grid.words, dtype=torch.int32)


@op("last_rows")
def last_row_sums(
    query: Tensor,
    key: Tensor,
    spec: MaskSpec,
    score: ModLike,
    scale: float,
    grid: Grid,
    last: int,
    span: Length,
) -> tuple[Tensor, Tensor]:
    """The FlexPrefill rule: the last rows' softmax, summed by key and by distance.

    float32 ``[B, Hq, Skv]`` and ``[B, Hq, span]``, a distance counted modulo `span`.
    """
    lines = query.shape[:2]
    by_key = query.new_empty(*lines, grid.kv_len, dtype=torch.float32)
    return by_key, query.new_empty(*lines, span, dtype=torch.float32)


@op("audit")
def audit_rows(
    query: Tensor,
    key: Tensor,
    hits: Tensor,
    nonfinite: Tensor | None,
    spec: MaskSpec,
    structure: Structure | None,
    score: ModLike,
    scale: float,
    least: float,
    grid: Grid,
    near: Near,
) -> Tensor:
    """Of a row of every group: whether it was asked, what it wants, what of that was missed; ``[B, Hq, R, 3]``."""
    return query.new_empty(*query.shape[:2], audit_slots(query.shape[2]) + 2, 3, dtype=torch.float32)
