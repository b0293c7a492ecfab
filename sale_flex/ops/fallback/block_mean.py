# SPDX-License-Identifier: BSD-3-Clause
"""Query rows against means of key blocks; see `sale_flex.kernels.block_mean` for the contract."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from sale_flex.kernels.arguments import Grid
from sale_flex.ops.fallback.padding import row_positions, shown_blocks, valid_keys, without_padding
from sale_flex.ops.fallback.tiles import tiles


def block_mean_energies(
    query: Tensor, key: Tensor, bounds: Tensor, visible: Tensor | None, causal: bool, scale: float, grid: Grid
) -> Tensor:
    """Exponentials relative to each row's largest, summed over a query block's rows: float32 ``[B, Hq, nq, nk]``."""
    (batch, heads), group, device = query.shape[:2], query.shape[1] // key.shape[1], query.device
    means = block_means(key, bounds, grid).float()
    position, real = row_positions(bounds, grid)
    stocked = valid_keys(bounds, grid).unflatten(1, (-1, grid.block_k)).any(-1)
    last = torch.arange(1, grid.key_blocks + 1, device=device) * grid.block_k - 1
    energies = torch.empty(batch, heads, grid.query_blocks, grid.key_blocks, device=device)
    for b in range(batch):
        for head, block in tiles(heads, group, grid.query_blocks, grid.block_q * grid.key_blocks, device):
            lines = slice(block.start * grid.block_q, block.stop * grid.block_q)
            rows = without_padding(query[b, head, lines], real[b, lines])
            logits = (rows @ means[b, head.start // group].mT * scale).unflatten(1, (-1, grid.block_q))
            sees = (real[b, lines, None] & stocked[b]).unflatten(0, (-1, grid.block_q))  # [n, BQ, nk]
            if causal:
                sees &= (position[b, lines, None] >= last).unflatten(0, (-1, grid.block_q))
            shown = shown_blocks(visible, b, head, block, grid)
            if isinstance(shown, Tensor):
                sees = sees & shown[:, :, None]
            broken = sees & ~logits.isfinite()
            logits = logits.masked_fill(~sees | broken, -torch.inf)
            peak = logits.amax(-1, keepdim=True)
            weights = (logits - peak.masked_fill(peak == -torch.inf, 0.0)).exp()
            energies[b, head, block] = weights.sum(2).masked_fill(broken.any(2), torch.inf)
    return energies


def block_means(key: Tensor, bounds: Tensor, grid: Grid) -> Tensor:
    """The mean of every block's valid keys, ``[B, Hkv, nk, D]`` in the keys' dtype; 0 where there is none.

    The sum is taken key by key in float32, and it, the division and the result are each rounded once: its bits are
    those of every implementation.
    """
    valid = valid_keys(bounds, grid).unflatten(1, (-1, grid.block_k))  # [B, nk, BK]
    members = pad(key, (0, 0, 0, valid[0].numel() - grid.kv_len)).unflatten(2, (-1, grid.block_k)).unbind(3)
    total = torch.zeros(members[0].shape, device=key.device)
    for n, member in enumerate(members):
        total = torch.where(valid[:, None, :, n, None], total + member, total)
    return (total / valid.sum(-1).clamp_min(1).float()[:, None, :, None]).to(key.dtype)
