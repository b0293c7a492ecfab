# SPDX-License-Identifier: BSD-3-Clause
"""Codes of moments of sub-blocks of keys, or of rotated single keys; see `sale_flex.kernels.moments`."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from sale_flex.blocks.bits import pack_bits
from sale_flex.kernels.arguments import KeyMoments
from sale_flex.ops.fallback.rotation import rotated

STEP_ROWS = 256

_ELEMENTS = 2**22
"""Keys times channels held at once, in float32: 16 MiB."""


def quantize_moments(key: Tensor, mean: Tensor, bounds: Tensor, block_k: int, sub_block: int, bits: int) -> KeyMoments:
    """Codes and scales of means and of variances, and the bits of blocks that are not finite."""
    batch, heads, kv_len, dim = key.shape
    subs = block_k // sub_block
    blocks = -(-kv_len // block_k)
    rows = blocks * subs + -(blocks * subs) % STEP_ROWS
    sizes = (rows, rows if sub_block > 1 else 0)
    codes = [torch.zeros(batch, heads, n // subs, subs, dim, dtype=torch.int8, device=key.device) for n in sizes]
    scales = [torch.zeros(batch, heads, n // subs, device=key.device) for n in sizes]
    bad = torch.zeros(batch, heads, blocks, dtype=torch.bool, device=key.device)
    tile = max(1, _ELEMENTS // (heads * block_k * dim))
    tops = (2 ** (bits - 1) - 1, 15 if bits == 4 else 127)
    for b, (_, start, end) in enumerate(bounds.tolist()):
        for first in range(0, blocks, tile):
            stop = min(first + tile, blocks)
            whole = torch.arange(first, stop, device=key.device) * block_k
            whole = (whole >= start) & (whole + block_k <= end)
            moments = _moments(key[b], mean[b], first * block_k, stop * block_k, start, end, sub_block)
            if sub_block == 1:
                moments = (rotated(moments[0]), moments[1])
            coded = [_quantize(x.unflatten(1, (-1, subs)), top) for x, top in zip(moments, tops)]
            finite = torch.stack([scale.isfinite() for _, scale in coded]).all(0)  # [Hkv, nk]
            bad[b, :, first:stop] = ~finite
            keep = whole & finite
            for n, (code, scale) in enumerate(coded[: 1 + (sub_block > 1)]):
                codes[n][b, :, first:stop] = code * keep[..., None, None]
                scales[n][b, :, first:stop] = torch.where(keep, scale, 0.0)
    means, variances = (x.flatten(2, 3) for x in codes)
    return KeyMoments(means, scales[0], variances, scales[1], pack_bits(bad))


def _moments(
    key: Tensor, mean: Tensor, first: int, stop: int, start: int, end: int, sub_block: int
) -> tuple[Tensor, Tensor]:
    """Mean and variance of the sub-blocks of keys `first` to `stop`, float32 ``[Hkv, N, D]``, summed key by key.

    Keys outside `start` and `end` count as the smoothing mean.
    """
    at = torch.arange(first, min(stop, key.shape[1]), device=key.device)
    valid = (at >= start) & (at < end)
    x = torch.where(valid[:, None], key[:, first:stop].float() - mean[:, None], 0.0)
    members = pad(x, (0, 0, 0, stop - first - x.shape[1])).unflatten(1, (-1, sub_block)).unbind(2)
    mu, var = torch.zeros_like(members[0]), torch.zeros_like(members[0])
    for member in members:
        mu += member
    mu /= sub_block
    for member in members:
        var += (member - mu).square_()
    return mu, var.div_(sub_block)


def _quantize(x: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Codes of x ``[H, N, subs, D]`` in [-top, top], int8, and scales float32 ``[H, N]``; NaN: not finite, codes 0."""
    amax = x.abs().amax((-2, -1), keepdim=True)  # NaN if an element is
    # A tensor, not a number: dividing by a number is not correctly rounded on every device.
    tops = torch.full_like(amax, top)
    scale = amax / tops
    normal = scale >= torch.finfo(torch.float32).tiny
    inverse = torch.where(normal, tops / amax, 1.0)
    finite = amax.isfinite()
    codes = torch.where(finite, (x * inverse).round_(), 0.0).to(torch.int8)
    return codes, torch.where(finite, torch.where(normal, scale, 1.0), torch.nan)[..., 0, 0]
