# SPDX-License-Identifier: BSD-3-Clause
"""What a programmed call's rows see: visible and full blocks, always-kept ones, lists of the others.

See `sale_flex.kernels.structure` for the contract. A mask is a function ``mask(b, h, q, kv)`` of an int and of int32
tensors ``[G, 1, 1]``, ``[M, 1]`` and ``[1, N]``, whose result broadcasts to bool ``[G, M, N]``; a score takes float32
``[G, M, N]`` before them. Work is done in tiles: some query blocks of some heads against all keys.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from sale_flex.blocks.bits import pack_bits, unpack_bits
from sale_flex.blocks.geometry import Grid

Mask = Callable[[int, Tensor, Tensor, Tensor], Tensor]
Score = Callable[[Tensor, int, Tensor, Tensor, Tensor], Tensor]
Range = Callable[[int, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]

NOTHING = 2**30
"""First key of a row that sees none; its last is -1."""

ALWAYS, PARTIAL, WHOLE, HIDDEN = range(4)
"""Kinds of blocks, in the order of the lists, and the blocks in no list."""

_TILE_ELEMENTS = 2**22
"""Elements of the attention map held at once: 16 MiB in each of a few tensors."""


class Sight(NamedTuple):
    """Who sees whom."""

    bounds: Tensor
    """int32 ``[B, 3]``."""
    causal: bool
    mask: Mask | None
    listed: Tensor | None
    """int32 ``[1 or B, 1 or Hq, nq', words]``: bits of a block mask with blocks of its own size."""
    listed_q: int
    listed_k: int

    def seen(self, b: int, heads: slice, rows: Tensor, keys: Tensor, grid: Grid) -> Tensor:
        """Which key each row sees, bool ``[G, M, N]``; rows and keys behind the tensors see and are seen by none.

        Args:
            b: Batch row.
            heads: G query heads.
            rows: int32 ``[M]``: indices of query rows.
            keys: int32 ``[N]``: indices of keys.
            grid: Lengths.
        """
        offset, start, end = self.bounds[b].tolist()
        q, kv = rows[:, None], keys[None]
        at = q + offset
        seen = (at >= start) & (at < end) & (q < grid.q_len) & (kv >= start) & (kv < min(end, grid.kv_len))
        if self.causal:
            seen = seen & (kv <= at)
        # Mods may look into tensors: they are asked about rows and keys that there are.
        q, kv = q.clamp_max(grid.q_len - 1), kv.clamp_max(grid.kv_len - 1)
        seen = seen.expand(heads.stop - heads.start, -1, -1)
        if self.mask is not None:
            seen = seen & self.mask(b, head_index(heads, rows), q, kv)
        if self.listed is not None:
            words = self.listed[b if len(self.listed) > 1 else 0]
            words = words[heads] if len(words) > 1 else words
            of_rows = words[:, (q[:, 0] // self.listed_q).long()]
            flags = unpack_bits(of_rows, 32 * words.shape[-1])
            seen = seen & flags[..., (kv[0] // self.listed_k).long()]
        return seen


def block_structure(
    bounds: Tensor,
    causal: bool,
    mask: Mask | None,
    key_range: Range | None,
    listed: Tensor | None,
    listed_q: int,
    listed_k: int,
    heads: int,
    q_len: int,
    kv_len: int,
    block_q: int,
    block_k: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Bits of visible and of full blocks, and the first and the last key that every row sees.

    `key_range` only promises where a mask hides everything; asking the mask costs little here.
    """
    grid = Grid(q_len, kv_len, block_q, block_k)
    sight = Sight(bounds, causal, mask, listed, listed_q, listed_k)
    visible = torch.zeros(len(bounds), heads, grid.query_blocks, grid.words, dtype=torch.int32, device=bounds.device)
    full = torch.zeros_like(visible)
    ends = torch.zeros(len(bounds), heads, 2, grid.query_blocks * block_q, dtype=torch.int32, device=bounds.device)
    keys = keys_of(torch.arange(grid.key_blocks, device=bounds.device), block_k)
    for b in range(len(bounds)):
        for head, block in tiles(heads, heads, grid):
            lines, rows = rows_of(block, block_q, bounds.device)
            seen = sight.seen(b, head, rows, keys, grid)
            outside = (rows[:, None] >= q_len) | (keys >= kv_len)
            visible[b, head, block] = pack_bits(any_in_block(seen, block_q, block_k))
            full[b, head, block] = pack_bits(~any_in_block(~(seen | outside), block_q, block_k))
            ends[b, head, 0, lines] = torch.where(seen, keys, NOTHING).amin(-1)
            ends[b, head, 1, lines] = torch.where(seen, keys, -1).amax(-1)
    return visible, full, ends


def block_lists(
    visible: Tensor,
    full: Tensor,
    rows: Tensor,
    bounds: Tensor,
    causal: bool,
    q_len: int,
    kv_len: int,
    block_q: int,
    block_k: int,
    sink_tokens: int,
    local_tokens: int,
    min_length: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Bits of always-kept blocks, and every query block's list: always kept, partial candidates, whole candidates."""
    grid = Grid(q_len, kv_len, block_q, block_k)
    always = torch.zeros_like(visible)
    counts = visible.new_zeros(*visible.shape[:3], 3)
    lists = visible.new_zeros(*visible.shape[:3], grid.key_blocks)
    at = torch.arange(grid.key_blocks, dtype=torch.int32, device=visible.device) * block_k
    for b, (_, start, end) in enumerate(bounds.tolist()):
        whole = (at >= start) & (at + block_k <= end)
        for head, block in tiles(visible.shape[1], visible.shape[1], grid):
            lines, index = rows_of(block, block_q, visible.device)
            first, last = rows[b, head, :, lines].unbind(1)  # [G, M]
            spans = intervals(first, index + bounds[b, 0], causal, sink_tokens, local_tokens)
            spans.append((first, torch.where(last - first < min_length, last, -1)))
            near = torch.zeros(*first.shape, grid.key_blocks, dtype=torch.bool, device=visible.device)
            for low, high in spans:
                low, high = low[..., None], high[..., None]
                near |= (low <= high) & (low < at + block_k) & (high >= at)
            near &= (last >= 0)[..., None]
            sees = unpack_bits(visible[b, head, block], grid.key_blocks)
            keep = near.unflatten(1, (-1, block_q)).any(2) & sees
            candidate = torch.where(unpack_bits(full[b, head, block], grid.key_blocks) & whole, WHOLE, PARTIAL)
            kinds = torch.where(keep, ALWAYS, torch.where(sees, candidate, HIDDEN))
            always[b, head, block] = pack_bits(keep)
            counts[b, head, block] = torch.stack(
                [(kinds == kind).sum(-1) for kind in (ALWAYS, PARTIAL, WHOLE)], -1
            ).int()
            lists[b, head, block] = kinds.argsort(dim=-1, stable=True).int()
    return always, counts, lists


def intervals(
    first: Tensor, at: Tensor, causal: bool, sink_tokens: int, local_tokens: int
) -> list[tuple[Tensor, Tensor]]:
    """Sink and local keys of rows: first and last, empty where they cross. Of rows that see nothing, they mean nothing.

    Args:
        first: int32 ``[G, M]``: the first key that a row sees.
        at: int32 ``[M]``: key index at which it stands.
        causal: Whether local keys end at the row.
        sink_tokens: Keys from the first on.
        local_tokens: Keys that end at the row; without `causal`, also as many that begin there.
    """
    at = at.expand_as(first)
    return [
        (first, first + (sink_tokens - 1)),
        (at - (local_tokens - 1), at if causal else at + (local_tokens - 1)),
    ]


def block_kinds(counts: Tensor, lists: Tensor) -> Tensor:
    """The kind of every key block, int64 ``[..., nk]``, of ``[..., 3]`` counts and ``[..., nk]`` lists."""
    blocks = lists.shape[-1]
    edges = counts.cumsum(-1)[..., None, :]
    kind = (torch.arange(blocks, device=lists.device)[:, None] >= edges).sum(-1)
    # What lies behind the last entry of a list means nothing, and goes to a column that is cut off.
    column = torch.where(kind == HIDDEN, blocks, lists.long())
    kinds = torch.full((*lists.shape[:-1], blocks + 1), HIDDEN, device=lists.device)
    return kinds.scatter_(-1, column, kind)[..., :blocks]


def tiles(heads: int, group: int, grid: Grid) -> Iterator[tuple[slice, slice]]:
    """Heads and query blocks whose rows meet all keys at once; never heads of two groups."""
    elements = grid.block_q * max(grid.key_blocks, 1) * grid.block_k
    together = min(group, max(1, _TILE_ELEMENTS // elements))
    blocks = max(1, _TILE_ELEMENTS // (together * elements))
    for first in range(0, heads, group):
        for head in range(first, first + group, together):
            for block in range(0, grid.query_blocks, blocks):
                yield (
                    slice(head, min(head + together, first + group)),
                    slice(block, min(block + blocks, grid.query_blocks)),
                )


def structure_heads(structure: Tensor, heads: slice) -> slice:
    """Where a tensor ``[B, Hs, ...]`` has what belongs to these query heads: one head may stand for all."""
    return heads if structure.shape[1] > 1 else slice(0, 1)


def head_index(heads: slice, like: Tensor) -> Tensor:
    """The heads as mods get them, int32 ``[G, 1, 1]``."""
    return torch.arange(heads.start, heads.stop, dtype=torch.int32, device=like.device)[:, None, None]


def rows_of(blocks: slice, block_q: int, device: torch.device) -> tuple[slice, Tensor]:
    """The rows of query blocks, those behind the last one too: as a slice, and as int32 indices."""
    lines = slice(blocks.start * block_q, blocks.stop * block_q)
    return lines, torch.arange(lines.start, lines.stop, dtype=torch.int32, device=device)


def keys_of(blocks: Tensor, block_k: int) -> Tensor:
    """Indices of the keys of key blocks, int32, those behind the last one too."""
    return (blocks[:, None] * block_k + torch.arange(block_k, device=blocks.device)).flatten().int()


def any_in_block(flags: Tensor, block_q: int, block_k: int) -> Tensor:
    """bool ``[G, n * block_q, m * block_k]`` to ``[G, n, m]``."""
    group, rows, keys = flags.shape
    return flags.view(group, rows // block_q, block_q, keys // block_k, block_k).any(-1).any(2)


def scored(score: Score | None, logits: Tensor, b: int, heads: slice, rows: Tensor, keys: Tensor, grid: Grid) -> Tensor:
    """Logits ``[G, M, N]`` as the score_mod changes them, float32."""
    if score is None:
        return logits
    q, kv = rows[:, None].clamp(0, grid.q_len - 1), keys[None].clamp_max(grid.kv_len - 1)
    return score(logits, b, head_index(heads, rows), q, kv).float().expand_as(logits)
