# SPDX-License-Identifier: BSD-3-Clause
"""The stages of a call, in order: structure, choice (codes, selection, audit), index lists, block mask.

Each takes the call's settled facts and what the stage before returned. `sale_attention`, `create_sale_block_mask`, the
benchmark and calibration run these and no others.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, and_masks, noop_mask

from sale_flex import ops
from sale_flex.call.audit import audit
from sale_flex.call.facts import Call
from sale_flex.call.index_lists import IndexLists, split_lists
from sale_flex.call.mask_mods import kept_block, valid, visible
from sale_flex.kernels.arguments import BlockVisibility, CandidateBlocks, Grid, MaskSpec, Structure
from sale_flex.mods import MaskMod
from sale_flex.selection.rules import Selection
from sale_flex.stats import Audit, Path, SaleStats, masked_stats, plain_stats


class Choice(NamedTuple):
    """Which blocks a call keeps besides those that it always keeps."""

    selection: Selection
    nonfinite: Tensor | None
    """int32 ``[B, Hkv, ceil(nk / 32)]``: bits of blocks that are kept for their values."""
    missed: Audit | None
    """What audited rows said of it; None where nobody was asked."""


class Listed(NamedTuple):
    """Index lists, and what did not get into them."""

    lists: IndexLists
    overflow: Tensor
    """int32 ``[B, Hq, nq]``: kept blocks that found no room, beyond what the rule gave up."""


class Built(NamedTuple):
    """A block mask, and what is known of it."""

    block_mask: BlockMask
    counts: Callable[[], SaleStats]
    """Counts what it keeps, when called: the counts are worth launches only to those who ask."""
    kept: Tensor
    """int32 ``[B, Hq, nq, ceil(nk / 32)]``: kept bits; empty if not asked for."""


@torch.no_grad()
def build(call: Call) -> Built:
    """All stages up to the block mask."""
    structure = lay_out(call)
    choice = choose(call, structure)
    listed = list_blocks(call, structure, choice)
    return Built(block_mask(call, listed.lists), _counts(call, structure, choice, listed), listed.lists.kept)


def lay_out(call: Call) -> Structure | None:
    """Which blocks the call's mods show, and which of them are candidates; None in plain causal attention.

    There, candidates are a span of blocks that every stage knows how to reckon from `Call.bounds`.
    """
    if call.masked is None:
        return None
    found = ops.block_structure(call.spec, call.masked.range, call.masked.heads, call.grid)
    if call.masked.ignored_mask:
        # flex_attention has to evaluate a mask_mod that the estimate left out in every block.
        found = found._replace(full=torch.zeros_like(found.full))
    if call.dense is not None:
        return Structure(found, _all_kept(found))
    return Structure(found, ops.candidate_blocks(found, call.bounds, call.spec.causal, call.grid, call.near))


def _all_kept(found: BlockVisibility) -> CandidateBlocks:
    """All that is visible, for calls in which nothing is estimated: nobody reads the lists."""
    none = found.visible.new_empty(*found.visible.shape[:3], 0)
    return CandidateBlocks(found.visible, none, none)


def choose(call: Call, structure: Structure | None) -> Choice:
    """What the rule selects, and what audited rows say of it."""
    nonfinite = None if call.value is None else ops.nonfinite_blocks(call.value, call.bounds, call.grid.block_k)
    if call.dense is not None:
        shape = (call.query.shape[0], call.query.shape[1], call.grid.query_blocks, call.grid.words)
        none = call.bounds.new_zeros(1, 1, 1, 1).expand(shape)
        return Choice(Selection(none), nonfinite, None)
    selection = call.rule.select(call, call.rule.codes(call), structure)
    if not call.audited:
        return Choice(selection, nonfinite, None)
    hits, missed = audit(call, selection.hits, nonfinite, structure)
    return Choice(selection._replace(hits=hits), nonfinite, missed)


def list_blocks(call: Call, structure: Structure | None, choice: Choice) -> Listed:
    """Index lists of what was chosen and of what is always kept."""
    room = call.room
    kept, partial_num, full_num, lists, overflow = ops.build_lists(
        choice.selection.hits,
        choice.nonfinite,
        call.bounds,
        None if structure is None else structure.visibility,
        None if structure is None else structure.candidates.always,
        call.key.shape[1],
        call.grid,
        call.near,
        room.partial,
        room.full,
        call.lookup,
        call.rows_apart > 0,
    )
    return Listed(split_lists(kept, partial_num, full_num, lists, room), overflow)


def block_mask(call: Call, lists: IndexLists) -> BlockMask:
    """The BlockMask of index lists."""
    return BlockMask.from_kv_blocks(
        lists.partial_num,
        lists.partial_idx,
        lists.full_num,
        lists.full_idx,
        BLOCK_SIZE=call.config.block_size,
        mask_mod=_mask_mod(call, lists.kept),
        seq_lengths=(call.grid.q_len, call.grid.kv_len),
        compute_q_blocks=call.backward,
    )


def _mask_mod(call: Call, kept: Tensor) -> MaskMod:
    """The mask_mod of the call's block mask: the user's, positions, and where asked for the kept blocks."""
    parts: list[MaskMod] = list(call.mods.masks)
    if call.mods.is_causal:
        parts.insert(0, visible(call.bounds))
    elif not call.no_left_padding:
        parts.insert(0, valid(call.bounds))
    spec = None if call.masked is None else call.masked.spec
    # Of a finer block mask, a kept block may hold blocks that it does not list.
    if spec is not None and spec.listed is not None and _is_finer(spec, call.grid):
        parts.insert(0, kept_block(spec.listed, spec.listed_q, spec.listed_k))
    if call.lookup:
        parts.insert(0, kept_block(kept, *call.config.block_size))
    return and_masks(*parts) if parts else noop_mask


def _is_finer(spec: MaskSpec, grid: Grid) -> bool:
    """Whether the user's block mask has blocks that are smaller than ours."""
    return bool(spec.listed_q % grid.block_q or spec.listed_k % grid.block_k)


def _counts(call: Call, structure: Structure | None, choice: Choice, listed: Listed) -> Callable[[], SaleStats]:
    # The counts outlive the block mask, whose lists are the largest thing there is: only their lengths are held.
    numbers = listed.lists.partial_num, listed.lists.full_num
    dropped, missed, overflow = choice.selection.dropped, choice.missed, listed.overflow
    path = Path.FLEX if call.dense is None else Path.DENSE_FLEX
    reason = call.rule.remark(call) if call.dense is None else call.dense
    bounds, grid, rows_apart = call.bounds, call.grid, call.rows_apart
    visible = None if structure is None else structure.visibility.visible

    def count() -> SaleStats:
        kept = (numbers[0] + numbers[1]).sum(-1)
        lost = overflow if dropped is None else overflow + dropped
        if visible is None:
            return plain_stats(kept, lost, missed, bounds, grid, path, reason, rows_apart)
        return masked_stats(kept, lost, missed, visible, path, reason)

    return count
