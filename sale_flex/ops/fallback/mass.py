# SPDX-License-Identifier: BSD-3-Clause
"""The estimate of row masses, and what it decides, in tiles; see `sale_flex.kernels.mass` for the contract.

Products of codes are taken in float32, where they are exact: at most 127 * 127 * 256 < 2**24.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from sale_flex.blocks.bits import pack_bits, unpack_bits
from sale_flex.blocks.geometry import Grid
from sale_flex.ops.fallback.pool import LOG2E, exact_part, pool_rows
from sale_flex.ops.fallback.quantize import quantize_rows
from sale_flex.ops.fallback.rotation import rotated, rotation_width

FRACTION = 16
"""Bits after the point of the fixed-point logarithms."""

CENTER = 0.0430
"""How many octaves 1 + f lies above 2 ** f in the middle of its range, f in [0, 1]."""

LEVELS = 128
"""Decisions are made in steps of an eighth of an octave, from one step below the threshold up."""

TILE_ELEMENTS = 2**22
"""Estimates held at once: 16 MiB in each of a few tensors."""


class Tile(NamedTuple):
    """Some query blocks of one batch row: N blocks of R pooled rows."""

    real: Tensor
    """bool ``[N * BQ]``: query rows that are no padding."""
    position: Tensor
    """int64 ``[N, R]``: key index of each pooled row's last real row, -1 for padding."""
    first: int
    """First candidate key block."""
    stop: Tensor
    """int64 ``[N]``: one past the last candidate."""
    sink_stop: Tensor
    """int64 ``[N]``: one past the last key before the candidates."""
    local_start: Tensor
    """int64 ``[N]``: first key behind them."""


class Keys(NamedTuple):
    """What the estimate knows of one KV head's key blocks; variances None for a scan of every key."""

    mean_codes: Tensor
    """float32 ``[J, subs, D]``."""
    mean_scale: Tensor
    """float32 ``[J]``."""
    var_codes: Tensor | None
    var_scale: Tensor | None


