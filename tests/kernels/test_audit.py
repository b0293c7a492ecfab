# SPDX-License-Identifier: BSD-3-Clause
"""The audit's kernels, interpreted, against the torch path, and on a GPU against the reference's arithmetic."""

import math

import pytest
import torch

from sale_flex import Mass, SaleConfig, create_sale_block_mask
from sale_flex.blocks.bits import pack_bits
from sale_flex.call.audit import WANTED
from sale_flex.ops.fallback import audit as audit_torch
from sale_flex.testing import Shape, gamma, structured_inputs
from sale_flex.testing.programs import PROGRAMS

pytest.importorskip("triton", reason="the kernels need triton")

from masked_harness import SEEN, make, names

from sale_flex.kernels import audit as audit_kernel

# The interpreter computes with numpy, which warns where IEEE arithmetic is meant: inf - inf, casts of NaN.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")

PLAIN = [
    {},
    {"q_len": 150, "kv_range": ((0, 330), (77, 310)), "batch": 2},
    {"q_len": 350, "kv_len": 300, "kv_range": ((5, 290),), "heads": 4, "kv_heads": 2},
    {"q_len": 200, "kv_len": 700, "block": (64, 32), "dtype": torch.float16, "dim": 80},
    {"q_len": 300, "kv_len": 300, "block": (128, 128), "dtype": torch.float16, "min_length": 100},
    {"q_len": 5, "kv_len": 40},
]
"""Calls in which nothing but causality is asked. The interpreter multiplies no bfloat16."""


def check(s, plain: bool) -> torch.Tensor:
    """Assert that masses lie between those of the torch path at thresholds a rounding error apart; one of these."""
    generator = torch.Generator().manual_seed(9)
    shape = (s.batch, s.heads, s.grid.query_blocks, s.grid.key_blocks)
    hits = pack_bits(torch.rand(shape, generator=generator) < 0.4)
    nonfinite = pack_bits(torch.rand(s.batch, s.kv_heads, s.grid.key_blocks, generator=generator) < 0.1)
    s.key[0, 0, 37, 3] = torch.inf

    def ask(module, spec, score, least, flags=nonfinite):
        structure = None if plain else s.structure
        return module.audit_rows(s.query, s.key, hits, flags, spec, structure, score, s.scale, least, s.grid, s.near)

    finite = s.key.float().nan_to_num(posinf=0.0)
    largest = s.scale * float(s.query.float().norm(dim=-1).max() * finite.norm(dim=-1).max())
    # Mods here multiply a logit's error by 4 at most, and add roundings of numbers below 2,000 of their own.
    error = math.expm1(2 * (4 * gamma(s.dim + 2) * largest + gamma(8) * 2000 * (s.score != "none"))) + gamma(
        s.kv_len + 40
    )
    for flags in (nonfinite, None):
        got = ask(audit_kernel, s.spec, s.kernel_score, WANTED, flags)
        low = ask(audit_torch, s.torch_spec, s.torch_score, WANTED * (1 + error), flags)
        high = ask(audit_torch, s.torch_spec, s.torch_score, WANTED * (1 - error), flags)
        assert torch.equal(got[..., 0], low[..., 0])
        assert (got >= low * (1 - error) - 1e-30).all()
        assert (got <= high * (1 + error)).all()
    return low


@pytest.mark.parametrize("options", PLAIN, ids=names)
def test_plain_calls(options):
    check(make(**options), plain=True)


@pytest.mark.parametrize("options", SEEN, ids=names)
def test_masks(options):
    check(make(**options), plain=False)


@pytest.mark.parametrize("score", ["alibi", "soft cap", "bias", "broken"])
def test_scores(score):
    check(make(score=score, mask="documents", heads=4, kv_heads=2), plain=False)


def test_rows_go_through_in_ranges(monkeypatch):
    monkeypatch.setattr(audit_kernel, "RANGE_BYTES", 1)
    # 68 rows in tiles of 64, and more key blocks than a program weighs.
    rows = check(make(q_len=64 * 66, kv_len=64 * 66, dim=16), plain=True)
    assert (rows[..., 1] > 0).sum() > 20
    assert 0 < (rows[..., 2] > 0).sum() < (rows[..., 1] > 0).sum()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dim", [64, 80, 128, 256])
def test_on_a_gpu_it_is_what_the_torch_path_says(dtype, dim):
    shape = Shape(1500, 3100, batch=2, heads=4, kv_heads=2, head_dim=dim, dtype=dtype, q_offset=1600)
    s = make_on_gpu(shape)
    compare(s, None)
    for block in ((64, 32), (128, 64), (128, 128)):
        compare(s, None, block)


@pytest.mark.gpu
@pytest.mark.parametrize("offset", [3800, 7900, 20000])
def test_on_a_gpu_far_positions(offset):
    shape = Shape(700, offset + 700, heads=2, kv_heads=1, head_dim=64, dtype=torch.bfloat16, q_offset=offset)
    compare(make_on_gpu(shape), None)


@pytest.mark.gpu
@pytest.mark.parametrize("program", PROGRAMS)
def test_on_a_gpu_under_programs(program):
    shape = Shape(1000, 1000, batch=2, heads=4, kv_heads=2, head_dim=64, dtype=torch.bfloat16)
    compare(make_on_gpu(shape), program)


def make_on_gpu(shape: Shape):
    return shape, structured_inputs(shape, 3)


def compare(made, program, block=(64, 64)) -> None:
    """Assert that counts on the GPU are those on the CPU, to a thousandth, but for blocks at the threshold."""
    shape, (query, key, _) = made
    config = SaleConfig(Mass(1.0), min_length=0, sink_tokens=4, local_tokens=16, block_size=block)
    audits = []
    for device in ("cpu", "cuda"):
        options = shape.positions() if program is None else PROGRAMS[program](shape, device)
        options = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
        stats = create_sale_block_mask(query.to(device), key.to(device), config, stats=True, **options).stats
        audits.append(stats.audit)
    assert torch.equal(audits[0].rows, audits[1].rows.cpu())
    for name in ("wanted_mass", "missed_mass", "missed_squares"):
        expected, got = (getattr(audit, name).cpu() for audit in audits)
        # A block of about 5 % may be wanted by one and not by the other, none or one in each head; a row's square then
        # changes by twice that at most.
        step = WANTED * (2.1 if name == "missed_squares" else 1.01)
        assert ((got - expected).abs() <= 1e-3 * expected + step).all()
        assert (got - expected).abs().median() <= 1e-3 * expected.median() + 1e-6
