# SPDX-License-Identifier: BSD-3-Clause
"""From hit bits to the index lists of a BlockMask, and how wide the lists are (docs/semantics.md, "Index lists")."""

from typing import NamedTuple

from torch import Tensor

from sale_flex import ops
from sale_flex.config import SaleConfig

COMPACT_FROM = 1024
"""Key blocks from which on lists on a GPU are narrower than the attention map: 64K tokens in blocks of 64 keys."""

QUERY_SHARE = 3 / 16
"""Of the query's memory, what full lists may take."""

LIST_BYTES = 768 * 2**20
"""What full lists may take at most."""


class Widths(NamedTuple):
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


def list_widths(query: Tensor, kv_len: int, config: SaleConfig, min_length: int, from_zero: bool) -> Widths:
    """How wide the lists of a call are, from what the host knows of it.

    Full width, one entry per key block, needs no thought and is what short calls get, and CPU programs insist on. On
    long ones the partial list needs room for the diagonal alone (without padding), and the full list is bounded for the
    mass rule, which can choose by mass what finds no room: unless a threshold tensor may hold a dense head.

    Args:
        query: ``[B, Hq, Sq, D]``.
        kv_len: Skv.
        config: Rule, threshold, blocks and `max_blocks`.
        min_length: Resolved `config.min_length`.
        from_zero: Whether every key is valid.

    Raises:
        ValueError: `config.max_blocks` has no room for what is always kept.
    """
    q_len = query.shape[2]
    block_q, block_k = config.block_size
    key_blocks = -(-kv_len // block_k)
    # Sink, early rows, local window and diagonal; a window that is not aligned touches one block more.
    always = -(-config.sink_tokens // block_k) + -(-(min_length + block_q) // block_k)
    always += -(-(config.local_tokens + block_q) // block_k) + 3
    full = partial = key_blocks
    if config.metric == "mass" and config.max_blocks is not None:
        full = _asked_width(config.max_blocks, always, key_blocks, min_length)
    long = query.is_cuda and key_blocks > COMPACT_FROM
    if long and _may_be_bounded(config) and config.max_blocks is None:
        full = min(key_blocks, max(_affordable(query, block_q), 2 * always))
    if long and from_zero and q_len >= 2 * block_q:
        # A multiple of 4, so that the full list behind it starts at 16 bytes.
        partial = (block_q // block_k + 2 + 3) // 4 * 4
    return Widths(partial, full, key_blocks if full >= key_blocks else full - always)


def programmed_widths(query: Tensor, kv_len: int, config: SaleConfig, min_length: int) -> Widths:
    """How wide the lists of a programmed call are.

    Which of the blocks that a query block keeps are partial, only the mods know: on long calls on a GPU both lists are
    bounded, each by half of what `list_widths` gives the full one. What is kept in any case is reckoned for rows that
    see neighbouring keys; where rows of one query block see keys far apart, it may take more, and the last blocks that
    find no room are counted as dropped.

    Args:
        query: ``[B, Hq, Sq, D]``.
        kv_len: Skv.
        config: Blocks, sink, local window and `max_blocks`.
        min_length: Resolved `config.min_length`.
    """
    block_q, block_k = config.block_size
    key_blocks = -(-kv_len // block_k)
    spans = (config.sink_tokens, 2 * config.local_tokens, min_length)
    always = sum(-(-(span + block_q) // block_k) + 1 for span in spans)
    width = key_blocks
    if config.metric == "mass" and config.max_blocks is not None:
        width = _asked_width(config.max_blocks, always, key_blocks, min_length)
    elif query.is_cuda and key_blocks > COMPACT_FROM and _may_be_bounded(config):
        # A multiple of 4, so that the second list starts at 16 bytes.
        width = min(key_blocks, -(-max(_affordable(query, block_q) // 2, 2 * always) // 4) * 4)
    return Widths(width, width, key_blocks if width >= key_blocks else width - always)


def _asked_width(max_blocks: int, always: int, key_blocks: int, min_length: int) -> int:
    if max_blocks <= always and max_blocks < key_blocks:
        raise ValueError(
            f"config.max_blocks must have room for the {always} blocks that are kept in any case (sink, "
            f"{min_length} early rows, local window), got {max_blocks}; raise it or lower min_length."
        )
    return min(key_blocks, max_blocks)


def _may_be_bounded(config: SaleConfig) -> bool:
    """Whether a list may be too short for what passes the threshold: masses say what to give up, no head is dense."""
    if config.on_miss == "dense":
        return False
    return config.metric == "mass" and not isinstance(config.threshold, Tensor) and config.threshold > 0


def _affordable(query: Tensor, block_q: int) -> int:
    """Entries of a full list that are in proportion to the query's memory."""
    batch, heads, q_len, dim = query.shape
    rows = batch * heads * -(-q_len // block_q)
    share = int(block_q * dim * query.element_size() * QUERY_SHARE) // 4
    return min(share, LIST_BYTES // (4 * rows))


def build_index_lists(
    hits: Tensor,
    nonfinite: Tensor | None,
    bounds: Tensor,
    query: Tensor,
    key: Tensor,
    config: SaleConfig,
    min_length: int,
    widths: Widths,
    want_kept: bool,
    leave_early: bool,
) -> IndexLists:
    """Add what is always kept to the hits, and list the kept blocks.

    Args:
        hits: int32 ``[B, Hq, nq, ceil(nk / 32)]`` from a rule.
        nonfinite: int32 ``[B, Hkv, ceil(nk / 32)]`` from `sale_flex.ops.nonfinite_blocks`, or None.
        bounds: int32 ``[B, 3]``.
        query: ``[B, Hq, Sq, D]``, for its shape.
        key: ``[B, Hkv, Skv, D]``, for its shape.
        config: Block size, sink and local window.
        min_length: Query blocks with a row this close to the first valid key keep all they see.
        widths: From `list_widths`.
        want_kept: Whether the kept bits are wanted.
        leave_early: Whether early query blocks keep nothing instead of everything.
    """
    kept, partial_num, full_num, lists = ops.build_lists(
        hits,
        nonfinite,
        bounds,
        key.shape[1],
        query.shape[2],
        key.shape[2],
        *config.block_size,
        config.sink_tokens,
        config.local_tokens,
        min_length,
        widths.partial,
        widths.full,
        want_kept,
        leave_early,
    )
    return split_lists(kept, partial_num, full_num, lists, widths)


def split_lists(kept: Tensor, partial_num: Tensor, full_num: Tensor, lists: Tensor, widths: Widths) -> IndexLists:
    """The two lists that lie side by side in `lists`."""
    # One tensor in two views, so that both have the strides of the other: torch before 2.12 assumes it.
    partial_idx, full_idx = lists[..., : widths.partial], lists[..., widths.partial :]
    if not lists.is_cuda:
        partial_idx, full_idx = partial_idx.contiguous(), full_idx.contiguous()
    return IndexLists(kept, partial_num, partial_idx, full_num, full_idx)
