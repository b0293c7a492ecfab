# SPDX-License-Identifier: BSD-3-Clause
"""Windows, chunks, soft caps and sinks, against eager attention: padding, caches, chunks, generate, packed rows.

Which combinations there are: see tests/integrations/test_plain.py.
"""

import pytest
from models_harness import (
    BY_NAME,
    LOCAL,
    case_ids,
    check_generate,
    check_packed,
    check_prefill,
    check_second_turn,
    generate_cases,
    prefill_cases,
)

pytestmark = pytest.mark.usefixtures("uncompiled_attention")


@pytest.mark.parametrize(("family", "padding", "cache", "way"), case_ids(prefill_cases(LOCAL)))
def test_prompts_and_decoding_are_eagers(family, padding, cache, way):
    check_prefill(family, padding, cache, way)


@pytest.mark.parametrize(("family", "way", "padding"), case_ids(generate_cases(LOCAL)))
def test_generate_gives_eagers_tokens_and_logits(family, way, padding):
    check_generate(family, way, padding)


@pytest.mark.parametrize("name", ["Mistral", "Gemma3", "Llama4"])
def test_a_second_turn_goes_on_from_the_first(name):
    check_second_turn(BY_NAME[name])


@pytest.mark.parametrize("family", LOCAL, ids=str)
def test_packed_documents_do_not_see_each_other(family):
    check_packed(family, (100, 60), (33, 64, 63))