def mass_hits(
    query: Tensor,
    key: Tensor,
    mean: Tensor,
    mean_codes: Tensor,
    mean_scale: Tensor,
    var_codes: Tensor,
    var_scale: Tensor,
    nonfinite: Tensor,
    bounds: Tensor,
    threshold: Tensor,
    scale: float,
    block_q: int,
    block_k: int,
    sub_block: int,
    pool: int,
    sample: bool,
    bits: int,
    sink_tokens: int,
    local_tokens: int,
    budget: int,
) -> tuple[Tensor, Tensor]:
    """Hit bits int32 ``[B, Hq, nq, ceil(nk / 32)]``, and int32 ``[B, Hq, nq]``: hits given up for the budget."""
    batch, heads, q_len, _ = query.shape
    kv_heads, kv_len = key.shape[1:3]
    grid = Grid(q_len, kv_len, block_q, block_k)
    subs, group = block_k // sub_block, heads // kv_heads
    hits = torch.zeros(batch, heads, grid.query_blocks, grid.words, dtype=torch.int32, device=query.device)
    dropped = torch.zeros(batch, heads, grid.query_blocks, dtype=torch.int32, device=query.device)
    flags = unpack_bits(nonfinite, grid.key_blocks)
    widest = max(grid.key_blocks * subs, min(sink_tokens + block_k, kv_len)) + local_tokens + block_q + block_k
    blocks = max(1, TILE_ELEMENTS // (group * block_q // pool * widest))
    for b, row in enumerate(bounds.tolist()):
        for block in range(0, grid.query_blocks, blocks):
            here = slice(block, min(block + blocks, grid.query_blocks))
            tile = tile_of(here, row, grid, pool, sink_tokens, local_tokens, query.device)
            if tile is None:
                continue
            columns = slice(tile.first, max(int(tile.stop.max()), tile.first))
            at = torch.arange(grid.key_blocks, device=query.device)
            before = (at < tile.stop[:, None]) & (at < tile.first)
            allowed = at[columns] < tile.stop[:, None]  # [N, J]
            subs_at = slice(columns.start * subs, columns.stop * subs)
            for head in range(kv_heads):
                shared = slice(head * group, (head + 1) * group)
                lines = slice(here.start * block_q, here.stop * block_q)
                pooled = pool_rows(query[b, shared, lines], tile.real, pool, sample)
                pooled = pooled.unflatten(1, (-1, block_q // pool))  # [G, N, R, D]
                exact = exact_part(
                    pooled, tile.position, key[b, head], mean[b, head], row[1], tile.sink_stop, tile.local_start, scale
                )
                keys = Keys(
                    mean_codes[b, head, subs_at].float().unflatten(0, (-1, subs)),
                    mean_scale[b, head, columns],
                    var_codes[b, head, subs_at].float().unflatten(0, (-1, subs)) if sub_block > 1 else None,
                    var_scale[b, head, columns] if sub_block > 1 else None,
                )
                sums, finite = block_sums(pooled, exact, keys, sub_block, scale, bits)
                hit, lost = decide(
                    sums.masked_fill_(~allowed[:, None], 0.0),
                    finite,
                    allowed[:, None] & (tile.position >= 0)[..., None],
                    flags[b, head, columns],
                    threshold[shared, None, None],
                    budget,
                )
                found = (before | flags[b, head]).repeat(group, 1, 1)
                found[..., columns] |= hit
                hits[b, shared, here] = pack_bits(found)
                dropped[b, shared, here] = lost
    return hits, dropped


def tile_of(
    blocks: slice, bounds: list[int], grid: Grid, pool: int, sink_tokens: int, local_tokens: int, device: torch.device
) -> Tile | None:
    """Where the rows of some query blocks stand; None if all are padding."""
    offset, start, end = bounds
    at = torch.arange(blocks.start * grid.block_q, blocks.stop * grid.block_q, device=device) + offset
    real = (at >= start) & (at < min(end, offset + grid.q_len))
    if not bool(real.any()):
        return None
    first = -(-(start + sink_tokens) // grid.block_k)
    low = at[:: grid.block_q].clamp_min(start)
    stop = (low - local_tokens + 1).clamp_min(0) // grid.block_k
    stop = torch.where(real.view(-1, grid.block_q).any(-1), stop, 0)
    return Tile(
        real=real,
        position=torch.where(real, at, -1).view(len(stop), -1, pool).amax(-1),
        first=first,
        stop=stop,
        sink_stop=stop.clamp_max(first) * grid.block_k,
        local_start=(stop * grid.block_k).clamp_min(start),
    )


def block_sums(
    pooled: Tensor, exact: Tensor, keys: Keys, sub_block: int, scale: float, bits: int
) -> tuple[Tensor, Tensor]:
    """What rows see in blocks, in units of their exact part: float32 ``[G, N, R, J]``, and which rows are finite.

    Everything up to the sum is integer arithmetic, the same to the bit in every implementation.

    Args:
        pooled: float32 ``[G, N, R, D]``.
        exact: float32 ``[G, N, R]``: log2 of the exact part.
        keys: Codes of J blocks.
        sub_block: Keys a sub-block.
        scale: Softmax scale.
        bits: 4 or 8.
    """
    logits, finite = coded_logits(pooled, keys, sub_block, scale, bits)
    return sums_of_logits(logits, exact, sub_block), finite


def coded_logits(pooled: Tensor, keys: Keys, sub_block: int, scale: float, bits: int) -> tuple[Tensor, Tensor]:
    """Base-2 logits of sub-blocks in fixed point: int32 ``[G, N, R, J, subs]``, and which rows are finite."""
    dim = pooled.shape[3]
    top, square_top, var_top = (7, 49, 15) if bits == 4 else (127, 126, 127)
    unit = LOG2E * 2.0**FRACTION
    width = rotation_width(dim) if sub_block == 1 else 1
    codes, row_scale = quantize_rows(rotated(pooled) if sub_block == 1 else pooled, bits)
    codes = codes[:, :, : pooled.shape[2]].float()  # not what fills a tile
    finite = row_scale.isfinite()
    row_scale = torch.where(finite, row_scale, 0.0)
    by_row = row_scale * _float32(scale / width * unit)
    logits = _terms(codes, keys.mean_codes, by_row, keys.mean_scale, dim * top * top, bits)
    if keys.var_codes is not None and keys.var_scale is not None:
        squares = codes.square() if bits == 4 else codes.square().add_(64).div_(128).floor_()
        factor = row_scale * row_scale * (1 if bits == 4 else 128) * _float32(scale * scale / 2 * unit)
        spread = _terms(squares, keys.var_codes, factor, keys.var_scale, dim * square_top * var_top, bits)
        logits += spread.clamp_max_(round(2 * (sub_block - 1) * LOG2E * 2**FRACTION))
    return logits, finite


def sums_of_logits(logits: Tensor, unit: Tensor, sub_block: int) -> Tensor:
    """Sums over blocks in units of ``2 ** unit``, float32 ``[G, N, R, J]``; the logits are written over.

    Args:
        logits: From `coded_logits`.
        unit: float32 ``[G, N, R]``.
        sub_block: Keys a sub-block.
    """
    bias = (_float32(127 - CENTER + math.log2(sub_block)) - unit) * 2**FRACTION
    logits += bias.clamp(-(2**29), 2**29).round().int()[..., None, None]
    # The bits of a float32: 1 + f for 2 ** f.
    values = (logits.clamp_(0, (127 + 100) << FRACTION) << 23 - FRACTION).view(torch.float32)
    return values.sum(-1)


def _terms(codes: Tensor, of_keys: Tensor, row_factor: Tensor, key_scale: Tensor, largest: int, bits: int) -> Tensor:
    """Products of codes times their scales in fixed point, int32 ``[G, N, R, J, subs]``, at most 2**29 each.

    Args:
        codes: float32 ``[G, N, R, D]``.
        of_keys: float32 ``[J, subs, D]``.
        row_factor: float32 ``[G, N, R]``.
        key_scale: float32 ``[J]``.
        largest: The largest product.
        bits: 4 or 8: products of 8 are shortened, by so much that they fit beside their factor.
    """
    product = (codes @ of_keys.flatten(0, 1).T).int().unflatten(-1, (-1, of_keys.shape[1]))
    # A scale of 0 times an infinite factor is NaN, and fmin takes the other; the product is 0 then.
    factor = torch.fmin(row_factor[..., None] * key_scale, _float32(2**29 // largest))
    if bits == 4:
        return product.mul_(factor.round_().int()[..., None])
    shift = (138 - (factor.view(torch.int32) >> 23)).clamp_(4, 8)
    factor = (factor * (1 << shift)).round_().int()
    return (product >> shift[..., None]).mul_(factor[..., None]).add_((factor >> 1)[..., None])


def decide(
    sums: Tensor,
    finite: Tensor,
    candidate: Tensor,
    flagged: Tensor,
    threshold: Tensor,
    budget: int,
    exact: Tensor | float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Hits, bool ``[G, N, J]``, and how many more passed the threshold than the budget takes, int32 ``[G, N]``.

    Args:
        sums: float32 ``[G, N, R, J]``.
        finite: bool ``[G, N, R]``.
        candidate: bool ``[N, R, J]`` or ``[G, N, R, J]``.
        flagged: bool ``[J]``: blocks that are hit anyhow, and do not count.
        threshold: float32 ``[G, 1, 1]``.
        budget: Most hits of a query block.
        exact: What rows see elsewhere, in the units of the sums: a number, or float32 ``[G, N, R]``.
    """
    base = threshold.clamp_max(1.0)
    of_sum = _levels(sums, base[..., None])
    of_cut = _levels(base * (exact + sums.sum(-1)), base)
    never = (threshold >= 1).expand_as(of_cut)
    at_least = torch.where(finite & (threshold > 0), of_cut.masked_fill(never, LEVELS), 0)

    def hits(cut: Tensor) -> Tensor:
        return ((of_sum >= cut[..., None]) & candidate).any(2)

    hit = hits(at_least)
    wanted = (hit & ~flagged).sum(-1, dtype=torch.int32)
    count = wanted
    raised = torch.zeros_like(wanted)
    while bool((count > budget).any()):
        # Rows that are not finite ask for everything, and have to give it up first.
        raised += count > budget
        cut = (of_cut + raised[..., None]).clamp_max(LEVELS).masked_fill(~finite | never, LEVELS)
        hit = hits(torch.where((raised > 0)[..., None], cut, at_least))
        count = (hit & ~flagged).sum(-1, dtype=torch.int32)
    return hit, wanted - count


def _levels(x: Tensor, base: Tensor) -> Tensor:
    """Eighths of an octave of x above `base`, of a straight mantissa and rounded down: 1 at `base`, 0 to 127."""
    return ((x.view(torch.int32) - base.view(torch.int32) + 2**20) >> 20).clamp(0, LEVELS - 1)


def _float32(x: float) -> Tensor:
    """A constant rounded to float32, so that products with it are products of float32 numbers."""
    return torch.tensor(x, dtype=torch.float32)
