# SPDX-License-Identifier: BSD-3-Clause
"""Every family, itself not compiled, through compiled attention: what other files leave to a stand-in, once each.

Families whose layers have the same mods share a program.
"""

import pytest
import torch
from models_harness import (
    BY_NAME,
    FAMILIES,
    SELECTIVE,
    allowed,
    assert_calls,
    assert_close,
    build,
    check_prefill,
    prefill,
    shared,
    tokens,
)

import sale_flex.integrations.transformers as sale_hf

pytestmark = pytest.mark.compiles


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_a_padded_prompt_is_eagers(family):
    check_prefill(family, "left", "none", "at once")


def test_a_prompt_that_goes_on_from_a_cache_is_eagers():
    check_prefill(BY_NAME["Mistral"], "no padding", "dynamic", "in chunks")


def test_dropped_blocks_are_dropped():
    model = build(BY_NAME["Llama"], sale_hf.NAME, SELECTIVE, max_position_embeddings=1024)
    dense = build(BY_NAME["Llama"], max_position_embeddings=1024)
    output, expected = (prefill(each, tokens(length=640)) for each in (model, dense))
    assert output.isfinite().all()
    assert float((output - expected).abs().max()) > 100 * allowed(expected)
    assert all(max(layer.density) < 0.95 for layer in sale_hf.stats(model).layers)


def test_under_autocast_programs_compute_in_its_dtype():
    family = BY_NAME["Llama"]
    model = build(family, sale_hf.NAME)
    with torch.autocast("cpu", torch.bfloat16):
        output, expected = (prefill(each, tokens()) for each in (model, shared(family)))
    exact = prefill(shared(family), tokens())
    assert output.dtype == expected.dtype
    # As good as dense attention's own rounding: the rule of `low_precision_budget`.
    assert (output - exact).square().mean().sqrt() <= 2 * (expected - exact).square().mean().sqrt()
    assert_calls(model, family, sparse=1)
    assert_close(prefill(model, tokens()), exact)
