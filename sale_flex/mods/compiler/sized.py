# SPDX-License-Identifier: BSD-3-Clause
"""A mod for compiled flex_attention on a CPU, whose captured tensors may have another size in every call.

Once a captured size has changed, torch makes a symbol of it, and Inductor's C++ template for flex_attention confuses
the names of such symbols (torch 2.13): it fails to compile, or not, as the names fall. So the mod is written anew from
its graph, with captured tensors laid out flat in buffers of few lengths, and their sizes among the values.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from sale_flex.mods.compiler.graph import ARGUMENTS, RESULTS, Graph, Node, Operand, Ref
from sale_flex.mods.compiler.programs import program
from sale_flex.mods.compiler.table import TABLE

_SHORTEST = 2**16
"""Elements of the shortest buffer; longer ones have powers of two."""

_MAKERS = 4096


@lru_cache(maxsize=_MAKERS)
def maker(key: str) -> Callable[[list[Tensor]], Callable[..., Tensor]]:
    """A function that makes a program's mod of what `mod_tables` returns."""
    # Without a __name__, by which Dynamo would look for these globals in a module.
    names: dict[str, Any] = {"torch": torch} | {f"op_{name}": op.torch for name, op in TABLE.items()}
    exec(compile(_source(program(key).graph), f"<mod {key}>", "exec"), names)
    make: Callable[[list[Tensor]], Callable[..., Tensor]] = names["make"]
    return make


@torch.library.custom_op("sale_flex::mod_tables", mutates_args=())
def mod_tables(key: str, tensors: list[Tensor]) -> list[Tensor]:
    """The tables of a program, each flat and followed by zeros, and int64 sizes of all of them."""
    tables = program(key).graph.make_tables(tensors)
    flat = [x.new_zeros(_length(x)) for x in tables]
    for buffer, table in zip(flat, tables):
        buffer[: table.numel()] = table.reshape(-1)
    return [*flat, torch.tensor([size for x in tables for size in x.shape], dtype=torch.int64)]


@mod_tables.register_fake
def _fake_tables(key: str, tensors: list[Tensor]) -> list[Tensor]:
    tables = program(key).graph.make_tables(tensors)
    sizes = torch.empty(sum(x.dim() for x in tables), dtype=torch.int64)
    return [*(x.new_empty(_length(x)) for x in tables), sizes]


def _length(table: Tensor) -> int:
    length = _SHORTEST
    while length < table.numel():
        length *= 2
    return length


def _source(graph: Graph) -> str:
    """Python source of ``make(tables)``, which returns the mod."""
    names = [*(f"table{i}" for i in range(len(graph.tables))), "sizes"]
    lines = [f"v{i} = {_line(graph, i, node)}" for i, node in enumerate(graph.nodes)]
    body = [*lines, f"return {_read(graph, graph.results[0], RESULTS[graph.kind])}"]
    unpacked = [f"    {', '.join(names)} = tables"] if graph.tables else []
    head = f"    def mod({', '.join(ARGUMENTS[graph.kind])}):"
    return "\n".join(["def make(tables):", *unpacked, head, *(f"        {x}" for x in body), "    return mod", ""])


def _line(graph: Graph, index: int, node: Node) -> str:
    if node.op == "argument":
        return f"{ARGUMENTS[graph.kind][index]}.to({node.dtype})"
    if node.op == "load":
        return _load(graph, node)
    first = torch.bool if node.op == "where" else node.computes
    operands = [_read(graph, x, node.computes if i else first) for i, x in enumerate(node.operands)]
    return f"op_{node.op}({', '.join(operands)}).to({node.dtype})"


def _read(graph: Graph, operand: Operand, dtype: torch.dtype) -> str:
    if not isinstance(operand, Ref):
        number = f'float("{operand}")' if isinstance(operand, float) else str(operand)
        return f"torch.full((), {number}, dtype={dtype})"
    name = f"v{operand.index}"
    return name if graph.nodes[operand.index].dtype == dtype else f"{name}.to({dtype})"


def _load(graph: Graph, node: Node) -> str:
    """An element of a flat table; an index out of bounds leads out of the table, where torch raises."""
    if not node.operands:
        return f"table{node.table}[0]"
    first = sum(rank for _, rank in graph.tables[: node.table])
    place = inside = ""
    for dim, operand in enumerate(node.operands):
        size = f"sizes[{first + dim}]"
        given = _read(graph, operand, torch.int64)
        index = f"torch.where({given} < 0, {given} + {size}, {given})"
        fits = f"({index} >= 0) & ({index} < {size})"
        inside = f"{inside} & {fits}" if dim else fits
        place = f"({place}) * {size} + {index}" if dim else index
    return f"table{node.table}[torch.where({inside}, {place}, table{node.table}.shape[0])]"
