# SPDX-License-Identifier: BSD-3-Clause
"""Which blocks `create_sale_block_mask` keeps: properties of any choice, and equality with the reference."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st

from sale_flex import Mass, Path, Relative, SaleConfig, create_sale_block_mask, ops, reference
from sale_flex.blocks.geometry import Grid
from sale_flex.call.index_lists import plain_room
from sale_flex.testing import (
    Shape,
    any_in_block,
    assert_same_blocks,
    block_map,
    causal_mask,
    estimate_error_bound,
    expand_blocks,
    grid_inputs,
    mass_error_bound,
    plant_needle,
    random_inputs,
    structured_inputs,
)
from sale_flex.testing.strategies import HEAD_DIMS, calls, configs, seeds, shapes, thresholds

# The interpreter computes with numpy, which warns where IEEE arithmetic is meant: ln 0, inf - inf, casts of NaN.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning:triton")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def chosen(shape, inputs, config, **options):
    """The block map of a call."""
    mask = create_sale_block_mask(inputs.query, inputs.key, config, **shape.positions(), **options)
    assert mask.seq_lengths == (shape.q_len, shape.kv_len)
    assert tuple(mask.BLOCK_SIZE) == config.block_size
    assert mask.kv_indices.dtype == mask.full_kv_indices.dtype == torch.int32
    return block_map(mask)


@contextmanager
def interpreted_kernels() -> Iterator[None]:
    """Run every op through its Triton kernel, interpreted, instead of the torch path."""
    pytest.importorskip("triton", reason="the kernels need triton")
    from sale_flex.kernels import compact, key_mean, mass, moments, quantize, row_limits, scan

    with pytest.MonkeyPatch.context() as patch:
        for module, *names in (
            (compact, "build_lists", "nonfinite_blocks"),
            (key_mean, "key_mean"),
            (mass, "mass_hits"),
            (moments, "quantize_moments"),
            (quantize, "quantize_rows", "quantize_groups"),
            (row_limits, "row_limits"),
            (scan, "scan_max"),
        ):
            for name in names:
                patch.setattr(ops, name, getattr(module, name))
        yield


@given(calls(max_tokens=400, dtypes=DTYPES, max_window=50), seeds())
def test_kept_blocks_are_visible_and_the_lists_are_exact(call, seed):
    shape, config = call
    blocks = chosen(shape, structured_inputs(shape, seed), config)
    seen = causal_mask(shape)
    assert not (blocks.kept & ~any_in_block(seen, config.block_size)).any()
    # Full blocks skip the mask_mod, so all of a full block has to be visible; that none is partial saves time.
    fully = ~any_in_block(~seen, config.block_size)
    assert torch.equal(blocks.full, blocks.kept & fully)


@given(calls(max_tokens=400), seeds())
def test_sink_local_and_diagonal_are_always_kept(call, seed):
    shape, config = call
    blocks = chosen(shape, structured_inputs(shape, seed), config.with_threshold(1e6))
    seen = causal_mask(shape)
    position = torch.arange(shape.q_len)[:, None] + shape.offset
    at = torch.arange(shape.kv_len)
    start = torch.tensor([shape.valid(b)[0] for b in range(shape.batch)])[:, None, None, None]
    for near in (at < start + config.sink_tokens, at > position - config.local_tokens, at == position):
        assert not (any_in_block(seen & near, config.block_size) & ~blocks.kept).any()
    # Rows near the first valid key keep all they see.
    early = seen & (position - start < config.min_length)
    assert not (any_in_block(early, config.block_size) & ~blocks.kept).any()


@given(calls(max_tokens=400), seeds())
def test_threshold_zero_keeps_everything_visible(call, seed):
    shape, config = call
    blocks = chosen(shape, structured_inputs(shape, seed), config.with_threshold(0.0))
    assert torch.equal(blocks.kept, any_in_block(causal_mask(shape), config.block_size).expand_as(blocks.kept))


# Long enough, and with windows narrow enough, for the rule to decide about most blocks.
SELECTIVE = {"min_tokens": 300, "groups": (1, 2, 3), "max_min_length": 0, "max_window": 24, "batch": 1}


@given(calls(max_tokens=600, **SELECTIVE), seeds(), thresholds(), thresholds())
def test_a_higher_threshold_never_adds_a_block(call, seed, one, other):
    shape, config = call
    inputs = structured_inputs(shape, seed)
    low, high = (chosen(shape, inputs, config.with_threshold(t)).kept for t in sorted((one, other)))
    assert not (high & ~low).any()
    event(f"removed blocks: {bool((low & ~high).any())}")


@given(calls(max_tokens=400, max_min_length=0, max_window=24), seeds())
def test_a_threshold_per_head_is_that_heads_threshold(call, seed):
    shape, config = call
    inputs = structured_inputs(shape, seed)
    values = torch.tensor([0.0, 0.01, 0.1, 1.0, 30.0]).repeat(shape.heads)[: shape.heads]
    together = chosen(shape, inputs, config.with_threshold(values)).kept
    for head in {0, 1, shape.heads - 1} & set(range(shape.heads)):
        alone = chosen(shape, inputs, config.with_threshold(float(values[head]))).kept
        assert torch.equal(together[:, head], alone[:, head])
    assert torch.equal(together[:, 0], any_in_block(causal_mask(shape), config.block_size)[:, 0])  # 0: dense


def count_differing(call, seed, special=None) -> int:
    """Assert that a call keeps the reference's blocks, and count those that float32 decides otherwise."""
    shape, config = call
    inputs = structured_inputs(shape, seed)
    if special is not None:
        inputs.value.view(-1)[seed % inputs.value.numel()] = special
    blocks = chosen(shape, inputs, config, value=inputs.value)
    expected = reference.keep_map(
        inputs.query, inputs.key, config, inputs.value, dtype=torch.float64, **shape.positions()
    )
    within = mass_error_bound(inputs.query, inputs.key) if config.rule.name == "mass" else 1e-5
    return assert_same_blocks(blocks.kept, expected, within)


