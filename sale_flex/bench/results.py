# SPDX-License-Identifier: BSD-3-Clause
"""The rows of a benchmark, kept in a JSON file that is valid at any moment and that a later run goes on with."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
"""One candidate of one setting: what was asked for, what came of it, and where (`provenance`)."""

SETTING = (
    "length", "inputs", "batch", "heads", "kv_heads", "head_dim", "dtype", "outliers", "seed",
    "config", "config_fields", "target_density", "baselines", "keep_compiled",
    "device", "torch", "cuda", "triton", "sale_flex", "commit",
)  # fmt: skip
"""Fields of a row that together say which setting it belongs to; rows of one setting are written together."""


def setting_key(row: Mapping[str, Any]) -> str:
    """The setting of a row, as a string that is equal for equal settings."""
    return json.dumps([row.get(name) for name in SETTING])


class Results:
    """Rows by setting, in the order they were measured, and their file if there is one."""

    def __init__(self, path: Path | None) -> None:
        """Read the file if it is there, and write it, so that a path that can not be written fails at once.

        Raises:
            ValueError: The file holds something else.
        """
        self._path = path
        self._rows: dict[str, list[Row]] = {}
        if path is not None and path.exists():
            for row in _read(path):
                self._rows.setdefault(setting_key(row), []).append(row)
        self._write()

    def find(self, key: str) -> list[Row] | None:
        """The rows of a setting, None if it has not been measured."""
        return self._rows.get(key)

    def put(self, rows: Sequence[Row]) -> None:
        """Add a setting's rows, in the place of older ones, and write the file."""
        self._rows[setting_key(rows[0])] = list(rows)
        self._write()

    def _write(self) -> None:
        if self._path is None:
            return
        rows = [row for rows in self._rows.values() for row in rows]
        # Whenever this is interrupted, the path holds all of the old rows or all of the new ones.
        draft = self._path.with_name(f"{self._path.name}.part")
        try:
            draft.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
            os.replace(draft, self._path)
        finally:
            draft.unlink(missing_ok=True)


def _read(path: Path) -> list[Row]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"--json {path} is there and is not JSON ({error}); name another file") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) and "config_fields" in row for row in rows):
        raise ValueError(f"--json {path} is there and holds something else than benchmark rows; name another file")
    return rows
