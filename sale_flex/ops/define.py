# SPDX-License-Identifier: BSD-3-Clause
"""Custom ops that are declared as functions of a few named tuples: schema, fake, and dispatch.

On CUDA tensors an op launches the Triton kernel of the same name from `sale_flex.kernels`; everywhere else it runs the
torch implementation of the same name from `sale_flex.ops.fallback`. Either is imported when an op first runs. The ops
are opaque to torch.compile, have fixed shapes, read no value on the host, and are for inference: no gradient passes.

The boundary of an op takes tensors and numbers alone. A tuple crosses it field by field, an optional one as so many
Nones, and stands again on the other side, as does the tuple that the op returns. No callable crosses it: a mod travels
as the key of its program and the tensors that it captures, and where the op runs, the key finds the generated Triton
function (CUDA) or the traced graph (elsewhere).
"""

import types
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib import import_module
from itertools import islice
from typing import Any, Generic, ParamSpec, TypeVar, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from sale_flex.kernels.arguments import Length, ModLike
from sale_flex.mods.compiler import program

_LIBRARY = torch.library.Library("sale_flex", "DEF")

P = ParamSpec("P")
R = TypeVar("R")

_LEAVES = {Tensor: "Tensor", int: "int", Length: "SymInt", float: "float", bool: "bool", str: "str"}


class _Part:
    """How an argument crosses the boundary: as one value, as a mod's two, or as its fields'."""

    def __init__(self, name: str, hint: Any, optional: bool = False) -> None:
        hint, can_be_none = _without_none(hint)
        optional = optional or can_be_none
        fields = get_type_hints(hint, include_extras=True) if hasattr(hint, "_fields") else {}
        self.kind = hint
        self.is_mod = hint == ModLike
        self.fields = [_Part(f"{name}_{field}", kind, optional) for field, kind in fields.items()]
        self.is_flat = bool(fields) and not any(part.is_mod or part.fields for part in self.fields)
        if self.is_mod:
            self.schema = [f"str {name}_key", f"Tensor[] {name}_tensors"]
        elif fields:
            self.schema = [entry for part in self.fields for entry in part.schema]
        else:
            self.schema = [f"{_LEAVES[hint]}{'?' * optional} {name}"]

    def spread(self, value: Any, flat: list[Any]) -> None:
        """Append what crosses the boundary for `value`."""
        if self.is_mod:
            flat.append(value.key)
            flat.append(list(value.tensors))
        elif not self.fields:
            flat.append(value)
        elif value is None:
            flat.extend([None] * len(self.schema))
        elif self.is_flat:
            flat.extend(value)
        else:
            for part, field in zip(self.fields, value):
                part.spread(field, flat)

    def gather(self, flat: Iterator[Any], mod: Callable[[str, list[Tensor]], Any]) -> Any:
        """The value again, its mods made by `mod`."""
        if self.is_mod:
            key, tensors = next(flat), next(flat)
            return mod(key, tensors) if key else None
        if not self.fields:
            return next(flat)
        if self.is_flat:
            fields = list(islice(flat, len(self.fields)))
        else:
            fields = [part.gather(flat, mod) for part in self.fields]
        return None if all(field is None for field in fields) else self.kind(*fields)


def _without_none(hint: Any) -> tuple[Any, bool]:
    if get_origin(hint) in (Union, types.UnionType):
        kinds = [kind for kind in get_args(hint) if kind is not type(None)]
        return kinds[0], len(kinds) < len(get_args(hint))
    return hint, False


class Op(Generic[P, R]):
    """An op, called as the function that declares it."""

    def __init__(self, declared: Callable[P, R], implementation: str | Callable[..., Any]) -> None:
        name = declared.__name__
        hints = get_type_hints(declared, include_extras=True)
        returned = hints.pop("return")
        self.__doc__ = declared.__doc__
        self.__name__ = name
        self._parts = [_Part(argument, hint) for argument, hint in hints.items()]
        self._result: Any = returned if hasattr(returned, "_fields") else None
        count = len(returned._fields if self._result else get_args(returned))
        results = "()" if returned is type(None) else f"({', '.join(['Tensor'] * count)})" if count else "Tensor"
        arguments = ", ".join(entry for part in self._parts for entry in part.schema)
        define(f"{name}({arguments}) -> {results}", self._implemented(declared, _key), self._of(implementation))
        self.overload = getattr(torch.ops.sale_flex, name).default

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run the op."""
        assert not kwargs, "ops take positions"
        result = self.overload(*self.flat(*args))
        return result if self._result is None else self._result(*result)

    def flat(self, *args: Any) -> list[Any]:
        """The arguments as they cross the boundary."""
        flat: list[Any] = []
        for part, arg in zip(self._parts, args, strict=True):
            part.spread(arg, flat)
        return flat

    def _of(self, implementation: str | Callable[..., Any]) -> dict[str, Callable[..., Any]]:
        """Implementations by dispatch key."""
        if not isinstance(implementation, str):
            return {"CompositeExplicitAutograd": self._implemented(implementation, torch_mod)}
        name = self.__name__

        def kernel(*args: Any) -> Any:
            return getattr(import_module(f"sale_flex.kernels.{implementation}"), name)(*args)

        def fallback(*args: Any) -> Any:
            return getattr(import_module(f"sale_flex.ops.fallback.{implementation}"), name)(*args)

        on_device = self._implemented(kernel, _triton_mod)
        return {
            "CUDA": lambda *flat: on_device(*(_contiguous(arg) for arg in flat)),
            "CompositeExplicitAutograd": self._implemented(fallback, torch_mod),
        }

    def _implemented(self, function: Callable[..., Any], mod: Callable[[str, list[Tensor]], Any]) -> Callable[..., Any]:
        """`function` behind the boundary."""

        def call(*flat: Any) -> Any:
            values = iter(flat)
            result = function(*(part.gather(values, mod) for part in self._parts))
            return tuple(result) if isinstance(result, tuple) else result

        return call


def op(implementation: str | Callable[..., Any]) -> Callable[[Callable[P, R]], Op[P, R]]:
    """Declare an op by a function whose body makes empty results: their shapes and dtypes.

    Args:
        implementation: The module of kernels and of fallback whose function of the op's name implements it, or a
            function in plain torch for every device.
    """
    return lambda declared: Op(declared, implementation)


def define(schema: str, fake: Callable[..., Any], implementations: dict[str, Callable[..., Any]]) -> Any:
    """Define an op of the library by its schema."""
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))
    for key, implementation in implementations.items():
        _LIBRARY.impl(name, implementation, key)
    torch.library.register_fake(f"sale_flex::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.sale_flex, name).default


def _key(key: str, tensors: list[Tensor]) -> str:
    """A mod in a declaration, which asks no more than whether there is one."""
    return key


def _triton_mod(key: str, tensors: list[Tensor]) -> tuple[Any, Any]:
    return program(key).triton, program(key).arguments(tensors)


def torch_mod(key: str, tensors: Sequence[Tensor]) -> Callable[..., Tensor]:
    """A mod as the torch path takes it, by the key of its program and the tensors that it captures."""
    return partial(program(key).evaluate, tensors)


def _contiguous(arg: Any) -> Any:
    """A kernel's argument, contiguous but for queries, keys and values, whose strides kernels are told.

    The rest is read by its shape alone: an expanded threshold, or a row of zeros that stands for many, would be read
    beyond its end.
    """
    if isinstance(arg, Tensor) and not (arg.dim() == 4 and arg.is_floating_point()):
        return arg.contiguous()
    return arg
