# SPDX-License-Identifier: BSD-3-Clause
"""The stages of the relative rule and the lists, torch path and interpreted kernels, against plain definitions."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from plain_harness import near_of, plain_spec
from torch import Tensor

from sale_flex import Relative, SaleConfig, reference
from sale_flex.blocks.bits import pack_bits, unpack_bits
from sale_flex.blocks.geometry import always_blocks, early_blocks, full_blocks, visible_blocks
from sale_flex.config import BLOCK_SIZES
from sale_flex.kernels.arguments import BlockVisibility, Grid, Near, Structure
from sale_flex.ops.fallback import compact, quantize, row_limits, scan, structure
from sale_flex.testing import (
    Shape,
    any_in_block,
    causal_mask,
    decode_list,
    gamma,
    logit_error_bound,
    random_inputs,
    structured_inputs,
    unit_roundoff,
)
from sale_flex.testing.strategies import HEAD_DIMS, block_maps, configs, seeds, shapes

# The interpreter computes with numpy, which warns where IEEE arithmetic is meant: ln 0, inf - inf, casts of NaN.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning:triton")

RELATIVE = configs(kinds=(Relative,))
SMALL = shapes(max_tokens=260, min_tokens=70, head_dims=HEAD_DIMS, kv_heads=(1, 2), groups=(1, 2, 3), batch=1)


def kernel(module: str):
    pytest.importorskip("triton", reason="the kernels need triton")
    from importlib import import_module

    return import_module(f"sale_flex.kernels.{module}")


def stages(shape, seed, config, inputs=structured_inputs) -> SimpleNamespace:
    """What the rule's last two stages take, from the torch path."""
    x = inputs(shape, seed)
    bounds = reference.make_bounds(shape.batch, shape.q_len, shape.kv_len, **shape.positions())
    threshold = torch.as_tensor(config.rule.threshold, dtype=torch.float32).expand(shape.heads).contiguous()
    mean = reference.key_mean(x.key, bounds, config.smooth_tokens)
    query_codes, query_scale = quantize.quantize_rows(x.query, config.rule.bits, False)
    key_codes, key_scale = quantize.quantize_groups(x.key, mean, bounds, config.block_size[1], config.rule.bits, False)
    grid = Grid(shape.q_len, shape.kv_len, *config.block_size)
    return SimpleNamespace(**locals(), scale=shape.head_dim**-0.5)


def check_limits(implementation, shape, seed, config):
    """Assert that limits are within what float32 explains of the float64 reference."""
    s = stages(shape, seed, config)
    window = config.sink_tokens, config.local_tokens
    got, shift = implementation.row_limits(
        s.x.query, s.query_scale, s.x.key, s.mean, plain_spec(s.bounds), None, None, s.threshold, s.scale, s.grid,
        near_of(config),
    )  # fmt: skip
    assert shift.shape == (*got.shape[:2], 0)  # no score_mod asks for logits of the mean
    assert got.shape == (*s.query_codes.shape[:3],)
    assert (got[:, :, shape.q_len :] == torch.inf).all()
    got = got[:, :, : shape.q_len].double() * s.query_scale.double() * s.scale
    call = reference.make_call(s.x.query, s.x.key, config, **shape.positions(), dtype=torch.float64)
    exact = reference.row_limits(call, s.threshold)
    special = ~exact.isfinite()  # padding rows, and all rows of a head with threshold 0
    assert torch.equal(got[special], exact[special])

    # Logits of smoothed keys, as q.k - q.mean or as q.(k - mean); the running maximum as in attention_error_bound.
    of_keys = logit_error_bound(s.x.query, s.x.key).masked_fill(~causal_mask(shape), 0.0).amax(-1)
    of_mean = logit_error_bound(s.x.query, s.mean[:, :, None])[..., 0]
    logits = (of_keys + of_mean) * (1 + gamma(16) / gamma(shape.head_dim + 2))
    # The sum of exponentials and its logarithm, and the change of units here and back.
    bound = logits + gamma(sum(window) + 32) + 8 * unit_roundoff(torch.float32) * (1 + exact.abs())
    assert ((got - exact).abs() <= bound)[~special].all()


