# SPDX-License-Identifier: BSD-3-Clause
"""Mods asked about elements of the attention map: who sees whom, and what becomes of logits.

A mask is a function ``mask(b, h, q, kv)`` of an int and of int32 tensors that broadcast against each other, and its
result with them, to bool; a score takes float32 logits before them. They may look into tensors by these: they are asked
about rows and keys that there are.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from sale_flex.kernels.arguments import Grid, MaskSpec

Score = Callable[[Tensor, int, Tensor, Tensor, Tensor], Tensor]
Range = Callable[[int, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def visible(spec: MaskSpec, b: int, heads: slice, q: Tensor, kv: Tensor, grid: Grid) -> Tensor:
    """Which key each row sees, bool ``[G, ..., M, N]``; rows and keys outside the tensors see and are seen by none.

    Args:
        spec: Who sees whom.
        b: Batch row.
        heads: G query heads.
        q: int32 ``[..., M, 1]``: indices of query rows.
        kv: int32 ``[..., 1, N]``: indices of keys; with a dimension more in front, by head.
        grid: Lengths.
    """
    offset, start, end = spec.bounds[b].unbind()
    at = q + offset
    sees = (at >= start) & (at < end) & (q >= 0) & (q < grid.q_len) & (kv >= start) & (kv < end.clamp_max(grid.kv_len))
    if spec.causal:
        sees = sees & (kv <= at)
    h = _head_index(heads, q)
    q, kv = _inside(q, kv, grid)
    if spec.mask is not None:
        sees = sees & spec.mask(b, h, q, kv)
    if spec.listed is not None:
        words = spec.listed[b if len(spec.listed) > 1 else 0]
        block = kv // spec.listed_k
        word = words[h.long() if len(words) > 1 else 0, (q // spec.listed_q).long(), (block // 32).long()]
        sees = sees & ((word >> block % 32) & 1).bool()
    return sees.expand(torch.broadcast_shapes(h.shape, q.shape, kv.shape))


def scored(score: Score | None, logits: Tensor, b: int, heads: slice, q: Tensor, kv: Tensor, grid: Grid) -> Tensor:
    """Logits ``[G, ..., M, N]`` as the score_mod changes them, float32; the rest as `visible` takes it."""
    if score is None:
        return logits
    h = _head_index(heads, q)
    return score(logits, b, h, *_inside(q, kv, grid)).float().expand_as(logits)


def _head_index(heads: slice, q: Tensor) -> Tensor:
    """The heads as mods get them, int32 ``[G, ..., 1, 1]``."""
    return torch.arange(heads.start, heads.stop, dtype=torch.int32, device=q.device).view(-1, *[1] * q.dim())


def _inside(q: Tensor, kv: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    return q.clamp(0, grid.q_len - 1), kv.clamp_max(grid.kv_len - 1)
