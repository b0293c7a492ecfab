# SPDX-License-Identifier: BSD-3-Clause
"""The kernels of programmed calls, interpreted, against the torch path."""

import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sale_flex.blocks.bits import pack_bits, unpack_bits
from sale_flex.mods import compiler as bridge
from sale_flex.ops.fallback import listed_compact as compact_torch
from sale_flex.ops.fallback import listed_mass as mass_torch
from sale_flex.ops.fallback import listed_pool as pool_torch
from sale_flex.ops.fallback import listed_relative as relative_torch
from sale_flex.ops.fallback import moments, quantize
from sale_flex.ops.fallback import structure as structure_torch
from sale_flex.testing import gamma

triton = pytest.importorskip("triton", reason="the kernels need triton")
tl = pytest.importorskip("triton.language")

sys.path.append(str(Path(__file__).resolve().parent))
from programmed_harness import DOCUMENT, SEEN, SLOPE, make, names, window_range  # noqa: E402

from sale_flex.kernels import listed_compact, listed_mass, listed_pool, listed_relative, structure  # noqa: E402
from sale_flex.kernels import pool as plain_pool  # noqa: E402

# The interpreter computes with numpy, which warns where IEEE arithmetic is meant: ln 0, inf - inf, casts of NaN.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")


@pytest.mark.parametrize("options", SEEN, ids=names)
def test_structure(options):
    s = make(**options)
    for key_range in (None, (window_range, (200,))) if s.mask == "window" else (None,):
        visible, full, rows = structure.block_structure(
            s.bounds, s.is_causal, s.kernel_mask, key_range, s.listed_bits, s.listed_q, s.listed_k, s.structure_heads,
            s.q_len, s.kv_len, *s.block,
        )  # fmt: skip
        assert torch.equal(visible, s.visible)
        assert torch.equal(full, s.full)
        assert torch.equal(rows, s.rows)


@pytest.mark.parametrize(("mask", "key_range"), [("window", None), ("window", (window_range, (200,))), ("all", None)])
def test_structure_of_many_words(mask, key_range, monkeypatch):
    # More words than a program takes, or than it takes at a time, and a row of blocks whose last word is not full.
    s = make(q_len=64, kv_len=32 * 300, block=(64, 32), mask=mask, is_causal=False)
    sizes = s.q_len, s.kv_len, *s.block
    got = structure.block_structure(s.bounds, False, s.kernel_mask, key_range, None, 0, 0, 1, *sizes)
    assert all(torch.equal(*pair) for pair in zip(got, (s.visible, s.full, s.rows)))
    monkeypatch.setattr(structure, "LIST_WORDS", 4)
    check_lists(s)


@pytest.mark.parametrize("options", SEEN, ids=names)
@pytest.mark.parametrize(("sink", "local", "min_length"), [(4, 20, 0), (0, 1, 0), (70, 130, 150)])
def test_lists(options, sink, local, min_length):
    check_lists(make(**options, sink=sink, local=local, min_length=min_length))


def check_lists(s: SimpleNamespace) -> None:
    sizes = s.q_len, s.kv_len, *s.block, s.sink, s.local, s.min_length
    always, counts, lists = structure.block_lists(s.visible, s.full, s.rows, s.bounds, s.is_causal, *sizes)
    assert torch.equal(always, s.always)
    assert torch.equal(counts, s.counts)
    used = torch.arange(s.blocks) < counts.sum(-1, keepdim=True)
    assert torch.equal(lists[used], s.lists[used])


