# SPDX-License-Identifier: BSD-3-Clause
"""The mass rule: the share of a pooled row's softmax that falls on a block (docs/semantics.md, "The mass rule").

Adjacent query rows are pooled to one. Of every pooled row r, blocks that are kept in any case are weighed exactly:
``L_r``, the sum of exponentials over their keys. Every other block J is a candidate, with ``S_rJ``, the same sum over
its keys divided by ``L_r``: in low bits if all rows see all of it, exactly if a mask cuts it. Its mass is
``S_rJ / (1 + sum_J S_rJ)``.

Left to implementations are the order of float32 sums, and the rounding of ``L_r``.
"""

import math
from typing import Any

import torch
from torch import Tensor

from sale_flex.reference.call import Call, exact_logits
from sale_flex.reference.common import Choice, block_any, real_rows, repeat_heads, scaled_products, valid_blocks
from sale_flex.reference.decision import RowMasses, decide
from sale_flex.reference.mass_scored import scored_choice
from sale_flex.reference.moments import Moments, key_moments, quantize_moments
from sale_flex.reference.pooled import (
    FRACTION,
    LOG2E,
    MassOptions,
    block_logsumexp,
    coded_logits,
    exponentials,
    mass_options,
    moment_logits,
    pool_rows,
    pooled_elements,
)

ABSENT = -1e38
"""The logit of a key whose own is not finite, in an exact part: it counts for nothing there, but the row sees a key."""


def exact_masses(call: Call, options: MassOptions) -> Tensor:
    """Shares of pooled rows' softmax that fall on blocks, from exact logits: float64 ``[B, Hq, np, nk]``."""
    block_q, block_k = options.block_size
    pooled = pool_rows(call.query, call.bounds, block_q, options.pool, options.sample)
    sees = pooled_elements(call.elements, options)
    logits = scaled_products(pooled.rows, call.key.double(), call.scale)
    weights = logits.masked_fill(~sees, -torch.inf).softmax(-1).masked_fill(~sees, 0.0)
    weights = torch.nn.functional.pad(weights, (0, -call.key.shape[2] % block_k))
    return weights.unflatten(-1, (-1, block_k)).sum(-1)


