# SPDX-License-Identifier: BSD-3-Clause
"""Low-bit codes of queries and keys; see `sale_flex.kernels.quantize` for the contract."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from sale_flex.blocks.packing import pack_int4

CODE_ROWS = 128


def quantize_rows(x: Tensor, bits: int, packed: bool) -> tuple[Tensor, Tensor]:
    """Codes with a scale per row: ``[B, H, ceil(S / 128) * 128, D]``, float32 ``[B, H, S]``."""
    codes, scale = _symmetric(x.float(), (-1,), bits)
    codes = pad(codes, (0, 0, 0, -codes.shape[2] % CODE_ROWS))
    return (pack_int4(codes) if packed else codes), scale[..., 0]


def quantize_groups(
    key: Tensor, mean: Tensor, bounds: Tensor, group: int, bits: int, packed: bool
) -> tuple[Tensor, Tensor]:
    """Codes of ``key - mean``, a scale per `group` keys from the first valid one."""
    batch, heads, rows, dim = key.shape
    padded = rows + -rows % CODE_ROWS
    codes = torch.zeros(batch, heads, padded, dim, dtype=torch.int8, device=key.device)
    scale = torch.ones(batch, heads, padded // group, device=key.device)
    for b, (_, start, end) in enumerate(bounds.tolist()):
        if start == end:
            continue
        smooth = key[b, :, start:end].float() - mean[b, :, None]
        smooth = pad(smooth, (0, 0, 0, (start - end) % group)).unflatten(1, (-1, group))
        group_codes, group_scale = _symmetric(smooth, (-2, -1), bits)
        codes[b, :, start:end] = group_codes.flatten(1, 2)[:, : end - start]
        scale[b, :, : smooth.shape[1]] = group_scale[..., 0, 0]
    return (pack_int4(codes) if packed else codes), scale


def _symmetric(x: Tensor, dims: tuple[int, ...], bits: int) -> tuple[Tensor, Tensor]:
    """Codes and scale of x over `dims`; a slice with a non-finite element has codes 0 and scale NaN."""
    amax = x.abs().amax(dims, keepdim=True)  # NaN if an element is
    # A tensor, not a number: dividing by a number is not correctly rounded on every device.
    top = torch.full_like(amax, 2 ** (bits - 1) - 1)
    scale = amax / top
    normal = scale >= torch.finfo(torch.float32).tiny
    inverse = torch.where(normal, top / amax, 1.0)
    finite = amax.isfinite()
    codes = torch.where(finite, (x * inverse).round_(), 0.0).to(torch.int8)
    return codes, torch.where(finite, torch.where(normal, scale, 1.0), torch.nan)
