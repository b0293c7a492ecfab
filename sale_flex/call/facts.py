# SPDX-License-Identifier: BSD-3-Clause
"""`Call`: the settled facts of one attention call, made in one place. Every stage takes it (`stages.py`)."""

from typing import NamedTuple

import torch
from torch import Tensor

from sale_flex import ops
from sale_flex.blocks.bits import unpack_bits
from sale_flex.blocks.geometry import visible_blocks
from sale_flex.blocks.mask_spec import Mod, causal_spec
from sale_flex.call.break_even import dense_prefix
from sale_flex.call.index_lists import Room, masked_room, plain_room
from sale_flex.call.user_mods import MaskedBy, UserMods, check_mods, read_mods
from sale_flex.call.validation import check_inputs, settled
from sale_flex.config import SaleConfig
from sale_flex.kernels.arguments import Grid, MaskSpec, Near, Structure
from sale_flex.mods.held import held, mark_static
from sale_flex.selection.key_codes import KeyCodes, Reuse, reuse_of
from sale_flex.selection.rules import Rule

EVERY_ROW = 2**30
"""A `min_length` beyond every length: all rows are dense."""


class Arguments(NamedTuple):
    """What a user gave, checked, with defaults filled in: host facts, nothing ran on the device yet."""

    query: Tensor
    """``[B, Hq, Sq, D]``."""
    key: Tensor
    """``[B, Hkv, Skv, D]``."""
    value: Tensor | None
    """``[B, Hkv, Skv, D]``."""
    config: SaleConfig
    mods: UserMods
    q_offset: int | Tensor | None
    """As `sale_flex.sale_attention` takes it, and so the next."""
    kv_range: Tensor | None
    scale: float
    """Softmax scale."""
    dense_prefix: int
    """``config.min_length`` as it is on this device, in tokens."""
    reuse: Reuse | None
    """Codes of earlier chunks' keys."""

    @property
    def grid(self) -> Grid:
        """Lengths and blocks."""
        return Grid(self.query.shape[2], self.key.shape[2], *self.config.block_size)

    @property
    def rows_begin_elsewhere(self) -> bool:
        """Whether row 0 may stand at another key than key 0, as far as the host was told."""
        return self.q_offset is not None or self.query.shape[2] != self.key.shape[2]

    @property
    def square(self) -> bool:
        """Whether queries and keys are the same tokens, without padding, as far as the host was told."""
        return self.kv_range is None and not self.rows_begin_elsewhere


class Call(NamedTuple):
    """The facts of one call that its stages read."""

    query: Tensor
    """``[B, Hq, Sq, D]``."""
    key: Tensor
    """``[B, Hkv, Skv, D]``."""
    value: Tensor | None
    """``[B, Hkv, Skv, D]``; where given, blocks with a non-finite value are kept."""
    config: SaleConfig
    grid: Grid
    """Lengths and blocks."""
    bounds: Tensor
    """int32 ``[B, 3]`` = (q_offset, start, end): where row 0 stands, first valid key, one past the last."""
    no_left_padding: bool
    """Whether every batch row's first valid key is known to be key 0."""
    scale: float
    """Softmax scale."""
    threshold: Tensor
    """float32 ``[Hq]``: the rule's, on the device."""
    dense_prefix: int
    """Query blocks with a row fewer than this many keys after the first valid one keep all they see, in tokens."""
    mods: UserMods
    """As the user gave them, for attention."""
    masked: MaskedBy | None
    """The mods as the estimate sees them; None in plain causal attention."""
    room: Room
    """In index lists."""
    reuse: Reuse | None
    """Codes of earlier chunks' keys."""
    dense: str | None
    """Why all that is visible is kept without an estimate, or None."""
    lookup: bool
    """Whether the mask_mod looks up the kept blocks. Without, it is for a caller who knows that block indices will be
    followed: the lookup costs the compiled kernel registers in every block."""
    rows_apart: int
    """First query rows, whole blocks, whose lists stay empty because they are computed densely elsewhere."""
    backward: bool
    """Whether a gradient may be asked for."""
    audited: bool
    """Whether rows are asked what the choice missed."""

    @property
    def rule(self) -> Rule:
        """What chooses."""
        return self.config.rule

    @property
    def spec(self) -> MaskSpec:
        """Who sees whom, as the estimate has it."""
        return causal_spec(self.bounds) if self.masked is None else self.masked.spec

    @property
    def score(self) -> Mod:
        """The score_mod, as the estimate has it."""
        return Mod() if self.masked is None else self.masked.score

    @property
    def near(self) -> Near:
        """Which blocks are kept whatever the rule says."""
        return Near(self.config.sink_tokens, self.config.local_tokens, self.dense_prefix)

    def visible_blocks(self, structure: Structure | None) -> Tensor:
        """Blocks in which some row sees some key, bool ``[B, 1 | Hq, nq, nk]``: for rules in plain torch.

        Args:
            structure: What the mods make of the blocks; None in plain causal attention.
        """
        if structure is None:
            return visible_blocks(self.bounds, self.grid)[:, None]
        return unpack_bits(structure.visibility.visible, self.grid.key_blocks)


