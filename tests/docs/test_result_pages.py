# SPDX-License-Identifier: BSD-3-Clause
"""Tables of figures are what their JSON says, and there are no others."""

import re
import sys
from decimal import Decimal
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "docs"))
import tables

TYPED = {
    "| call | what runs | `stats.path` |",
    "| | tested | supported |",
    "| option | meaning |",
}
"""Headings of tables without measured figures: which path a call takes, versions, options of a command."""

SAID = [path.name for path in sorted(tables.RESULTS.glob("*.json")) if "columns" in path.read_text("utf-8")]
"""JSON that says itself how its table is written."""


def changed(value):
    """Another figure, text or set of cells."""
    if isinstance(value, dict):
        return {heading: changed(cell) for heading, cell in value.items()}
    return f"{value}!" if isinstance(value, str) else value + 1


def texts() -> dict[Path, str]:
    return {page: page.read_text("utf-8") for page in tables.PAGES}


@pytest.mark.parametrize("page", tables.PAGES, ids=lambda page: page.name)
def test_a_page_is_what_its_figures_say(page):
    text = page.read_text("utf-8")
    assert text == tables.written(page, text), "run python docs/tables.py"


def test_every_page_of_figures_alone_has_a_writer():
    assert set(tables.RESULTS.glob("*.md")) == set(tables.WHOLE)


def test_no_other_table_is_typed():
    for page, text in texts().items():
        if page not in tables.WHOLE:
            # A line after a blank one, or after prose, begins a table.
            heads = re.findall(r"(?:^|\n)(?!\|)[^\n]*\n(\|[^\n]*)", tables.BLOCK.sub("", text))
            assert set(heads) <= TYPED, page


def test_every_comment_is_closed_and_every_json_is_shown():
    pages = "".join(text for page, text in texts().items() if page not in tables.WHOLE)
    called = [found[2] for found in tables.BLOCK.finditer(pages)]
    assert pages.count("<!-- table:") == pages.count("<!-- end -->") == len(called)
    assert sorted(called) == sorted([*tables.TABLES, *(f"results/{name}" for name in SAID)])


@pytest.mark.parametrize("path", sorted(tables.RESULTS.glob("*.json")), ids=lambda path: path.name)
def test_a_json_says_what_was_measured_where(path):
    assert {"what", "device", "torch", "triton", "commit"} <= set(tables.read(path.name)["measured"])


@pytest.mark.parametrize("name", SAID)
def test_no_figure_of_a_json_changes_unseen(name):
    made = tables.read(name, Decimal)
    versions = {"device", "torch", "triton", "transformers", "commit"}
    assert set(made["measured"]) == {"what", "input", "dtype", "command"} | versions
    said = tables.as_it_says(made)
    for where in (made["measured"], *made["rows"]):
        for key in [key for key, value in where.items() if key != "bold" and value is not None]:
            value = where[key]
            where[key] = changed(value)
            assert tables.as_it_says(made) != said, (key, value)
            where[key] = value


def test_nothing_that_is_typed_into_a_table_stays():
    for page, text in texts().items():
        typed = tables.BLOCK.sub(lambda found: f"{found[1]}| a | b |\n| --- | --- |\n| 1.5 | 2.5 |\n{found[3]}", text)
        assert tables.written(page, typed) == text
        assert (typed != text) == ("<!-- table:" in text)
