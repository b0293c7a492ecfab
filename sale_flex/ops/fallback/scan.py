# SPDX-License-Identifier: BSD-3-Clause
"""The full-resolution scan in tiles; see `sale_flex.kernels.scan` for the contract.

Products of codes are taken in float32, where they are exact: at most 127 * 127 * 256 < 2**24.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from sale_flex.blocks.bits import pack_bits
from sale_flex.kernels.arguments import Grid, MaskSpec, Structure
from sale_flex.ops.fallback.tiles import (
    PARTIAL,
    WHOLE,
    all_elements,
    any_block,
    heads_in,
    keys_of,
    kinds_of,
    real_rows,
    rows_of,
    tiles,
)
from sale_flex.ops.fallback.visibility import Score, scored, visible


class Peaks(NamedTuple):
    """The largest estimates of rows of some query blocks of one batch row."""

    b: int
    heads: slice
    blocks: slice
    lines: slice
    columns: Tensor
    """int64 ``[J]``: blocks that are candidates of some query block."""
    largest: Tensor
    """float32 ``[G, n, BQ, J]``: of the keys that a row sees, in the units of limits. NaN if one is."""
    sees: Tensor
    """bool ``[G or 1, n, BQ, J]``: whether a row sees a key in a block that is a candidate of its query block."""


def scan_max(
    query_codes: Tensor,
    query_scale: Tensor,
    key_codes: Tensor,
    key_scale: Tensor,
    limit: Tensor,
    shift: Tensor,
    spec: MaskSpec,
    structure: Structure | None,
    score: Score | None,
    scale: float,
    grid: Grid,
    local_tokens: int,
    no_left_padding: bool,
) -> Tensor:
    """Hit bits int32 ``[B, Hq, nq, ceil(nk / 32)]`` of candidates: without a structure, of all before a local window.

    `no_left_padding` is a promise that only the kernel makes use of.
    """
    lines = (*query_codes.shape[:2], grid.query_blocks)
    hits = torch.zeros(*lines, grid.words, dtype=torch.int32, device=limit.device)
    codes = query_codes, query_scale, key_codes, key_scale
    for tile in row_peaks(*codes, shift, spec, structure, score, scale, grid, local_tokens):
        limits = limit[tile.b, tile.heads, tile.lines].unflatten(1, tile.largest.shape[1:3])
        # Negated, so that a NaN on either side keeps the block.
        hit = (~(tile.largest < limits[..., None]) & tile.sees).any(2)
        found = torch.zeros(*hit.shape[:2], grid.key_blocks, dtype=torch.bool, device=limit.device)
        found[..., tile.columns] = hit
        hits[tile.b, tile.heads, tile.blocks] = pack_bits(found)
    return hits


def row_peaks(
    query_codes: Tensor,
    query_scale: Tensor,
    key_codes: Tensor,
    key_scale: Tensor,
    shift: Tensor,
    spec: MaskSpec,
    structure: Structure | None,
    score: Score | None,
    scale: float,
    grid: Grid,
    local_tokens: int,
) -> Iterator[Peaks]:
    """Largest estimates in all tiles with a row that is no padding; arguments as of `scan_max`."""
    heads, group = query_codes.shape[1], query_codes.shape[1] // key_codes.shape[1]
    device, block_k = query_codes.device, grid.block_k
    for b, bounds in enumerate(spec.bounds.tolist()):
        start = bounds[1]
        for head, block in tiles(heads, group, grid.query_blocks, all_elements(grid), device):
            lines, index = rows_of(block, grid, device)
            real = real_rows(index, bounds, grid)
            kinds = kinds_of(structure, b, head, block, bounds, grid, 0, local_tokens, device)
            candidate = (kinds == PARTIAL) | (kinds == WHOLE)  # [G or 1, n, nk]
            columns = any_block(candidate)
            if not (len(columns) and bool(real.any())):
                continue
            kv = head.start // group
            q, keys = index[..., None], keys_of(columns, block_k)
            of_keys = key_codes[b, kv].unflatten(0, (-1, block_k))[columns].flatten(0, 1).float()
            estimate = query_codes[b, head, lines].float() @ of_keys.T  # [G, n * BQ, J * BK]
            estimate = estimate.unflatten(1, index.shape)
            if score is not None:
                of_key = key_scale[b, kv, (keys.long() - start).clamp_min(0) // block_k]
                of_row = query_scale[b, head, index.long().clamp_max(grid.q_len - 1)] * scale
                estimate = estimate * (of_key * of_row[..., None])
                estimate += shift[b, head, lines].unflatten(1, index.shape)[..., None]
                estimate = scored(score, estimate, b, head, q, keys, grid)
            sees = candidate[:, :, None, columns] & real[..., None]
            if structure is not None:
                shown = visible(spec, b, heads_in(structure.candidates.counts, head), q, keys, grid)
                sees = sees & shown.unflatten(-1, (-1, block_k)).any(-1)
                estimate = estimate.masked_fill(~shown, -torch.inf)
            estimate = estimate.unflatten(-1, (-1, block_k))
            largest = estimate.amax(-1) if score is not None else _largest(estimate, key_scale[b, kv], columns, start)
            yield Peaks(b, head, block, lines, columns, largest, sees)


def _largest(products: Tensor, key_scale: Tensor, columns: Tensor, start: int) -> Tensor:
    """Largest scaled product of every row in every block, ``[..., J]``, of ``[..., J, BK]`` products; -inf is hidden.

    A first valid key inside a block cuts every block in two: what lies before the cut belongs to the previous group.
    """
    block_k = products.shape[-1]
    cut = start % block_k
    group = columns - start // block_k

    def scaled(part: Tensor, scale: Tensor) -> Tensor:
        peak = part.amax(-1)
        # A scale that is NaN is none of a part that nobody sees.
        return (peak * scale).masked_fill_(peak == -torch.inf, -torch.inf)

    found = scaled(products[..., cut:], key_scale[group])
    if not cut:
        return found
    before = scaled(products[..., :cut], key_scale[(group - 1).clamp_min(0)])
    return torch.maximum(found, before.masked_fill_(group < 1, -torch.inf))
