# SPDX-License-Identifier: BSD-3-Clause
"""Attention under an explicit mask: decoding steps, and masks that a user made.

scaled_dot_product_attention where it can, plain torch for what that lacks: soft caps and sinks.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward

_SCORES = 2**24
"""Logits per batch row and head that are alive at a time."""


def dense_step(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    dropout: float,
    softcap: float | None,
    s_aux: Tensor | None,
    causal: bool,
    position_bias: Tensor | None,
) -> Tensor:
    """Dense attention, ``[B, Sq, Hq, Dv]``.

    Args:
        module: The attention module.
        query: ``[B, Hq, Sq, D]``.
        key: ``[B, Hkv, Skv, D]``.
        value: ``[B, Hkv, Skv, Dv]``.
        mask: ``[B or 1, Hq or 1, Sq, Skv]``, bool (True is seen) or added to the logits; None: causal if `causal` says
            so and there is more than one query, counted from key 0.
        scaling: Softmax scale, or None for ``D ** -0.5``.
        dropout: Probability.
        softcap: Of the logits, or None.
        s_aux: Sink logits ``[Hq]``, or None.
        causal: See `mask`.
        position_bias: Added to the logits, or None.
    """
    if softcap is None and s_aux is None:
        extra: dict[str, Any] = {} if position_bias is None else {"position_bias": position_bias}
        output: Tensor = sdpa_attention_forward(
            module, query, key, value, mask, dropout=dropout, scaling=scaling, is_causal=causal, **extra
        )[0]
        return output
    if dropout or position_bias is not None:
        raise NotImplementedError(
            "attn_implementation='sale_flex' has no dropout and no position_bias beside a soft cap or sinks, got "
            f"dropout {dropout}; call model.eval()."
        )
    scaling = query.shape[3] ** -0.5 if scaling is None else scaling
    length, keys = query.shape[2], key.shape[2]
    if mask is None and causal and length > 1:
        at = torch.arange(keys, device=query.device)
        mask = (at <= at[:length, None])[None, None]
    if mask is not None:
        mask = mask[..., :keys]
    # One comparison, not a count of parts: a compiled decoding step must not depend on how long the cache is.
    if length * keys <= _SCORES:
        return _rows(query, key, value, mask, scaling, softcap, s_aux).transpose(1, 2).contiguous()
    parts = []
    for first in range(0, length, max(1, _SCORES // keys)):
        some = slice(first, first + max(1, _SCORES // keys))
        seen = mask if mask is None else mask[:, :, some]
        parts.append(_rows(query[:, :, some], key, value, seen, scaling, softcap, s_aux))
    return torch.cat(parts, 2).transpose(1, 2).contiguous()


def _rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float,
    softcap: float | None,
    s_aux: Tensor | None,
) -> Tensor:
    """Attention of a few rows, with float32 softmax."""
    batch, heads, rows, _ = query.shape
    grouped = query.reshape(batch, key.shape[1], -1, query.shape[3])  # the heads of a group, one after the other
    scores = (grouped @ key.transpose(-1, -2)).float().mul(scaling).view(batch, heads, rows, -1)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    peak = scores.amax(-1, keepdim=True).clamp_min(torch.finfo(scores.dtype).min)
    sink = None
    if s_aux is not None:
        sink = s_aux.float()[:, None, None]
        peak = torch.maximum(peak, sink)
    weights = torch.exp(scores - peak)
    total = weights.sum(-1, keepdim=True)
    if sink is not None:
        total = total + torch.exp(sink - peak)
    weights = (weights / total.clamp_min(torch.finfo(total.dtype).tiny)).to(value.dtype)
    return (weights.view(batch, key.shape[1], -1, weights.shape[3]) @ value).view(batch, heads, rows, -1)
