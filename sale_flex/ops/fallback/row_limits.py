# SPDX-License-Identifier: BSD-3-Clause
"""Exact sink-local statistics of every row; see `sale_flex.kernels.row_limits` for the contract."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

from sale_flex.ops.fallback.quantize import CODE_ROWS

_TILE = 128
"""Query rows that share one window of local keys."""

_LOGITS = 2**24
"""Logits held at once: 64 MiB."""


def row_limits(
    query: Tensor,
    key: Tensor,
    mean: Tensor,
    query_scale: Tensor,
    bounds: Tensor,
    threshold: Tensor,
    scale: float,
    sink_tokens: int,
    local_tokens: int,
) -> Tensor:
    """Limits in units of (code product x key scale), ``[B, Hq, ceil(Sq / 128) * 128]``; +inf for padding rows."""
    batch, heads, q_len, _ = query.shape
    limits = torch.full((batch, heads, q_len + -q_len % CODE_ROWS), torch.inf, device=query.device)
    for b, here, sums in row_sums(query, key, mean, bounds, scale, sink_tokens, local_tokens):
        limits[b, :, here] = (sums + threshold[:, None].log()) / (scale * query_scale[b, :, here])
    return limits


def row_sums(
    query: Tensor, key: Tensor, mean: Tensor, bounds: Tensor, scale: float, sink_tokens: int, local_tokens: int
) -> Iterator[tuple[int, slice, Tensor]]:
    """``ln sum exp`` over the sink-local keys of the rows that are no padding: batch row, rows, ``[Hq, M]``."""
    heads, q_len = query.shape[1:3]
    width = _TILE + local_tokens - 1 + sink_tokens
    rows = max(1, _LOGITS // (heads * width * _TILE)) * _TILE
    for b, (offset, start, end) in enumerate(bounds.tolist()):
        last = min(offset + q_len, end)
        # Rows that are no padding stand at the positions start to end - 1.
        for first in range(max(offset, start), last, rows):
            stop = min(first + rows, last)
            here = slice(first - offset, stop - offset)
            keys = key[b, :, max(first - local_tokens + 1, 0) : stop].float() - mean[b, :, None]
            sink = key[b, :, start : min(start + sink_tokens, stop)].float() - mean[b, :, None]
            rows_here = query[b, :, here].float()
            yield b, here, _log_sum(rows_here, keys, sink, first, start, sink_tokens, local_tokens, scale)


def _log_sum(
    query: Tensor, keys: Tensor, sink: Tensor, first: int, start: int, sink_tokens: int, local_tokens: int, scale: float
) -> Tensor:
    """``ln sum exp`` over the sink-local keys of the rows at positions `first` on, ``[Hq, M]``.

    Tiles of rows meet the window of keys that is local to any of them, all tiles in one product.

    Args:
        query: ``[Hq, M, D]``.
        keys: ``[Hkv, N, D]``, the last `N` keys up to the last row's position.
        sink: ``[Hkv, T, D]``, keys from `start` on.
        first: Position of the first row.
        start: First valid key.
        sink_tokens: Keys from `start` on that are sinks.
        local_tokens: Keys up to a row's position that are local.
        scale: Softmax scale.
    """
    kv_heads, count = keys.shape[0], query.shape[1]
    query = pad(query, (0, 0, 0, -count % _TILE)).unflatten(1, (-1, _TILE)).unflatten(0, (kv_heads, -1))
    tiles = query.shape[2]
    window = _TILE + local_tokens - 1
    before = max(local_tokens - 1 - first, 0)
    keys = pad(keys, (0, 0, before, tiles * _TILE + local_tokens - 1 - before - keys.shape[1]))
    local = query @ keys.unfold(1, window, _TILE)[:, None]  # [Hkv, G, tiles, _TILE, window]
    row = torch.arange(_TILE, device=keys.device)[:, None]
    column = torch.arange(window, device=keys.device)
    tile = first + torch.arange(tiles, device=keys.device)[:, None, None] * _TILE
    # Keys that are both sink and local count as sinks.
    near = (column >= row) & (column < row + local_tokens) & (tile + column - local_tokens + 1 >= start + sink_tokens)
    far = query @ sink[:, None, None].transpose(-1, -2)  # [Hkv, G, tiles, _TILE, T]
    seen = start + torch.arange(sink.shape[1], device=keys.device) <= tile + row
    logits = torch.cat(
        [local.mul_(scale).masked_fill_(~near, -torch.inf), far.mul_(scale).masked_fill_(~seen, -torch.inf)], -1
    )
    return logits.logsumexp(-1).flatten(0, 1).flatten(1)[:, :count]
