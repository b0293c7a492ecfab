# SPDX-License-Identifier: BSD-3-Clause
"""The mass rule of a programmed call; see `sale_flex.kernels.listed_mass` for the contract.

Masses are shares of a pooled row's softmax. Without a score_mod they are weighed and compared as in plain causal calls,
by the same functions; with one, which is inside, they are logarithms. Products of codes are taken in float32, where
they are exact: at most 127 * 127 * 256 < 2**24.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from sale_flex.blocks.bits import pack_bits, unpack_bits
from sale_flex.blocks.geometry import Grid
from sale_flex.ops.fallback import mass
from sale_flex.ops.fallback.pool import LOG2E
from sale_flex.ops.fallback.rotation import rotation_width
from sale_flex.ops.fallback.structure import (
    ALWAYS,
    PARTIAL,
    WHOLE,
    Mask,
    Score,
    Sight,
    any_in_block,
    block_kinds,
    keys_of,
    rows_of,
    scored,
    structure_heads,
    tiles,
)

STEP = math.log(2) / 8
"""How far a budget raises cuts at a time, in nats: an eighth of an octave."""

FLOOR = -100 * math.log(2)
"""Where the cut of threshold 0 stands below the total when a budget begins to raise it, in nats."""


ABSENT = -1e38
"""The logit of a key whose own is not finite, in an exact part: it counts for nothing there, but the row sees a key."""


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
            near = ((kinds == ALWAYS) | (kinds == PARTIAL)).flatten(0, 1).any(0).nonzero()[:, 0]
            seen = sight.seen(b, shared, index, keys_of(near, block_k), grid)
            moments = mass.Keys(mean_codes[b, kv], mean_scale[b, kv], var_codes[b, kv], var_scale[b, kv])
            if sub_block == 1:
                moments = moments._replace(var_codes=None, var_scale=None)
            flagged = unpack_bits(nonfinite[b, kv], grid.key_blocks)
            limit = threshold[head, None, None]
            if score is None:
                hit, lost = _hits_in_levels(
                    tile, key[b, kv], near, seen, real, kinds, start, moments, flagged, limit, sub_block, scale, bits,
                    budget,
                )  # fmt: skip
            else:
                hit, lost = _hits_under_score(
                    tile, key[b, kv], near, seen, kinds, moments, flagged, limit, sub_block, score, scale, bits, budget
                )
            hits[b, head, block] = pack_bits(hit)
            dropped[b, head, block] = lost
    return hits, dropped


def _hits_in_levels(
    tile: _Rows,
    key: Tensor,
    near: Tensor,
    seen: Tensor,
    real: Tensor,
    kinds: Tensor,
    start: int,
    moments: mass.Keys,
    flagged: Tensor,
    threshold: Tensor,
    sub_block: int,
    scale: float,
    bits: int,
    budget: int,
) -> tuple[Tensor, Tensor]:
    """Hits of a tile without a score_mod, bool ``[G, n, nk]``, and what the budget gives up, int32 ``[G, n]``.

    Args:
        tile: R pooled rows of each of n query blocks.
        key: ``[Skv, D]``.
        near: int64 ``[J]``: blocks that are always kept or partial candidates of a query block.
        seen: bool ``[G or 1, n * BQ, J * BK]``: which of their keys query rows see.
        real: bool ``[n * BQ]``: query rows that are no padding.
        kinds: int64 ``[G or 1, n, nk]``.
        start: First valid key.
        moments: Codes of the KV head.
        flagged: bool ``[nk]``: blocks that are hit anyhow, and do not count.
        threshold: float32 ``[G, 1, 1]``.
        sub_block: Keys a sub-block.
        scale: Softmax scale.
        bits: 4 or 8.
        budget: Most hits of a query block.
    """
    grid, blocks = tile.grid, kinds.shape[1]
    group, pool = len(tile.rows), len(real) // len(tile.last)
    # Where rows of a query block are padding no block is full. What all other rows see is weighed from codes.
    blind = any_in_block(real[:, None] & ~seen, grid.block_q, grid.block_k)
    kinds = kinds.index_copy(2, near, torch.where((kinds[..., near] == PARTIAL) & ~blind, WHOLE, kinds[..., near]))
    # A block that padding on the left cuts is no sink where there are none. It is kept, and of the exact part.
    cut = torch.arange(grid.key_blocks, device=key.device) * grid.block_k < start
    unasked = ((kinds == PARTIAL) | (kinds == WHOLE)) & (flagged | cut)
    kinds = torch.where((kinds == PARTIAL) & cut, ALWAYS, kinds)

    def by_block(x: Tensor) -> Tensor:
        return x.unflatten(1, (blocks, -1))

    logits = _logits(tile, key, keys_of(near, grid.block_k), scale) - tile.shift[..., None]
    finite = logits.isfinite()
    sees = seen.unflatten(1, (-1, pool)).any(2)
    of_key = kinds[..., near].repeat_interleave(grid.block_k, -1).repeat_interleave(grid.block_q // pool, 1)
    exact = logits.masked_fill(~finite, ABSENT).masked_fill(~(sees & (of_key == ALWAYS)), -torch.inf)
    exact = by_block(exact.logsumexp(-1) * LOG2E)  # [G, n, R]
    logits = by_block(logits.masked_fill_(~(sees & finite & (of_key == PARTIAL)), -torch.inf))

    whole = kinds == WHOLE
    far = whole.flatten(0, 1).any(0).nonzero()[:, 0]
    whole = whole[:, :, None, far]
    subs = grid.block_k // sub_block
    of_subs = keys_of(far, subs).long()
    mean_codes, mean_scale, var_codes, var_scale = moments
    of_far = mass.Keys(
        mean_codes[of_subs].float().unflatten(0, (-1, subs)),
        mean_scale[far],
        None if var_codes is None else var_codes[of_subs].float().unflatten(0, (-1, subs)),
        None if var_scale is None else var_scale[far],
    )
    coded, finite_row = mass.coded_logits(by_block(tile.rows), of_far, sub_block, scale, bits)
    # A row that sees nothing in what is always kept counts in halves of the most that it sees elsewhere.
    own = exact > -torch.inf
    largest = logits.logsumexp(-1) * LOG2E
    if len(far):
        of_codes = coded.amax(-1).float() / 2**mass.FRACTION + math.log2(sub_block)
        largest = torch.maximum(largest, of_codes.masked_fill(~whole, -torch.inf).amax(-1))
    unit = torch.where(own, exact, torch.where(largest > -torch.inf, largest - 1, 0.0))

    sums = torch.zeros(*unit.shape, grid.key_blocks, device=key.device)
    partial = logits.unflatten(-1, (len(near), grid.block_k)).logsumexp(-1) * LOG2E
    sums[..., near] = (partial - unit[..., None]).clamp_max_(100).exp2_()
    sums[..., far] = torch.where(whole, mass.sums_of_logits(coded, unit, sub_block), sums[..., far])
    exists = by_block((tile.last >= 0)[None]).expand(group, -1, -1)
    candidate = ((kinds == PARTIAL) | (kinds == WHOLE))[:, :, None] & exists[..., None]
    sums.masked_fill_(~candidate, 0.0)
    # A row that sees nothing asks for nothing, if it is finite.
    candidate = candidate & (own | sums.any(-1) | ~finite_row)[..., None]
    hit, lost = mass.decide(sums, finite_row, candidate, flagged, threshold, budget, own.float())
    return hit | unasked, lost


def _hits_under_score(
    tile: _Rows,
    key: Tensor,
    near: Tensor,
    seen: Tensor,
    kinds: Tensor,
    moments: mass.Keys,
    flagged: Tensor,
    threshold: Tensor,
    sub_block: int,
    score: Score,
    scale: float,
    bits: int,
    budget: int,
) -> tuple[Tensor, Tensor]:
    """`_hits_in_levels` under a score_mod: masses are logarithms, compared as they are."""
    grid, blocks = tile.grid, kinds.shape[1]
    rows = len(tile.last) // blocks
    weights = torch.full((*tile.shift.shape, grid.key_blocks), -torch.inf, device=key.device)
    sees = seen.unflatten(1, (len(tile.last), -1)).any(2)
    weights[..., near] = _exact(tile, key, sees, keys_of(near, grid.block_k), score, scale)
    far = (kinds == WHOLE).flatten(0, 1).any(0).nonzero()[:, 0]
    coded = _coded(tile, moments, far, sub_block, score, scale, bits)
    of_row = kinds[..., far].repeat_interleave(rows, 1)
    weights[..., far] = torch.where(of_row == WHOLE, coded, weights[..., far])
    weights.masked_fill_((tile.last < 0)[:, None], -torch.inf)
    return _decide(
        weights.unflatten(1, (blocks, rows)),
        (tile.code_scale.isfinite() | (tile.last < 0)).unflatten(1, (blocks, rows)),
        (kinds == PARTIAL) | (kinds == WHOLE),
        flagged,
        threshold,
        budget,
    )


def _logits(tile: _Rows, key: Tensor, keys: Tensor, scale: float) -> Tensor:
    """Exact logits ``[G, R, N]`` of rows and keys; those behind the last key are the last one's."""
    return (tile.rows @ key[keys.long().clamp_max(tile.grid.kv_len - 1)].float().T) * scale


