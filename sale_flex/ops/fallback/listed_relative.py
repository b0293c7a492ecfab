# SPDX-License-Identifier: BSD-3-Clause
"""The relative rule of a programmed call; see `sale_flex.kernels.listed_relative` for the contract.

Products of codes are taken in float32, where they are exact: at most 127 * 127 * 256 < 2**24.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from sale_flex.blocks.bits import pack_bits
from sale_flex.blocks.geometry import Grid
from sale_flex.ops.fallback.structure import (
    PARTIAL,
    WHOLE,
    Mask,
    Score,
    Sight,
    any_in_block,
    block_kinds,
    intervals,
    keys_of,
    rows_of,
    scored,
    structure_heads,
    tiles,
)


def listed_limits(
    query: Tensor,
    key: Tensor,
    mean: Tensor,
    counts: Tensor,
    lists: Tensor,
    rows: Tensor,
    bounds: Tensor,
    causal: bool,
    mask: Mask | None,
    listed: Tensor | None,
    listed_q: int,
    listed_k: int,
    score: Score | None,
    threshold: Tensor,
    scale: float,
    block_q: int,
    block_k: int,
    sink_tokens: int,
    local_tokens: int,
) -> tuple[Tensor, Tensor]:
    """What rows' scores must reach, +inf where a row sees nothing, and the logit of the smoothing mean.

    The kernel finds sink and local keys through the lists; here their columns are taken directly.
    """
    heads, q_len = query.shape[1:3]
    group = heads // key.shape[1]
    grid = Grid(q_len, key.shape[2], block_q, block_k)
    sight = Sight(bounds, causal, mask, listed, listed_q, listed_k)
    limit = torch.full((len(query), heads, grid.query_blocks * block_q), torch.inf, device=query.device)
    shift = torch.zeros_like(limit)
    shift[:, :, :q_len] = (query.float() @ mean.repeat_interleave(group, 1)[..., None])[..., 0] * scale
    for b in range(len(query)):
        for head, block in tiles(heads, group, grid):
            lines, index = rows_of(block, block_q, query.device)
            shared = structure_heads(rows, head)
            first, last = rows[b, shared, :, lines].unbind(1)  # [G or 1, M]
            spans = intervals(first, index + bounds[b, 0], causal, sink_tokens, local_tokens)
            keys = _columns(spans, last >= 0, grid.kv_len)
            near = torch.zeros(*first.shape, len(keys), dtype=torch.bool, device=query.device)
            for low, high in spans:
                near |= (keys >= low[..., None]) & (keys <= high[..., None])
            near &= sight.seen(b, shared, index, keys, grid)
            part = query[b, head, lines].float()
            part = pad(part, (0, 0, 0, len(index) - part.shape[1]))
            logits = (part @ key[b, head.start // group, keys.long()].float().T) * scale
            logits = scored(score, logits, b, head, index, keys, grid).masked_fill(~near, -torch.inf)
            reach = logits.logsumexp(-1) + threshold[head, None].log()
            limit[b, head, lines] = reach.masked_fill(last < 0, torch.inf)
    return limit, shift


def _columns(spans: list[tuple[Tensor, Tensor]], sees: Tensor, kv_len: int) -> Tensor:
    """Keys in some row's interval, int32, ascending: so many begin before a key and so many end."""
    edges = torch.zeros(kv_len + 1, dtype=torch.int64, device=sees.device)
    for low, high in spans:
        real = sees & (low <= high) & (high >= 0) & (low < kv_len)
        edges += torch.bincount(low[real].clamp_min(0), minlength=kv_len + 1)
        edges -= torch.bincount((high[real] + 1).clamp_max(kv_len), minlength=kv_len + 1)
    return (edges[:-1].cumsum(0) > 0).nonzero()[:, 0].int()


def listed_scan(
    query_codes: Tensor,
    query_scale: Tensor,
    key_codes: Tensor,
    key_scale: Tensor,
    limit: Tensor,
    shift: Tensor,
    counts: Tensor,
    lists: Tensor,
    bounds: Tensor,
    causal: bool,
    mask: Mask | None,
    listed: Tensor | None,
    listed_q: int,
    listed_k: int,
    score: Score | None,
    scale: float,
    q_len: int,
    kv_len: int,
    block_q: int,
    block_k: int,
) -> Tensor:
    """Hit bits int32 ``[B, Hq, nq, words]`` of the candidates."""
    heads, group = query_codes.shape[1], query_codes.shape[1] // key_codes.shape[1]
    grid = Grid(q_len, kv_len, block_q, block_k)
    sight = Sight(bounds, causal, mask, listed, listed_q, listed_k)
    hits = torch.zeros(len(bounds), heads, grid.query_blocks, grid.words, dtype=torch.int32, device=limit.device)
    for b, (_, start, _) in enumerate(bounds.tolist()):
        for head, block in tiles(heads, group, grid):
            lines, index = rows_of(block, block_q, limit.device)
            shared, kv = structure_heads(counts, head), head.start // group
            kinds = block_kinds(counts[b, shared, block], lists[b, shared, block])
            asked = ((kinds == PARTIAL) | (kinds == WHOLE)).flatten(0, 1).any(0).nonzero()[:, 0]
            keys = keys_of(asked, block_k)
            there = keys.long().clamp_max(kv_len - 1)
            rows = index.long().clamp_max(q_len - 1)
            product = query_codes[b, head][:, rows].float() @ key_codes[b, kv, there].float().T
            of_key = key_scale[b, kv, (there - start).clamp_min(0) // block_k]
            estimate = product * (of_key * (query_scale[b, head][:, rows] * scale)[..., None])
            estimate += shift[b, head, lines, None]
            estimate = scored(score, estimate, b, head, index, keys, grid)
            # Negated, so that a NaN on either side keeps the block.
            hit = ~(estimate < limit[b, head, lines, None]) & sight.seen(b, shared, index, keys, grid)
            found = torch.zeros(*hit.shape[:1], kinds.shape[1], grid.key_blocks, dtype=torch.bool, device=limit.device)
            found[..., asked] = any_in_block(hit, block_q, block_k)
            hits[b, head, block] = pack_bits(found)
    return hits
