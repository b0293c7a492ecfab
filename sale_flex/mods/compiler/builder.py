# SPDX-License-Identifier: BSD-3-Clause
"""Writes a mod's graph from torch's record of the ops that the mod ran."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from sale_flex.mods.compiler.graph import Graph, Node, Number, Operand, Ref, Slot, Step


class Unsupported(Exception):
    """An op that the table lacks; the text names it."""


@dataclass(frozen=True)
class View:
    """A table of which some dimensions are indexed.

    Attributes:
        table: Which one.
        indices: An index for each dimension of the table, None for those still free.
        free: The free dimensions in the order in which the view has them.
    """

    table: int
    indices: tuple[Operand | None, ...]
    free: tuple[int, ...]


Lowering = Callable[["Builder", fx.Node], Any]
"""Adds an op to the graph and returns its value."""


class Builder:
    """Walks torch's graph and writes the mod's.

    Attributes:
        graph: The mod's graph so far.
        tensors: Captured tensors, in the order of their first use.
        values: Of each node of torch's graph: an operand, a view, or a tensor that the mod made or captured.
    """

    def __init__(
        self, kind: str, traced: fx.GraphModule, lowerings: Mapping[str, Lowering], views: frozenset[str]
    ) -> None:
        self.graph = Graph(kind)
        self.tensors: list[Tensor] = []
        self.values: dict[fx.Node, Any] = {}
        self._traced = traced
        self._lowerings = lowerings
        self._views = views
        self._known: dict[Any, Ref] = {}

    def build(self) -> None:
        """Write the graph.

        Raises:
            Unsupported: The mod does something that the table lacks.
            ValueError: It returns the wrong thing.
        """
        self._number_captures()
        for node in self._traced.graph.nodes:
            if node.op == "placeholder":
                self.values[node] = self._add(Node("argument", (), dtype_of(node), dtype_of(node)))
            elif node.op == "get_attr":
                self.values[node] = self._constant(node)
            elif node.op == "call_function":
                self.values[node] = self._call(node)
            elif node.op == "output":
                self._finish(node.args[0])
            else:
                raise Unsupported(f"{node.op} {node.target}")

    def emit(
        self, op: str, operands: Sequence[Operand], computes: torch.dtype, dtype: torch.dtype, table: int = -1
    ) -> Ref:
        """Add a node, or find the one that is the same.

        Triton has no arithmetic on booleans, nor torch in 16 bits: both compute wider.
        """
        if computes in (torch.float16, torch.bfloat16):
            computes = torch.float32
        if computes == torch.bool and op not in ("and", "or", "xor", "not", "where", "cast"):
            computes = torch.int32
        # Numbers wrap as torch wraps them where they do not fit.
        held = tuple(x if isinstance(x, Ref) else constant(x, computes) for x in operands)
        node = Node(op, held, computes, dtype, table)
        # 1, 1.0 and True are equal, as are 0.0 and -0.0.
        marker = (op, tuple((type(x), repr(x)) for x in held), computes, dtype, table)
        if marker not in self._known:
            self._known[marker] = self._add(node)
        return self._known[marker]

    def cast(self, operand: Operand, dtype: torch.dtype) -> Operand:
        """The operand in another dtype."""
        if not isinstance(operand, Ref):
            return constant(operand, dtype)
        has = self.type_of(operand)
        return operand if has == dtype else self.emit("cast", [operand], has, dtype)

    def type_of(self, operand: Operand) -> torch.dtype:
        """The operand's dtype; torch's default for a number."""
        if isinstance(operand, Ref):
            return self.graph.nodes[operand.index].dtype
        return torch.bool if isinstance(operand, bool) else torch.float32 if isinstance(operand, float) else torch.int64

    def view(self, x: Any) -> View | None:
        """A captured tensor, or what is left of it; None for anything else."""
        value = self.values.get(x) if isinstance(x, fx.Node) else None
        if not isinstance(value, Tensor):
            return value if isinstance(value, View) else None
        table = next((i for i, known in enumerate(self.tensors) if known is value), None)
        return None if table is None else whole(table, value.dim())

    def operand(self, x: Any) -> Operand:
        """An argument of a node of torch's graph; what is a captured scalar is loaded."""
        if isinstance(x, (bool, int, float)):
            return x
        if not isinstance(x, fx.Node):
            raise Unsupported(f"an argument of type {type(x).__name__}")
        view = self.view(x)
        if view is not None:
            if view.free:
                raise Unsupported("arithmetic on part of a captured tensor")
            indices = [index for index in view.indices if index is not None]
            return self.emit("load", indices, torch.int64, dtype_of(x), view.table)
        value = self.values[x]
        if not isinstance(value, (Ref, bool, int, float)):
            raise Unsupported("a tensor of several numbers made inside the mod (make it outside)")
        return value

    def _add(self, node: Node) -> Ref:
        self.graph.nodes.append(node)
        return Ref(len(self.graph.nodes) - 1)

    def _number_captures(self) -> None:
        for node in self._traced.graph.nodes:
            made_inside = all(name_of(user).startswith("aten.lift_fresh") for user in node.users)
            if node.op == "get_attr" and not made_inside:
                value = self._constant(node)
                if not any(value is known for known in self.tensors):
                    self.tensors.append(value)
                    self.graph.tables.append((value.dtype, value.dim()))

    def _constant(self, node: fx.Node) -> Tensor:
        value: Any = self._traced
        for part in str(node.target).split("."):
            value = getattr(value, part)
        if not isinstance(value, Tensor):
            raise Unsupported(f"a captured {type(value).__name__}")
        return value

    def _call(self, node: fx.Node) -> Any:
        name = name_of(node)
        lower = self._lowerings.get(name)
        if not isinstance(node.meta.get("val"), Tensor):
            raise Unsupported(str(node.target))
        if all(x.meta["val"].dim() == 0 for x in [node, *node.all_input_nodes]):
            if lower is None:
                raise Unsupported(str(node.target))
            return lower(self, node)
        if lower is not None and name in self._views:
            try:
                return lower(self, node)
            except Unsupported:
                pass
        return self._step(node)

    def _step(self, node: fx.Node) -> View:
        """What is made of captured tensors alone, whatever the op is, torch makes before the kernel runs."""
        op = node.target
        if name_of(node).startswith("aten.lift_fresh"):
            raise Unsupported("a tensor of several numbers made inside the mod (make it outside)")
        pure = isinstance(op, torch._ops.OpOverload) and not op._schema.is_mutable
        if not pure or not node.all_input_nodes or torch.Tag.nondeterministic_seeded in op.tags:  # type: ignore[union-attr]
            raise Unsupported(str(op))
        slots: dict[fx.Node, Slot] = {}
        for source in node.all_input_nodes:
            view = self.view(source)
            if view is None or view != whole(view.table, len(view.indices)):
                raise Unsupported(str(op))
            slots[source] = Slot(view.table)
        args = pytree.tree_map(lambda x: slots.get(x, x) if isinstance(x, fx.Node) else x, list(node.args))
        kwargs = [(name, node.kwargs[name]) for name in sorted(node.kwargs)]
        if any(isinstance(x, fx.Node) for x in pytree.tree_leaves(kwargs)):
            raise Unsupported(str(op))
        self.graph.prologue.append(Step(op, tuple(args), tuple(kwargs)))
        self.graph.tables.append((dtype_of(node), node.meta["val"].dim()))
        return whole(len(self.graph.tables) - 1, node.meta["val"].dim())

    def _finish(self, output: Any) -> None:
        kind = self.graph.kind
        outputs = list(output) if isinstance(output, (tuple, list)) else [output]
        wanted = 2 if kind == "range" else 1
        if len(outputs) != wanted:
            raise ValueError(f"a {kind} mod must return {wanted} value(s), but it returned {len(outputs)}.")
        for x in outputs:
            scalar = isinstance(x, fx.Node) and x.meta["val"].dim() == 0
            if not scalar and not isinstance(x, (bool, int, float)):
                raise ValueError(f"a {kind} mod must return 0-d tensors or numbers, but it returned {x!r}.")
        results = tuple(self.operand(x) for x in outputs)
        if kind == "range" and any(self.type_of(x).is_floating_point for x in results):
            raise ValueError("a range mod must return integers, but it returned floating-point numbers.")
        self.graph.results = results


def whole(table: int, rank: int) -> View:
    """All of a table."""
    return View(table, (None,) * rank, tuple(range(rank)))


def constant(value: Number, dtype: torch.dtype) -> Number:
    """A number as `dtype` holds it."""
    if dtype == torch.bool:
        return bool(value)
    return torch.tensor(value, device="cpu").to(dtype).item()


def dtype_of(node: fx.Node) -> torch.dtype:
    """Dtype of a node of torch's graph."""
    dtype: torch.dtype = node.meta["val"].dtype
    return dtype


def name_of(node: fx.Node) -> str:
    """Name of the op of a node of torch's graph, without its overload: ``aten.add``."""
    name = str(node.target)
    return name.rpartition(".")[0] if name.count(".") > 1 else name