@given(calls(max_tokens=700, dtypes=DTYPES, **SELECTIVE), seeds(), st.sampled_from([None, torch.nan, torch.inf]))
def test_the_torch_path_keeps_the_references_blocks(call, seed, special):
    event(f"blocks on the very threshold that differ: {count_differing(call, seed, special)}")


@settings(max_examples=max(6, settings.default.max_examples // 4))
@given(
    # Not bfloat16, whose dots the interpreter gets wrong; test_gpu.py has it.
    calls(max_tokens=320, head_dims=HEAD_DIMS, kv_heads=(1,), **SELECTIVE | {"groups": (1, 2)}),
    seeds(),
    st.sampled_from([None, torch.nan]),
)
def test_the_kernels_keep_the_references_blocks(call, seed, special):
    with interpreted_kernels():
        event(f"blocks on the very threshold that differ: {count_differing(call, seed, special)}")


@pytest.mark.parametrize("metric", ["mass", "relative"])
@pytest.mark.parametrize("group", [5, 7])
def test_the_kernels_share_keys_among_groups_of_any_size(group, metric):
    shape = Shape(200, 200, heads=2 * group, kv_heads=2, head_dim=32, kv_range=((37, 200),))
    config = SaleConfig(
        Mass.fast(threshold=0.2) if metric == "mass" else Relative(threshold=0.2),
        min_length=0,
        local_tokens=16,
        sink_tokens=4,
        smooth_tokens=32,
        block_size=(64, 32),
    )
    with interpreted_kernels():
        assert count_differing((shape, config), 3) <= 1


def test_the_comparison_with_the_reference_has_something_to_compare():
    # The properties above would hold for a rule that keeps all or nothing; at these options it does neither.
    shape = Shape(700, 700, heads=6, kv_heads=2, head_dim=64)
    inputs = structured_inputs(shape, 0)
    config = SaleConfig(Relative(0.05, bits=4), min_length=0, local_tokens=32)
    expected = reference.keep_map(inputs.query, inputs.key, config)
    by_rule = expected.hit & ~expected.always
    assert 0.1 < by_rule.sum() / (expected.visible & ~expected.always).sum() < 0.9


@given(
    shapes(max_tokens=400, min_tokens=128, chunked=False, padded=False, head_dims=(64,)),
    seeds(),
    configs(max_min_length=0),
    st.sampled_from([0, 32, 64, 128]),
)
def test_adding_a_constant_vector_to_the_keys_changes_nothing(shape, seed, config, smooth_tokens):
    # Multiples of a quarter, a mean over a power of two of them, and a shift that is one too: all sums are exact, so
    # "nothing" means not one block. Without smoothing only the limit moves with the keys, and so do the scores.
    inputs = grid_inputs(shape, seed)
    shift = grid_inputs(replace(shape, q_len=1, kv_len=1), seed + 1).key * 4
    config = replace(config, smooth_tokens=smooth_tokens)
    blocks = chosen(shape, inputs, config)
    shifted = chosen(shape, inputs._replace(key=inputs.key + shift), config)
    if smooth_tokens:
        assert torch.equal(blocks.kept, shifted.kept)
    else:
        assert not (any_in_block(causal_mask(shape), config.block_size) & ~blocks.kept & ~shifted.kept).all()


@given(
    shapes(max_tokens=400, min_tokens=100, batch=2, dtypes=DTYPES),
    seeds(),
    configs(kinds=(Relative,), max_min_length=0),
    st.data(),
)
def test_what_stands_clear_of_the_threshold_is_kept(shape, seed, config, data):
    """Needles: codes err by half a scale a channel, so a score further above the limit than that must be found."""
    inputs = structured_inputs(shape, seed)
    seen = causal_mask(shape)[0, 0]
    if seen.any():
        row, column = data.draw(st.sampled_from(seen.nonzero().tolist()), label="needle at")
        head = data.draw(st.integers(0, shape.heads - 1), label="head")
        inputs = plant_needle(inputs, query=row, key=column, head=head, logit=60.0, seed=seed)
    where = shape.positions()
    bounds = reference.make_bounds(shape.batch, shape.q_len, shape.kv_len, **where)
    scale = shape.head_dim**-0.5
    mean = reference.key_mean(inputs.key, bounds, config.smooth_tokens)
    smooth = inputs.key.double() - mean.double()[:, :, None]
    _, query_scale = reference.quantize_rows(inputs.query, config.rule.bits)
    _, group_scale = reference.quantize_groups(inputs.key, mean, bounds, config.block_size[1], config.rule.bits)
    at = (torch.arange(shape.kv_len) - bounds[:, 1:2]).clamp_min(0).long() // config.block_size[1]
    key_scale = group_scale.gather(2, at[:, None].expand(-1, shape.kv_heads, -1))
    exact = inputs.query.double() @ smooth.repeat_interleave(shape.heads // shape.kv_heads, 1).transpose(-1, -2) * scale
    slack = estimate_error_bound(inputs.query, query_scale, smooth, key_scale, scale, config.rule.bits)
    call = reference.make_call(inputs.query, inputs.key, config, **where, dtype=torch.float64)
    limit = reference.row_limits(call, config.rule.threshold)
    # 1e-5 for the float32 arithmetic of the path under test, relative to logits of up to some hundreds.
    clear = (exact - slack > limit[..., None] + 1e-5 * (1 + exact.abs())) & causal_mask(shape)
    blocks = chosen(shape, inputs, config)
    assert not (clear & ~expand_blocks(blocks.kept, config.block_size, shape.q_len, shape.kv_len)).any()
    if seen.any():
        event(f"the needle is clear of the threshold: {bool(clear[0, head, row, column])}")


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("block_size", [(64, 64), (64, 32), (128, 64), (128, 128)])
def test_a_needle_is_what_keeps_its_block(bits, block_size):
    shape = Shape(640, 640, heads=4, kv_heads=2, head_dim=64)
    config = SaleConfig(Relative(threshold=0.5, bits=bits), min_length=0, local_tokens=64, block_size=block_size)
    inputs = random_inputs(shape, 0, amplitude=0.5)
    row, column, head = 600, 300, 3
    at = (0, head, row // block_size[0], column // block_size[1])
    assert not chosen(shape, inputs, config).kept[at]
    planted = plant_needle(inputs, query=row, key=column, head=head, logit=40.0)
    blocks = chosen(shape, planted, config).kept
    assert blocks[at]
    without = at[0], 2 - (head == 2), *at[2:]
    assert not blocks[without]  # another group's keys hold no needle


@given(calls(max_tokens=400), seeds())
def test_stats_count_the_blocks_of_the_mask(call, seed):
    shape, config = call
    inputs = structured_inputs(shape, seed)
    mask, stats = create_sale_block_mask(inputs.query, inputs.key, config, stats=True, **shape.positions())
    kept = block_map(mask).kept
    visible = any_in_block(causal_mask(shape), config.block_size).expand_as(kept)
    assert torch.equal(stats.kept_blocks, kept.sum((2, 3)))
    assert torch.equal(stats.visible_blocks, visible.sum((2, 3)))
    density = torch.where(stats.visible_blocks > 0, stats.kept_blocks / stats.visible_blocks, 1.0)
    torch.testing.assert_close(stats.density, density, rtol=1e-6, atol=0)
    assert not stats.dropped_blocks.any()
    assert stats.path is Path.FLEX


@given(
    shapes(max_tokens=1300, min_tokens=900, batch=1, groups=(1, 2), head_dims=(32,), chunked=False),
    seeds(),
    configs(kinds=(Mass,), block_sizes=((64, 64), (64, 32)), max_min_length=0, max_window=12),
    st.integers(1, 4),
)
def test_what_finds_no_room_in_a_list_is_counted(shape, seed, config, room):
    inputs = structured_inputs(shape, seed)
    everything = chosen(shape, inputs, config).kept
    # With room for all blocks but one, the budget says how many are kept in any case.
    blocks = everything.shape[3]
    one_less = config.with_options(max_blocks=blocks - 1)
    grid = Grid(shape.q_len, shape.kv_len, *config.block_size)
    always = blocks - 1 - plain_room(inputs.query, grid, one_less, 0, shape.kv_range is None).budget
    config = config.with_options(max_blocks=min(always + room, blocks))
    mask, stats = create_sale_block_mask(inputs.query, inputs.key, config, stats=True, **shape.positions())
    kept = block_map(mask).kept
    assert not (kept & ~everything).any()
    assert torch.equal(stats.dropped_blocks, (everything & ~kept).sum((2, 3)))
    assert mask.full_kv_indices.shape[3] <= config.rule.max_blocks
    if config.rule.max_blocks < blocks:
        assert (kept.sum(-1) <= config.rule.max_blocks).all()
    event(f"dropped: {bool(stats.dropped_blocks.any())}")


@given(calls(max_tokens=300), seeds())
def test_an_offset_may_be_an_int_or_a_tensor_or_the_default(call, seed):
    shape, config = call
    inputs = structured_inputs(shape, seed)
    expected = chosen(shape, inputs, config).kept
    where = shape.positions()
    for dtype in (torch.int32, torch.int64):
        where["q_offset"] = torch.tensor(shape.offset, dtype=dtype)
        mask = create_sale_block_mask(inputs.query, inputs.key, config, **where)
        assert torch.equal(block_map(mask).kept, expected)
    if shape.kv_range is not None:
        where["kv_range"] = where["kv_range"].long()
        mask = create_sale_block_mask(inputs.query, inputs.key, config, **where)
        assert torch.equal(block_map(mask).kept, expected)


def test_the_default_scale_is_that_of_the_head_dim():
    shape = Shape(512, 512, heads=2, head_dim=64)
    inputs = structured_inputs(shape, 1)
    config = SaleConfig(Relative(0.01, bits=4), min_length=0, local_tokens=32)
    default, same, other = (chosen(shape, inputs, config, scale=s).kept for s in (None, 0.125, 0.5))
    assert torch.equal(default, same)
    assert not torch.equal(default, other)


@given(shapes(max_tokens=300, min_tokens=64, chunked=False), seeds(), configs(max_min_length=0), st.integers(1, 63))
def test_a_decoding_step_keeps_all_it_sees(shape, seed, config, q_len):
    q_len = min(q_len, config.block_size[0] // 2 - 1)
    shape = replace(shape, q_len=q_len)
    blocks = chosen(shape, structured_inputs(shape, seed), config.with_threshold(1e6))
    assert torch.equal(blocks.kept, any_in_block(causal_mask(shape), config.block_size).expand_as(blocks.kept))
