# SPDX-License-Identifier: BSD-3-Clause
"""What a function captures: what its closure, its defaults, the globals it names and functions among them hold.

Nothing runs here, so that a mod which was seen before is recognised in microseconds.
"""

import dis
import functools
import types
from collections.abc import Hashable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

Path = tuple[tuple[str, Any], ...]
"""Steps from a root to something captured; `follow` takes them."""

_CONSTANTS = (
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    type(None),
    type(...),
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
)

_TRUSTED = frozenset(
    {"torch", "math", "cmath", "operator", "builtins", "functools", "itertools", "typing", "collections"}
)
"""Packages whose functions and classes do the same in every call."""


class Captured(NamedTuple):
    """Something captured, and the way to it."""

    path: Path
    value: Any


class Captures:
    """What some functions capture.

    Attributes:
        skeleton: All of it but the values and sizes of tensors: functions with equal skeletons have equal programs, as
            long as sizes are not read.
        tensors: Every captured tensor, once.
        constants: Numbers, strings and the like.
        functions: The functions among it.
        opaque: A type that is not understood; the skeleton does not hold what it may contribute.
    """

    def __init__(self, roots: Sequence[tuple[Any, Path]], inside: Sequence[Any] = ()) -> None:
        """Look at `roots`; globals of the functions `inside` get paths from their modules."""
        self.tensors: list[Captured] = []
        self.constants: list[Captured] = []
        self.functions: list[Path] = []
        self.opaque: str | None = None
        self._inside = {id(x) for x in inside}
        self._tensors: dict[int, int] = {}
        self._seen: dict[int, int] = {}
        self.skeleton: Hashable = tuple(self._visit(root, path) for root, path in roots)

    def _visit(self, x: Any, path: Path) -> Hashable:
        kind = type(x)
        if isinstance(x, Tensor):
            return self._tensor(x, path)
        if kind in _CONSTANTS:
            self.constants.append(Captured(path, x))
            return (kind, repr(x)) if kind in (float, complex) else (kind, x)
        if kind is types.ModuleType and _is_trusted(x.__name__):
            return ("module", x.__name__)
        if kind is not types.FunctionType and _is_trusted(getattr(x, "__module__", None)) and _is_plain(x):
            return ("plain", x)
        # Of what may hold itself, the second meeting ends the walk.
        if id(x) in self._seen:
            return ("again", self._seen[id(x)])
        self._seen[id(x)] = len(self._seen)
        if kind is types.FunctionType:
            return self._function(x, path)
        if kind in (tuple, list, torch.Size):
            return (kind, *(self._visit(item, (*path, ("item", i))) for i, item in enumerate(x)))
        if kind is dict and all(type(name) in _CONSTANTS for name in x):
            return (kind, *((type(i), i, self._visit(item, (*path, ("item", i)))) for i, item in x.items()))
        if kind is functools.partial:
            return (kind, *(self._visit(getattr(x, i), (*path, ("attr", i))) for i in ("func", "args", "keywords")))
        if kind is types.MethodType:
            return (kind, *(self._visit(getattr(x, i), (*path, ("attr", i))) for i in ("__func__", "__self__")))
        self.opaque = self.opaque or f"{kind.__module__}.{kind.__qualname__}"
        return ("opaque", kind, id(x))

    def _tensor(self, x: Tensor, path: Path) -> Hashable:
        place = self._tensors.setdefault(id(x), len(self.tensors))
        if place == len(self.tensors):
            self.tensors.append(Captured(path, x))
        return ("tensor", place, x.dtype, x.dim(), x.device)

    def _function(self, x: types.FunctionType, path: Path) -> Hashable:
        self.functions.append(path)
        parts: list[Hashable] = ["function", x.__code__]
        if x.__defaults__:
            parts += [self._visit(v, (*path, ("default", i))) for i, v in enumerate(x.__defaults__)]
        if x.__kwdefaults__:
            parts += [(i, self._visit(v, (*path, ("keyword", i)))) for i, v in x.__kwdefaults__.items()]
        for i, cell in enumerate(x.__closure__ or ()):
            try:
                value = cell.cell_contents
            except ValueError:
                parts.append("empty")
            else:
                parts.append(self._visit(value, (*path, ("cell", i))))
        if not _is_trusted(x.__module__):
            names = x.__globals__
            for name in _globals_of(x.__code__):
                if name in names:
                    step: Path = (*path, ("global", name))
                    if id(x) in self._inside:
                        step = (("module", x.__module__), ("attr", name))
                    parts.append((name, self._visit(names[name], step)))
        return tuple(parts)


def _is_trusted(module: Any) -> bool:
    return isinstance(module, str) and module.partition(".")[0] in _TRUSTED


def _is_plain(x: Any) -> bool:
    """Whether it is a function or class of C, or one of torch's ops."""
    return isinstance(x, (type, types.BuiltinFunctionType, types.MethodDescriptorType, torch._ops.OpOverload))


@lru_cache(maxsize=4096)
def _globals_of(code: types.CodeType) -> tuple[str, ...]:
    """The global names that a function's code, and that of functions it makes, reads."""
    names = {i.argval: None for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            names |= dict.fromkeys(_globals_of(inner))
    return tuple(names)
