# SPDX-License-Identifier: BSD-3-Clause
"""Pages of figures are what their JSON says."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "docs"))
import tables


@pytest.mark.parametrize("page", tables.PAGES)
def test_a_page_is_what_its_figures_say(page):
    assert (tables.RESULTS / page).read_text("utf-8") == tables.PAGES[page](), "run python docs/tables.py"


def test_every_page_has_a_writer():
    assert {path.name for path in tables.RESULTS.glob("*.md")} == set(tables.PAGES)
