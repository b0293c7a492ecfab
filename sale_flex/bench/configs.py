# SPDX-License-Identifier: BSD-3-Clause
"""The configurations that a benchmark measures: a table of named ones, or a JSON file."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from sale_flex._console.stored import check, read_json, sale_config, shown
from sale_flex.config import SaleConfig
from sale_flex.selection.rules import Mass, Relative

MIN_LENGTH = 1024
"""`SaleConfig.min_length` of the named ones, in tokens: the sparse path is what is timed, below the break-even too."""

NAMED: dict[str, SaleConfig] = {
    "default": SaleConfig(min_length=MIN_LENGTH),
    "fast": SaleConfig(rule=Mass.fast(), min_length=MIN_LENGTH),
    "relative": SaleConfig(rule=Relative(), min_length=MIN_LENGTH),
}
"""Name -> what it stands for."""


def parse_configs(argument: str) -> dict[str, SaleConfig]:
    """Read ``--configs``.

    Args:
        argument: Comma-separated names of `NAMED`, or the path of a JSON file that maps names of its own to fields of
            `SaleConfig`, for instance ``{"coarse": {"rule": {"name": "mass", "pool": 8}, "block_size": [128, 128]}}``.

    Raises:
        ValueError: A name is unknown, or the file does not hold such a mapping; the message says where and why.
    """
    path = Path(argument)
    if path.suffix == ".json" or path.is_file():
        return _read(path)
    names = [name.strip() for name in argument.split(",")]
    for name in names:
        if name not in NAMED:
            raise ValueError(
                f"--configs must be a JSON file or names among {', '.join(NAMED)}, separated by commas, got {name!r}"
            )
    return {name: NAMED[name] for name in names}


def parse_config(argument: str) -> SaleConfig:
    """Read ``--config``: a name of `NAMED`, whose `min_length` is then the device's, or a JSON file of one config.

    Raises:
        ValueError: The name is unknown, or the file does not hold a config; the message says where and why.
    """
    if argument in NAMED:
        return replace(NAMED[argument], min_length=None)
    path = Path(argument)
    if path.suffix != ".json" and not path.is_file():
        raise ValueError(f"--config must be a JSON file or one of {', '.join(NAMED)}, got {argument!r}")
    rule = sale_config(threshold=True, partial=True)
    return check(_json("--config", path), rule, f"--config {path}", "mend the file or name a config of the table")


def _json(option: str, path: Path) -> Any:
    try:
        return read_json(path)
    except ValueError as error:
        raise ValueError(f"{option} {path} is not JSON: {error}") from None


def _read(path: Path) -> dict[str, SaleConfig]:
    table = _json("--configs", path)
    if not isinstance(table, dict) or not table or not all(isinstance(entry, dict) for entry in table.values()):
        raise ValueError(f"--configs {path} must map a name to fields of SaleConfig, one object per name")
    rule = sale_config(threshold=True, partial=True)
    return {
        name: check(entry, rule, f"--configs {path}, {shown(name)}", "mend the file or name configs of the table")
        for name, entry in table.items()
    }
