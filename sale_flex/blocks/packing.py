# SPDX-License-Identifier: BSD-3-Clause
"""Two 4-bit codes in a byte, for storing codes beside a KV cache."""

import torch
from torch import Tensor


def pack_int4(codes: Tensor) -> Tensor:
    """Pack codes in [-8, 7], or in [0, 15], two per byte, the even channel in the low half.

    Args:
        codes: int8 ``[..., D]``, D even.

    Returns:
        uint8 ``[..., D / 2]``.

    Raises:
        TypeError: `codes` is not int8.
        ValueError: The last dimension is odd.
    """
    if codes.dtype != torch.int8:
        raise TypeError(f"codes must be int8, got {codes.dtype}.")
    if codes.dim() == 0 or codes.shape[-1] % 2:
        raise ValueError(f"codes must have an even last dimension to pair up, got shape {list(codes.shape)}.")
    pairs = codes.view(torch.uint8) & 15
    return pairs[..., 0::2] | (pairs[..., 1::2] << 4)


def unpack_int4(packed: Tensor, signed: bool = True) -> Tensor:
    """Undo `pack_int4`.

    Args:
        packed: uint8 ``[..., D / 2]``.
        signed: Whether the codes are in [-8, 7], else in [0, 15].

    Returns:
        int8 ``[..., D]``.

    Raises:
        TypeError: `packed` is not uint8.
    """
    if packed.dtype != torch.uint8:
        raise TypeError(f"packed must be uint8, got {packed.dtype}.")
    if signed:
        # Shifting an int8 to the right fills up with its sign.
        low, high = (packed << 4).view(torch.int8) >> 4, packed.view(torch.int8) >> 4
    else:
        low, high = (packed & 15).view(torch.int8), (packed >> 4).view(torch.int8)
    return torch.stack([low, high], dim=-1).flatten(-2)
