# SPDX-License-Identifier: BSD-3-Clause
"""FlexAttention's mods for kernels of our own: Python callables become Triton functions and torch evaluations."""

from collections.abc import Callable
from typing import Any, Literal

import torch

from sale_flex.mods.compiler import programs as _programs
from sale_flex.mods.compiler import recognise as _eager
from sale_flex.mods.compiler.programs import Facts, Program, program
from sale_flex.mods.compiler.recognise import Described, Sized, identity

__all__ = [
    "Described",
    "Facts",
    "Program",
    "Sized",
    "conjunction",
    "describe",
    "facts",
    "identity",
    "program",
    "require_supported",
    "sized",
]


def describe(mod: Callable[..., Any], kind: Literal["score", "mask", "range"]) -> Described:
    """The program of a mod, and the tensors that this mod gives it.

    A mod that was seen before, or another of the same code that captures the same numbers and tensors of the same
    dtypes and ranks, is recognised without running it. Works inside ``torch.compile(fullgraph=True)`` too, where the
    key is a constant and the tensors are the graph's inputs.

    Args:
        mod: ``score_mod(score, b, h, q_idx, kv_idx)``, ``mask_mod(b, h, q_idx, kv_idx)``, or a key range
            ``(b, h, first_q, last_q) -> (first_kv, last_kv)``. An attribute ``rough`` (True or False) overrides what
            the graph says about a score mod.
        kind: Which of them.

    Returns:
        The key is the program's for `program`, `facts` and `require_supported`, also where the mod is not supported.

    Raises:
        ValueError: The mod does not run on 0-d tensors, or returns something else than it must.
        NotImplementedError: Inside torch.compile, for a mod that torch.compile cannot watch.
    """
    if torch.compiler.is_dynamo_compiling():
        from sale_flex.mods.compiler import compiled  # here: it imports torch._dynamo, and that Triton

        return compiled.describe(mod, kind)
    return _eager.describe(mod, kind)


def sized(mod: Callable[..., Any] | None, kind: Literal["score", "mask"]) -> Sized:
    """A mod for compiled flex_attention on a CPU, such that what it captures may have another size in every call.

    Inductor's C++ template for flex_attention confuses the names of dynamic sizes (torch 2.13). A mod that the bridge
    can follow reads copies of its captured tensors, which keep their lengths; for others there is a program per size.

    Args:
        mod: As for `describe`, on tensors of a CPU; or None.
        kind: Which of them.
    """
    if torch.compiler.is_dynamo_compiling():
        from sale_flex.mods.compiler import compiled

        return Sized(compiled.sized(mod, kind), None)
    return _eager.sized(mod, kind)


def conjunction(one: str, other: str) -> str:
    """The key of the mask that shows what both masks show; its tensors are those of `one`, then those of `other`."""
    if torch.compiler.is_dynamo_compiling():
        from sale_flex.mods.compiler import compiled

        return compiled.conjunction(one, other)
    return _programs.conjunction(one, other)


def facts(key: str) -> Facts:
    """The static facts of a program; a constant where torch.compile traces the caller."""
    if torch.compiler.is_dynamo_compiling():
        from sale_flex.mods.compiler import compiled

        return compiled.facts(key)
    return _programs.facts(key)


def require_supported(key: str, argument: str) -> None:
    """Refuse a mod that the bridge cannot take.

    Args:
        key: From `describe`.
        argument: What the caller calls it, e.g. ``"score_mod"``.

    Raises:
        NotImplementedError: It does something that the op table lacks.
    """
    unsupported = facts(key).unsupported
    if unsupported is not None:
        raise NotImplementedError(
            f"{argument} uses {unsupported}, which sale_flex cannot follow when it estimates which blocks matter. "
            f'Write it with other operations, or pass estimate_mods="ignore": the estimate then leaves mods out, while '
            f"flex_attention still applies them."
        )
