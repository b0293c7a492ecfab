# SPDX-License-Identifier: BSD-3-Clause
"""Stored scores say what the rules decide, exactly, at every step of the ladder."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sale_flex import SaleConfig
from sale_flex.blocks.bits import unpack_bits
from sale_flex.call.facts import check_arguments, settle
from sale_flex.call.index_lists import Room
from sale_flex.call.stages import lay_out
from sale_flex.call.user_mods import UserMods
from sale_flex.ops.fallback import mass
from sale_flex.selection.rules.ladder import LADDER, scores_of, steps_reached
from sale_flex.selection.rules.mass_scores import _eighths, _mass_limits
from sale_flex.testing import Shape, structured_inputs
from sale_flex.testing.programs import PROGRAMS
from sale_flex.testing.strategies import calls, seeds

STEPS = (0.0, *LADDER)


PLAIN = UserMods()


def settled(query, key, config, mods=PLAIN, q_offset=None, kv_range=None):
    """A call with room for every block in its index lists."""
    call = settle(check_arguments(query, key, None, config, mods, q_offset, kv_range, None, None))
    return call._replace(room=Room(*[call.grid.key_blocks] * len(Room._fields)))


def hits(query, key, config, threshold, **where):
    """The rule's own hits at one threshold, bool ``[B, Hq, nq, nk]``."""
    call = settled(query, key, config.with_threshold(threshold), **where)
    return unpack_bits(call.rule.select(call, call.rule.codes(call), lay_out(call)).hits, call.grid.key_blocks)


def test_the_ladder_has_eight_steps_to_an_octave_that_floats_hold_exactly():
    assert list(LADDER) == sorted(set(LADDER))
    assert (LADDER[0], LADDER[-1], len(LADDER)) == (2**-14, 1.0, 8 * 14 + 1)
    assert torch.tensor(LADDER).tolist() == list(LADDER)
    # Levels are a float's upper bits: none of a step's lower 20 bits is set.
    assert not (torch.tensor(LADDER).view(torch.int32) & (2**20 - 1)).any()


@given(calls(max_tokens=700, max_window=40), seeds(), st.data())
def test_scores_are_the_rules_hits(call, seed, data):
    shape, config = call
    query, key, _ = structured_inputs(shape, seed)
    query = query * data.draw(st.floats(0.1, 3), "amplitude")
    if data.draw(st.booleans(), "with non-finite"):
        query[0, 0, seed % shape.q_len, 0] = torch.inf
        key[0, 0, seed % shape.kv_len, 0] = torch.nan
    positions = shape.positions()
    call = settled(query, key, config, **positions)
    scores = call.rule.scores(call)
    for step in {0, len(STEPS) - 1, *data.draw(st.sets(st.integers(0, len(STEPS) - 1), max_size=8), "steps")}:
        assert torch.equal(scores >= STEPS[step], hits(query, key, config, STEPS[step], **positions))


UNDER_MODS = {
    "mass": {"threshold": 0.02},
    "moments": {"sub_block": 8, "pool_mode": "mean", "bits": 4},
    "relative": {"rule": "relative", "bits": 8},
}


@pytest.mark.parametrize("rule", UNDER_MODS)
@pytest.mark.parametrize(
    "program",
    [
        "everything",
        "documents",
        "soft cap",
        "rough relative bias",
        "a user's score",
        "a user's mask by head",
        "a finer block mask",
        "soft cap in documents",
    ],
)
def test_scores_under_mods_are_the_rules_hits(program, rule):
    shape = Shape(500, 500, batch=2, heads=4, kv_heads=2, head_dim=32, kv_range=((0, 500), (37, 490)))
    query, key, _ = structured_inputs(shape, 3)
    query[0, 1, 300, 0] = torch.inf
    key[1, 0, 111, 0] = torch.nan
    mods = UserMods(**PROGRAMS[program](shape, "cpu"))
    config = SaleConfig.from_options(min_length=0, sink_tokens=4, local_tokens=16, **UNDER_MODS[rule])
    where = {"mods": mods, "kv_range": shape.positions()["kv_range"]}
    call = settled(query, key, config, **where)
    scores = call.rule.scores(call, lay_out(call))
    assert len(scores.unique()) > 20
    for step in (0.0, *LADDER[::9], 1.0):
        assert torch.equal(scores >= step, hits(query, key, config, step, **where))


@given(seeds(), st.integers(1, 40))
def test_limits_of_masses_are_the_decisions(seed, octaves):
    # Any sums, beyond the levels' range too, as no call would give them.
    generator = torch.Generator().manual_seed(seed)
    sums = (torch.rand(1, 30, 1, 20, generator=generator) * 2 - 1).mul(octaves).exp2()
    finite = torch.rand(1, 30, 1, generator=generator) < 0.9
    flagged = torch.zeros(20, dtype=torch.bool)
    candidate = torch.ones(1, 30, 1, 20, dtype=torch.bool)
    exact = (torch.rand(1, 30, 1, generator=generator) < 0.9).float()
    masses = mass.Masses(torch.arange(20), sums, finite, candidate, exact, torch.zeros(1, 30, 20, dtype=torch.bool))
    found = scores_of(steps_reached(_eighths(sums), _mass_limits(sums, finite, exact))).amax(2)
    for step in STEPS:
        hit, _ = mass.decide(masses, flagged, torch.full((1, 1, 1), step), 20)
        assert torch.equal(found >= step, hit)


# At the larger amplitude masses go beyond the levels' range, and some blocks have nearly all of a row's.
@pytest.mark.parametrize("amplitude", [1.0, 8.0])
@pytest.mark.parametrize("metric", ["mass", "relative"])
def test_every_step_of_a_call_that_uses_many(metric, amplitude):
    shape = Shape(1024, 1024, heads=2, head_dim=32)
    query, key, _ = structured_inputs(shape, 3)
    query = query * amplitude
    config = SaleConfig.from_options(metric, bits=8, min_length=0, sink_tokens=0, local_tokens=8)
    call = settled(query, key, config)
    scores = call.rule.scores(call)
    assert len(scores.unique()) > 20
    for step in STEPS:
        assert torch.equal(scores >= step, hits(query, key, config, step))
