# SPDX-License-Identifier: BSD-3-Clause
"""A call's mods as the torch path takes them, for scores: those are computed there on every device."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sale_flex.blocks.mask_spec import Mod
from sale_flex.kernels.arguments import MaskSpec
from sale_flex.ops.define import torch_mod

if TYPE_CHECKING:
    from sale_flex.call.facts import Call


def mods_in_torch(call: "Call") -> tuple[MaskSpec, Callable[..., Any] | None]:
    """Who sees whom, and the score_mod."""
    return call.spec._replace(mask=_in_torch(call.spec.mask)), _in_torch(call.score)


def _in_torch(mod: Mod) -> Callable[..., Any] | None:
    return torch_mod(mod.key, mod.tensors) if mod.key else None
