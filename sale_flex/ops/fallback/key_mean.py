# SPDX-License-Identifier: BSD-3-Clause
"""The smoothing mean of the keys; see `sale_flex.kernels.key_mean` for the contract."""

import torch
from torch import Tensor


def key_mean(key: Tensor, bounds: Tensor, smooth_tokens: int) -> Tensor:
    """Mean of the first `smooth_tokens` valid keys, of those there are.

    A mean over the whole sequence would look into the future, and the same tokens in chunks, in one shot and padded
    would then choose different blocks. The sum is taken in float64 and rounded once: its bits do not depend on order.

    Args:
        key: ``[B, Hkv, Skv, D]``.
        bounds: int32 ``[B, 3]``.
        smooth_tokens: Length of the prefix; 0 gives zeros.

    Returns:
        float32 ``[B, Hkv, D]``. Non-finite elements count as 0.
    """
    batch, heads, kv_len, dim = key.shape
    start, end = bounds[:, 1, None].long(), bounds[:, 2, None].long()
    at = start + torch.arange(min(smooth_tokens, kv_len), device=key.device)  # [B, T]
    valid = at < end
    index = at.clamp_max(kv_len - 1)[:, None, :, None].expand(batch, heads, -1, dim)
    prefix = key.gather(2, index).double()
    prefix = torch.where(prefix.isfinite() & valid[:, None, :, None], prefix, 0.0)
    count = valid.sum(1).clamp_min(1).double()
    return (prefix.sum(2) / count[:, None, None]).float()
