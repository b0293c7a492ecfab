# SPDX-License-Identifier: BSD-3-Clause
"""`sale_flex.testing` is public: its strategies, factories, oracles and tolerances keep their word."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from sale_flex import Mass, Relative, SaleConfig, create_sale_block_mask, reference
from sale_flex.call.validation import HEAD_DIMS as SUPPORTED_HEAD_DIMS
from sale_flex.call.validation import check_inputs
from sale_flex.testing import (
    Inputs,
    Shape,
    any_in_block,
    assert_attention_close,
    assert_same_blocks,
    attention_error_bound,
    block_map,
    causal_mask,
    decode_list,
    dense_attention,
    expand_blocks,
    grid_inputs,
    low_precision_budget,
    mod_mask,
    plant_needle,
    random_inputs,
    structured_inputs,
    to_block_mask,
)
from sale_flex.testing.strategies import (
    GROUPS,
    HEAD_DIMS,
    block_maps,
    calls,
    causal,
    mask_mods,
    score_mods,
    seeds,
    shapes,
    thresholds,
)

uncompiled = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@given(
    calls(dtypes=DTYPES, head_dims=HEAD_DIMS), seeds(), st.sampled_from([random_inputs, grid_inputs, structured_inputs])
)
def test_strategies_draw_what_the_package_takes(call, seed, factory):
    shape, config = call
    inputs = factory(shape, seed)
    assert inputs.query.shape == (shape.batch, shape.heads, shape.q_len, shape.head_dim)
    assert inputs.key.shape == inputs.value.shape == (shape.batch, shape.kv_heads, shape.kv_len, shape.head_dim)
    assert {x.dtype for x in inputs} == {shape.dtype}
    assert all(x.isfinite().all() for x in inputs)
    check_inputs(*inputs, config, scale=None, **shape.positions())
    again = factory(shape, seed)
    assert all(torch.equal(x, y) for x, y in zip(inputs, again))
    assert not torch.equal(inputs.query, factory(shape, seed + 1).query)


def test_strategies_cover_what_the_package_supports():
    assert HEAD_DIMS == SUPPORTED_HEAD_DIMS
    assert {5, 7} < set(GROUPS)


@given(thresholds())
def test_thresholds_are_valid(threshold):
    assert SaleConfig(Mass(threshold)).rule.threshold == threshold


def test_structured_inputs_are_sparse():
    shape = Shape(1024, 1024, heads=4, kv_heads=2)
    query, key, _ = structured_inputs(shape, 0)
    config = SaleConfig(Relative(0.1, bits=8), min_length=0, local_tokens=64)
    structured = create_sale_block_mask(query, key, config, stats=True).stats.density
    query, key, _ = random_inputs(shape, 0)
    noise = create_sale_block_mask(query, key, config, stats=True).stats.density
    assert structured.max() < 0.5
    assert noise.min() > 0.9


@given(seeds())
def test_grid_inputs_sum_exactly_in_any_order(seed):
    query, key, _ = grid_inputs(Shape(50, 50, head_dim=256), seed)
    order = torch.randperm(256, generator=torch.Generator().manual_seed(seed))
    one = query @ key.transpose(-1, -2)
    assert torch.equal(one, query[..., order] @ key[..., order].transpose(-1, -2))
    assert torch.equal(one.double(), query.double() @ key.double().transpose(-1, -2))


@given(st.integers(0, 9), st.integers(0, 19), st.integers(0, 5), st.floats(1, 100), seeds())
def test_a_needle_has_the_logit_it_is_planted_with(row, column, head, logit, seed):
    inputs = random_inputs(Shape(10, 20, batch=2, heads=6, kv_heads=2, head_dim=32), seed)
    copy = Inputs(*(x.clone() for x in inputs))
    planted = plant_needle(inputs, query=row, key=column, head=head, batch=1, logit=logit, seed=seed)
    got = planted.query[1, head, row].double() @ planted.key[1, head // 3, column].double() * 32**-0.5
    torch.testing.assert_close(got, torch.tensor(logit).double(), rtol=1e-6, atol=0)
    assert all(torch.equal(x, y) for x, y in zip(inputs, copy))
    assert (planted.query != inputs.query).any(-1).sum() == 1
    assert (planted.key != inputs.key).any(-1).sum() == 1


@given(shapes(max_tokens=200), seeds())
def test_dense_attention_is_torchs(shape, seed):
    inputs = random_inputs(shape, seed)
    mask = causal_mask(shape)
    expected = scaled_dot_product_attention(*(x.double() for x in inputs), attn_mask=mask, enable_gqa=True)
    expected = expected.masked_fill(~mask.any(-1, keepdim=True), 0.0)
    torch.testing.assert_close(dense_attention(*inputs, mask), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("special", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", ["key", "value"])
def test_dense_attention_shows_a_special_number_to_who_sees_it(where, special):
    shape = Shape(8, 8, head_dim=32)
    inputs = random_inputs(shape, 0)
    getattr(inputs, where)[0, 0, 5, 3] = special
    output = dense_attention(*inputs, causal_mask(shape))
    clean = dense_attention(*random_inputs(shape, 0), causal_mask(shape))
    assert torch.equal(output[:, :, :5], clean[:, :, :5])
    if where == "value":
        assert not output[0, 0, 5:, 3].isfinite().any()
        others = torch.arange(32) != 3
        torch.testing.assert_close(output[..., others], clean[..., others])
    elif special is torch.nan:
        assert output[0, 0, 5:].isnan().all()


@given(shapes(max_tokens=250, dtypes=DTYPES), seeds(), st.sampled_from([0.3, 1.0, 3.0]))
def test_the_error_bound_holds_for_torchs_attention(shape, seed, amplitude):
    inputs = random_inputs(shape, seed, amplitude=amplitude)
    mask = causal_mask(shape)
    output = scaled_dot_product_attention(*inputs, attn_mask=mask, enable_gqa=True)
    assert_attention_close(output.masked_fill(~mask.any(-1, keepdim=True), 0.0), *inputs, mask)


@given(shapes(min_tokens=30, max_tokens=250, chunked=False, padded=False, dtypes=DTYPES), seeds())
def test_the_error_bound_notices_one_missing_key(shape, seed):
    inputs = random_inputs(shape, seed)
    mask = causal_mask(shape)
    wrong = mask.clone()
    group = shape.heads // shape.kv_heads
    logits = inputs.query[:, :, -1:].float() @ inputs.key.float().repeat_interleave(group, 1).transpose(-1, -2)
    wrong[:, :, -1, logits[0, 0, 0].argmax()] = False  # one that matters: the last row's first
    output = dense_attention(*inputs, wrong).to(shape.dtype)
    with pytest.raises(AssertionError, match="elements are off by more than rounding explains"):
        assert_attention_close(output, *inputs, mask)


def test_the_error_bound_is_small():
    # Soundness alone is easy: a bound of infinity is sound. In 16 bits it is below what the FlashAttention rule allows.
    shape = Shape(256, 256)
    for dtype in (torch.float16, torch.bfloat16):
        inputs = random_inputs(replace(shape, dtype=dtype), 0)
        _, budget = low_precision_budget(*inputs, causal_mask(shape))
        assert attention_error_bound(*inputs, causal_mask(shape)).max() < budget
    assert attention_error_bound(*random_inputs(shape, 0), causal_mask(shape)).max() < 5e-4


@uncompiled
@given(
    st.integers(1, 150),
    st.integers(1, 150),
    mask_mods(150),
    score_mods(),
    # 16 bits, which flex_attention computes in float32: then twice the error of a run in 16 bits is room enough.
    st.sampled_from([torch.float16, torch.bfloat16]),
    seeds(),
)
def test_mods_mean_what_they_mean_to_flex_attention(q_len, kv_len, mask_mod, score_mod, dtype, seed):
    shape = Shape(q_len, kv_len, batch=2, heads=4, kv_heads=2, head_dim=32, dtype=dtype)
    inputs = random_inputs(shape, seed)
    mask = mod_mask(mask_mod, 2, 4, q_len, kv_len)
    assert torch.equal(mask, create_mask(mask_mod, 2, 4, q_len, kv_len, device="cpu"))
    blocks = any_in_block(mask, (64, 32))
    full = ~any_in_block(~mask, (64, 32))
    block_mask = to_block_mask(blocks, mask_mod, (64, 32), q_len, kv_len, full)
    output = flex_attention(*inputs, block_mask=block_mask, score_mod=score_mod, enable_gqa=True)
    exact, budget = low_precision_budget(*inputs, mask, score_mod=score_mod)
    assert (output.double() - exact).abs().max() <= budget


@given(st.data(), st.integers(1, 300), st.integers(1, 300), st.sampled_from([(64, 64), (64, 32), (128, 128)]))
def test_block_maps_and_block_masks_round_trip(data, q_len, kv_len, block_size):
    rows, columns = -(-q_len // block_size[0]), -(-kv_len // block_size[1])
    kept = data.draw(block_maps(2, 3, rows, columns))
    full = data.draw(st.none() | block_maps(2, 3, rows, columns))
    blocks = block_map(to_block_mask(kept, causal, block_size, q_len, kv_len, full))
    assert torch.equal(blocks.kept, kept)
    assert torch.equal(blocks.full, kept & full if full is not None else torch.zeros_like(kept))
    elements = expand_blocks(kept, block_size, q_len, kv_len)
    assert elements.shape == (2, 3, q_len, kv_len)
    assert torch.equal(any_in_block(elements, block_size), kept)


@pytest.mark.parametrize(
    ("num", "indices", "message"),
    [
        ([3], [[0, 1]], "a count is outside"),
        ([-1], [[0, 1]], "a count is outside"),
        ([2], [[0, 4]], "an index is outside"),
        ([2], [[-1, 1]], "an index is outside"),
        ([2], [[2, 1]], "do not ascend"),
        ([2], [[1, 1]], "do not ascend"),
    ],
)
def test_decoding_refuses_a_broken_list(num, indices, message):
    with pytest.raises(AssertionError, match=message):
        decode_list(torch.tensor(num), torch.tensor(indices), 4)


def test_decoding_ignores_what_lies_past_the_count():
    flags = decode_list(torch.tensor([1, 0]), torch.tensor([[2, -7], [9, 9]]), 4)
    assert flags.tolist() == [[False, False, True, False], [False] * 4]


def test_a_block_in_both_lists_is_refused():
    ones = torch.ones(1, 1, 1, 1, dtype=torch.bool)
    mask = to_block_mask(ones, causal, (64, 64), 10, 10)
    mask.full_kv_num_blocks = mask.kv_num_blocks
    mask.full_kv_indices = mask.kv_indices
    with pytest.raises(AssertionError, match="both partial and full"):
        block_map(mask)


def test_a_block_that_differs_off_the_threshold_is_refused():
    shape = Shape(512, 512, head_dim=32)
    query, key, _ = structured_inputs(shape, 0)
    config = SaleConfig(Relative(0.05, bits=8), min_length=0, local_tokens=32)
    expected = reference.keep_map(query, key, config)
    assert assert_same_blocks(expected.kept, expected) == 0
    at = (expected.hit & ~expected.always).nonzero()[0]
    changed = expected.kept.clone()
    changed[tuple(at)] = False
    with pytest.raises(AssertionError, match=r"1 of 64 blocks differ.*from the threshold"):
        assert_same_blocks(changed, expected)
    near = expected._replace(margin=torch.zeros_like(expected.margin))
    assert assert_same_blocks(changed, near) == 1
    unknown = expected._replace(margin=torch.full_like(expected.margin, torch.nan))
    with pytest.raises(AssertionError):
        assert_same_blocks(changed, unknown)


def test_shapes_print_what_is_special_about_them():
    assert repr(Shape(3, 4, heads=2, dtype=torch.float16)) == "Shape(q_len=3, kv_len=4, heads=2, dtype=torch.float16)"


def test_shapes_know_their_positions():
    shape = Shape(10, 30, batch=2, kv_range=((0, 30), (5, 20)))
    assert shape.offset == 20
    assert shape.valid(1) == (5, 20)
    assert replace(shape, q_offset=3, kv_range=None).valid(1) == (0, 30)
    where = shape.positions()
    assert where["q_offset"] is None
    assert where["kv_range"].tolist() == [[0, 30], [5, 20]]
