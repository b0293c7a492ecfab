# SPDX-License-Identifier: BSD-3-Clause
"""Triton source of a graph."""

import math
import re
from collections.abc import Sequence

import torch

from sale_flex.mods.compiler.graph import ARGUMENTS, RESULTS, Graph, Node, Number, Operand, Ref
from sale_flex.mods.compiler.table import HELPERS, TABLE

TYPES = {
    torch.bool: "tl.int1",
    torch.int8: "tl.int8",
    torch.uint8: "tl.uint8",
    torch.int16: "tl.int16",
    torch.int32: "tl.int32",
    torch.int64: "tl.int64",
    torch.float16: "tl.float16",
    torch.bfloat16: "tl.bfloat16",
    torch.float32: "tl.float32",
    torch.float64: "tl.float64",
}
"""Dtype -> its name in Triton. There are no others in a supported graph."""

_COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge")

FUNCTION = "mod"
"""Name of the function of a generated file."""


def emit(graph: Graph, interpreted: bool = False) -> str:
    """A Python file with the graph as ``mod(<arguments>, AUX)``.

    Args:
        graph: A supported graph.
        interpreted: Whether it is for Triton's interpreter, which knows no instruction of a GPU.

    ``AUX`` is a flat tuple: of each table its pointer and then its sizes. Values keep the shapes of the arguments they
    come from, so that what depends on one of them alone is computed, and loaded, once a row or a column.
    """
    names = ARGUMENTS[graph.kind]
    values = _Values(graph)
    lines = [f"    {values.add(node)}" for node in graph.nodes]
    results = ", ".join(values.read(x, RESULTS[graph.kind]) for x in graph.results)
    body = [f"def {FUNCTION}({', '.join(names)}, AUX):", *lines, f"    return {results}", ""]
    functions = [*_helpers("\n".join(lines)), "\n".join(body)]
    if interpreted:
        exact = HELPERS["_tanh_exact"].replace("_tanh_exact", "_tanh")
        functions = [exact if x is HELPERS["_tanh"] else x for x in functions]
    return "\n\n".join(["import triton\nimport triton.language as tl\n", *("@triton.jit\n" + x for x in functions)])


def _helpers(text: str) -> list[str]:
    """The helper functions that `text` calls, callees first."""
    found: dict[str, None] = {}

    def visit(source: str) -> None:
        for name in re.findall(r"\b(_[a-z_]+)\(", source):
            if name in HELPERS and name not in found:
                visit(HELPERS[name].partition(":")[2])
                found[name] = None

    visit(text)
    return [HELPERS[name] for name in found]


class _Values:
    """Names of the values so far."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.pointers: list[int] = []
        place = 0
        for _, rank in graph.tables:
            self.pointers.append(place)
            place += 1 + rank

    def add(self, node: Node) -> str:
        """The line that computes a node; lines come in order."""
        index = next(i for i, x in enumerate(self.graph.nodes) if x is node)
        if node.op == "argument":
            argument = ARGUMENTS[self.graph.kind][index]
            return f"v{index} = tl.cast({argument}, {TYPES[node.dtype]})"
        return f"v{index} = {self._load(node) if node.op == 'load' else self._op(node)}"

    def read(self, operand: Operand, dtype: torch.dtype) -> str:
        """An operand in a dtype."""
        if not isinstance(operand, Ref):
            return f"tl.full([], {literal(operand, dtype)}, {TYPES[dtype]})"
        name = f"v{operand.index}"
        return name if self.graph.nodes[operand.index].dtype == dtype else f"{name}.to({TYPES[dtype]})"

    def _load(self, node: Node) -> str:
        pointer = self.pointers[node.table]
        offset = ""
        for place, operand in enumerate(node.operands, pointer + 1):
            element = f"_element({self.read(operand, torch.int64)}, AUX[{place}])"
            offset = f"({offset}) * AUX[{place}] + {element}" if offset else element
        return f"tl.load(AUX[{pointer}] + {offset})" if offset else f"tl.load(AUX[{pointer}])"

    def _op(self, node: Node) -> str:
        first = torch.bool if node.op == "where" else node.computes
        operands = [self.read(x, node.computes if i else first) for i, x in enumerate(node.operands)]
        op = TABLE[node.op]
        text = op.text
        if not node.computes.is_floating_point and op.integer:
            text = _by_power_of_two(node) or op.integer
        elif node.computes == torch.float64 and op.text64:
            text = op.text64
        elif node.op == "div":
            text = _by_power_of_two(node) or self._by_reciprocal(node) or text
        text = text.format(*operands)
        result = node.computes
        if node.op in _COMPARISONS:
            result = torch.bool
            if node.computes.is_floating_point:
                # Triton's interpreter takes a comparison of scalars for a float.
                text = f"tl.where({text}, 1, 0) != 0"
        return text if result == node.dtype else f"({text}).to({TYPES[node.dtype]})"

    def _by_reciprocal(self, node: Node) -> str | None:
        """Division by a constant as a product, an ulp off, where only functions follow that do not mind."""
        divisor = node.operands[-1]
        if isinstance(divisor, (Ref, bool)) or not 1e-30 < abs(divisor) < 1e30:
            return None
        me = next(i for i, x in enumerate(self.graph.nodes) if x is node)
        if any(isinstance(x, Ref) and x.index == me for x in self.graph.results):
            return None
        users = {x.op for x in self.graph.nodes for y in x.operands if isinstance(y, Ref) and y.index == me}
        return f"{{0}} * {1 / divisor!r}" if users and users <= {"tanh", "sigmoid", "exp", "exp2"} else None


def _by_power_of_two(node: Node) -> str | None:
    """Division by such a constant without dividing."""
    divisor = node.operands[-1]
    if isinstance(divisor, (Ref, bool)) or divisor <= 0 or not math.isfinite(divisor):
        return None
    mantissa, exponent = math.frexp(divisor)
    if mantissa != 0.5:
        return None
    if node.op == "div":
        return f"{{0}} * {1 / divisor!r}" if abs(exponent) < 100 else None
    if exponent < 1 or exponent > torch.iinfo(node.computes).bits - 1:
        return None
    return {"floor_div": f"{{0}} >> {exponent - 1}", "remainder": f"{{0}} & {int(divisor) - 1}"}.get(node.op)


def literal(value: Number, dtype: torch.dtype) -> str:
    """A number as Triton source."""
    if dtype == torch.bool:
        return str(int(bool(value)))
    if not dtype.is_floating_point:
        return repr(int(value))
    value = float(value)
    return repr(value) if math.isfinite(value) else f'float("{value}")'


def check(graph: Graph) -> str | None:
    """The first dtype that has no name in Triton."""
    dtypes: Sequence[torch.dtype] = [
        *(x for n in graph.nodes for x in (n.dtype, n.computes)),
        *(x for x, _ in graph.tables),
    ]
    return next((f"dtype {x}" for x in dtypes if x not in TYPES), None)
