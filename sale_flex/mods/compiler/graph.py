# SPDX-License-Identifier: BSD-3-Clause
"""A mod as a small graph: arguments, constants, loads from captured tensors, and ops of the table.

The graph is what programs are known by: it holds the dtypes and ranks of captured tensors but neither their values nor
their sizes, and equal graphs have equal `text`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from sale_flex.mods.compiler.table import TABLE, Course, apply

ARGUMENTS = {
    "score": ("score", "b", "h", "q", "kv"),
    "mask": ("b", "h", "q", "kv"),
    "range": ("b", "h", "first", "last"),
}
"""Kind of mod -> names of its arguments."""

RESULTS = {"score": torch.float32, "mask": torch.bool, "range": torch.int32}
"""Kind of mod -> dtype of its results."""

Number = bool | int | float


@dataclass(frozen=True)
class Ref:
    """The value of node `index`; the mod's arguments are the first nodes."""

    index: int


Operand = Ref | Number


@dataclass(frozen=True)
class Node:
    """One step.

    Attributes:
        op: "argument", "load", or the name of an op of the table.
        operands: Values or numbers. A load's are the indices of all dimensions of its table.
        computes: Dtype its operands are converted to (the second and third operand of "where").
        dtype: Dtype of its result.
        table: Which table a load reads.
    """

    op: str
    operands: tuple[Operand, ...]
    computes: torch.dtype
    dtype: torch.dtype
    table: int = -1


@dataclass(frozen=True)
class Slot:
    """Stands for table `index` among the arguments of a prologue step."""

    index: int


@dataclass(frozen=True)
class Step:
    """What is computed from captured tensors alone, by torch, before the kernel: one more table."""

    op: Any
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]


