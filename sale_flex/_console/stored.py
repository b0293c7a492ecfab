# SPDX-License-Identifier: BSD-3-Clause
"""What is read back from JSON files, which people edit: rules for values, and errors that name file, field and rule."""

import json
import math
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from sale_flex.config import SaleConfig
from sale_flex.selection.rules import rule_named

Rule = Callable[[Any, str], Any]
"""From a value and its field's name to the value as it is used; raises `Broken`."""


class Broken(Exception):
    """A value breaks its rule; the text names the field, the rule and the value."""


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        OSError: It can not be read.
        ValueError: It is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("nested too deeply") from None


def check(value: Any, rule: Rule, file: str, remedy: str) -> Any:
    """A file's value as its rule makes it.

    Args:
        value: What `read_json` returned.
        rule: Of the whole content.
        file: What the message calls the file.
        remedy: What to do, the end of the message.

    Raises:
        ValueError: A rule is broken.
    """
    try:
        return rule(value, "")
    except Broken as broken:
        raise ValueError(f"{file}: {broken}; {remedy}") from None


def shown(value: Any) -> str:
    """A value in a message: its beginning, however large or deep it is."""
    brief = reprlib.Repr()
    brief.maxstring = brief.maxother = 100
    return brief.repr(value)


def plain(says: str, holds: Callable[[Any], bool]) -> Rule:
    """A rule that a function decides and `says` describes."""

    def rule(value: Any, field: str) -> Any:
        if not holds(value):
            raise Broken(f"{field or 'the content'} must be {says}, got {shown(value)}")
        return value

    return rule


def integer(least: int) -> Rule:
    """An int of `least` or more that fits 64 bits, so that arithmetic with it is defined."""
    return plain(f"an integer, {least} or more", lambda x: type(x) is int and least <= x < 2**63)


def number(says: str = "a number", holds: Callable[[float], bool] = lambda _: True) -> Rule:
    """An int or a float, made a float. NaN and infinities are numbers where `holds` takes them."""

    def is_number(value: Any) -> bool:
        return type(value) is float or (type(value) is int and abs(value) < 2**63)

    checked = plain(says, lambda value: is_number(value) and holds(float(value)))
    return lambda value, field: float(checked(value, field))


def nonnegative(value: float) -> bool:
    """Whether a number is finite and 0 or more."""
    return math.isfinite(value) and value >= 0


def above_zero(value: float) -> bool:
    """Whether a number is finite and above 0."""
    return math.isfinite(value) and value > 0


def one_of(options: Sequence[Any]) -> Rule:
    """One of some values, of the same type."""
    return plain(f"one of {tuple(options)}", lambda x: any(type(x) is type(each) and x == each for each in options))


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and not any("\ud800" <= letter <= "\udfff" for letter in value)


text = plain("a string", _is_text)
"""A string that can be printed: JSON can hold halves of characters."""

flag = plain("true or false", lambda value: isinstance(value, bool))
"""A bool."""


def optional(rule: Rule) -> Rule:
    """Null, or what `rule` says."""

    def either(value: Any, field: str) -> Any:
        if value is None:
            return None
        try:
            return rule(value, field)
        except Broken as broken:
            own = f"{field or 'the content'} must be "
            raise Broken(str(broken).replace(own, f"{own}null or ", 1)) from None

    return either


def each(rule: Rule, count: int | None = None, least: int = 0) -> Rule:
    """A list, every part of which keeps to `rule`.

    Args:
        rule: Of a part.
        count: How many there are; None for any number.
        least: How many there are at least.
    """
    says = (
        f"a list of {least} or more" if count is None and least else "a list" if count is None else f"a list of {count}"
    )
    listed = plain(
        says, lambda value: isinstance(value, list) and len(value) >= least and (count is None or len(value) == count)
    )
    return lambda value, field: [rule(part, f"{field}[{n}]") for n, part in enumerate(listed(value, field))]


_mapping = plain("a JSON object", lambda value: isinstance(value, dict))


def by_name(rule: Rule, names: Sequence[str] | None = None) -> Rule:
    """An object whose values keep to `rule`, with any names or some of `names`."""

    def checked(value: Any, field: str) -> dict[str, Any]:
        for name in _mapping(value, field):
            if not _is_text(name) or (names is not None and name not in names):
                known = "strings" if names is None else f"among {', '.join(names)}"
                raise Broken(f"the names in {field or 'the content'} must be {known}, got {shown(name)}")
        return {name: rule(part, _within(field, name)) for name, part in value.items()}

    return checked


