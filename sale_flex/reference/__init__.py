# SPDX-License-Identifier: BSD-3-Clause
"""The method in plain torch, a function per stage: the oracle of every test.

Written to be read beside the paper (arXiv 2505.24179, section 3) and docs/semantics.md, with whole S x S tensors
and no thought for speed. It imports torch alone, so that nothing it is compared with can share its mistakes. A plain
causal call is one without masks and score_mod: there is nothing of its own for it.

Shapes: query ``[B, Hq, Sq, D]``, key and value ``[B, Hkv, Skv, D]``, bounds int32 ``[B, 3]`` = (q_offset, start, end).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sale_flex.reference.attention import masked_attention
from sale_flex.reference.audit import audit_rows, audited_positions
from sale_flex.reference.call import Call, make_call
from sale_flex.reference.common import (
    Choice,
    KeepMap,
    block_any,
    key_mean,
    quantize_rows,
    repeat_heads,
    rotate,
    rotation_width,
    valid_keys,
)
from sale_flex.reference.decision import RowMasses, decide
from sale_flex.reference.flexprefill import flexprefill_choice, last_row_sums, last_rows
from sale_flex.reference.mass import exact_masses, mass_choice, row_masses
from sale_flex.reference.moments import Moments, key_moments, quantize_moments
from sale_flex.reference.pooled import (
    PooledRows,
    mass_options,
    moment_logits,
    pool_rows,
    product_shift,
)
from sale_flex.reference.relative import quantize_groups, relative_choice, row_limits
from sale_flex.reference.visibility import Mod, make_bounds, visible_elements

__all__ = [
    "KeepMap",
    "Moments",
    "PooledRows",
    "RowMasses",
    "audit_rows",
    "audited_positions",
    "decide",
    "exact_masses",
    "keep_map",
    "key_mean",
    "key_moments",
    "last_row_sums",
    "last_rows",
    "make_bounds",
    "make_call",
    "masked_attention",
    "mass_options",
    "moment_logits",
    "pool_rows",
    "product_shift",
    "quantize_groups",
    "quantize_moments",
    "quantize_rows",
    "rotate",
    "rotation_width",
    "row_limits",
    "row_masses",
    "visible_elements",
]

CHOICES: dict[str, Callable[[Call, Any, int | None], Choice]] = {
    "flexprefill": lambda call, config, budget: flexprefill_choice(call, config),
    "mass": mass_choice,
    "relative": lambda call, config, budget: relative_choice(call, config),
}
"""A rule's name -> what it asks for, of a call, a `SaleConfig` and a budget."""


def keep_map(
    query: Tensor,
    key: Tensor,
    config: Any,
    value: Tensor | None = None,
    *,
    score_mod: Mod | None = None,
    mask_mod: Mod | None = None,
    block_mask: Any = None,
    is_causal: bool = True,
    q_offset: int | Tensor | None = None,
    kv_range: Tensor | None = None,
    scale: float | None = None,
    dtype: torch.dtype = torch.float32,
    budget: int | None = None,
) -> KeepMap:
    """Which blocks `config` (a `SaleConfig`) keeps, from whole score matrices.

    Args:
        query: ``[B, Hq, Sq, D]``.
        key: ``[B, Hkv, Skv, D]``.
        config: The fields of `sale_flex.SaleConfig`; `min_length` must be a number here.
        value: ``[B, Hkv, Skv, D]``; visible blocks with a valid value that is not finite are kept.
        score_mod: As flex_attention takes it.
        mask_mod: Likewise.
        block_mask: A BlockMask of any block size: its lists, and its mask_mod besides.
        is_causal: Whether keys after a row's position are hidden.
        q_offset: Key index of the first query, a number or int ``[B]``; by default ``Skv - Sq``.
        kv_range: int ``[B, 2]``, first and one-past-last valid key.
        scale: Softmax scale; by default ``D ** -0.5``.
        dtype: float32 or float64, the arithmetic of logits and statistics.
        budget: Mass rule: most blocks that a query block may ask for by their masses; None for all.

    Raises:
        ValueError: `min_length` is None, or the rule is not one of `CHOICES`.
    """
    heads, (block_q, block_k) = query.shape[1], config.block_size
    call = make_call(
        query, key, config, score_mod=score_mod, mask_mod=mask_mod, block_mask=block_mask, is_causal=is_causal,
        q_offset=q_offset, kv_range=kv_range, scale=scale, dtype=dtype,
    )  # fmt: skip
    if 2 * query.shape[2] < block_q:  # a step of decoding
        call = call._replace(always=call.visible)
    if config.rule.name not in CHOICES:
        raise ValueError(f"config.rule must be one that the reference knows, {tuple(CHOICES)}, got {config.rule!r}.")
    choice = CHOICES[config.rule.name](call, config, budget)
    always = call.always.expand_as(choice.hit)
    if value is not None:
        bad = ~value.isfinite().all(-1) & valid_keys(call.bounds, key.shape[2])[:, None]  # [B, Hkv, Skv]
        always = always | (call.visible & block_any(repeat_heads(bad, heads)[:, :, None], 1, block_k))
    return KeepMap(
        kept=choice.hit | always,
        hit=choice.hit,
        always=always,
        visible=call.visible,
        full=call.full,
        margin=choice.margin,
        dropped=choice.dropped,
    )
