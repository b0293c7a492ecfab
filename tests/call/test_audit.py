# SPDX-License-Identifier: BSD-3-Clause
"""The audit says what a choice missed: as the reference says, for every way to ask, and it acts on it."""

import math
from dataclasses import replace

import pytest
import torch
from config_harness import as_rule
from hypothesis import given
from hypothesis import strategies as st

from sale_flex import AuxRequest, Mass, SaleConfig, create_sale_block_mask, ops, reference, sale_attention
from sale_flex.blocks.bits import pack_bits
from sale_flex.blocks.mask_spec import Mod, causal_spec
from sale_flex.call.audit import WANTED
from sale_flex.kernels.arguments import Grid, Near
from sale_flex.testing import Shape, block_map, gamma, structured_inputs
from sale_flex.testing.programs import PROGRAMS
from sale_flex.testing.strategies import shapes

BLIND = SaleConfig(Mass(1.0), min_length=0, sink_tokens=4, local_tokens=16, smooth_tokens=50)
"""Keeps only what is always kept, so that everything that is wanted is missed."""


def bracket(query, key, scale) -> float:
    """Relative error of a share: of two exponentials of float32 logits, and of their sums."""
    largest = scale * float(query.float().norm(dim=-1).max() * key.float().norm(dim=-1).max())
    return math.expm1(2 * gamma(query.shape[3] + 2) * largest) + gamma(key.shape[2] + 8)


def assert_between(audit, low, high, error: float) -> None:
    """Assert that wanted and missed masses lie between those of thresholds a rounding error apart."""
    assert torch.equal(audit[..., 0] > 0, low.asked)
    for column, name in ((1, "wanted"), (2, "missed")):
        assert (audit[..., column] >= getattr(low, name) * (1 - error) - 1e-30).all()
        assert (audit[..., column] <= getattr(high, name) * (1 + error)).all()


@given(shape=shapes(max_tokens=400), block=st.sampled_from([(64, 64), (64, 32), (128, 128)]), data=st.data())
def test_rows_of_plain_calls_are_those_of_the_reference(shape, block, data):
    query, key, _ = structured_inputs(shape, 3)
    where = shape.positions()
    bounds = reference.make_bounds(shape.batch, shape.q_len, shape.kv_len, where["q_offset"], where["kv_range"])
    min_length = data.draw(st.sampled_from([0, 50]))
    config = replace(BLIND, block_size=block, min_length=min_length)
    expected = reference.keep_map(query, key, config, q_offset=where["q_offset"], kv_range=where["kv_range"])
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    hits = torch.rand(expected.kept.shape, generator=generator) < 0.5
    scale = shape.head_dim**-0.5
    grid, near = Grid(shape.q_len, shape.kv_len, *block), Near(config.sink_tokens, config.local_tokens, min_length)
    got = ops.audit_rows(query, key, pack_bits(hits), None, causal_spec(bounds), None, Mod(), scale, WANTED, grid, near)
    seen = reference.visible_elements(bounds, 1, shape.q_len, shape.kv_len)
    at = torch.arange(shape.q_len)[None] + bounds[:, :1]
    early = (at - bounds[:, 1:2] < min_length) & seen[:, 0].any(-1)
    padded = torch.nn.functional.pad(early, (0, -shape.q_len % block[0])).unflatten(-1, (-1, block[0]))
    early = padded.any(-1).repeat_interleave(block[0], 1)[:, None, : shape.q_len]
    error = bracket(query, key, scale)
    low, high = (
        reference.audit_rows(
            query, key, hits | expected.always, expected.always, seen, early, bounds, scale, block, None, least
        )
        for least in (WANTED * (1 + error), WANTED * (1 - error))
    )
    assert_between(got, low, high, error)