def _exact(tile: _Rows, key: Tensor, seen: Tensor, keys: Tensor, score: Score, scale: float) -> Tensor:
    """Log-sum-exp of rows over the keys of blocks that they see, ``[G, R, J]``; -inf where there is none."""
    logits = _logits(tile, key, keys, scale)
    logits = scored(score, logits, tile.b, tile.heads, tile.last, keys, tile.grid)
    logits = logits.masked_fill(~(seen & logits.isfinite()), -torch.inf)
    return logits.unflatten(-1, (len(keys) // tile.grid.block_k, tile.grid.block_k)).logsumexp(-1)


def _coded(
    tile: _Rows, moments: mass.Keys, blocks: Tensor, sub_block: int, score: Score, scale: float, bits: int
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
    logits = product(tile.codes, moments.mean_codes, tile.code_scale * (scale / width), moments.mean_scale)
    logits = logits + tile.shift[..., None]
    middle = (of_subs * sub_block + sub_block // 2).int()
    logits = scored(score, logits, tile.b, tile.heads, tile.last, middle, tile.grid)
    logits = torch.where(logits.isfinite(), logits, -torch.inf)
    if moments.var_codes is not None and moments.var_scale is not None:
        unit = (1 if bits == 4 else 128) * (scale * scale / 2)
        of_row = tile.code_scale * tile.code_scale * unit
        spread = product(tile.squares, moments.var_codes, of_row, moments.var_scale)
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
