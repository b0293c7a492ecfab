# SPDX-License-Identifier: BSD-3-Clause
"""What an evaluation has measured so far: a line of JSON a row, with which an interrupted one goes on."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sale_flex._console.stored import shown

ROWS = "rows.jsonl"

Row = dict[str, Any]


class Record:
    """Rows by what they are of, written to a file as they are measured."""

    def __init__(self, folder: Path, common: Mapping[str, Any], resume: bool) -> None:
        """Begin anew, or read what is there.

        Args:
            folder: Where the file is kept.
            common: What every row holds for: model, weights, dtype, device, versions.
            resume: Whether to go on with what is there.

        Raises:
            ValueError: There are rows, and `resume` is not asked for; or they are of something else, or damaged.
            OSError: The folder can not be made or written.
        """
        self._path, self._common = folder / ROWS, dict(common)
        self.rows: list[Row] = []
        if self._path.exists():
            if not resume:
                raise ValueError(f"{self._path} is there already: go on with it by --resume, or take another folder.")
            self._read()
        folder.mkdir(parents=True, exist_ok=True)

    def _read(self) -> None:
        lines = self._path.read_text(encoding="utf-8").splitlines()
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
            except ValueError:
                if number == len(lines):
                    continue  # what was being written when the run was interrupted
                raise ValueError(f"{self._path}, line {number}, is no JSON; remove it and begin anew.") from None
            if not isinstance(row, dict):
                raise ValueError(f"{self._path}, line {number}, must be a JSON object, got {shown(row)}.")
            for name, value in self._common.items():
                if row.get(name) != value:
                    raise ValueError(
                        f"--resume must go on with what {self._path} is of, but {name} is {shown(row.get(name))} there "
                        f"and {shown(value)} here; take another folder."
                    )
            self.rows.append(row)

    def find(self, identity: Mapping[str, Any]) -> Row | None:
        """The row that has these fields, if it was measured."""
        wanted = json.loads(json.dumps(identity))  # as it looks when it is read again
        return next((row for row in self.rows if all(row.get(name) == value for name, value in wanted.items())), None)

    def once(self, identity: Mapping[str, Any], measure: Callable[[], Mapping[str, Any]]) -> Row:
        """The row that has these fields, measured now unless it was before."""
        row = self.find(identity)
        if row is None:
            row = json.loads(json.dumps({**identity, **measure(), **self._common}))
            self.rows.append(row)
            # Anew, and not appended: a line cut short by an interruption would spoil the next.
            part = self._path.with_name(f"{self._path.name}.part")
            part.write_text("".join(json.dumps(each) + "\n" for each in self.rows), encoding="utf-8")
            part.replace(self._path)
        return row
