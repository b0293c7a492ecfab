# SPDX-License-Identifier: BSD-3-Clause
"""The method in plain torch, a function per stage: the oracle of every test.

Written to be read beside the paper (arXiv 2505.24179, section 3) and docs/semantics.md, with whole S x S tensors
and no thought for speed. It imports torch alone, so that nothing it is compared with can share its mistakes.

Shapes: query ``[B, Hq, Sq, D]``, key and value ``[B, Hkv, Skv, D]``, bounds int32 ``[B, 3]`` = (q_offset, start, end).
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from sale_flex.reference.audit import AuditedRows, audit_rows, audited_positions
from sale_flex.reference.common import (
    KeepMap,
    always_kept,
    block_any,
    key_mean,
    make_bounds,
    masked_attention,
    of_rule,
    quantize_rows,
    repeat_heads,
    rotate,
    rotation_width,
    visible,
)
from sale_flex.reference.mass import (
    Decision,
    MassOptions,
    PooledRows,
    RowMasses,
    candidate_span,
    decide,
    exact_masses,
    exact_part,
    mass_choice,
    mass_options,
    moment_logits,
    pool_rows,
    product_shift,
    row_masses,
)
from sale_flex.reference.moments import Moments, key_moments, quantize_moments
from sale_flex.reference.programmed import programmed_attention, programmed_keep_map, seen_elements
from sale_flex.reference.relative import element_scores, quantize_groups, relative_choice, row_limits

__all__ = [
    "AuditedRows",
    "Decision",
    "KeepMap",
    "MassOptions",
    "Moments",
    "PooledRows",
    "RowMasses",
    "audit_rows",
    "audited_positions",
    "candidate_span",
    "decide",
    "element_scores",
    "exact_masses",
    "exact_part",
    "keep_map",
    "key_mean",
    "key_moments",
    "make_bounds",
    "masked_attention",
    "mass_options",
    "moment_logits",
    "pool_rows",
    "product_shift",
    "programmed_attention",
    "programmed_keep_map",
    "quantize_groups",
    "quantize_moments",
    "quantize_rows",
    "rotate",
    "rotation_width",
    "row_limits",
    "row_masses",
    "seen_elements",
    "visible",
]


def keep_map(
    query: Tensor,
    key: Tensor,
    config: Any,
    value: Tensor | None = None,
    q_offset: int | Tensor | None = None,
    kv_range: Tensor | None = None,
    scale: float | None = None,
    dtype: torch.dtype = torch.float32,
    budget: int | None = None,
    moments: Moments | None = None,
) -> KeepMap:
    """Which blocks `config` (a `SaleConfig`) keeps, from whole score matrices.

    Args:
        query: ``[B, Hq, Sq, D]``.
        key: ``[B, Hkv, Skv, D]``.
        config: The fields of `sale_flex.SaleConfig`; `min_length` must be a number here.
        value: ``[B, Hkv, Skv, D]``; blocks with a non-finite value are kept.
        q_offset: Key index of the first query; by default ``Skv - Sq``.
        kv_range: int ``[B, 2]``, first and one-past-last valid key.
        scale: Softmax scale; by default ``D ** -0.5``.
        dtype: float32 or float64, the arithmetic of logits and statistics.
        budget: Mass rule: most blocks that a query block may ask for by their masses; None for all.
        moments: Mass rule: codes of the keys to use instead of the reference's own.

    Raises:
        ValueError: `min_length` is None, or the rule is not one of these two.
    """
    if config.min_length is None:
        raise ValueError(
            "config.min_length must be a number of tokens, got None: what None means depends on the device, so resolve "
            "it first, for instance with dataclasses.replace(config, min_length=0)."
        )
    batch, heads, q_len, dim = query.shape
    kv_len = key.shape[2]
    block_q, block_k = config.block_size
    scale = dim**-0.5 if scale is None else scale
    bounds = make_bounds(batch, q_len, kv_len, q_offset, kv_range, query.device)
    choose = {"mass": partial(mass_choice, budget=budget, moments=moments), "relative": relative_choice}
    choice = of_rule(choose, config)(query, key, bounds, config, scale, dtype)

    seen = visible(bounds, q_len, kv_len)
    always = block_any(always_kept(seen, bounds, config, q_len)[:, None], block_q, block_k)
    always = always.expand(batch, heads, -1, -1)
    if value is not None:
        bad = repeat_heads(~value.isfinite().all(-1), heads)  # [B, Hq, Skv]
        always = always | block_any(bad[:, :, None, :] & seen[:, None], block_q, block_k)
    seen_blocks = block_any(seen[:, None], block_q, block_k)
    hidden = block_any(~seen[:, None], block_q, block_k)
    return KeepMap(
        kept=choice.hit | always,
        hit=choice.hit,
        always=always,
        visible=seen_blocks,
        full=seen_blocks & ~hidden,
        margin=choice.margin,
        dropped=choice.dropped,
    )
