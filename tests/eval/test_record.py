# SPDX-License-Identifier: BSD-3-Clause
"""Rows that an interrupted evaluation goes on with."""

import pytest

from sale_flex.eval.record import ROWS, Record

COMMON = {"model": "m", "weights": "w", "torch": "2"}


def test_what_was_measured_is_not_measured_again(tmp_path):
    record = Record(tmp_path / "out", COMMON, False)
    row = record.once({"rule": "a", "tokens": 8}, lambda: {"loss": 1.5})
    assert row == {"rule": "a", "tokens": 8, "loss": 1.5} | COMMON
    again = Record(tmp_path / "out", COMMON, True)
    assert again.once({"rule": "a", "tokens": 8}, lambda: pytest.fail("measured again")) == row
    again.once({"rule": "b", "tokens": 8}, lambda: {"loss": 2.0})
    assert len(Record(tmp_path / "out", COMMON, True).rows) == 2


def test_a_line_cut_short_is_measured_again(tmp_path):
    record = Record(tmp_path, COMMON, False)
    for rule in "ab":
        record.once({"rule": rule}, lambda: {"loss": 1.0})
    path = tmp_path / ROWS
    path.write_text(path.read_text()[:-9])
    again = Record(tmp_path, COMMON, True)
    assert [row["rule"] for row in again.rows] == ["a"]
    again.once({"rule": "b"}, lambda: {"loss": 3.0})
    assert [row["loss"] for row in Record(tmp_path, COMMON, True).rows] == [1.0, 3.0]


def test_rows_of_something_else_and_damaged_ones_are_refused(tmp_path):
    Record(tmp_path, COMMON, False).once({"rule": "a"}, lambda: {"loss": 1.0})
    with pytest.raises(ValueError, match=r"is there already.*--resume"):
        Record(tmp_path, COMMON, False)
    with pytest.raises(ValueError, match="weights is 'w' there and 'v' here"):
        Record(tmp_path, COMMON | {"weights": "v"}, True)
    path = tmp_path / ROWS
    path.write_text("no json\n" + path.read_text())
    with pytest.raises(ValueError, match="line 1, is no JSON"):
        Record(tmp_path, COMMON, True)
    path.write_text("[1]\n")
    with pytest.raises(ValueError, match=r"line 1, must be a JSON object, got \[1\]"):
        Record(tmp_path, COMMON, True)
