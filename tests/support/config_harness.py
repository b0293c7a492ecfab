# SPDX-License-Identifier: BSD-3-Clause
"""Configs of the tests."""

from dataclasses import fields, replace

from sale_flex import SaleConfig
from sale_flex.selection.rules import rule_named


def as_rule(config: SaleConfig, name: str) -> SaleConfig:
    """The same config under another rule, with the options that both have, such as threshold and bits."""
    kind = rule_named(name)
    names = {field.name for field in fields(kind)} & {field.name for field in fields(config.rule)}
    return replace(config, rule=kind(**{name: getattr(config.rule, name) for name in names}))
