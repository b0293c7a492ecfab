# SPDX-License-Identifier: BSD-3-Clause
"""What every rule is made of: valid keys, the smoothing mean, codes, the rotation, heads and blocks."""

from typing import NamedTuple

import torch
from torch import Tensor


class KeepMap(NamedTuple):
    """What the reference decided, on the grid of blocks."""

    kept: Tensor
    """bool ``[B, Hq, nq, nk]``: blocks that are kept."""
    hit: Tensor
    """bool ``[B, Hq, nq, nk]``: blocks that the rule asks for. It is not asked about those kept for their place."""
    always: Tensor
    """bool ``[B, Hq, nq, nk]``: visible blocks kept whatever the rule says."""
    visible: Tensor
    """bool ``[B, 1, nq, nk]``, under masks ``[B, Hq, nq, nk]``: blocks in which some row sees some key."""
    full: Tensor
    """bool, likewise: blocks in which every row sees every key."""
    margin: Tensor
    """``[B, Hq, nq, nk]``: how far above what it must reach a block is, in nats; -inf where nothing can hit it.

    Relative rule: the largest (score - limit) over its visible elements. Mass rule: how far sums and totals of pooled
    rows have to move for the decision to change, under a score_mod the largest (weight - cut); +inf where no mass is
    asked. Rules that rank: how far a block, or a line that crosses it, is from the nearest one on the
    other side. Rules that compare shares: score less threshold."""
    dropped: Tensor
    """bool ``[B, Hq, nq, nk]``: blocks that passed the threshold, and that the budget had no room for."""


class Choice(NamedTuple):
    """What a rule asks for, before what is always kept; as the fields of `KeepMap`."""

    hit: Tensor
    margin: Tensor
    dropped: Tensor


def real_rows(bounds: Tensor, q_len: int) -> Tensor:
    """Query rows that are no padding, bool ``[B, Sq]``."""
    at = torch.arange(q_len, device=bounds.device) + bounds[:, :1]
    return (at >= bounds[:, 1:2]) & (at < bounds[:, 2:])


def valid_keys(bounds: Tensor, kv_len: int) -> Tensor:
    """bool ``[B, Skv]``."""
    at = torch.arange(kv_len, device=bounds.device)
    return (at >= bounds[:, 1:2]) & (at < bounds[:, 2:])


def valid_blocks(bounds: Tensor, blocks: int, block_k: int) -> Tensor:
    """Blocks with valid keys alone, bool ``[B, nk]``."""
    first = torch.arange(blocks, device=bounds.device) * block_k
    return (first >= bounds[:, 1:2]) & (first + block_k <= bounds[:, 2:])


def nonfinite_blocks(query: Tensor, key: Tensor, bounds: Tensor, block_size: tuple[int, int]) -> Tensor:
    """Blocks with a row or a key, no padding, that is not finite: bool ``[B, Hq, nq, nk]``."""
    rows = real_rows(bounds, query.shape[2])[:, None] & ~query.isfinite().all(-1)
    keys = valid_keys(bounds, key.shape[2])[:, None] & ~key.isfinite().all(-1)
    keys = repeat_heads(keys, query.shape[1])
    return block_any(rows[..., None] | keys[:, :, None], *block_size)


def key_mean(key: Tensor, bounds: Tensor, smooth_tokens: int) -> Tensor:
    """Mean of the first `smooth_tokens` valid keys, float32 ``[B, Hkv, D]``; non-finite elements count as 0."""
    means = []
    for b, (_, start, end) in enumerate(bounds.tolist()):
        prefix = key[b, :, start : min(end, start + smooth_tokens)].double()
        prefix = torch.where(prefix.isfinite(), prefix, 0.0)
        means.append(prefix.sum(1) / max(prefix.shape[1], 1))
    return torch.stack(means).float()


def quantize(x: Tensor, dims: tuple[int, ...], top: int) -> tuple[Tensor, Tensor]:
    """Codes of x in [-top, top], int8, and the scale amax / top over `dims`, which stay with size 1.

    Where the scale is no normal float (x is all but 0) it is 1. A non-finite element makes it NaN, and all codes 0.
    """
    amax = x.abs().amax(dims, keepdim=True)
    tops = torch.full_like(amax, top)
    normal = amax / tops >= torch.finfo(torch.float32).tiny
    scale = torch.where(normal, amax / tops, 1.0)
    inverse = torch.where(normal, tops / amax, 1.0)
    finite = amax.isfinite()
    codes = torch.where(finite, (x * inverse).round(), 0.0).clamp(-top, top)
    return codes.to(torch.int8), torch.where(finite, scale, torch.nan)


def rotation_width(dim: int) -> int:
    """Channels that `rotate` mixes: the largest power of two that divides `dim`, so that blocks of them fill it."""
    return dim & -dim


def rotate(x: Tensor) -> Tensor:
    """Rows times Hadamard matrices, one for every `rotation_width` channels: float32 ``[..., D]``, not normalised.

    A rotation of queries and keys alike leaves their products as they are, times the width, and spreads what stands out
    in one channel over all of them: codes, whose scale is the largest magnitude, lose less (QuaRot, arXiv 2404.00456).
    Sums and differences are taken of neighbours, stage by stage: all bits are determined.
    """
    width = rotation_width(x.shape[-1])
    x = x.unflatten(-1, (-1, width))
    for _ in range(width.bit_length() - 1):
        first, second = x[..., ::2], x[..., 1::2]
        x = torch.cat([first + second, first - second], -1)
    return x.flatten(-2)


def quantize_rows(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Symmetric codes with a scale per row: int8 ``[B, H, S, D]``, float32 ``[B, H, S]`` (NaN: a non-finite row)."""
    codes, scale = quantize(x.float(), (-1,), 2 ** (bits - 1) - 1)
    return codes, scale[..., 0]


def repeat_heads(x: Tensor, heads: int) -> Tensor:
    """KV heads repeated for the query heads that share them."""
    return x.repeat_interleave(heads // x.shape[1], dim=1)


def block_max(x: Tensor, block_q: int, block_k: int) -> Tensor:
    """Maximum of every block, NaN counting as the largest."""
    x = torch.nn.functional.pad(x, (0, -x.shape[-1] % block_k, 0, -x.shape[-2] % block_q), value=-torch.inf)
    return x.unflatten(-1, (-1, block_k)).unflatten(-3, (-1, block_q)).amax((-1, -3))


def block_sum(x: Tensor, block_q: int, block_k: int) -> Tensor:
    """Sum of every block."""
    x = torch.nn.functional.pad(x, (0, -x.shape[-1] % block_k, 0, -x.shape[-2] % block_q))
    return x.unflatten(-1, (-1, block_k)).unflatten(-3, (-1, block_q)).sum((-1, -3))


def block_any(x: Tensor, block_q: int, block_k: int) -> Tensor:
    """Whether any element of a block is set."""
    x = torch.nn.functional.pad(x, (0, -x.shape[-1] % block_k, 0, -x.shape[-2] % block_q))
    return x.unflatten(-1, (-1, block_k)).unflatten(-3, (-1, block_q)).any(-1).any(-2)


def scaled_products(rows: Tensor, key: Tensor, scale: float) -> Tensor:
    """``scale * row . key`` in the key's dtype, ``[B, Hq, M, N]``."""
    return rows.to(key.dtype) @ repeat_heads(key, rows.shape[1]).transpose(-1, -2) * scale
