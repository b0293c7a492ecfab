# SPDX-License-Identifier: BSD-3-Clause
"""Reductions of the interpreter by slices are those by single elements."""

import pytest
import torch

pytest.importorskip("triton")
import triton
import triton.language as tl
from interpreter_harness import fold_slices
from triton.runtime import interpreter

from sale_flex.kernels.primitives import bit_or, nan_max

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled where there is a GPU")


@triton.jit
def first_largest(value, at, other, other_at):
    """The larger value and where it is, for reductions of two tensors at once; the first of equals."""
    larger = (other > value) | ((other == value) & (other_at < at))
    return tl.where(larger, other, value), tl.where(larger, other_at, at)


@triton.jit
def reduce_kernel(x_ptr, bits_ptr, out_ptr, M: tl.constexpr, N: tl.constexpr):
    """Reductions along either axis, of everything, and of two tensors, one behind another.

    Args:
        x_ptr: float32 ``[M, N]``.
        bits_ptr: int32 ``[M, N]``.
        out_ptr: Result, float32 ``[4, M + N]``.
        M: Rows.
        N: Columns.
    """
    at = tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :]
    x, bits = tl.load(x_ptr + at), tl.load(bits_ptr + at)
    rows, columns = tl.arange(0, M), tl.arange(0, N)
    tl.store(out_ptr + rows, tl.reduce(x, 1, nan_max))
    tl.store(out_ptr + M + columns, tl.reduce(x, 0, nan_max))
    out_ptr += M + N
    kept = tl.reduce(bits, 1, bit_or, keep_dims=True)
    tl.store(out_ptr + rows[:, None], kept.to(tl.float32))
    tl.store(out_ptr + M, tl.reduce(tl.reduce(bits, 1, bit_or), 0, bit_or).to(tl.float32))
    out_ptr += M + N
    value, place = tl.reduce((tl.where(x == x, x, 0.0), at), 1, first_largest)
    tl.store(out_ptr + rows, value)
    out_ptr += M + N
    tl.store(out_ptr + rows, place.to(tl.float32))


def reduced(x: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    out = torch.zeros(4, sum(x.shape))
    reduce_kernel[(1,)](x, bits, out, *x.shape)
    return out


def test_the_results_are_those_of_triton(monkeypatch, original_reduction):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 8, generator=generator).round(decimals=0)
    x[1, 2] = torch.nan
    bits = torch.randint(0, 2**20, (4, 8), dtype=torch.int32, generator=generator)
    assert interpreter.ReduceOps.generic_reduce is fold_slices
    by_slices = reduced(x, bits)
    monkeypatch.setattr(interpreter.ReduceOps, "generic_reduce", original_reduction)
    torch.testing.assert_close(by_slices, reduced(x, bits), rtol=0, atol=0, equal_nan=True)
    assert by_slices[0].isnan().sum() == 2
    assert torch.equal(by_slices[2, :4], x.nan_to_num().amax(1))
