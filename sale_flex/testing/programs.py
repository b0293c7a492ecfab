# SPDX-License-Identifier: BSD-3-Clause
"""FlexAttention programs to try a kernel with: every ready mod, block masks, and what users write themselves."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from sale_flex import mods
from sale_flex.testing.inputs import Shape

Options = dict[str, Any]
"""Keyword arguments of sale_attention."""

Device = torch.device | str


def _ids(shape: Shape, device: Device, documents: int = 3) -> Tensor:
    """Documents of uneven lengths, ids ``[B, Skv]``."""
    at = torch.arange(shape.kv_len, device=device)
    ids = torch.zeros_like(at)
    for n in range(1, documents):
        ids += at >= shape.kv_len * n * n // (documents * documents)
    return ids.expand(shape.batch, -1)


def _block_mask(shape: Shape, device: Device, block_size: tuple[int, int], by_head: bool = False) -> BlockMask:
    """Causal, and every other block of keys is left out for every other block of queries, by head or not."""
    offset = shape.offset

    def checkered(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        even = (q_idx // block_size[0] + kv_idx // block_size[1] + (h if by_head else 0)) % 2 == 0
        return (even | (kv_idx < 64)) & (kv_idx <= q_idx + offset)

    heads = shape.heads if by_head else None
    return create_block_mask(
        checkered, None, heads, shape.q_len, shape.kv_len, device=str(device), BLOCK_SIZE=block_size
    )


def _grid(length: int, axes: int) -> tuple[int, ...]:
    """The smallest square or cube of at least `length` tokens."""
    side = 1
    while side**axes < length:
        side += 1
    return (side,) * axes


def _random(size: tuple[int, ...], device: Device) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(5)).to(device)


def _first_tokens(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return kv_idx < 4


def _score_by_head(shape: Shape, device: Device) -> Options:
    slopes = torch.linspace(0.5, 1.5, shape.heads, device=device)

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return score * slopes[h] - (q_idx // 16 == kv_idx // 16).float()

    return {"score_mod": score_mod}


def _mask_by_head(shape: Shape, device: Device) -> Options:
    table = _random((shape.heads, shape.kv_len // 8 + 1), device) > -0.6
    offset = shape.offset

    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return table[h, kv_idx // 8] | (q_idx + offset - kv_idx < 8)

    return {"mask_mod": mask_mod}


PROGRAMS: dict[str, Callable[[Shape, Device], Options]] = {
    "causal": lambda s, d: {"mask_mod": mods.causal(s.offset), "is_causal": False},
    "everything": lambda s, d: {"is_causal": False},
    "window": lambda s, d: {"mask_mod": mods.sliding_window(90, s.offset)},
    "window to both sides": lambda s, d: {
        "mask_mod": mods.sliding_window(70, s.offset, causal=False),
        "is_causal": False,
    },
    "prefix": lambda s, d: {"mask_mod": mods.prefix_lm(100, s.offset), "is_causal": False},
    "documents": lambda s, d: {"mask_mod": mods.document(_ids(s, d), s.offset)},
    "documents, both ways": lambda s, d: {"mask_mod": mods.document(_ids(s, d), s.offset), "is_causal": False},
    "window and documents": lambda s, d: {
        "mask_mod": mods.and_masks(mods.sliding_window(120, s.offset), mods.document(_ids(s, d), s.offset))
    },
    "window or sink": lambda s, d: {"mask_mod": mods.or_masks(mods.sliding_window(90, s.offset), _first_tokens)},
    "alibi": lambda s, d: {"score_mod": mods.alibi(s.heads, s.offset, device=d)},
    "soft cap": lambda s, d: {"score_mod": mods.softcap(5.0)},
    "relative bias": lambda s, d: {"score_mod": mods.relative_bias(_random((s.heads, 64), d), s.offset)},
    "rough relative bias": lambda s, d: {
        "score_mod": mods.relative_bias(4 * _random((s.heads, 64), d), s.offset, rough=True)
    },
    "bucketed bias": lambda s, d: {"score_mod": mods.bucketed_bias(_random((s.heads, 32), d), s.offset)},
    "neighborhood 1-d": lambda s, d: {
        "mask_mod": mods.neighborhood((s.kv_len,), 41, q_offset=s.offset),
        "is_causal": False,
    },
    "neighborhood 2-d": lambda s, d: {
        "mask_mod": mods.neighborhood(_grid(s.kv_len, 2), 7, q_offset=s.offset),
        "is_causal": False,
    },
    "neighborhood 2-d, dilated": lambda s, d: {
        "mask_mod": mods.neighborhood(_grid(s.kv_len, 2), (5, 3), (2, 3), q_offset=s.offset),
        "is_causal": False,
    },
    "neighborhood 3-d": lambda s, d: {
        "mask_mod": mods.neighborhood(_grid(s.kv_len, 3), 3, q_offset=s.offset),
        "is_causal": False,
    },
    "soft cap in documents": lambda s, d: {
        "score_mod": mods.softcap(5.0),
        "mask_mod": mods.document(_ids(s, d), s.offset),
    },
    "a block mask": lambda s, d: {"block_mask": _block_mask(s, d, (64, 64)), "is_causal": False},
    "a finer block mask": lambda s, d: {"block_mask": _block_mask(s, d, (32, 16))},
    "a coarser block mask by head": lambda s, d: {"block_mask": _block_mask(s, d, (128, 128), True)},
    "a block mask and a mask": lambda s, d: {
        "block_mask": _block_mask(s, d, (64, 64)),
        "mask_mod": mods.sliding_window(150, s.offset),
    },
    "a user's score": _score_by_head,
    "a user's mask by head": _mask_by_head,
}
"""Name -> keyword arguments for a shape, on a device."""
