# SPDX-License-Identifier: BSD-3-Clause
"""What a choice of blocks missed, by rows that are asked exactly. See `sale_flex.kernels.audit` for the contract."""

import torch
from torch import Tensor

from sale_flex.blocks.bits import unpack_bits
from sale_flex.blocks.geometry import Grid, always_blocks, audit_slots, early_blocks
from sale_flex.ops.fallback.structure import Mask, Score, Sight, keys_of, scored, structure_heads

_TILE_ELEMENTS = 2**22


def audit_rows(
    query: Tensor,
    key: Tensor,
    hits: Tensor,
    nonfinite: Tensor | None,
    always: Tensor | None,
    rows: Tensor | None,
    bounds: Tensor,
    causal: bool,
    mask: Mask | None,
    listed: Tensor | None,
    listed_q: int,
    listed_k: int,
    score: Score | None,
    scale: float,
    least: float,
    block_q: int,
    block_k: int,
    sink_tokens: int,
    local_tokens: int,
    min_length: int,
) -> Tensor:
    """Of each group's row: whether it was audited, what it wants, and what of that was missed; ``[B, Hq, R, 3]``."""
    heads, q_len = query.shape[1:3]
    group = heads // key.shape[1]
    grid = Grid(q_len, key.shape[2], block_q, block_k)
    sight = Sight(bounds, causal, mask, listed, listed_q, listed_k)
    keys = keys_of(torch.arange(grid.key_blocks, device=query.device), block_k)
    there = keys.long().clamp_max(grid.kv_len - 1)
    slots = audit_slots(q_len) + 2
    audit = torch.zeros(len(query), heads, slots, 3, device=query.device)
    step = max(1, _TILE_ELEMENTS // (group * len(keys)))
    for b, (offset, start, end) in enumerate(bounds.tolist()):
        index = start - offset + _positions(max(offset - start, 0), slots, query.device)
        real = (index >= 0) & (index < q_len) & (index + offset < end)
        for first in range(0, heads, group):
            head = slice(first, first + group)
            asked = real.expand(group, -1)
            at = structure_heads(always, head) if always is not None else slice(0, 1)
            if rows is not None:
                low, high = rows[b, at][..., index.clamp(0, q_len - 1)].unbind(1)
                asked = asked & (high >= 0) & (high - low >= min_length)
            else:
                early = early_blocks(bounds[b : b + 1], grid, min_length)[0]
                asked = asked & ~early[index.clamp(0, q_len - 1) // block_q]
            audit[b, head, :, 0] = asked.float()
            for slot in asked.any(0).nonzero()[:, 0].split(step):
                row = index[slot]
                logits = (query[b, head, row].float() @ key[b, first // group, there].float().T) * scale
                logits = scored(score, logits, b, head, row.int(), keys, grid)
                hidden = ~sight.seen(b, head, row.int(), keys, grid) | ~logits.isfinite()
                shares = logits.masked_fill(hidden, -torch.inf).softmax(-1).nan_to_num(0.0)
                shares = shares.unflatten(-1, (-1, block_k)).sum(-1)  # [G, rows, nk]
                block = row // block_q
                if always is not None:
                    near = unpack_bits(always[b, at][:, block], grid.key_blocks)
                else:
                    near = _always(bounds[b : b + 1], grid, block, sink_tokens, local_tokens)
                kept = unpack_bits(hits[b, head][:, block], grid.key_blocks)
                if nonfinite is not None:
                    kept = kept | unpack_bits(nonfinite[b, first // group], grid.key_blocks)
                wanted = torch.where(~near & (shares >= least) & asked[:, slot, None], shares, 0.0)
                audit[b, head, slot, 1] = wanted.sum(-1)
                audit[b, head, slot, 2] = wanted.masked_fill(kept, 0.0).sum(-1)
    return audit


def _positions(before: int, slots: int, device: torch.device) -> Tensor:
    """Audited positions from the group that holds position `before` on, counted from the first valid key."""
    slot = audit_slots(before) + torch.arange(slots, device=device)
    first = torch.where(slot < 64, slot * 64, torch.where(slot < 96, (slot - 32) * 128, (slot - 64) * 256))
    shift = torch.where(slot < 64, 26, torch.where(slot < 96, 25, 24))
    return first + ((slot * 2654435769 & 0xFFFFFFFF) >> shift)


def _always(bounds: Tensor, grid: Grid, block: Tensor, sink_tokens: int, local_tokens: int) -> Tensor:
    """Always-kept blocks of some query blocks, bool ``[rows, nk]``, without those of early rows."""
    return always_blocks(bounds, grid, sink_tokens, local_tokens, 0)[0, block]
