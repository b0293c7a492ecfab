# SPDX-License-Identifier: BSD-3-Clause
"""The mass rule of a programmed call; see `sale_flex.kernels.listed_mass` for the contract.

Masses are shares of a pooled row's softmax with the score_mod inside. Products of codes are taken in float32, where
they are exact: at most 127 * 127 * 256 < 2**24.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from sale_flex.bits import pack_bits, unpack_bits
from sale_flex.fallback.rotation import rotation_width
from sale_flex.fallback.structure import (
    ALWAYS,
    PARTIAL,
    WHOLE,
    Mask,
    Score,
    Sight,
    block_kinds,
    keys_of,
    rows_of,
    scored,
    structure_heads,
    tiles,
)
from sale_flex.geometry import Grid

STEP = math.log(2) / 8
"""How far a budget raises cuts at a time, in nats: an eighth of an octave."""

FLOOR = -100 * math.log(2)
"""Where the cut of threshold 0 stands below the total when a budget begins to raise it, in nats."""


class _Rows(NamedTuple):
    """Pooled rows of some query blocks of one batch row, of query heads that share a KV head."""

    b: int
    heads: slice
    grid: Grid
    last: Tensor
    """int32 ``[R]``: the last real query row of each; -1 where there is none."""
    rows: Tensor
    """float32 ``[G, R, D]``."""
    codes: Tensor
    """float32 ``[G, R, D]``."""
    squares: Tensor
    """float32 ``[G, R, D]``, or nothing for a scan."""
    code_scale: Tensor
    """float32 ``[G, R]``."""
    shift: Tensor
    """float32 ``[G, R]``: the logit of the smoothing mean."""


def listed_mass(
    key: Tensor,
    mean_codes: Tensor,
    mean_scale: Tensor,
    var_codes: Tensor,
    var_scale: Tensor,
    nonfinite: Tensor,
    rows: Tensor,
    codes: Tensor,
    square_codes: Tensor,
    code_scale: Tensor,
    shift: Tensor,
    counts: Tensor,
    lists: Tensor,
    full: Tensor,
    bounds: Tensor,
    causal: bool,
    mask: Mask | None,
    listed: Tensor | None,
    listed_q: int,
    listed_k: int,
    score: Score | None,
    threshold: Tensor,
    scale: float,
    q_len: int,
    block_q: int,
    block_k: int,
    sub_block: int,
    pool: int,
    bits: int,
    budget: int,
) -> tuple[Tensor, Tensor]:
    """Hit bits int32 ``[B, Hq, nq, words]``, and int32 ``[B, Hq, nq]``: hits given up for the budget.

    `full` is of no use here: sight is asked about every element that is weighed exactly.
    """
    heads, group = codes.shape[1], codes.shape[1] // key.shape[1]
    grid = Grid(q_len, key.shape[2], block_q, block_k)
    sight = Sight(bounds, causal, mask, listed, listed_q, listed_k)
    hits = torch.zeros(len(bounds), heads, grid.query_blocks, grid.words, dtype=torch.int32, device=key.device)
    dropped = torch.zeros(len(bounds), heads, grid.query_blocks, dtype=torch.int32, device=key.device)
    for b, (offset, start, end) in enumerate(bounds.tolist()):
        for head, block in tiles(heads, group, grid):
            shared, kv = structure_heads(counts, head), head.start // group
            here = slice(block.start * block_q // pool, block.stop * block_q // pool)
            kinds = block_kinds(counts[b, shared, block], lists[b, shared, block])  # [G or 1, n, nk]
            _, index = rows_of(block, block_q, key.device)
            real = (index < q_len) & (index + offset >= start) & (index + offset < end)
            tile = _Rows(
                b,
                head,
                grid,
                torch.where(real, index, -1).view(-1, pool).amax(-1),
                rows[b, head, here].float(),
                codes[b, head, here].float(),
                square_codes[b, head, here].float(),
                code_scale[b, head, here],
                shift[b, head, here],
            )
            weights = torch.full((*tile.shift.shape, grid.key_blocks), -torch.inf, device=key.device)
            of_row = kinds.repeat_interleave(block_q // pool, 1)
            near = ((kinds == ALWAYS) | (kinds == PARTIAL)).flatten(0, 1).any(0).nonzero()[:, 0]
            keys = keys_of(near, block_k)
            seen = sight.seen(b, shared, index, keys, grid).unflatten(1, (-1, pool)).any(2)
            weights[..., near] = _exact(tile, key[b, kv], seen, keys, score, scale)
            far = (kinds == WHOLE).flatten(0, 1).any(0).nonzero()[:, 0]
            variances = (var_codes[b, kv], var_scale[b, kv]) if sub_block > 1 else None
            coded = _coded(tile, mean_codes[b, kv], mean_scale[b, kv], variances, far, sub_block, score, scale, bits)
            weights[..., far] = torch.where(of_row[..., far] == WHOLE, coded, weights[..., far])
            weights.masked_fill_((tile.last < 0)[:, None], -torch.inf)
            hit, lost = _decide(
                weights.unflatten(1, (-1, block_q // pool)),
                (tile.code_scale.isfinite() | (tile.last < 0)).unflatten(1, (-1, block_q // pool)),
                (kinds == PARTIAL) | (kinds == WHOLE),
                unpack_bits(nonfinite[b, kv], grid.key_blocks),
                threshold[head, None, None],
                budget,
            )
            hits[b, head, block] = pack_bits(hit)
            dropped[b, head, block] = lost
    return hits, dropped


def _exact(tile: _Rows, key: Tensor, seen: Tensor, keys: Tensor, score: Score | None, scale: float) -> Tensor:
    """Log-sum-exp of rows over the keys of blocks that they see, ``[G, R, J]``; -inf where there is none."""
    of_keys = key[keys.long().clamp_max(tile.grid.kv_len - 1)].float()
    logits = (tile.rows @ of_keys.T) * scale
    logits = scored(score, logits, tile.b, tile.heads, tile.last, keys, tile.grid)
    logits = logits.masked_fill(~(seen & logits.isfinite()), -torch.inf)
    return logits.unflatten(-1, (len(keys) // tile.grid.block_k, tile.grid.block_k)).logsumexp(-1)


def _coded(
    tile: _Rows,
    mean_codes: Tensor,
    mean_scale: Tensor,
    variances: tuple[Tensor, Tensor] | None,
    blocks: Tensor,
    sub_block: int,
    score: Score | None,
    scale: float,
    bits: int,
) -> Tensor:
    """Log-sum-exp of rows over blocks of which they see all keys, from moments or keys, ``[G, R, J]``.

    A sub-block's score is taken at its middle key.
    """
    subs = tile.grid.block_k // sub_block
    of_subs = keys_of(blocks, subs).long()

    def product(codes: Tensor, of_keys: Tensor, row_factor: Tensor, key_scale: Tensor) -> Tensor:
        factor = row_factor[..., None] * key_scale[blocks].repeat_interleave(subs)
        return (codes @ of_keys[of_subs].float().T) * factor

    width = rotation_width(tile.codes.shape[-1]) if sub_block == 1 else 1
    logits = product(tile.codes, mean_codes, tile.code_scale * (scale / width), mean_scale) + tile.shift[..., None]
    middle = (of_subs * sub_block + sub_block // 2).int()
    logits = scored(score, logits, tile.b, tile.heads, tile.last, middle, tile.grid)
    logits = torch.where(logits.isfinite(), logits, -torch.inf)
    if variances is not None:
        unit = (1 if bits == 4 else 128) * (scale * scale / 2)
        spread = product(tile.squares, variances[0], tile.code_scale * tile.code_scale * unit, variances[1])
        # An infinite factor times 0 is NaN, and fmin takes the bound.
        logits = logits + torch.fmin(spread, torch.tensor(2.0 * (sub_block - 1)))
    return (logits + math.log(sub_block)).unflatten(-1, (len(blocks), subs)).logsumexp(-1)


def _decide(
    weights: Tensor, finite: Tensor, candidate: Tensor, flagged: Tensor, threshold: Tensor, budget: int
) -> tuple[Tensor, Tensor]:
    """Hits, bool ``[G, n, nk]``, and how many more passed the threshold than the budget takes, int32 ``[G, n]``.

    Args:
        weights: float32 ``[G, n, R, nk]``: logarithms of what rows see in blocks.
        finite: bool ``[G, n, R]``: which rows are.
        candidate: bool ``[G or 1, n, nk]``.
        flagged: bool ``[nk]``: blocks that are hit anyhow, and do not count.
        threshold: float32 ``[G, 1, 1]``.
        budget: Most hits of a query block.
    """
    log_threshold = torch.where(threshold > 0, threshold.log(), FLOOR)
    cut = weights.logsumexp(-1) + log_threshold
    never = ~finite | (threshold >= 1)
    # A row that sees nothing has a cut of -inf: its weights are -inf too, and reach nothing.
    above = torch.where((weights > -torch.inf) & ~never[..., None], weights - cut[..., None], -torch.inf).amax(2)
    unasked = (~finite.all(-1) | (threshold == 0)[..., 0])[..., None]  # until the budget raises the cut
    hit = candidate & (unasked | (above >= 0))
    wanted = (hit & ~flagged).sum(-1, dtype=torch.int32)
    count, raised = wanted, torch.zeros_like(wanted)
    while bool((over := count > budget).any()):
        raised += over
        hit = torch.where((raised > 0)[..., None], candidate & (above >= raised[..., None] * STEP), hit)
        count = (hit & ~flagged).sum(-1, dtype=torch.int32)
    return hit | (candidate & flagged), wanted - count
