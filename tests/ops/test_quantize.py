# SPDX-License-Identifier: BSD-3-Clause
"""Codes, scales and the packed form: what they promise, and three implementations of them bit for bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sale_flex
from sale_flex import reference
from sale_flex.ops.fallback import key_mean as fallback_mean
from sale_flex.ops.fallback import quantize as fallback
from sale_flex.testing import Shape, code_error_bound, random_inputs
from sale_flex.testing.strategies import HEAD_DIMS, seeds, shapes

# The interpreter computes with numpy, which warns where IEEE arithmetic is meant: inf - inf, casts of NaN.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning:triton")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def test_the_packed_form_holds_every_pair_of_codes():
    codes = torch.cartesian_prod(*[torch.arange(-8, 8, dtype=torch.int8)] * 2)
    packed = sale_flex.pack_int4(codes)
    assert packed.shape == (256, 1)
    assert len(packed.unique()) == 256
    assert torch.equal(sale_flex.unpack_int4(packed), codes)
    assert packed[codes.tolist().index([1, -2])].item() == 0xE1  # the even channel is the low half


@given(st.lists(st.integers(1, 4), min_size=0, max_size=3), st.integers(0, 40), seeds())
def test_packing_round_trips(lead, pairs, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-8, 8, (*lead, 2 * pairs), dtype=torch.int8, generator=generator)
    packed = sale_flex.pack_int4(codes)
    assert packed.shape == (*lead, pairs)
    assert packed.dtype == torch.uint8
    assert torch.equal(sale_flex.unpack_int4(packed), codes)


def test_packing_takes_strided_codes():
    codes = torch.randint(-8, 8, (6, 10), dtype=torch.int8)
    assert torch.equal(sale_flex.unpack_int4(sale_flex.pack_int4(codes.T)), codes.T)


@given(shapes(max_tokens=150, dtypes=DTYPES), seeds(), st.sampled_from([4, 8]), st.floats(-30, 30))
def test_row_codes_are_within_half_a_scale(shape, seed, bits, power):
    # Powers of two keep float16 away from its own subnormal numbers without changing a digit.
    x = random_inputs(shape, seed).query
    x = x * 2.0**power if shape.dtype != torch.float16 else x
    codes, scale = fallback.quantize_rows(x, bits, False)
    codes = codes[:, :, : shape.q_len]
    top = 2 ** (bits - 1) - 1
    assert codes.abs().max() <= top
    assert (codes.abs().amax(-1) == top).all()  # the largest channel uses the whole range
    error = (codes.double() * scale.double()[..., None] - x.double()).abs()
    assert (error <= code_error_bound(bits) * scale.double()[..., None]).all()


@given(shapes(max_tokens=150, dtypes=DTYPES), seeds(), st.sampled_from([32, 64, 128]), st.sampled_from([4, 8]))
def test_group_codes_are_within_half_a_scale(shape, seed, group, bits):
    key = random_inputs(shape, seed).key
    bounds = reference.make_bounds(shape.batch, shape.q_len, shape.kv_len, **shape.positions())
    mean = fallback_mean.key_mean(key, bounds, 64)
    codes, scale = fallback.quantize_groups(key, mean, bounds, group, bits, False)
    assert codes.abs().max() <= 2 ** (bits - 1) - 1
    for b in range(shape.batch):
        start, end = shape.valid(b)
        at = torch.arange(start, end)
        smooth = key[b, :, start:end].float() - mean[b, :, None]
        per_key = scale[b][:, (at - start) // group].double()[..., None]
        error = (codes[b, :, start:end].double() * per_key - smooth.double()).abs()
        assert (error <= code_error_bound(bits) * per_key).all()
        outside = torch.cat([codes[b, :, :start], codes[b, :, end:]], 1)
        assert not outside.any()


def test_ties_round_to_even():
    # amax 7 makes the scale exactly 1.
    x = torch.zeros(1, 1, 1, 32)
    x[..., :8] = torch.tensor([7.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 6.5])
    codes, scale = fallback.quantize_rows(x, 4, False)
    assert scale.item() == 1
    assert codes[0, 0, 0, :8].tolist() == [7, 0, 2, 2, 0, -2, -2, 6]


@pytest.mark.parametrize("magnitude", [0.0, 1e-45, 1e-38])
def test_rows_too_small_for_a_normal_scale_get_scale_one(magnitude):
    codes, scale = fallback.quantize_rows(torch.full((1, 1, 2, 32), magnitude), 4, False)
    assert not codes.any()
    assert scale.tolist() == [[[1.0, 1.0]]]


@pytest.mark.parametrize("special", [float("nan"), float("inf"), -float("inf")])
def test_a_nonfinite_element_blanks_its_row_and_leaves_other_rows_alone(special):
    x = random_inputs(Shape(3, 3, head_dim=32), 1).query
    clean, _ = fallback.quantize_rows(x, 4, False)
    dirty = x.clone()
    dirty[0, 0, 1, 17] = special
    codes, scale = fallback.quantize_rows(dirty, 4, False)
    assert scale.isnan().tolist() == [[[False, True, False]]]
    assert torch.equal(codes[:, :, [0, 2]], clean[:, :, [0, 2]])
    assert not codes[0, 0, 1].any()


def padded(codes: torch.Tensor) -> torch.Tensor:
    """Codes of the reference, with the rows that implementations add to fill a tile."""
    return torch.nn.functional.pad(codes, (0, 0, 0, -codes.shape[2] % 128))


def check_implementation(implementation, mean_of, shape, seed, bits, group, special, smooth_tokens=50):
    """Assert that an implementation's mean, codes and scales are the reference's, bit for bit."""
    x = random_inputs(shape, seed)
    query, key = x.query, x.key
    if special is not None:
        query.view(-1)[seed % query.numel()] = special
        key.view(-1)[seed % key.numel()] = special
    bounds = reference.make_bounds(shape.batch, shape.q_len, shape.kv_len, **shape.positions())
    mean = reference.key_mean(key, bounds, smooth_tokens)
    assert torch.equal(mean_of(key, bounds, smooth_tokens), mean)

    codes, scale = reference.quantize_rows(query, bits)
    got_codes, got_scale = implementation.quantize_rows(query, bits, False)
    assert torch.equal(got_codes, padded(codes))
    torch.testing.assert_close(got_scale, scale, rtol=0, atol=0, equal_nan=True)

    codes, scale = reference.quantize_groups(key, mean, bounds, group, bits)
    got_codes, got_scale = implementation.quantize_groups(key, mean, bounds, group, bits, False)
    assert torch.equal(got_codes, padded(codes))
    assert got_scale.shape[2] == got_codes.shape[2] // group
    torch.testing.assert_close(got_scale[..., : scale.shape[2]], scale, rtol=0, atol=0, equal_nan=True)
    if bits == 4:
        assert torch.equal(sale_flex.unpack_int4(implementation.quantize_rows(query, 4, True)[0]), padded_rows(query))
        packed, _ = implementation.quantize_groups(key, mean, bounds, group, 4, True)
        assert torch.equal(sale_flex.unpack_int4(packed), got_codes)


def padded_rows(query: torch.Tensor) -> torch.Tensor:
    return padded(reference.quantize_rows(query, 4)[0])


SPECIALS = st.sampled_from([None, None, float("nan"), float("inf")])
GROUPS_OF_KEYS = st.sampled_from([32, 64, 128])


@given(
    shapes(max_tokens=200, dtypes=DTYPES, head_dims=HEAD_DIMS),
    seeds(),
    st.sampled_from([4, 8]),
    GROUPS_OF_KEYS,
    SPECIALS,
)
def test_fallback_equals_reference(shape, seed, bits, group, special):
    check_implementation(fallback, fallback_mean.key_mean, shape, seed, bits, group, special)


def check_kernel(shape, seed, bits, group, special):
    pytest.importorskip("triton", reason="the kernels need triton")
    from sale_flex.kernels import key_mean, quantize

    check_implementation(quantize, key_mean.key_mean, shape, seed, bits, group, special)


# Few and small: a reduction with an operation of its own takes the interpreter 25 microseconds an element.
@settings(max_examples=max(8, settings.default.max_examples // 3))
@given(
    shapes(max_tokens=128, dtypes=DTYPES, head_dims=(32,), kv_heads=(1,), groups=(1, 2), batch=2),
    seeds(),
    st.sampled_from([4, 8]),
    GROUPS_OF_KEYS,
    SPECIALS,
)
def test_kernel_equals_reference(shape, seed, bits, group, special):
    check_kernel(shape, seed, bits, group, special)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_kernel_equals_reference_at_every_head_dim(head_dim):
    dtype = DTYPES[head_dim // 32 % 3]
    shape = Shape(50, 70, heads=2, kv_heads=1, head_dim=head_dim, dtype=dtype, kv_range=((3, 69),))
    check_kernel(shape, head_dim, 4, 32, None)
