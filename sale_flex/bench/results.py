# SPDX-License-Identifier: BSD-3-Clause
"""The rows of a benchmark, kept in a JSON file that is valid at any moment and that a later run goes on with."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sale_flex._console.stored import (
    Rule,
    above_zero,
    anything,
    by_name,
    check,
    each,
    flag,
    integer,
    number,
    optional,
    plain,
    read_json,
    record,
    shown,
    text,
)
from sale_flex.bench.stages import WHOLE

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


_MEND, _AGAIN = "mend the field or name another file", "measure it again by --fresh or name another file"

_count, _amount = integer(1), number()
_time = number("above 0 and finite", above_zero)
_ratio = optional(_time)
_FIELDS: dict[str, Rule] = {
    **dict.fromkeys(("length", "batch", "heads", "kv_heads", "head_dim"), _count),
    **dict.fromkeys(("inputs", "dtype", "config", "device", "torch", "sale_flex", "command", "name"), text),
    **dict.fromkeys(("cuda", "triton", "transformers", "commit", "not_run", "path"), optional(text)),
    **dict.fromkeys(("target_density", "threshold", "density"), optional(_amount)),
    **dict.fromkeys(("extra_bytes", "extra_over_query", "error", "error_usual", "error_to_dense"), optional(_amount)),
    **dict.fromkeys(("outliers", "dropped"), optional(integer(0))),
    "seed": optional(plain("an integer", lambda value: type(value) is int)),
    "config_fields": by_name(anything),
    "baselines": each(text),
    "keep_compiled": flag,
    "ms": _ratio,
    "ms_all": optional(each(_time)),
}
"""Name -> rule of every field but the ratios to the baselines, ``over_...``."""


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
        """The rows of a setting, None if it has not been measured.

        Raises:
            ValueError: The file's rows lack what is shown of them.
        """
        rows = self._rows.get(key)
        if rows is not None and self._path is not None:
            _check_whole(rows, self._path)
        return rows

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
        rows = read_json(path)
    except ValueError as error:
        raise ValueError(f"--json {path} is there and is not JSON ({error}); name another file") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) and "config_fields" in row for row in rows):
        raise ValueError(f"--json {path} is there and holds something else than benchmark rows; name another file")
    check(rows, each(record(_FIELDS, partial=True)), f"--json {path}", _MEND)
    return rows


def _check_whole(rows: Sequence[Row], path: Path) -> None:
    """Raise ValueError unless a setting's rows have all that is shown of them."""
    file = f"--json {path}, {rows[0].get('length')} tokens, {rows[0].get('config')}"
    check(list(rows), each(record(_FIELDS)), file, _AGAIN)
    over = {f"over_{name}": _ratio for name in rows[0]["baselines"]}
    if any(name not in row for name in over for row in rows):
        raise ValueError(
            f"{file}: baselines must be names with a ratio to each in every row, {', '.join(over)}, got "
            f"{shown(rows[0]['baselines'])}; {_AGAIN}"
        )
    check(list(rows), each(record(over)), file, _AGAIN)
    names = [row["name"] for row in rows]
    if names.count(WHOLE) != 1:
        raise ValueError(f"{file}: name must be {WHOLE!r} in one of the rows, got {names}; {_AGAIN}")
    if any(row["ms"] is not None and row["density"] is None for row in rows):
        raise ValueError(f"{file}: density must be a number where ms is one, got None; {_AGAIN}")
