# SPDX-License-Identifier: BSD-3-Clause
"""Dense attention to compare a kernel with: any mask, any score_mod, float64, and a stated policy for NaN.

The policy: what a query does not see does not exist for it. A NaN or an infinity in a hidden key or value changes
nothing, one in a visible key or value reaches the row as IEEE arithmetic has it, and a row that sees nothing is 0. (A
tiled kernel multiplies hidden values of a visited tile by 0, and 0 times NaN is NaN: it may show more, never less.)
"""

import torch
from torch import Tensor

from sale_flex.mods import MaskMod, ScoreMod
from sale_flex.reference import make_bounds, visible_elements
from sale_flex.testing.inputs import Shape


def causal_mask(shape: Shape, device: torch.device | str = "cpu") -> Tensor:
    """Which key each query sees, bool ``[B, 1, Sq, Skv]``: valid, not after it, and the query itself no padding."""
    where = shape.positions(device)
    bounds = make_bounds(shape.batch, shape.q_len, shape.kv_len, where["q_offset"], where["kv_range"], device)
    return visible_elements(bounds, 1, shape.q_len, shape.kv_len)


def mod_mask(
    mask_mod: MaskMod, batch: int, heads: int, q_len: int, kv_len: int, device: torch.device | str = "cpu"
) -> Tensor:
    """A mask_mod evaluated everywhere, bool ``[B, H, Sq, Skv]``."""
    mask = mask_mod(*_indices(batch, heads, q_len, kv_len, device))
    return mask.expand(batch, heads, q_len, kv_len)


def dense_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    *,
    score_mod: ScoreMod | None = None,
    scale: float | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Softmax attention over what the mask shows, with whole S x S tensors.

    Args:
        query: ``[B, Hq, Sq, D]``.
        key: ``[B, Hkv, Skv, D]``, Hq a multiple of Hkv; query head h uses KV head ``h // (Hq // Hkv)``.
        value: ``[B, Hkv, Skv, Dv]``.
        mask: bool, broadcastable to ``[B, Hq, Sq, Skv]``; None shows everything.
        score_mod: Changes the scaled logits, as in flex_attention.
        scale: Softmax scale; by default ``D ** -0.5``.
        dtype: What everything is computed in. The inputs are converted to it first, so make them in the dtype under
            test: rounding them is no error of a kernel.

    Returns:
        ``[B, Hq, Sq, Dv]`` in `dtype`.
    """
    batch, heads, q_len, dim = query.shape
    kv_len = key.shape[2]
    key, value = (x.to(dtype).repeat_interleave(heads // x.shape[1], 1) for x in (key, value))
    logits = query.to(dtype) @ key.transpose(-1, -2) * (dim**-0.5 if scale is None else scale)
    if score_mod is not None:
        logits = score_mod(logits, *_indices(batch, heads, q_len, kv_len, query.device)).to(dtype)
    seen = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=query.device) if mask is None else mask
    seen = seen.expand(batch, heads, q_len, kv_len)
    weights = logits.masked_fill(~seen, -torch.inf).softmax(-1)
    weights = weights.masked_fill(~seen.any(-1, keepdim=True), 0.0)
    finite = value.isfinite()
    output = weights @ torch.where(finite, value, 0.0)
    # One key at a time, because 0 * NaN must not come from keys that a row does not see.
    for j in (~finite).any(-1).any(0).any(0).nonzero().flatten().tolist():
        special = torch.where(finite[:, :, j], 0.0, value[:, :, j])[:, :, None]
        output = output + torch.where(seen[..., j, None], weights[..., j, None] * special, 0.0)
    return output


def _indices(batch: int, heads: int, q_len: int, kv_len: int, device: torch.device | str) -> list[Tensor]:
    """Index tensors of the four dimensions, shaped to broadcast against each other."""
    sizes = (batch, heads, q_len, kv_len)
    return [
        torch.arange(size, device=device).view([-1 if n == place else 1 for n in range(4)])
        for place, size in enumerate(sizes)
    ]
