# SPDX-License-Identifier: BSD-3-Clause
"""The index lists of a BlockMask, and how wide they are (docs/semantics.md, "Index lists")."""

from typing import NamedTuple

from torch import Tensor

from sale_flex.config import SaleConfig
from sale_flex.kernels.arguments import Grid

COMPACT_FROM = 1024
"""Key blocks from which on lists on a GPU are narrower than the attention map: 64K tokens in blocks of 64 keys."""

QUERY_SHARE = 3 / 16
"""Of the query's memory, what full lists may take."""

LIST_BYTES = 768 * 2**20
"""What full lists may take at most."""


class Room(NamedTuple):
    """Room in every query block's lists, in blocks."""

    partial: int
    full: int
    budget: int
    """Hits beyond what is always kept that there is room for."""


class IndexLists(NamedTuple):
    """What a BlockMask is made of."""

    kept: Tensor
    """int32 ``[B, Hq, nq, ceil(nk / 32)]`` bits, or empty if not wanted."""
    partial_num: Tensor
    """int32 ``[B, Hq, nq]``."""
    partial_idx: Tensor
    """int32 ``[B, Hq, nq, partial width]``, ascending; entries past the count mean nothing."""
    full_num: Tensor
    full_idx: Tensor


def plain_room(query: Tensor, grid: Grid, config: SaleConfig, dense_prefix: int, no_left_padding: bool) -> Room:
    """Room in the lists of a plain causal call, from what the host knows of it.

    Full width, one entry per key block, needs no thought and is what short calls get, and CPU programs insist on. On
    long ones the partial list needs room for the diagonal alone (without padding), and the full list is bounded for a
    rule that can choose what finds no room: unless a threshold tensor may hold a dense head.

    Args:
        query: ``[B, Hq, Sq, D]``.
        grid: Lengths and blocks.
        config: Rule, sink and local window.
        dense_prefix: As in `sale_flex.call.facts.Call`.
        no_left_padding: Whether every key is valid.

    Raises:
        ValueError: The rule's `max_blocks` has no room for what is always kept.
    """
    key_blocks, block_q, block_k = grid.key_blocks, grid.block_q, grid.block_k
    always = _always_kept(grid, config, dense_prefix)
    full = partial = key_blocks
    asked = config.rule.max_blocks
    if asked is not None:
        full = _asked_width(asked, always, key_blocks, dense_prefix)
    long = query.is_cuda and key_blocks > COMPACT_FROM
    if long and _may_be_bounded(config) and asked is None:
        full = min(key_blocks, max(_affordable(query, block_q), 2 * always))
    if long and no_left_padding and grid.q_len >= 2 * block_q:
        # A multiple of 4, so that the full list behind it starts at 16 bytes.
        partial = (block_q // block_k + 2 + 3) // 4 * 4
    return Room(partial, full, key_blocks if full >= key_blocks else full - always)


def masked_room(query: Tensor, grid: Grid, config: SaleConfig, dense_prefix: int) -> Room:
    """Room in the lists of a call under mods.

    Which of the blocks that a query block keeps are partial, only the mods know: on long calls on a GPU both lists are
    bounded, each by half of what `plain_room` gives the full one. What is kept in any case is reckoned for rows that
    see neighbouring keys; where rows of one query block see keys far apart, it may take more, and the last blocks that
    find no room are counted as dropped. `max_blocks` leaves hits the room that it leaves them in a plain call.

    Args:
        query: ``[B, Hq, Sq, D]``.
        grid: Lengths and blocks.
        config: Rule, sink and local window.
        dense_prefix: As in `sale_flex.call.facts.Call`.

    Raises:
        ValueError: The rule's `max_blocks` has no room for what is always kept.
    """
    key_blocks, block_q, block_k = grid.key_blocks, grid.block_q, grid.block_k
    spans = (config.sink_tokens, 2 * config.local_tokens, dense_prefix)
    always = sum(-(-(span + block_q) // block_k) + 1 for span in spans)
    width = key_blocks
    if config.rule.max_blocks is not None:
        plain = _always_kept(grid, config, dense_prefix)
        asked = _asked_width(config.rule.max_blocks, plain, key_blocks, dense_prefix)
        width = min(key_blocks, asked + always - plain)
        return Room(width, width, key_blocks if asked >= key_blocks else asked - plain)
    if query.is_cuda and key_blocks > COMPACT_FROM and _may_be_bounded(config):
        # A multiple of 4, so that the second list starts at 16 bytes.
        width = min(key_blocks, -(-max(_affordable(query, block_q) // 2, 2 * always) // 4) * 4)
    return Room(width, width, key_blocks if width >= key_blocks else width - always)


def _always_kept(grid: Grid, config: SaleConfig, dense_prefix: int) -> int:
    """Most blocks that a query block of a plain causal call keeps whatever its rule says."""
    # Sink, dense prefix, local window and diagonal; a window that is not aligned touches one block more.
    spans = (config.sink_tokens, dense_prefix + grid.block_q, config.local_tokens + grid.block_q)
    return sum(-(-span // grid.block_k) for span in spans) + 3


def _asked_width(max_blocks: int, always: int, key_blocks: int, dense_prefix: int) -> int:
    if max_blocks <= always and max_blocks < key_blocks:
        raise ValueError(
            f"config.rule.max_blocks must have room for the {always} blocks that are kept in any case (sink, "
            f"{dense_prefix} dense rows, local window), got {max_blocks}; raise it or lower min_length."
        )
    return min(key_blocks, max_blocks)


def _may_be_bounded(config: SaleConfig) -> bool:
    """Whether a list may be too short for what is hit: the rule says what to give up, and no head is dense."""
    rule = config.rule
    if config.on_miss == "dense" or not rule.gives_up or isinstance(rule.threshold, Tensor):
        return False
    return rule.threshold > 0


def _affordable(query: Tensor, block_q: int) -> int:
    """Entries of a full list that are in proportion to the query's memory."""
    batch, heads, q_len, dim = query.shape
    rows = batch * heads * -(-q_len // block_q)
    share = int(block_q * dim * query.element_size() * QUERY_SHARE) // 4
    return min(share, LIST_BYTES // (4 * rows))


def split_lists(kept: Tensor, partial_num: Tensor, full_num: Tensor, lists: Tensor, room: Room) -> IndexLists:
    """The two lists that lie side by side in `lists`."""
    # One tensor in two views, so that both have the strides of the other: torch before 2.12 assumes it.
    partial_idx, full_idx = lists[..., : room.partial], lists[..., room.partial :]
    if not lists.is_cuda:
        partial_idx, full_idx = partial_idx.contiguous(), full_idx.contiguous()
    return IndexLists(kept, partial_num, partial_idx, full_num, full_idx)
