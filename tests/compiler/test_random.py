# SPDX-License-Identifier: BSD-3-Clause
"""Random mods are torch's.

A mod is a tree of ops that runs twice: in torch, and on float64 intervals that bound what the roundings
of float32 may do. Integers and booleans never come from floats, so that they are exact.
"""

from typing import Any, NamedTuple

import torch
from compiler_harness import DEVICE, EPS, MARKS, TANH, in_graph, in_torch, in_triton, scores
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

pytestmark = MARKS


class Bounded(NamedTuple):
    """A float64 value and how far from it float32 arithmetic may be."""

    value: Tensor
    error: Tensor

    @staticmethod
    def of(x: Any) -> "Bounded":
        if isinstance(x, Bounded):
            return x
        value = torch.as_tensor(x, dtype=torch.float64)
        return Bounded(value, EPS * value.abs())

    @staticmethod
    def rounded(value: Tensor, error: Tensor, units: float = 1.0) -> "Bounded":
        return Bounded(value, error + units * EPS * (value.abs() + error))


def sums(x: Any, y: Any, sign: int = 1) -> Bounded:
    x, y = Bounded.of(x), Bounded.of(y)
    return Bounded.rounded(x.value + sign * y.value, x.error + y.error)


def product(x: Any, y: Any) -> Bounded:
    x, y = Bounded.of(x), Bounded.of(y)
    error = x.value.abs() * y.error + y.value.abs() * x.error + x.error * y.error
    return Bounded.rounded(x.value * y.value, error)


def extreme(x: Any, y: Any, pick: Any) -> Bounded:
    x, y = Bounded.of(x), Bounded.of(y)
    return Bounded(pick(x.value, y.value), torch.maximum(*torch.broadcast_tensors(x.error, y.error)))


def growing(x: Any, function: Any, units: float) -> Bounded:
    """A function that grows everywhere, at the ends of the interval."""
    x = Bounded.of(x)
    value, low, high = (function(v) for v in (x.value, x.value - x.error, x.value + x.error))
    return Bounded.rounded(value, torch.maximum(high - value, value - low), units)


def chosen(condition: Tensor, x: Any, y: Any) -> Bounded:
    x, y = Bounded.of(x), Bounded.of(y)
    return Bounded(torch.where(condition, x.value, y.value), torch.where(condition, x.error, y.error))


def quotient(x: Any, y: Any) -> Bounded:
    """For a divisor that is exact but for its conversion."""
    x, y = Bounded.of(x), Bounded.of(y)
    return Bounded.rounded(x.value / y.value, (x.error + (x.value / y.value).abs() * y.error) / y.value.abs(), 2.0)


FLOAT_OPS: dict[str, tuple[str, Any, Any]] = {
    "add": ("ff", torch.add, sums),
    "sub": ("ff", torch.sub, lambda x, y: sums(x, y, -1)),
    "mul": ("ff", torch.mul, product),
    "int times": ("if", lambda x, y: x * y, product),
    "plus int": ("fi", lambda x, y: x + y, sums),
    "float": ("i", lambda x: x.to(torch.float32), Bounded.of),
    "ratio": ("ii", lambda x, y: x / (y.abs() + 1), lambda x, y: quotient(x, y.abs() + 1)),
    "over 3": ("f", lambda x: x / 3, lambda x: quotient(x, 3.0)),
    "tanh": ("f", torch.tanh, lambda x: growing(x, torch.tanh, TANH / EPS)),
    "sigmoid": ("f", torch.sigmoid, lambda x: growing(x, torch.sigmoid, 10.0)),
    "exp": (
        "f",
        lambda x: torch.exp(torch.clamp(x, -5.0, 5.0)),
        lambda x: growing(growing(x, lambda v: v.clamp(-5.0, 5.0), 0.0), torch.exp, 10.0),
    ),
    "abs": ("f", torch.abs, lambda x: Bounded(Bounded.of(x).value.abs(), Bounded.of(x).error)),
    "neg": ("f", lambda x: -x, lambda x: product(x, -1.0)),
    "min": ("ff", torch.minimum, lambda x, y: extreme(x, y, torch.minimum)),
    "max": ("ff", torch.maximum, lambda x, y: extreme(x, y, torch.maximum)),
    "where": ("bff", torch.where, chosen),
    "mask": ("bf", lambda c, x: x * c, product),
}

