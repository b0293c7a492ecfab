# SPDX-License-Identifier: BSD-3-Clause
"""Exact sink-local statistics of every row; see `sale_flex.kernels.row_limits` for the contract."""

import torch
from torch import Tensor

from sale_flex.fallback.quantize import CODE_ROWS

_TILE = 128


def row_limits(
    query: Tensor,
    key: Tensor,
    mean: Tensor,
    query_scale: Tensor,
    bounds: Tensor,
    threshold: Tensor,
    scale: float,
    sink_tokens: int,
    local_tokens: int,
) -> Tensor:
    """Limits in units of (code product x key scale), ``[B, Hq, ceil(Sq / 128) * 128]``; +inf for padding rows."""
    batch, heads, q_len, _ = query.shape
    kv_heads = key.shape[1]
    limits = torch.full((batch, heads, q_len + -q_len % CODE_ROWS), torch.inf, device=query.device)
    for b, (offset, start, end) in enumerate(bounds.tolist()):
        # Rows that are no padding stand at the positions start to end - 1.
        for first in range(max(offset, start), min(offset + q_len, end), _TILE):
            rows = torch.arange(first, min(first + _TILE, offset + q_len, end), device=query.device)
            local = torch.arange(max(first - local_tokens + 1, start), int(rows[-1]) + 1, device=query.device)
            sink = torch.arange(start, min(start + sink_tokens, end), device=query.device)
            at = torch.cat([sink, local])
            near = (local > rows[:, None] - local_tokens) & (local >= start + sink_tokens)
            allowed = torch.cat([sink.expand(len(rows), -1) == sink, near], 1) & (at <= rows[:, None])
            smooth = key[b][:, at].float() - mean[b, :, None]  # [Hkv, N, D]
            tile = query[b][:, rows - offset].float().unflatten(0, (kv_heads, -1))  # [Hkv, G, M, D]
            logits = (tile @ smooth[:, None].transpose(-1, -2)).flatten(0, 1) * scale
            limit = logits.masked_fill(~allowed, -torch.inf).logsumexp(-1) + threshold[:, None].log()
            limits[b, :, rows - offset] = limit / (scale * query_scale[b][:, rows - offset])
    return limits
