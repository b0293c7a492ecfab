# SPDX-License-Identifier: BSD-3-Clause
"""FlexPrefill: sums of the last rows' softmax, and the blocks that are made of them, against the reference."""

import itertools
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st

from sale_flex import FlexPrefill, SaleConfig, create_sale_block_mask, ops, reference
from sale_flex.blocks.bits import unpack_bits
from sale_flex.blocks.mask_spec import causal_spec
from sale_flex.call.facts import Call, check_arguments, settle
from sale_flex.call.user_mods import UserMods
from sale_flex.config import BLOCK_SIZES
from sale_flex.kernels.arguments import Grid
from sale_flex.selection.rules import flexprefill_levels
from sale_flex.selection.rules.ladder import LADDER
from sale_flex.testing import Inputs, Shape, block_map, gamma, logit_error_bound, random_inputs, structured_inputs
from sale_flex.testing.programs import PROGRAMS
from sale_flex.testing.strategies import seeds, shapes

SHAPE = Shape(640, 640, heads=4, kv_heads=2, head_dim=32)
CONFIG = SaleConfig(FlexPrefill(min_budget=64, last=100), min_length=0, sink_tokens=0, local_tokens=1)


@st.composite
def configs(draw: st.DrawFn) -> SaleConfig:
    """Options that suit prompts of some hundred tokens."""
    least = draw(st.sampled_from([1, 32, 64, 100, 200]))
    rule = FlexPrefill(
        draw(st.sampled_from([0.0, 0.01, 0.05, 0.2, 0.5, 0.9, 1.0, 3.0])),
        tau=draw(st.sampled_from([0.0, 0.1, 0.4, 0.6, 1.0])),
        min_budget=least,
        max_budget=draw(st.none() | st.integers(least, 400)),
        last=draw(st.sampled_from([1, 17, 64, 128, 300])),
    )
    block_size = draw(st.sampled_from(BLOCK_SIZES))
    return replace(CONFIG, rule=rule, block_size=block_size, sink_tokens=draw(st.integers(0, 8)))


def exact_inputs(shape: Shape, seed: int) -> Inputs:
    """Structured inputs in sixteenths: float32 holds sums of them and of their products exactly."""
    return Inputs(*((x * 16).round() / 16 for x in structured_inputs(shape, seed)))


def error_bound(inputs: Inputs, config: SaleConfig, scored: bool = False) -> float:
    """How far float32 may move a share of the softmax of `exact_inputs`, or a sum of shares, in nats.

    Twice the error of a logit, which is that of a product of means that are rounded themselves, and of subtracting the
    maximum; sums over keys and over rows. Mods here multiply a logit's error by 4 at most, and add a few roundings of
    numbers that are no larger than a distance.
    """
    query, key = (torch.where(x.isfinite(), x, 0.0) for x in (inputs.query, inputs.key))
    dim = query.shape[3]
    logit = float(logit_error_bound(query, key).max()) / gamma(dim + 2) * gamma(dim + 6)
    if scored:
        logit = 4 * logit + key.shape[2] * gamma(4)
    return 2 * logit + gamma(key.shape[2] + config.rule.last + 40)


def check(inputs: Inputs, config: SaleConfig, **options: object) -> SimpleNamespace:
    """Assert that the reference's blocks are kept, but for some at the edge; blocks kept, asked about, and unsure."""
    kept = block_map(create_sale_block_mask(inputs.query, inputs.key, config, **options)).kept
    expected = reference.keep_map(inputs.query, inputs.key, config, dtype=torch.float64, **options)
    asked = (expected.visible & ~expected.always).expand_as(kept)
    unsure = asked & (expected.margin.abs() <= error_bound(inputs, config, "score_mod" in options))
    assert torch.equal(kept | unsure, expected.kept | unsure)
    return SimpleNamespace(kept=kept, asked=asked, unsure=unsure)


@settings(max_examples=60)
@given(shapes(max_tokens=640, min_tokens=64, groups=(1, 2, 3), head_dims=(32,)), seeds(), configs())
def test_blocks_are_those_of_the_reference(shape, seed, config):
    found = check(exact_inputs(shape, seed), config, **shape.positions())
    some = (found.kept & found.asked).any() and (~found.kept & found.asked).any()
    event(f"some kept, some not: {bool(some)}, unsure: {bool(found.unsure.any())}")


