# SPDX-License-Identifier: BSD-3-Clause
"""The rule after FlashPrefill: scores and blocks of the reference, a passage that it finds, and its means."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shares_harness import mean_error_bound, scored, share_error_bound

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


def test_the_block_of_a_passage_is_found():
    inputs = structured_inputs(SHAPE, 4)
    inputs.key[1, 0, 130:190] = 2 * inputs.query[1, 1, 590]
    inputs.query[1, 1, 576:] = inputs.query[1, 1, 590]
    scores, _ = scored(inputs, SHAPE, CONFIG)
    assert int(scores[1, 1, -1].argmax()) == 2
    assert float(scores[1, 1, -1].max()) == 1.0


def test_means_are_of_valid_keys_and_rounded_to_the_keys_dtype():
    key = torch.ones(1, 1, 100, 32, dtype=torch.bfloat16)
    key[:, :, 5:7] = torch.tensor([1.25, torch.nan])[:, None]
    means = block_means(key, torch.tensor([[0, 7, 97]], dtype=torch.int32), Grid(100, 100, 64, 64))
    assert torch.equal(means, torch.ones(1, 1, 2, 32, dtype=torch.bfloat16))
    # (1.25 + 63) / 64 lies between two numbers of the dtype.
    key[:, :, 6] = 1.0
    means = block_means(key, torch.tensor([[0, 0, 64]], dtype=torch.int32), Grid(100, 100, 64, 64))
    assert torch.equal(means[0, 0, :, 0], torch.tensor([1.0, 0.0], dtype=torch.bfloat16))