INT_OPS: dict[str, tuple[str, Any]] = {
    "add": ("ii", lambda x, y: x + y),
    "sub": ("ii", lambda x, y: x - y),
    "mul": ("ii", lambda x, y: (x % 97) * (y % 89)),
    "floor div": ("ii", lambda x, y: x // (y % 11 + 1)),
    "floor div 3": ("i", lambda x: x // 3),
    "floor div -8": ("i", lambda x: x // -8),
    "remainder": ("ii", lambda x, y: x % (y % 7 - 8)),
    "remainder 16": ("i", lambda x: x % 16),
    "fmod": ("ii", lambda x, y: torch.fmod(x, y % 5 + 1)),
    "trunc div": ("i", lambda x: torch.div(x, 5, rounding_mode="trunc")),
    "abs": ("i", torch.abs),
    "neg": ("i", lambda x: -x),
    "clamp": ("i", lambda x: x.clamp(-6, 9)),
    "min": ("ii", torch.minimum),
    "max": ("ii", torch.maximum),
    "where": ("bii", torch.where),
    "and": ("ii", lambda x, y: x & y),
    "xor": ("ii", lambda x, y: x ^ y),
    "left": ("i", lambda x: (x % 1000) << 4),
    "right": ("i", lambda x: x >> 2),
    "sign": ("i", torch.sign),
    "count": ("bb", lambda x, y: x.int() + y),
    "to int64": ("i", lambda x: x.long()),
}

BOOL_OPS: dict[str, tuple[str, Any]] = {
    "lt": ("ii", lambda x, y: x < y),
    "ge": ("ii", lambda x, y: x >= y),
    "eq": ("ii", lambda x, y: x == y),
    "ne": ("ii", lambda x, y: x != y),
    "and": ("bb", lambda x, y: x & y),
    "or": ("bb", torch.logical_or),
    "xor": ("bb", lambda x, y: x ^ y),
    "not": ("b", lambda x: ~x),
    "plus": ("bb", lambda x, y: x + y),
    "bool": ("i", lambda x: x.bool()),
}

LEAVES = {
    "i": ["b", "h", "q", "kv", -3, 2, 5, 40],
    "f": ["score", 0.25, -1.5, 3.0],
    "b": [("lt", "kv", "q"), ("eq", "h", 1)],
}
# No narrower integers: vmap promotes a scalar that it does not map over as torch does one of no dimensions, and then
# -3 becomes 253 beside uint8; where all are scalars, as in a compiled mod, it does not.
LOADS = {"i": (torch.int64, torch.int32), "f": (torch.float32,), "b": (torch.bool,)}


class Load(NamedTuple):
    """Captured tensor number `table` at some integers."""

    table: int
    indices: tuple[Any, ...]


@st.composite
def trees(draw: Any, kind: str, depth: int, tables: list[Tensor]) -> Any:
    """A tree of ops whose value is an integer, a float or a boolean; the tables that it loads from are appended."""
    ops: Any = {"i": INT_OPS, "f": FLOAT_OPS, "b": BOOL_OPS}[kind]
    choice = draw(st.integers(0, 9)) if depth else 0
    if choice <= 1:
        return draw(st.sampled_from(LEAVES[kind]))
    if choice <= 3:
        rank = draw(st.integers(0, 3))
        indices = tuple(draw(trees("i", depth - 1, tables)) for _ in range(rank))
        sizes = [draw(st.integers(1, 6)) for _ in range(rank)]
        generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
        values = torch.randint(0 if kind == "b" else -4, 2 if kind == "b" else 5, sizes, generator=generator)
        tables.append(values.abs().to(draw(st.sampled_from(LOADS[kind]))).to(DEVICE))
        return Load(len(tables) - 1, indices)
    name = draw(st.sampled_from(sorted(ops)))
    return (kind + " " + name, *(draw(trees(operand, depth - 1, tables)) for operand in ops[name][0]))


def run(tree: Any, names: dict[str, Any], tables: list[Tensor], bounding: bool) -> Any:
    """The value of a tree, or bounds for it."""
    if isinstance(tree, str):
        return names[tree]
    if isinstance(tree, Load):
        table = tables[tree.table]
        # Half of the indices are counted from the end.
        indices = [run(index, names, tables, bounding) for index in tree.indices]
        places = tuple(as_index(i, names) % (2 * size) - size for i, size in zip(indices, table.shape))
        return table[places] if places else table
    if not isinstance(tree, tuple):
        return tree
    name, *operands = tree
    if name in BOOL_OPS:
        name = "b " + name
    kind, _, op = name.partition(" ")
    values = [run(x, names, tables, bounding) for x in operands]
    signature, *functions = {"i": INT_OPS, "f": FLOAT_OPS, "b": BOOL_OPS}[kind][op]
    if bounding and kind == "f":
        return functions[-1](*(as_bound(v, names) if s != "b" else v for s, v in zip(signature, values)))
    like = {"f": names["score"], "i": names["q"]}
    return functions[0](*(v if isinstance(v, Tensor) else like[s].new_tensor(v) for s, v in zip(signature, values)))


def as_index(x: Any, names: dict[str, Any]) -> Tensor:
    x = x if isinstance(x, Tensor) else names["q"].new_tensor(x)
    return x if x.dtype in (torch.int32, torch.int64) else x.int()


def as_bound(x: Any, names: dict[str, Any]) -> Any:
    return x if isinstance(x, (Bounded, Tensor)) else names["q"].new_tensor(x, dtype=torch.float64)


def check_random_mod(data: Any, kind: str) -> None:
    tables: list[Tensor] = []
    tree = data.draw(trees("f" if kind == "score" else "b", data.draw(st.integers(1, 4)), tables))
    b, h = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 3))
    score = scores(data.draw(st.integers(1, 20)), data.draw(st.integers(1, 20)))

    def mod(*args: Tensor) -> Any:
        names = dict(zip(("score", "b", "h", "q", "kv")[-len(args) :], args))
        return run(tree, {"score": score, **names}, tables, bounding=False)

    expected = in_torch(mod, kind, score, b, h)
    got = in_graph(mod, kind, score, b, h), in_triton(mod, kind, score, b, h)
    if kind == "mask":
        assert torch.equal(got[0], expected)
        assert torch.equal(got[1], expected)
        return
    q, kv = (torch.arange(size, dtype=torch.int32, device=DEVICE) for size in score.shape)
    scalars = {name: torch.tensor(x, dtype=torch.int32, device=DEVICE) for name, x in (("b", b), ("h", h))}
    bound = Bounded.of(run(tree, {"score": score, "q": q[:, None], "kv": kv, **scalars}, tables, bounding=True))
    # Both results are within the error of the exact one.
    for result in (expected, *got):
        assert ((result.double() - bound.value).abs() <= bound.error + 1e-30).all()


@given(st.data())
def test_random_masks_are_torchs(data):
    check_random_mod(data, "mask")


@given(st.data())
def test_random_scores_are_torchs(data):
    check_random_mod(data, "score")