@pytest.mark.parametrize("program", PROGRAMS)
def test_rows_under_a_program_are_those_of_the_reference(program):
    shape = Shape(300, 300, batch=2, heads=4, kv_heads=2, head_dim=32)
    query, key, _ = structured_inputs(shape, 1)
    options = PROGRAMS[program](shape, "cpu")
    config = replace(BLIND, min_length=20)
    stats = create_sale_block_mask(query, key, config, stats=True, **options).stats
    mods = {name: options.get(name) for name in ("mask_mod", "block_mask")}
    causal = options.get("is_causal", True)
    if options.get("estimate_mods") == "ignore":
        pytest.skip("what the estimate does not see, the audit does not either")
    expected = reference.keep_map(query, key, config, score_mod=options.get("score_mod"), **mods, is_causal=causal)
    bounds = reference.make_bounds(shape.batch, shape.q_len, shape.kv_len, None, None)
    seen = reference.visible_elements(
        bounds, shape.heads, shape.q_len, shape.kv_len, mods["mask_mod"], mods["block_mask"], causal
    )
    key_at = torch.arange(shape.kv_len)
    first = torch.where(seen, key_at, 2**30).amin(-1)
    last = torch.where(seen, key_at, -1).amax(-1)
    error = bracket(query, key, shape.head_dim**-0.5)
    low, high = (
        reference.audit_rows(
            query, key, expected.kept, expected.always, seen, last - first < 20, bounds, shape.head_dim**-0.5,
            config.block_size, options.get("score_mod"), least,
        )
        for least in (WANTED * (1 - 4 * error), WANTED * (1 + 4 * error))
    )  # fmt: skip
    assert torch.equal(stats.audit.rows, low.asked.sum(-1))
    for total, name in ((stats.audit.wanted_mass, "wanted"), (stats.audit.missed_mass, "missed")):
        assert (total >= getattr(high, name).sum(-1) * (1 - 8 * error)).all()
        assert (total <= getattr(low, name).sum(-1) * (1 + 8 * error)).all()


