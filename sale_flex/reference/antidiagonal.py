# SPDX-License-Identifier: BSD-3-Clause
"""Sums along antidiagonals, after XAttention (arXiv 2503.16428, algorithm 1).

With S the stride, sum (n, m) is of the logits of row ``S n + S - 1 - r`` and key ``S m + r``, r from 0 to S - 1. It is
divided by S, rows of sums go through a softmax, and a block's share is the sum over its columns, averaged over rows.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from sale_flex.reference.call import Call
from sale_flex.reference.common import Choice, block_any, block_sum, real_rows, scaled_products, valid_keys
from sale_flex.reference.visibility import visible_elements


def antidiagonal_shares(call: Call, block_size: tuple[int, int], stride: int) -> Tensor:
    """Shares of a query block's softmax, ``[B, Hq, nq, nk]``; inf where a sum that counts is not finite."""
    (block_q, block_k), q_len, kv_len = block_size, call.query.shape[2], call.key.shape[2]
    short_q, short_k = -q_len % block_q, -kv_len % block_k
    real, valid = real_rows(call.bounds, q_len)[:, None, :, None], valid_keys(call.bounds, kv_len)[:, None, :, None]
    query = pad(torch.where(real, call.query.to(call.dtype), 0.0), (0, 0, 0, short_q))
    key = pad(torch.where(valid, call.key.to(call.dtype), 0.0), (0, 0, 0, short_k))
    elements = visible_elements(call.bounds, 1, q_len, kv_len, is_causal=call.causal)
    elements = pad(elements, (0, short_k, 0, short_q))
    sums, sees = torch.zeros(()), torch.zeros((), dtype=torch.bool)
    for r in range(stride):
        rows, keys = slice(stride - 1 - r, None, stride), slice(r, None, stride)
        sums = sums + scaled_products(query[:, :, rows], key[:, :, keys], call.scale / stride)
        sees = sees | elements[:, :, rows, keys]
    down, across = block_q // stride, block_k // stride
    sees = sees & call.visible.repeat_interleave(down, 2).repeat_interleave(across, 3)
    broken = block_any(sees & ~sums.isfinite(), down, across)
    weights = sums.masked_fill(~(sees & sums.isfinite()), -torch.inf).softmax(-1).nan_to_num()
    count = block_sum((weights.sum(-1, keepdim=True) > 0).to(call.dtype), down, 1)
    return (block_sum(weights, down, across) / count.clamp_min(1)).masked_fill(broken, torch.inf)


def antidiagonal_choice(call: Call, config: Any) -> Choice:
    """The candidates before which shares do not add up to ``1 - threshold``, and by how much they are short of it."""
    shares = antidiagonal_shares(call, config.block_size, config.rule.stride)
    broken, shares = shares.isinf(), shares.masked_fill(shares.isinf(), 0.0)
    order = shares.argsort(dim=-1, descending=True, stable=True)
    before = torch.zeros_like(shares)
    for place in range(1, shares.shape[-1]):
        before[..., place] = before[..., place - 1] + shares.gather(-1, order[..., place - 1 : place])[..., 0]
    before = torch.zeros_like(shares).scatter(-1, order, before)
    threshold = torch.as_tensor(config.rule.threshold, dtype=shares.dtype).reshape(-1, 1, 1)
    margin = ((1 - before).clamp_min(0) - threshold).masked_fill(broken, torch.inf)
    margin = margin.masked_fill(~call.candidate, -torch.inf)
    return Choice(margin >= 0, margin, torch.zeros_like(call.candidate))
