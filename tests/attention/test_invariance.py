# SPDX-License-Identifier: BSD-3-Clause
"""The same tokens choose the same blocks however they arrive: in chunks, padded, in a batch, in any order of heads.

Sums over differently shaped tiles differ in their last bits, so a block on the very threshold may change sides. Every
comparison allows that by the reference's margin, within 1e-5 of the threshold for the relative rule and within
`mass_error_bound` for the mass rule, and nothing else.
"""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import event, given
from hypothesis import strategies as st

from sale_flex import Relative, SaleConfig, create_sale_block_mask, ops, reference
from sale_flex.blocks.mask_spec import Mod, causal_spec
from sale_flex.kernels.arguments import Grid, Near
from sale_flex.reference import KeepMap
from sale_flex.testing import Inputs, Shape, assert_same_blocks, block_map, mass_error_bound, structured_inputs
from sale_flex.testing.strategies import calls, configs, seeds, shapes

WHOLE = shapes(min_tokens=300, max_tokens=700, batch=1, groups=(1, 2, 3), head_dims=(32,), chunked=False, padded=False)
SELECTIVE = configs(max_min_length=100, max_window=24)
RELATIVE = configs(kinds=(Relative,), max_min_length=100, max_window=24)


def kept(inputs: Inputs, config: SaleConfig, **where) -> torch.Tensor:
    return block_map(create_sale_block_mask(inputs.query, inputs.key, config, **where)).kept


def one_shot(inputs: Inputs, config: SaleConfig, **where) -> KeepMap:
    """Margins of the reference with the choice of the implementation."""
    margins = reference.keep_map(inputs.query, inputs.key, config, dtype=torch.float64, **where)
    chosen = kept(inputs, config, **where)
    share = chosen.sum() / margins.visible.expand_as(chosen).sum()
    event(f"density of the one shot: {'below' if share < 0.9 else 'above'} 0.9")
    return margins._replace(kept=chosen)


def within(inputs: Inputs, config: SaleConfig) -> float:
    """How far from the threshold a block may be that changes sides."""
    return mass_error_bound(inputs.query, inputs.key) if config.rule.name == "mass" else 1e-5


def rows_of(expected: KeepMap, rows: slice, columns: slice) -> KeepMap:
    return KeepMap(*(x[:, :, rows, columns] for x in expected))


