# SPDX-License-Identifier: BSD-3-Clause
"""The kernels of calls under mods, interpreted, against the torch path."""

import math
from types import SimpleNamespace

import pytest
import torch

from sale_flex import reference
from sale_flex.blocks.bits import pack_bits, unpack_bits
from sale_flex.mods import compiler as bridge
from sale_flex.ops.fallback import compact as compact_torch
from sale_flex.ops.fallback import mass as mass_torch
from sale_flex.ops.fallback import moments, quantize
from sale_flex.ops.fallback import pool as pool_torch
from sale_flex.ops.fallback import rotation as rotation_torch
from sale_flex.ops.fallback import row_limits as row_limits_torch
from sale_flex.ops.fallback import scan as scan_torch
from sale_flex.testing import gamma

triton = pytest.importorskip("triton", reason="the kernels need triton")
tl = pytest.importorskip("triton.language")

from masked_harness import DOCUMENT, SEEN, SLOPE, asked, make, names, window_range  # noqa: E402

from sale_flex.kernels import compact, mass, pool, row_limits, scan, structure  # noqa: E402

# The interpreter computes with numpy, which warns where IEEE arithmetic is meant: ln 0, inf - inf, casts of NaN.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")


def check_structure(s: SimpleNamespace, key_range: object) -> None:
    got = structure.block_structure(s.spec, key_range, s.structure_heads, s.grid)
    assert all(torch.equal(*pair) for pair in zip(got, s.visibility, strict=True))


@pytest.mark.parametrize("options", SEEN, ids=names)
def test_structure(options):
    s = make(**options)
    for key_range in (None, (window_range, (200,))) if s.mask == "window" else (None,):
        check_structure(s, key_range)


@pytest.mark.parametrize(("mask", "key_range"), [("window", None), ("window", (window_range, (200,))), ("all", None)])
def test_structure_of_many_words(mask, key_range, monkeypatch):
    # More words than a program takes, or than it takes at a time, and a row of blocks whose last word is not full.
    s = make(q_len=64, kv_len=32 * 300, block=(64, 32), mask=mask, is_causal=False)
    check_structure(s, key_range)
    monkeypatch.setattr(structure, "LIST_WORDS", 4)
    check_lists(s)


@pytest.mark.parametrize("options", SEEN, ids=names)
@pytest.mark.parametrize(("sink", "local", "min_length"), [(4, 20, 0), (0, 1, 0), (70, 130, 150)])
def test_lists(options, sink, local, min_length):
    check_lists(make(**options, sink=sink, local=local, min_length=min_length))


def check_lists(s: SimpleNamespace) -> None:
    always, counts, lists = structure.candidate_blocks(s.visibility, s.bounds, s.is_causal, s.grid, s.near)
    assert torch.equal(always, s.candidates.always)
    assert torch.equal(counts, s.candidates.counts)
    used = torch.arange(s.grid.key_blocks) < counts.sum(-1, keepdim=True)
    assert torch.equal(lists[used], s.candidates.blocks[used])


@pytest.mark.parametrize("size", [1, 4, 16])
@pytest.mark.parametrize(("sample", "bits"), [(False, 4), (True, 8)])
@pytest.mark.parametrize("dim", [32, 80])
def test_pool(size, sample, bits, dim):
    s = make(
        dim=dim, dtype=torch.float16, q_len=70, kv_range=((0, 330), (270, 310)), batch=2, heads=3, pool=size,
        sample=sample, bits=bits,
    )  # fmt: skip
    s.query[0, 1, 5, 3] = torch.nan
    arguments = s.query, s.mean, s.bounds, s.scale, 64, size, sample, bits
    at = torch.arange(128)
    wanted = [
        pool_torch.pool_rows(query, (at < 70) & (at + offset >= start) & (at + offset < end), size, sample)
        for query, (offset, start, end) in zip(s.query, s.bounds.tolist())
    ]
    wanted = torch.stack(wanted)
    for squares in (True, False):
        rows, codes, square_codes, scales, shift = pool.pool_rows(*arguments, squares)
        assert rows.dtype == s.query.dtype
        assert torch.equal(rows.float().nan_to_num(1e4), wanted.nan_to_num(1e4))
        wanted_codes, wanted_scales = quantize.quantize_rows(
            wanted if squares else rotation_torch.rotated(wanted), bits, False
        )
        assert torch.equal(codes, wanted_codes[:, :, : rows.shape[2]])
        assert torch.equal(scales.nan_to_num(1e4), wanted_scales.nan_to_num(1e4))
        if squares:
            square = codes.int().square()
            assert torch.equal(square_codes.int(), square if bits == 4 else (square + 64) >> 7)
        else:
            assert square_codes.shape == (2, 3, 0, dim)
    # A sum of D products in any order, and a few roundings.
    products = wanted.double() @ s.mean.double().repeat(1, 3, 1)[..., None]
    error = gamma(dim + 3) * s.scale * (wanted.abs() @ s.mean.abs().repeat(1, 3, 1)[..., None])[..., 0]
    assert torch.equal(shift.isnan(), products[..., 0].isnan())
    assert ((shift - products[..., 0] * s.scale).abs() <= 2 * error).logical_or(shift.isnan()).all()
    if (size, dim) != (4, 80):
        return  # the interpreter takes its time for the plain kernel
    plain = pool.pool_queries(s.query, s.key, s.mean, s.bounds, s.scale, s.grid, s.options, s.near, 0, 2, 64)
    of_moments = pool.pool_rows(*arguments, True)
    for x, y in zip(of_moments[1:4], plain):
        assert torch.equal(x.nan_to_num(1e4), y[:, :, : x.shape[2]].nan_to_num(1e4))