def test_few_blocks_are_unsure():
    found = [
        check(exact_inputs(SHAPE, seed), replace(CONFIG, rule=replace(CONFIG.rule, tau=tau), block_size=block))
        for seed, tau, block in itertools.product(range(3), (0.0, 0.4), BLOCK_SIZES)
    ]
    asked, unsure, kept = (
        sum(int(x.sum()) for x in xs) for xs in zip(*((f.asked, f.unsure, f.kept & f.asked) for f in found))
    )
    assert unsure < 0.1 * asked
    assert 0.2 * asked < kept < 0.8 * asked


@pytest.mark.parametrize("program", PROGRAMS)
def test_under_mods_blocks_are_those_of_the_reference(program):
    shape = replace(SHAPE, q_len=500, kv_range=((9, 640),), kv_len=640)
    for config in (CONFIG, replace(CONFIG, rule=replace(CONFIG.rule, tau=0.5), block_size=(128, 64))):
        options = PROGRAMS[program](shape, "cpu")
        check(exact_inputs(shape, 2), config, **shape.positions(), **options)


def test_a_score_mod_is_left_out_of_pooled_logits_and_the_summary_says_so():
    inputs = structured_inputs(SHAPE, 2)
    for program, said in (("alibi", True), ("window", False)):
        options = PROGRAMS[program](SHAPE, "cpu")
        stats = create_sale_block_mask(inputs.query, inputs.key, CONFIG, stats=True, **options).stats
        assert ("pooled queries and keys meet without the score_mod" in (stats.reason or "")) is said


