# SPDX-License-Identifier: BSD-3-Clause
"""The method in plain torch, a function per stage: the oracle of every test.

Written to be read beside the paper (arXiv 2505.24179, section 3) and docs/semantics.md, with whole S x S tensors
and no thought for speed. It imports torch alone, so that nothing it is compared with can share its mistakes. A plain
causal call is one without masks and score_mod: there is nothing of its own for it.

Shapes: query ``[B, Hq, Sq, D]``, key and value ``[B, Hkv, Skv, D]``, bounds int32 ``[B, 3]`` = (q_offset, start, end).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sale_flex.reference.a_shape import a_shape_choice
from sale_flex.reference.antidiagonal import antidiagonal_choice, antidiagonal_shares
from sale_flex.reference.attention import masked_attention
from sale_flex.reference.audit import audit_rows, audited_positions
from sale_flex.reference.block_mean import block_mean_choice, block_mean_scores
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
from sale_flex.reference.exact import exact_choice
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
from sale_flex.reference.top_k import top_k_choice
from sale_flex.reference.vertical_slash import vertical_slash_choice
from sale_flex.reference.visibility import Mod, make_bounds, visible_elements

__all__ = [
    "KeepMap",
    "Moments",
    "PooledRows",
    "RowMasses",
    "antidiagonal_shares",
    "audit_rows",
    "audited_positions",
    "block_mean_scores",
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

_CHOICES: dict[str, Callable[[Call, Any], Choice]] = {
    "a_shape": a_shape_choice,
    "antidiagonal": antidiagonal_choice,
    "block_mean": block_mean_choice,
    "exact": exact_choice,
    "flexprefill": flexprefill_choice,
    "relative": relative_choice,
    "top_k": top_k_choice,
    "vertical_slash": vertical_slash_choice,
}
"""A rule's name -> what it asks for of a call; the mass rule has a budget besides."""


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
        ValueError: `min_length` is None, or the rule is none of the library's.
    """
    heads, (block_q, block_k) = query.shape[1], config.block_size
    call = make_call(
        query, key, config, score_mod=score_mod, mask_mod=mask_mod, block_mask=block_mask, is_causal=is_causal,
        q_offset=q_offset, kv_range=kv_range, scale=scale, dtype=dtype,
    )  # fmt: skip
    if 2 * query.shape[2] < block_q:  # a step of decoding
        call = call._replace(always=call.visible)
    choices = _CHOICES | {"mass": partial(mass_choice, budget=budget)}
    if config.rule.name not in choices:
        raise ValueError(
            f"config.rule must be one that the reference knows, {', '.join(sorted(choices))}, got {config.rule!r}."
        )
    choice = choices[config.rule.name](call, config)
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