def largest_logit(rows: torch.Tensor, key: torch.Tensor, scale: float) -> float:
    """Above what the terms of any logit add up to in magnitude."""
    sizes = (x.float().abs().nan_to_num(0, 0).amax((0, 1, 2)) for x in (rows, key))
    return scale * float(math.prod(sizes).sum())


def check_mass(s: SimpleNamespace) -> tuple[int, int]:
    """Assert that hits lie between those of the torch path at thresholds a rounding error apart; hits, candidates."""
    of_keys = moments.quantize_moments(s.key, s.mean, s.bounds, s.block[1], s.sub_block, s.bits)
    before, behind = (s.query, s.key, s.mean, of_keys), (s.scale, s.grid, s.options, s.near, s.budget)
    got, dropped = mass.mass_hits(*before, s.spec, s.structure, s.kernel_score, s.thresholds, *behind)
    # A logit is a sum of D products and a few operations; a mass and a total each a sum of exponentials of logits.
    pooled = reference.pool_rows(s.query, s.bounds, s.block[0], s.pool, s.sample).rows
    largest = largest_logit(pooled, s.key, s.scale)
    largest += {"alibi": 0.125 * s.kv_len, "bias": 5, "steep": 3.0 * s.kv_len}.get(s.score, 0)
    within = math.exp(2 * gamma(s.dim + 16) * largest + 2 * gamma(2 * s.kv_len))
    least, most = (
        mass_torch.mass_hits(*before, s.torch_spec, s.structure, s.torch_score, s.thresholds * factor, *behind)
        for factor in (within, 1 / within)
    )
    candidate = asked(s)
    found, few, many = (unpack_bits(x, s.grid.key_blocks) & candidate for x in (got, least[0], most[0]))
    assert not (few & ~found).any()
    assert not (found & ~many).any()
    assert (dropped >= 0).all()
    if torch.equal(few, many):
        assert torch.equal(dropped, least[1])
    # Nearly all blocks are clear of the threshold.
    assert (few ^ many).sum() <= 0.01 * candidate.sum() + 1
    return int(found.sum()), int(candidate.sum())


MASS = [
    {"threshold": 0.3},
    {"score": "alibi", "mask": "window", "is_causal": False, "heads": 4, "kv_heads": 1},
    {"score": "soft cap", "heads": 4, "kv_heads": 2, "pool": 1, "bits": 8, "threshold": 0.4},
    {"score": "bias", "sub_block": 1, "dim": 80, "heads": 3, "threshold": 0.3},
    {"score": "bias", "sub_block": 4, "dim": 64, "sample": True, "is_causal": False, "threshold": 0.3},
    {"mask": "documents", "sub_block": 32, "block": (64, 32), "pool": 16, "threshold": 0.15},
    {"mask": "by head", "heads": 4, "kv_heads": 2, "score": "alibi", "block": (128, 64)},
    {"mask": "documents", "block": (128, 128), "sub_block": 64, "is_causal": False, "dtype": torch.float16},
    {
        "kv_range": ((0, 530), (77, 510)), "q_len": 480, "batch": 2, "sub_block": 1, "bits": 8, "block": (128, 128),
        "threshold": 0.55,
    },
    {"listed": (64, 64), "score": "alibi", "threshold": 0.05},
    {"listed": (32, 16), "mask": "window", "pool": 8, "threshold": 0.3},
    {"listed": (128, 256), "is_causal": False, "listed_heads": 2, "score": "soft cap", "sub_block": 16,
     "threshold": 0.3},
]  # fmt: skip


