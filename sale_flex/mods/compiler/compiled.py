# SPDX-License-Identifier: BSD-3-Clause
"""`describe` inside torch.compile(fullgraph=True).

A key is a constant of the compiled program, the captured tensors are its inputs. Dynamo runs a function that it is told
to assume constant as it stands, real functions and all; there the mod is walked and traced. Back in code that Dynamo
traces, the paths found there are followed: to the tensors, and to everything the key depends on, which Dynamo then
guards.

A function that was made inside the compiled region does not exist yet. Its code does, and so do stand-ins for what it
captures.

What a function's cells hold is asked of Dynamo itself, by a hook: reading ``__closure__`` in traced code works for some
functions only, and makes Dynamo forget that the cell is one when flex_attention calls the same function later.
"""

import functools
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._dynamo.comptime import comptime

from sale_flex.mods.compiler import programs
from sale_flex.mods.compiler.captures import Captured, Captures, Path
from sale_flex.mods.compiler.programs import Facts, register
from sale_flex.mods.compiler.recognise import Described, checked_rough, device_of
from sale_flex.mods.compiler.sized import maker, mod_tables
from sale_flex.mods.compiler.trace import trace


@torch.compiler.assume_constant_result
def conjunction(one: str, other: str) -> str:
    """`sale_flex.mods.compiler.conjunction` as Dynamo sees it: a constant."""
    return programs.conjunction(one, other)


@torch.compiler.assume_constant_result
def facts(key: str) -> Facts:
    """`sale_flex.mods.compiler.facts` as Dynamo sees it: a constant."""
    return programs.facts(key)


_STAND_IN = 64
"""Elements of a stand-in along each dimension: mods may index captured tensors by constants."""

_makers = types.ModuleType("makers")
"""Holds makers by name: unlike a dictionary, Dynamo looks into a module anew each time it is asked for a name."""


@torch.compiler.assume_constant_result
def _maker_name(key: str) -> str:
    name = key.replace("-", "_")
    setattr(_makers, name, maker(key))
    return name


def sized(mod: Callable[..., Any] | None, kind: str) -> Callable[..., Any] | None:
    """`sale_flex.mods.compiler.sized` as Dynamo traces it."""
    if mod is None:
        return None
    try:
        key, tensors, _ = describe(mod, kind)
    except NotImplementedError:
        return mod  # torch may follow it nevertheless
    if facts(key).unsupported is not None:
        captured: list[Tensor] = []
        _sketch(mod, captured, [])
        for x in captured:
            tuple([_fixed(size) for size in x.shape])  # no symbols: a program per size, as many as torch allows
        return mod
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return mod
    return getattr(_makers, _maker_name(key))(mod_tables(key, tensors) if tensors else [])


def describe(mod: Callable[..., Any], kind: str) -> Described:
    """`sale_flex.mods.compiler.describe` as Dynamo traces it."""
    tensors: list[Tensor] = []
    outside: list[Any] = []
    sketch = _sketch(mod, tensors, outside)
    rough = getattr(mod, "rough", None)
    plan = _plan(sketch, tuple(outside), kind, rough, None)
    if plan[0] == "sizes":
        sizes = tuple(tuple(_fixed(size) for size in x.shape) for x in tensors)
        plan = _plan(sketch, tuple(outside), kind, rough, sizes)
    state, key, paths, constants, functions, shapes = plan
    if state == "error":
        raise NotImplementedError(key)
    for path, value in constants:
        if _fixed(_follow(path, tensors, outside)) != value:
            raise RuntimeError("a captured constant changed while it was looked at")
    for path in functions:
        callable(_follow(path, tensors, outside))
    for path, shape in shapes:
        x = _follow(path, tensors, outside)
        for dim, size in enumerate(shape):
            if x.shape[dim] != size:
                raise RuntimeError("a captured tensor's size changed while it was looked at")
    return Described(key, [_follow(path, tensors, outside) for path in paths], None)


def _follow(path: Any, tensors: list[Tensor], outside: list[Any]) -> Any:
    """Go a path in code that Dynamo traces."""
    x: Any = None
    for step, name in path:
        if step == "tensor":
            x = tensors[name]
        elif step == "outside":
            x = outside[name]
        elif step == "module":
            x = sys.modules[name]
        elif step == "cell":
            x = _contents(x)[name]
        elif step == "global":
            x = x.__globals__[name]
        elif step == "default":
            x = x.__defaults__[name]
        elif step == "keyword":
            x = x.__kwdefaults__[name]
        elif step == "attr":
            x = getattr(x, name)
        else:
            x = x[name]
    return x


