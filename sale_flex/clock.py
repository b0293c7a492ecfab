# SPDX-License-Identifier: BSD-3-Clause
"""Device time of the halves of a call, choosing blocks and attention, for whoever asks. Nobody waits for it.

Threads do not share laps: which clock runs, and when its lap began, is each thread's own.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_FOLD_AT = 256
"""Laps after which those that are over are added up, so that a long run keeps few events."""


class Clock:
    """Adds up the time of laps by name, in milliseconds: of the device on CUDA, elsewhere of the host.

    Several threads may mark laps at a time; the sums are of all of them.
    """

    _sums: dict[str, float]
    _laps: list[tuple[str, torch.cuda.Event, torch.cuda.Event]]
    _begun: threading.local
    """Its ``last``: where the thread's lap began, a time or an event; None where it has none."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.reset()

    def mark(self, name: str | None, device: torch.device) -> None:
        """End the lap `name`, if not None, and begin another."""
        last = getattr(self._begun, "last", None)
        if device.type != "cuda":
            now = time.perf_counter()
            if name is not None and isinstance(last, float):
                with self._lock:
                    self._sums[name] = self._sums.get(name, 0.0) + 1000 * (now - last)
            self._begun.last = now
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(device))
        if name is not None and isinstance(last, torch.cuda.Event):
            with self._lock:
                self._laps.append((name, last, event))
                if len(self._laps) >= _FOLD_AT:
                    self._fold()
        self._begun.last = event

    def stop(self) -> None:
        """Drop the thread's lap: what follows is none of it."""
        self._begun.last = None

    def read(self) -> dict[str, float]:
        """Milliseconds by lap name. Waits for the device."""
        for _, _, last in tuple(self._laps):
            last.synchronize()
        with self._lock:
            self._fold()
            return dict(self._sums)

    def reset(self) -> None:
        """Begin at 0 again."""
        with self._lock:
            self._sums, self._laps, self._begun = {}, [], threading.local()

    def __getstate__(self) -> dict[str, dict[str, float]]:
        """The sums: events can not be copied, and the models that hold clocks can."""
        return {"sums": self.read()}

    def __setstate__(self, state: dict[str, dict[str, float]]) -> None:
        self._lock = threading.Lock()
        self.reset()
        self._sums = dict(state["sums"])

    def _fold(self) -> None:
        """Add up the laps that are over. For a holder of the lock."""
        left = []
        for name, first, last in self._laps:
            if last.query():
                self._sums[name] = self._sums.get(name, 0.0) + first.elapsed_time(last)
            else:
                left.append((name, first, last))
        self._laps = left


class _Here(threading.local):
    """What belongs to a thread."""

    running: Clock | None = None


_here = _Here()


@contextmanager
def running(clock: Clock) -> Iterator[None]:
    """Let sale_attention mark its laps on `clock`, in this thread: ``"mask"`` and ``"attention"``."""
    before, _here.running = _here.running, clock
    try:
        yield
    finally:
        _here.running = before
        clock.stop()


def mark(name: str | None, device: torch.device) -> None:
    """Mark a lap on the running clock, if there is one. Compiled programs and CUDA graphs have no laps."""
    if torch.compiler.is_compiling() or _here.running is None:
        return
    if device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
        _here.running.mark(name, device)
