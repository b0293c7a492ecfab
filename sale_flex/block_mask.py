# SPDX-License-Identifier: BSD-3-Clause
"""`create_sale_block_mask`: from a rule's hit bits to a FlexAttention `BlockMask`."""

from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple, TypedDict, Unpack, overload

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, and_masks

from sale_flex import ops, programmed
from sale_flex.audit import audit
from sale_flex.autocast import autocast_inputs, without_autocast
from sale_flex.break_even import early_rows
from sale_flex.config import SaleConfig
from sale_flex.geometry import Grid
from sale_flex.index_lists import IndexLists, Widths, build_index_lists, list_widths, programmed_widths
from sale_flex.key_codes import KeyCodes, Reuse, reuse_of
from sale_flex.mask_mods import kept_block, visible
from sale_flex.mods import MaskMod, ScoreMod
from sale_flex.rules import RULES
from sale_flex.sight import Mod, Sight
from sale_flex.stats import SaleStats, mask_stats
from sale_flex.user_mods import UserMods, check_mods, see_mods
from sale_flex.validation import check_inputs, settled

EVERY_ROW = 2**30
"""A `min_length` beyond every length: all rows are early."""


class MaskResult(NamedTuple):
    """A block mask and what it cost, for callers who asked for ``stats=True``."""

    block_mask: BlockMask
    stats: SaleStats


class MaskOptions(TypedDict, total=False):
    """The options of `create_sale_block_mask` whose types do not change its result."""

    value: Tensor | None
    score_mod: ScoreMod | None
    mask_mod: MaskMod | None
    block_mask: BlockMask | None
    causal: bool
    estimate_mods: str
    q_offset: int | Tensor | None
    kv_range: Tensor | None
    scale: float | None
    key_codes: KeyCodes | None


class Built(NamedTuple):
    """A block mask, and what is known of it."""

    block_mask: BlockMask
    counts: Callable[[], SaleStats]
    """Counts what it keeps, when called: the counts are worth launches only to those who ask."""
    kept: Tensor
    """int32 ``[B, Hq, nq, ceil(nk / 32)]``: kept bits; empty if not asked for."""


@overload
def create_sale_block_mask(
    query: Tensor, key: Tensor, config: SaleConfig = ..., *, stats: Literal[False] = ..., **options: Unpack[MaskOptions]
) -> BlockMask: ...
@overload
def create_sale_block_mask(
    query: Tensor, key: Tensor, config: SaleConfig = ..., *, stats: Literal[True], **options: Unpack[MaskOptions]
) -> MaskResult: ...
def create_sale_block_mask(
    query: Tensor,
    key: Tensor,
    config: SaleConfig = SaleConfig(),  # noqa: B008 - frozen
    *,
    value: Tensor | None = None,
    score_mod: ScoreMod | None = None,
    mask_mod: MaskMod | None = None,
    block_mask: BlockMask | None = None,
    causal: bool = True,
    estimate_mods: str = "apply",
    q_offset: int | Tensor | None = None,
    kv_range: Tensor | None = None,
    scale: float | None = None,
    key_codes: KeyCodes | None = None,
    stats: bool = False,
) -> BlockMask | MaskResult:
    """Choose the blocks of the attention map that matter.

    The mask is exact on what it keeps: its ``mask_mod`` is that of the call and *kept*, so that even uncompiled
    flex_attention, which ignores block indices, attends to the kept blocks alone. The choice has no gradient; where
    query or key requires one, the mask has what flex_attention's backward pass needs.

    Under torch.autocast of the query's device type, query, key and value are cast as flex_attention casts them there:
    the mask is chosen from what attention will get.

    Args:
        query: ``[B, Hq, Sq, D]``, float32, float16 or bfloat16, any strides.
        key: ``[B, Hkv, Skv, D]``, Hq a multiple of Hkv, the query's device and, without autocast, its dtype.
        config: What to keep; see `SaleConfig`.
        value: ``[B, Hkv, Skv, D]``. If given, blocks with a non-finite value are kept, as attention would show them.
        score_mod: ``score_mod(score, b, h, q_idx, kv_idx)`` as flex_attention takes it. The estimate applies it; hand
            it to flex_attention too.
        mask_mod: ``mask_mod(b, h, q_idx, kv_idx)`` as flex_attention takes it: what is hidden besides. Blocks that it
            hides cost nothing where it carries a ``key_range`` (see `sale_flex.mods`), and little where not.
        block_mask: A BlockMask of the call's lengths, of which only listed blocks are kept, with blocks of a multiple
            or a divisor of ``config.block_size``. Its mask_mod must hold in its full blocks, as it does in every mask
            of create_block_mask.
        causal: Whether a query sees no key behind its own position. False leaves that to the masks.
        estimate_mods: ``"apply"``, or ``"ignore"`` to leave score_mod and mask_mods out of the estimate: for mods with
            operations that it can not follow. They are exact in attention either way.
        q_offset: Key index of the first query, an int or a 0-d integer tensor; by default ``Skv - Sq``. Mods get row
            numbers of the query, as everywhere in FlexAttention, and no positions.
        kv_range: int ``[B, 2]``, first and one-past-last valid key of each batch row; by default all keys. Queries that
            stand outside it are padding and see nothing.
        scale: Softmax scale; by default ``D ** -0.5``.
        key_codes: A `KeyCodes`, which keeps codes of keys from chunk to chunk of a prompt: the same blocks are chosen,
            and only new keys are coded. Beside it `q_offset` must be an int or left out.
        stats: Also return what was kept.

    Returns:
        A BlockMask of shape ``[B, Hq, Sq, Skv]`` with ``config.block_size`` blocks and ascending, disjoint lists of
        partial and full blocks. On a GPU, lists of more than 1,024 key blocks are compact: narrower than the map, which
        BlockMask.to_dense does not know; `sale_flex.testing.block_map` does. With ``stats=True`` a `MaskResult`.

    Raises:
        TypeError, ValueError: An argument breaks its rule; the message names both.
        NotImplementedError: The estimate can not follow an operation of a mod; or `key_codes` under torch.compile.
    """
    mods = UserMods(score_mod, mask_mod, block_mask, causal, estimate_mods)
    query, key, value = autocast_inputs(query, key, value)
    with without_autocast(query):
        scale = settled(scale)
        check_inputs(query, key, value, config, q_offset, kv_range, scale)
        if not mods.plain:
            check_mods(query, key, mods, config)
        reuse = reuse_of(key_codes, query, key, q_offset)
        scale = query.shape[3] ** -0.5 if scale is None else scale
        bounds = make_bounds(query, key, q_offset, kv_range)
        backward = wants_grad(query, key, value)
        built = build_block_mask(
            query,
            key,
            value,
            mods,
            bounds,
            kv_range is None,
            scale,
            config,
            backward=backward,
            reuse=reuse,
            wants_audit=stats,
        )
        return MaskResult(built.block_mask, built.counts()) if stats else built.block_mask


