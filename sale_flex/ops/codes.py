# SPDX-License-Identifier: BSD-3-Clause
"""Ops that turn queries and keys into codes, and what those need: bounds, the smoothing mean, values to be kept."""

import torch
from torch import Tensor

from sale_flex.blocks.bounds import query_bounds as _query_bounds
from sale_flex.kernels.arguments import KeyMoments, Length
from sale_flex.ops.define import op


def ceil_div(length: int, size: int) -> int:
    """Parts of a size that cover a length."""
    return (length + size - 1) // size


def _codes(x: Tensor, packed: bool) -> Tensor:
    batch, heads, rows, dim = x.shape
    dim, dtype = (dim // 2, torch.uint8) if packed else (dim, torch.int8)
    return x.new_empty(batch, heads, ceil_div(rows, 128) * 128, dim, dtype=dtype)


@op(_query_bounds)
def query_bounds(
    query: Tensor, key: Tensor, kv_range: Tensor | None, q_offset: Tensor | None, offset: Length
) -> Tensor:
    """(q_offset, start, end) of every batch row, int32 ``[B, 3]``."""
    return query.new_empty(query.shape[0], 3, dtype=torch.int32)


@op("key_mean")
def key_mean(key: Tensor, bounds: Tensor, smooth_tokens: int) -> Tensor:
    """The smoothing mean, float32 ``[B, Hkv, D]``."""
    return key.new_empty(key.shape[0], key.shape[1], key.shape[3], dtype=torch.float32)


@op("quantize")
def quantize_rows(x: Tensor, bits: int, packed: bool) -> tuple[Tensor, Tensor]:
    """Codes and scales of rows; two codes a byte if packed."""
    return _codes(x, packed), x.new_empty(x.shape[:3], dtype=torch.float32)


@op("quantize")
def quantize_groups(
    key: Tensor, mean: Tensor, bounds: Tensor, group: int, bits: int, packed: bool
) -> tuple[Tensor, Tensor]:
    """Codes of smoothed keys and a scale per group of them."""
    codes = _codes(key, packed)
    return codes, key.new_empty(*key.shape[:2], codes.shape[2] // group, dtype=torch.float32)


@op("moments")
def quantize_moments(key: Tensor, mean: Tensor, bounds: Tensor, block_k: int, sub_block: int, bits: int) -> KeyMoments:
    """Codes of sub-blocks' means and variances, or of single keys."""
    batch, heads, kv_len, dim = key.shape
    subs, blocks = block_k // sub_block, ceil_div(kv_len, block_k)
    rows = ceil_div(blocks * subs, 256) * 256
    sizes = (rows, rows if sub_block > 1 else 0)
    codes = [key.new_empty(batch, heads, size, dim, dtype=torch.int8) for size in sizes]
    scales = [key.new_empty(batch, heads, size // subs, dtype=torch.float32) for size in sizes]
    nonfinite = key.new_empty(batch, heads, ceil_div(blocks, 32), dtype=torch.int32)
    return KeyMoments(codes[0], scales[0], codes[1], scales[1], nonfinite)


@op("compact")
def nonfinite_blocks(value: Tensor, bounds: Tensor, block_k: int) -> Tensor:
    """Bits of key blocks with a valid value that is not finite, int32 ``[B, Hkv, ceil(nk / 32)]``."""
    batch, heads, kv_len, _ = value.shape
    return value.new_empty(batch, heads, ceil_div(ceil_div(kv_len, block_k), 32), dtype=torch.int32)
