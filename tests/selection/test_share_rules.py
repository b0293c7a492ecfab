# SPDX-License-Identifier: BSD-3-Clause
"""What rules that compare shares of blocks promise alike: of thresholds, chunks, padding, mods, what is not finite."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from shares_harness import scored
from torch import Tensor

from sale_flex import Antidiagonal, BlockMean, SaleConfig, create_sale_block_mask, reference
from sale_flex.config import BLOCK_SIZES
from sale_flex.testing import Shape, block_map, structured_inputs
from sale_flex.testing.programs import PROGRAMS

SHAPE = Shape(600, 600, batch=2, heads=4, kv_heads=2, head_dim=32)
PADDED = replace(SHAPE, kv_range=((0, 600), (70, 533)))


@pytest.fixture(params=[Antidiagonal(), Antidiagonal(stride=8), BlockMean()], ids=lambda rule: rule.describe())
def config(request):
    return SaleConfig(request.param, min_length=0, sink_tokens=8, local_tokens=16)


def test_a_threshold_of_0_keeps_all_and_a_higher_one_no_more(config):
    query, key, _ = structured_inputs(PADDED, 3)
    before = reference.keep_map(query, key, config, **PADDED.positions()).visible.expand(-1, 4, -1, -1)
    counts = []
    for threshold in (0.0, 1e-4, 0.01, 0.1, 0.5, 1.0):
        kept = kept(inputs, config.with_threshold(threshold), **PADDED.positions())
        assert bool((kept <= before).all()) if threshold else torch.equal(kept, before)
        counts.append(int(kept.sum()))
        before = kept
    assert counts[0] > counts[3] > counts[5]


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_chunks_of_whole_query_blocks_choose_as_the_whole_and_no_later_key_matters(config, block_size):
    config = replace(config, block_size=block_size)
    query, key, _ = structured_inputs(SHAPE, 5)
    whole = kept(inputs, config)
    for end in (256, 384):
        rows, columns = end // block_size[0], end // block_size[1]
        spoilt = key.clone()
        spoilt[:, :, end:] = torch.nan
        assert torch.equal(choice(query, spoilt, config)[:, :, :rows], whole[:, :, :rows])
        chunk = choice(query[:, :, end - 128 : end], key[:, :, :end], config)
        assert torch.equal(chunk, whole[:, :, rows - 128 // block_size[0] : rows, :columns])


def test_padding_on_the_right_does_not_matter(config):
    query, key, _ = structured_inputs(SHAPE, 6)
    alone = choice(query[:, :, :490], key[:, :, :490], config)
    query[:, :, 490:] = torch.inf
    key[:, :, 490:] = torch.nan
    padded = kept(inputs, config, kv_range=torch.tensor([[0, 490], [0, 490]]))
    assert torch.equal(padded[:, :, :8, :8], alone)
    assert not bool(padded[:, :, 8:].any() | padded[..., 8:].any())


@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, -torch.inf])
def test_a_row_that_is_not_finite_keeps_what_it_sees_alone(config, garbage):
    query, key, _ = structured_inputs(SHAPE, 7)
    before = kept(inputs, config)
    query[1, 2, 400, 3] = garbage
    after = kept(inputs, config)
    assert bool(after[1, 2, 6, :7].all())
    before[1, 2, 6] = after[1, 2, 6]
    assert torch.equal(before, after)


@pytest.mark.parametrize("garbage", [torch.nan, torch.inf])
def test_a_key_that_is_not_finite_keeps_its_block_and_moves_no_other_head(config, garbage):
    inputs = structured_inputs(SHAPE, 8)
    before, _ = scored(inputs, SHAPE, config)
    inputs.key[1, 0, 150, 3] = garbage
    after, _ = scored(inputs, SHAPE, config)
    assert not bool(after.isnan().any())
    # Query block 3 is the first whose rows see all of the block.
    assert bool((after[1, :2, 3:, 2] == torch.inf).all())
    assert not bool(after[1, :2, 3:, [0, 1, 3, 4]].isinf().any())
    assert torch.equal(after[0], before[0])
    assert torch.equal(after[1, 2:], before[1, 2:])


def test_a_score_mod_is_left_out_and_said_so(config):
    query, key, _ = structured_inputs(SHAPE, 9)
    plain = create_sale_block_mask(query, key, config, stats=True)
    under = create_sale_block_mask(query, key, config, stats=True, **PROGRAMS["soft cap"](SHAPE, "cpu"))
    assert torch.equal(block_map(plain.block_mask).kept, block_map(under.block_mask).kept)
    assert "score_mod" not in plain.stats.reason
    assert "leave the score_mod out" in under.stats.reason


def test_a_causal_mask_chooses_as_causality_does(config):
    query, key, _ = structured_inputs(PADDED, 10)
    where = PADDED.positions()
    under = kept(inputs, config, mask_mod=lambda b, h, q_idx, kv_idx: kv_idx <= q_idx, **where)
    assert torch.equal(kept(inputs, config, **where), under)


@pytest.mark.parametrize("rule", [Antidiagonal(), BlockMean()], ids=lambda rule: rule.name)
def test_in_one_compiled_graph(rule):
    query, key, _ = structured_inputs(SHAPE, 11)
    config = SaleConfig(rule, min_length=0)

    def counts(query: Tensor, key: Tensor) -> Tensor:
        mask = create_sale_block_mask(query, key, config)
        return mask.kv_num_blocks + mask.full_kv_num_blocks

    compiled = torch.compile(counts, backend="aot_eager", fullgraph=True, dynamic=True)
    assert torch.equal(compiled(query, key), counts(query, key))
