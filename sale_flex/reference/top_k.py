# SPDX-License-Identifier: BSD-3-Clause
"""Top-k of pooled means (MInference, arXiv 2407.02490, section 3, "Block-Sparse")."""

from typing import Any

import torch
from torch import Tensor

from sale_flex.reference.call import Call
from sale_flex.reference.common import Choice, nonfinite_blocks, real_rows, scaled_products, valid_keys


def block_means(x: Tensor, real: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """Means of every `size` vectors ``[B, H, S, D]``, of those that are ``real``, bool ``[B, S]``, and finite."""
    used = real[:, None] & x.isfinite().all(-1)
    means = []
    for first in range(0, x.shape[2], size):
        part, here = x[:, :, first : first + size].to(dtype), used[:, :, first : first + size, None]
        means.append(torch.where(here, part, 0.0).sum(2) / here.sum(2).clamp_min(1))
    return torch.stack(means, 2)


def top_k_choice(call: Call, config: Any) -> Choice:
    """The candidates among the visible blocks with the largest shares of the softmax of means.

    A margin is how far a block's logit is from the nearest one on the other side.
    """
    block_q, block_k = config.block_size
    of_rows = block_means(call.query, real_rows(call.bounds, call.query.shape[2]), block_q, call.dtype)
    of_keys = block_means(call.key, valid_keys(call.bounds, call.key.shape[2]), block_k, call.dtype)
    logits = scaled_products(of_rows, of_keys, call.scale)
    visible = call.visible.expand_as(logits)
    shares = logits.masked_fill(~visible, -torch.inf).softmax(-1)
    order = shares.masked_fill(~visible, -1.0).argsort(dim=-1, descending=True, stable=True)
    rank = order.argsort(dim=-1)
    threshold = torch.as_tensor(config.rule.threshold, dtype=torch.float32, device=logits.device)
    threshold = threshold.expand(call.query.shape[1])[:, None, None]
    if config.rule.blocks is None:
        count = visible.sum(-1, keepdim=True)
        top = (count - rank - 0.5) / count >= threshold  # in float32, as the threshold is
    else:
        top = rank < config.rule.blocks
    top = top & visible
    unasked = (threshold == 0) | nonfinite_blocks(call.query, call.key, call.bounds, config.block_size)
    least = logits.masked_fill(~top, torch.inf).amin(-1, keepdim=True)
    most = logits.masked_fill(top | ~visible, -torch.inf).amax(-1, keepdim=True)
    margin = (logits - torch.where(top, most, least)).masked_fill(unasked, torch.inf)
    hit = call.candidate & (top | unasked)
    return Choice(hit, margin.masked_fill(~call.candidate, -torch.inf), torch.zeros_like(hit))