def record(rules: Mapping[str, Rule], *, of: str | None = None, partial: bool = False) -> Rule:
    """An object with the fields of `rules`, which alone are returned.

    Args:
        rules: Name -> rule.
        of: Whose fields they are, if there may be no others.
        partial: Whether some may be missing.
    """

    def checked(value: Any, field: str) -> dict[str, Any]:
        _mapping(value, field)
        for name in value:
            if of is not None and name not in rules:
                raise Broken(f"{field and field + ': '}{of} has no field {shown(name)}; it has {', '.join(rules)}")
        missing = [] if partial else sorted(repr(name) for name in rules if name not in value)
        if missing:
            where = f"in {field}" if field else "there"
            raise Broken(f"{', '.join(missing)} missing {where}")
        return {name: rule(value[name], _within(field, name)) for name, rule in rules.items() if name in value}

    return checked


def anything(value: Any, field: str) -> Any:
    """Any value at all."""
    return value


def _within(field: str, name: str) -> str:
    return f"{field}.{name}" if field else name


_FIELDS: dict[str, Rule] = {
    "rule": anything,
    "block_size": each(integer(1), count=2),
    **dict.fromkeys(("sink_tokens", "local_tokens", "smooth_tokens"), integer(0)),
    "min_length": optional(integer(0)),
    "on_miss": text,
    "miss_bound": number("a share"),
}
"""Of `SaleConfig`."""


def stored_config(config: SaleConfig, threshold: bool = False) -> dict[str, Any]:
    """A config as JSON holds it: its rule's name and options, and the other fields.

    Args:
        config: The config; `min_length` is stored as it is, so resolve it first where another device may read it.
        threshold: Whether the rule's threshold, a float, is stored too.
    """
    rule = {"name": config.rule.name} | ({"threshold": config.rule.threshold} if threshold else {})
    rule |= config.rule.options()
    common = {field.name: getattr(config, field.name) for field in fields(config) if field.name != "rule"}
    return json.loads(json.dumps({"rule": rule} | common))


def sale_config(*, threshold: bool, partial: bool) -> Rule:
    """The fields of a `SaleConfig`, and no others, made one.

    Args:
        threshold: Whether the rule has one.
        partial: Whether fields may be missing, which then are the defaults.
    """
    rules = record(
        _FIELDS | {"rule": selection_rule(threshold=threshold, partial=partial)}, of="SaleConfig", partial=partial
    )

    def checked(value: Any, field: str) -> SaleConfig:
        return _made(SaleConfig, rules(value, field), field)

    return checked


def selection_rule(*, threshold: bool, partial: bool) -> Rule:
    """A selection rule's ``name``, without which it is the default one, and its options."""

    def checked(value: Any, field: str) -> Any:
        _mapping(value, field)
        name = text(value.get("name", SaleConfig().rule.name), _within(field, "name"))
        try:
            kind = rule_named(name)
        except ValueError as error:
            # It speaks of a rule; here that is the field's name.
            raise Broken(_within(field, str(error).replace("rule must", "name must", 1).rstrip("."))) from None
        options: dict[str, Rule] = {each.name: _option for each in fields(kind) if each.name != "threshold"}
        if threshold:
            options = {"threshold": number("a float")} | options
        found = record(options | {"name": text}, of=f"rule {name!r}", partial=partial)(value, field)
        return _made(kind, {key: option for key, option in found.items() if key != "name"}, field)

    return checked


def _option(value: Any, field: str) -> Any:
    """An option of a rule, whose own range the rule knows: a number, a string, a flag, null, or a list of such."""
    if isinstance(value, list):
        return tuple(_option(part, f"{field}[{n}]") for n, part in enumerate(value))
    if isinstance(value, dict):
        raise Broken(f"{field} must be a number, a string, true, false, null or a list, got {shown(value)}")
    return _number_option(value, field) if isinstance(value, (int, float)) else value


_number_option = plain("a number of at most 64 bits", lambda x: isinstance(x, float) or -(2**63) <= x < 2**63)


def _made(kind: Callable[..., Any], found: Mapping[str, Any], field: str) -> Any:
    try:
        return kind(**found)
    except (TypeError, ValueError) as error:
        raise Broken(_within(field, str(error).rstrip("."))) from None
