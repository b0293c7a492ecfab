# SPDX-License-Identifier: BSD-3-Clause
"""Which blocks FlexPrefill keeps, for several shares to cover at once: tensors on the device, no value is read.

A *level* is the number of shares, of T descending ones, by which a block is kept. Heads go through in strips, so that
memory is bounded.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from sale_flex import ops
from sale_flex.kernels.arguments import Structure
from sale_flex.selection.rules.tokens import block_means, real_rows, valid_keys

if TYPE_CHECKING:
    from sale_flex.call.facts import Call
    from sale_flex.selection.rules.flexprefill import FlexPrefill

STRIP_ELEMENTS = 2**26
"""Elements of queries, or quarters of those of the map of blocks, in a strip of heads."""


class _Strip(NamedTuple):
    """Some heads: all that share keys, some of those, or several times all."""

    query: Tensor
    """``[B, G, Sq, D]``."""
    by_key: Tensor
    """float32 ``[B, G, Skv]``: the last rows' softmax, summed by key."""
    by_distance: Tensor
    """float32 ``[B, G, N]``: and by distance."""
    rows: Tensor
    """float32 ``[B, G, nq, D]``: pooled queries."""
    keys: Tensor
    """float32 ``[B, G, nk, D]``: pooled keys."""
    seen: Tensor
    """bool ``[B, 1 or G, nq, nk]``: visible blocks."""
    share: Tensor
    """float64 ``[1 or G, T]``: shares to cover, descending."""


