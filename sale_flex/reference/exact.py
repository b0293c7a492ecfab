# SPDX-License-Identifier: BSD-3-Clause
"""Exact masses: the share of a scored row's softmax that falls on a block, from every logit."""

from typing import Any

import torch
from torch import Tensor

from sale_flex.reference.call import Call, exact_logits
from sale_flex.reference.common import Choice, block_any, nonfinite_blocks
from sale_flex.reference.pooled import MassOptions, pool_rows, pooled_elements


def exact_shares(call: Call, config: Any) -> tuple[Tensor, Tensor]:
    """The largest share of a scored row, ``[B, Hq, nq, nk]``, and blocks with a logit of +inf or NaN, bool.

    Such logits, and keys that are not finite, count for nothing in other blocks.
    """
    block_q, block_k = config.block_size
    pool, sample = config.rule.pool, config.rule.pool_mode == "last"
    pooled = pool_rows(call.query, call.bounds, block_q, pool, sample)
    options = MassOptions(config.block_size, pool, sample, sub_block=1, bits=8)  # of codes there are none
    index = (pooled.position - call.bounds[:, :1]).clamp_min(0)
    logits = exact_logits(call, pooled.rows, index)
    sees = pooled_elements(call.elements, options)
    bad = sees & ~(logits < torch.inf)
    weights = logits.masked_fill(~sees | bad, -torch.inf).softmax(-1).nan_to_num(0.0)
    weights = torch.nn.functional.pad(weights, (0, -weights.shape[-1] % block_k))
    shares = weights.unflatten(-1, (-1, block_k)).sum(-1)
    return shares.unflatten(2, (-1, block_q // pool)).amax(3), block_any(bad, block_q // pool, block_k)


def exact_choice(call: Call, config: Any) -> Choice:
    """The candidates that take the threshold or more of some scored row."""
    shares, bad = exact_shares(call, config)
    heads = call.query.shape[1]
    threshold = torch.as_tensor(config.rule.threshold, dtype=torch.float32).expand(heads)[:, None, None].to(shares)
    unasked = bad | (threshold == 0) | nonfinite_blocks(call.query, call.key, call.bounds, config.block_size)
    margin = (shares.log() - threshold.log()).masked_fill(unasked, torch.inf)
    hit = call.candidate & (unasked | (shares >= threshold))
    return Choice(hit, margin.masked_fill(~call.candidate, -torch.inf), torch.zeros_like(hit))
