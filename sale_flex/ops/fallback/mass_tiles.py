# SPDX-License-Identifier: BSD-3-Clause
"""Tiles of pooled rows for the mass rule, and the logits of keys that are weighed exactly."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from sale_flex.blocks.bits import unpack_bits
from sale_flex.kernels.arguments import Grid, KeyMoments, MaskSpec, MassOptions, Near, Structure
from sale_flex.ops.fallback.pool import pool_rows
from sale_flex.ops.fallback.tiles import (
    ALWAYS,
    PARTIAL,
    all_elements,
    flagged_blocks,
    heads_in,
    keys_of,
    kinds_of,
    products,
    real_rows,
    rows_of,
    tiles,
)
from sale_flex.ops.fallback.visibility import visible


class CodedKeys(NamedTuple):
    """Codes of J key blocks of a KV head; variances None for single keys."""

    mean_codes: Tensor
    """float32 ``[J, subs, D]``."""
    mean_scale: Tensor
    """float32 ``[J]``."""
    var_codes: Tensor | None
    var_scale: Tensor | None


class Tile(NamedTuple):
    """R pooled rows of each of n query blocks of one batch row, of G heads that share keys."""

    b: int
    heads: slice
    blocks: slice
    rows: Tensor
    """float32 ``[G, n, R, D]``."""
    last: Tensor
    """int32 ``[n, R]``: the last real query row of each; -1 where there is none."""
    kinds: Tensor
    """int64 ``[G or 1, n, nk]``."""
    flagged: Tensor
    """bool ``[nk]``: blocks that are not finite. They are hit anyhow, and do not count."""
    near: Tensor
    """int64 ``[G or 1, n, J]``: a query block's always-kept blocks and partial candidates, filled up with nk."""
    keys: Tensor
    """int32 ``[G or 1, n, J * BK]``: the keys of those."""
    logits: Tensor
    """float32 ``[G, n, R, J * BK]``: their exact logits."""
    real: Tensor
    """bool ``[n, M]``: which of the M rows that are asked what they see are no padding."""
    visible: Tensor
    """bool ``[G or 1, n, M, J * BK]``: which of the keys they see. M is BQ, or R where a pooled row's last row sees all
    that the others see."""
    moments: KeyMoments
    """Of the KV head alone: codes ``[N, D]`` and scales ``[nk]``, or nk that fill a tile."""

    @property
    def sees(self) -> Tensor:
        """Which of the keys some row of a pooled row sees, bool ``[G or 1, n, R, J * BK]``."""
        return self.visible.unflatten(2, (self.last.shape[1], -1)).any(3)

    @property
    def exists(self) -> Tensor:
        """Which pooled rows there are, bool ``[n, R]``."""
        return self.last >= 0

    def coded(self, blocks: Tensor, subs: int) -> CodedKeys:
        """Codes of some key blocks, int64 ``[J]``, of `subs` sub-blocks each."""
        mean_codes, mean_scale, var_codes, var_scale, _ = self.moments

        def of_blocks(codes: Tensor) -> Tensor:
            return codes.unflatten(0, (-1, subs))[blocks].float()

        if not len(var_codes):
            return CodedKeys(of_blocks(mean_codes), mean_scale[blocks], None, None)
        return CodedKeys(of_blocks(mean_codes), mean_scale[blocks], of_blocks(var_codes), var_scale[blocks])


def mass_tiles(
    query: Tensor,
    key: Tensor,
    mean: Tensor | None,
    moments: KeyMoments,
    spec: MaskSpec,
    structure: Structure | None,
    scale: float,
    grid: Grid,
    options: MassOptions,
    near: Near,
) -> Iterator[Tile]:
    """All tiles with a row that is no padding; arguments as of `mass.mass_hits`. Without a mean, keys are raw."""
    heads, group = query.shape[1], query.shape[1] // key.shape[1]
    device, pool = query.device, options.pool
    elements = all_elements(grid)
    if structure is None:
        widest = max(
            grid.key_blocks * grid.block_k // options.sub_block, min(near.sink_tokens + grid.block_k, grid.kv_len)
        )
        elements = grid.block_q // pool * (widest + near.local_tokens + grid.block_q + grid.block_k)
    for b, bounds in enumerate(spec.bounds.tolist()):
        for head, block in tiles(heads, group, grid.query_blocks, elements, device):
            lines, index = rows_of(block, grid, device)
            real = real_rows(index, bounds, grid)  # [n, BQ]
            if not bool(real.any()):
                continue
            kv = head.start // group
            kinds = kinds_of(structure, b, head, block, bounds, grid, near.sink_tokens, near.local_tokens, device)
            near_blocks = flagged_blocks((kinds == ALWAYS) | (kinds == PARTIAL))
            keys = keys_of(near_blocks, grid.block_k)
            last = torch.where(real, index, -1).unflatten(1, (-1, pool)).amax(-1)
            asked, asked_real = (last, last >= 0) if structure is None else (index, real)
            shared = slice(0, 1) if structure is None else heads_in(structure.candidates.counts, head)
            rows = pool_rows(query[b, head, lines], real.flatten(), pool, options.sample).unflatten(1, last.shape)
            near_keys = key[b, kv, keys.long().clamp_max(grid.kv_len - 1)].float()  # [G or 1, n, J * BK, D]
            yield Tile(
                b,
                head,
                block,
                rows,
                last,
                kinds,
                unpack_bits(moments.nonfinite[b, kv], grid.key_blocks),
                near_blocks,
                keys,
                products(rows, near_keys if mean is None else near_keys - mean[b, kv]) * scale,
                asked_real,
                visible(spec, b, shared, asked[..., None], keys[:, :, None], grid),
                KeyMoments(*(x[b, kv] for x in moments)),
            )
