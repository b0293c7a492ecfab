# SPDX-License-Identifier: BSD-3-Clause
"""Attention over kept blocks."""

from typing import Any

import torch
from torch import Tensor

from sale_flex.reference.common import repeat_heads, scaled_products
from sale_flex.reference.visibility import Mod, modified, visible_elements


def masked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kept: Tensor,
    *,
    bounds: Tensor,
    block_size: tuple[int, int],
    scale: float,
    score_mod: Mod | None = None,
    mask_mod: Mod | None = None,
    block_mask: Any = None,
    is_causal: bool = True,
    sink_logits: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention to the elements that rows see in kept blocks; differentiable in query, key and value.

    Args:
        query: ``[B, Hq, Sq, D]``.
        key: ``[B, Hkv, Skv, D]``.
        value: ``[B, Hkv, Skv, Dv]``.
        kept: bool ``[B, Hq, nq, nk]``.
        bounds: int32 ``[B, 3]``.
        block_size: (query rows, keys) of a block.
        scale: Softmax scale.
        score_mod: As flex_attention takes it.
        mask_mod: Likewise.
        block_mask: A BlockMask, see `sale_flex.reference.keep_map`.
        is_causal: Whether keys after a row's position are hidden.
        sink_logits: ``[Hq]``: one more logit for every row of a head, which takes probability and has no value.

    Returns:
        float64 ``[B, Hq, Sq, Dv]``, 0 where a row sees nothing in kept blocks; and float64 ``[B, Hq, Sq]``, the natural
        logarithm of the sum of exponentials of what it sees, without the sink; -inf for nothing.
    """
    heads, q_len, kv_len = query.shape[1], query.shape[2], key.shape[2]
    wide = kept.repeat_interleave(block_size[0], 2).repeat_interleave(block_size[1], 3)[:, :, :q_len, :kv_len]
    visible = wide & visible_elements(bounds, heads, q_len, kv_len, mask_mod, block_mask, is_causal)
    row = torch.arange(q_len, device=query.device).expand(len(query), -1)
    logits = scaled_products(query, key.double(), scale)
    logits = modified(score_mod, logits, row, torch.arange(kv_len, device=query.device))
    logits = logits.masked_fill(~visible, -torch.inf)
    sink = None if sink_logits is None else sink_logits.double()[:, None]
    # Any number does for the largest, if it is constant: the result does not depend on it.
    largest = logits.detach().amax(-1)
    if sink is not None:
        largest = torch.maximum(largest, sink.detach())
    largest = torch.where(largest == -torch.inf, 0.0, largest)
    weights = (logits - largest[..., None]).exp()
    total = weights.sum(-1)
    whole = total if sink is None else total + (sink - largest).exp()
    output = weights @ repeat_heads(value, heads).double() / torch.where(whole == 0, 1.0, whole)[..., None]
    lse = torch.where(total == 0, -torch.inf, torch.where(total == 0, 1.0, total).log() + largest)
    return output, lse
