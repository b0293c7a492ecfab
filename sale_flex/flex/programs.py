# SPDX-License-Identifier: BSD-3-Clause
"""A function compiled by torch.compile that outlives what happens to torch's own state around its calls."""

import types
from collections.abc import Callable
from typing import Any

import torch

from sale_flex.call.autocast import without_any_autocast
from sale_flex.mods.compiler.isolation import without_modes


class NotCompiledError(RuntimeError):
    """Raised by a program's function where it finds itself run without the compiler."""


class CompiledProgram:
    """A function with a code object of its own, which torch's recompile limit counts by itself.

    Torch guards a program on state of the whole process: dispatch and function modes and autocast, which are set aside
    while it runs, and also how many classes are registered as pytree nodes, the default dtype, the number of threads,
    deterministic algorithms and more. When that has changed so often that the limit is hit, the program is made anew
    and the old one's code let go of, so that one program never holds more than the limit allows. Nor is anything kept
    of a first compilation that failed.

    Attributes:
        made: How often it was made: once, and once more for each time that the limit was hit or nothing was compiled.
    """

    def __init__(self, function: Callable[..., Any], name: str) -> None:
        self.made = 0
        self._function = function
        self._name = name
        self._compiled: Callable[..., Any] | None = None
        self._proven = False

    def __call__(self, *args: Any) -> Any:
        """Run it, compiled.

        Raises:
            NotCompiledError: Torch does not compile.
        """
        from torch._dynamo.exc import FailOnRecompileLimitHit  # here: it imports Triton

        with without_modes(), without_any_autocast():
            known = self._compiled is not None
            try:
                return self._run(*args)
            except FailOnRecompileLimitHit:
                self._compiled = None
                if not known:
                    raise
            return self._run(*args)

    def _run(self, *args: Any) -> Any:
        if self._compiled is None:
            self._compiled, self._proven = self._make(), False
            self.made += 1
        try:
            result = self._compiled(*args)
        except BaseException as error:
            # Torch may have marked the code never to be compiled.
            if not self._proven or isinstance(error, NotCompiledError):
                self._compiled = None
            raise
        self._proven = True
        return result

    def _make(self) -> Callable[..., Any]:
        code = self._function.__code__.replace(co_name=self._name)
        return torch.compile(types.FunctionType(code, self._function.__globals__, self._name), fullgraph=True)
