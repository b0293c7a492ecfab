# SPDX-License-Identifier: BSD-3-Clause
"""What a mod is, and the last step of every factory."""

from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""``mask_mod(b, h, q_idx, kv_idx)`` -> bool, as flex_attention takes it: whether the row sees the key."""

ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""``score_mod(score, b, h, q_idx, kv_idx)``, as flex_attention takes it -> the score that softmax gets."""

KeyRange = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor | int, Tensor | int]]
"""``key_range(b, h, first_q, last_q)`` -> the first and the last key that rows `first_q` to `last_q` may see."""

Mod = TypeVar("Mod", MaskMod, ScoreMod)


def ready(mod: Mod, *, key_range: KeyRange | None = None, rough: bool | None = None) -> Mod:
    """`mod` with what sale_attention asks of it.

    Args:
        mod: A closure.
        key_range: Its attribute of that name, if it is a mask.
        rough: Its attribute of that name, if it is a score whose look does not tell: whether the value jumps between
            neighbouring keys, so that the middle of a few keys cannot stand for them.
    """
    marked: Any = mod
    if key_range is not None:
        marked.key_range = key_range
    if rough is not None:
        marked.rough = rough
    return mod
