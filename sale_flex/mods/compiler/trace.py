# SPDX-License-Identifier: BSD-3-Clause
"""From a mod to its graph: torch runs the mod on example scalars, and every op that runs is looked up.

The examples are fake tensors: nothing is computed, no kernel is launched, and no captured tensor is read.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode

from sale_flex.mods.compiler.builder import Builder, Unsupported
from sale_flex.mods.compiler.graph import ARGUMENTS, Graph, prune
from sale_flex.mods.compiler.isolation import without_modes
from sale_flex.mods.compiler.lowering import LOWERINGS, VIEWS


@dataclass(frozen=True)
class Traced:
    """What tracing found.

    Attributes:
        graph: The mod's graph.
        tensors: The captured tensors that it reads, in the order of its tables.
        reads_sizes: The mod looked at the size of a captured tensor, or may have: the graph holds for these sizes only.
    """

    graph: Graph
    tensors: list[Tensor]
    reads_sizes: bool


class _Watch(TorchFunctionMode):
    """Notices that the mod's Python code reads sizes or values, which then are constants of the graph."""

    SIZES = frozenset({"shape", "size", "numel", "nelement", "__len__", "nbytes", "stride", "is_contiguous"})
    VALUES = frozenset({"item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__", "__contains__"})

    def __init__(self) -> None:
        super().__init__()
        self.sizes = False
        self.value: str | None = None

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name == "__get__":  # of an attribute
            name = getattr(getattr(func, "__self__", None), "__name__", "")
        if name in self.SIZES and args and isinstance(args[0], Tensor) and args[0].dim():
            self.sizes = True
        if name in self.VALUES and self.value is None:
            self.value = name
        return func(*args, **(kwargs or {}))


def trace(mod: Callable[..., Any], kind: str, device: torch.device) -> Traced:
    """Trace a mod, eagerly or while Dynamo traces the caller.

    Args:
        mod: The function.
        kind: "score", "mask" or "range".
        device: Where the tensors it captures live.

    Raises:
        ValueError: The mod raised on scalar arguments, or returned something other than numbers or 0-d tensors.
    """
    with _alone():
        return _trace(mod, kind, device)


def _trace(mod: Callable[..., Any], kind: str, device: torch.device) -> Traced:
    watch = _Watch()
    try:
        recorded = _record(mod, kind, device, watch)
    except Exception as error:
        if watch.value is None:
            name = getattr(mod, "__qualname__", None) or type(mod).__name__
            raise ValueError(
                f"the {kind} mod {name} must run on 0-d tensors ({', '.join(ARGUMENTS[kind])}), as flex_attention runs "
                f"it, but it raised {type(error).__name__}: {error}"
            ) from error
    if watch.value is not None:
        return Traced(Graph(kind, unsupported=f"Tensor.{watch.value} (a value read in Python)"), [], True)
    builder = Builder(kind, recorded, LOWERINGS, VIEWS)
    try:
        builder.build()
    except Unsupported as error:
        return Traced(Graph(kind, unsupported=str(error)), [], watch.sizes)
    graph, tensors = prune(builder.graph, builder.tensors)
    # What torch makes of captured tensors may have their sizes among its arguments.
    return Traced(graph, tensors, watch.sizes or bool(graph.prologue))


def _record(mod: Callable[..., Any], kind: str, device: torch.device, watch: _Watch) -> fx.GraphModule:
    from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex
    from torch.fx.experimental.proxy_tensor import make_fx

    dtypes = [torch.float32 if name == "score" else torch.int32 for name in ARGUMENTS[kind]]

    def call(*args: Tensor) -> Any:
        # What the one mode does with the mod's calls is no business of the other, which sees them first.
        with TransformGetItemToIndex(), watch:
            return mod(*args)

    examples = [torch.empty((), dtype=dtype, device=device) for dtype in dtypes]
    return make_fx(call, tracing_mode="fake", _allow_non_fake_inputs=True)(*examples)


@contextmanager
def _alone() -> Iterator[None]:
    """No trace of our tracing in the caller's: neither its modes, nor those of torch.func, nor its fake tensors.

    What is looked up in the record afterwards counts too: an export would take it for constants of its program.
    """
    with without_modes(), torch._C._DisableFuncTorch(), torch._guards.tracing(None), torch.no_grad():
        yield
