# SPDX-License-Identifier: BSD-3-Clause
"""From a mod to its program's key and the tensors it captures, eagerly."""

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sale_flex.bridge.captures import Captures
from sale_flex.bridge.programs import register
from sale_flex.bridge.trace import trace

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
    """`sale_flex.bridge.describe`, outside torch.compile."""
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


def checked_rough(rough: Any) -> bool | None:
    """The attribute `rough` of a mod."""
    if rough is not None and not isinstance(rough, bool):
        raise TypeError(f"a mod's attribute rough must be True, False or None, got {rough!r}.")
    return rough


def device_of(tensors: list[Tensor]) -> torch.device:
    """Where a mod runs: with the tensors it captures, unless they are but scalars of the host."""
    devices = [x.device for x in tensors]
    return next((x for x in devices if x.type != "cpu"), devices[0] if devices else torch.device("cpu"))
