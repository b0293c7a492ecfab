# SPDX-License-Identifier: BSD-3-Clause
"""A causal mask_mod keeps the blocks of a causal call, and a window keeps the same with causality inside it or beside.

Masses are integers up to the float32 logarithm of a row's exact part, whose terms may be added in another order. So a
sum of masses may be off by 2 ** -16 octaves here and there, and one in some thousands of those crosses a level; in the
reference nothing does (test_reference.py).
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from gpu_harness import on_gpu, selective_inputs
from hypothesis import event, given
from hypothesis import strategies as st
from plain_harness import near_of, plain_spec
from torch import Tensor

from sale_flex import Mass, SaleConfig, create_sale_block_mask, reference
from sale_flex.blocks.bits import unpack_bits
from sale_flex.call.index_lists import plain_room
from sale_flex.kernels.arguments import Grid, MaskSpec, MassOptions, Structure
from sale_flex.mods import causal, sliding_window
from sale_flex.ops.fallback import moments, structure
from sale_flex.testing import Inputs, Shape, block_map, mass_error_bound, plant_needle, structured_inputs
from sale_flex.testing.strategies import configs, seeds, shapes

# The interpreter computes with numpy, which warns where IEEE arithmetic is meant: ln 0, inf - inf, casts of NaN.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning:triton")

DEFAULT = SaleConfig(Mass(0.03), sink_tokens=8, local_tokens=16, min_length=0, smooth_tokens=100)
FAST = SaleConfig(Mass.fast(threshold=0.03), sink_tokens=8, local_tokens=16, min_length=0, smooth_tokens=100)

RULES = {
    "scan": DEFAULT,
    "scan, 4 bits, mean rows": DEFAULT.with_options(pool=8, pool_mode="mean", bits=4),
    "scan of every row": DEFAULT.with_options(threshold=0.1, pool=1, pool_mode="last"),
    "moments": FAST,
    "moments, 8 bits, sampled rows": FAST.with_options(pool=4, pool_mode="last", sub_block=16, bits=8),
    "moments of 4": FAST.with_options(sub_block=4, block_size=(64, 32)),
    "large blocks": DEFAULT.with_options(threshold=0.1, block_size=(128, 128)),
    "wide query blocks": FAST.with_options(threshold=0.04, sub_block=64, block_size=(128, 64)),
    "a threshold per head": DEFAULT.with_options(threshold=torch.tensor([0.0, 0.01, 0.2, 1.0])),
    "threshold 0": DEFAULT.with_options(threshold=0.0),
    "threshold 1": DEFAULT.with_options(threshold=1.0),
    "early rows": replace(DEFAULT, min_length=200),
    "no sink": replace(DEFAULT, sink_tokens=0, local_tokens=1),
}

SQUARE = Shape(500, 500, heads=4, kv_heads=2, head_dim=32)
SHAPES = {
    "square": SQUARE,
    "padded": replace(SQUARE, batch=3, kv_range=((0, 500), (37, 490), (128, 333))),
    "a chunk": replace(SQUARE, q_len=200, q_offset=250),
    "a last chunk, padded": replace(SQUARE, q_len=150, batch=2, kv_range=((70, 500), (0, 471))),
    "a short one": replace(SQUARE, q_len=40),
    "decoding": replace(SQUARE, q_len=20),
    "the first rows": replace(SQUARE, q_len=300, q_offset=0),
}


def inputs_of(shape: Shape, seed: int, special: float | None = None) -> Inputs:
    """Structure and needles; `special` takes a number's place in a query or a key."""
    x = structured_inputs(shape, seed)
    for n in range(3):
        x = plant_needle(
            x, query=shape.q_len - 1 - 9 * n, key=150 + 77 * n, logit=9.0 - n, head=n % shape.heads, seed=n
        )
    if special is not None:
        for tensor in (x.query, x.key)[seed % 2 :]:
            tensor.view(-1)[seed % tensor.numel()] = special
    return x


def kept(x: Inputs, config: SaleConfig, shape: Shape, **options: Any) -> Tensor:
    call = shape.positions(x.query.device) | options
    return block_map(create_sale_block_mask(x.query, x.key, config, value=x.value, **call)).kept


