# SPDX-License-Identifier: BSD-3-Clause
"""What every rule is made of: who sees whom, the smoothing mean, codes, blocks, and attention over kept blocks."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor


class KeepMap(NamedTuple):
    """What the reference decided, on the grid of blocks."""

    kept: Tensor
    """bool ``[B, Hq, nq, nk]``: blocks that are kept."""
    hit: Tensor
    """bool ``[B, Hq, nq, nk]``: visible blocks that the rule itself asks for."""
    always: Tensor
    """bool ``[B, Hq, nq, nk]``: visible blocks kept whatever the rule says."""
    visible: Tensor
    """bool ``[B, 1, nq, nk]``: blocks in which some row sees some key."""
    full: Tensor
    """bool ``[B, 1, nq, nk]``: blocks in which every row sees every key."""
    margin: Tensor
    """``[B, Hq, nq, nk]``: how far above what it must reach the block is, in logits; -inf where nothing can hit it.

    Relative rule: the largest (score - limit) over its visible elements. Mass rule: how far sums and
    totals of pooled rows have to move for the decision to change; +inf where no mass is asked."""
    dropped: Tensor
    """bool ``[B, Hq, nq, nk]``: blocks that passed the threshold, and that the budget had no room for."""


class Choice(NamedTuple):
    """What a rule asks for, before what is always kept; as the fields of `KeepMap`."""

    hit: Tensor
    margin: Tensor
    dropped: Tensor


def of_rule(table: Mapping[str, Any], config: Any) -> Any:
    """What a table says of a config's rule."""
    if config.rule.name not in table:
        raise ValueError(f"config.rule must be one that the reference knows, {sorted(table)}, got {config.rule!r}.")
    return table[config.rule.name]


def make_bounds(
    batch: int,
    q_len: int,
    kv_len: int,
    q_offset: int | Tensor | None = None,
    kv_range: Tensor | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """(q_offset, start, end) of every batch row, int32 ``[B, 3]``."""
    offset = kv_len - q_len if q_offset is None else int(q_offset)
    if kv_range is None:
        kv_range = torch.tensor([[0, kv_len]], device=device).expand(batch, 2)
    column = torch.full((batch, 1), offset, device=device)
    return torch.cat([column, kv_range.to(device)], dim=1).to(torch.int32)


def visible(bounds: Tensor, q_len: int, kv_len: int) -> Tensor:
    """Which key each query row sees, bool ``[B, Sq, Skv]``: valid, not after it, and the row itself not padding."""
    offset, start, end = (bounds[:, n, None, None].long() for n in range(3))
    row = torch.arange(q_len, device=bounds.device)[None, :, None] + offset
    key = torch.arange(kv_len, device=bounds.device)[None, None, :]
    return (key >= start) & (key < end) & (key <= row) & (row < end)


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


def masked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kept: Tensor,
    bounds: Tensor,
    block_size: tuple[int, int],
    scale: float,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Softmax attention over visible keys in kept blocks, ``[B, Hq, Sq, D]``; 0 where there are none."""
    heads = query.shape[1]
    logits = query.to(dtype) @ repeat_heads(key, heads).to(dtype).transpose(-1, -2) * scale
    seen = visible(bounds, query.shape[2], key.shape[2])[:, None]
    wide = kept.repeat_interleave(block_size[0], 2).repeat_interleave(block_size[1], 3)
    seen = seen & wide[:, :, : query.shape[2], : key.shape[2]]
    logits = logits.masked_fill(~seen, -torch.inf)
    weights = logits.softmax(-1).masked_fill(~seen.any(-1, keepdim=True), 0.0)
    return weights @ repeat_heads(value, heads).to(dtype)


def always_kept(seen: Tensor, bounds: Tensor, config: Any, q_len: int) -> Tensor:
    """Elements whose block is kept whatever the rule says, bool ``[B, Sq, Skv]``."""
    _, start, _ = (bounds[:, n, None, None].long() for n in range(3))
    row = torch.arange(q_len, device=bounds.device)[None, :, None] + bounds[:, 0, None, None]
    key = torch.arange(seen.shape[2], device=bounds.device)[None, None, :]
    sink = key < start + config.sink_tokens
    local = key > row - config.local_tokens
    # A query block with one early row is early as a whole: a block is kept or dropped for all its rows.
    block_q = config.block_size[0]
    early = (row - start < config.min_length) & seen.any(-1, keepdim=True)
    early = early | torch.tensor(2 * q_len < block_q, device=bounds.device)
    early = torch.nn.functional.pad(early, (0, 0, 0, -q_len % block_q))
    early = early.unflatten(1, (-1, block_q)).any(2).repeat_interleave(block_q, 1)[:, :q_len]
    return seen & (sink | local | early)


def repeat_heads(x: Tensor, heads: int) -> Tensor:
    """KV heads repeated for the query heads that share them."""
    return x.repeat_interleave(heads // x.shape[1], dim=1)


def block_max(x: Tensor, block_q: int, block_k: int) -> Tensor:
    """Maximum of every block, NaN counting as the largest."""
    x = torch.nn.functional.pad(x, (0, -x.shape[-1] % block_k, 0, -x.shape[-2] % block_q), value=-torch.inf)
    return x.unflatten(-1, (-1, block_k)).unflatten(-3, (-1, block_q)).amax((-1, -3))


def block_any(x: Tensor, block_q: int, block_k: int) -> Tensor:
    """Whether any element of a block is set."""
    return block_max(x.float(), block_q, block_k) > 0
