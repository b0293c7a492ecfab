# SPDX-License-Identifier: BSD-3-Clause
"""Who sees whom, as ops take it (docs/semantics.md)."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from sale_flex.kernels.arguments import MaskSpec


class Mod(NamedTuple):
    """A mod as ops take it."""

    key: str = ""
    """Of its program; empty for no mod."""
    tensors: Sequence[Tensor] = ()
    """What it captures."""


def causal_spec(bounds: Tensor) -> MaskSpec:
    """Plain causal attention."""
    return MaskSpec(bounds, True, Mod(), None, 1, 1)
