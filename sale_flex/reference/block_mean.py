# SPDX-License-Identifier: BSD-3-Clause
"""Every row against the mean key of every block, after FlashPrefill (arXiv 2603.06199).

``energy(I, J) = sum over the rows i of I of exp(scale q_i . mean(k_J) - m_i)``, with ``m_i`` the row's largest logit of
a mean that it sees, and J is kept where its energy reaches `threshold` of the largest one of I.
"""

from typing import Any

import torch
from torch import Tensor

from sale_flex.reference.call import Call
from sale_flex.reference.common import Choice, block_any, block_sum, real_rows, scaled_products, valid_keys


def mean_keys(call: Call, block_k: int) -> Tensor:
    """The mean of every block's valid keys, rounded to the keys' dtype, ``[B, Hkv, nk, D]``; 0 of none."""
    valid = valid_keys(call.bounds, call.key.shape[2])
    means = []
    for keys, are_valid in zip(call.key.split(block_k, 2), valid.split(block_k, 1)):
        kept = torch.where(are_valid[:, None, :, None], keys.to(call.dtype), 0.0)
        means.append(kept.sum(2) / are_valid.sum(1).clamp_min(1)[:, None, None])
    return torch.stack(means, 2).to(call.key.dtype)


def block_mean_scores(call: Call, block_size: tuple[int, int]) -> Tensor:
    """Energies as shares of the query block's largest one, ``[B, Hq, nq, nk]``; inf where one is not finite."""
    block_q, block_k = block_size
    q_len, kv_len = call.query.shape[2], call.key.shape[2]
    logits = scaled_products(call.query, mean_keys(call, block_k).to(call.dtype), call.scale)
    # A row sees a mean where some row of its block sees some key of it, and causality hides none of its keys.
    position = torch.arange(q_len) + call.bounds[:, 0, None]
    last = torch.arange(call.visible.shape[3]) * block_k + block_k - 1
    sees = real_rows(call.bounds, q_len)[:, None, :, None] & call.visible.repeat_interleave(block_q, 2)[:, :, :q_len]
    sees = sees & block_any(valid_keys(call.bounds, kv_len)[:, None, None], 1, block_k)
    if call.causal:
        sees = sees & (last <= position[..., None])[:, None]
    broken = block_any(sees & ~logits.isfinite(), block_q, 1)
    logits = logits.masked_fill(~(sees & logits.isfinite()), -torch.inf)
    weights = (logits - logits.amax(-1, keepdim=True).clamp_min(-1e30)).exp()
    energies = block_sum(weights, block_q, 1)
    largest = energies.amax(-1, keepdim=True)
    return (energies / torch.where(largest > 0, largest, 1.0)).masked_fill(broken, torch.inf)


def block_mean_choice(call: Call, config: Any) -> Choice:
    """The candidates that reach the threshold; the margin is how far above it they are."""
    scores = block_mean_scores(call, config.block_size)
    threshold = torch.as_tensor(config.rule.threshold, dtype=scores.dtype).reshape(-1, 1, 1)
    margin = (scores - threshold).masked_fill(~call.candidate, -torch.inf)
    return Choice(margin >= 0, margin, torch.zeros_like(call.candidate))
