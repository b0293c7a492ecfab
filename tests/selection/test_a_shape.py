# SPDX-License-Identifier: BSD-3-Clause
"""A-shape keeps what every rule keeps, and all of heads with threshold 0."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rules_harness import SMALL, check_choice, kept, ruled, scores, spoiled_inputs

from sale_flex import AShape, AuxRequest, SaleConfig, sale_attention
from sale_flex.testing import Shape, any_in_block, assert_attention_close, causal_mask, expand_blocks, structured_inputs
from sale_flex.testing.programs import PROGRAMS
from sale_flex.testing.strategies import seeds, thresholds

pytestmark = pytest.mark.usefixtures("uncompiled_attention")

SHAPE = Shape(500, 500, batch=2, heads=4, kv_heads=2, head_dim=32, kv_range=((0, 500), (37, 490)))


@given(ruled(st.builds(AShape, thresholds()), min_tokens=1), seeds(), st.sampled_from([None, torch.nan]))
def test_sink_and_window_are_all_that_is_kept(call, seed, special):
    shape, config = call
    inputs = spoiled_inputs(shape, seed, special)
    expected, differ = check_choice(shape, inputs, config, 0.0)
    assert differ == 0
    dense = torch.as_tensor(config.rule.threshold).expand(shape.heads) == 0
    asked = torch.where(dense[:, None, None], expected.visible, expected.always)
    assert torch.equal(expected.kept, asked)


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_references_blocks_are_kept_under_mods(program):
    mods = PROGRAMS[program](SHAPE, "cpu")
    for threshold in (1.0, 0.0):
        assert check_choice(SHAPE, structured_inputs(SHAPE, 1), replace(SMALL, rule=AShape(threshold)), 0.0, **mods)


def test_it_is_streaming_attention():
    shape = replace(SHAPE, kv_range=None)
    config = SaleConfig(AShape(), min_length=0, sink_tokens=70, local_tokens=100)
    query, key, value = structured_inputs(shape, 2)
    output, (_, stats) = sale_attention(query, key, value, config, return_aux=AuxRequest(stats=True))
    at = torch.arange(500)
    near = (at < 70) | (at[:, None] - at < 100)
    blocks = any_in_block(near & causal_mask(shape), (64, 64))
    seen = causal_mask(shape) & expand_blocks(blocks, (64, 64), 500, 500)
    assert_attention_close(output, query, key, value, seen)
    assert torch.equal(stats.kept_blocks, blocks.sum((2, 3)).expand(2, 4))


def test_scores_say_what_is_selected():
    inputs = structured_inputs(SHAPE, 3)
    found = scores(inputs, replace(SMALL, rule=AShape()), SHAPE.positions())
    assert found.shape == (2, 4, 8, 8)
    assert found.dtype == torch.float32
    assert not found.any()
    lone = replace(SMALL, rule=AShape(1e-30))
    assert torch.equal(kept(inputs, lone), kept(inputs, replace(SMALL, rule=AShape())))


def test_it_is_described():
    assert AShape().describe() == "a_shape: sink and local window"