def assert_same(plain: Tensor, masked: Tensor) -> None:
    differs = (plain != masked).nonzero().tolist()
    assert not differs, f"{len(differs)} of {plain.numel()} blocks differ, for instance {differs[0]}"


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_causal_mask_keeps_the_blocks_of_a_causal_call(shape, rule):
    config, shape = RULES[rule], SHAPES[shape]
    x = inputs_of(shape, 3)
    plain = kept(x, config, shape)
    assert_same(plain, kept(x, config, shape, mask_mod=causal(shape.offset), is_causal=False))
    if shape is SQUARE and rule in ("scan", "scan of every row", "moments"):
        assert 0.1 < plain.sum() / (shape.heads * 36) < 0.9  # of the blocks that are seen


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("shape", ["square", "padded", "a chunk"])
def test_a_window_is_the_same_with_causality_inside_and_beside(shape, rule):
    config, shape = RULES[rule], SHAPES[shape]
    x, mask_mod = inputs_of(shape, 4), sliding_window(270, shape.offset)
    assert_same(*(kept(x, config, shape, mask_mod=mask_mod, is_causal=beside) for beside in (True, False)))


@pytest.mark.parametrize("special", [torch.nan, torch.inf, 1e30])
@pytest.mark.parametrize("rule", ["scan", "moments", "no sink"])
def test_numbers_that_no_sum_survives(rule, special):
    for seed in range(6):
        x = inputs_of(SHAPES["padded"], seed * 4321, special)
        plain = kept(x, RULES[rule], SHAPES["padded"])
        assert_same(plain, kept(x, RULES[rule], SHAPES["padded"], mask_mod=causal(), is_causal=False))


@pytest.mark.parametrize("threshold", [0.0, 0.002, 0.02])
@pytest.mark.parametrize("rule", ["scan", "moments"])
def test_budgets(rule, threshold):
    shape = Shape(900, 900, batch=2, heads=2, kv_heads=1, head_dim=32, kv_range=((0, 900), (37, 890)))
    x = inputs_of(shape, 5)
    base = RULES[rule].with_options(threshold=threshold)
    room = plain_room(x.query, Grid(900, 900, *base.block_size), base.with_options(max_blocks=14), 0, False)
    for budget in range(1, 4):
        config = base.with_options(max_blocks=14 - room.budget + budget)
        plain, masked = kept(x, config, shape), kept(x, config, shape, mask_mod=causal(), is_causal=False)
        assert_same(plain, masked)
        assert plain.sum(-1).max() <= config.rule.max_blocks


def assert_near(plain: Tensor, masked: Tensor, x: Inputs, config: SaleConfig, shape: Shape) -> None:
    """Assert that blocks are the same, but for those that last bits of an exact part's logarithm can move."""
    differs = (plain != masked).cpu()
    if differs.any():
        expected = reference.keep_map(x.query, x.key, config, x.value, **shape.positions(), dtype=torch.float64)
        margin = expected.margin[differs].abs()
        assert (margin <= mass_error_bound(x.query, x.key)).all(), f"a block is {float(margin.max())} from its cut"
        assert differs.sum() <= 2e-4 * differs.numel() + 1


CALLS = shapes(max_tokens=600, min_tokens=250, groups=(1, 2), head_dims=(32, 64))
OPTIONS = configs(kinds=(Mass,), max_window=30, max_min_length=40)


@given(CALLS, seeds(), OPTIONS, st.sampled_from([None, None, torch.nan, torch.inf, 1e30]))
def test_a_causal_mask_keeps_the_blocks_of_a_causal_call_over_options(shape, seed, config, special):
    x = structured_inputs(shape, seed)
    if special is not None:
        for tensor in (x.query, x.key)[seed % 2 :]:
            tensor.view(-1)[seed % tensor.numel()] = special
    plain = kept(x, config, shape)
    masked = kept(x, config, shape, mask_mod=causal(shape.offset), is_causal=False)
    event(f"differ: {int((plain != masked).sum())}")
    assert_near(plain, masked, x, config, shape)


