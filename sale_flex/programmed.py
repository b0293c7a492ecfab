# SPDX-License-Identifier: BSD-3-Clause
"""The block mask of a programmed call: mods, a block mask of the user's, or no causality.

The sight of the call is laid over the grid of blocks, the blocks that some row sees are listed, a rule estimates those
of them that are not kept anyway, and what it hits goes to the lists of a BlockMask.
"""

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import and_masks, noop_mask

from sale_flex import listed_ops
from sale_flex.audit import audit
from sale_flex.bits import count_bits
from sale_flex.config import SaleConfig
from sale_flex.geometry import Grid
from sale_flex.index_lists import IndexLists, Widths, split_lists
from sale_flex.key_codes import Reuse
from sale_flex.mask_mods import kept_block, valid, visible
from sale_flex.mods import MaskMod
from sale_flex.rules import RULES
from sale_flex.sight import Lists, Sight, Structure
from sale_flex.stats import Audit, SaleStats, no_audit
from sale_flex.user_mods import SeenMods, UserMods


def lay_out(seen: SeenMods, grid: Grid) -> Structure:
    """What the sight makes of the grid of blocks."""
    sight = seen.sight
    made = Structure(
        *listed_ops.block_structure(
            sight.bounds,
            sight.causal,
            sight.mask_key,
            sight.mask_tensors,
            *seen.range,
            sight.listed,
            sight.listed_q,
            sight.listed_k,
            seen.heads,
            *grid,
        )
    )
    # Where a mask_mod is left out, flex_attention has to evaluate it in every block.
    return made._replace(full=torch.zeros_like(made.full)) if seen.ignored_mask else made


def choose(
    query: Tensor,
    key: Tensor,
    seen: SeenMods,
    structure: Structure,
    threshold: Tensor,
    scale: float,
    config: SaleConfig,
    min_length: int,
    budget: int,
    reuse: Reuse | None = None,
    nonfinite: Tensor | None = None,
    audited: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None, Audit | None]:
    """Bits of what is always kept, hit bits, hits given up for the budget, and what the choice missed.

    Args:
        query: ``[B, Hq, Sq, D]``.
        key: ``[B, Hkv, Skv, D]``.
        seen: The call's mods.
        structure: From `lay_out`.
        threshold: float32 ``[Hq]``.
        scale: Softmax scale.
        config: What to keep.
        min_length: Rows whose first and last key are less apart keep all they see, in tokens.
        budget: Hits that a query block has room for.
        reuse: Codes of earlier chunks' keys.
        nonfinite: Bits of blocks that are kept for their values.
        audited: Whether rows are asked what was missed.
    """
    bounds = seen.sight.bounds
    lists = Lists(
        *listed_ops.block_lists(
            structure.visible,
            structure.full,
            structure.rows,
            bounds,
            seen.sight.causal,
            query.shape[2],
            key.shape[2],
            *config.block_size,
            config.sink_tokens,
            config.local_tokens,
            min_length,
        )
    )
    rule = RULES[config.metric]
    codes = rule.codes(key, bounds, config, seen.rough, reuse)
    hits, dropped = rule.estimate_listed(
        query, key, codes, structure, lists, seen.sight, seen.score, threshold, scale, config, budget, seen.rough
    )
    missed = None
    if audited:
        hits, missed = audit(
            query,
            key,
            hits,
            nonfinite,
            lists.always,
            structure.rows,
            seen.sight,
            seen.score,
            scale,
            config,
            min_length,
        )
    return lists.always, hits, dropped, missed


def list_kept(
    hits: Tensor,
    nonfinite: Tensor | None,
    structure: Structure,
    always: Tensor,
    kv_heads: int,
    grid: Grid,
    widths: Widths,
    want_kept: bool,
) -> tuple[IndexLists, Tensor]:
    """Index lists of what is kept, and how many kept blocks found no room, int32 ``[B, Hq, nq]``."""
    kept, partial_num, full_num, lists, dropped = listed_ops.listed_compact(
        hits, nonfinite, *structure[:2], always, kv_heads, widths.partial, widths.full, grid.key_blocks, want_kept
    )
    return split_lists(kept, partial_num, full_num, lists, widths), dropped


def mask_mod_of(
    mods: UserMods, sight: Sight, kept: Tensor | None, block_size: tuple[int, int], every_key_is_valid: bool
) -> MaskMod:
    """The mask_mod of a programmed call's block mask: the user's, positions, and where asked for the kept blocks.

    Args:
        mods: The user's mods.
        sight: The same for the estimate.
        kept: Kept bits to look up, or None.
        block_size: Of the kept blocks.
        every_key_is_valid: Whether no key and no row is padding.
    """
    parts: list[MaskMod] = list(mods.masks)
    if mods.causal:
        parts.insert(0, visible(sight.bounds))
    elif not every_key_is_valid:
        parts.insert(0, valid(sight.bounds))
    # Of a finer block mask, a kept block may hold blocks that it does not list.
    finer = sight.listed_q % block_size[0] or sight.listed_k % block_size[1]
    if sight.listed is not None and finer:
        parts.insert(0, kept_block(sight.listed, sight.listed_q, sight.listed_k))
    if kept is not None:
        parts.insert(0, kept_block(kept, *block_size))
    return and_masks(*parts) if parts else noop_mask


def count(
    lists: IndexLists,
    structure: Structure,
    dropped: Tensor | None,
    overflow: Tensor,
    path: str,
    missed: Audit | None,
) -> SaleStats:
    """Counts of a programmed call."""
    kept = (lists.partial_num + lists.full_num).sum(-1)
    lost = overflow if dropped is None else overflow + dropped
    seen = count_bits(structure.visible).sum((-2, -1)).expand_as(kept)
    return SaleStats(kept, seen, path, lost.sum(-1), no_audit(kept) if missed is None else missed)
