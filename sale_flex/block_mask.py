# SPDX-License-Identifier: BSD-3-Clause
"""`create_sale_block_mask`: from a rule's hit bits to a FlexAttention `BlockMask`."""

from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, and_masks

from sale_flex import ops
from sale_flex.break_even import early_rows
from sale_flex.config import SaleConfig
from sale_flex.geometry import Grid
from sale_flex.index_lists import Widths, build_index_lists, list_widths
from sale_flex.mask_mods import kept_block, visible
from sale_flex.rules import RULES
from sale_flex.stats import SaleStats, mask_stats
from sale_flex.validation import check_inputs


class MaskResult(NamedTuple):
    """A block mask and what it cost, for callers who asked for ``stats=True``."""

    block_mask: BlockMask
    stats: SaleStats


@overload
def create_sale_block_mask(
    query: Tensor,
    key: Tensor,
    config: SaleConfig = ...,
    *,
    value: Tensor | None = ...,
    q_offset: int | Tensor | None = ...,
    kv_range: Tensor | None = ...,
    scale: float | None = ...,
    stats: Literal[False] = ...,
) -> BlockMask: ...
@overload
def create_sale_block_mask(
    query: Tensor,
    key: Tensor,
    config: SaleConfig = ...,
    *,
    value: Tensor | None = ...,
    q_offset: int | Tensor | None = ...,
    kv_range: Tensor | None = ...,
    scale: float | None = ...,
    stats: Literal[True],
) -> MaskResult: ...
def create_sale_block_mask(
    query: Tensor,
    key: Tensor,
    config: SaleConfig = SaleConfig(),  # noqa: B008 - frozen
    *,
    value: Tensor | None = None,
    q_offset: int | Tensor | None = None,
    kv_range: Tensor | None = None,
    scale: float | None = None,
    stats: bool = False,
) -> BlockMask | MaskResult:
    """Choose the blocks of the causal attention map that matter.

    The mask is exact on what it keeps: its ``mask_mod`` is causal, valid and *kept*, so that even uncompiled
    flex_attention, which ignores block indices, attends to the kept blocks alone.

    Args:
        query: ``[B, Hq, Sq, D]``, float32, float16 or bfloat16, any strides.
        key: ``[B, Hkv, Skv, D]``, Hq a multiple of Hkv, the query's dtype and device.
        config: What to keep; see `SaleConfig`.
        value: ``[B, Hkv, Skv, D]``. If given, blocks with a non-finite value are kept, as attention would show them.
        q_offset: Key index of the first query, an int or a 0-d integer tensor; by default ``Skv - Sq``.
        kv_range: int ``[B, 2]``, first and one-past-last valid key of each batch row; by default all keys. Queries that
            stand outside it are padding and see nothing.
        scale: Softmax scale; by default ``D ** -0.5``.
        stats: Also return what was kept.

    Returns:
        A BlockMask of shape ``[B, Hq, Sq, Skv]`` with ``config.block_size`` blocks and ascending, disjoint lists of
        partial and full blocks. On a GPU, lists of more than 1,024 key blocks are compact: narrower than the map, which
        BlockMask.to_dense does not know; `sale_flex.testing.block_map` does. With ``stats=True`` a `MaskResult`.

    Raises:
        TypeError, ValueError: An argument breaks its rule; the message names both.
        NotImplementedError: An input requires a gradient.
    """
    check_inputs(query, key, value, config, q_offset, kv_range, scale)
    scale = query.shape[3] ** -0.5 if scale is None else scale
    bounds = make_bounds(query, key, q_offset, kv_range)
    mask, counts = build_block_mask(query, key, value, bounds, kv_range is None, scale, config)
    return MaskResult(mask, counts()) if stats else mask


def make_bounds(query: Tensor, key: Tensor, q_offset: int | Tensor | None, kv_range: Tensor | None) -> Tensor:
    """(q_offset, start, end) of every batch row, int32 ``[B, 3]``, on the device."""
    given = isinstance(q_offset, Tensor)
    offset = key.shape[2] - query.shape[2] if q_offset is None or given else q_offset
    return ops.query_bounds(query, key, kv_range, q_offset if given else None, offset)


def build_block_mask(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    bounds: Tensor,
    from_zero: bool,
    scale: float,
    config: SaleConfig,
    lookup: bool = True,
    leave_early: bool = False,
) -> tuple[BlockMask, Callable[[], SaleStats]]:
    """`create_sale_block_mask` on checked input.

    Args:
        query: ``[B, Hq, Sq, D]``.
        key: ``[B, Hkv, Skv, D]``.
        value: ``[B, Hkv, Skv, D]`` or None.
        bounds: int32 ``[B, 3]`` from `make_bounds`.
        from_zero: Whether every batch row's first valid key is known to be key 0.
        scale: Softmax scale.
        config: What to keep.
        lookup: Whether the mask_mod looks up the kept blocks. Without, it is for a caller who knows that the block
            indices will be followed: the lookup costs the compiled kernel registers in every block.
        leave_early: Leave the lists of early query blocks empty, for a caller who computes their rows densely. Only
            their first row may have no key before it.

    Returns:
        The block mask, and a function that counts what it keeps: the counts are worth launches only to those who ask.
    """
    heads, q_len = query.shape[1:3]
    kv_len = key.shape[2]
    block_q, block_k = config.block_size
    grid = Grid(q_len, kv_len, block_q, block_k)
    threshold = config.threshold
    if not isinstance(threshold, Tensor):
        threshold = torch.full((heads,), threshold, dtype=torch.float32, device=query.device)
    min_length = early_rows(query, config)
    # A call with less than half a block of queries is a decoding step: every row counts as early.
    widths = list_widths(query, kv_len, config, min_length, from_zero)
    if 2 * q_len < block_q:
        min_length, widths = kv_len, Widths(grid.key_blocks, grid.key_blocks, grid.key_blocks)
    rule = RULES[config.metric]
    hits, dropped = rule.estimate(
        query,
        key,
        rule.codes(query, key, bounds, config),
        bounds,
        from_zero,
        threshold.float(),
        scale,
        config,
        widths.budget,
    )
    nonfinite = None if value is None else ops.nonfinite_blocks(value, bounds, block_k)
    lists = build_index_lists(hits, nonfinite, bounds, query, key, config, min_length, widths, lookup, leave_early)
    del hits
    mask_mod = visible(bounds)
    if lookup:
        mask_mod = and_masks(kept_block(lists.kept, block_q, block_k), mask_mod)
    mask = BlockMask.from_kv_blocks(
        lists.partial_num,
        lists.partial_idx,
        lists.full_num,
        lists.full_idx,
        BLOCK_SIZE=config.block_size,
        mask_mod=mask_mod,
        seq_lengths=(q_len, kv_len),
        compute_q_blocks=False,
    )
    path = f"{'triton' if query.is_cuda else 'torch'} scan + flex"
    return mask, partial(mask_stats, lists.partial_num, lists.full_num, dropped, bounds, grid, path)
