# SPDX-License-Identifier: BSD-3-Clause
"""Rules as they are written on a command line: ``NAME[/OPTION=VALUE...][:THRESHOLD...]``."""

from dataclasses import replace
from typing import Any

from sale_flex.bench.configs import NAMED
from sale_flex.config import SaleConfig
from sale_flex.selection.rules import rule_names


def parse_rules(text: str, min_length: int | None = None) -> dict[str, SaleConfig]:
    """Read ``--rules``: label -> config.

    Args:
        text: Comma-separated, for instance ``default,fast:0.005:0.01,mass/pool=1/block_size=128x64:0.02``. A name is
            one of `NAMED`, or a registered rule; an option is a field of the rule or of `SaleConfig`. Without a
            threshold it is the rule's own.
        min_length: Of every config that names none.

    Raises:
        ValueError: A name, an option or a threshold is wrong; the message says which.
    """
    found: dict[str, SaleConfig] = {}
    for item in text.split(","):
        name, *thresholds = item.strip().split(":")
        base, *options = name.split("/")
        try:
            given = dict(_option(option) for option in options)
            config = replace(_base(base), min_length=min_length).with_options(**given)
            if not thresholds:
                found[name] = config
            for threshold in thresholds:
                found[f"{name}:{float(threshold):g}"] = config.with_threshold(float(threshold))
        except (TypeError, ValueError) as error:
            raise ValueError(f"--rules {item.strip()!r}: {error}") from None
    return found


def _base(name: str) -> SaleConfig:
    if name in NAMED:
        return NAMED[name]
    if name not in rule_names():
        known = ", ".join(dict.fromkeys([*NAMED, *rule_names()]))
        raise ValueError(f"a rule's name must be one of {known}, got {name!r}")
    return SaleConfig.from_options(name)


def _option(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"an option must be NAME=VALUE, got {text!r}")
    if name == "block_size":
        rows, _, keys = value.partition("x")
        return name, (int(rows), int(keys))
    for kind in (int, float):
        try:
            return name, kind(value)
        except ValueError:
            pass
    return name, None if value == "none" else value
