# SPDX-License-Identifier: BSD-3-Clause
"""Device time of the halves of a call, choosing blocks and attention, for whoever asks. Nobody waits for it."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_FOLD_AT = 256
"""Laps after which those that are over are added up, so that a long run keeps few events."""


class Clock:
    """Adds up the time of laps by name, in milliseconds: of the device on CUDA, elsewhere of the host."""

    _sums: dict[str, float]
    _laps: list[tuple[str, torch.cuda.Event, torch.cuda.Event]]
    _last: torch.cuda.Event | float | None

    def __init__(self) -> None:
        self.reset()

    def mark(self, name: str | None, device: torch.device) -> None:
        """End the lap `name`, if not None, and begin another."""
        if device.type != "cuda":
            now = time.perf_counter()
            if name is not None and isinstance(self._last, float):
                self._sums[name] = self._sums.get(name, 0.0) + 1000 * (now - self._last)
            self._last = now
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(device))
        if name is not None and isinstance(self._last, torch.cuda.Event):
            self._laps.append((name, self._last, event))
        self._last = event
        if len(self._laps) >= _FOLD_AT:
            self._fold()

    def read(self) -> dict[str, float]:
        """Milliseconds by lap name. Waits for the device."""
        for _, _, last in self._laps:
            last.synchronize()
        self._fold()
        return dict(self._sums)

    def reset(self) -> None:
        """Begin at 0 again."""
        self._sums, self._laps, self._last = {}, [], None

    def __getstate__(self) -> dict[str, dict[str, float]]:
        """The sums: events can not be copied, and the models that hold clocks can."""
        return {"sums": self.read()}

    def __setstate__(self, state: dict[str, dict[str, float]]) -> None:
        self.reset()
        self._sums = dict(state["sums"])

    def _fold(self) -> None:
        """Add up the laps that are over."""
        left = []
        for name, first, last in self._laps:
            if last.query():
                self._sums[name] = self._sums.get(name, 0.0) + first.elapsed_time(last)
            else:
                left.append((name, first, last))
        self._laps = left


_running: Clock | None = None


@contextmanager
def running(clock: Clock) -> Iterator[None]:
    """Let sale_attention mark its laps on `clock`: ``"mask"`` and ``"attention"``."""
    global _running
    before, _running = _running, clock
    try:
        yield
    finally:
        _running = before


def mark(name: str | None, device: torch.device) -> None:
    """Mark a lap on the running clock, if there is one. Compiled programs and CUDA graphs have no laps."""
    if _running is None or torch.compiler.is_compiling():
        return
    if device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
        _running.mark(name, device)
