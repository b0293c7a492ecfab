# SPDX-License-Identifier: BSD-3-Clause
"""Torch's ops in terms of the table: for every aten op that a mod may use on scalars, what adds it to a graph."""

import math
from typing import Any

import torch
from torch import Tensor, fx

from sale_flex.mods.compiler.builder import Builder, Lowering, Unsupported, View, constant, dtype_of, name_of
from sale_flex.mods.compiler.graph import Number, Ref


def _argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def _plain(name: str, *, swapped: bool = False) -> Lowering:
    """An op that computes in its result's dtype, perhaps with torch's factor `alpha` on its second operand."""

    def lower(builder: Builder, node: fx.Node) -> Any:
        dtype = dtype_of(node)
        operands = [builder.operand(x) for x in node.args[:2]]
        if swapped:
            operands.reverse()
        # For rsub torch scales what it subtracts, the second operand here too.
        alpha = _argument(node, 2, "alpha", 1)
        if alpha != 1:
            # Torch rounds to 16 bits once, after the sum.
            wide = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
            operands[1] = builder.emit("mul", [operands[1], alpha], dtype, wide)
        return builder.emit(name, operands, dtype, dtype)

    return lower


def _modular(name: str) -> Lowering:
    """Remainders and divisions that round down."""

    def lower(builder: Builder, node: fx.Node) -> Any:
        if dtype_of(node) == torch.float64:
            raise Unsupported(f"{node.target} in float64")
        return _plain(name)(builder, node)

    return lower


def _unary(name: str) -> Lowering:
    """An op of one operand that computes in its result's dtype."""

    def lower(builder: Builder, node: fx.Node) -> Any:
        return builder.emit(name, [builder.operand(node.args[0])], dtype_of(node), dtype_of(node))

    return lower


def _value(x: Any) -> Any:
    return x.meta["val"] if isinstance(x, fx.Node) else x


def _compare(name: str) -> Lowering:
    def lower(builder: Builder, node: fx.Node) -> Any:
        left, right = (_value(x) for x in node.args[:2])
        computes = torch.result_type(left, right)
        return builder.emit(name, [builder.operand(x) for x in node.args[:2]], computes, torch.bool)

    return lower


def _logical(name: str) -> Lowering:
    def lower(builder: Builder, node: fx.Node) -> Any:
        operands = [builder.cast(builder.operand(x), torch.bool) for x in node.args]
        return builder.emit(name, operands, torch.bool, torch.bool)

    return lower


def _divide(builder: Builder, node: fx.Node) -> Any:
    mode, dtype = node.kwargs.get("rounding_mode"), dtype_of(node)
    if mode == "floor":
        return _modular("floor_div")(builder, node)
    if mode == "trunc" and not dtype.is_floating_point:
        return _plain("trunc_div")(builder, node)
    quotient = _plain("div")(builder, node)
    return quotient if mode is None else builder.emit("trunc", [quotient], dtype, dtype)


def _where(builder: Builder, node: fx.Node) -> Any:
    condition, one, other = (builder.operand(x) for x in node.args)
    if not isinstance(condition, Ref):
        return builder.cast(one if condition else other, dtype_of(node))
    return builder.emit("where", [builder.cast(condition, torch.bool), one, other], dtype_of(node), dtype_of(node))


def _clamp(builder: Builder, node: fx.Node) -> Any:
    value, dtype = builder.operand(node.args[0]), dtype_of(node)
    highest_only = name_of(node) == "aten.clamp_max"
    low = None if highest_only else _argument(node, 1, "min")
    high = _argument(node, 1, "max") if highest_only else _argument(node, 2, "max")
    for name, bound in (("maximum", low), ("minimum", high)):
        if bound is not None:
            value = builder.emit(name, [value, builder.operand(bound)], dtype, dtype)
    return builder.cast(value, dtype)


