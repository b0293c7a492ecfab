# SPDX-License-Identifier: BSD-3-Clause
"""The op table: what a mod may compute, in Triton, in torch, and how it depends on neighbouring keys.

An op's operands arrive in one dtype, the one torch computes the op in, and its result is then converted to the dtype
torch gives it (`graph.py` works both out). So entries need no promotion rules of their own.
"""

from collections.abc import Callable
from enum import IntEnum
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Course(IntEnum):
    """How a value behaves as kv_idx and the score move on: each level includes those before it."""

    CONSTANT = 0
    AFFINE = 1
    SMOOTH = 2
    ROUGH = 3


class Op(NamedTuple):
    """An op of the table.

    Attributes:
        text: Triton expression of ``{0}``, ``{1}``, ``{2}``.
        torch: The same on tensors that broadcast.
        course: What the op makes of operands that are not constant; AFFINE keeps their course.
        text64: Expression for float64 operands, where it differs.
        integer: Expression for integer operands, where it differs.
    """

    text: str
    torch: Callable[..., Tensor]
    course: Course = Course.SMOOTH
    text64: str | None = None
    integer: str | None = None


def _safe(divisor: Tensor) -> Tensor:
    """Integer division by zero is an error in torch on a CPU and undefined on a GPU: here it divides by one."""
    return torch.where(divisor == 0, torch.ones_like(divisor), divisor) if _is_integer(divisor) else divisor


def _is_integer(x: Tensor) -> bool:
    return not x.is_floating_point()


def _shift_left(x: Tensor, by: Tensor) -> Tensor:
    return torch.where(_fits(x, by), x << by.clamp(0, _bits(x) - 1), torch.zeros_like(x))


def _shift_right(x: Tensor, by: Tensor) -> Tensor:
    last = torch.full_like(by, _bits(x) - 1)
    return x >> torch.where(_fits(x, by), by, last)


def _fits(x: Tensor, by: Tensor) -> Tensor:
    return (by >= 0) & (by < _bits(x))


def _bits(x: Tensor) -> int:
    return torch.iinfo(x.dtype).bits


_NAN = "propagate_nan=tl.PropagateNan.ALL"

TABLE: dict[str, Op] = {
    "add": Op("{0} + {1}", torch.add, Course.AFFINE),
    "sub": Op("{0} - {1}", torch.sub, Course.AFFINE),
    "mul": Op("{0} * {1}", torch.mul),
    # The correctly rounded division: floor(q / 3) must not fall below the integer that torch gives.
    "div": Op("tl.div_rn({0}, {1})", torch.div, text64="{0} / {1}"),
    "floor_div": Op(
        "_floor_div({0}, {1})",
        lambda a, b: torch.floor_divide(a, _safe(b)),
        Course.ROUGH,
        integer="_floor_div_int({0}, {1})",
    ),
    "trunc_div": Op(
        "_trunc_div_int({0}, {1})", lambda a, b: torch.div(a, _safe(b), rounding_mode="trunc"), Course.ROUGH
    ),
    "remainder": Op(
        "_remainder({0}, {1})",
        lambda a, b: torch.remainder(a, _safe(b)),
        Course.ROUGH,
        integer="_remainder_int({0}, {1})",
    ),
    "fmod": Op("_fmod({0}, {1})", lambda a, b: torch.fmod(a, _safe(b)), Course.ROUGH, integer="_fmod_int({0}, {1})"),
    "eq": Op("{0} == {1}", torch.eq, Course.ROUGH),
    "ne": Op("{0} != {1}", torch.ne, Course.ROUGH),
    "lt": Op("{0} < {1}", torch.lt, Course.ROUGH),
    "le": Op("{0} <= {1}", torch.le, Course.ROUGH),
    "gt": Op("{0} > {1}", torch.gt, Course.ROUGH),
    "ge": Op("{0} >= {1}", torch.ge, Course.ROUGH),
    "and": Op("{0} & {1}", torch.bitwise_and, Course.ROUGH),
    "or": Op("{0} | {1}", torch.bitwise_or, Course.ROUGH),
    "xor": Op("{0} ^ {1}", torch.bitwise_xor, Course.ROUGH),
    "not": Op("~{0}", torch.bitwise_not, Course.ROUGH),
    "shift_left": Op("_shift_left({0}, {1})", _shift_left, Course.ROUGH),
    "shift_right": Op("_shift_right({0}, {1})", _shift_right, Course.ROUGH),
    "where": Op("tl.where({0}, {1}, {2})", torch.where),
    "minimum": Op(f"tl.minimum({{0}}, {{1}}, {_NAN})", torch.minimum, integer="tl.minimum({0}, {1})"),
    "maximum": Op(f"tl.maximum({{0}}, {{1}}, {_NAN})", torch.maximum, integer="tl.maximum({0}, {1})"),
    "abs": Op("tl.abs({0})", torch.abs),
    "neg": Op("-{0}", torch.neg, Course.AFFINE),
    "exp": Op("tl.exp({0})", torch.exp),
    "exp2": Op("tl.exp2({0})", torch.exp2),
    "log": Op("tl.log({0})", torch.log),
    "log2": Op("tl.log2({0})", torch.log2),
    "sqrt": Op("tl.sqrt_rn({0})", torch.sqrt, text64="tl.sqrt({0})"),
    "sin": Op("tl.sin({0})", torch.sin),
    "cos": Op("tl.cos({0})", torch.cos),
    "erf": Op("tl.erf({0})", torch.erf),
    "tanh": Op("_tanh({0})", torch.tanh, text64="_tanh_exact({0})"),
    "sigmoid": Op("1 / (1 + tl.exp(-{0}))", torch.sigmoid),
    "floor": Op("tl.floor({0})", torch.floor, Course.ROUGH),
    "ceil": Op("tl.ceil({0})", torch.ceil, Course.ROUGH),
    "round": Op("_round({0})", torch.round, Course.ROUGH),
    "trunc": Op("_trunc({0})", torch.trunc, Course.ROUGH),
    "sign": Op("_sign({0})", torch.sign, Course.ROUGH),
    "cast": Op("{0}", lambda x: x, Course.AFFINE),
}
"""Name -> op. Loads of captured tensors are no op of the table: `graph.Load`."""

