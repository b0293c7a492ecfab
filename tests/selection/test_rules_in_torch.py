# SPDX-License-Identifier: BSD-3-Clause
"""What holds for every rule with scores alone: thresholds, padding, what is not finite, and no value is read."""

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rules_harness import SMALL, kept, logit_error, ruled, scores, settled
from torch._subclasses.fake_tensor import FakeTensorMode

from sale_flex import (
    Antidiagonal,
    AShape,
    BlockMean,
    Exact,
    SaleConfig,
    TopK,
    VerticalSlash,
    create_sale_block_mask,
    reference,
)
from sale_flex._console.stored import sale_config, stored_config
from sale_flex.testing import (
    Inputs,
    Shape,
    any_in_block,
    assert_same_blocks,
    causal_mask,
    gamma,
    logit_error_bound,
    structured_inputs,
)
from sale_flex.testing.programs import PROGRAMS
from sale_flex.testing.strategies import seeds

RULES = {
    "a_shape": AShape(),
    "antidiagonal": Antidiagonal(0.3),
    "block_mean": BlockMean(0.6),
    "exact": Exact(0.1),
    "exact means": Exact(0.1, pool=8, pool_mode="mean"),
    "top_k": TopK(0.6),
    "top_k blocks": TopK(blocks=3),
    "vertical_slash": VerticalSlash(0.5, 8, 20),
}
BY_ALL = ("vertical_slash",)
"""Rules whose last queries decide for all."""

every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
asking_rule = pytest.mark.parametrize(
    "rule",
    [rule for name, rule in RULES.items() if name != "a_shape"],
    ids=[name for name in RULES if name != "a_shape"],
)
row_by_row = pytest.mark.parametrize(
    "rule",
    [rule for name, rule in RULES.items() if name not in BY_ALL],
    ids=[name for name in RULES if name not in BY_ALL],
)
SHAPE = Shape(640, 640, batch=2, heads=4, kv_heads=2, head_dim=32)
PADDED = replace(SHAPE, kv_range=((0, 640), (137, 600)))


def visible_blocks(shape, config):
    return any_in_block(causal_mask(shape), config.block_size)


@given(ruled(st.sampled_from([*RULES.values()])), seeds())
def test_threshold_zero_keeps_all_that_is_visible(call, seed):
    shape, config = call
    found = kept(structured_inputs(shape, seed), config.with_threshold(0.0), **shape.positions())
    assert torch.equal(found, visible_blocks(shape, config).expand_as(found))


@every_rule
@pytest.mark.parametrize("program", ["soft cap", "documents, both ways", "a user's mask by head", "a finer block mask"])
def test_threshold_zero_keeps_all_that_mods_show(rule, program):
    mods = PROGRAMS[program](PADDED, "cpu") | PADDED.positions()
    inputs, config = structured_inputs(PADDED, 1), replace(SMALL, rule=rule.with_threshold(0.0))
    visible = reference.keep_map(inputs.query, inputs.key, config, **mods).visible
    found = kept(inputs, config, **mods)
    assert torch.equal(found, visible.expand_as(found))


@every_rule
def test_a_higher_threshold_never_adds_a_block(rule):
    inputs, before, counts = structured_inputs(PADDED, 2), None, []
    for threshold in (0.0, 1e-3, 0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 1.0, 1.5, 1e6):
        found = kept(inputs, replace(SMALL, rule=rule.with_threshold(threshold)), **PADDED.positions())
        assert before is None or not (found & ~before).any()
        counts.append(int(found.sum()))
        before = found
    if rule.name != "a_shape" and not getattr(rule, "blocks", None):
        assert len(set(counts)) > 4


@every_rule
def test_a_threshold_per_head_is_that_heads_threshold(rule):
    inputs = structured_inputs(PADDED, 3)
    values = torch.tensor([0.0, 0.05, 0.5, 2.0])
    together = kept(inputs, replace(SMALL, rule=rule.with_threshold(values)))
    for head, value in enumerate(values.tolist()):
        alone = kept(inputs, replace(SMALL, rule=rule.with_threshold(value)))
        assert torch.equal(together[:, head], alone[:, head])


