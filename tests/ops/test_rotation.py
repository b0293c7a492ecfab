# SPDX-License-Identifier: BSD-3-Clause
"""The Hadamard rotation in front of codes of single keys, and how finely 8-bit products are resolved behind it."""

import pytest
import torch

from sale_flex import Mass, SaleConfig, reference
from sale_flex.ops.fallback.moments import quantize_moments
from sale_flex.ops.fallback.rotation import rotated, rotation_width
from sale_flex.testing import moment_error_bound

DIMS = (32, 64, 72, 80, 96, 128, 192, 256)


def hadamard(width: int) -> torch.Tensor:
    """Entries 1 and -1: the parity of the bits that row and column share."""
    at = torch.arange(width)
    shared = (at[:, None] & at).tolist()
    return torch.tensor([[1 - 2 * (number.bit_count() % 2) for number in row] for row in shared], dtype=torch.float64)


@pytest.mark.parametrize("dim", DIMS)
def test_blocks_of_channels_meet_a_hadamard_matrix(dim):
    width = reference.rotation_width(dim)
    assert dim % width == 0
    assert width & (width - 1) == 0
    assert dim // width % 2 == 1
    x = torch.randn(5, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(dim))
    expected = x.unflatten(-1, (-1, width)) @ hadamard(width)
    # Neighbours are added first, so that columns come in another order, the same for queries and keys.
    got = reference.rotate(x).unflatten(-1, (-1, width))
    torch.testing.assert_close(got.sort(-1).values, expected.sort(-1).values)
    y = torch.randn(7, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(dim + 1))
    torch.testing.assert_close(reference.rotate(x) @ reference.rotate(y).T, width * (x @ y.T))


@pytest.mark.parametrize("dim", DIMS)
def test_the_torch_path_rotates_to_the_bit(dim):
    x = torch.randn(9, dim, generator=torch.Generator().manual_seed(dim)) * 10
    assert torch.equal(rotated(x), reference.rotate(x))
    assert rotation_width(dim) == reference.rotation_width(dim)


@pytest.mark.parametrize("dim", [80, 96, 256])
@pytest.mark.parametrize("bits", [4, 8])
def test_codes_of_rotated_keys_are_everywhere_the_same(dim, bits):
    kernels = pytest.importorskip("sale_flex.kernels.moments", reason="the kernels need triton")
    key = torch.randn(1, 2, 200, dim, generator=torch.Generator().manual_seed(dim)).bfloat16()
    bounds = reference.make_bounds(1, 200, 200)
    mean = reference.key_mean(key, bounds, 64)
    expected = reference.quantize_moments(key, mean, bounds, 64, 1, bits)
    for quantize in (quantize_moments, kernels.quantize_moments):
        codes, scale, *_ = quantize(key, mean, bounds, 64, 1, bits)
        assert torch.equal(codes[:, :, :256], expected.mean_codes)
        assert torch.equal(scale[..., :4], expected.mean_scale)


def scanned(size: float, bits: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """Errors of the estimated logits of queries `size` times the usual, in nats, and what bounds them."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 1, 512, 256, generator=generator) * size
    key = torch.randn(1, 1, 512, 256, generator=generator)
    key[..., 3] *= 20  # an outlier channel, as models with normalised queries have
    bounds = reference.make_bounds(1, 512, 512)
    mean = torch.zeros(1, 1, 256)
    pooled = reference.pool_rows(query, bounds, 64, 4, True)
    moments = reference.quantize_moments(key, mean, bounds, 64, 1, bits)
    config = SaleConfig(Mass(bits=bits), sink_tokens=0, local_tokens=1, min_length=0, smooth_tokens=0)
    call, options = reference.make_call(query, key, config, dtype=torch.float64), reference.mass_options(config)
    masses = reference.row_masses(call, options)
    of_keys = [x.double() for x in reference.key_moments(key, mean, bounds, 64, 1)]
    error = moment_error_bound(pooled, *of_keys, moments, 256**-0.5, bits).unflatten(-1, (-1, 64)).amax(-1)
    exact = reference.row_masses(call, options, quantised=False)
    inside = masses.candidate & (exact.sums > 2.0**-60) & (exact.sums < 2.0**60)
    return (masses.sums.log() - exact.sums.log()).abs()[inside], error.expand_as(masses.sums)[inside]


@pytest.mark.parametrize("size", [0.01, 1.0, 4.0, 8.0])
def test_eight_bits_resolve_scores_of_any_size(size):
    """Products of codes once lost 8 bits whatever their unit was: a nat and more where queries are large."""
    found, bound = scanned(size)
    assert len(found) > 100
    assert bool((found <= bound).all())
    # A code is off by half of 1 / 127 of what it is; with sizes of 8, logits are some hundreds.
    assert float(found.mean()) < 0.03 + 0.03 * size


def test_four_bits_lose_what_eight_keep():
    found, bound = scanned(4.0, bits=4)
    assert bool((found <= bound).all())
    assert float(found.mean()) > 3 * float(scanned(4.0)[0].mean())