def wants_grad(*tensors: Tensor | None) -> bool:
    """Whether a gradient may be asked for."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def make_bounds(query: Tensor, key: Tensor, q_offset: int | Tensor | None, kv_range: Tensor | None) -> Tensor:
    """(q_offset, start, end) of every batch row, int32 ``[B, 3]``, on the device."""
    given = isinstance(q_offset, Tensor)
    offset = key.shape[2] - query.shape[2] if q_offset is None or given else q_offset
    return ops.query_bounds(query, key, kv_range, q_offset if given else None, offset)


@torch.no_grad()
def build_block_mask(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    mods: UserMods,
    bounds: Tensor,
    every_key_is_valid: bool,
    scale: float,
    config: SaleConfig,
    lookup: bool = True,
    leave_early: bool = False,
    backward: bool = False,
    dense: str | None = None,
    reuse: Reuse | None = None,
    wants_audit: bool = False,
) -> Built:
    """`create_sale_block_mask` on checked input.

    Args:
        query: ``[B, Hq, Sq, D]``.
        key: ``[B, Hkv, Skv, D]``.
        value: ``[B, Hkv, Skv, D]`` or None.
        mods: The user's mods.
        bounds: int32 ``[B, 3]`` from `make_bounds`.
        every_key_is_valid: Whether there is no padding: every batch row's first valid key is key 0.
        scale: Softmax scale.
        config: What to keep.
        lookup: Whether the mask_mod looks up the kept blocks. Without, it is for a caller who knows that the block
            indices will be followed: the lookup costs the compiled kernel registers in every block.
        leave_early: Leave the lists of early query blocks empty, for a caller who computes their rows densely. Only
            their first row may have no key before it. Not for programmed calls.
        backward: Whether the mask is for a backward pass too.
        dense: Keep all that is visible, for this reason, without an estimate.
        reuse: Codes of earlier chunks' keys.
        wants_audit: Whether somebody wants to know what the choice missed.
    """
    heads, q_len = query.shape[1:3]
    kv_len = key.shape[2]
    block_q, block_k = config.block_size
    grid = Grid(q_len, kv_len, block_q, block_k)
    threshold = config.threshold
    if not isinstance(threshold, Tensor):
        threshold = torch.full((heads,), threshold, dtype=torch.float32, device=query.device)
    threshold = threshold.float()
    min_length = early_rows(query, config)
    every_block = Widths(grid.key_blocks, grid.key_blocks, grid.key_blocks)
    # A call with less than half a block of queries is a decoding step: every row counts as early.
    keeps_all = 2 * q_len < block_q or dense is not None
    min_length = EVERY_ROW if keeps_all else min_length
    wide = keeps_all or backward
    device = "triton" if query.is_cuda else "torch"
    audited = not keeps_all and (config.on_miss == "dense" or (wants_audit and config.on_miss == "report"))
    nonfinite = None if value is None else ops.nonfinite_blocks(value, bounds, block_k)
    missed = None
    if mods.plain:
        widths = every_block if wide else list_widths(query, kv_len, config, min_length, every_key_is_valid)
        if reuse is not None and reuse.key_codes.length:
            # Where stored codes turn out to be of other keys, a head keeps all. The budget, and so the choice, stays.
            widths = widths._replace(full=grid.key_blocks)
        hits, dropped = _estimate_plain(
            query,
            key,
            bounds,
            every_key_is_valid,
            threshold,
            scale,
            config,
            widths.budget,
            dense is not None,
            grid,
            reuse,
        )
        if audited:
            sight = Sight(bounds, True, "", [], None, 1, 1)
            hits, missed = audit(query, key, hits, nonfinite, None, None, sight, Mod(), scale, config, min_length)
        lists = build_index_lists(hits, nonfinite, bounds, query, key, config, min_length, widths, lookup, leave_early)
        mask_mod = visible(bounds)
        if lookup:
            mask_mod = and_masks(kept_block(lists.kept, block_q, block_k), mask_mod)
        path = f"dense flex: {dense}" if dense else f"{device} scan + flex"
        counts = partial(mask_stats, lists.partial_num, lists.full_num, dropped, bounds, grid, path, missed)
    else:
        seen = see_mods(mods, query, key, bounds)
        structure = programmed.lay_out(seen, grid)
        widths = every_block if wide else programmed_widths(query, kv_len, config, min_length)
        always, dropped = structure.visible, None
        if dense is None:
            always, hits, dropped, missed = programmed.choose(
                query,
                key,
                seen,
                structure,
                threshold,
                scale,
                config,
                min_length,
                widths.budget,
                reuse,
                nonfinite,
                audited,
            )
        else:
            hits = always.new_zeros(1, 1, 1, 1).expand(query.shape[0], heads, grid.query_blocks, grid.words)
        lists, overflow = programmed.list_kept(hits, nonfinite, structure, always, key.shape[1], grid, widths, lookup)
        kept = lists.kept if lookup else None
        mask_mod = programmed.mask_mod_of(mods, seen.sight, kept, config.block_size, every_key_is_valid)
        path = f"dense flex: {dense}" if dense else f"{device} {seen.describe(config)} + flex"
        counts = partial(programmed.count, lists, structure, dropped, overflow, path, missed)
    block_mask = from_lists(lists, config.block_size, mask_mod, (q_len, kv_len), backward)
    return Built(block_mask, counts, lists.kept)


def from_lists(
    lists: IndexLists,
    block_size: tuple[int, int],
    mask_mod: MaskMod,
    lengths: tuple[int, int],
    backward: bool = False,
) -> BlockMask:
    """The BlockMask of index lists.

    Args:
        lists: Of kept blocks.
        block_size: (query rows, keys) of a block.
        mask_mod: What partial blocks show.
        lengths: Queries and keys.
        backward: Whether it is for a backward pass too.
    """
    return BlockMask.from_kv_blocks(
        lists.partial_num,
        lists.partial_idx,
        lists.full_num,
        lists.full_idx,
        BLOCK_SIZE=block_size,
        mask_mod=mask_mod,
        seq_lengths=lengths,
        compute_q_blocks=backward,
    )


def _estimate_plain(
    query: Tensor,
    key: Tensor,
    bounds: Tensor,
    from_zero: bool,
    threshold: Tensor,
    scale: float,
    config: SaleConfig,
    budget: int,
    dense: bool,
    grid: Grid,
    reuse: Reuse | None,
) -> tuple[Tensor, Tensor | None]:
    """A rule's hits in causal attention; none where everything is kept anyway."""
    if dense:
        rows = (query.shape[0], query.shape[1], grid.query_blocks, grid.words)
        return bounds.new_zeros(rows), None
    rule = RULES[config.metric]
    codes = rule.codes(key, bounds, config, reuse=reuse)
    return rule.estimate(query, key, codes, bounds, from_zero, threshold, scale, config, budget)
