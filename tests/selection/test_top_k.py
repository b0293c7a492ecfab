# SPDX-License-Identifier: BSD-3-Clause
"""Top-k of means: as many blocks in every query block, those of the reference."""

import math
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from hypothesis import event, given
from hypothesis import strategies as st
from rules_harness import SMALL, check_choice, kept, ruled, scores, spoiled_inputs

from sale_flex import TopK, create_sale_block_mask
from sale_flex.testing import Shape, gamma, structured_inputs
from sale_flex.testing.programs import PROGRAMS
from sale_flex.testing.strategies import seeds

SHARES = st.just(0.0) | st.floats(1 / 128, 1.125, width=32)
RULES = st.builds(TopK, SHARES, st.none() | st.integers(1, 6))
SHAPE = Shape(500, 500, batch=2, heads=4, kv_heads=2, head_dim=32, kv_range=((0, 500), (37, 490)))


def mean_error(inputs, config):
    """Largest distance that rounding may open or close between two logits of means.

    A mean of n numbers is off by ``gamma(n + 1)`` of the mean magnitude, here at most the largest in its channel.
    """
    query, key = (torch.where(x.isfinite(), x, 0.0).double().abs().amax((0, 1, 2)) for x in inputs[:2])
    dim = query.shape[0]
    return 2 * float(query @ key) * dim**-0.5 * gamma(sum(config.block_size) + dim + 4)


@given(ruled(RULES), seeds(), st.sampled_from([None, None, torch.nan, torch.inf]))
def test_the_references_blocks_are_kept(call, seed, special):
    shape, config = call
    inputs = spoiled_inputs(shape, seed, special)
    expected, differ = check_choice(shape, inputs, config, mean_error(inputs, config))
    event(f"decided otherwise: {differ}, asked for: {bool((expected.hit & ~expected.always).any())}")


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_references_blocks_are_kept_under_mods(program):
    mods = PROGRAMS[program](SHAPE, "cpu")
    inputs = structured_inputs(SHAPE, 4)
    for rule in (TopK(0.6), TopK(blocks=2)):
        config = replace(SMALL, rule=rule)
        check_choice(SHAPE, inputs, config, mean_error(inputs, config), **mods)


@given(st.integers(1, 40), SHARES, seeds())
def test_the_share_that_is_left_out_is_rounded_to_whole_blocks(blocks, share, seed):
    shape = Shape(blocks * 64, blocks * 64, head_dim=32)
    found = scores(structured_inputs(shape, seed), replace(SMALL, rule=TopK()))
    for row in range(blocks):
        seen = row + 1
        exact = Fraction(share) * seen
        left_out = sum(int(score < share) for score in found[0, 0, row, :seen].tolist())
        # A tie is float32's to decide.
        if abs(exact % 1 - Fraction(1, 2)) > Fraction(1, 10**5):
            assert left_out == min(math.floor(exact + Fraction(1, 2)), seen)
        assert len(set(found[0, 0, row, :seen].tolist())) == seen


def test_a_number_of_blocks_takes_the_place_of_the_share():
    shape = Shape(640, 640, heads=2, head_dim=32)
    inputs = structured_inputs(shape, 0)
    found = scores(inputs, replace(SMALL, rule=TopK(blocks=3)))
    count = torch.arange(1, 11).clamp_max(3)
    hit = (found == torch.inf) & torch.ones(10, 10, dtype=torch.bool).tril()
    assert torch.equal(hit.sum(-1), count.expand(1, 2, -1))
    for threshold in (0.01, 5.0):
        assert torch.equal(
            kept(inputs, replace(SMALL, rule=TopK(threshold, blocks=3))),
            kept(inputs, replace(SMALL, rule=TopK(blocks=3))),
        )


def test_the_best_block_is_that_whose_mean_key_is_like_the_mean_query():
    shape = Shape(640, 640, heads=4, kv_heads=2, head_dim=64)
    generator = torch.Generator().manual_seed(0)
    key = torch.randn(1, 2, 640, 64, generator=generator)
    wanted = torch.randint(1, 7, (4,), generator=generator)
    query = torch.randn(1, 4, 640, 64, generator=generator) * 0.01
    for head, block in enumerate(wanted.tolist()):
        query[0, head, 576:] += key[0, head // 2, block * 64 : block * 64 + 64].mean(0) * 10
    inputs = structured_inputs(shape, 0)._replace(query=query, key=key)
    found = kept(inputs, replace(SMALL, rule=TopK(blocks=1)))
    for head, block in enumerate(wanted.tolist()):
        assert found[0, head, 9].nonzero()[:, 0].tolist() == sorted({0, block, 8, 9})  # sink and window too


def test_a_score_mod_is_left_out_and_said_so():
    inputs = structured_inputs(SHAPE, 1)
    config = replace(SMALL, rule=TopK(0.5))
    for program, reason in (("soft cap", "blocks are ranked without the score_mod"), ("documents", "")):
        mods = PROGRAMS[program](SHAPE, "cpu")
        stats = create_sale_block_mask(inputs.query, inputs.key, config, stats=True, **mods).stats
        assert stats.reason == reason


def test_options_are_checked_and_described():
    with pytest.raises(ValueError, match="blocks must be at least 1 blocks, got 0"):
        TopK(blocks=0)
    with pytest.raises(TypeError, match="blocks must be an int"):
        TopK(blocks=2.0)
    assert TopK().describe() == "top_k: a share of the blocks, by means"
    assert TopK(blocks=100).describe() == "top_k: 100 of the blocks, by means"
