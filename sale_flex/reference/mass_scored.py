# SPDX-License-Identifier: BSD-3-Clause
"""The mass rule under a score_mod: weights are logarithms, compared as they are (docs/semantics.md)."""

import math

import torch
from torch import Tensor

from sale_flex.reference.call import Call, estimated_logits, exact_logits
from sale_flex.reference.common import Choice, repeat_heads, scaled_products, valid_blocks
from sale_flex.reference.decision import within_budget
from sale_flex.reference.moments import Moments
from sale_flex.reference.pooled import (
    MassOptions,
    block_logsumexp,
    pool_rows,
    pooled_elements,
    row_codes,
    squared_codes,
)

STEP = math.log(2) / 8
"""How far a budget raises the cuts of a query block at a time, in nats."""

FLOOR = -100 * math.log(2)
"""Where the cut of threshold 0 is, below the total, when a budget starts to raise it, in nats."""


def scored_choice(
    call: Call, options: MassOptions, moments: Moments, threshold: Tensor, unasked: Tensor, budget: int | None
) -> Choice:
    """The candidates whose weight for some pooled row is not below the row's cut, ``total + ln threshold``.

    Args:
        call: What is decided on.
        options: Sizes and widths.
        moments: Codes of the keys.
        threshold: float32 ``[Hq]``.
        unasked: bool ``[B, Hq, nq, nk]``: candidates that are hit in any case, and do not count for the budget.
        budget: Most other hits of a query block; None for all.
    """
    weight, finite = row_weights(call, options, moments)
    threshold = threshold.to(call.dtype)[:, None, None]
    cut = weight.logsumexp(-1, keepdim=True) + torch.where(threshold > 0, threshold.log(), FLOOR)
    # -inf - -inf: a row that sees nothing, or a block without anything for the row.
    above = (weight - cut).nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    above = above.masked_fill(~finite[..., None] | (threshold >= 1), -torch.inf)
    above = above.unflatten(2, (-1, options.rows)).amax(3)  # [B, Hq, nq, nk]
    everything = (~finite).unflatten(2, (-1, options.rows)).any(3)[..., None] | (threshold == 0)

    def hits(raised: Tensor) -> Tensor:
        """What is hit with cuts that many steps higher, ``[B, Hq, nq]``."""
        raised = raised[..., None]
        return call.candidate & ((above >= raised * STEP) | (everything & (raised == 0)))

    hit, dropped, raised = within_budget(hits, above.shape[:3], unasked, budget)
    raised = raised[..., None]
    margin = (above - raised * STEP).masked_fill(everything & (raised == 0), torch.inf)
    margin = margin.masked_fill(~call.candidate, -torch.inf).masked_fill(unasked, torch.inf)
    return Choice(hit | unasked, margin, dropped)


def row_weights(call: Call, options: MassOptions, moments: Moments) -> tuple[Tensor, Tensor]:
    """How pooled rows spread their softmax: from codes over candidates that are full and valid, exactly the rest.

    Returns:
        ``[B, Hq, np, nk]``, the logarithm of the sum of exponentials in a block, -inf where nothing is; and bool
        ``[B, Hq, np]``, whether the pooled row is finite, as one that does not exist is.
    """
    dtype, scale, size = call.dtype, call.scale, options.sub_block
    heads, kv_len = call.query.shape[1], call.key.shape[2]
    block_q, block_k = options.block_size
    blocks, subs = call.visible.shape[3], block_k // size
    pooled = pool_rows(call.query, call.bounds, block_q, options.pool, options.sample)
    index = (pooled.position - call.bounds[:, :1]).clamp_min(0)  # [B, np]: which query row the last of a pool is
    exists = (pooled.position >= 0)[:, None]  # [B, 1, np]

    logits = exact_logits(call, pooled.rows, index)
    logits = logits.masked_fill(~(pooled_elements(call.elements, options) & logits.isfinite()), -torch.inf)
    exact = block_logsumexp(logits, blocks, block_k)

    codes, row_scale, width = row_codes(pooled, options)
    row_scale = row_scale.to(dtype)[..., None]

    def of_subs(x: Tensor) -> Tensor:
        return repeat_heads(x, heads).to(dtype).repeat_interleave(subs, -1)[:, :, None]

    middle = torch.arange(blocks * subs, device=call.key.device) * size + size // 2
    products = scaled_products(codes, moments.mean_codes.to(dtype), 1.0)
    estimate = products * (row_scale * scale / width * of_subs(moments.mean_scale))
    estimate = estimated_logits(call, estimate, pooled.rows, index, middle.clamp_max(kv_len - 1))
    estimate = estimate.masked_fill(~estimate.isfinite(), -torch.inf)
    if size > 1:
        squares, unit = squared_codes(codes, options.bits)
        spread = row_scale**2 * unit * scale**2 / 2 * of_subs(moments.var_scale)
        spread = scaled_products(squares, moments.var_codes.to(dtype), 1.0) * spread
        # Infinity times 0: a row of some 1e19 and more. The bound holds for any variance.
        estimate = estimate + spread.nan_to_num(torch.inf, torch.inf).clamp_max(2.0 * (size - 1))
    coded = (estimate + math.log(size)).unflatten(-1, (blocks, subs)).logsumexp(-1)

    from_codes = call.candidate & call.full & valid_blocks(call.bounds, blocks, block_k)[:, None, None]
    weight = torch.where(from_codes.repeat_interleave(options.rows, 2), coded, exact)
    return weight.masked_fill(~exists[..., None], -torch.inf), pooled.rows.isfinite().all(-1) | ~exists