def _fixed(x: Any) -> Any:
    """A constant that Dynamo knows, and guards, though it may have made a symbol of the number.

    These are ways by which Dynamo settles on the value of a symbol, in every version from 2.11 to 2.15.
    """
    if isinstance(x, bool):
        return True if x else False  # noqa: SIM210
    if isinstance(x, int):
        return len(range(x)) if x >= 0 else -len(range(-x))
    if isinstance(x, float):
        return x.hex()
    return x


def _sketch(x: Any, tensors: list[Tensor], outside: list[Any]) -> Any:
    """What `_made` makes the same thing from: constants, places in `tensors` and places in `outside`."""
    if isinstance(x, Tensor):
        for place, known in enumerate(tensors):
            if known is x:
                return ("tensor", place)
        tensors.append(x)
        return ("new tensor", x.dtype, x.dim(), x.device)
    if x is None or isinstance(x, (str, torch.dtype, torch.device)):
        return ("constant", x)
    if isinstance(x, float):
        return ("float", _fixed(x))
    if isinstance(x, int):
        return ("constant", _fixed(x))
    if isinstance(x, (tuple, list)):
        return ("tuple" if isinstance(x, tuple) else "list", tuple([_sketch(item, tensors, outside) for item in x]))
    if isinstance(x, functools.partial):
        keywords = tuple([(name, _sketch(value, tensors, outside)) for name, value in x.keywords.items()])
        args = tuple([_sketch(item, tensors, outside) for item in x.args])
        return ("partial", _sketch(x.func, tensors, outside), args, keywords)
    module, defaults = _look(x)
    if module == "":
        raise NotImplementedError(defaults)
    if module is None:
        outside.append(x)
        return ("outside", len(outside) - 1)
    code = x.__code__
    cells = tuple([_sketch(value, tensors, outside) for value in _contents(x)])
    return ("inside", code, module, defaults, cells)


def _contents(function: Any) -> Any:
    """What the cells of a function's closure hold, in the order of its code's ``co_freevars``."""
    contents: Any = ()
    comptime(_read_cells)
    return contents


def _read_cells(context: Any) -> None:
    """Runs while Dynamo traces `_contents`: binds the function's arguments as a call would, and looks at its cells."""
    from torch._dynamo.variables import ConstantVariable, TupleVariable

    translator = context._i_will_not_complain_if_bc_breaks_InstructionTranslator()
    function = translator.symbolic_locals["function"].realize()
    code = function.get_code()
    names = code.co_varnames[code.co_argcount : code.co_argcount + code.co_kwonlyargcount]
    nothing = ConstantVariable.create(None)
    bound = function.bind_args(translator, [nothing] * code.co_argcount, dict.fromkeys(names, nothing))
    cells = [translator.output.side_effects.load_cell(bound[name]) for name in code.co_freevars]
    translator.symbolic_locals["contents"] = TupleVariable(cells)


_looks: list[tuple[str | None, Any]] = []


def _look(function: Any) -> tuple[str | None, Any]:
    """Module and defaults of a function that is made by the code that is traced.

    None, None for a function that exists, and "" and what is wrong for anything that no constant stands for.
    """
    comptime(_look_at_variable)
    look: tuple[str | None, Any] = _last_look()
    return look


def _look_at_variable(context: Any) -> None:
    """Runs while Dynamo traces `_look`, with what Dynamo knows of its argument."""
    variable = context.get_local("function")._i_will_not_complain_if_bc_breaks_VariableTracker()
    if type(variable).__name__ != "NestedUserFunctionVariable":
        try:
            variable.as_python_constant()
        except Exception:  # dynamo has several for what is no constant
            _looks.append(("", _opaque(variable.python_type_name())))
        else:
            _looks.append((None, None))
        return
    defaults = []
    for part in (variable.defaults, variable.kwdefaults):
        try:
            defaults.append(None if part is None else _sketched(part.as_python_constant()))
        except Exception:  # dynamo has several for what is no constant
            defaults.append(("error", "a function made inside torch.compile has a default that is no constant"))
    names = variable.get_globals()
    module = names.get("__name__", "")
    if vars(sys.modules.get(module, sys)) is not names:
        defaults.append(("error", "a function made inside torch.compile is in no module"))
    _looks.append((module, tuple(defaults)))


def _opaque(kind: str) -> str:
    return (
        f"a mod captures an object of type {kind}, which torch.compile cannot be told to watch. Capture the tensors "
        "and numbers that it needs, not the object."
    )


def _sketched(defaults: Any) -> Any:
    return tuple(defaults.items()) if isinstance(defaults, dict) else tuple(defaults)


@torch.compiler.assume_constant_result
def _last_look() -> Any:
    return _looks.pop()