@pytest.mark.parametrize("options", MASS, ids=names)
def test_mass(options):
    hits, candidates = check_mass(make(**{"q_len": 530, "kv_len": 530} | options))
    assert 0 < hits < candidates


@pytest.mark.parametrize("threshold", [0.0, 1.0])
def test_mass_of_extreme_thresholds(threshold):
    hits, candidates = check_mass(make(threshold=threshold, mask="documents", is_causal=False))
    assert hits == (candidates if threshold == 0 else 0)


@pytest.mark.parametrize("score", ["steep", "broken"])
@pytest.mark.parametrize("sub_block", [1, 8])
def test_mass_where_the_exact_part_is_no_reference(score, sub_block):
    # Far keys outweigh near ones by more than float32 holds; or scores are not finite, and count as absent.
    hits, candidates = check_mass(
        make(score=score, sub_block=sub_block, q_len=530, kv_len=530, threshold=0.3, sink=0, dim=32)
    )
    assert 0 < hits < candidates


def test_mass_without_an_exact_part():
    s = make(is_causal=False, sink=0, local=1, q_len=64, kv_len=640, threshold=0.15)
    # As if the rows' own blocks were candidates as well, and whole.
    counts = s.candidates.counts
    counts[..., 2] += counts[..., 0] + counts[..., 1]
    counts[..., :2] = 0
    hits, candidates = check_mass(s)
    assert 0 < hits < candidates


def test_mass_of_what_is_not_finite():
    s = make(q_len=530, kv_len=530, threshold=0.3, heads=4, kv_heads=2)
    s.key[0, 1, 70, 3] = torch.nan
    s.key[0, 0, 400, 0] = torch.inf
    s.query[0, 2, 500, 0] = torch.nan
    hits, candidates = check_mass(s)
    assert 0 < hits < candidates


@pytest.mark.parametrize(("budget", "threshold"), [(0, 0.05), (1, 0.0), (3, 0.05)])
def test_mass_within_a_budget(budget, threshold):
    s = make(q_len=400, kv_len=400, threshold=threshold, budget=budget, heads=4, mask="documents", is_causal=False)
    s.query[0, 1, 200, 0] = torch.nan
    s.key[0, 0, 3, 0] = torch.nan
    check_mass(s)


def test_mass_of_blocks_that_take_many_steps_and_tiles():
    hits, candidates = check_mass(make(q_len=700, kv_len=700, threshold=0.05, heads=2, score="alibi", block=(64, 32)))
    assert 0 < hits < candidates


RELATIVE = [
    {},
    {"threshold": 0.0},
    {"score": "alibi", "mask": "window", "is_causal": False, "heads": 4},
    {"score": "soft cap", "heads": 4, "kv_heads": 2, "bits": 8},
    {"score": "bias", "dim": 80, "heads": 3, "kv_range": ((13, 330),)},
    {"mask": "documents", "block": (64, 32)},
    {"mask": "by head", "heads": 4, "kv_heads": 2, "score": "alibi", "block": (128, 64)},
    {"mask": "documents", "block": (128, 128), "is_causal": False, "q_len": 530, "kv_len": 530, "heads": 1},
    {"kv_range": ((0, 330), (77, 310)), "q_len": 280, "batch": 2},
    {"listed": (32, 16), "is_causal": False},
    {"listed": (128, 256), "is_causal": False, "listed_heads": 2},
]


