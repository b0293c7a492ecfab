# SPDX-License-Identifier: BSD-3-Clause
"""Rules for what is read back: what they take, and what they say of the rest."""

import json
import math
from dataclasses import fields

import pytest
from damage_harness import VALUES, complaint
from hypothesis import given
from hypothesis import strategies as st

from sale_flex import Mass, Relative, SaleConfig
from sale_flex._console.stored import (
    above_zero,
    by_name,
    check,
    each,
    flag,
    integer,
    nonnegative,
    number,
    one_of,
    optional,
    read_json,
    record,
    sale_config,
    stored_config,
    text,
)

RULES = {
    "integer": integer(1),
    "number": number(),
    "share": number("a number, 0 or more", nonnegative),
    "size": number("a number above 0", above_zero),
    "text": text,
    "flag": flag,
    "one of": one_of(("a", 2)),
    "optional": optional(integer(0)),
    "list": each(number(), 2),
    "filled": each(text, least=1),
    "names": by_name(integer(0), ["a", "b"]),
    "record": record({"a": integer(0), "b": each(text)}),
    "config": sale_config(threshold=True, partial=True),
}
ANYTHING = st.recursive(
    st.sampled_from([value for value in VALUES if type(value) is not object]) | st.text() | st.integers() | st.floats(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["a", "b", "rule", "name", "bits"]), inner, max_size=3)
    ),
    max_leaves=6,
)


@pytest.mark.parametrize("name", RULES)
@given(ANYTHING)
def test_a_rule_takes_a_value_or_says_why_not(name, value):
    message = complaint(lambda: check(value, RULES[name], "a file", "mend it"))
    if message is not None:
        assert message.startswith("a file: ")
        assert message.endswith("; mend it")
        assert len(message) < 2000


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("integer", 0, "the content must be an integer, 1 or more, got 0"),
        ("integer", True, "the content must be an integer, 1 or more, got True"),
        ("integer", 1.0, "the content must be an integer, 1 or more, got 1.0"),
        ("integer", 2**63, "the content must be an integer, 1 or more, got 9223372036854775808"),
        ("number", "1", "the content must be a number, got '1'"),
        ("share", math.nan, "the content must be a number, 0 or more, got nan"),
        ("size", math.inf, "the content must be a number above 0, got inf"),
        ("text", "\ud800", "the content must be a string"),
        ("one of", 2.0, "the content must be one of ('a', 2), got 2.0"),
        ("optional", -1, "the content must be null or an integer, 0 or more, got -1"),
        ("list", [1], "the content must be a list of 2, got [1]"),
        ("filled", [], "the content must be a list of 1 or more, got []"),
        ("names", {"a": 1, "c": 1}, "the names in the content must be among a, b, got 'c'"),
        ("names", {"a": None}, "a must be an integer, 0 or more, got None"),
        ("record", {"c": 1}, "'a', 'b' missing there"),
        ("record", {"a": 1, "b": ["x", 2]}, "b[1] must be a string, got 2"),
        ("config", {"rule": {"bits": 5}}, "rule.bits must be one of (4, 8), got 5"),
        ("config", {"rule": {"bits": 4.0}}, "rule.bits must be one of (4, 8), got 4.0"),
        ("config", {"rule": {"bitz": 4}}, "rule 'mass' has no field 'bitz'; it has threshold, pool"),
        ("config", {"rule": {"name": "relative", "pool": 4}}, "rule 'relative' has no field 'pool'; it has threshold"),
        ("config", {"rule": {"name": "mas"}}, "must be one of ('"),
        ("config", {"local_tokens": 4.0}, "local_tokens must be an integer, 0 or more, got 4.0"),
        ("config", {"bits": 4}, "SaleConfig has no field 'bits'; it has rule, block_size"),
    ],
)
def test_what_is_said(name, value, message):
    with pytest.raises(ValueError, match=r"^a file: ") as caught:
        check(value, RULES[name], "a file", "mend it")
    assert message in str(caught.value)


def test_infinite_and_undefined_numbers_are_numbers_where_they_can_be_measured():
    assert math.isnan(check(math.nan, RULES["number"], "", ""))
    assert check(-math.inf, RULES["number"], "", "") == -math.inf


@pytest.mark.parametrize("config", [SaleConfig(), SaleConfig(Relative(0.02, bits=8), block_size=(128, 64))])
def test_a_config_comes_back(config):
    stored = json.loads(json.dumps(stored_config(config, threshold=True)))
    assert check(stored, sale_config(threshold=True, partial=False), "", "") == config
    assert stored["rule"].pop("threshold") == config.rule.threshold
    assert stored == stored_config(config)
    expected = config.with_threshold(type(config.rule)().threshold)
    assert check(stored, sale_config(threshold=False, partial=False), "", "") == expected


@pytest.mark.parametrize("name", [field.name for field in fields(SaleConfig)])
def test_every_field_of_a_config_has_a_rule(name):
    stored = stored_config(SaleConfig(), threshold=True) | {name: {"other": "type"}}
    with pytest.raises(ValueError, match=name):
        check(stored, sale_config(threshold=True, partial=False), "", "")


@pytest.mark.parametrize(
    ("kind", "name"),
    [(kind, name) for kind in (Mass, Relative) for name in ("name", *(field.name for field in fields(kind)))],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_every_field_of_a_rule_has_a_rule(kind, name):
    stored = stored_config(SaleConfig(kind()), threshold=True)
    stored["rule"][name] = {"other": "type"}
    with pytest.raises(ValueError, match=rf"rule\.{name} must "):
        check(stored, sale_config(threshold=True, partial=False), "", "")


@pytest.mark.parametrize("text", ["", "{", "[" * 200_000, "\0", "1" * 5000])
def test_what_is_no_json_is_a_value_error(tmp_path, text):
    (tmp_path / "file.json").write_text(text)
    with pytest.raises(ValueError, match=r"."):
        read_json(tmp_path / "file.json")