def _power(builder: Builder, node: fx.Node) -> Any:
    base, exponent = (builder.operand(x) for x in node.args[:2])
    dtype = dtype_of(node)
    if isinstance(exponent, Ref):
        if isinstance(base, Ref) or base <= 0 or not (dtype.is_floating_point or base == 2):
            raise Unsupported(f"{node.target} (a power whose exponent is no constant, of no positive constant)")
        if not dtype.is_floating_point:
            return builder.emit("shift_left", [1, exponent], dtype, dtype)
        if base != 2:
            exponent = builder.emit("mul", [exponent, math.log2(base)], dtype, dtype)
        return builder.emit("exp2", [exponent], dtype, dtype)
    if abs(exponent) == 0.5:
        root = builder.emit("sqrt", [base], dtype, dtype)
        return root if exponent > 0 else builder.emit("div", [1.0, root], dtype, dtype)
    if exponent != int(exponent) or abs(exponent) > 8 or (exponent < 0 and not dtype.is_floating_point):
        raise Unsupported(f"{node.target} (the exponent {exponent})")
    value = builder.cast(base, dtype) if exponent else constant(1, dtype)
    for _ in range(abs(int(exponent)) - 1):
        value = builder.emit("mul", [value, base], dtype, dtype)
    return builder.emit("div", [1.0, value], dtype, dtype) if exponent < 0 else value


def _reciprocal(builder: Builder, node: fx.Node) -> Any:
    return builder.emit("div", [1.0, builder.operand(node.args[0])], dtype_of(node), dtype_of(node))


def _rsqrt(builder: Builder, node: fx.Node) -> Any:
    return builder.emit("div", [1.0, _unary("sqrt")(builder, node)], dtype_of(node), dtype_of(node))


def _log10(builder: Builder, node: fx.Node) -> Any:
    return builder.emit("mul", [_unary("log2")(builder, node), math.log10(2)], dtype_of(node), dtype_of(node))


def _relu(builder: Builder, node: fx.Node) -> Any:
    return builder.emit("maximum", [builder.operand(node.args[0]), 0], dtype_of(node), dtype_of(node))


def _sign(builder: Builder, node: fx.Node) -> Any:
    return builder.operand(node.args[0]) if dtype_of(node) == torch.bool else _unary("sign")(builder, node)


def _rounded(name: str) -> Lowering:
    """floor and its kind, which leave integers as they are."""

    def lower(builder: Builder, node: fx.Node) -> Any:
        if _argument(node, 1, "decimals"):
            raise Unsupported(f"{node.target} (decimals)")
        return _unary(name)(builder, node) if dtype_of(node).is_floating_point else builder.operand(node.args[0])

    return lower


def _is_nan(builder: Builder, node: fx.Node) -> Any:
    value = builder.operand(node.args[0])
    dtype = builder.type_of(value)
    return builder.emit("ne", [value, value], dtype, torch.bool) if dtype.is_floating_point else False


def _is_inf(builder: Builder, node: fx.Node) -> Any:
    value = builder.operand(node.args[0])
    dtype = builder.type_of(value)
    if not dtype.is_floating_point:
        return False
    return builder.emit("eq", [builder.emit("abs", [value], dtype, dtype), math.inf], dtype, torch.bool)


def _cast(builder: Builder, node: fx.Node) -> Any:
    return builder.cast(builder.operand(node.args[0]), dtype_of(node))


def _filled(value: Number) -> Lowering:
    def lower(builder: Builder, node: fx.Node) -> Any:
        return constant(value, dtype_of(node))

    return lower


def _filled_with(position: int) -> Lowering:
    def lower(builder: Builder, node: fx.Node) -> Any:
        return builder.cast(builder.operand(node.args[position]), dtype_of(node))

    return lower


def _same(builder: Builder, node: fx.Node) -> Any:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return builder.values[source]


def _made_inside(builder: Builder, node: fx.Node) -> Any:
    """``torch.tensor(3.0)`` in the mod: a constant."""
    value = _same(builder, node)
    assert isinstance(value, Tensor)
    return constant(value.item(), value.dtype)


def _index(builder: Builder, node: fx.Node) -> Any:
    view = builder.view(node.args[0])
    if view is None:
        raise Unsupported(f"{node.target} of a tensor that is not captured")
    given = node.args[1]
    assert isinstance(given, (list, tuple))
    indices, free = list(view.indices), list(view.free)
    for dim, index in zip(view.free, given):
        if index is None:
            continue
        if not isinstance(index, fx.Node) or index.meta["val"].dim():
            raise Unsupported(f"{node.target} with an index of more than one element")
        if dtype_of(index) in (torch.bool, torch.uint8):
            raise Unsupported(f"{node.target} with a mask for an index")
        indices[dim] = builder.operand(index)
        free.remove(dim)
    return View(view.table, tuple(indices), tuple(free))