@pytest.mark.parametrize("options", RELATIVE, ids=names)
def test_relative(options):
    s = make(**{"threshold": 0.7} | options)
    s.query[0, 0, 200, 0] = torch.nan
    query_codes, query_scale = quantize.quantize_rows(s.query, s.bits, False)
    key_codes, key_scale = quantize.quantize_groups(s.key, s.mean, s.bounds, s.block[1], s.bits, False)
    before, behind = (s.query, query_scale, s.key, s.mean), (s.thresholds, s.scale, s.grid, s.near)
    limit, shift = row_limits.row_limits(*before, s.spec, s.structure, s.kernel_score, *behind)
    wanted, wanted_shift = row_limits_torch.row_limits(*before, s.torch_spec, s.structure, s.torch_score, *behind)
    assert limit.shape == wanted.shape == query_codes.shape[:3]
    largest = largest_logit(s.query, s.key, s.scale) + largest_logit(s.query, s.mean[:, :, None], s.scale)
    error = torch.tensor(2 * (gamma(s.dim + 8) * (largest + 0.125 * s.kv_len + 5) + gamma(s.kv_len)))
    if s.kernel_score is None:
        # Limits are products of codes, times the keys' scales.
        error = torch.ones_like(limit) * error
        error[:, :, : s.q_len] /= s.scale * query_scale
        error.nan_to_num_(0.0)
        error += 4 * torch.finfo(torch.float32).eps * wanted.abs().nan_to_num(0.0, 0.0, 0.0)
    else:
        assert torch.equal(shift.isnan(), wanted_shift.isnan())
        assert ((shift - wanted_shift).abs() <= error).logical_or(shift.isnan()).all()
    if s.threshold > 0:
        assert torch.equal(limit.isnan(), wanted.isnan())
        assert (limit == wanted).logical_or((limit - wanted).abs() <= error).logical_or(limit.isnan()).all()
    else:
        assert torch.equal(limit == torch.inf, wanted == torch.inf)

    codes = query_codes, query_scale, key_codes, key_scale
    lengths = s.scale, s.grid, s.local, False
    got = scan.scan_max(*codes, wanted, wanted_shift, s.spec, s.structure, s.kernel_score, *lengths)
    few, many = (
        scan_torch.scan_max(*codes, wanted + x, wanted_shift, s.torch_spec, s.structure, s.torch_score, *lengths)
        for x in (error, -error)
    )
    candidate = asked(s)
    found, few, many = (unpack_bits(x, s.grid.key_blocks) & candidate for x in (got, few, many))
    assert not (few & ~found).any()
    assert not (found & ~many).any()
    assert (few ^ many).sum() <= 0.01 * candidate.sum() + 1
    assert found.any()
    if s.threshold == 0:
        assert found.sum() == candidate.sum()
    if s.kernel_score is None:
        # Products of integers, times one scale: what is compared is the same to the bit.
        exact = scan_torch.scan_max(*codes, wanted, wanted_shift, s.torch_spec, s.structure, None, *lengths)
        assert torch.equal(found, unpack_bits(exact, s.grid.key_blocks) & candidate)


@pytest.mark.parametrize("options", SEEN[:6], ids=names)
@pytest.mark.parametrize("widths", [(100, 100), (2, 1)])
def test_compact(options, widths):
    s = make(**options)
    generator = torch.Generator().manual_seed(1)
    lines = s.batch, s.heads, s.grid.query_blocks, s.grid.words
    hits = torch.randint(-(2**31), 2**31, lines, generator=generator).int()
    bad = pack_bits(torch.rand(s.batch, s.kv_heads, s.grid.key_blocks, generator=generator) < 0.1)
    for nonfinite in (None, bad):
        arguments = (
            hits, nonfinite, s.bounds, s.visibility, s.candidates.always, s.kv_heads, s.grid, s.near, *widths
        )  # fmt: skip
        kept, partial, full, lists, overflow = compact.build_lists(*arguments, True, False)
        wanted = compact_torch.build_lists(*arguments, True, False)
        assert torch.equal(kept, wanted[0])
        assert torch.equal(partial, wanted[1])
        assert torch.equal(full, wanted[2])
        assert torch.equal(overflow, wanted[4])
        at = torch.arange(sum(widths))
        used = torch.where(at < widths[0], at < partial[..., None], at - widths[0] < full[..., None])
        assert torch.equal(lists[used], wanted[3][used])
        assert compact.build_lists(*arguments, False, False)[0].numel() == 0


def test_mods_that_the_bridge_makes():
    def score_mod(score, b, h, q_idx, kv_idx):
        return score + SLOPE[h] * (kv_idx - q_idx)

    def mask_mod(b, h, q_idx, kv_idx):
        return DOCUMENT[q_idx] == DOCUMENT[kv_idx]

    kernel = {}
    for mod, kind in ((score_mod, "score"), (mask_mod, "mask")):
        key, tensors, *_ = bridge.describe(mod, kind)
        kernel[kind] = bridge.program(key).triton, bridge.program(key).arguments(tensors)
    s = make(q_len=400, kv_len=400, heads=4, is_causal=False, mask="documents", score="alibi", threshold=0.1)
    s.spec = s.spec._replace(mask=kernel["mask"])
    check_structure(s, None)
    s.kernel_score = kernel["score"]
    s.visibility.full.zero_()  # no block is known to need no mask
    hits, candidates = check_mass(s)
    assert 0 < hits < candidates
