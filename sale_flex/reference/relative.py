# SPDX-License-Identifier: BSD-3-Clause
"""The relative rule: the largest estimated element of a block against the row's exact sink-local softmax."""

import math
from typing import Any

import torch
from torch import Tensor

from sale_flex.reference.common import (
    Choice,
    block_any,
    block_max,
    key_mean,
    quantize,
    quantize_rows,
    repeat_heads,
    visible,
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


def row_limits(
    query: Tensor,
    key: Tensor,
    mean: Tensor,
    bounds: Tensor,
    threshold: float | Tensor,
    scale: float,
    sink_tokens: int,
    local_tokens: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The estimated logit an element of row i must reach, ``m_i + ln l_i + ln threshold``, ``[B, Hq, Sq]``.

    m and l are the maximum and the sum of exponentials of the exact logits of the row's sink-local keys (paper
    section 3.2). Rows that are padding get +inf.
    """
    heads = query.shape[1]
    smooth = repeat_heads(key.to(dtype) - mean.to(dtype)[:, :, None], heads)
    logits = query.to(dtype) @ smooth.transpose(-1, -2) * scale
    seen = visible(bounds, query.shape[2], key.shape[2])
    row = torch.arange(query.shape[2], device=key.device)[None, :, None] + bounds[:, 0, None, None]
    at = torch.arange(key.shape[2], device=key.device)[None, None, :]
    sink_local = seen & ((at < bounds[:, 1, None, None] + sink_tokens) | (at > row - local_tokens))
    logits = logits.masked_fill(~sink_local[:, None], -torch.inf)
    tau = torch.as_tensor(threshold, dtype=dtype, device=key.device).reshape(-1, 1)
    limit = logits.logsumexp(-1) + tau.log()
    return limit.masked_fill(~seen.any(-1)[:, None], torch.inf)


def element_scores(
    query_codes: Tensor,
    query_scale: Tensor,
    key_codes: Tensor,
    key_scale: Tensor,
    bounds: Tensor,
    group: int,
    scale: float,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Estimated logits from the codes, ``[B, Hq, Sq, Skv]``; the integer products are exact."""
    heads = query_codes.shape[1]
    product = query_codes.to(dtype) @ repeat_heads(key_codes, heads).to(dtype).transpose(-1, -2)
    at = torch.arange(key_codes.shape[2], device=bounds.device)[None] - bounds[:, 1, None]
    at = at.clamp_min(0).div(group, rounding_mode="floor").long()
    per_key = key_scale.gather(2, at[:, None].expand(-1, key_scale.shape[1], -1))
    per_key = repeat_heads(per_key[..., None], heads)[..., 0].to(dtype)
    return product * per_key[:, :, None, :] * (query_scale.to(dtype) * scale)[..., None]


def relative_choice(
    query: Tensor, key: Tensor, bounds: Tensor, config: Any, scale: float, dtype: torch.dtype = torch.float32
) -> Choice:
    """The blocks in which an estimated logit reaches its row's limit."""
    block_q, block_k = config.block_size
    seen = visible(bounds, query.shape[2], key.shape[2])[:, None]
    mean = key_mean(key, bounds, config.smooth_tokens)
    q_codes, q_scale = quantize_rows(query, config.rule.bits)
    k_codes, k_scale = quantize_groups(key, mean, bounds, block_k, config.rule.bits)
    score = element_scores(q_codes, q_scale, k_codes, k_scale, bounds, block_k, scale, dtype)
    limit = row_limits(
        query, key, mean, bounds, config.rule.threshold, scale, config.sink_tokens, config.local_tokens, dtype
    )
    # Negated, so that a NaN on either side keeps the block.
    hit = block_any(~(score < limit[..., None]) & seen, block_q, block_k)
    margin = (score - limit[..., None]).masked_fill(~seen, -torch.inf)
    return Choice(hit, block_max(margin, block_q, block_k), torch.zeros_like(hit))
