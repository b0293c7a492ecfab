# SPDX-License-Identifier: BSD-3-Clause
"""The search of one attention call: the errors it measures, the steps it takes, and what it finds."""

from dataclasses import replace
from functools import cache

import pytest
import torch
from config_harness import as_rule
from hypothesis import given
from hypothesis import strategies as st

import sale_flex
from sale_flex import SaleConfig, mods
from sale_flex.calibration.goal import Goal
from sale_flex.calibration.search import Call, find_thresholds
from sale_flex.selection.rules.ladder import LADDER
from sale_flex.testing import Shape, structured_inputs

pytestmark = pytest.mark.usefixtures("uncompiled_attention")

SHAPE = Shape(512, 512, heads=4, kv_heads=2, head_dim=64)
CONFIG = SaleConfig(min_length=64, local_tokens=32)


OPTIONS = {"scores": {}, "scans": {"mask_mod": mods.sliding_window(300)}}


@cache
def brute_force(metric, name):
    """Errors of every head at 0 and at every step of the ladder, by `sale_attention`: name of the error -> ``[N, Hq]``.

    Kept, since it takes a hundred calls.
    """
    query, key, value = structured_inputs(SHAPE, 4)
    config, options = as_rule(CONFIG, metric), OPTIONS[name]
    call, found = Call(query, key, value, config, options), {"relative": [], "absolute": []}
    for step in (0.0, *LADDER):
        output = sale_flex.sale_attention(query, key, value, config.with_threshold(step), **options)
        for error, rows in found.items():
            rows.append(call.errors(output, error))
    return {error: torch.stack(rows) for error, rows in found.items()}


@pytest.mark.parametrize("metric", ["mass", "relative"])
@pytest.mark.parametrize("error", ["relative", "absolute"])
@pytest.mark.parametrize("name", OPTIONS)
def test_bisection_finds_the_largest_step_within_the_target(metric, error, name):
    errors = brute_force(metric, name)[error]
    # Where errors of consecutive steps straddle the target once only, the largest step is the one bisection ends at.
    target = errors[1:].flatten().quantile(0.7).item() * 1.001
    within = errors <= target
    assert (within[1:] <= within[:-1]).all(), "the case is meant to have errors that grow with the threshold"
    expected = torch.tensor((0.0, *LADDER))[within.sum(0) - 1]
    call = Call(*structured_inputs(SHAPE, 4), as_rule(CONFIG, metric), OPTIONS[name])
    found = find_thresholds(call, Goal(target, error))
    assert torch.equal(found, expected)
    assert len(found.unique()) > 1


def test_calls_with_sinks_are_searched():
    query, key, value = structured_inputs(SHAPE, 5)
    options = {"sink_logits": torch.linspace(-1.0, 3.0, 4), "scale": 0.1}
    call = Call(query, key, value, CONFIG, options)
    found = find_thresholds(call, Goal(0.05))
    measured = call.measure(CONFIG.with_threshold(found), "relative")
    assert (measured.errors <= 0.05).all()
    assert (measured.kept < measured.visible).all()


@pytest.mark.parametrize("error", ["relative", "absolute"])
def test_halving_is_the_papers(error):
    query, key, value = structured_inputs(SHAPE, 6)
    query = query * 2
    config = as_rule(CONFIG, "relative").with_options(sink_tokens=4, local_tokens=4)
    call = Call(query, key, value, config)

    def error_at(tau):
        output = sale_flex.sale_attention(query, key, value, config.with_threshold(tau))
        difference, dense = (each.double().abs().sum(-1).mean(2)[0] for each in (output - call.dense, call.dense))
        return difference / dense if error == "relative" else difference

    halved = torch.stack([error_at(0.008 / 2**n) for n in range(7)])
    target = halved.median().item() * 1.001
    expected = []
    for head in range(SHAPE.heads):
        tau, tries = torch.tensor(0.008), iter(halved[:, head])
        while not next(tries) <= target:
            tau = tau / 2
            if tau <= 1e-4:
                tau = torch.tensor(0.0)
                break
        expected.append(tau.item())
    assert find_thresholds(call, Goal(target, error, "halving")).tolist() == expected
    assert len(set(expected)) > 1