@pytest.mark.parametrize("pool", [1, 4, 16])
@pytest.mark.parametrize(("sample", "bits"), [(False, 4), (True, 8)])
@pytest.mark.parametrize("dim", [32, 80])
def test_pool(pool, sample, bits, dim):
    s = make(dim=dim, dtype=torch.float16, q_len=70, kv_range=((0, 330), (270, 310)), batch=2, heads=3)
    s.query[0, 1, 5, 3] = torch.nan
    arguments = s.query, s.mean, s.bounds, s.scale, 64, pool, sample, bits
    expected = pool_torch.listed_pool(*arguments, True)
    got = listed_pool.listed_pool(*arguments, True)
    for x, wanted in zip(got[:4], expected[:4]):
        assert x.dtype == wanted.dtype
        assert torch.equal(x.nan_to_num(1e4), wanted.nan_to_num(1e4))
    # A sum of D products in any order, and a few roundings.
    error = gamma(dim + 3) * s.scale * (expected[0].float().abs() @ s.mean.abs().repeat(1, 3, 1)[..., None])[..., 0]
    assert torch.equal(got[4].isnan(), expected[4].isnan())
    assert ((got[4] - expected[4]).abs() <= 2 * error).logical_or(got[4].isnan()).all()
    assert listed_pool.listed_pool(*arguments, False)[2].shape == (2, 3, 0, dim)
    if (pool, dim) != (4, 80):
        return  # the interpreter takes its time for the plain kernel
    codes, squares, scales, _ = plain_pool.pool_queries(
        s.query, s.key, s.mean, s.bounds, s.scale, 64, 64, pool, sample, bits, 4, 20, 0, 2, 64, True
    )
    for x, plain in zip(got[1:4], (codes, squares, scales)):
        assert torch.equal(x.nan_to_num(1e4), plain[:, :, : x.shape[2]].nan_to_num(1e4))


def largest_logit(rows: torch.Tensor, key: torch.Tensor, scale: float) -> float:
    """Above what the terms of any logit add up to in magnitude."""
    sizes = (x.float().abs().nan_to_num(0, 0).amax((0, 1, 2)) for x in (rows, key))
    return scale * float(math.prod(sizes).sum())


def mass_arguments(s: SimpleNamespace) -> tuple[tuple, tuple]:
    """What comes before the sight and behind the scale, of `listed_mass`."""
    codes = moments.quantize_moments(s.key, s.mean, s.bounds, s.block[1], s.sub_block, s.bits)
    pooled = pool_torch.listed_pool(
        s.query, s.mean, s.bounds, s.scale, s.block[0], s.pool, s.sample, s.bits, s.sub_block > 1
    )
    s.flagged, s.pooled = codes[4], pooled
    behind = s.q_len, *s.block, s.sub_block, s.pool, s.bits, s.budget
    return (s.key, *codes, *pooled, s.counts, s.lists, s.full), behind


