# SPDX-License-Identifier: BSD-3-Clause
"""Where a long run is, on standard error: a bar where rich is installed and somebody looks, otherwise lines."""

import sys
from typing import Any, Self


class Lines:
    """A line when a setting begins. A context manager, around the whole run."""

    def __init__(self, total: int) -> None:
        self._total, self._done = total, 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def begin(self, setting: str) -> None:
        """A setting begins."""
        print(f"{self._done + 1} of {self._total}: {setting}", file=sys.stderr, flush=True)

    def step(self, text: str) -> None:
        """A step of the setting begins: too often for lines."""

    def finish(self, text: str) -> None:
        """A setting is done; its text, if there is any, goes to standard output."""
        self._done += 1
        if text:
            print(text, flush=True)


class Bar(Lines):
    """rich's bar. It is drawn when a step begins and never in between, where it would disturb what is timed."""

    def __init__(self, total: int) -> None:
        from rich import progress
        from rich.console import Console

        super().__init__(total)
        self._bar = progress.Progress(
            progress.MofNCompleteColumn(),
            progress.BarColumn(),
            progress.TimeElapsedColumn(),
            progress.TextColumn("{task.description}", markup=False),
            console=Console(stderr=True),
            auto_refresh=False,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._task = self._bar.add_task("", total=total)
        self._setting = ""

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._bar.stop()

    def begin(self, setting: str) -> None:
        """A setting begins."""
        self._setting = setting
        self._bar.update(self._task, description=setting, refresh=True)

    def step(self, text: str) -> None:
        """A step of the setting begins."""
        self._bar.update(self._task, description=f"{self._setting}: {text}", refresh=True)

    def finish(self, text: str) -> None:
        """A setting is done; its text, if there is any, goes to standard output."""
        self._bar.advance(self._task)
        if text:
            self._bar.stop()
            print(text, flush=True)
            self._bar.start()


def make_progress(total: int) -> Lines:
    """What fits the process, for `total` settings."""
    if sys.stderr.isatty():
        try:
            return Bar(total)
        except ImportError:
            pass
    return Lines(total)