@given(shapes(max_tokens=700, dtypes=(torch.float32, torch.bfloat16, torch.float16)), seeds(), RELATIVE)
def test_limits_of_the_torch_path(shape, seed, config):
    check_limits(row_limits, shape, seed, config)


# Not bfloat16: the interpreter keeps it as integers and multiplies those in a dot. test_gpu.py has it.
@given(
    shapes(
        max_tokens=200,
        dtypes=(torch.float32, torch.float16),
        head_dims=HEAD_DIMS,
        groups=(1, 3, 5),
        kv_heads=(1, 2),
        batch=1,
    ),
    seeds(),
    RELATIVE,
)
def test_limits_of_the_kernel(shape, seed, config):
    check_limits(kernel("row_limits"), shape, seed, config)


def hits_by_definition(s: SimpleNamespace, shape, limit: Tensor, block_size: tuple[int, int]) -> Tensor:
    """Blocks in which a product of codes, times its key's scale, reaches its row's limit: bool ``[B, Hq, nq, nk]``."""
    reached = ~(scaled_products(s, shape, block_size[1]) < limit[:, :, : shape.q_len, None])
    return any_in_block(reached & causal_mask(shape), block_size)


def scaled_products(s: SimpleNamespace, shape, group: int) -> Tensor:
    """Products of codes, times the scale of the key's group: ``[B, Hq, Sq, Skv]``, one rounding off."""
    keys = s.key_codes[:, :, : shape.kv_len].repeat_interleave(shape.heads // shape.kv_heads, 1)
    product = s.query_codes[:, :, : shape.q_len].float() @ keys.float().transpose(-1, -2)
    at = (torch.arange(shape.kv_len) - s.bounds[:, 1:2]).clamp_min(0) // group  # [B, Skv]
    scale = s.key_scale.gather(2, at.long()[:, None].expand(-1, shape.kv_heads, -1))
    return product * scale.repeat_interleave(shape.heads // shape.kv_heads, 1)[:, :, None]


def selective_limits(s: SimpleNamespace, shape, block_size: tuple[int, int], seed: int) -> Tensor:
    """Limits that a row's largest elements reach, and some rows none: +inf for padding, as `row_limits` has it."""
    seen = causal_mask(shape)
    scores = scaled_products(s, shape, block_size[1]).masked_fill(~seen, -torch.inf)
    share = torch.rand(*scores.shape[:3], generator=torch.Generator().manual_seed(seed)) * 0.5 + 0.6
    limit = (scores.amax(-1) * share).masked_fill(~seen.any(-1), torch.inf)
    padding = s.query_codes.shape[2] - shape.q_len
    return torch.nn.functional.pad(limit, (0, padding), value=torch.inf)


def plain_hits(
    implementation, codes: tuple[Tensor, ...], limit: Tensor, bounds: Tensor, grid: Grid, from_zero: bool
) -> Tensor:
    """Hit bits with one local key."""
    shift = torch.full_like(limit, torch.nan)  # which nobody reads
    return implementation.scan_max(*codes, limit, shift, plain_spec(bounds), None, None, torch.nan, grid, 1, from_zero)


def check_scan(implementation, shape, seed, config, special):
    """Assert that every hit bit that is read is the one the definition gives. Integers and one product: exact."""
    s = stages(shape, seed, config)
    limit = selective_limits(s, shape, config.block_size, seed)
    row = seed % shape.q_len
    padding = ~causal_mask(shape)[:, 0, row].any(-1)  # whose limit is +inf, always
    limit[:, :, row] = torch.where(padding, torch.inf, special)[:, None]
    # A promise that allows a shorter way, not one that must be made.
    from_zero = bool((s.bounds[:, 1] == 0).all()) and seed % 3 > 0
    codes = s.query_codes, s.query_scale, s.key_codes, s.key_scale
    hits = plain_hits(implementation, codes, limit, s.bounds, s.grid, from_zero)
    grid = s.grid
    # With one local key and no sink, all but the diagonal blocks are the scan's to decide.
    asked = visible_blocks(s.bounds, grid) & ~always_blocks(s.bounds, grid, 0, 1, 0)
    got = unpack_bits(hits, grid.key_blocks)
    expected = hits_by_definition(s, shape, limit, config.block_size)
    assert torch.equal(got & asked[:, None], expected & asked[:, None])


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("start", [0, 37, 64, 95])
def test_scan_of_keys_that_start_anywhere(block_size, start):
    # The columns of every block before such a start belong to the group before.
    shape = Shape(330, 330, heads=2, kv_heads=1, head_dim=32, kv_range=((start, 325),))
    config = SaleConfig(Relative(bits=8), block_size=block_size, sink_tokens=0)
    for implementation in (scan, kernel("scan")):
        for seed in (1, 2):
            check_scan(implementation, shape, seed, config, torch.nan)


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_scan_takes_no_padding_for_a_key(block_size):
    # Padding has code 0. Where all products with keys are negative, a product of 0 would reach a limit of -1.
    codes = torch.ones(1, 1, 384, 32, dtype=torch.int8)
    keys = -codes
    keys[:, :, :37] = 0
    limits = torch.full((1, 1, 384), -1.0)
    bounds = torch.tensor([[0, 37, 384]], dtype=torch.int32)
    scale = torch.ones(1, 1, 384 // block_size[1])
    for implementation in (scan, kernel("scan")):
        coded = codes, torch.ones(1, 1, 384), keys, scale
        words = plain_hits(implementation, coded, limits, bounds, Grid(384, 384, *block_size), False)
        visible = slice(37 // block_size[1], 256 // block_size[1])
        assert not unpack_bits(words, 384 // block_size[1])[0, 0, -1, visible].any()


@pytest.mark.parametrize(("first", "after", "hit"), [(165, 192, False), (165, 191, True), (128, 165, True)])
def test_a_scale_that_is_not_finite_hits_where_its_keys_are_seen(first, after, hit):
    # Keys begin at 37: block 2, keys 128 to 191, is cut at 165 into keys of groups 1 and 2, and group 2's scale is NaN.
    grid, bounds = Grid(448, 448, 64, 64), torch.tensor([[0, 37, 448]], dtype=torch.int32)
    spec = plain_spec(bounds)._replace(mask=lambda b, h, q, kv: (kv < first) | (kv >= after))
    visibility = structure.block_structure(spec, None, 1, grid)
    found = Structure(visibility, structure.candidate_blocks(visibility, bounds, True, grid, Near(0, 1, 0)))
    codes, key_scale = torch.ones(1, 1, 512, 32, dtype=torch.int8), torch.ones(1, 1, 8)
    key_scale[0, 0, 2] = torch.nan
    coded = codes, torch.ones(1, 1, 448), codes, key_scale
    limits = torch.full((1, 1, 512), 1e9), torch.zeros(1, 1, 512)
    words = scan.scan_max(*coded, *limits, spec, found, None, 1.0, grid, 1, False)
    assert unpack_bits(words, 7)[0, 0, -1].tolist() == [False, False, hit, True, False, False, False]


SPECIAL_LIMITS = st.sampled_from([0.0, -torch.inf, torch.inf, torch.nan])


@given(shapes(max_tokens=900), seeds(), RELATIVE, SPECIAL_LIMITS)
def test_scan_of_the_torch_path(shape, seed, config, special):
    check_scan(scan, shape, seed, config, special)


@given(SMALL, seeds(), RELATIVE, SPECIAL_LIMITS)
def test_scan_of_the_kernel(shape, seed, config, special):
    check_scan(kernel("scan"), shape, seed, config, special)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_scan_is_exact_at_the_largest_codes(head_dim):
    # 8-bit codes of +-127 in every channel: the largest product there is, and one less below and at the limit.
    largest = 127 * 127 * head_dim
    codes = torch.full((1, 1, 256, head_dim), 127, dtype=torch.int8)
    scale = torch.ones(1, 1, 4)
    bounds = torch.tensor([[0, 0, 256]], dtype=torch.int32)
    for implementation in (scan, kernel("scan")):
        for limit, hit in ((largest, True), (largest + 1, False)):
            limits = torch.full((1, 1, 256), float(limit))
            coded = codes, torch.ones(1, 1, 256), codes, scale
            words = plain_hits(implementation, coded, limits, bounds, Grid(256, 256, 64, 64), True)
            assert unpack_bits(words, 4)[0, 0, 3, :3].tolist() == [hit] * 3


def check_nonfinite(implementation, shape, seed, block_k, special):
    value = random_inputs(shape, seed).value
    value.view(-1)[seed % value.numel()] = special
    bounds = reference.make_bounds(shape.batch, shape.q_len, shape.kv_len, **shape.positions())
    at = torch.arange(shape.kv_len)
    valid = (at >= bounds[:, 1:2]) & (at < bounds[:, 2:3])
    bad = ~value.isfinite().all(-1) & valid[:, None]
    expected = any_in_block(bad[:, :, None], (1, block_k))[:, :, 0]
    assert torch.equal(implementation.nonfinite_blocks(value, bounds, block_k), pack_bits(expected))


SPECIAL_VALUES = st.sampled_from([torch.nan, torch.inf, -torch.inf])


@given(shapes(max_tokens=500), seeds(), st.sampled_from([32, 64, 128]), SPECIAL_VALUES)
def test_nonfinite_blocks_of_the_torch_path(shape, seed, block_k, special):
    check_nonfinite(compact, shape, seed, block_k, special)


@given(SMALL, seeds(), st.sampled_from([32, 64, 128]), SPECIAL_VALUES)
def test_nonfinite_blocks_of_the_kernel(shape, seed, block_k, special):
    check_nonfinite(kernel("compact"), shape, seed, block_k, special)


def check_lists(implementation, data, shape, config, masked):
    """Assert that lists are what hits, flags of values and what is kept anyhow add up to, as far as there is room.

    Of a plain call that follows from positions; of a masked one it is given, in bits that need not fit together.
    """
    grid, near = Grid(shape.q_len, shape.kv_len, *config.block_size), near_of(config)
    bounds = reference.make_bounds(shape.batch, shape.q_len, shape.kv_len, **shape.positions())
    hits = data.draw(block_maps(shape.batch, shape.heads, grid.query_blocks, grid.key_blocks))
    flags = data.draw(st.none() | block_maps(shape.batch, 1, shape.kv_heads, grid.key_blocks))
    nonfinite = None if flags is None else pack_bits(flags[:, 0])
    widths = [data.draw(st.just(grid.key_blocks) | st.integers(0, grid.key_blocks + 4)) for _ in range(2)]
    want_kept, leave_early = data.draw(st.booleans()), data.draw(st.booleans()) and not masked
    given = None, None
    if masked:
        heads = data.draw(st.sampled_from([1, shape.heads]))
        maps = block_maps(shape.batch, heads, grid.query_blocks, grid.key_blocks)
        visible, full, always = data.draw(st.tuples(maps, maps, maps))
        ends = bounds.new_empty(shape.batch, heads, 2, grid.query_blocks * grid.block_q)
        given = BlockVisibility(pack_bits(visible), pack_bits(full), ends), pack_bits(always)
    else:
        always = always_blocks(bounds, grid, *near)[:, None]
        visible, full = visible_blocks(bounds, grid)[:, None], full_blocks(bounds, grid)[:, None]
    words, *numbers, indices, overflow = implementation.build_lists(
        pack_bits(hits), nonfinite, bounds, *given, shape.kv_heads, grid, near, *widths, want_kept, leave_early
    )
    kept = hits | always
    if flags is not None:
        kept |= flags[:, 0].repeat_interleave(shape.heads // shape.kv_heads, 1)[:, :, None]
    kept &= visible
    if leave_early:
        kept &= ~early_blocks(bounds, grid, config.min_length)[:, None, :, None]
    assert all(x.dtype == torch.int32 for x in (words, *numbers, indices, overflow))
    assert torch.equal(words, pack_bits(kept)) if want_kept else words.numel() == 0
    lost = torch.zeros_like(overflow)
    for number, listed, wanted, width in zip(numbers, indices.split(widths, -1), (kept & ~full, kept & full), widths):
        room = wanted & (wanted.cumsum(-1) <= width)  # the first ones
        assert torch.equal(decode_list(number, listed, grid.key_blocks), room)
        lost += (wanted & ~room).sum(-1).int()
    assert torch.equal(overflow, lost)


NARROW = configs(max_min_length=40, max_window=20)


@given(st.data(), shapes(max_tokens=500), NARROW, st.booleans())
def test_lists_of_the_torch_path(data, shape, config, masked):
    check_lists(compact, data, shape, config, masked)


@given(st.data(), SMALL, NARROW, st.booleans())
def test_lists_of_the_kernel(data, shape, config, masked):
    check_lists(kernel("compact"), data, shape, config, masked)


@pytest.mark.parametrize("group", [1, 3, 5])
def test_a_nonfinite_value_keeps_its_blocks_for_the_query_heads_that_share_it(group):
    # 20 query blocks of a chunk, 30 key blocks, and a value in block 3 of the second of two KV heads.
    lengths = 20 * 64, 30 * 64
    bounds = torch.tensor([[10 * 64, 0, 30 * 64]], dtype=torch.int32)
    flags = torch.zeros(1, 2, 30, dtype=torch.bool)
    flags[0, 1, 3] = True
    hits = torch.zeros(1, 2 * group, 20, 1, dtype=torch.int32)
    for implementation in (compact, kernel("compact")):
        words, *_ = implementation.build_lists(
            hits, pack_bits(flags), bounds, None, None, 2, Grid(*lengths, 64, 64), Near(0, 1, 0), 30, 30, True, False
        )
        kept = unpack_bits(words, 30)[0, :, :, 3].all(-1)
        assert kept.tolist() == [False] * group + [True] * group


def test_lists_of_the_kernel_beyond_one_chunk_of_blocks():
    # 1100 blocks of keys: two chunks of the kernel's walk, and a last word of 12 bits.
    q_len, kv_len = 64, 1100 * 32
    grid = Grid(q_len, kv_len, 64, 32)
    bounds = torch.tensor([[kv_len - q_len, 0, kv_len]], dtype=torch.int32)
    hits = torch.rand(1, 1, 1, 1100, generator=torch.Generator().manual_seed(0)) < 0.5
    widths = 40, 500
    arguments = (pack_bits(hits), None, bounds, None, None, 1, grid, Near(32, 64, 0), *widths, True, False)
    words, *numbers, indices, overflow = kernel("compact").build_lists(*arguments)
    expected_words, *expected_numbers, expected, expected_overflow = compact.build_lists(*arguments)
    assert torch.equal(words, expected_words)
    assert torch.equal(overflow, expected_overflow)
    assert int(numbers[1]) == 500  # more than there is room for
    lists, expected_lists = (zip(n, x.split(widths, -1)) for n, x in ((numbers, indices), (expected_numbers, expected)))
    for got, wanted in zip(lists, expected_lists):
        assert torch.equal(decode_list(*got, grid.key_blocks), decode_list(*wanted, grid.key_blocks))


@given(st.integers(1, 100), seeds())
def test_bits_round_trip(blocks, seed):
    flags = torch.rand(2, 3, blocks, generator=torch.Generator().manual_seed(seed)) < 0.5
    words = pack_bits(flags)
    assert words.shape == (2, 3, -(-blocks // 32))
    assert torch.equal(unpack_bits(words, blocks), flags)
    block = seed % blocks
    assert ((words[..., block // 32] >> (block % 32)) & 1).bool().equal(flags[..., block])


def test_selective_limits_select():
    # Guards the scan's tests against becoming vacuous: hits are some blocks, not none and not all.
    shape = Shape(512, 512, heads=2, kv_heads=1, head_dim=32)
    s = stages(shape, 5, SaleConfig(Relative(bits=8)))
    hits = hits_by_definition(s, shape, selective_limits(s, shape, (64, 64), 5), (64, 64))
    assert 0.2 < hits.sum() / any_in_block(causal_mask(shape), (64, 64)).sum() / 2 < 0.8
