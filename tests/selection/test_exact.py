# SPDX-License-Identifier: BSD-3-Clause
"""The rule of exact masses: its scores are shares of the softmax, and its blocks those of the reference."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import event, given
from hypothesis import strategies as st
from rules_harness import SMALL, check_choice, kept, logit_error, ruled, scores, spoiled_inputs

from sale_flex import Exact, create_sale_block_mask, reference
from sale_flex.ops.fallback import tiles
from sale_flex.reference.pooled import MassOptions
from sale_flex.selection.rules.mass import POOL_MODES, POOLS
from sale_flex.testing import Shape, dense_attention, gamma, plant_needle, random_inputs, structured_inputs
from sale_flex.testing.programs import PROGRAMS
from sale_flex.testing.strategies import seeds, thresholds

RULES = st.builds(Exact, thresholds(most=1.5), st.sampled_from(POOLS), st.sampled_from(POOL_MODES))
SHAPE = Shape(500, 500, batch=2, heads=4, kv_heads=2, head_dim=32, kv_range=((0, 500), (37, 490)))


def share_error(shape, inputs, config, **mods):
    """Of the logarithm of a share: two logits, and sums and quotients of exponentials."""
    return 2 * logit_error(shape, inputs, config, **mods) + gamma(2 * shape.kv_len + 16)


@given(ruled(RULES), seeds(), st.sampled_from([None, None, torch.nan, torch.inf]))
def test_the_references_blocks_are_kept(call, seed, special):
    shape, config = call
    inputs = spoiled_inputs(shape, seed, special)
    expected, differ = check_choice(shape, inputs, config, share_error(shape, inputs, config))
    event(f"decided otherwise: {differ}, asked for: {bool((expected.hit & ~expected.always).any())}")


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_references_blocks_are_kept_under_mods(program):
    mods = PROGRAMS[program](SHAPE, "cpu")
    inputs = structured_inputs(SHAPE, 4)
    for rule in (Exact(0.05), Exact(0.1, pool=8, pool_mode="mean")):
        config = replace(SMALL, rule=rule)
        check_choice(SHAPE, inputs, config, share_error(SHAPE, inputs, config, **mods), **mods)


@pytest.mark.parametrize("pool", [1, 4])
def test_scores_are_shares_of_dense_attention(pool):
    # Values that say which block a key is of turn attention into shares of blocks.
    shape = replace(SHAPE, kv_range=None)
    query, key, _ = inputs = structured_inputs(shape, 1)
    config = replace(SMALL, rule=Exact(pool=pool))
    blocks = torch.nn.functional.one_hot(torch.arange(500) // 64, 8).double().expand(2, 2, -1, -1)
    causal = torch.ones(500, 500, dtype=torch.bool).tril()
    shares = dense_attention(query, key, blocks, causal)[:, :, pool - 1 :: pool]
    expected = torch.nn.functional.pad(shares, (0, 0, 0, -shares.shape[2] % (64 // pool)))
    expected = expected.unflatten(2, (8, -1)).amax(3)
    found = scores(inputs, config)
    bound = math.expm1(share_error(shape, inputs, config))
    seen = torch.ones(8, 8, dtype=torch.bool).tril()
    assert ((found - expected).abs() <= bound * expected)[..., seen].all()
    assert found[..., seen].std() > 0.1


@given(ruled(RULES, batch=1, padded=False), seeds())
def test_scores_are_the_masses_that_the_mass_rules_reference_calls_exact(call, seed):
    shape, config = call
    inputs = structured_inputs(shape, seed)
    made = reference.make_call(inputs.query, inputs.key, config, dtype=torch.float64, **shape.positions())
    rule = config.rule
    options = MassOptions(config.block_size, rule.pool, rule.pool_mode == "last", 1, 8)
    exact = reference.exact_masses(made, options).unflatten(2, (-1, options.rows)).amax(3)
    found = scores(inputs, config, shape.positions())
    bound = math.expm1(share_error(shape, inputs, config))
    seen = made.visible.expand_as(exact)
    assert ((found - exact).abs() <= bound * exact + torch.finfo(torch.float32).tiny)[seen].all()


def test_a_needle_of_one_row_is_found_by_every_row_and_not_by_every_fourth():
    shape = Shape(640, 640, heads=2, head_dim=64)
    inputs = plant_needle(random_inputs(shape, 0, amplitude=0.5), query=600, key=300, logit=12.0, head=1)
    at = (0, 1, 600 // 64, 300 // 64)
    for rule, found in ((Exact(0.5, pool=1), True), (Exact(0.5), False), (Exact(0.5, pool_mode="mean"), False)):
        assert bool(kept(inputs, replace(SMALL, rule=rule))[at]) is found


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_a_logit_without_bounds_keeps_its_block_and_weighs_nothing_elsewhere(value):
    def score_mod(score, b, h, q_idx, kv_idx):
        return torch.where((kv_idx == 100) & (q_idx >= 300), value, score)

    def hidden(score, b, h, q_idx, kv_idx):
        return torch.where((kv_idx == 100) & (q_idx >= 300), -torch.inf, score)

    inputs = structured_inputs(SHAPE, 2)
    config = replace(SMALL, rule=Exact(0.9))
    found, without = (scores(inputs, config, SHAPE.positions(), score_mod=mod) for mod in (score_mod, hidden))
    assert (found[:, :, 300 // 64 :, 1] == torch.inf).all()
    found[:, :, 300 // 64 :, 1] = without[:, :, 300 // 64 :, 1]
    assert torch.equal(found, without)
    assert found.isfinite().all()


@pytest.mark.parametrize("program", [None, "soft cap in documents", "a user's mask by head"])
def test_strips_of_any_height_say_the_same(program, monkeypatch):
    mods = {} if program is None else PROGRAMS[program](SHAPE, "cpu")
    inputs = structured_inputs(SHAPE, 3)
    whole = scores(inputs, replace(SMALL, rule=Exact()), SHAPE.positions(), **mods)
    monkeypatch.setattr(tiles, "TILE_ELEMENTS", 1)
    strips = scores(inputs, replace(SMALL, rule=Exact()), SHAPE.positions(), **mods)
    torch.testing.assert_close(strips, whole, rtol=share_error(SHAPE, inputs, SMALL, **mods), atol=1e-30)


def test_above_one_only_what_is_always_kept_is_left():
    inputs = structured_inputs(SHAPE, 5)
    query = inputs.query * 30  # shares round to 1
    found = scores(inputs._replace(query=query), replace(SMALL, rule=Exact(pool=1)), SHAPE.positions())
    assert found.max() == 1.0


def test_options_are_checked_and_described():
    with pytest.raises(ValueError, match=r"pool must be one of \(1, 2, 4, 8, 16\) rows, got 3"):
        Exact(pool=3)
    with pytest.raises(ValueError, match=r"pool_mode must be one of \('last', 'mean'\), got 'first'"):
        Exact(pool_mode="first")
    with pytest.raises(ValueError, match="threshold must be 0 or more and finite"):
        Exact(-1.0)
    assert Exact(pool=1).describe() == "exact masses, every row"
    assert Exact().describe() == "exact masses, every 4th row"
    assert Exact(pool_mode="mean").describe() == "exact masses, means of 4 rows"
    inputs = structured_inputs(SHAPE, 0)
    stats = create_sale_block_mask(inputs.query, inputs.key, replace(SMALL, rule=Exact()), stats=True).stats
    assert not stats.reason
