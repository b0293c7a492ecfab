# SPDX-License-Identifier: BSD-3-Clause
"""NaN and infinity: they reach the output where dense attention shows them, and nowhere else."""

import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st

from sale_flex import Mass, Relative, SaleConfig, create_sale_block_mask, sale_attention
from sale_flex.testing import Inputs, Shape, any_in_block, block_map, causal_mask, structured_inputs
from sale_flex.testing.strategies import calls, configs, seeds

SPECIALS = st.sampled_from([torch.nan, torch.inf, -torch.inf])

# The programs that test_attention.py compiles too; see there.
PROGRAM = {"batch": 2, "kv_heads": (2,), "groups": (3,), "head_dims": (32,)}


def pattern(output: torch.Tensor) -> torch.Tensor:
    """0 where finite, and a class of its own for NaN and each infinity."""
    return output.isnan() + 2 * output.isposinf() + 3 * output.isneginf()


def plant(inputs: Inputs, where: str, seed: int, special: float, count: int) -> Inputs:
    """Special numbers at random places of one of the tensors."""
    tensor = getattr(inputs, where).clone()
    generator = torch.Generator().manual_seed(seed)
    tensor.view(-1)[torch.randint(tensor.numel(), (count,), generator=generator)] = special
    return inputs._replace(**{where: tensor})


def scoring_all_rows(config: SaleConfig) -> SaleConfig:
    """With means in place of the last row of a pool, which knows nothing of the rows that it does not score."""
    return config.with_options(pool_mode="mean") if isinstance(config.rule, Mass) else config


@settings(max_examples=2 * settings.default.max_examples)
@given(
    calls(
        min_tokens=200,
        max_tokens=500,
        block_sizes=((64, 64),),
        max_min_length=0,
        max_window=24,
        chunked=False,
        **PROGRAM,
    ),
    seeds(),
    st.sampled_from(["query", "key", "value"]),
    SPECIALS,
    st.integers(1, 3),
)
def test_the_sparse_output_is_nonfinite_where_the_dense_one_is(call, seed, where, special, count):
    shape, config = call
    config = scoring_all_rows(config)
    inputs = plant(structured_inputs(shape, seed), where, seed, special, count)
    sparse = sale_attention(*inputs, config, **shape.positions())
    # Dense through the same kernel: a tile multiplies what a row does not see by 0, and 0 times NaN is NaN.
    dense = sale_attention(*inputs, config.with_options(threshold=0.0), **shape.positions())
    assert torch.equal(pattern(sparse), pattern(dense))
    event(f"the output shows it: {bool(pattern(dense).any())}")


@given(
    calls(min_tokens=200, max_tokens=500, max_min_length=0, max_window=24, head_dims=(32,), groups=(1, 2, 5)),
    seeds(),
    st.sampled_from(["query", "key", "value"]),
    SPECIALS,
    st.integers(1, 3),
)
def test_blocks_with_a_nonfinite_score_or_value_are_kept(call, seed, where, special, count):
    shape, config = call
    config = scoring_all_rows(config).with_options(threshold=1e6)
    inputs = plant(structured_inputs(shape, seed), where, seed, special, count)
    mask = create_sale_block_mask(inputs.query, inputs.key, config, value=inputs.value, **shape.positions())
    group = shape.heads // shape.kv_heads
    scores = inputs.query.double() @ inputs.key.double().repeat_interleave(group, 1).transpose(-1, -2)
    bad = ~scores.isfinite() | ~inputs.value.isfinite().all(-1).repeat_interleave(group, 1)[:, :, None]
    bad_blocks = any_in_block(bad & causal_mask(shape), config.block_size)
    assert not (bad_blocks & ~block_map(mask).kept).any()


@given(
    configs(kinds=(Relative,), max_min_length=0, max_window=24),
    seeds(),
    st.sampled_from(["query", "key", "value"]),
    SPECIALS,
)
def test_blocks_without_one_are_chosen_as_before(config, seed, where, special):
    shape = Shape(600, 600, heads=4, kv_heads=2, head_dim=32)
    # No smoothing, or a non-finite key is left out of the mean, which moves every key.
    config = config.with_options(threshold=0.05, smooth_tokens=0)
    inputs = structured_inputs(shape, seed)
    before = block_map(create_sale_block_mask(inputs.query, inputs.key, config, value=inputs.value)).kept
    tensor = getattr(inputs, where).clone()
    tensor[0, 0, 100, seed % 32] = special
    changed = inputs._replace(**{where: tensor})
    after = block_map(create_sale_block_mask(changed.query, changed.key, config, value=changed.value)).kept
    assert torch.equal(after[:, 2:], before[:, 2:])  # the query heads of the other KV head
    block_q, block_k = config.block_size
    if where == "query":
        rows = torch.arange(after.shape[2]) != 100 // block_q
        assert torch.equal(after[:, :, rows], before[:, :, rows])
    else:
        # Rows whose windows hold the key have no finite limit, and keep everything; the others, its blocks alone.
        near = -(-(100 + config.local_tokens) // block_q)
        columns = torch.arange(after.shape[3]) != 100 // block_k
        if config.sink_tokens <= 100 or where == "value":
            assert torch.equal(after[:, :, near:][..., columns], before[:, :, near:][..., columns])


@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, 1e30])
@pytest.mark.parametrize("where", ["query", "key"])
@pytest.mark.parametrize("metric", ["mass", "relative"])
def test_nonfinite_padding_changes_no_output(metric, where, garbage):
    ranges = ((0, 333), (90, 470))
    shape = Shape(500, 500, batch=2, heads=6, kv_heads=2, head_dim=32, kv_range=ranges)
    config = SaleConfig.from_options(metric, threshold=0.3, bits=8, min_length=0, local_tokens=24, smooth_tokens=100)
    inputs = structured_inputs(shape, 7)
    expected = sale_attention(*inputs, config, **shape.positions())
    tensor = getattr(inputs, where).clone()
    for b, (start, end) in enumerate(ranges):
        tensor[b, :, :start] = garbage
        tensor[b, :, end:] = garbage
    output = sale_attention(*inputs._replace(**{where: tensor}), config, **shape.positions())
    assert torch.equal(output, expected)


def test_an_infinite_query_of_one_row_leaves_the_rows_beside_it_exact():
    shape = Shape(500, 500, batch=2, heads=6, kv_heads=2, head_dim=32)
    config = SaleConfig(Relative(0.0, bits=8), min_length=0)
    inputs = structured_inputs(shape, 8)
    expected = sale_attention(*inputs, config)
    query = inputs.query.clone()
    query[1, 2, 200, 5] = torch.inf
    output = sale_attention(*inputs._replace(query=query), config)
    assert not output[1, 2, 200].isfinite().all()
    others = torch.ones(500, dtype=torch.bool)
    others[200] = False
    assert torch.equal(output[:, :, others], expected[:, :, others])