@given(shapes(max_tokens=400, groups=(1, 3), head_dims=(32, 80)), seeds(), st.sampled_from([1, 40, 128]))
def test_sums_are_those_of_the_reference(shape, seed, last):
    inputs = exact_inputs(shape, seed)
    config = replace(CONFIG, rule=replace(CONFIG.rule, last=last))
    call = reference.make_call(inputs.query, inputs.key, config, dtype=torch.float64, **shape.positions())
    expected = reference.last_row_sums(call, reference.last_rows(call, last), 64)
    span = expected.slash.shape[-1]
    spec, grid = causal_spec(call.bounds), Grid(shape.q_len, shape.kv_len, 64, 64)
    for length in (span, span // 2):
        got = ops.last_row_sums(inputs.query, inputs.key, spec, spec.mask, call.scale, grid, last, length)
        within = math.expm1(error_bound(inputs, config))
        torch.testing.assert_close(got[0].double(), expected.vertical, rtol=within, atol=1e-30)
        torch.testing.assert_close(got[1].double(), expected.slash[..., :length], rtol=within, atol=1e-30)


def settled(inputs: Inputs, config: SaleConfig, **options: object) -> Call:
    given = check_arguments(
        inputs.query, inputs.key, None, config, UserMods(), options.get("q_offset"), options.get("kv_range"), None, None
    )
    return settle(given)


@settings(max_examples=15)
@given(shapes(max_tokens=500, min_tokens=64, groups=(1, 2), head_dims=(32,)), seeds(), configs(), st.data())
def test_scores_say_at_which_thresholds_a_block_is_kept(shape, seed, config, data):
    inputs = structured_inputs(shape, seed)
    call = settled(inputs, config, **shape.positions())
    scores = call.rule.scores(call)
    steps = data.draw(st.lists(st.sampled_from([0.0, *LADDER]), min_size=shape.heads, max_size=shape.heads))
    steps = torch.tensor(steps)
    at = settled(inputs, config.with_threshold(steps), **shape.positions())
    hits = unpack_bits(at.rule.select(at, (), None).hits, at.grid.key_blocks)
    assert torch.equal(hits, scores >= steps[:, None, None])
    assert (scores >= 0).all()


@settings(max_examples=15)
@given(shapes(max_tokens=500, min_tokens=64, groups=(1, 2), head_dims=(32,)), seeds(), configs(), st.data())
def test_a_higher_threshold_never_adds_a_block_and_0_is_dense(shape, seed, config, data):
    query, key, _ = structured_inputs(shape, seed)
    low, high = sorted(data.draw(st.tuples(st.floats(0, 1.2), st.floats(0, 1.2)), label="thresholds"))
    some, fewer, every = (
        block_map(create_sale_block_mask(query, key, config.with_threshold(t), **shape.positions())).kept
        for t in (low, high, 0.0)
    )
    assert not (fewer & ~some).any()
    visible = reference.keep_map(query, key, config.with_threshold(0.0), **shape.positions()).visible
    assert torch.equal(every, visible.expand_as(every))


def planted() -> Inputs:
    """1,024 tokens that look at key 200 and at keys 400 behind them, and nowhere else."""
    angle = torch.arange(1024)[:, None] * torch.tensor([1.0, 0.37, 0.11, 0.029])
    turn = torch.cat([angle.cos(), angle.sin()], -1)
    ahead = torch.cat([(angle - 400 * angle[1]).cos(), (angle - 400 * angle[1]).sin()], -1)
    query, key = torch.zeros(1, 1, 1024, 32), torch.zeros(1, 1, 1024, 32)
    query[..., :8], key[..., :8] = 60 * ahead, turn
    query[..., 8], key[0, 0, 200] = 1.0, 0.0
    key[0, 0, 200, 8] = 241.5
    return Inputs(query, key, key)


@pytest.mark.parametrize("block", BLOCK_SIZES)
def test_a_vertical_and_a_slash_are_found(block):
    inputs = planted()
    config = replace(CONFIG, rule=FlexPrefill(0.6, tau=0.0, min_budget=2 * block[1]), block_size=block)
    kept = block_map(create_sale_block_mask(inputs.query, inputs.key, config)).kept[0, 0]
    row, column = (torch.arange(1024 // size) for size in block)
    # The first and 200's, and the diagonal's and that of distances from 384 on.
    expected = (column == 0) | (column == 200 // block[1])
    for distance in (0, 400 // block[1] * block[1]):
        low, high = (row * block[0] - distance) // block[1], (row * block[0] + block[0] - 1 - distance) // block[1]
        expected = expected | ((column >= low[:, None]) & (column <= high[:, None]))
    visible = column * block[1] <= row[:, None] * block[0] + block[0] - 1
    assert torch.equal(kept, expected & visible)


def test_a_query_aware_head_keeps_what_its_pooled_map_points_to():
    # Every block of queries looks at its own block of keys, far away.
    inputs = random_inputs(Shape(1024, 1024, head_dim=32), 0, amplitude=0.01)
    for block in range(16):
        inputs.query[:, :, block * 64 : block * 64 + 64, block // 2] += 30
        inputs.key[:, :, block * 64 : block * 64 + 64, block] += 30
    by_tau = {}
    for tau in (0.0, 1.0):
        config = replace(CONFIG, rule=FlexPrefill(0.1, tau=tau, min_budget=64))
        by_tau[tau] = block_map(create_sale_block_mask(inputs.query, inputs.key, config)).kept[0, 0]
    row = torch.arange(16)
    assert by_tau[1.0][row, row // 2].all()
    assert not by_tau[0.0][row, row // 2].all()
    assert by_tau[1.0].sum() == by_tau[1.0].tril().sum() <= 3 * 16


def test_budgets_are_kept():
    inputs = random_inputs(Shape(1024, 1024, heads=2, head_dim=32), 1, amplitude=0.1)
    for most in (128, 256, 512):
        rule = FlexPrefill(0.05, tau=0.0, min_budget=64, max_budget=most)
        kept = block_map(create_sale_block_mask(inputs.query, inputs.key, replace(CONFIG, rule=rule))).kept
        # A softmax that is spread evenly asks for all there are.
        assert (kept[:, :, -1].sum(-1) <= 2 * most // 64).all()
        assert (kept[:, :, -1].sum(-1) >= most // 64).all()
    few = FlexPrefill(1.0, tau=0.0, min_budget=320)
    kept = block_map(create_sale_block_mask(inputs.query, inputs.key, replace(CONFIG, rule=few))).kept
    assert (kept[:, :, -1].sum(-1) >= 5).all()


@pytest.mark.parametrize("special", [torch.nan, torch.inf])
def test_what_is_not_finite_keeps_what_it_sees_and_nobody_else_minds(special):
    shape = Shape(700, 700, heads=4, kv_heads=2, head_dim=32)
    inputs = exact_inputs(shape, 0)
    config = replace(CONFIG, rule=replace(CONFIG.rule, tau=0.5))
    query, key = inputs.query.clone(), inputs.key.clone()
    query[0, 1, 330], query[0, 1, 690], key[0, 1, 200, 5] = special, special, special
    kept = check(inputs._replace(query=query, key=key), config).kept
    assert kept[0, 1, 5, :6].all()
    assert kept[0, 1, 10].all()
    assert kept[0, 2:, 3:, 3].all()
    before = block_map(create_sale_block_mask(inputs.query, inputs.key, config)).kept
    assert torch.equal(kept[0, 0], before[0, 0])
    query[0, 1, 600:] = special
    kept = check(inputs._replace(query=query, key=key), config).kept
    assert torch.equal(kept[0, 1], torch.ones(11, 11).tril().bool())


def test_strips_of_heads_choose_as_all_heads_at_once(monkeypatch):
    inputs = structured_inputs(replace(SHAPE, heads=6, kv_heads=2), 4)
    config = replace(CONFIG, rule=replace(CONFIG.rule, tau=0.4))
    options = PROGRAMS["a user's mask by head"](replace(SHAPE, heads=6), "cpu")
    expected = block_map(create_sale_block_mask(inputs.query, inputs.key, config, **options)).kept
    for heads, strips in ((1, 6), (2, 6), (3, 2), (5, 2)):
        monkeypatch.setattr(flexprefill_levels, "STRIP_ELEMENTS", heads * 640 * 32)
        call = settled(inputs, config)
        share = 1 - call.threshold.double()[:, None]
        assert len(list(flexprefill_levels.kept_levels(call.rule, call, None, share))) == strips
        assert torch.equal(
            block_map(create_sale_block_mask(inputs.query, inputs.key, config, **options)).kept, expected
        )


def test_later_tokens_change_what_earlier_rows_keep():
    query, key, _ = structured_inputs(SHAPE, 3)
    whole = block_map(create_sale_block_mask(query, key, CONFIG)).kept
    part = block_map(create_sale_block_mask(query[:, :, :512], key[:, :, :512], CONFIG)).kept
    assert not torch.equal(whole[:, :, :8, :8], part)


def test_one_program_without_a_graph_break_serves_all_lengths():
    torch._dynamo.reset()
    config = replace(CONFIG, rule=replace(CONFIG.rule, tau=0.4))
    programs = []

    def bits(query, key):
        call = settled(Inputs(query, key, key), config)
        return call.rule.select(call, (), None).hits

    def backend(module, inputs):
        programs.append(module)
        return module

    compiled = torch.compile(bits, fullgraph=True, backend=backend, dynamic=True)
    for length in (640, 513):
        query, key, _ = structured_inputs(replace(SHAPE, q_len=length, kv_len=length), 3)
        assert torch.equal(compiled(query, key), bits(query, key))
    assert len(programs) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tau": -0.1}, r"tau must be from 0 to 1, got -0.1"),
        ({"tau": 1.5}, r"tau must be from 0 to 1, got 1.5"),
        ({"tau": float("nan")}, r"tau must be from 0 to 1, got nan"),
        ({"min_budget": 0}, r"min_budget must be at least 1 tokens, got 0"),
        ({"max_budget": 1000}, r"max_budget must be at least 1024 tokens \(min_budget\), got 1000"),
        ({"last": 0}, r"last must be at least 1 rows, got 0"),
        ({"threshold": -1.0}, r"threshold must be 0 or more"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        FlexPrefill(**options)


@pytest.mark.parametrize("options", [{"tau": "0.1"}, {"tau": True}, {"min_budget": 1.5}, {"last": True}])
def test_options_of_another_type(options):
    with pytest.raises(TypeError, match=rf"{next(iter(options))} must be"):
        FlexPrefill(**options)
