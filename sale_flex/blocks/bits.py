# SPDX-License-Identifier: BSD-3-Clause
"""One bit per key block in words of 32: bit ``j % 32`` of word ``j // 32`` is block j."""

import torch
from torch import Tensor
from torch.nn.functional import pad


def pack_bits(flags: Tensor) -> Tensor:
    """bool ``[..., nk]`` to int32 ``[..., ceil(nk / 32)]``."""
    flags = pad(flags, (0, -flags.shape[-1] % 32)).unflatten(-1, (-1, 32))
    weight = torch.ones((), dtype=torch.int32, device=flags.device) << torch.arange(32, device=flags.device)
    # Bit 31 is the sign: the sum wraps around on purpose.
    return (flags * weight).sum(-1).to(torch.int32)


def unpack_bits(words: Tensor, blocks: int) -> Tensor:
    """int32 ``[..., ceil(nk / 32)]`` to bool ``[..., nk]``."""
    bit = torch.arange(32, dtype=torch.int32, device=words.device)
    return ((words[..., None] >> bit) & 1).bool().flatten(-2)[..., :blocks]


def count_bits(words: Tensor) -> Tensor:
    """How many bits are set in each int32 word, int64."""
    # In int64, and masked, so that the sign is a bit like the others.
    x = words.long() & 0xFFFFFFFF
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24) & 0xFF
