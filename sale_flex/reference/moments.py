# SPDX-License-Identifier: BSD-3-Clause
"""What the mass rule knows of keys: moments of sub-blocks, or rotated single keys, and their codes."""

from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from sale_flex.reference.common import quantize, rotate, valid_blocks, valid_keys


class Moments(NamedTuple):
    """Codes of the mean and the variance of every sub-block of keys. All 0 in blocks with a key that is not valid.

    Sub-blocks of one key are `rotate`d, and so are the rows that they meet. Moments are not: a rotation would spread a
    variance over channels that know nothing of each other's.
    """

    mean_codes: Tensor
    """int8 ``[B, Hkv, nk * n_sub, D]``, in [-7, 7] or [-127, 127]."""
    mean_scale: Tensor
    """float32 ``[B, Hkv, nk]``."""
    var_codes: Tensor
    """int8 ``[B, Hkv, nk * n_sub, D]``, in [0, 15] or [0, 127]; no rows for sub-blocks of one key."""
    var_scale: Tensor
    """float32 ``[B, Hkv, nk]``, or ``[B, Hkv, 0]``."""
    nonfinite: Tensor
    """bool ``[B, Hkv, nk]``: blocks with a moment that is not finite. Codes and scales are 0."""


def key_moments(
    key: Tensor, mean: Tensor, bounds: Tensor, block_k: int, sub_block: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Mean and variance, by channel, of every `sub_block` smoothed keys: `dtype` ``[B, Hkv, nk * n_sub, D]`` each.

    Sums are taken from the first key to the last. Keys that are not valid count as the smoothing mean.
    """
    valid = valid_keys(bounds, key.shape[2])[:, None, :, None]
    x = torch.where(valid, key.to(dtype) - mean.to(dtype)[:, :, None], 0.0)
    x = torch.nn.functional.pad(x, (0, 0, 0, -key.shape[2] % block_k)).unflatten(2, (-1, sub_block))
    members = x.unbind(3)
    mu = reduce(torch.add, members) / sub_block
    return mu, reduce(torch.add, [(member - mu).square() for member in members]) / sub_block


def quantize_moments(key: Tensor, mean: Tensor, bounds: Tensor, block_k: int, sub_block: int, bits: int) -> Moments:
    """Codes of the moments, with one scale per key block for the means and one for the variances."""
    blocks = -(-key.shape[2] // block_k)
    mu, var = key_moments(key, mean, bounds, block_k, sub_block)
    moments = (rotate(mu) if sub_block == 1 else mu), var
    nonfinite = torch.zeros(*key.shape[:2], blocks, dtype=torch.bool, device=key.device)
    coded = []
    for x, top in zip(moments, (2 ** (bits - 1) - 1, 15 if bits == 4 else 127)):
        codes, scale = quantize(x.unflatten(2, (blocks, -1)), (-2, -1), top)
        nonfinite = nonfinite | scale[..., 0, 0].isnan()
        coded.append((codes, scale[..., 0, 0]))
    keep = valid_blocks(bounds, blocks, block_k)[:, None] & ~nonfinite
    (mean_codes, mean_scale), (var_codes, var_scale) = (
        ((codes * keep[..., None, None]).flatten(2, 3), torch.where(keep, scale, 0.0)) for codes, scale in coded
    )
    if sub_block == 1:
        var_codes, var_scale = var_codes[:, :, :0], var_scale[:, :, :0]
    return Moments(mean_codes, mean_scale, var_codes, var_scale, nonfinite)
