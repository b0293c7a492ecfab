# SPDX-License-Identifier: BSD-3-Clause
"""What a rule decides on: who sees whom, what is kept in any case, and exact and estimated logits."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sale_flex.reference.common import block_any, key_mean, scaled_products
from sale_flex.reference.visibility import (
    Mod,
    early_elements,
    make_bounds,
    modified,
    near_elements,
    visible_elements,
)


class Call(NamedTuple):
    """A call. What depends on masks has Hs heads: Hq with a mask_mod or a block mask, otherwise 1."""

    query: Tensor
    """``[B, Hq, Sq, D]``."""
    key: Tensor
    """``[B, Hkv, Skv, D]``."""
    mean: Tensor
    """float32 ``[B, Hkv, D]``: the smoothing mean."""
    bounds: Tensor
    """int32 ``[B, 3]``."""
    elements: Tensor
    """bool ``[B, Hs, Sq, Skv]``: which key each row sees."""
    near: Tensor
    """bool ``[B, Hs, Sq, Skv]``: sink and local keys of rows that see something, visible or not."""
    visible: Tensor
    """bool ``[B, Hs, nq, nk]``: blocks in which some row sees some key."""
    full: Tensor
    """bool ``[B, Hs, nq, nk]``: blocks in which every row sees every key."""
    always: Tensor
    """bool ``[B, Hs, nq, nk]``: visible blocks that are near a row, or that an early row sees."""
    causal: bool
    """Whether keys after a row's position are hidden from it."""
    score_mod: Mod | None
    scale: float
    dtype: torch.dtype
    """float32 or float64: the arithmetic of logits and statistics."""

    @property
    def candidate(self) -> Tensor:
        """bool ``[B, Hs, nq, nk]``: the blocks that a rule decides about."""
        return self.visible & ~self.always


def make_call(
    query: Tensor,
    key: Tensor,
    config: Any,
    *,
    score_mod: Mod | None = None,
    mask_mod: Mod | None = None,
    block_mask: Any = None,
    is_causal: bool = True,
    q_offset: int | Tensor | None = None,
    kv_range: Tensor | None = None,
    scale: float | None = None,
    dtype: torch.dtype = torch.float32,
) -> Call:
    """The facts of a call, with arguments as `sale_flex.reference.keep_map` takes them.

    Raises:
        ValueError: `min_length` is None.
    """
    if config.min_length is None:
        raise ValueError(
            "config.min_length must be a number of tokens, got None: what None means depends on the device, so resolve "
            "it first, for instance with dataclasses.replace(config, min_length=0)."
        )
    batch, heads, q_len, dim = query.shape
    kv_len = key.shape[2]
    bounds = make_bounds(batch, q_len, kv_len, q_offset, kv_range, query.device)
    elements = visible_elements(bounds, heads, q_len, kv_len, mask_mod, block_mask, is_causal)
    near = near_elements(elements, bounds, is_causal, config.sink_tokens, config.local_tokens)
    visible = block_any(elements, *config.block_size)
    return Call(
        query=query,
        key=key,
        mean=key_mean(key, bounds, config.smooth_tokens),
        bounds=bounds,
        elements=elements,
        near=near,
        visible=visible,
        full=~block_any(~elements, *config.block_size),
        always=visible & block_any(near | early_elements(elements, config.min_length), *config.block_size),
        causal=is_causal,
        score_mod=score_mod,
        scale=dim**-0.5 if scale is None else scale,
        dtype=dtype,
    )


def exact_logits(call: Call, rows: Tensor, index: Tensor) -> Tensor:
    """Logits of rows and all keys, ``[B, Hq, M, Skv]``: of smoothed ones, or as they are and after a score_mod.

    The mean moves all logits of a row alike: a softmax does not see that, but a score_mod does.

    Args:
        call: Keys, mean and score_mod.
        rows: ``[B, Hq, M, D]``.
        index: int64 ``[B, M]``: which query row each one is for the score_mod.
    """
    key = call.key.to(call.dtype)
    if call.score_mod is None:
        return scaled_products(rows, key - call.mean.to(call.dtype)[:, :, None], call.scale)
    at = torch.arange(key.shape[2], device=key.device)
    return modified(call.score_mod, scaled_products(rows, key, call.scale), index, at)


def estimated_logits(call: Call, smoothed: Tensor, rows: Tensor, index: Tensor, at: Tensor) -> Tensor:
    """Estimates for smoothed keys, ``[B, Hq, M, N]``, as what they are compared with: see `exact_logits`.

    Args:
        call: Mean and score_mod.
        smoothed: ``[B, Hq, M, N]``.
        rows: ``[B, Hq, M, D]``.
        index: int64 ``[B, M]``: which query row each one is for the score_mod.
        at: int64 ``[N]``: which key each column is for it.
    """
    if call.score_mod is None:
        return smoothed
    of_mean = scaled_products(rows, call.mean.to(call.dtype)[:, :, None], call.scale)
    return modified(call.score_mod, smoothed + of_mean, index, at)