def test_audited_positions_are_one_of_a_group_and_meet_every_place():
    positions = torch.tensor(reference.audited_positions(131072))
    assert [int((positions < end).sum()) for end in (4096, 8192, 32768)] == [64, 96, 192]
    assert torch.equal(positions[96:] // 256, 32 + torch.arange(480))
    assert set((positions % 64).tolist()) == set(range(64))
    # In whole, so that what is sampled (every 4th query) is not asked more than others.
    assert torch.bincount(positions % 4).float().std() < 10


@pytest.mark.parametrize(("q_len", "offset"), [(5000, 0), (500, 4000), (700, 7900), (300, 20000)])
def test_far_positions(q_len, offset):
    query, key, _ = structured_inputs(Shape(q_len, offset + q_len, heads=1, kv_heads=1, head_dim=32), 0)
    rows = create_sale_block_mask(query, key, BLIND, stats=True).stats.audit.rows
    positions = reference.audited_positions(offset + q_len)
    assert rows.tolist() == [[sum(offset <= at < offset + q_len for at in positions)]]


@pytest.mark.parametrize("chunk", [64, 200, 333])
def test_chunks_ask_the_rows_that_one_call_asks(chunk):
    shape = Shape(1000, 1000, heads=4, kv_heads=2, head_dim=32)
    query, key, _ = structured_inputs(shape, 2)
    whole = create_sale_block_mask(query, key, BLIND, stats=True).stats.audit
    parts = [
        create_sale_block_mask(query[:, :, at : at + chunk], key[:, :, : at + chunk], BLIND, stats=True).stats.audit
        for at in range(0, 1000, chunk)
    ]
    # A last chunk of less than half a block is dense.
    asked = sum(part.rows for part in parts)
    assert (whole.rows - asked <= 1).all()
    assert (asked <= whole.rows).all()
    if 1000 % chunk >= 32 or 1000 % chunk == 0:
        assert torch.equal(asked, whole.rows)
    if chunk % 64 == 0:  # blocks, and so what is always kept, are the same
        torch.testing.assert_close(sum(part.wanted_mass for part in parts), whole.wanted_mass)


def test_padding_on_the_left_asks_the_same_rows():
    shape = Shape(700, 700, heads=2, kv_heads=1, head_dim=32)
    query, key, _ = structured_inputs(shape, 4)
    alone = create_sale_block_mask(query, key, BLIND, stats=True).stats.audit
    pad = torch.nn.functional.pad
    wide = create_sale_block_mask(
        pad(query, (0, 0, 128, 0)), pad(key, (0, 0, 128, 0)), BLIND, kv_range=torch.tensor([[128, 828]]), stats=True
    ).stats.audit
    for ours, theirs in zip(alone, wide):
        torch.testing.assert_close(ours, theirs)


def test_what_is_kept_is_not_missed_and_nothing_is_asked_where_nothing_was_chosen():
    shape = Shape(600, 600, heads=2, kv_heads=1, head_dim=32)
    query, key, value = structured_inputs(shape, 4)
    everything = create_sale_block_mask(query, key, BLIND.with_options(threshold=0.0), stats=True).stats.audit
    assert (everything.wanted_mass > 0).all()
    assert not everything.missed_mass.any()
    for config, dense in ((replace(BLIND, min_length=600), True), (replace(BLIND, on_miss="ignore"), False)):
        stats = sale_attention(query, key, value, config, return_aux=AuxRequest(stats=True))[1].stats
        assert stats.ran_dense == dense
        assert not any(x.any() for x in stats.audit)
        assert not stats.audit.miss.any()


def test_blocks_that_are_kept_for_their_values_are_not_missed():
    shape = Shape(600, 600, heads=2, kv_heads=1, head_dim=32)
    query, key, value = structured_inputs(shape, 4)
    value[...] = torch.nan
    for mask in (None, lambda b, h, q, kv: kv <= q):
        audit = create_sale_block_mask(query, key, BLIND, value=value, mask_mod=mask, stats=True).stats.audit
        assert (audit.wanted_mass > 0).all()
        assert not audit.missed_mass.any()


@pytest.mark.parametrize("mask", [None, lambda b, h, q, kv: kv <= q], ids=["plain", "mask"])
@pytest.mark.parametrize("metric", ["mass", "relative"])
def test_dense_keeps_all_blocks_of_the_heads_that_missed_too_much_and_no_others(mask, metric):
    # Of two heads nothing is chosen, of two what they want; and one row of the batch wants in one head itself alone.
    shape = Shape(900, 900, batch=2, heads=4, kv_heads=2, head_dim=32)
    query, key, value = structured_inputs(shape, 5, topic=8.0)
    query[1, 0] = 4 * key[1, 0]
    nothing = 1e9 if metric == "relative" else 1.0
    config = as_rule(BLIND, metric).with_options(threshold=torch.tensor([nothing, nothing, 0.03, 0.03]))
    reported = create_sale_block_mask(query, key, config, mask_mod=mask, stats=True)
    acting = replace(config, on_miss="dense", miss_bound=0.1)
    acted = create_sale_block_mask(query, key, acting, mask_mod=mask, stats=True)
    above = reported.stats.audit.miss > 0.1
    assert above.tolist() == [[True, True, False, False], [False, True, False, False]]
    assert torch.equal(acted.stats.audit.made_dense, above.long())
    assert not reported.stats.audit.made_dense.any()
    kept, before = block_map(acted.block_mask).kept, block_map(reported.block_mask).kept
    assert torch.equal(kept[~above], before[~above])
    assert torch.equal(acted.stats.density == 1, above)
    assert (reported.stats.density[:, 2:] > reported.stats.density[0, 0]).all()
    # Whether anybody asks for stats changes nothing.
    assert torch.equal(block_map(create_sale_block_mask(query, key, acting, mask_mod=mask)).kept, kept)
    output = sale_attention(query, key, value, acting, mask_mod=mask)
    exact = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(output[above], exact[above], rtol=1e-4, atol=1e-4)


def test_a_compiled_call_audits_without_a_break():
    shape = Shape(500, 500, heads=4, kv_heads=2, head_dim=32)
    query, key, _ = structured_inputs(shape, 6)
    config = replace(BLIND, on_miss="dense")

    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def miss(query, key):
        return create_sale_block_mask(query, key, config, stats=True).stats.audit

    for length in (500, 437):
        part = query[:, :, :length], key[:, :, :length]
        expected = create_sale_block_mask(*part, config, stats=True).stats.audit
        for got, wanted in zip(miss(*part), expected):
            torch.testing.assert_close(got, wanted)
