# SPDX-License-Identifier: BSD-3-Clause
"""The rule after FlashPrefill against its reference, and what it promises of rows, chunks and what is not finite."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shares_harness import mean_error_bound, scored, share_error_bound
from torch import Tensor

from sale_flex import BlockMean, SaleConfig, create_sale_block_mask, reference
from sale_flex.config import BLOCK_SIZES
from sale_flex.kernels.arguments import Grid
from sale_flex.ops.fallback.block_mean import block_means
from sale_flex.testing import Shape, assert_same_blocks, block_map, structured_inputs
from sale_flex.testing.programs import PROGRAMS
from sale_flex.testing.strategies import seeds, shapes

CONFIG = SaleConfig(BlockMean(), min_length=0, sink_tokens=8, local_tokens=16)
SHAPE = Shape(600, 600, batch=2, heads=4, kv_heads=2, head_dim=32)
PADDED = replace(SHAPE, kv_range=((0, 600), (70, 533)))


def relative_error(of: Any, config: SaleConfig) -> float:
    """Of a score: both energies are ratios that are off alike."""
    return share_error_bound(2 * mean_error_bound(of, config.block_size[1]), config.block_size[0])


def assert_scores(shape: Shape, seed: int, config: SaleConfig, **options: Any) -> None:
    scores, of = scored(structured_inputs(shape, seed), shape, config, **options)
    expected = reference.block_mean_scores(of, config.block_size)
    margin = expected * relative_error(of, config) + 1e-37
    assert bool(((scores - expected).abs() <= margin)[of.visible.expand_as(scores)].all())


@settings(max_examples=30)
@given(
    shape=shapes(max_tokens=400, dtypes=(torch.float32, torch.bfloat16), groups=(1, 2, 3)),
    block_size=st.sampled_from(BLOCK_SIZES),
    seed=seeds(),
)
def test_scores_are_the_references(shape, block_size, seed):
    assert_scores(shape, seed, replace(CONFIG, block_size=block_size))


@pytest.mark.parametrize("program", PROGRAMS)
def test_scores_are_the_references_under_mods(program):
    shape = replace(PADDED, q_len=330, q_offset=140)
    assert_scores(shape, 1, CONFIG, **PROGRAMS[program](shape, "cpu"))


@pytest.mark.parametrize("threshold", [0.1, 0.3, torch.tensor([0.0, 0.1, 0.4, 1.1])])
@pytest.mark.parametrize("shape", [SHAPE, PADDED, replace(SHAPE, q_len=200)])
def test_blocks_are_those_that_reach_the_threshold(shape, threshold):
    config = CONFIG.with_threshold(threshold)
    query, key, _ = structured_inputs(shape, 2)
    kept = block_map(create_sale_block_mask(query, key, config, **shape.positions())).kept
    expected = reference.keep_map(query, key, config, **shape.positions(), dtype=torch.float64)
    of = reference.make_call(query, key, config, **shape.positions())
    # Scores are 1 at most.
    assert assert_same_blocks(kept, expected, within=relative_error(of, config)) <= 2
    candidates = expected.visible & ~expected.always
    assert 0.05 < float(expected.hit.sum() / candidates.expand_as(kept).sum()) < 0.95


def test_a_threshold_of_0_keeps_all_and_a_higher_one_no_more():
    query, key, _ = structured_inputs(PADDED, 3)
    before = reference.keep_map(query, key, CONFIG, **PADDED.positions()).visible
    for threshold in (0.0, 1e-4, 0.01, 0.1, 0.5, 1.0):
        mask = create_sale_block_mask(query, key, CONFIG.with_threshold(threshold), **PADDED.positions())
        kept = block_map(mask).kept
        assert bool((kept <= before).all()) if threshold else torch.equal(kept, before.expand_as(kept))
        before = kept


def test_the_block_of_a_passage_is_found():
    inputs = structured_inputs(SHAPE, 4)
    inputs.key[1, 0, 130:190] = 2 * inputs.query[1, 1, 590]
    inputs.query[1, 1, 576:] = inputs.query[1, 1, 590]
    scores, _ = scored(inputs, SHAPE, CONFIG)
    assert int(scores[1, 1, -1].argmax()) == 2
    assert float(scores[1, 1, -1].max()) == 1.0


def choice(query: Tensor, key: Tensor, config: SaleConfig = CONFIG, **options: Any) -> Tensor:
    return block_map(create_sale_block_mask(query, key, config, **options)).kept


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_no_later_key_matters(block_size):
    config = replace(CONFIG, block_size=block_size)
    query, key, _ = structured_inputs(SHAPE, 5)
    whole = choice(query, key, config)
    for end in (256, 384):
        spoilt = key.clone()
        spoilt[:, :, end:] = torch.nan
        rows, columns = end // block_size[0], end // block_size[1]
        assert torch.equal(choice(query, spoilt, config)[:, :, :rows], whole[:, :, :rows])
        chunk = choice(query[:, :, end - 128 : end], key[:, :, :end], config)
        assert torch.equal(chunk, whole[:, :, rows - 128 // block_size[0] : rows, :columns])


def test_padding_on_the_right_does_not_matter():
    query, key, _ = structured_inputs(SHAPE, 6)
    alone = choice(query[:, :, :490], key[:, :, :490])
    query[:, :, 490:] = torch.inf
    key[:, :, 490:] = torch.nan
    padded = choice(query, key, kv_range=torch.tensor([[0, 490], [0, 490]]))
    assert torch.equal(padded[:, :, :8, :8], alone)
    assert not bool(padded[:, :, 8:].any() | padded[..., 8:].any())


@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, -torch.inf])
def test_a_row_that_is_not_finite_keeps_what_it_sees_alone(garbage):
    query, key, _ = structured_inputs(SHAPE, 7)
    before = choice(query, key)
    query[1, 2, 400, 3] = garbage
    after = choice(query, key)
    assert bool(after[1, 2, 6, :7].all())
    before[1, 2, 6] = after[1, 2, 6]
    assert torch.equal(before, after)


@pytest.mark.parametrize("garbage", [torch.nan, torch.inf])
def test_a_key_that_is_not_finite_keeps_its_block_and_moves_no_other_head(garbage):
    inputs = structured_inputs(SHAPE, 8)
    before, _ = scored(inputs, SHAPE, CONFIG)
    inputs.key[1, 0, 150, 3] = garbage
    after, _ = scored(inputs, SHAPE, CONFIG)
    assert not bool(after.isnan().any())
    # Row 191 is the first to see all of the block.
    assert bool((after[1, :2, 3:, 2] == torch.inf).all())
    assert not bool(after[1, :2, 3:, [0, 1, 3, 4]].isinf().any())
    assert torch.equal(after[0], before[0])
    assert torch.equal(after[1, 2:], before[1, 2:])


def test_a_score_mod_is_left_out_and_said_so():
    query, key, _ = structured_inputs(SHAPE, 9)
    plain = create_sale_block_mask(query, key, CONFIG, stats=True)
    scored_by = create_sale_block_mask(query, key, CONFIG, stats=True, **PROGRAMS["soft cap"](SHAPE, "cpu"))
    assert torch.equal(block_map(plain.block_mask).kept, block_map(scored_by.block_mask).kept)
    assert "score_mod" not in plain.stats.reason
    assert "block means leave the score_mod out" in scored_by.stats.reason


def test_means_are_of_valid_keys_and_rounded_to_the_keys_dtype():
    key = torch.ones(1, 1, 100, 32, dtype=torch.bfloat16)
    key[:, :, 5:7] = torch.tensor([1.25, torch.nan])[:, None]
    means = block_means(key, torch.tensor([[0, 7, 97]], dtype=torch.int32), Grid(100, 100, 64, 64))
    assert torch.equal(means, torch.ones(1, 1, 2, 32, dtype=torch.bfloat16))
    # (1.25 + 63) / 64 lies between two numbers of the dtype.
    key[:, :, 6] = 1.0
    means = block_means(key, torch.tensor([[0, 0, 64]], dtype=torch.int32), Grid(100, 100, 64, 64))
    assert torch.equal(means[0, 0, :, 0], torch.tensor([1.0, 0.0], dtype=torch.bfloat16))
