# SPDX-License-Identifier: BSD-3-Clause
"""How long calls take and how much memory they hold, interleaved in one process so that they meet the same machine."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

ENOUGH_SECONDS = 60.0
"""Rounds are fewer than asked for, but not fewer than `FEW`, where all of them would take longer."""
FEW = 3


def milliseconds(run: Callable[[], Any], device: torch.device) -> float:
    """Time of one call, by device events where there are any; its result is dropped before this returns."""
    if device.type != "cuda":
        began = time.perf_counter()
        run()
        return (time.perf_counter() - began) * 1e3
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop)


def peak_bytes(run: Callable[[], Any], device: torch.device) -> tuple[Any, int | None]:
    """What a call returns, and the most memory it holds beyond what was there before and beyond an output tensor.

    None on a CPU, where nobody counts.
    """
    if device.type != "cuda":
        return run(), None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = run()
    torch.cuda.synchronize(device)
    output = result.nbytes if isinstance(result, Tensor) else 0
    return result, torch.cuda.max_memory_allocated(device) - before - output


def interleave(
    runs: Mapping[str, Callable[[], Any]],
    rounds: int,
    device: torch.device,
    advance: Callable[[str], None] = lambda text: None,
) -> dict[str, list[float]]:
    """Time every call once a round, one after the other.

    Args:
        runs: Calls by name, which have run before: nothing here is compiled or warmed up. A call may leave behind what
            a later one takes.
        rounds: How often, at most. Fewer where they take long: see `ENOUGH_SECONDS`.
        device: Where they run.
        advance: Is told what is about to be timed.

    Returns:
        Milliseconds of every round, by name.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    done = 0
    while done < rounds:
        for name, run in runs.items():
            advance(f"round {done + 1} of {rounds}, {name}")
            times[name].append(milliseconds(run, device))
        done += 1
        spent = sum(map(sum, times.values())) / 1e3
        rounds = min(rounds, max(FEW, int(ENOUGH_SECONDS * done / max(spent, 1e-9))))
    return times
