# SPDX-License-Identifier: BSD-3-Clause
"""From positions to rows: where the rows stand that a mod is asked about.

Factories write their mods for positions. With `q_offset` given, row `i` of the query stands at ``q_offset + i``. Left
out, a mod follows the call: its attribute ``at(q_offset)`` is the mod of rows that stand elsewhere, which
sale_attention takes with its own `q_offset`. Everybody else sees the mod itself, of rows from position 0 on.
"""

from functools import partial
from typing import Any

from torch import Tensor

from sale_flex.mods.arguments import checked_offset
from sale_flex.mods.ready import KeyRange, MaskMod, Mod, ScoreMod, ready


def placed_mask(mask_mod: MaskMod, q_offset: int | Tensor | None) -> MaskMod:
    """The mask of rows from `q_offset` on; None: it follows the call.

    Args:
        mask_mod: Of positions, and so its `key_range`, if it has one.
        q_offset: An int, or an integer tensor ``[]`` or ``[B]``.
    """
    if q_offset is None:
        return following(mask_mod, partial(placed_mask, mask_mod))
    offset = checked_offset(q_offset)
    if isinstance(offset, int) and offset == 0:
        return mask_mod
    by_row = isinstance(offset, Tensor) and offset.dim() > 0

    def mask(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return mask_mod(b, h, _position(offset, by_row, b, q_idx), kv_idx)

    of_positions: KeyRange | None = getattr(mask_mod, "key_range", None)
    if of_positions is None:
        return ready(mask)
    range_of = of_positions  # what is known of a name outside a function is not known in it

    def key_range(b: Tensor, h: Tensor, first_q: Tensor, last_q: Tensor) -> tuple[Tensor | int, Tensor | int]:
        first, last = (_position(offset, by_row, b, row) for row in (first_q, last_q))
        return range_of(b, h, first, last)

    return ready(mask, key_range=key_range)


def placed_score(score_mod: ScoreMod, q_offset: int | Tensor | None) -> ScoreMod:
    """The same of a score_mod."""
    if q_offset is None:
        return following(score_mod, partial(placed_score, score_mod))
    offset = checked_offset(q_offset)
    if isinstance(offset, int) and offset == 0:
        return score_mod
    by_row = isinstance(offset, Tensor) and offset.dim() > 0

    def placed(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return score_mod(score, b, h, _position(offset, by_row, b, q_idx), kv_idx)

    return ready(placed, rough=getattr(score_mod, "rough", None))


def _position(offset: Any, by_row: bool, b: Tensor, row: Tensor) -> Tensor:
    """Where a row of the query stands: `offset` is of all batch rows, or one for each."""
    return row + offset[b] if by_row else row + offset


def following(mod: Mod, at: Any) -> Mod:
    """`mod`, which follows the call: ``at(q_offset)`` is the mod of rows that stand there."""
    marked: Any = mod
    marked.at = at
    return mod


def follows_call(mod: Any) -> bool:
    """Whether a mod has an offset of its own to give way to the call's."""
    return hasattr(mod, "at")


def placed_in_call(mod: Mod, q_offset: int | Tensor) -> Mod:
    """The mod in a call whose row 0 stands at `q_offset`: itself, unless it follows the call."""
    marked: Any = mod
    return marked.at(q_offset) if follows_call(mod) else mod