def kept_by_kernels(
    x: Inputs, config: SaleConfig, shape: Shape, window: int | None = None, budget: int = 10**6
) -> tuple[list[Tensor], Tensor]:
    """Kept blocks by the interpreted kernels, and candidates: bool ``[B, Hq, nq, nk]`` each.

    A causal call's and a causal mask's; with a `window`, its with causality beside and inside. Only the estimates are
    the kernels': what they take comes from the torch path.
    """
    pytest.importorskip("triton", reason="the kernels need triton")
    from masked_harness import CAUSAL_MASKS

    from sale_flex.kernels import mass

    grid, scale = Grid(shape.q_len, shape.kv_len, *config.block_size), shape.head_dim**-0.5
    bounds = reference.make_bounds(shape.batch, shape.q_len, shape.kv_len, **shape.positions())
    mean = reference.key_mean(x.key, bounds, config.smooth_tokens)
    of_reference = reference.mass_options(config)
    options = MassOptions(of_reference.sub_block, of_reference.pool, of_reference.sample, of_reference.bits)
    threshold = torch.as_tensor(config.rule.threshold, dtype=torch.float32).expand(shape.heads).contiguous()
    codes = moments.quantize_moments(x.key, mean, bounds, grid.block_k, options.sub_block, options.bits)
    near = near_of(config)
    in_triton, in_torch = CAUSAL_MASKS["causal" if window is None else "window"]
    numbers = (shape.offset,) if window is None else (shape.offset, window)

    def sees(b: Any, h: Any, q: Tensor, kv: Tensor) -> Tensor:
        return in_torch(q, kv, *numbers)

    made = []
    for beside in (True, False):
        visibility = structure.block_structure(MaskSpec(bounds, beside, sees, None, 1, 1), None, 1, grid)
        candidates = structure.candidate_blocks(visibility, bounds, beside, grid, near)
        of_call = MaskSpec(bounds, beside, (in_triton, numbers), None, 1, 1), Structure(visibility, candidates)
        if beside and window is None:
            of_call = plain_spec(bounds), None
        hits, _ = mass.mass_hits(
            x.query, x.key, mean, codes, *of_call, None, threshold, scale, grid, options, near, budget
        )
        hit, always, visible = (
            unpack_bits(words, grid.key_blocks) for words in (hits, candidates.always, visibility.visible)
        )
        made.append((hit | always) & visible)
    return made, (visible & ~always).expand_as(made[0])


SMALL = replace(SQUARE, q_len=330, kv_len=330, heads=2, kv_heads=1)
KERNEL_CASES = [
    ("scan", SMALL),
    ("scan", replace(SMALL, batch=2, kv_range=((37, 320), (0, 300)))),
    ("no sink", replace(SMALL, kv_range=((37, 310),))),
    ("scan, 4 bits, mean rows", replace(SMALL, q_len=150, q_offset=170)),
    ("moments", replace(SMALL, head_dim=80)),
    ("moments, 8 bits, sampled rows", replace(SMALL, kv_range=((0, 311),), dtype=torch.float16)),
    ("moments of 4", SMALL),
    ("large blocks", replace(SMALL, q_len=600, kv_len=600)),
    ("wide query blocks", replace(SMALL, q_len=530, kv_len=530, kv_range=((10, 520),))),
    ("a threshold per head", replace(SMALL, heads=4, kv_heads=2)),
]


@pytest.mark.parametrize(("rule", "shape"), KERNEL_CASES, ids=str)
def test_the_same_of_the_kernels(rule, shape):
    config = RULES[rule]
    x = inputs_of(shape, 3)
    (plain, masked), candidate = kept_by_kernels(x, config, shape)
    assert_same(plain, masked)
    assert 0 < (plain & candidate).sum() < candidate.sum()
    if rule in ("scan", "moments"):
        assert_same(*kept_by_kernels(x, config, shape, window=270)[0])


@pytest.mark.parametrize("budget", [0, 2])
@pytest.mark.parametrize("rule", ["scan", "moments"])
def test_budgets_of_the_kernels(rule, budget):
    # Not threshold 0: the plain kernel raises its cut 127 times, and the interpreter takes minutes for it.
    shape = replace(SMALL, kv_range=((37, 310),))
    config = RULES[rule].with_options(threshold=0.005)
    maps, _ = kept_by_kernels(inputs_of(shape, 5), config, shape, budget=budget)
    assert_same(*maps)


@pytest.mark.parametrize("special", [torch.nan, 1e30])
def test_numbers_that_no_sum_survives_of_the_kernels(special):
    for seed in (4321, 8642):
        assert_same(*kept_by_kernels(inputs_of(SMALL, seed, special), RULES["scan"], SMALL)[0])


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize(("tokens", "heads", "kv_heads"), [(4096, 8, 2), (8000, 4, 4)])
@pytest.mark.parametrize("rule", ["scan", "moments", "moments, 8 bits, sampled rows", "large blocks", "no sink"])
def test_the_same_on_a_gpu(rule, tokens, heads, kv_heads, head_dim):
    shape = Shape(tokens, tokens, heads=heads, kv_heads=kv_heads, head_dim=head_dim, dtype=torch.bfloat16)
    config = RULES[rule]
    for where in (
        shape,
        replace(shape, q_len=2000, q_offset=tokens - 3000),
        replace(shape, kv_range=((77, tokens - 90),)),
    ):
        inputs = selective_inputs(where, 3)
        x, window = on_gpu(inputs), sliding_window(tokens // 2, where.offset)
        plain = kept(x, config, where)
        masked = kept(x, config, where, mask_mod=causal(where.offset), is_causal=False)
        assert_near(plain, masked, inputs, config, where)
        assert_same(*(kept(x, config, where, mask_mod=window, is_causal=beside) for beside in (True, False)))
        assert 0.01 < plain.float().mean() < 0.45
