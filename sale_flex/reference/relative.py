# SPDX-License-Identifier: BSD-3-Clause
"""The relative rule: the largest estimated element of a block against the row's exact sink-local softmax."""

import math
from typing import Any

import torch
from torch import Tensor

from sale_flex.reference.call import Call, estimated_logits, exact_logits
from sale_flex.reference.common import (
    Choice,
    block_any,
    block_max,
    quantize,
    quantize_rows,
    repeat_heads,
    scaled_products,
)


def quantize_groups(key: Tensor, mean: Tensor, bounds: Tensor, group: int, bits: int) -> tuple[Tensor, Tensor]:
    """Codes of the smoothed keys, a scale per `group` keys counted from the first valid one.

    Returns:
        int8 ``[B, Hkv, Skv, D]`` and float32 ``[B, Hkv, ceil(Skv / group)]`` (1 for an empty group, NaN for one with a
        non-finite element).
    """
    batch, heads, kv_len, _ = key.shape
    codes = torch.zeros_like(key, dtype=torch.int8)
    scales = torch.ones(batch, heads, math.ceil(kv_len / group), device=key.device)
    for b, (_, start, end) in enumerate(bounds.tolist()):
        for g, first in enumerate(range(start, end, group)):
            keys = slice(first, min(first + group, end))
            x = key[b, :, keys].float() - mean[b, :, None]
            codes[b, :, keys], scale = quantize(x, (-2, -1), 2 ** (bits - 1) - 1)
            scales[b, :, g] = scale[:, 0, 0]
    return codes, scales


def row_limits(call: Call, threshold: float | Tensor) -> Tensor:
    """The estimated logit an element of row i must reach, ``m_i + ln l_i + ln threshold``, ``[B, Hq, Sq]``.

    m and l are the maximum and the sum of exponentials of the exact logits of the sink and local keys that the row sees
    (paper section 3.2). Rows that see nothing get +inf.
    """
    row = torch.arange(call.query.shape[2], device=call.key.device).expand(len(call.query), -1)
    logits = exact_logits(call, call.query, row).masked_fill(~(call.elements & call.near), -torch.inf)
    tau = torch.as_tensor(threshold, dtype=call.dtype, device=call.key.device).reshape(-1, 1)
    return (logits.logsumexp(-1) + tau.log()).masked_fill(~call.elements.any(-1), torch.inf)


def element_scores(call: Call, block_k: int, bits: int) -> Tensor:
    """Estimated logits of smoothed keys from codes, ``[B, Hq, Sq, Skv]``; the integer products are exact."""
    heads, dtype = call.query.shape[1], call.dtype
    query_codes, query_scale = quantize_rows(call.query, bits)
    key_codes, key_scale = quantize_groups(call.key, call.mean, call.bounds, block_k, bits)
    product = scaled_products(query_codes, key_codes.to(dtype), 1.0)
    group = (torch.arange(call.key.shape[2], device=call.key.device) - call.bounds[:, 1:2].long()).clamp_min(
        0
    ) // block_k
    per_key = key_scale.gather(2, group[:, None].expand(-1, key_scale.shape[1], -1)).to(dtype)
    per_key = repeat_heads(per_key, heads)[:, :, None]
    return product * per_key * (query_scale.to(dtype) * call.scale)[..., None]


def relative_choice(call: Call, config: Any) -> Choice:
    """The candidates in which an estimated logit reaches its row's limit."""
    block_q, block_k = config.block_size
    row, column = (torch.arange(x.shape[2], device=x.device) for x in (call.query, call.key))
    score = element_scores(call, block_k, config.rule.bits)
    score = estimated_logits(call, score, call.query, row.expand(len(call.query), -1), column)
    limit = row_limits(call, config.rule.threshold)[..., None]
    # Negated, so that a NaN on either side keeps the block.
    hit = block_any(~(score < limit) & call.elements, block_q, block_k) & call.candidate
    margin = block_max((score - limit).masked_fill(~call.elements, -torch.inf), block_q, block_k)
    return Choice(hit, margin.masked_fill(~call.candidate, -torch.inf), torch.zeros_like(hit))
