# SPDX-License-Identifier: BSD-3-Clause
"""`sale_attention`: block mask and compiled attention in one call, or dense attention where that is what is asked."""

from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from sale_flex.block_mask import build_block_mask, make_bounds
from sale_flex.break_even import early_rows, rows_of_early_blocks
from sale_flex.config import SaleConfig
from sale_flex.flex import run_flex
from sale_flex.geometry import Grid
from sale_flex.stats import SaleStats, dense_stats, with_dense_rows
from sale_flex.validation import check_inputs

_DENSE_MASK_LIMIT = 2**22
"""Elements of an explicit mask that the dense shortcut may build per batch row; above, the block path runs."""


class SaleResult(NamedTuple):
    """Output and counts, for callers who asked for ``stats=True``."""

    output: Tensor
    stats: SaleStats


@overload
def sale_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    config: SaleConfig = ...,
    *,
    q_offset: int | Tensor | None = ...,
    kv_range: Tensor | None = ...,
    scale: float | None = ...,
    stats: Literal[False] = ...,
    kernel_options: dict[str, Any] | None = ...,
) -> Tensor: ...
@overload
def sale_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    config: SaleConfig = ...,
    *,
    q_offset: int | Tensor | None = ...,
    kv_range: Tensor | None = ...,
    scale: float | None = ...,
    stats: Literal[True],
    kernel_options: dict[str, Any] | None = ...,
) -> SaleResult: ...
def sale_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    config: SaleConfig = SaleConfig(),  # noqa: B008 - frozen
    *,
    q_offset: int | Tensor | None = None,
    kv_range: Tensor | None = None,
    scale: float | None = None,
    stats: bool = False,
    kernel_options: dict[str, Any] | None = None,
) -> Tensor | SaleResult:
    """Causal attention on the blocks that a low-bit estimate keeps.

    Short prompts (no more keys than ``config.min_length``) and decoding steps (fewer queries than half a block) are
    dense by definition and run scaled_dot_product_attention; ``stats`` says so. Everything else builds a block mask and
    runs compiled flex_attention on it.

    Args:
        query: ``[B, Hq, Sq, D]``, float32, float16 or bfloat16, any strides.
        key: ``[B, Hkv, Skv, D]``, Hq a multiple of Hkv, the query's dtype and device.
        value: ``[B, Hkv, Skv, D]``.
        config: What to keep; see `SaleConfig`.
        q_offset: Key index of the first query, an int or a 0-d integer tensor; by default ``Skv - Sq``.
        kv_range: int ``[B, 2]``, first and one-past-last valid key of each batch row; by default all keys. Queries that
            stand outside it are padding; their output is 0.
        scale: Softmax scale; by default ``D ** -0.5``.
        stats: Also return what was kept and which path ran.
        kernel_options: Options for flex_attention, over those of `flex_kernel_options`.

    Returns:
        ``[B, Hq, Sq, D]`` in the query's dtype. With ``stats=True`` a `SaleResult`.

    Raises:
        TypeError, ValueError: An argument breaks its rule; the message names both.
        NotImplementedError: An input requires a gradient.
    """
    check_inputs(query, key, value, config, q_offset, kv_range, scale)
    scale = query.shape[3] ** -0.5 if scale is None else scale
    min_length = early_rows(query, config)
    square = q_offset is None and kv_range is None and query.shape[2] == key.shape[2]
    reason = _dense_reason(query, key, config.block_size[0], min_length, q_offset is None and kv_range is None)
    if reason is not None:
        bounds = None if square and not stats else make_bounds(query, key, q_offset, kv_range)
        output = dense_sdpa(query, key, value, None if square else bounds, scale)
        if bounds is None or not stats:
            return output
        grid = Grid(query.shape[2], key.shape[2], *config.block_size)
        return SaleResult(output, dense_stats(bounds, query.shape[1], grid, reason))
    bounds = make_bounds(query, key, q_offset, kv_range)
    # Our own program goes to Inductor, which follows block indices. So may a caller's torch.compile; if it does not,
    # flex_attention may be computed densely under its mask_mod, which then has to know the kept blocks.
    lookup = False
    if torch.compiler.is_compiling():
        from sale_flex.compiler import inductor_is_tracing  # here: it imports torch._dynamo, and that Triton

        lookup = not inductor_is_tracing()
    # Whole blocks of early rows are dense, and where no padding is in the way SDPA computes them faster. Not in a
    # caller's program: Inductor's C++ template for flex_attention lets nothing write into its output.
    early = 0
    if square and not torch.compiler.is_compiling():
        early = rows_of_early_blocks(min_length, config.block_size[0], query.shape[2])
    block_mask, counts = build_block_mask(
        query, key, value, bounds, kv_range is None, scale, config, lookup, leave_early=early > 0
    )
    output = run_flex(query, key, value, block_mask, scale, kernel_options)
    del block_mask  # its lists are the largest thing that the call allocates
    if early:
        output[:, :, :early] = dense_sdpa(query[:, :, :early], key[:, :, :early], value[:, :, :early], None, scale)
    if not stats:
        return output
    kept = with_dense_rows(counts(), bounds, Grid(early, key.shape[2], *config.block_size)) if early else counts()
    return SaleResult(output, kept)


def _dense_reason(query: Tensor, key: Tensor, block_q: int, min_length: int, plain: bool) -> str | None:
    """Why the call is dense by its lengths alone, or None. What the lengths do not tell, the block mask does."""
    q_len, kv_len = query.shape[2], key.shape[2]
    if q_len * kv_len > _DENSE_MASK_LIMIT and not (plain and q_len == kv_len):
        return None
    if 2 * q_len < block_q:
        return "dense sdpa: fewer queries than half a block"
    if kv_len <= min_length:
        return "dense sdpa: no more keys than min_length"
    return None


def dense_sdpa(query: Tensor, key: Tensor, value: Tensor, bounds: Tensor | None, scale: float) -> Tensor:
    """Dense causal attention; with `bounds`, through an explicit mask, and padding rows are 0."""
    grouped = query.shape[1] != key.shape[1]
    if bounds is None:
        return scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=grouped)
    offset, start, end = (bounds[:, n, None, None] for n in range(3))
    position = torch.arange(query.shape[2], device=query.device)[None, :, None] + offset
    at = torch.arange(key.shape[2], device=query.device)
    seen = (at >= start) & (at <= position) & (position < end)  # [B, Sq, Skv]
    output = scaled_dot_product_attention(query, key, value, attn_mask=seen[:, None], scale=scale, enable_gqa=grouped)
    padding = (position < start) | (position >= end)  # [B, Sq, 1]
    return output.masked_fill(padding[:, None], 0.0)
