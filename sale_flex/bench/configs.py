# SPDX-License-Identifier: BSD-3-Clause
"""The configurations that a benchmark measures: a table of named ones, or a JSON file."""

from pathlib import Path

from sale_flex.config import SaleConfig
from sale_flex.stored import check, read_json, sale_config, shown

MIN_LENGTH = 1024
"""`SaleConfig.min_length` of the named ones, in tokens: the sparse path is what is timed, below the break-even too."""

NAMED: dict[str, SaleConfig] = {
    "default": SaleConfig(min_length=MIN_LENGTH),
    "fast": SaleConfig.fast(min_length=MIN_LENGTH),
    "relative": SaleConfig(metric="relative", threshold=0.004, bits=4, min_length=MIN_LENGTH),
}
"""Name -> what it stands for."""


def parse_configs(argument: str) -> dict[str, SaleConfig]:
    """Read ``--configs``.

    Args:
        argument: Comma-separated names of `NAMED`, or the path of a JSON file that maps names of its own to fields of
            `SaleConfig`, for instance ``{"coarse": {"sub_block": 16, "block_size": [128, 128]}}``.

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


def _read(path: Path) -> dict[str, SaleConfig]:
    try:
        table = read_json(path)
    except ValueError as error:
        raise ValueError(f"--configs {path} is not JSON: {error}") from None
    if not isinstance(table, dict) or not table or not all(isinstance(entry, dict) for entry in table.values()):
        raise ValueError(f"--configs {path} must map a name to fields of SaleConfig, one object per name")
    rule = sale_config(threshold=True, partial=True)
    return {
        name: check(entry, rule, f"--configs {path}, {shown(name)}", "mend the file or name configs of the table")
        for name, entry in table.items()
    }
