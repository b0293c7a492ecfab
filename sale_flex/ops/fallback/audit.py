# SPDX-License-Identifier: BSD-3-Clause
"""What a choice of blocks missed, by rows that are asked exactly. See `sale_flex.kernels.audit` for the contract."""

import torch
from torch import Tensor

from sale_flex.blocks.bits import unpack_bits
from sale_flex.blocks.geometry import always_blocks, audit_slots, early_blocks
from sale_flex.kernels.arguments import Grid, MaskSpec, Near, Structure
from sale_flex.ops.fallback.tiles import TILE_ELEMENTS, heads_in, keys_of
from sale_flex.ops.fallback.visibility import Score, scored, visible


def audit_rows(
    query: Tensor,
    key: Tensor,
    hits: Tensor,
    nonfinite: Tensor | None,
    spec: MaskSpec,
    structure: Structure | None,
    score: Score | None,
    scale: float,
    least: float,
    grid: Grid,
    near: Near,
) -> Tensor:
    """Of each group's row: whether it was audited, what it wants, and what of that was missed; ``[B, Hq, R, 3]``."""
    heads, q_len = query.shape[1:3]
    group = heads // key.shape[1]
    keys = keys_of(torch.arange(grid.key_blocks, device=query.device), grid.block_k)
    there = keys.long().clamp_max(grid.kv_len - 1)
    slots = audit_slots(q_len) + 2
    audit = torch.zeros(len(query), heads, slots, 3, device=query.device)
    step = max(1, TILE_ELEMENTS // (group * len(keys)))
    for b, (offset, start, end) in enumerate(spec.bounds.tolist()):
        index = start - offset + _positions(max(offset - start, 0), slots, query.device)
        real = (index >= 0) & (index < q_len) & (index + offset < end)
        for first in range(0, heads, group):
            head = slice(first, first + group)
            asked = (real & _is_late(spec, structure, b, head, index.clamp(0, q_len - 1), grid, near)).expand(group, -1)
            audit[b, head, :, 0] = asked.float()
            for slot in asked.any(0).nonzero()[:, 0].split(step):
                row = index[slot]
                q = row.int()[:, None]
                logits = (query[b, head, row].float() @ key[b, first // group, there].float().T) * scale
                logits = scored(score, logits, b, head, q, keys, grid)
                hidden = ~visible(spec, b, head, q, keys, grid) | ~logits.isfinite()
                shares = logits.masked_fill(hidden, -torch.inf).softmax(-1).nan_to_num(0.0)
                shares = shares.unflatten(-1, (-1, grid.block_k)).sum(-1)  # [G, rows, nk]
                block = row // grid.block_q
                always = _always(spec, structure, b, head, block, grid, near)
                kept = unpack_bits(hits[b, head][:, block], grid.key_blocks)
                if nonfinite is not None:
                    kept = kept | unpack_bits(nonfinite[b, first // group], grid.key_blocks)
                wanted = torch.where(~always & (shares >= least) & asked[:, slot, None], shares, 0.0)
                audit[b, head, slot, 1] = wanted.sum(-1)
                audit[b, head, slot, 2] = wanted.masked_fill(kept, 0.0).sum(-1)
    return audit


def _positions(before: int, slots: int, device: torch.device) -> Tensor:
    """Audited positions from the group that holds position `before` on, counted from the first valid key."""
    slot = audit_slots(before) + torch.arange(slots, device=device)
    first = torch.where(slot < 64, slot * 64, torch.where(slot < 96, (slot - 32) * 128, (slot - 64) * 256))
    shift = torch.where(slot < 64, 26, torch.where(slot < 96, 25, 24))
    return first + ((slot * 2654435769 & 0xFFFFFFFF) >> shift)


def _is_late(
    spec: MaskSpec, structure: Structure | None, b: int, heads: slice, rows: Tensor, grid: Grid, near: Near
) -> Tensor:
    """Which rows do not keep all that they see, bool ``[G or 1, R]``."""
    if structure is None:
        return ~early_blocks(spec.bounds[b : b + 1], grid, near.min_length)[:, rows // grid.block_q]
    ends = structure.visibility.row_kv_bounds
    low, high = ends[b, heads_in(ends, heads)][..., rows].unbind(1)
    return (high >= 0) & (high - low >= near.min_length)


def _always(
    spec: MaskSpec, structure: Structure | None, b: int, heads: slice, block: Tensor, grid: Grid, near: Near
) -> Tensor:
    """Blocks that some query blocks keep whatever the rule says, bool ``[G or 1, R, nk]``."""
    if structure is None:
        return always_blocks(spec.bounds[b : b + 1], grid, near.sink_tokens, near.local_tokens, 0)[:, block]
    always = structure.candidates.always
    return unpack_bits(always[b, heads_in(always, heads)][:, block], grid.key_blocks)
