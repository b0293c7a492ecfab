# SPDX-License-Identifier: BSD-3-Clause
"""SALE in plain torch, a function per stage: the oracle of every test.

Written to be read beside the paper (arXiv 2505.24179, section 3) and DESIGN.md ("Semantics"), with whole S x S tensors
and no thought for speed. It imports torch alone, so that nothing it is compared with can share its mistakes.

Shapes: query ``[B, Hq, Sq, D]``, key and value ``[B, Hkv, Skv, D]``, bounds int32 ``[B, 3]`` = (q_offset, start, end).
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor


class KeepMap(NamedTuple):
    """What the reference decided, on the grid of blocks."""

    kept: Tensor
    """bool ``[B, Hq, nq, nk]``: blocks that are kept."""
    hit: Tensor
    """bool ``[B, Hq, nq, nk]``: visible blocks that the rule itself asks for."""
    always: Tensor
    """bool ``[B, Hq, nq, nk]``: visible blocks kept whatever the rule says."""
    visible: Tensor
    """bool ``[B, 1, nq, nk]``: blocks in which some row sees some key."""
    full: Tensor
    """bool ``[B, 1, nq, nk]``: blocks in which every row sees every key."""
    margin: Tensor
    """``[B, Hq, nq, nk]``: largest (score - limit) over the block's visible elements, in logits; -inf if none."""