def kept_levels(
    rule: "FlexPrefill", call: "Call", structure: Structure | None, share: Tensor
) -> Iterator[tuple[slice, Tensor]]:
    """Levels of all blocks, int64 ``[B, G, nq, nk]``, of G heads at a time."""
    query, key, grid = call.query, call.key, call.grid
    heads, dim = query.shape[1], query.shape[3]
    group = heads // key.shape[1]
    span = grid.key_blocks * grid.block_k * (1 if call.spec.causal else 2)
    by_key, by_distance = ops.last_row_sums(query, key, call.spec, call.score, call.scale, grid, rule.last, span)
    seen = call.visible_blocks(structure)
    rows, keys = real_rows(call)[:, None], valid_keys(call)[:, None]
    elements = len(query) * max(4 * grid.query_blocks * grid.key_blocks, grid.q_len * dim)
    for strip in _strips(heads, group, elements):
        of_keys = slice(strip.start // group, (strip.stop - 1) // group + 1)
        together = (strip.stop - strip.start) // (of_keys.stop - of_keys.start)
        yield (
            strip,
            _strip_levels(
                rule,
                call,
                _Strip(
                    query[:, strip],
                    by_key[:, strip],
                    by_distance[:, strip],
                    block_means(query[:, strip], rows, grid.block_q),
                    block_means(key[:, of_keys], keys, grid.block_k).repeat_interleave(together, 1),
                    seen[:, strip] if seen.shape[1] > 1 else seen,
                    share[strip] if len(share) > 1 else share,
                ),
            ),
        )


def _strips(heads: int, group: int, elements: int) -> Iterator[slice]:
    """Heads in strips: a divisor of the heads that share keys, or a multiple of them."""
    sizes = [*range(heads, group, -group), *(size for size in range(group, 0, -1) if group % size == 0)]
    # Compared, not divided: under torch.compile lengths may be open.
    together = next((size for size in sizes if size * elements <= STRIP_ELEMENTS), 1)
    for first in range(0, heads, together):
        yield slice(first, min(first + together, heads))


def _strip_levels(rule: "FlexPrefill", call: "Call", strip: _Strip) -> Tensor:
    """Levels of a strip's blocks."""
    size, steps = call.grid.block_k, strip.share.shape[-1]
    least = -(-rule.min_budget // size)
    most = None if rule.max_budget is None else -(-rule.max_budget // size)
    first = (call.bounds[:, 1].long() // size).clamp_max(call.grid.key_blocks - 1)
    aware = _query_aware(rule, call, strip) if rule.tau > 0 else None
    vertical = _ranked_levels(strip.by_key, first, strip.share, size, least, most, aware)
    slash = _ranked_levels(strip.by_distance, torch.zeros_like(first), strip.share, size, least, most, aware)
    levels = torch.maximum(vertical[:, :, None], _on_diagonals(call, slash))
    if aware is not None:
        mapped = _mapped_levels(call, strip)
        levels = torch.where(aware[..., None, None], torch.maximum(levels, mapped), levels)
    # Rounding must leave nothing out where nothing may be left out.
    levels = levels.clamp_min((strip.share >= 1).sum(-1)[:, None, None])
    unasked = ~strip.rows.isfinite().all(-1)[..., None] | ~strip.keys.isfinite().all(-1)[:, :, None]
    unasked |= (strip.by_key.sum(-1) == 0)[..., None, None]
    return levels.masked_fill(unasked, steps)


def _query_aware(rule: "FlexPrefill", call: "Call", strip: _Strip) -> Tensor:
    """Heads whose pooled attention is near the last rows' own, bool ``[B, G]``."""
    grid, query = call.grid, strip.query
    offset, start, end = call.bounds.long()[:, :, None].unbind(1)
    stop = (end - offset).clamp_max(grid.q_len)
    at = stop - rule.last + torch.arange(rule.last, device=query.device)  # [B, R]
    there = at >= (start - offset).clamp_min(0)
    index = at.clamp(0, grid.q_len - 1)[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3])
    rows = query.gather(2, index).double()
    counts = (there[:, None] & rows.isfinite().all(-1))[..., None]
    mean = rows.masked_fill(~counts, 0.0).sum(2, keepdim=True) / counts.sum(2, keepdim=True).clamp_min(1)
    begin = torch.arange(grid.query_blocks, device=query.device) * grid.block_q
    low = torch.maximum((start - offset).clamp_min(0), stop - rule.last)
    holds = (begin < stop) & (begin + grid.block_q > low) & (low < stop)  # [B, nq]
    sees = (strip.seen & holds[:, None, :, None]).any(2) & strip.keys.isfinite().all(-1)
    logits = (mean @ strip.keys.double().mT)[:, :, 0] * call.scale
    pooled = logits.masked_fill(~sees, -torch.inf).softmax(-1).nan_to_num(0.0)
    true = _by_block(strip.by_key, grid.block_k)
    true = true / true.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    middle = (pooled + true) / 2
    twice = [(torch.xlogy(x, x) - torch.xlogy(x, middle)).sum(-1) for x in (pooled, true)]
    return (twice[0] + twice[1]) / 2 < rule.tau**2


def _by_block(x: Tensor, size: int) -> Tensor:
    """Sums of so many neighbours, float64 ``[..., n]``."""
    return pad(x, (0, -x.shape[-1] % size)).unflatten(-1, (-1, size)).sum(-1, dtype=torch.float64)


def _ranked_levels(
    sums: Tensor, first: Tensor, share: Tensor, size: int, least: int, most: int | None, aware: Tensor | None
) -> Tensor:
    """Levels of columns, or diagonals, of blocks, int64 ``[B, G, n]``: the largest are kept, and `first` ``[B]``.

    As many entries as cover no more than the share, and one, are so many blocks, and one; `least` in query-aware heads.
    """
    cover = sums.sort(-1, descending=True).values.cumsum(-1, dtype=torch.float64)
    reach = share * cover[..., -1:]
    count = (torch.searchsorted(cover, reach, right=True) + 1) // size + 1
    count = count.clamp_min(least)
    if most is not None:
        count = count.clamp_max(most)
    if aware is not None:
        count = count.masked_fill(aware[..., None], least)
    blocks = _by_block(sums, size).scatter(-1, first[:, None, None].expand(*sums.shape[:2], 1), torch.inf)
    order = blocks.argsort(dim=-1, descending=True, stable=True)
    place = torch.arange(blocks.shape[-1], device=sums.device)
    reached = (place[:, None] < count[..., None, :]).sum(-1)
    return torch.empty_like(reached).scatter_(-1, order, reached)


def _on_diagonals(call: "Call", slash: Tensor) -> Tensor:
    """Levels of blocks by those of groups of distances, ``[B, G, nq, nk]``.

    The diagonal of a group's shortest distance is a whole number of blocks of keys away from the row itself.
    """
    grid, groups = call.grid, slash.shape[-1]
    ratio, width = grid.block_q // grid.block_k, grid.key_blocks
    position = call.bounds[:, 0].long()
    # Of query block I and key block J: the one of the group ratio * I - J, and the next ones that cross the block too.
    length = ratio * (grid.query_blocks - 1) + width
    group = position[:, None] // grid.block_k - (width - 1) + torch.arange(length + ratio, device=slash.device)
    there = (group < width) & (group >= (0 if call.spec.causal else -width))
    levels = slash.gather(-1, (group % groups)[:, None].expand(-1, slash.shape[1], -1)) * there[:, None]
    crossing = levels[..., :length]
    for more in range(1, ratio):
        crossing = torch.maximum(crossing, levels[..., more : more + length])
    between = (position % grid.block_k != 0)[:, None, None]
    crossing = torch.maximum(crossing, levels[..., ratio:] * between)
    row, column = (torch.arange(n, device=slash.device) for n in (grid.query_blocks, width))
    return crossing[..., ratio * row[:, None] + (width - 1) - column]


def _mapped_levels(call: "Call", strip: _Strip) -> Tensor:
    """Levels in the softmax of pooled queries and keys, ``[B, G, nq, nk]``: the largest that cover no more."""
    logits = strip.rows @ strip.keys.mT * call.scale
    usable = strip.seen & logits.isfinite()
    shares = logits.masked_fill(~usable, -torch.inf).softmax(-1).nan_to_num(0.0).flatten(2)
    ordered = shares.sort(-1, descending=True).values
    cover = ordered.cumsum(-1, dtype=torch.float64)
    count = torch.searchsorted(cover, strip.share * cover[..., -1:], right=True)
    least = ordered.gather(-1, (count - 1).clamp_min(0)).masked_fill(count == 0, torch.inf)
    return torch.searchsorted(least, shares, right=True).unflatten(2, logits.shape[2:])