def check_keys_of_chunk(key: torch.Tensor, of_chunk: torch.Tensor, config: SaleConfig, start: int) -> None:
    """Assert that a chunk's keys have the codes and scales of the one shot, but for a group that the chunk cuts."""
    group = config.block_size[1]

    def coded(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        bounds = reference.make_bounds(1, 1, x.shape[2], kv_range=torch.tensor([[start, x.shape[2]]]))
        mean = ops.key_mean(x, bounds, config.smooth_tokens)
        if config.rule.name == "relative":
            codes, scale = ops.quantize_groups(x, mean, bounds, group, config.rule.bits, False)
            groups = (of_chunk.shape[2] - start) // group
            return mean, codes[:, :, : start + groups * group], scale[..., :groups]
        sub_block = reference.mass_options(config).sub_block
        *codes_and_scales, _ = ops.quantize_moments(x, mean, bounds, group, sub_block, config.rule.bits)
        blocks = of_chunk.shape[2] // group
        return mean, *(x[:, :, : blocks * (group // sub_block if x.dim() == 4 else 1)] for x in codes_and_scales)

    for ours, of_whole in zip(coded(of_chunk), coded(key)):
        assert torch.equal(ours, of_whole)


@given(WHOLE, seeds(), SELECTIVE, st.data())
def test_chunks_choose_the_blocks_of_one_shot(shape, seed, config, data):
    block_q, block_k = config.block_size
    start = data.draw(st.sampled_from([0, 0, block_q, 37]), label="left padding")
    # The first chunk holds the smoothing prefix; a chunk is a whole number of query blocks, the last what is left.
    first = data.draw(st.integers(1, shape.q_len // block_q), label="first chunk") * block_q
    smooth = data.draw(st.integers(0, max(first - start, 0)), label="smooth_tokens")
    config = replace(config, smooth_tokens=smooth)
    edges = [0, first]
    while shape.q_len - edges[-1] >= block_q // 2:
        blocks = data.draw(st.integers(1, 4), label="chunk")
        edges.append(min(edges[-1] + blocks * block_q, shape.q_len))
    inputs = structured_inputs(replace(shape, kv_range=((start, shape.kv_len),)), seed)
    expected = one_shot(inputs, config, kv_range=torch.tensor([[start, shape.kv_len]]))
    for begin, stop in pairwise(edges):
        if 2 * (stop - begin) < block_q:
            continue  # a decoding step is dense by definition
        chunk = Inputs(inputs.query[:, :, begin:stop], inputs.key[:, :, :stop], inputs.value[:, :, :stop])
        chosen = kept(chunk, config, kv_range=torch.tensor([[start, stop]]))
        check_keys_of_chunk(inputs.key, chunk.key, config, start)
        rows = slice(begin // block_q, -(-stop // block_q))
        columns = slice(0, -(-stop // block_k))
        assert_same_blocks(chosen, rows_of(expected, rows, columns), within(inputs, config))
        assert not expected.kept[:, :, rows, -(-stop // block_k) :].any()


@given(WHOLE, seeds(), SELECTIVE, st.integers(1, 300), st.sampled_from([0.0, 1e4, torch.nan, torch.inf]))
def test_right_padding_by_anything_changes_no_block(shape, seed, config, amount, garbage):
    inputs = structured_inputs(shape, seed)
    expected = one_shot(inputs, config)
    padded = Inputs(*(torch.nn.functional.pad(x, (0, 0, 0, amount), value=garbage) for x in inputs))
    options = {"kv_range": torch.tensor([[0, shape.kv_len]]), "q_offset": 0, "value": padded.value}
    chosen = kept(padded, config, **options)
    rows, columns = expected.kept.shape[2:]
    assert_same_blocks(chosen[:, :, :rows, :columns], expected, within(inputs, config))
    assert not chosen[:, :, rows:].any()
    assert not chosen[:, :, :, columns:].any()


@given(WHOLE, seeds(), SELECTIVE, st.integers(1, 3), st.sampled_from([0.0, 1e4, torch.nan, torch.inf]))
def test_left_padding_by_whole_blocks_changes_no_block(shape, seed, config, blocks, garbage):
    amount = blocks * max(config.block_size)
    inputs = structured_inputs(shape, seed)
    expected = one_shot(inputs, config)
    padded = Inputs(*(torch.nn.functional.pad(x, (0, 0, amount, 0), value=garbage) for x in inputs))
    chosen = kept(padded, config, kv_range=torch.tensor([[amount, amount + shape.kv_len]]), value=padded.value)
    rows, columns = amount // config.block_size[0], amount // config.block_size[1]
    assert_same_blocks(chosen[:, :, rows:, columns:], expected, within(inputs, config))
    assert not chosen[:, :, :rows].any()
    assert not chosen[:, :, :, :columns].any()


@given(WHOLE, seeds(), RELATIVE, st.integers(1, 200), st.floats(-100, 100))
def test_left_padding_that_shifts_the_grid_changes_no_statistic_and_no_score_of_the_relative_rule(
    shape, seed, config, amount, garbage
):
    inputs = structured_inputs(shape, seed)
    group, bits = config.block_size[1], config.rule.bits
    results = []
    for padding in (0, amount):
        query, key, _ = (torch.nn.functional.pad(x, (0, 0, padding, 0), value=garbage) for x in inputs)
        bounds = reference.make_bounds(
            1, query.shape[2], key.shape[2], kv_range=torch.tensor([[padding, key.shape[2]]])
        )
        mean = ops.key_mean(key, bounds, config.smooth_tokens)
        query_codes, query_scale = ops.quantize_rows(query, bits, False)
        key_codes, key_scale = ops.quantize_groups(key, mean, bounds, group, bits, False)
        tau = torch.full((shape.heads,), 0.1)
        limits, _ = ops.row_limits(
            query, query_scale, key, mean, causal_spec(bounds), None, Mod(), tau, shape.head_dim**-0.5,
            Grid(query.shape[2], key.shape[2], *config.block_size), Near(config.sink_tokens, config.local_tokens, 0),
        )  # fmt: skip
        real = slice(padding, padding + shape.kv_len)
        groups = -(-shape.kv_len // group)
        scores = query_codes[:, :, real], query_scale[:, :, real], key_codes[:, :, real], key_scale[:, :, :groups]
        results.append((mean, *scores, limits[:, :, real]))
    *scores, limits = results[0]
    *scores_shifted, limits_shifted = results[1]
    for ours, shifted in zip(scores, scores_shifted):
        assert torch.equal(ours, shifted)  # codes and scales: every element score has the same bits
    # In units of logits; what is left is the order of a sum.
    unit = shape.head_dim**-0.5 * scores[2]
    torch.testing.assert_close(limits_shifted * unit, limits * unit, rtol=0, atol=1e-5)


@given(
    calls(max_tokens=600, min_tokens=300, batch=3, head_dims=(32,), groups=(1, 2), max_window=24, max_min_length=0),
    seeds(),
)
def test_a_batch_row_chooses_its_blocks_alone(call, seed):
    shape, config = call
    inputs = structured_inputs(shape, seed)
    where = shape.positions()
    together = kept(inputs, config, **where)
    for b in range(shape.batch):
        row = Inputs(*(x[b : b + 1] for x in inputs))
        ranges = None if where["kv_range"] is None else where["kv_range"][b : b + 1]
        alone = one_shot(row, config, q_offset=where["q_offset"], kv_range=ranges)
        assert_same_blocks(together[b : b + 1], alone, within(row, config))


@given(
    shapes(max_tokens=600, min_tokens=300, kv_heads=(3,), groups=(1, 2, 5), head_dims=(32,)),
    seeds(),
    configs(max_min_length=0, max_window=24),
    st.permutations(range(3)),
)
def test_heads_choose_their_blocks_whatever_their_order(shape, seed, config, order):
    inputs = structured_inputs(shape, seed)
    group = shape.heads // shape.kv_heads
    tau = torch.logspace(-3, 0, shape.heads)
    query_order = torch.tensor([head * group + n for head in order for n in range(group)])
    ordered = Inputs(inputs.query[:, query_order], inputs.key[:, order], inputs.value[:, order])
    expected = one_shot(inputs, config.with_options(threshold=tau), **shape.positions())
    chosen = kept(ordered, config.with_options(threshold=tau[query_order]), **shape.positions())
    shuffled = KeepMap(*(x if x.shape[1] == 1 else x[:, query_order] for x in expected))
    assert_same_blocks(chosen, shuffled, within(inputs, config))


@pytest.mark.parametrize("metric", ["mass", "relative"])
@given(seeds(), st.integers(1, 60))
def test_keys_after_a_row_change_nothing_for_it(metric, seed, later):
    shape = Shape(512, 512, heads=2, kv_heads=1, head_dim=32)
    config = SaleConfig.from_options(metric, threshold=0.1, bits=8, min_length=0, local_tokens=32, smooth_tokens=128)
    inputs = structured_inputs(shape, seed)
    expected = one_shot(inputs, config)
    changed = inputs.key.clone()
    changed[:, :, -later:] *= 100
    chosen = kept(inputs._replace(key=changed), config)
    assert_same_blocks(chosen[:, :, :-1], rows_of(expected, slice(0, -1), slice(None)), within(inputs, config))
