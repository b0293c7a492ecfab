# SPDX-License-Identifier: BSD-3-Clause
"""What rules that compare shares of blocks promise alike beside what every rule does: of chunks, and of mods."""

from dataclasses import replace

import pytest
import torch
from rules_harness import kept

from sale_flex import Antidiagonal, BlockMean, SaleConfig, create_sale_block_mask
from sale_flex.config import BLOCK_SIZES
from sale_flex.testing import Shape, structured_inputs
from sale_flex.testing.programs import PROGRAMS

SHAPE = Shape(600, 600, batch=2, heads=4, kv_heads=2, head_dim=32)
PADDED = replace(SHAPE, kv_range=((0, 600), (70, 533)))


@pytest.fixture(params=[Antidiagonal(), Antidiagonal(stride=8), BlockMean()], ids=lambda rule: rule.describe())
def config(request):
    return SaleConfig(request.param, min_length=0, sink_tokens=8, local_tokens=16)


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_chunks_of_whole_query_blocks_choose_as_the_whole_and_no_later_key_matters(config, block_size):
    config = replace(config, block_size=block_size)
    inputs = structured_inputs(SHAPE, 5)
    whole = kept(inputs, config)
    for end in (256, 384):
        rows, columns = end // block_size[0], end // block_size[1]
        key = inputs.key.clone()
        key[:, :, end:] = torch.nan
        assert torch.equal(kept(inputs._replace(key=key), config)[:, :, :rows], whole[:, :, :rows])
        chunk = inputs._replace(query=inputs.query[:, :, end - 128 : end], key=inputs.key[:, :, :end])
        expected = whole[:, :, rows - 128 // block_size[0] : rows, :columns]
        assert torch.equal(kept(chunk, config), expected)


def test_a_score_mod_is_left_out_and_said_so(config):
    inputs, mods = structured_inputs(SHAPE, 9), PROGRAMS["soft cap"](SHAPE, "cpu")
    assert torch.equal(kept(inputs, config), kept(inputs, config, **mods))
    plain, under = (create_sale_block_mask(*inputs[:2], config, stats=True, **options) for options in ({}, mods))
    assert "score_mod" not in plain.stats.reason
    assert "leave the score_mod out" in under.stats.reason


def test_a_causal_mask_chooses_as_causality_does(config):
    inputs, where = structured_inputs(PADDED, 10), PADDED.positions()
    under = kept(inputs, config, mask_mod=lambda b, h, q_idx, kv_idx: kv_idx <= q_idx, **where)
    assert torch.equal(kept(inputs, config, **where), under)
