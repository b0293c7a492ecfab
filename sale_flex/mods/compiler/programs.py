# SPDX-License-Identifier: BSD-3-Clause
"""The process's registry of mods: key to program."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sale_flex.mods.compiler import cache, emit
from sale_flex.mods.compiler.graph import Graph, conjoin
from sale_flex.mods.compiler.table import Course

_programs: dict[str, "Program"] = {}


class Facts(NamedTuple):
    """What callers branch on, all of it static: see `Program`."""

    kind: str
    uses_batch: bool
    uses_head: bool
    rough: bool
    unsupported: str | None


@dataclass(frozen=True)
class Program:
    """A mod as a graph, for torch and for Triton.

    Attributes:
        key: Its name in this process and every other: a hash of the graph.
        graph: The graph.
        rough: Whether a score mod's value jumps about between neighbouring kv_idx, so that one key cannot stand for a
            run of them.
    """

    key: str
    graph: Graph
    rough: bool

    @property
    def kind(self) -> str:
        """Which arguments it takes: "score", "mask" or "range"."""
        return self.graph.kind

    @cached_property
    def uses_batch(self) -> bool:
        """Whether the result depends on b."""
        return self.graph.uses("b")

    @cached_property
    def uses_head(self) -> bool:
        """Whether the result depends on h."""
        return self.graph.uses("h")

    @property
    def unsupported(self) -> str | None:
        """The first thing the mod does that the op table lacks; then neither `evaluate` nor `triton` work."""
        return self.graph.unsupported

    def evaluate(self, tensors: Sequence[Tensor], *args: Any) -> Any:
        """The mod in torch.

        Args:
            tensors: What `describe` found captured.
            *args: The mod's arguments, tensors that broadcast against each other or numbers.

        Returns:
            A tensor without gradient (float32 for a score mod, bool for a mask mod) of a shape that broadcasts against
            the arguments; for a range mod two of int32.
        """
        self._check()
        with torch.no_grad():
            results = self.graph.evaluate(tensors, args)
        return results if self.kind == "range" else results[0]

    @cached_property
    def source(self) -> str:
        """Source of the Triton function."""
        self._check()
        return emit.emit(self.graph, interpreted=os.environ.get("TRITON_INTERPRET") == "1")

    @cached_property
    def triton(self) -> Any:
        """The ``@triton.jit`` function of the mod's arguments and ``AUX``, the tuple that `arguments` makes."""
        return getattr(cache.load(self.source), emit.FUNCTION)

    def _check(self) -> None:
        if self.unsupported is not None:
            raise NotImplementedError(f"{self.key} has no program: it uses {self.unsupported}.")

    def arguments(self, tensors: Sequence[Tensor]) -> tuple[Tensor | int, ...]:
        """``AUX``: of each captured tensor the tensor, contiguous, then its sizes."""
        arguments: list[Tensor | int] = []
        with torch.no_grad():
            tables = self.graph.make_tables([x.detach() for x in tensors])
        for table in tables:
            # A kernel holds indices inside the tensor, and so reads one element even where there is none.
            held = table.contiguous() if table.numel() else table.new_zeros(1)
            arguments += [held, *(max(size, 1) for size in table.shape)]
        return tuple(arguments)


def register(graph: Graph, rough: bool | None) -> Program:
    """The program of a graph; `rough` overrides what the graph says."""
    unsupported = graph.unsupported or emit.check(graph)
    if unsupported != graph.unsupported:
        graph = Graph(graph.kind, unsupported=unsupported)
    if rough is None:
        rough = graph.kind == "score" and graph.unsupported is None and graph.course() == Course.ROUGH
    digest = hashlib.sha256(f"{graph.text()}\nrough {rough}".encode()).hexdigest()
    key = f"{graph.kind}-{digest[:32]}"
    return _programs.setdefault(key, Program(key, graph, rough))


def program(key: str) -> Program:
    """The program of a key that `describe` gave in this process.

    Raises:
        KeyError: There is none.
    """
    try:
        return _programs[key]
    except KeyError:
        raise KeyError(f"no mod {key} was described in this process; bridge.describe makes keys") from None


def conjunction(one: str, other: str) -> str:
    """`sale_flex.mods.compiler.conjunction`, outside torch.compile."""
    return register(conjoin(program(one).graph, program(other).graph), None).key


def facts(key: str) -> Facts:
    """`sale_flex.mods.compiler.facts`, outside torch.compile."""
    found = program(key)
    return Facts(found.kind, found.uses_batch, found.uses_head, found.rough, found.unsupported)