def check_mass(s: SimpleNamespace) -> tuple[int, int]:
    """Assert that hits lie between those of the torch path at thresholds a rounding error apart; hits, candidates."""
    before, behind = mass_arguments(s)
    got, dropped = listed_mass.listed_mass(*before, *s.sight, s.kernel_score, s.thresholds, s.scale, *behind)
    # A logit is a sum of D products and a few operations; a mass and a total each a sum of exponentials of logits.
    largest = largest_logit(s.pooled[0], s.key, s.scale)
    largest += {"alibi": 0.125 * s.kv_len, "bias": 5, "steep": 3.0 * s.kv_len}.get(s.score, 0)
    within = math.exp(2 * gamma(s.dim + 16) * largest + 2 * gamma(2 * s.kv_len))
    least, most = (
        mass_torch.listed_mass(*before, *s.torch_sight, s.torch_score, s.thresholds * factor, s.scale, *behind)
        for factor in (within, 1 / within)
    )
    kinds = structure_torch.block_kinds(s.counts, s.lists)
    candidate = ((kinds == structure_torch.PARTIAL) | (kinds == structure_torch.WHOLE)).expand(-1, s.heads, -1, -1)
    found, few, many = (unpack_bits(x, s.blocks) & candidate for x in (got, least[0], most[0]))
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
    s.counts[..., 2] += s.counts[..., 0] + s.counts[..., 1]
    s.counts[..., :2] = 0
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
    arguments = s.query, s.key, s.mean, s.counts, s.lists, s.rows
    behind = s.thresholds, s.scale, *s.block
    limit, shift = listed_relative.listed_limits(*arguments, *s.sight, s.kernel_score, *behind, s.sink, s.local)
    wanted, wanted_shift = relative_torch.listed_limits(
        *arguments, *s.torch_sight, s.torch_score, *behind, s.sink, s.local
    )
    largest = largest_logit(s.query, s.key, s.scale)
    error = 2 * (gamma(s.dim + 8) * (largest + 0.125 * s.kv_len + 5) + gamma(s.kv_len))
    assert torch.equal(shift.isnan(), wanted_shift.isnan())
    assert ((shift - wanted_shift).abs() <= error).logical_or(shift.isnan()).all()
    if s.threshold > 0:
        assert torch.equal(limit.isnan(), wanted.isnan())
        assert (limit == wanted).logical_or((limit - wanted).abs() <= error).logical_or(limit.isnan()).all()
    else:
        assert torch.equal(limit == torch.inf, wanted == torch.inf)

    query_codes, query_scale = quantize.quantize_rows(s.query, s.bits)
    key_codes, key_scale = quantize.quantize_groups(s.key, s.mean, s.bounds, s.block[1], s.bits)
    codes = query_codes, query_scale, key_codes, key_scale
    behind = s.counts, s.lists
    lengths = s.scale, s.q_len, s.kv_len, *s.block
    got = listed_relative.listed_scan(*codes, wanted, wanted_shift, *behind, *s.sight, s.kernel_score, *lengths)
    few, many = (
        relative_torch.listed_scan(*codes, wanted + x, wanted_shift, *behind, *s.torch_sight, s.torch_score, *lengths)
        for x in (error, -error)
    )
    kinds = structure_torch.block_kinds(s.counts, s.lists)
    candidate = ((kinds == structure_torch.PARTIAL) | (kinds == structure_torch.WHOLE)).expand(-1, s.heads, -1, -1)
    found, few, many = (unpack_bits(x, s.blocks) & candidate for x in (got, few, many))
    assert not (few & ~found).any()
    assert not (found & ~many).any()
    assert (few ^ many).sum() <= 0.01 * candidate.sum() + 1
    assert found.any()
    if s.threshold == 0:
        assert found.sum() == candidate.sum()


@pytest.mark.parametrize("options", SEEN[:6], ids=names)
@pytest.mark.parametrize("widths", [(100, 100), (2, 1)])
def test_compact(options, widths):
    s = make(**options)
    generator = torch.Generator().manual_seed(1)
    words = s.visible.shape[-1]
    hits = torch.randint(-(2**31), 2**31, (s.batch, s.heads, s.visible.shape[2], words), generator=generator).int()
    bad = pack_bits(torch.rand(s.batch, s.kv_heads, s.blocks, generator=generator) < 0.1)
    for nonfinite in (None, bad):
        arguments = hits, nonfinite, s.visible, s.full, s.always, s.kv_heads, *widths, s.blocks
        kept, partial, full, lists, dropped = listed_compact.listed_compact(*arguments, True)
        wanted = compact_torch.listed_compact(*arguments, True)
        assert torch.equal(kept, wanted[0])
        assert torch.equal(partial, wanted[1])
        assert torch.equal(full, wanted[2])
        assert torch.equal(dropped, wanted[4])
        at = torch.arange(sum(widths))
        used = torch.where(at < widths[0], at < partial[..., None], at - widths[0] < full[..., None])
        assert torch.equal(lists[used], wanted[3][used])
        assert listed_compact.listed_compact(*arguments, False)[0].numel() == 0


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
    got = structure.block_structure(s.bounds, False, kernel["mask"], None, None, 0, 0, 1, s.q_len, s.kv_len, *s.block)
    assert all(torch.equal(*pair) for pair in zip(got, (s.visible, s.full, s.rows)))
    s.sight = (s.bounds, False, kernel["mask"], None, 0, 0)
    s.kernel_score = kernel["score"]
    s.full.zero_()  # no block is known to need no mask
    hits, candidates = check_mass(s)
    assert 0 < hits < candidates
