# SPDX-License-Identifier: BSD-3-Clause
"""The rule after XAttention: scores and blocks of the reference, which sums count, and what they find."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shares_harness import scored, share_error_bound, sum_error_bound
from torch import Tensor

from sale_flex import Antidiagonal, SaleConfig, create_sale_block_mask, reference
from sale_flex.config import BLOCK_SIZES
from sale_flex.kernels.arguments import Grid
from sale_flex.ops.fallback import antidiagonal as torch_path
from sale_flex.testing import Inputs, Shape, block_map, structured_inputs
from sale_flex.testing.programs import PROGRAMS
from sale_flex.testing.strategies import seeds, shapes

CONFIG = SaleConfig(Antidiagonal(), min_length=0, sink_tokens=8, local_tokens=16)
SHAPE = Shape(600, 600, batch=2, heads=4, kv_heads=2, head_dim=32)
PADDED = replace(SHAPE, kv_range=((0, 600), (70, 533)))


def coarse(inputs: Inputs) -> Inputs:
    """Quarters up to 8 in magnitude: float32 holds sums of 1024 products exactly, whatever their order."""
    return Inputs(*(x.clamp(-8, 8).mul(4).round().div(4) for x in inputs))


def score_bounds(of: Any, config: SaleConfig, exact_sums: bool = False) -> tuple[Tensor, Tensor]:
    """Between what a score in float32 may lie: shares that are too near to each other may change places."""
    stride, (_, block_k) = config.rule.stride, config.block_size
    shares = reference.antidiagonal_shares(of, config.block_size, stride)
    broken = shares.isinf()
    shares = shares.masked_fill(broken, 0.0)
    of_sums = 0.0 if exact_sums else sum_error_bound(of, stride)
    error = share_error_bound(of_sums, shares.shape[-1] * block_k // stride)
    larger = shares[..., None, :] - shares[..., None]
    surely = (shares[..., None, :] * (larger > 2 * error)).sum(-1)
    possibly = (shares[..., None, :] * (larger >= -2 * error)).sum(-1) - shares
    scores = [(1 - before).clamp(0, 1) for before in (possibly + 2 * error, surely - 2 * error)]
    return scores[0].masked_fill(broken, torch.inf), scores[1].masked_fill(broken, torch.inf)


def assert_scores(shape: Shape, seed: int, config: SaleConfig, **options: Any) -> None:
    scores, of = scored(structured_inputs(shape, seed), shape, config, **options)
    low, high = score_bounds(of, config)
    seen = of.visible.expand_as(scores)
    assert bool(((low <= scores) & (scores <= high))[seen].all())


@settings(max_examples=30)
@given(
    shape=shapes(max_tokens=400, dtypes=(torch.float32, torch.bfloat16), groups=(1, 2, 3)),
    block_size=st.sampled_from(BLOCK_SIZES),
    stride=st.sampled_from((8, 16)),
    seed=seeds(),
)
def test_scores_are_the_references(shape, block_size, stride, seed):
    assert_scores(shape, seed, replace(CONFIG, rule=Antidiagonal(stride=stride), block_size=block_size))


@pytest.mark.parametrize("program", PROGRAMS)
def test_scores_are_the_references_under_mods(program):
    shape = replace(PADDED, q_len=330, q_offset=140)
    assert_scores(shape, 1, CONFIG, **PROGRAMS[program](shape, "cpu"))


def test_shares_of_a_query_block_add_up_to_1():
    inputs = structured_inputs(PADDED, 2)
    bounds = reference.make_bounds(2, 600, 600, kv_range=torch.tensor(PADDED.kv_range))
    grid = Grid(600, 600, 64, 64)
    shares = torch_path.antidiagonal_shares(inputs.query, inputs.key, bounds, None, True, 0.2, grid, 16)
    sees = reference.make_call(*inputs[:2], CONFIG, **PADDED.positions()).visible.any(-1).expand(-1, 4, -1)
    torch.testing.assert_close(shares.sum(-1), sees.float())


@pytest.mark.parametrize("threshold", [0.1, 0.3, torch.tensor([0.0, 0.1, 0.5, 1.1])])
@pytest.mark.parametrize("shape", [replace(shape, head_dim=64) for shape in (SHAPE, PADDED, replace(SHAPE, q_len=200))])
def test_blocks_are_the_fewest_that_add_up(shape, threshold):
    config = CONFIG.with_threshold(threshold)
    query, key, _ = coarse(structured_inputs(shape, 2))
    kept = block_map(create_sale_block_mask(query, key, config, **shape.positions())).kept
    expected = reference.keep_map(query, key, config, **shape.positions(), dtype=torch.float64)
    of = reference.make_call(query, key, config, **shape.positions(), dtype=torch.float64)
    low, high = score_bounds(of, config, exact_sums=True)
    least = torch.as_tensor(threshold).reshape(-1, 1, 1)
    candidates = (expected.visible & ~expected.always).expand_as(kept)
    sure = (low >= least) | (high < least)
    assert torch.equal(kept & sure, expected.kept & sure)
    assert int((candidates & ~sure).sum()) <= 2
    assert 0.05 < float(expected.hit.sum() / candidates.sum()) < 0.95


@pytest.mark.parametrize("stride", [8, 16])
def test_one_key_and_one_diagonal_are_found(stride):
    # The vertical of a single key, and the slash of keys that are like the row 255 behind them.
    config = replace(CONFIG, rule=Antidiagonal(stride=stride))
    inputs = structured_inputs(SHAPE, 4, noise=0.1, sink=0.0, local=0.0, topic=0.0)
    inputs.query[0, 0] = inputs.query[0, 0, :1] * 60
    inputs.key[0, 0, 161] = inputs.query[0, 0, 0] * 4
    scores, _ = scored(inputs, SHAPE, config)
    assert bool((scores[0, 0, 3:].argmax(-1) == 2).all())
    spikes = torch.nn.functional.normalize(torch.randn(600, 32, generator=torch.Generator().manual_seed(1)), dim=-1)
    inputs.query[1, 0], inputs.key[1, 0] = 30 * spikes, 30 * spikes.roll(-255, 0)
    scores, _ = scored(inputs, SHAPE, config)
    assert scores[1, 0, 5:9].argmax(-1).tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("offset", "start", "end"), [(0, 0, 300), (173, 0, 300), (40, 53, 222), (100, 120, 120)])
def test_a_sum_counts_if_a_row_sees_its_key(causal, offset, start, end):
    grid, stride = Grid(127, 300, 64, 64), 8
    bounds = torch.tensor([offset, start, end], dtype=torch.int32)
    elements = reference.visible_elements(bounds[None], 1, 127, 300, is_causal=causal)[0, 0]
    elements = torch.nn.functional.pad(elements, (0, 20, 0, 1))
    seen = torch_path.seen_sums(bounds, causal, grid, stride)
    for n in range(seen.shape[0]):
        for m in range(seen.shape[1]):
            square = elements[stride * n : stride * (n + 1), stride * m : stride * (m + 1)]
            assert bool(seen[n, m]) == bool(square.flip(0).diagonal().any())


def test_options_are_checked_and_described():
    with pytest.raises(ValueError, match=r"stride must be one of \(8, 16\) rows, got 4"):
        Antidiagonal(stride=4)
    with pytest.raises(ValueError, match=r"stride must be one of \(8, 16\) rows, got 16\.0"):
        Antidiagonal(stride=16.0)
    assert Antidiagonal(stride=8).describe() == "antidiagonal sums of 8"
    assert SaleConfig.from_options("antidiagonal", stride=8).rule == Antidiagonal(stride=8)