def test_steps_of_halving():
    steps = Goal(0.1, search="halving").steps()
    halved = [0.008 / 2**n for n in range(7)]
    assert halved[-1] > 1e-4 >= halved[-1] / 2
    assert torch.equal(steps.values, torch.tensor([0.0, *reversed(halved)]))
    assert torch.equal(steps.lower(torch.tensor([0.008, halved[-1], 0.0])), torch.tensor([0.004, 0.0, 0.0]))


@given(st.integers(0, len(LADDER)))
def test_lower_is_the_step_before(at):
    steps = Goal(0.1).steps()
    assert steps.lower(steps.values[at : at + 1]).item() == (0.0, *LADDER)[max(at - 1, 0)]


def test_a_head_whose_error_can_not_be_met_is_dense():
    # Dense attention in another order of sums is farther away than that.
    for search in ("bisection", "halving"):
        found = find_thresholds(Call(*structured_inputs(SHAPE, 4), CONFIG), Goal(1e-10, search=search))
        assert found.tolist() == [0.0] * SHAPE.heads


@pytest.mark.parametrize("options", [{}, {"mask_mod": mods.sliding_window(96)}], ids=["short", "window"])
def test_nothing_to_choose_is_no_threshold(options):
    query, key, value = structured_inputs(SHAPE, 4)
    config = replace(CONFIG, min_length=128 if options else 512)
    assert find_thresholds(Call(query, key, value, config, options), Goal(0.05)) is None


def test_errors_are_of_the_worst_batch_row_and_leave_padding_out():
    shape = replace(SHAPE, batch=2, kv_range=((100, 512), (0, 400)))
    query, key, value = structured_inputs(shape, 7)
    options = shape.positions()
    call = Call(query, key, value, CONFIG, options)
    output = sale_flex.sale_attention(query, key, value, CONFIG.with_threshold(0.1), **options)
    difference, dense = (output - call.dense).double().abs(), call.dense.double().abs()
    rows = [slice(100, 512), slice(0, 400)]
    relative = [difference[b, :, at].sum((1, 2)) / dense[b, :, at].sum((1, 2)) for b, at in enumerate(rows)]
    absolute = [difference[b, :, at].sum(-1).mean(-1) for b, at in enumerate(rows)]
    for error, expected in (("relative", relative), ("absolute", absolute)):
        # Both sum at most 412 * 64 positive float64 numbers of float32 inputs: 2**-53 a sum.
        torch.testing.assert_close(call.errors(output, error), torch.stack(expected).amax(0), rtol=1e-11, atol=0)


def test_a_row_that_is_all_padding_has_no_error():
    shape = replace(SHAPE, batch=2, kv_range=((0, 512), (512, 512)))
    query, key, value = structured_inputs(shape, 8)
    call = Call(query, key, value, CONFIG, shape.positions())
    alone = Call(query[:1], key[:1], value[:1], CONFIG)
    for error in ("relative", "absolute"):
        assert call.errors(call.dense, error).tolist() == [0.0] * 4
        found, expected = (find_thresholds(each, Goal(0.05, error)) for each in (call, alone))
        assert torch.equal(found, expected)


def test_outputs_that_are_not_finite_are_refused():
    query, key, value = structured_inputs(SHAPE, 4)
    value[0, 0, 5, 0] = torch.nan
    with pytest.raises(ValueError, match="dense output must be finite"):
        Call(query, key, value, CONFIG)


@pytest.mark.parametrize(
    ("given", "error", "match"),
    [
        ({"target": 0.0}, ValueError, "target must be above 0"),
        ({"target": float("nan")}, ValueError, "target must be above 0"),
        ({"target": "0.05"}, TypeError, "target must be a float"),
        ({"target": 0.1, "error": "mean"}, ValueError, r"error must be one of .*'mean'"),
        ({"target": 0.1, "search": "grid"}, ValueError, r"search must be one of .*'grid'"),
    ],
)
def test_goals_that_are_none(given, error, match):
    with pytest.raises(error, match=match):
        Goal(**given)