@asking_rule
@pytest.mark.parametrize("special", [torch.nan, torch.inf])
def test_a_row_that_is_not_finite_keeps_what_it_sees_and_changes_nothing_else(rule, special):
    inputs, config = structured_inputs(PADDED, 4), replace(SMALL, rule=rule)
    query = inputs.query.clone()
    query[1, 2, 401, 3] = special
    before, after = (kept(x, config, **PADDED.positions()) for x in (inputs, inputs._replace(query=query)))
    assert torch.equal(after[1, 2, 6], visible_blocks(PADDED, config)[1, 0, 6])
    assert not torch.equal(before[1, 2, 6], after[1, 2, 6])
    after[1, 2, 6] = before[1, 2, 6]
    assert torch.equal(after, before)


def test_a_last_row_that_is_not_finite_has_no_part_in_the_lines():
    inputs, config = structured_inputs(SHAPE, 5), replace(SMALL, rule=RULES["vertical_slash"])
    query = inputs.query.clone()
    query[:, :, 600] = torch.nan
    found = scores(inputs._replace(query=query), config)
    assert not found.isnan().any()
    assert (found[:, :, :9] > 0).any()
    assert (found[:, :, :9] < 1).all()


@asking_rule
@pytest.mark.parametrize("special", [torch.nan, torch.inf])
def test_a_key_that_is_not_finite_keeps_its_block(rule, special):
    inputs, config = structured_inputs(PADDED, 6), replace(SMALL, rule=rule)
    key = inputs.key.clone()
    key[1, 1, 300, 3] = special
    before, after = (kept(x, config, **PADDED.positions()) for x in (inputs, inputs._replace(key=key)))
    assert after[1, 2:, 300 // 64 : 10, 300 // 64].all()
    assert torch.equal(after[:, :2], before[:, :2])
    assert torch.equal(after[0], before[0])
    found = scores(inputs._replace(key=key), config, PADDED.positions())
    assert not found.isnan().any()


@every_rule
@pytest.mark.parametrize("special", [torch.nan, torch.inf, 1e30])
def test_what_padding_holds_changes_nothing(rule, special):
    inputs, config = structured_inputs(PADDED, 7), replace(SMALL, rule=rule)
    query, key = inputs.query.clone(), inputs.key.clone()
    for x in (query, key):
        x[1, :, :137] = special
        x[1, :, 600:] = special
    before, after = (scores(x, config, PADDED.positions()) for x in (inputs, inputs._replace(query=query, key=key)))
    seen = visible_blocks(PADDED, config).expand_as(before)
    assert torch.equal(before[seen], after[seen])


def rounding(shape, inputs, config):
    """How far from the reference any of the rules may be, in nats: four logits and two sums, or two logits of means.

    The mean of all products of a block's magnitudes is below the largest of them.
    """
    largest = float(logit_error_bound(*inputs[:2]).max()) / gamma(shape.head_dim + 2)
    of_means = 2 * largest * gamma(sum(config.block_size) + shape.head_dim + 4)
    return max(4 * logit_error(shape, inputs, config) + 4 * gamma(2 * shape.kv_len), of_means)


@every_rule
@pytest.mark.parametrize("block_size", [(64, 64), (128, 64)])
def test_a_padded_row_of_a_batch_keeps_what_it_keeps_alone(rule, block_size):
    shape, config = Shape(512, 512, heads=4, kv_heads=2, head_dim=32), replace(SMALL, rule=rule, block_size=block_size)
    alone = structured_inputs(shape, 8)
    expected = reference.keep_map(alone.query, alone.key, config, dtype=torch.float64)
    padded = Inputs(*(torch.nn.functional.pad(x, (0, 0, 128, 70)) for x in alone))
    together = Inputs(*(torch.cat([x.flip(2), x]) for x in padded))
    found = kept(together, config, kv_range=torch.tensor([[0, 710], [128, 640]]))[1:]
    found = found[:, :, 128 // block_size[0] :, 128 // block_size[1] :]
    found = found[:, :, : expected.kept.shape[2], : expected.kept.shape[3]]
    assert_same_blocks(found, expected, rounding(shape, alone, config))


@row_by_row
def test_chunks_between_blocks_choose_as_the_whole_prompt(rule):
    inputs, config = structured_inputs(SHAPE, 9), replace(SMALL, rule=rule)
    expected = reference.keep_map(inputs.query, inputs.key, config, dtype=torch.float64)
    for first, last in ((0, 256), (256, 448), (448, 640)):
        chunk = Inputs(inputs.query[:, :, first:last], *(x[:, :, :last] for x in inputs[1:]))
        rows, columns = slice(first // 64, last // 64), slice(0, last // 64)
        part = expected._replace(**{name: getattr(expected, name)[:, :, rows, columns] for name in ("kept", "margin")})
        assert_same_blocks(kept(chunk, config), part, rounding(SHAPE, inputs, config))


@row_by_row
def test_what_follows_a_query_block_does_not_matter_to_it(rule):
    inputs, config = structured_inputs(SHAPE, 10), replace(SMALL, rule=rule)
    others = structured_inputs(SHAPE, 11)
    changed = Inputs(*(torch.cat([x[:, :, :384], y[:, :, 384:]], 2) for x, y in zip(inputs, others)))
    before, after = (kept(x, config) for x in (inputs, changed))
    assert torch.equal(before[:, :, :6], after[:, :, :6])


@every_rule
def test_batch_rows_stand_where_their_own_offset_says(rule):
    shape, config = replace(SHAPE, q_len=300), replace(SMALL, rule=rule)
    inputs, offsets = structured_inputs(shape, 12), torch.tensor([340, 120])
    together = kept(inputs, config, q_offset=offsets)
    for b in range(2):
        alone = Inputs(*(x[b : b + 1] for x in inputs))
        expected = reference.keep_map(*alone[:2], config, dtype=torch.float64, q_offset=int(offsets[b]))
        assert_same_blocks(together[b : b + 1], expected, rounding(replace(shape, batch=1), alone, config))


@every_rule
def test_no_value_is_read(rule):
    call = settled(structured_inputs(PADDED, 0), replace(SMALL, rule=rule), PADDED.positions())
    with FakeTensorMode() as mode:
        fake = {name: mode.from_tensor(getattr(call, name)) for name in ("query", "key", "bounds", "threshold")}
        call = call._replace(**fake)
        assert call.rule.scores(call).shape == (2, 4, 10, 10)
        assert call.rule.select(call, (), None).hits.shape == (2, 4, 10, 1)


@pytest.mark.parametrize("name", ["a_shape", "antidiagonal", "block_mean", "exact", "top_k", "vertical_slash"])
def test_a_compiled_caller_has_one_graph(name):
    shape = Shape(400, 400, heads=2, head_dim=32, kv_range=((37, 390),))
    inputs, config = structured_inputs(shape, 0), replace(SMALL, rule=RULES[name], on_miss="ignore")
    mods = PROGRAMS["soft cap in documents"](shape, "cpu") | shape.positions()

    def counts(query, key):
        mask = create_sale_block_mask(query, key, config, **mods)
        return mask.kv_num_blocks, mask.full_kv_num_blocks

    compiled = torch.compile(counts, backend="eager", fullgraph=True)
    for found, expected in zip(compiled(*inputs[:2]), counts(*inputs[:2])):
        assert torch.equal(found, expected)


def test_the_reference_says_which_rules_it_knows():
    class Unknown(AShape):
        name = "unknown"

    inputs = structured_inputs(SHAPE, 0)
    with pytest.raises(ValueError, match=r"that the reference knows, a_shape, .*exact.*top_k.*vertical_slash, got"):
        reference.keep_map(inputs.query, inputs.key, replace(SMALL, rule=Unknown()))


@every_rule
def test_configs_are_stored_and_named(rule):
    config = SaleConfig(rule)
    assert (
        sale_config(threshold=True, partial=False)(json.loads(json.dumps(stored_config(config, threshold=True))), "")
        == config
    )
    assert SaleConfig.from_options(rule.name, threshold=rule.threshold, **rule.options()) == config
