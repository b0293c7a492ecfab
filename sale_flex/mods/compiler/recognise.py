# SPDX-License-Identifier: BSD-3-Clause
"""From a mod to its program's key and the tensors it captures, eagerly."""

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sale_flex.mods.compiler.captures import Captures
from sale_flex.mods.compiler.programs import program, register
from sale_flex.mods.compiler.sized import maker, mod_tables
from sale_flex.mods.compiler.trace import trace

_MEMO_SIZE = 4096

_READS_SIZES: tuple[str, list[int]] = ("", [])
"""Marks a mod of which sizes of captured tensors have to be looked up too."""

_memo: dict[Hashable, tuple[str, list[int]]] = {}


class Described(NamedTuple):
    """A mod.

    Attributes:
        key: Of its program.
        tensors: The captured tensors that its program takes, in order.
        identity: What it shares with mods of the same code that capture the same numbers and kinds of tensors: torch
            compiles one program for all of them. None inside torch.compile.
    """

    key: str
    tensors: list[Tensor]
    identity: Hashable


def describe(mod: Callable[..., Any], kind: str) -> Described:
    """`sale_flex.mods.compiler.describe`, outside torch.compile."""
    captures = Captures([(mod, ())])
    tensors = [x.value for x in captures.tensors]
    rough = checked_rough(getattr(mod, "rough", None))
    known: Hashable = (kind, rough, torch.get_default_dtype(), captures.skeleton)
    with_sizes = (known, tuple(x.shape for x in tensors))
    if captures.opaque is None:
        found = _memo.get(known)
        if found is _READS_SIZES:
            found = _memo.get(with_sizes)
        if found is not None:
            return Described(found[0], [tensors[i] for i in found[1]], captures.skeleton)
    traced = trace(mod, kind, device_of(tensors))
    key = register(traced.graph, rough).key
    places = [next((i for i, x in enumerate(tensors) if x is used), None) for used in traced.tensors]
    if captures.opaque is None and None not in places:
        if len(_memo) >= _MEMO_SIZE:
            _memo.clear()
        if traced.reads_sizes:
            _memo[known] = _READS_SIZES
        _memo[with_sizes if traced.reads_sizes else known] = key, [i for i in places if i is not None]
    return Described(key, traced.tensors, captures.skeleton)


def identity(mod: Callable[..., Any] | None) -> Hashable:
    """What a mod shares with others of the same code: see `Described.identity`. None for no mod.

    Objects that are neither tensors, numbers nor functions count by themselves: two of them are never the same.
    """
    return None if mod is None else Captures([(mod, ())]).skeleton


class Sized(NamedTuple):
    """A mod for compiled flex_attention on a CPU.

    Attributes:
        mod: The one given, or one that computes the same from copies of what it captures.
        identity: What it shares with others of which one compiled program serves all, whatever sizes they capture.
    """

    mod: Any
    identity: Hashable


def sized(mod: Callable[..., Any] | None, kind: str) -> Sized:
    """`sale_flex.mods.compiler.sized`, outside torch.compile."""
    if mod is None:
        return Sized(None, None)
    captures = Captures([(mod, ())])
    tensors = [x.value for x in captures.tensors]
    own = Sized(mod, (captures.skeleton, tuple(x.shape for x in tensors)))
    if captures.opaque is None and all(_is_static(x) for x in tensors):
        return own
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return own  # of a copy it would have no gradient
    try:
        key, used, _ = describe(mod, kind)
    except ValueError:
        return own  # what is wrong with it is for flex_attention to say
    if program(key).unsupported is not None or any(x.device.type != "cpu" for x in used):
        return own
    tables = mod_tables(key, used) if used else []
    return Sized(maker(key)(tables), (key, tuple(len(x) for x in tables)))


def _is_static(x: Tensor) -> bool:
    """Whether torch.compile takes every size of a tensor for a constant."""
    return x.dim() == len(getattr(x, "_dynamo_static_indices", ()))


def checked_rough(rough: Any) -> bool | None:
    """The attribute `rough` of a mod."""
    if rough is not None and not isinstance(rough, bool):
        raise TypeError(f"a mod's attribute rough must be True, False or None, got {rough!r}.")
    return rough


def device_of(tensors: list[Tensor]) -> torch.device:
    """Where a mod runs: with the tensors it captures, unless they are but scalars of the host."""
    devices = [x.device for x in tensors]
    return next((x for x in devices if x.type != "cpu"), devices[0] if devices else torch.device("cpu"))