def row_masses(
    call: Call, options: MassOptions, *, quantised: bool = True, moments: Moments | None = None
) -> RowMasses:
    """How every pooled row's softmax is spread where there is no score_mod, as the estimate has it.

    A candidate whose keys are valid and seen by all rows that are no padding is weighed from codes, others exactly. A
    row counts in units of what it sees in other blocks, of which `total` holds one. Where it sees nothing there is
    none, and it counts in halves of the larger of two: its largest sub-block, and all that it sees in candidates that
    are weighed exactly. A total is above 1 so, as it is everywhere else.

    Args:
        call: What the rule decides on; its dtype is for what is not determined to the bit.
        options: Sizes and widths.
        quantised: False for the same formula without codes and fixed point: what the codes stand for.
        moments: Codes to use instead of those of `quantize_moments`.
    """
    (block_q, block_k), size, dtype = options.block_size, options.sub_block, call.dtype
    blocks, kv_len = call.visible.shape[3], call.key.shape[2]
    pooled = pool_rows(call.query, call.bounds, block_q, options.pool, options.sample)
    exists = (pooled.position >= 0)[:, None, :, None]
    sees = pooled_elements(call.elements, options)
    by_block = call.candidate & ~cut_by_padding(call, block_k)
    of_codes = by_block & _whole(call, block_q, block_k)
    candidate, whole = (x.repeat_interleave(options.rows, 2) & exists for x in (by_block, of_codes))

    logits = exact_logits(call, pooled.rows, pooled.position)
    finite = logits.isfinite()
    in_candidate, in_whole = (x.repeat_interleave(block_k, 3)[..., :kv_len] for x in (candidate, whole))
    log_exact = logits.masked_fill(~finite, ABSENT).masked_fill(~sees | in_candidate, -torch.inf).logsumexp(-1) * LOG2E
    logits = logits.masked_fill(~(sees & finite & in_candidate) | in_whole, -torch.inf)
    log_partial = block_logsumexp(logits, blocks, block_k) * LOG2E

    if quantised:
        if moments is None:
            moments = quantize_moments(call.key, call.mean, call.bounds, block_k, size, options.bits)
        coded = coded_logits(pooled, moments, options, call.scale)
        log_subs = coded.to(dtype) / 2**FRACTION + math.log2(size)
    else:
        of_keys = key_moments(call.key, call.mean, call.bounds, block_k, size, dtype)
        log_subs = moment_logits(pooled, *of_keys, size, call.scale) * LOG2E
    largest = log_subs.masked_fill(~whole.repeat_interleave(block_k // size, 3), -torch.inf).amax(-1)
    largest = torch.maximum(largest, logits.logsumexp(-1) * LOG2E)
    has_exact, sees_candidates = log_exact > -torch.inf, largest > -torch.inf
    unit = torch.where(has_exact, log_exact, torch.where(sees_candidates, largest - 1, 0.0))

    values = exponentials(coded, unit, size).to(dtype) if quantised else (log_subs - unit[..., None]).exp2()
    partial = (log_partial - unit[..., None]).clamp_max(100).exp2()
    sums = torch.where(whole, values.unflatten(-1, (blocks, -1)).sum(-1), partial).masked_fill(~candidate, 0.0)
    exact = (has_exact | ~sees_candidates).to(dtype)
    finite_row = pooled.rows.isfinite().all(-1)
    # A row that sees nothing asks for nothing, if it is finite.
    asks = has_exact | sees_candidates | ~finite_row
    return RowMasses(sums, exact, exact + sums.sum(-1), candidate & asks[..., None], finite_row, unit)


def cut_by_padding(call: Call, block_k: int) -> Tensor:
    """Blocks that padding on the left cuts, bool ``[B, 1, 1, nk]``.

    One is no sink where there are none. The mass rule keeps it without asking, and it is of the exact part.
    """
    first = torch.arange(call.visible.shape[3], device=call.bounds.device) * block_k
    return (first < call.bounds[:, 1:2])[:, None, None]


def _whole(call: Call, block_q: int, block_k: int) -> Tensor:
    """Blocks with valid keys alone that all rows see, rows of padding aside, bool ``[B, Hs, nq, nk]``."""
    real = real_rows(call.bounds, call.query.shape[2])[:, None, :, None]
    valid = valid_blocks(call.bounds, call.visible.shape[3], block_k)[:, None, None]
    return valid & ~block_any(real & ~call.elements, block_q, block_k)


def mass_choice(call: Call, config: Any, budget: int | None = None) -> Choice:
    """The candidates that take at least the threshold of some pooled row's softmax.

    Asked for without a mass are blocks with a key that is not finite: they do not count for the budget. A pooled row
    that is not finite asks for all its candidates.

    Args:
        call: What is decided on.
        config: The fields of `sale_flex.SaleConfig`.
        budget: Most candidates that a query block may ask for by their masses; None for all.
    """
    options = mass_options(config)
    block_k = options.block_size[1]
    moments = quantize_moments(call.key, call.mean, call.bounds, block_k, options.sub_block, options.bits)
    heads = call.query.shape[1]
    nonfinite = repeat_heads(moments.nonfinite, heads)[:, :, None]
    threshold = torch.as_tensor(config.rule.threshold, dtype=torch.float32, device=call.key.device).expand(heads)
    if call.score_mod is not None:
        return scored_choice(call, options, moments, threshold, call.candidate & nonfinite, budget)
    unasked = call.candidate & (nonfinite | cut_by_padding(call, block_k))
    masses = row_masses(call, options, moments=moments)
    hit, margin, dropped, _ = decide(masses, threshold[:, None], unasked, options.rows, budget)
    return Choice(hit | unasked, margin.masked_fill(unasked, torch.inf), dropped)
