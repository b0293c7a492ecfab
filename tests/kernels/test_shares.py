# SPDX-License-Identifier: BSD-3-Clause
"""The kernels of rules that compare shares of blocks, interpreted, against the torch path."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from shares_harness import mean_error_bound, share_error_bound, sum_error_bound

from sale_flex import ops
from sale_flex.ops.fallback import antidiagonal as antidiagonal_torch
from sale_flex.ops.fallback import block_mean as block_mean_torch

pytest.importorskip("triton", reason="the kernels need triton")

from masked_harness import SEEN, make, names

from sale_flex.kernels import antidiagonal, block_mean

# The interpreter computes with numpy, which warns where IEEE arithmetic is meant: inf - inf, casts of NaN.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")

# Not bfloat16: the interpreter keeps it as integers and multiplies those in a dot.
PLAIN = [
    {},
    {"dim": 80, "dtype": torch.float16, "heads": 3, "block": (128, 64)},
    {"dim": 192, "q_len": 150, "heads": 4, "kv_heads": 2, "block": (128, 128)},
    {"q_len": 200, "kv_len": 500, "kv_range": ((0, 500), (77, 410)), "batch": 2, "block": (64, 32)},
    {"kv_range": ((330, 330),)},
    {"q_len": 64, "kv_len": 32 * 90, "block": (64, 32)},
]
"""Calls without mods."""
CALLS = [pytest.param(False, options, id=names(options)) for options in PLAIN]
CALLS += [pytest.param(True, options, id=f"mods, {names(options)}") for options in SEEN]


def arguments(masked: bool, options: dict[str, Any]) -> tuple[SimpleNamespace, tuple[Any, ...]]:
    """A call with a row and a key that are not finite, and what both ops are called with first."""
    s = make(**options)
    s.query[0, 0, 40, 3], s.key[0, 0, 100, 5] = torch.nan, torch.inf
    visible = s.visibility.visible if masked else None
    return s, (s.query, s.key, s.bounds, visible, s.is_causal, s.scale, s.grid)


def assert_shares_close(got: torch.Tensor, wanted: torch.Tensor, error: float) -> None:
    """Assert that shares differ by no more than a relative error, twice, and are infinite together."""
    assert torch.equal(got.isinf(), wanted.isinf())
    finite = wanted.isfinite()
    assert bool(finite.any())
    # Exponentials below the least normal float may be lost.
    assert bool(((got - wanted).abs() <= 2 * error * wanted + 1e-36)[finite].all())


@pytest.mark.parametrize(("masked", "options"), CALLS)
def test_antidiagonals(masked, options):
    s, given = arguments(masked, options)
    stride = 8 if s.dim == 32 else 16
    error = share_error_bound(sum_error_bound(s, stride), s.kv_len)
    got, wanted = (module.antidiagonal_shares(*given, stride) for module in (antidiagonal, antidiagonal_torch))
    assert_shares_close(got, wanted, error)


@pytest.mark.parametrize("options", PLAIN, ids=names)
def test_means_have_the_bits_of_the_torch_path(options):
    s = make(**options)
    s.key[0, 0, 100, 5] = torch.nan
    got, wanted = (module.block_means(s.key, s.bounds, s.grid) for module in (block_mean, block_mean_torch))
    assert got.dtype == wanted.dtype
    assert torch.equal(got.nan_to_num(), wanted.nan_to_num())


@pytest.mark.parametrize(("masked", "options"), CALLS)
def test_block_means(masked, options):
    s, given = arguments(masked, options)
    error = share_error_bound(mean_error_bound(s, s.block[1]), s.block[0])
    got, wanted = (module.block_mean_energies(*given) for module in (block_mean, block_mean_torch))
    assert_shares_close(got, wanted, error)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dim", "dtype", "block"),
    [
        (128, torch.bfloat16, (64, 64)),
        (80, torch.float16, (128, 64)),
        (256, torch.bfloat16, (128, 128)),
        (96, torch.float32, (64, 32)),
    ],
)
@pytest.mark.parametrize("masked", [False, True])
def test_on_a_gpu(dim, dtype, block, masked):
    s, given = arguments(
        masked,
        {"dim": dim, "dtype": dtype, "block": block, "q_len": 1500, "kv_len": 3100, "heads": 6, "kv_heads": 2}
        | {"batch": 2, "kv_range": ((0, 3100), (77, 2950)), "mask": "window" if masked else "all"},
    )
    on_gpu = [x.cuda() if isinstance(x, torch.Tensor) else x for x in given]
    error = share_error_bound(mean_error_bound(s, block[1]), block[0])
    wanted = block_mean_torch.block_mean_energies(*given)
    assert_shares_close(ops.block_mean_energies(*on_gpu).cpu(), wanted, error)
    for stride in (8, 16):
        error = share_error_bound(sum_error_bound(s, stride), s.kv_len)
        wanted = antidiagonal_torch.antidiagonal_shares(*given, stride)
        assert_shares_close(ops.antidiagonal_shares(*on_gpu, stride).cpu(), wanted, error)
