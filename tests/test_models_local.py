# SPDX-License-Identifier: BSD-3-Clause
"""Models with windows, chunks, soft caps and sinks, against eager attention: paddings, caches, chunks, packed rows.

Which combinations there are: see tests/test_models_plain.py.
"""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parent))
from models_harness import LOCAL, case_ids, check_packed, check_prefill, prefill_cases


@pytest.mark.parametrize(("family", "padding", "cache", "way"), case_ids(prefill_cases(LOCAL)))
def test_prompts_and_decoding_are_eagers(family, padding, cache, way):
    check_prefill(family, padding, cache, way)


@pytest.mark.parametrize("family", LOCAL, ids=str)
def test_packed_documents_do_not_see_each_other(family):
    check_packed(family, (100, 60), (33, 64, 63))