class _Plan(NamedTuple):
    """What Dynamo's code does with a mod; all constants.

    Attributes:
        state: "done", "sizes" (call again with the sizes of the tensors) or "error" (the message is `key`).
        key: Of the program.
        tensors: Paths to the program's tensors.
        constants: Paths to constants, and what `_fixed` gives for them.
        functions: Paths to functions.
        shapes: Paths to tensors, and their sizes.
    """

    state: str
    key: str = ""
    tensors: tuple[Path, ...] = ()
    constants: tuple[tuple[Path, Any], ...] = ()
    functions: tuple[Path, ...] = ()
    shapes: tuple[tuple[Path, tuple[int, ...]], ...] = ()


@torch.compiler.assume_constant_result
def _plan(
    sketch: Any, outside: tuple[Any, ...], kind: str, rough: Any, sizes: Sequence[Sequence[int]] | None
) -> tuple[Any, ...]:
    """Trace a mod on behalf of code that Dynamo traces."""
    made = _Made(outside, sizes)
    try:
        mod = made.make(sketch)
        roots: list[tuple[Any, Path]] = [(x, (("tensor", i),)) for i, x in enumerate(made.tensors)]
        roots += [(x, (("outside", i),)) for i, x in enumerate(outside)]
        captures = Captures([*roots, (mod, ())], made.functions)
        if captures.opaque is not None:
            raise NotImplementedError(_opaque(captures.opaque))
        traced = trace(mod, kind, device_of([x.value for x in captures.tensors]))
        if traced.reads_sizes and made.tensors and sizes is None:
            return tuple(_Plan("sizes"))
        key = register(traced.graph, checked_rough(rough)).key
    except NotImplementedError as error:
        return tuple(_Plan("error", str(error)))
    except Exception as error:
        if made.tensors and sizes is None:
            return tuple(_Plan("sizes"))  # it may index what a stand-in does not have
        return tuple(_Plan("error", f"{type(error).__name__}: {error}"))
    return tuple(
        _Plan(
            "done",
            key,
            tuple(_path_to(tensor, captures.tensors) for tensor in traced.tensors),
            tuple((x.path, _fixed(x.value)) for x in captures.constants if _guards(x)),
            tuple(path for path in captures.functions if _starts_at_a_root(path)),
            tuple((x.path, tuple(x.value.shape)) for x in captures.tensors) if traced.reads_sizes else (),
        )
    )


def _guards(constant: Captured) -> bool:
    """Whether a captured constant has to be looked at: those of the sketch are settled already."""
    comparable = (bool, int, float, str, torch.dtype, torch.device)
    return _starts_at_a_root(constant.path) and isinstance(constant.value, comparable)


def _starts_at_a_root(path: Path) -> bool:
    return bool(path) and path[0][0] in ("outside", "module")


def _path_to(tensor: Tensor, captured: list[Captured]) -> Path:
    return next(x.path for x in captured if x.value is tensor)


class _Made:
    """Functions made from a sketch, with stand-ins for the tensors they capture."""

    def __init__(self, outside: tuple[Any, ...], sizes: Sequence[Sequence[int]] | None) -> None:
        self.outside = outside
        self.sizes = sizes
        self.tensors: list[Tensor] = []
        self.functions: list[types.FunctionType] = []

    def make(self, sketch: Any) -> Any:
        kind, *parts = sketch
        if kind == "new tensor":
            return self._tensor(*parts)
        if kind == "tensor":
            return self.tensors[parts[0]]
        if kind == "outside":
            return self.outside[parts[0]]
        if kind == "constant":
            return parts[0]
        if kind == "float":
            return float.fromhex(parts[0])
        if kind in ("tuple", "list"):
            items = [self.make(item) for item in parts[0]]
            return items if kind == "list" else tuple(items)
        if kind == "partial":
            function, args, keywords = parts
            return functools.partial(
                self.make(function), *map(self.make, args), **{name: self.make(value) for name, value in keywords}
            )
        return self._function(*parts)

    def _tensor(self, dtype: torch.dtype, rank: int, device: torch.device) -> Tensor:
        sizes = (_STAND_IN,) * rank if self.sizes is None else tuple(self.sizes[len(self.tensors)])
        # Nobody reads it: one element stands for all.
        self.tensors.append(torch.empty((), dtype=dtype, device=device).expand(sizes))
        return self.tensors[-1]

    def _function(self, code: types.CodeType, module: str, defaults: Any, cells: Sequence[Any]) -> types.FunctionType:
        for part in defaults:
            if part and part[0] == "error":
                raise NotImplementedError(
                    f"{part[1]}, which sale_flex cannot follow ({code.co_name}): make it outside."
                )
        positional, keywords = defaults
        closure = tuple(types.CellType(self.make(cell)) for cell in cells)
        function = types.FunctionType(code, vars(sys.modules[module]), code.co_name, positional, closure)
        function.__kwdefaults__ = None if keywords is None else dict(keywords)
        function.__module__ = module
        self.functions.append(function)
        return function