@dataclass
class Graph:
    """A mod, traced.

    Attributes:
        kind: "score", "mask" or "range".
        nodes: In an order in which every node follows its operands.
        results: One value or number, or two for "range".
        tables: (dtype, rank) of the captured tensors, and then of the prologue's results.
        prologue: Torch ops on tables, each making the next.
        unsupported: The first op that is not in the table; nodes are meaningless then.
    """

    kind: str
    nodes: list[Node] = field(default_factory=list)
    results: tuple[Operand, ...] = ()
    tables: list[tuple[torch.dtype, int]] = field(default_factory=list)
    prologue: list[Step] = field(default_factory=list)
    unsupported: str | None = None

    def text(self) -> str:
        """The graph in words, the same for the same graph in every process."""
        lines = [self.kind, *(f"table {dtype} {rank}" for dtype, rank in self.tables)]
        lines += [f"step {step.op} {step.args} {step.kwargs}" for step in self.prologue]
        lines += [f"{n.op} {n.table} {n.computes} {n.dtype} {n.operands}" for n in self.nodes]
        return "\n".join([*lines, f"results {self.results}", f"unsupported {self.unsupported}"])

    def course(self) -> Course:
        """How the results depend on kv_idx and score."""
        courses: list[Course] = []
        for node in self.nodes:
            courses.append(self._course(node, [self._operand_course(x, courses) for x in node.operands], len(courses)))
        return max(self._operand_course(x, courses) for x in self.results)

    @staticmethod
    def _operand_course(operand: Operand, courses: Sequence[Course]) -> Course:
        return courses[operand.index] if isinstance(operand, Ref) else Course.CONSTANT

    def _course(self, node: Node, operands: list[Course], index: int) -> Course:
        if node.op == "argument":
            return Course.AFFINE if ARGUMENTS[self.kind][index] in ("score", "kv") else Course.CONSTANT
        if max(operands, default=Course.CONSTANT) == Course.CONSTANT:
            return Course.CONSTANT
        highest = max(operands)
        if node.op == "load":
            return Course.ROUGH
        if node.op == "cast":
            was_float = isinstance(node.operands[0], Ref) and self.nodes[node.operands[0].index].dtype.is_floating_point
            loses = node.dtype == torch.bool or (was_float and not node.dtype.is_floating_point)
            return Course.ROUGH if loses else highest
        if (node.op == "mul" and Course.CONSTANT in operands) or (node.op == "div" and operands[1] == Course.CONSTANT):
            return highest
        if node.op == "where" and operands[0] == Course.CONSTANT:
            return highest
        if node.op == "where":
            return Course.ROUGH
        return max(highest, TABLE[node.op].course)

    def uses(self, argument: str) -> bool:
        """Whether the results depend on an argument."""
        index = ARGUMENTS[self.kind].index(argument)
        return any(Ref(index) in node.operands for node in self.nodes) or Ref(index) in self.results

    def make_tables(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The captured tensors and what the prologue makes of them."""
        tables = list(tensors)
        for step in self.prologue:
            fill = lambda x: tables[x.index] if isinstance(x, Slot) else x  # noqa: E731
            args, kwargs = pytree.tree_map(fill, (step.args, dict(step.kwargs)), is_leaf=lambda x: isinstance(x, Slot))
            tables.append(step.op(*args, **kwargs))
        return tables

    def evaluate(self, tensors: Sequence[Tensor], arguments: Sequence[Any]) -> tuple[Tensor, ...]:
        """The results in torch, for arguments that broadcast."""
        tables = self.make_tables(tensors)
        device = next((x.device for x in arguments if isinstance(x, Tensor)), torch.device("cpu"))
        values: list[Tensor] = []

        def as_tensor(operand: Operand, dtype: torch.dtype) -> Tensor:
            if isinstance(operand, Ref):
                return values[operand.index].to(dtype)
            return torch.full((), operand, dtype=dtype, device=device)

        for node in self.nodes:
            if node.op == "argument":
                values.append(torch.as_tensor(arguments[len(values)], device=device).to(node.dtype))
            elif node.op == "load":
                values.append(_load(tables[node.table], [as_tensor(x, torch.int64) for x in node.operands]))
            else:
                first = torch.bool if node.op == "where" else node.computes
                operands = [as_tensor(x, node.computes if i else first) for i, x in enumerate(node.operands)]
                values.append(apply(node.op, *operands).to(node.dtype))
        return tuple(as_tensor(x, RESULTS[self.kind]) for x in self.results)


def _load(table: Tensor, indices: list[Tensor]) -> Tensor:
    """Elements of `table`: negative indices count from the end, then all are held inside."""
    if not indices:
        return table
    inside = []
    for index, size in zip(indices, table.shape):
        inside.append(torch.where(index < 0, index + size, index).clamp(0, max(size - 1, 0)))
    return table[tuple(inside)]


def prune(graph: Graph, tensors: list[Tensor]) -> tuple[Graph, list[Tensor]]:
    """The graph, and the captured tensors, without what its results do not need. Arguments stay."""
    needed = {x.index for x in graph.results if isinstance(x, Ref)}
    for index in reversed(range(len(graph.nodes))):
        if index in needed:
            needed |= {x.index for x in graph.nodes[index].operands if isinstance(x, Ref)}
    used = {graph.nodes[index].table for index in needed} - {-1}
    captures = len(tensors)
    for index in reversed(range(len(graph.prologue))):
        if captures + index in used:
            step = graph.prologue[index]
            used |= {x.index for x in pytree.tree_leaves((step.args, dict(step.kwargs))) if isinstance(x, Slot)}
    needed |= {index for index, node in enumerate(graph.nodes) if node.op == "argument"}
    place = {old: new for new, old in enumerate(sorted(needed))}
    table_place = {old: new for new, old in enumerate(sorted(used))} | {-1: -1}

    def moved(x: Any) -> Any:
        if isinstance(x, Slot):
            return Slot(table_place[x.index])
        return Ref(place[x.index]) if isinstance(x, Ref) else x

    pruned = Graph(
        graph.kind,
        [
            Node(x.op, tuple(map(moved, x.operands)), x.computes, x.dtype, table_place[x.table])
            for i, x in enumerate(graph.nodes)
            if i in needed
        ],
        tuple(map(moved, graph.results)),
        [graph.tables[i] for i in sorted(used)],
        [
            Step(x.op, *pytree.tree_map(moved, (x.args, x.kwargs)))
            for i, x in enumerate(graph.prologue)
            if captures + i in used
        ],
        graph.unsupported,
    )
    return pruned, [x for i, x in enumerate(tensors) if i in used]


def conjoin(one: Graph, other: Graph) -> Graph:
    """The graph of a mask that shows what both masks show. Its captured tensors are those of one, then of the other."""
    unsupported = one.unsupported or other.unsupported
    if unsupported is not None:
        return Graph("mask", unsupported=unsupported)
    arguments = len(ARGUMENTS["mask"])
    joined = Graph("mask", list(one.nodes[:arguments]))
    captures = [len(x.tables) - len(x.prologue) for x in (one, other)]
    results: list[Operand] = []
    tables: list[list[tuple[torch.dtype, int]]] = [[], []]
    for place, graph in enumerate((one, other)):
        shift = len(joined.nodes) - arguments
        before = (
            captures[0] * place,
            captures[1 - place] * (1 - place) + len(one.prologue) * place + captures[0] * place,
        )
        own = captures[place]

        def moved(x: Any, shift: int = shift, before: tuple[int, int] = before, own: int = own) -> Any:
            if isinstance(x, Slot):
                return Slot(x.index + before[x.index >= own])
            return Ref(x.index + shift) if isinstance(x, Ref) and x.index >= arguments else x

        for node in graph.nodes[arguments:]:
            table = node.table if node.table < 0 else moved(Slot(node.table)).index
            joined.nodes.append(Node(node.op, tuple(map(moved, node.operands)), node.computes, node.dtype, table))
        joined.prologue += [Step(x.op, *pytree.tree_map(moved, (x.args, x.kwargs))) for x in graph.prologue]
        tables[0] += graph.tables[:own]
        tables[1] += graph.tables[own:]
        result = moved(graph.results[0])
        if isinstance(result, Ref) and joined.nodes[result.index].dtype != torch.bool:
            node = joined.nodes[result.index]
            joined.nodes.append(Node("cast", (result,), node.dtype, torch.bool))
            result = Ref(len(joined.nodes) - 1)
        results.append(result if isinstance(result, Ref) else bool(result))
    joined.tables = tables[0] + tables[1]
    joined.nodes.append(Node("and", tuple(results), torch.bool, torch.bool))
    joined.results = (Ref(len(joined.nodes) - 1),)
    return joined
