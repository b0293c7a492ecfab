# SPDX-License-Identifier: BSD-3-Clause
"""What the mass rule promises: of its formula in exact arithmetic, and of the hits that 4 and 8 bits make of it."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import event, given
from hypothesis import strategies as st
from plain_harness import near_of, plain_mass_hits
from torch import Tensor

from sale_flex import Mass, SaleConfig, reference
from sale_flex.blocks.bits import unpack_bits
from sale_flex.ops.fallback import mass, moments
from sale_flex.testing import (
    Inputs,
    Shape,
    gamma,
    mass_error_bound,
    moment_error_bound,
    plant_needle,
    random_inputs,
    structured_inputs,
)
from sale_flex.testing.strategies import configs, seeds, shapes, thresholds

SIZES = (1, 2, 4, 8, 16, 32, 64)
WHOLE = shapes(max_tokens=500, min_tokens=300, batch=1, groups=(1, 2), head_dims=(32,), chunked=False)
CONFIGS = configs(kinds=(Mass,), max_min_length=0, max_window=24)


def of(inputs: Inputs, config: SaleConfig, shape: Shape | None = None, **sizes: int) -> SimpleNamespace:
    """What the functions of the rule take; `sizes` replace options, also by what a `SaleConfig` refuses."""
    where = {} if shape is None else shape.positions()
    call = reference.make_call(inputs.query, inputs.key, config, **where, dtype=torch.float64)
    return SimpleNamespace(
        call=call,
        query=call.query,
        key=call.key,
        mean=call.mean,
        bounds=call.bounds,
        options=reference.mass_options(config)._replace(**sizes),
        threshold=torch.as_tensor(config.rule.threshold, dtype=torch.float32)
        .expand(inputs.query.shape[1])
        .contiguous(),
        scale=call.scale,
        near=near_of(config),
        blocks=-(-inputs.key.shape[2] // config.block_size[1]),
    )


def row_masses(s: SimpleNamespace, quantised: bool, dtype: torch.dtype = torch.float64) -> reference.RowMasses:
    return reference.row_masses(s.call._replace(dtype=dtype), s.options, quantised=quantised)


def hits(s: SimpleNamespace, budget: int | None = None) -> tuple[Tensor, Tensor]:
    """Which candidates are hit, bool ``[B, Hq, nq, nk]``, and how many hits the budget costs."""
    o = s.options
    codes = moments.quantize_moments(s.key, s.mean, s.bounds, o.block_size[1], o.sub_block, o.bits)
    words, dropped = plain_mass_hits(
        mass, s.query, s.key, s.mean, codes, s.bounds, s.threshold, s.scale, o, s.near,
        s.blocks if budget is None else budget,
    )  # fmt: skip
    return unpack_bits(words, s.blocks) & candidates(s), dropped


def candidates(s: SimpleNamespace) -> Tensor:
    """bool ``[B, 1, nq, nk]``: blocks of valid keys alone that are not kept in any case."""
    first = torch.arange(s.blocks) * s.options.block_size[1]
    return s.call.candidate & (first >= s.bounds[:, 1:2])[:, None, None]


def by_block(s: SimpleNamespace, x: Tensor) -> Tensor:
    """Largest of a query block's pooled rows: ``[B, H, np, nk]`` to ``[B, H, nq, nk]``."""
    return x.unflatten(2, (-1, s.options.block_size[0] // s.options.pool)).amax(3)


@given(WHOLE, seeds(), CONFIGS, st.booleans())
def test_a_rows_shares_sum_to_one(shape, seed, config, quantised):
    # Up to the sum over blocks and two roundings a share.
    s = of(structured_inputs(shape, seed), config, shape)
    for dtype, unit in ((torch.float32, gamma(2 * s.blocks + 4)), (torch.float64, 1e-13)):
        masses = row_masses(s, quantised, dtype)
        assert masses.mass.isfinite().all()
        assert ((masses.mass.sum(-1) + masses.rest - 1).abs() <= unit).all()


@given(WHOLE, seeds(), CONFIGS, st.sampled_from(SIZES))
def test_without_codes_moments_of_equal_keys_are_exact(shape, seed, config, sub_block):
    sub_block = min(sub_block, config.block_size[1])
    inputs = structured_inputs(shape, seed)
    # Sub-blocks of one key are equal keys too: there the formula is the scan.
    key = inputs.key[:, :, ::sub_block].repeat_interleave(sub_block, 2)[:, :, : shape.kv_len]
    s = of(inputs._replace(key=key), config, shape, sub_block=sub_block)
    masses, exact = row_masses(s, quantised=False), reference.exact_masses(s.call, s.options)
    torch.testing.assert_close(masses.mass, exact * masses.candidate, rtol=1e-9, atol=0)
    rest = (exact * ~masses.candidate).sum(-1)
    seen = exact.sum(-1) > 0  # not padding
    torch.testing.assert_close(masses.rest[seen], rest[seen], rtol=1e-9, atol=0)


@given(WHOLE, seeds(), CONFIGS, st.sampled_from([1, 8]), st.floats(-3, 3))
def test_without_codes_a_constant_added_to_every_key_changes_nothing(shape, seed, config, sub_block, size):
    # Every logit of a row moves by the same number, and without smoothing nothing hides that.
    inputs = structured_inputs(shape, seed)
    config = replace(config, smooth_tokens=0)
    shift = size * random_inputs(Shape(1, 1, head_dim=shape.head_dim), seed + 1).key
    before, after = (
        row_masses(of(inputs._replace(key=key), config, shape, sub_block=sub_block), quantised=False)
        for key in (inputs.key.double(), inputs.key.double() + shift.double())
    )
    torch.testing.assert_close(after.mass, before.mass, rtol=1e-9, atol=1e-15)


@given(WHOLE, seeds(), CONFIGS, st.floats(1.0, 1e9), st.integers(0, 3))
def test_a_threshold_of_one_hits_nothing_and_of_zero_everything(shape, seed, config, one, budget):
    inputs = structured_inputs(shape, seed)
    found, dropped = hits(of(inputs, config.with_options(threshold=one), shape), budget)
    assert not found.any()
    assert not dropped.any()
    s = of(inputs, config.with_options(threshold=0.0), shape)
    assert torch.equal(hits(s)[0], candidates(s).expand_as(found))


@given(WHOLE, seeds(), CONFIGS, thresholds(most=1.5), thresholds(most=1.5))
def test_a_higher_threshold_never_adds_a_hit(shape, seed, config, one, other):
    inputs = structured_inputs(shape, seed)
    low, high = (hits(of(inputs, config.with_options(threshold=t), shape))[0] for t in sorted((one, other)))
    assert not (high & ~low).any()


@given(WHOLE, seeds(), CONFIGS, st.floats(1e-4, 0.1))
def test_a_margin_is_how_far_masses_may_move(shape, seed, config, nats):
    s = of(structured_inputs(shape, seed), config, shape)
    masses = row_masses(s, quantised=True)
    generator = torch.Generator().manual_seed(seed)
    sums, total = (
        x * (nats * (2 * torch.rand(x.shape, generator=generator) - 1)).exp() for x in (masses.sums, masses.total)
    )
    before, after = (
        reference.decide(
            x, s.threshold[:, None], torch.tensor(False), s.options.block_size[0] // s.options.pool, budget=None
        )
        for x in (masses, masses._replace(sums=sums, total=total))
    )
    assert ((before.hit == after.hit) | (before.margin.abs() <= nats)).all()
    assert torch.equal(before.hit, (before.margin > 0) | (before.hit & (before.margin == 0)))
    event(f"decided otherwise: {bool((before.hit != after.hit).any())}")


def share_bounds(s: SimpleNamespace) -> tuple[Tensor, Tensor]:
    """Least estimates that codes allow of candidates' shares, and exact ones, ``[B, Hq, np, nk]`` each.

    For a formula that is exact, as of single keys or equal ones. With estimates off by e nats each, a block's share is
    at least ``A / (1 + B + A)``: A its sub-blocks at their least, B the others at their most.
    """
    o = s.options
    pooled = reference.pool_rows(s.query, s.bounds, o.block_size[0], o.pool, o.sample)
    of_keys = reference.key_moments(s.key, s.mean, s.bounds, o.block_size[1], o.sub_block, torch.float64)
    codes = reference.quantize_moments(s.key, s.mean, s.bounds, o.block_size[1], o.sub_block, o.bits)
    error = moment_error_bound(pooled, *of_keys, codes, s.scale, o.bits)
    masses = row_masses(s, quantised=False)
    logits = reference.moment_logits(pooled, *of_keys, o.sub_block, s.scale) - masses.unit[..., None] * math.log(2)
    # Cut off at 100 octaves: a block up there is hit whatever its share.
    logits = logits.clamp_max(100 * math.log(2))
    least, most = (
        x.exp().unflatten(-1, (s.blocks, -1)).sum(-1) * masses.candidate for x in (logits - error, logits + error)
    )
    return least / (1 + most.sum(-1, keepdim=True) - most + least), masses.mass


@given(
    shapes(max_tokens=500, min_tokens=200, batch=1, groups=(1, 3), chunked=False, padded=False),
    seeds(),
    configs(kinds=(Mass,), bits=(8,), max_min_length=0, max_window=16),
    st.floats(5, 40),
    st.data(),
)
def test_a_scan_hits_what_codes_cannot_hide(shape, seed, config, logit, data):
    """Needles: a share that is over the threshold with every code at its worst is hit."""
    config = config.with_options(sub_block=1)
    column = data.draw(st.integers(0, shape.kv_len // 3), label="needle")
    first = data.draw(st.integers(shape.kv_len // 2, shape.kv_len - 1), label="first row that looks for it")
    inputs = random_inputs(shape, seed, amplitude=0.7)
    for row in range(first, min(first + 16, shape.kv_len)):
        inputs = plant_needle(inputs, query=row, key=column, logit=logit, seed=seed)
    s = of(inputs, config, shape)
    least, exact = share_bounds(s)
    edge = s.threshold[:, None, None] * math.exp(mass_error_bound(s.query, s.key))  # cuts are rounded down
    found, _ = hits(s)
    clear = by_block(s, (least > edge).float()) > 0
    assert not (clear & ~found).any()
    doubtful = by_block(s, ((exact > 2 * edge) & ~(least > edge)).float()) > 0
    event(f"blocks: {bool(clear.any())}, of twice the threshold that codes may hide: {bool(doubtful.any())}")


@pytest.mark.parametrize("pool", [1, 4])
def test_a_scan_in_eight_bits_finds_every_needle_of_twice_the_threshold(pool):
    config = SaleConfig(
        Mass.fast(threshold=0.02, pool=pool, sub_block=1, bits=8), sink_tokens=8, local_tokens=16, min_length=0
    )
    needles = 0
    for seed in range(4):
        inputs = random_inputs(Shape(640, 640, heads=2, head_dim=64), seed, amplitude=0.7)
        for row in range(600, 600 + pool):
            inputs = plant_needle(inputs, query=row, key=300, logit=6.0 + 6 * seed, seed=seed)
        s = of(inputs, config)
        least, exact = share_bounds(s)
        wanted = exact > 2 * config.rule.threshold
        edge = config.rule.threshold * math.exp(mass_error_bound(s.query, s.key))
        assert (least[wanted] > edge).all()  # the guarantee holds for all of them
        assert not ((by_block(s, wanted.float()) > 0) & ~hits(s)[0]).any()
        needles += int(wanted[0, 0, 600 // pool, 300 // 64])
    assert needles == 4


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("sub_block", [1, 8])
def test_logits_of_200_nats_neither_overflow_nor_lose_a_block(bits, sub_block):
    shape = Shape(640, 640, heads=4, kv_heads=2, head_dim=64)
    clear_blocks = 0
    for seed in range(3):
        inputs = random_inputs(shape, seed)
        key = inputs.key[:, :, ::sub_block].repeat_interleave(sub_block, 2)
        largest = (inputs.query @ key.repeat_interleave(2, 1).transpose(-1, -2)).abs().max() / 8
        rule = Mass.fast(threshold=0.01, pool=1, sub_block=sub_block, bits=bits)
        config = SaleConfig(rule, sink_tokens=8, local_tokens=16, min_length=0)
        s = of(inputs._replace(query=inputs.query * (200 / largest), key=key), config)
        masses = row_masses(s, quantised=True, dtype=torch.float32)
        assert masses.total.isfinite().all()
        assert masses.sums.max() > 1e20  # beyond what a sum over the prompt would have room for in 16 bits
        found, _ = hits(s)
        least, exact = share_bounds(s)
        saturated = masses.sums >= 2.0**100
        clear = (least > 0.011) | (saturated & (exact > 0.01))
        assert not ((by_block(s, clear.float()) > 0) & ~found).any()
        clear_blocks += int(clear.sum())
    assert clear_blocks > 100


BUSY = shapes(max_tokens=700, min_tokens=400, batch=1, groups=(1, 2), head_dims=(32,), chunked=False)


@given(BUSY, seeds(), configs(kinds=(Mass,), max_min_length=0, max_window=12), st.floats(1e-4, 0.3), st.integers(0, 5))
def test_a_budget_keeps_the_largest_masses_and_counts_the_others(shape, seed, config, threshold, budget):
    s = of(structured_inputs(shape, seed), config.with_options(threshold=threshold), shape)
    everything, none_dropped = hits(s)
    found, dropped = hits(s, budget)
    assert not none_dropped.any()
    assert (found.sum(-1) <= budget).all()
    assert not (found & ~everything).any()
    assert torch.equal(dropped, (everything & ~found).sum(-1))
    # Masses decide, each of the row in which it is largest, in levels: both sides of a comparison are rounded to one.
    level = math.log(9 / 8)
    masses = by_block(s, row_masses(s, quantised=True).mass.log())
    within = 2 * mass_error_bound(s.query, s.key)
    most = masses.masked_fill(~(everything & ~found), -torch.inf).amax(-1)
    assert (masses.masked_fill(~found, torch.inf).amin(-1) >= most - level - within).all()
    ranked = torch.nn.functional.pad(masses.sort(-1, descending=True).values, (0, budget + 1), value=-torch.inf)
    assert found[everything & (masses > ranked[..., budget, None] + 3 * level + within)].all()
    event(f"dropped: {bool(dropped.any())}, kept: {bool(found[dropped > 0].any())}")


def test_blocks_of_equal_mass_are_kept_or_dropped_together():
    shape = Shape(640, 640, head_dim=32)
    x = random_inputs(shape, 0)
    key = torch.zeros_like(x.key)
    s = of(x._replace(key=key), SaleConfig(Mass.fast(threshold=0.0), sink_tokens=1, local_tokens=1, min_length=0))
    found, dropped = hits(s, 3)
    count = candidates(s).sum(-1)
    assert torch.equal(found.sum(-1), torch.where(count <= 3, count, 0))
    assert torch.equal(dropped, torch.where(count <= 3, 0, count))


def test_a_query_that_is_not_finite_asks_for_everything_first_to_be_given_up():
    inputs = structured_inputs(Shape(700, 700, heads=2, head_dim=32), 0)
    query = inputs.query.clone()
    query[0, 1, 640] = torch.nan
    config = SaleConfig(Mass.fast(threshold=0.2), sink_tokens=8, local_tokens=16, min_length=0)
    before, after = (of(x, config) for x in (inputs, inputs._replace(query=query)))
    found, _ = hits(after)
    assert torch.equal(found[:, 1, 10], candidates(after)[:, 0, 10])
    found[:, 1, 10] = hits(before)[0][:, 1, 10]
    assert torch.equal(found, hits(before)[0])
    within, dropped = hits(after, 4)
    assert (within.sum(-1) <= 4).all()
    assert dropped[0, 1, 10] == candidates(after)[0, 0, 10].sum() - within[0, 1, 10].sum()


@pytest.mark.parametrize("special", [torch.nan, torch.inf, 3e38])
def test_a_block_with_a_key_that_is_not_finite_is_hit_and_does_not_count(special):
    inputs = structured_inputs(Shape(700, 700, heads=4, kv_heads=2, head_dim=32), 0)
    key = inputs.key.clone()
    key[0, 1, 200, 5] = special  # 3e38 is finite, and its variance is not
    config = SaleConfig(Mass.fast(threshold=0.2), sink_tokens=8, local_tokens=16, min_length=0, smooth_tokens=0)
    before, after = (of(x, config) for x in (inputs, inputs._replace(key=key)))
    for budget in (None, 0, 2):
        found, _ = hits(after, budget)
        sees = candidates(after)[0, 0, :, 3]
        assert found[0, 2:, sees, 3].all()
        assert torch.equal(found[:, :2], hits(before, budget)[0][:, :2])  # the heads of the other KV head
        assert torch.equal(found[:, :, ~sees], hits(before, budget)[0][:, :, ~sees])
        found[..., 3] = False
        assert budget is None or (found.sum(-1) <= budget).all()