def check_arguments(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    config: SaleConfig,
    mods: UserMods,
    q_offset: int | Tensor | None,
    kv_range: Tensor | None,
    scale: float | None,
    key_codes: KeyCodes | None,
) -> Arguments:
    """Check what a user gave and fill in what was left out. What `key_codes` may no longer know is forgotten.

    Raises:
        TypeError, ValueError: An argument breaks its rule.
        NotImplementedError: `key_codes` under torch.compile.
    """
    scale = settled(scale)
    check_inputs(query, key, value, config, q_offset, kv_range, scale)
    if not mods.plain:
        check_mods(query, key, mods, config)
    reuse = reuse_of(key_codes, query, key, q_offset)
    scale = query.shape[3] ** -0.5 if scale is None else scale
    return Arguments(
        query, key, value, config, mods, q_offset, kv_range, scale, dense_prefix(query, config.min_length), reuse
    )


def make_bounds(query: Tensor, key: Tensor, q_offset: int | Tensor | None, kv_range: Tensor | None) -> Tensor:
    """(q_offset, start, end) of every batch row, int32 ``[B, 3]``, on the device."""
    if q_offset is None or isinstance(q_offset, Tensor):
        return ops.query_bounds(query, key, kv_range, q_offset, key.shape[2] - query.shape[2])
    return ops.query_bounds(query, key, kv_range, None, q_offset)


def settle(
    given: Arguments,
    *,
    dense: str | None = None,
    lookup: bool = True,
    rows_apart: int = 0,
    backward: bool = False,
    wants_audit: bool = False,
) -> Call:
    """The facts of a call.

    Args:
        given: Checked arguments.
        dense: Keep all that is visible, for this reason, without an estimate.
        lookup: As `Call.lookup`, and so the next two.
        rows_apart: Not for calls under mods.
        backward: Whether a gradient may be asked for.
        wants_audit: Whether somebody wants to know what the choice missed.

    Raises:
        NotImplementedError: The estimate can not follow an operation of a mod.
        ValueError: A mod captures a tensor of another device, or `max_blocks` has no room for what is always kept.
    """
    query, key, config = given.query, given.key, given.config
    threshold = config.rule.threshold
    if not isinstance(threshold, Tensor):
        threshold = torch.full((query.shape[1],), threshold, dtype=torch.float32, device=query.device)
    bounds = make_bounds(query, key, given.q_offset, given.kv_range)
    mods = given.mods
    if given.rows_begin_elsewhere and not mods.plain:
        mods = mods.placed(_row_offsets(bounds))
    masked = None if mods.plain else read_mods(mods, query, key, bounds)
    # A call with less than half a block of queries is a decoding step: all its rows are dense.
    keeps_all = dense is not None or 2 * query.shape[2] < config.block_size[0]
    prefix = EVERY_ROW if keeps_all else given.dense_prefix
    no_left_padding = given.kv_range is None
    key_blocks = given.grid.key_blocks
    if keeps_all or backward:
        room = Room(key_blocks, key_blocks, key_blocks)
    elif masked is None:
        room = plain_room(query, given.grid, config, prefix, no_left_padding)
        if given.reuse is not None and given.reuse.key_codes.length:
            # Where stored codes turn out to be of other keys, a head keeps all. The budget, and so the choice, stays.
            room = room._replace(full=key_blocks)
    else:
        room = masked_room(query, given.grid, config, prefix)
    return Call(
        query=query,
        key=key,
        value=given.value,
        config=config,
        grid=given.grid,
        bounds=bounds,
        no_left_padding=no_left_padding,
        scale=given.scale,
        threshold=threshold.float(),
        dense_prefix=prefix,
        mods=mods,
        masked=masked,
        room=room,
        reuse=given.reuse,
        dense=dense,
        lookup=lookup,
        rows_apart=rows_apart,
        backward=backward,
        audited=not keeps_all and (config.on_miss == "dense" or (wants_audit and config.on_miss == "report")),
    )


def _row_offsets(bounds: Tensor) -> Tensor:
    """Where row 0 of every batch row stands, int32 ``[B]``, for mods to capture."""
    offsets = held(bounds[:, 0].contiguous())
    mark_static(offsets)
    return offsets


def wants_grad(*tensors: Tensor | None) -> bool:
    """Whether a gradient may be asked for."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