HELPERS: dict[str, str] = {
    "_element": """\
def _element(index, size):
    # As in torch an index below zero counts from the end; then it is held inside the tensor, so that no mod reads
    # another's memory.
    index = index.to(tl.int64)
    index = tl.where(index < 0, index + size, index)
    return tl.maximum(tl.minimum(index, size - 1), 0)
""",
    "_trunc": """\
def _trunc(x):
    return tl.where(x < 0, tl.ceil(x), tl.floor(x))
""",
    "_round": """\
def _round(x):
    # Half to even; x - floor(x) is exact.
    low = tl.floor(x)
    rest = x - low
    odd = low != 2 * tl.floor(low * 0.5)
    return tl.where((rest > 0.5) | ((rest == 0.5) & odd), low + 1, low)
""",
    "_sign": """\
def _sign(x):
    return (x > 0).to(x.dtype) - (x < 0).to(x.dtype)
""",
    "_nonzero": """\
def _nonzero(x):
    return tl.where(x == 0, x + 1, x)
""",
    "_trunc_div_int": """\
def _trunc_div_int(x, y):
    return x // _nonzero(y)
""",
    "_fmod_int": """\
def _fmod_int(x, y):
    return x % _nonzero(y)
""",
    "_floor_div_int": """\
def _floor_div_int(x, y):
    # Triton rounds towards zero, torch down.
    y = _nonzero(y)
    rest = x % y
    return x // y - ((rest != 0) & ((rest < 0) != (y < 0))).to(x.dtype)
""",
    "_remainder_int": """\
def _remainder_int(x, y):
    y = _nonzero(y)
    rest = x % y
    return tl.where((rest != 0) & ((rest < 0) != (y < 0)), rest + y, rest)
""",
    "_fmod": """\
def _fmod(x, y):
    # In float64 the product is exact, and the quotient not rounded up to an integer, while that is below 2**29.
    wide_x = x.to(tl.float64)
    wide_y = y.to(tl.float64)
    rest = (wide_x - _trunc(wide_x / wide_y) * wide_y).to(x.dtype)
    return tl.where(tl.abs(y) == float("inf"), tl.where(tl.abs(x) < float("inf"), x, rest), rest)
""",
    "_remainder": """\
def _remainder(x, y):
    rest = _fmod(x, y)
    return tl.where((rest != 0) & ((rest < 0) != (y < 0)), rest + y, rest)
""",
    "_floor_div": """\
def _floor_div(x, y):
    # Torch's own steps, which agree with its remainder.
    rest = _fmod(x, y)
    quotient = (x - rest) / y
    quotient = tl.where((rest != 0) & ((rest < 0) != (y < 0)), quotient - 1, quotient)
    return tl.where(y == 0, x / y, _round(quotient))
""",
    "_shift_left": """\
def _shift_left(x, y):
    bits: tl.constexpr = x.dtype.primitive_bitwidth
    fits = (y >= 0) & (y < bits)
    return tl.where(fits, x << tl.where(fits, y, 0), 0)
""",
    "_shift_right": """\
def _shift_right(x, y):
    bits: tl.constexpr = x.dtype.primitive_bitwidth
    return x >> tl.where((y >= 0) & (y < bits), y, bits - 1)
""",
    "_tanh": """\
def _tanh(x):
    # The GPU's own instruction, one for the twenty of the other way: its relative error is below 2**-10.9 (PTX ISA,
    # tanh), a fortieth of a nat under a soft cap of 50. What is estimated from 4 bits has no use for more.
    approximate = tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x.to(tl.float32)], tl.float32, True, 1)
    return approximate.to(x.dtype)
""",
    "_tanh_exact": """\
def _tanh_exact(x):
    # Relative error below 1e-6 in float32: an odd polynomial (Cephes) where 1 - exp(-2|x|) would cancel. Nothing
    # overflows.
    size = tl.abs(x)
    power = tl.exp(-2 * size)
    large = (1 - power) / (1 + power)
    square = x * x
    series = (-5.70498872745e-3 * square + 2.06390887954e-2) * square - 5.37397155531e-2
    series = (series * square + 1.33314422036e-1) * square - 3.33332819422e-1
    small = x + x * square * series
    return tl.where(size < 0.625, small, tl.where(x < 0, -large, large))
""",
}
"""Name -> source of a function of the generated file. Those that it calls come with it."""


def apply(name: str, *operands: Any) -> Tensor:
    """The op `name` in torch. Booleans, which torch adds and compares but does not subtract, go as integers."""
    return TABLE[name].torch(*operands)
