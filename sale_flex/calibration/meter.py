# SPDX-License-Identifier: BSD-3-Clause
"""How far a calibration is, and how long it will take: the benchmark's bar or lines, with the time left."""

import sys
import time

from sale_flex._console.progress import Bar, Lines


class TimedLines(Lines):
    """A line when a step begins, with the time left."""

    def __init__(self, total: int) -> None:
        super().__init__(total)
        self._began = time.monotonic()

    def begin(self, setting: str) -> None:
        """A step begins."""
        left = self._total - self._done
        spent = time.monotonic() - self._began
        about = f", {spent / self._done * left:.0f} s left" if self._done and left > 0 else ""
        print(f"{self._done + 1} of {max(self._total, self._done + 1)}: {setting}{about}", file=sys.stderr, flush=True)


class TimedBar(Bar):
    """rich's bar with the time left."""

    def __init__(self, total: int) -> None:
        from rich.progress import TimeRemainingColumn

        super().__init__(total)
        self._bar.columns = (*self._bar.columns[:-1], TimeRemainingColumn(), self._bar.columns[-1])


class Silent(Lines):
    """Nothing at all."""

    def begin(self, setting: str) -> None:
        """A step begins."""


def make_meter(total: int) -> Lines:
    """What fits the process, for `total` steps."""
    if sys.stderr.isatty():
        try:
            return TimedBar(total)
        except ImportError:
            pass
    return TimedLines(total)