def _select(builder: Builder, node: fx.Node) -> Any:
    view = builder.view(node.args[0])
    dim, index = node.args[1:]
    if view is None or not isinstance(dim, int) or not isinstance(index, int):
        raise Unsupported(str(node.target))
    indices, chosen = list(view.indices), view.free[dim]
    indices[chosen] = index
    return View(view.table, tuple(indices), tuple(x for x in view.free if x != chosen))


def _permute(builder: Builder, node: fx.Node) -> Any:
    view = builder.view(node.args[0])
    if view is None:
        raise Unsupported(str(node.target))
    order = list(range(len(view.free)))
    dims: Any = node.args[1:]
    if name_of(node) == "aten.permute":
        order = [order[dim] for dim in dims[0]]
    elif order:
        one, other = dims or (0, -1)
        order[one], order[other] = order[other], order[one]
    return View(view.table, view.indices, tuple(view.free[i] for i in order))


LOWERINGS: dict[str, Lowering] = {
    "aten.add": _plain("add"),
    "aten.sub": _plain("sub"),
    "aten.rsub": _plain("sub", swapped=True),
    "aten.mul": _plain("mul"),
    "aten.div": _divide,
    "aten.floor_divide": _modular("floor_div"),
    "aten.pow": _power,
    "aten.reciprocal": _reciprocal,
    "aten.rsqrt": _rsqrt,
    "aten.log10": _log10,
    "aten.relu": _relu,
    "aten.sign": _sign,
    "aten.sgn": _sign,
    "aten.where": _where,
    "aten.clamp": _clamp,
    "aten.clamp_min": _clamp,
    "aten.clamp_max": _clamp,
    "aten.isnan": _is_nan,
    "aten.isinf": _is_inf,
    "aten.bitwise_and": _plain("and"),
    "aten.bitwise_or": _plain("or"),
    "aten.bitwise_xor": _plain("xor"),
    "aten.bitwise_not": _unary("not"),
    "aten.__lshift__": _plain("shift_left"),
    "aten.__rshift__": _plain("shift_right"),
    "aten.bitwise_left_shift": _plain("shift_left"),
    "aten.bitwise_right_shift": _plain("shift_right"),
    "aten._to_copy": _cast,
    "prims.convert_element_type": _cast,
    "aten.full": _filled_with(1),
    "aten.new_full": _filled_with(2),
    "aten.full_like": _filled_with(1),
    "aten.fill": _filled_with(1),
    "aten.scalar_tensor": _filled_with(0),
    "aten.zeros": _filled(0),
    "aten.ones": _filled(1),
    "aten.new_zeros": _filled(0),
    "aten.new_ones": _filled(1),
    "aten.zeros_like": _filled(0),
    "aten.ones_like": _filled(1),
    "aten.lift_fresh_copy": _made_inside,
    "aten.detach": _same,
    "aten.alias": _same,
    "aten.clone": _same,
    "aten.expand": _same,
    "aten.view": _same,
    "aten.index": _index,
    "aten.select": _select,
    "aten.permute": _permute,
    "aten.transpose": _permute,
    "aten.t": _permute,
    **{f"aten.logical_{name}": _logical(name) for name in ("and", "or", "xor", "not")},
    **{f"aten.{name}": _plain(name) for name in ("minimum", "maximum")},
    **{f"aten.{name}": _modular(name) for name in ("remainder", "fmod")},
    **{f"aten.{name}": _compare(name) for name in ("eq", "ne", "lt", "le", "gt", "ge")},
    **{f"aten.{name}": _rounded(name) for name in ("floor", "ceil", "round", "trunc")},
    **{
        f"aten.{name}": _unary(name)
        for name in ("abs", "neg", "exp", "exp2", "log", "log2", "sqrt", "sin", "cos", "erf", "tanh", "sigmoid")
    },
}
"""Name of a torch op -> what adds it to a graph."""

VIEWS = frozenset(
    f"aten.{name}" for name in ("index", "select", "permute", "transpose", "t", "detach", "alias", "clone")
)
"""The ops that a captured tensor of more than one element may pass through on the way to its elements."""
