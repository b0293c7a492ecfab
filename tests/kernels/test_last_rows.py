# SPDX-License-Identifier: BSD-3-Clause
"""The kernels of the last rows' sums, interpreted and on a GPU, against the torch path."""

import math
from dataclasses import replace

import pytest
import torch

from sale_flex import FlexPrefill, SaleConfig, create_sale_block_mask, ops
from sale_flex.blocks.mask_spec import causal_spec
from sale_flex.kernels.arguments import Grid
from sale_flex.ops.fallback import last_rows as last_rows_torch
from sale_flex.testing import Shape, block_map, gamma, structured_inputs

pytest.importorskip("triton", reason="the kernels need triton")

from masked_harness import make, names

from sale_flex.kernels import last_rows as last_rows_kernel

# The interpreter computes with numpy, which warns where IEEE arithmetic is meant: inf - inf, casts of NaN.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")

CALLS = [
    {},
    {"q_len": 90, "kv_range": ((0, 150), (77, 140)), "batch": 2},
    {"q_len": 170, "kv_range": ((5, 140),), "heads": 4, "kv_heads": 2},
    {"q_len": 100, "kv_len": 300, "dtype": torch.float16, "dim": 80},
    {"q_len": 5, "kv_len": 40},
    {"kv_range": ((0, 150), (150, 150)), "batch": 2},
    {"is_causal": False},
    {"q_len": 60, "kv_len": 300, "mask": "window", "is_causal": False},
    {"mask": "by head", "heads": 3},
    {"q_len": 60, "kv_len": 300, "kv_range": ((0, 300), (77, 280)), "batch": 2, "mask": "documents"},
    {"listed": (64, 64), "kv_range": ((40, 150),)},
    {"listed": (128, 256), "is_causal": False, "listed_heads": 2},
    {"q_len": 60, "kv_len": 300, "listed": (100, 48), "mask": "window"},
]
"""Calls that differ in who sees whom. The interpreter multiplies no bfloat16."""


SIZES = {"q_len": 150, "kv_len": 150, "heads": 2}


def error_bound(query, key, scale: float, last: int, scored: bool = False) -> float:
    """How far apart two implementations' shares and their sums may be, relatively.

    Each is off by twice the error of a logit and of the maxima that are subtracted, and by sums over keys and over
    rows. Mods here multiply a logit's error by 4 at most, and add roundings of numbers below 2,000 of their own.
    """
    finite = key.float().nan_to_num(posinf=0.0)
    largest = scale * float(query.float().norm(dim=-1).max() * finite.norm(dim=-1).max())
    logit = gamma(query.shape[3] + 24) * largest
    if scored:
        logit = 4 * logit + gamma(8) * 2000
    return math.expm1(2 * (2 * logit + gamma(key.shape[2] + last + 40)))


def check(s, last: int = 70) -> None:
    """Assert that the kernels' sums are the torch path's."""
    s.key[0, 0, 37, 3] = torch.inf
    span = s.kv_len if s.is_causal else 2 * s.kv_len
    arguments = s.scale, s.grid, last, span
    got = last_rows_kernel.last_row_sums(s.query, s.key, s.spec, s.kernel_score, *arguments)
    expected = last_rows_torch.last_row_sums(s.query, s.key, s.torch_spec, s.torch_score, *arguments)
    within = error_bound(s.query, s.key, s.scale, last, s.score != "none")
    for mine, theirs in zip(got, expected):
        assert mine.shape == theirs.shape
        assert (theirs > 0).any()
        torch.testing.assert_close(mine, theirs, rtol=within, atol=1e-30)


@pytest.mark.parametrize("options", CALLS, ids=names)
def test_sums_are_those_of_the_torch_path(options):
    check(make(**(SIZES | options)))


@pytest.mark.parametrize("score", ["alibi", "soft cap", "bias", "broken"])
def test_scores(score):
    check(make(**(SIZES | {"q_len": 60, "kv_len": 300}), score=score, mask="documents"))


@pytest.mark.parametrize("last", [1, 64, 130])
def test_any_number_of_rows(last):
    check(make(**SIZES), last)


def test_heads_go_through_in_strips_and_keys_in_parts(monkeypatch):
    s = make(**SIZES, batch=2)
    arguments = s.query, s.key, s.spec, None, s.scale, s.grid, 70, s.kv_len
    expected = last_rows_kernel.last_row_sums(*arguments)
    monkeypatch.setattr(last_rows_kernel, "RANGE_BYTES", 1)
    assert all(torch.equal(*pair) for pair in zip(last_rows_kernel.last_row_sums(*arguments), expected))
    monkeypatch.setattr(last_rows_kernel, "PART", 64)
    check(s)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dim", [32, 80, 128, 256])
def test_on_a_gpu_sums_are_the_torch_paths_and_the_same_every_time(dtype, dim):
    shape = Shape(1500, 5100, batch=2, heads=4, kv_heads=2, head_dim=dim, dtype=dtype, q_offset=3600)
    query, key, _ = structured_inputs(shape, 3)
    bounds = torch.tensor([[3600, 0, 5100], [3600, 700, 5000]], dtype=torch.int32)
    grid, scale = Grid(1500, 5100, 64, 64), dim**-0.5

    def sums(device):
        spec = causal_spec(bounds.to(device))
        return ops.last_row_sums(query.to(device), key.to(device), spec, spec.mask, scale, grid, 128, 5120)

    got, again, expected = sums("cuda"), sums("cuda"), sums("cpu")
    within = error_bound(query, key, scale, 128)
    for mine, same, theirs in zip(got, again, expected):
        assert torch.equal(mine, same)
        torch.testing.assert_close(mine.cpu(), theirs, rtol=within, atol=1e-30)


@pytest.mark.gpu
def test_on_a_gpu_blocks_are_the_cpus_but_for_a_few_and_a_graph_replays_them():
    shape = Shape(4096, 4096, heads=8, kv_heads=2, head_dim=64, dtype=torch.bfloat16)
    query, key, _ = structured_inputs(shape, 3)
    config = SaleConfig(FlexPrefill(min_budget=256, tau=0.3), min_length=0)
    kept = [block_map(create_sale_block_mask(query.to(d), key.to(d), config)).kept.cpu() for d in ("cpu", "cuda")]
    # A count of blocks, or a head's kind, may hang on a rounding.
    assert (kept[0] != kept[1]).float().mean() < 0.02
    query, key = query.cuda(), key.cuda()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        mask = create_sale_block_mask(query, key, replace(config, min_length=256))
    graph.replay()
    again = create_sale_block_mask(query, key, replace(config, min_length=256))
    assert torch.equal(block_map(mask).kept, block_map(again).kept)
