# SPDX-License-Identifier: BSD-3-Clause
"""The Hadamard rotation in front of codes of single keys; see `sale_flex.kernels.primitives.rotated`."""

import torch
from torch import Tensor


def rotation_width(dim: int) -> int:
    """Channels that are mixed: the largest power of two that divides `dim`."""
    return dim & -dim


def rotated(x: Tensor) -> Tensor:
    """float32 ``[..., D]`` times Hadamard matrices over blocks of channels, to the bit as everywhere; not normalised.

    Products of rotated vectors are `rotation_width` times what they were.
    """
    width = rotation_width(x.shape[-1])
    x = x.unflatten(-1, (-1, width))
    for _ in range(width.bit_length() - 1):
        first, second = x[..., ::2], x[..., 1::2]
        x = torch.cat([first + second, first - second], -1)
    return x.flatten(-2)