def make_bounds(
    batch: int,
    q_len: int,
    kv_len: int,
    q_offset: int | Tensor | None = None,
    kv_range: Tensor | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """(q_offset, start, end) of every batch row, int32 ``[B, 3]``."""
    offset = kv_len - q_len if q_offset is None else int(q_offset)
    if kv_range is None:
        kv_range = torch.tensor([[0, kv_len]], device=device).expand(batch, 2)
    column = torch.full((batch, 1), offset, device=device)
    return torch.cat([column, kv_range.to(device)], dim=1).to(torch.int32)


def visible(bounds: Tensor, q_len: int, kv_len: int) -> Tensor:
    """Which key each query row sees, bool ``[B, Sq, Skv]``: valid, not after it, and the row itself not padding."""
    offset, start, end = (bounds[:, n, None, None].long() for n in range(3))
    row = torch.arange(q_len, device=bounds.device)[None, :, None] + offset
    key = torch.arange(kv_len, device=bounds.device)[None, None, :]
    return (key >= start) & (key < end) & (key <= row) & (row < end)


def key_mean(key: Tensor, bounds: Tensor, smooth_tokens: int) -> Tensor:
    """Mean of the first `smooth_tokens` valid keys, float32 ``[B, Hkv, D]``; non-finite elements count as 0."""
    means = []
    for b, (_, start, end) in enumerate(bounds.tolist()):
        prefix = key[b, :, start : min(end, start + smooth_tokens)].double()
        prefix = torch.where(prefix.isfinite(), prefix, 0.0)
        means.append(prefix.sum(1) / max(prefix.shape[1], 1))
    return torch.stack(means).float()


def _symmetric(x: Tensor, dims: tuple[int, ...], bits: int) -> tuple[Tensor, Tensor]:
    """Codes of x in [-c, c] and the scale amax / c over `dims`, c = 7 or 127.

    Where the scale is no normal float (x is all but 0) it is 1. A non-finite element makes it NaN, and all codes 0.
    """
    amax = x.abs().amax(dims, keepdim=True)
    top = torch.full_like(amax, 2 ** (bits - 1) - 1)
    normal = amax / top >= torch.finfo(torch.float32).tiny
    scale = torch.where(normal, amax / top, 1.0)
    inverse = torch.where(normal, top / amax, 1.0)
    finite = amax.isfinite()
    codes = torch.where(finite, (x * inverse).round(), 0.0).clamp(-(2 ** (bits - 1) - 1), 2 ** (bits - 1) - 1)
    return codes.to(torch.int8), torch.where(finite, scale, torch.nan)


def quantize_rows(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Symmetric codes with a scale per row: int8 ``[B, H, S, D]``, float32 ``[B, H, S]`` (NaN: a non-finite row)."""
    codes, scale = _symmetric(x.float(), (-1,), bits)
    return codes, scale[..., 0]


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
            codes[b, :, keys], scale = _symmetric(x, (-2, -1), bits)
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
    smooth = _repeat(key.to(dtype) - mean.to(dtype)[:, :, None], heads)
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
    product = query_codes.to(dtype) @ _repeat(key_codes, heads).to(dtype).transpose(-1, -2)
    at = torch.arange(key_codes.shape[2], device=bounds.device)[None] - bounds[:, 1, None]
    at = at.clamp_min(0).div(group, rounding_mode="floor").long()
    per_key = key_scale.gather(2, at[:, None].expand(-1, key_scale.shape[1], -1))
    per_key = _repeat(per_key[..., None], heads)[..., 0].to(dtype)
    return product * per_key[:, :, None, :] * (query_scale.to(dtype) * scale)[..., None]


def keep_map(
    query: Tensor,
    key: Tensor,
    config: Any,
    value: Tensor | None = None,
    q_offset: int | Tensor | None = None,
    kv_range: Tensor | None = None,
    scale: float | None = None,
    dtype: torch.dtype = torch.float32,
) -> KeepMap:
    """Which blocks `config` (a `SaleConfig`) keeps, from whole score matrices.

    Args:
        query: ``[B, Hq, Sq, D]``.
        key: ``[B, Hkv, Skv, D]``.
        config: The fields of `sale_flex.SaleConfig`.
        value: ``[B, Hkv, Skv, D]``; blocks with a non-finite value are kept.
        q_offset: Key index of the first query; by default ``Skv - Sq``.
        kv_range: int ``[B, 2]``, first and one-past-last valid key.
        scale: Softmax scale; by default ``D ** -0.5``.
        dtype: float32 or float64, the arithmetic of logits and statistics.
    """
    batch, heads, q_len, dim = query.shape
    kv_len = key.shape[2]
    block_q, block_k = config.block_size
    scale = dim**-0.5 if scale is None else scale
    bounds = make_bounds(batch, q_len, kv_len, q_offset, kv_range, query.device)
    seen = visible(bounds, q_len, kv_len)

    mean = key_mean(key, bounds, config.smooth_tokens)
    q_codes, q_scale = quantize_rows(query, config.bits)
    k_codes, k_scale = quantize_groups(key, mean, bounds, block_k, config.bits)
    score = element_scores(q_codes, q_scale, k_codes, k_scale, bounds, block_k, scale, dtype)
    limit = row_limits(
        query, key, mean, bounds, config.threshold, scale, config.sink_tokens, config.local_tokens, dtype
    )
    # Negated, so that a NaN on either side keeps the block.
    passes = ~(score < limit[..., None]) & seen[:, None]
    margin = (score - limit[..., None]).masked_fill(~seen[:, None], -torch.inf)

    seen_blocks = _blocks(seen[:, None], block_q, block_k)
    always = _always(seen, bounds, config, q_len)[:, None]
    always = _blocks(always, block_q, block_k).expand(batch, heads, -1, -1)
    if value is not None:
        bad = ~value.isfinite().all(-1)  # [B, Hkv, Skv]
        bad = _repeat(bad[..., None], heads)[..., 0]
        always = always | _blocks(bad[:, :, None, :] & seen[:, None], block_q, block_k)
    hidden = _blocks(~seen[:, None], block_q, block_k)
    hit = _blocks(passes, block_q, block_k)
    return KeepMap(
        kept=hit | always,
        hit=hit,
        always=always,
        visible=seen_blocks,
        full=seen_blocks & ~hidden,
        margin=_pool(margin, block_q, block_k),
    )


def masked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kept: Tensor,
    bounds: Tensor,
    block_size: tuple[int, int],
    scale: float,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Softmax attention over visible keys in kept blocks, ``[B, Hq, Sq, D]``; 0 where there are none."""
    heads = query.shape[1]
    logits = query.to(dtype) @ _repeat(key, heads).to(dtype).transpose(-1, -2) * scale
    seen = visible(bounds, query.shape[2], key.shape[2])[:, None]
    wide = kept.repeat_interleave(block_size[0], 2).repeat_interleave(block_size[1], 3)
    seen = seen & wide[:, :, : query.shape[2], : key.shape[2]]
    logits = logits.masked_fill(~seen, -torch.inf)
    weights = logits.softmax(-1).masked_fill(~seen.any(-1, keepdim=True), 0.0)
    return weights @ _repeat(value, heads).to(dtype)


def _always(seen: Tensor, bounds: Tensor, config: Any, q_len: int) -> Tensor:
    """Elements whose block is kept whatever the rule says, bool ``[B, Sq, Skv]``."""
    _, start, _ = (bounds[:, n, None, None].long() for n in range(3))
    row = torch.arange(q_len, device=bounds.device)[None, :, None] + bounds[:, 0, None, None]
    key = torch.arange(seen.shape[2], device=bounds.device)[None, None, :]
    sink = key < start + config.sink_tokens
    local = key > row - config.local_tokens
    # A query block with one early row is early as a whole: a block is kept or dropped for all its rows.
    block_q = config.block_size[0]
    early = (row - start < config.min_length) & seen.any(-1, keepdim=True)
    early = early | torch.tensor(2 * q_len < block_q, device=bounds.device)
    early = torch.nn.functional.pad(early, (0, 0, 0, -q_len % block_q))
    early = early.unflatten(1, (-1, block_q)).any(2).repeat_interleave(block_q, 1)[:, :q_len]
    return seen & (sink | local | early)


def _repeat(x: Tensor, heads: int) -> Tensor:
    """KV heads repeated for the query heads that share them."""
    return x.repeat_interleave(heads // x.shape[1], dim=1)


def _pool(x: Tensor, block_q: int, block_k: int) -> Tensor:
    """Maximum of every block, NaN counting as the largest."""
    x = torch.nn.functional.pad(x, (0, -x.shape[-1] % block_k, 0, -x.shape[-2] % block_q), value=-torch.inf)
    return x.unflatten(-1, (-1, block_k)).unflatten(-3, (-1, block_q)).amax((-1, -3))


def _blocks(x: Tensor, block_q: int, block_k: int) -> Tensor:
    """Whether any element of a block is set."""
    return _pool(x.float(), block_q, block_k) > 0
