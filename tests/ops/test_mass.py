# SPDX-License-Identifier: BSD-3-Clause
"""The stages of the mass rule: the reference against the definition, torch path and interpreted kernels against it."""

import math
import struct
from types import SimpleNamespace

import pytest
import torch
from hypothesis import Phase, event, given, settings
from hypothesis import strategies as st
from plain_harness import near_of, plain_mass_hits

from sale_flex import Mass, SaleConfig, reference
from sale_flex.blocks.bits import unpack_bits
from sale_flex.config import BLOCK_SIZES
from sale_flex.ops.fallback import mass, moments
from sale_flex.testing import Shape, gamma, mass_error_bound, random_inputs, structured_inputs, unit_roundoff
from sale_flex.testing.strategies import HEAD_DIMS, configs, seeds, shapes

# The interpreter computes with numpy, which warns where IEEE arithmetic is meant: ln 0, inf - inf, casts of NaN.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning:triton")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LOG2E = 1.4426950408889634
CONFIGS = configs(kinds=(Mass,), max_min_length=0, max_window=40)
SELECTIVE = configs(kinds=(Mass,), max_min_length=0, max_window=12)


def kernel(module: str):
    pytest.importorskip("triton", reason="the kernels need triton")
    from importlib import import_module

    return import_module(f"sale_flex.kernels.{module}")


def stages(shape, seed, config, special=None) -> SimpleNamespace:
    """What the rule's stages take."""
    x = structured_inputs(shape, seed)
    if special is not None:
        for tensor in (x.query, x.key)[seed % 2 :]:
            tensor.view(-1)[seed % tensor.numel()] = special
    call = reference.make_call(x.query, x.key, config, **shape.positions(), dtype=torch.float64)
    mean, bounds = call.mean, call.bounds
    options = reference.mass_options(config)
    threshold = torch.as_tensor(config.rule.threshold, dtype=torch.float32).expand(shape.heads).contiguous()
    return SimpleNamespace(**locals(), scale=shape.head_dim**-0.5, blocks=-(-shape.kv_len // config.block_size[1]))


def rounded(x: float) -> float:
    """The nearest float32."""
    return struct.unpack("f", struct.pack("f", x))[0]


def rotated(x: torch.Tensor) -> torch.Tensor:
    """A vector of 2**n channels times a Hadamard matrix: that of sums of neighbours, then that of differences."""
    if len(x) == 1:
        return x
    return torch.cat([rotated(x[::2] + x[1::2]), rotated(x[::2] - x[1::2])])


def sums_by_definition(s: SimpleNamespace, b: int, head: int, pooled_row: int) -> dict[int, float]:
    """Candidate block -> what a pooled row sees in it in units of its exact part, one element after the other."""
    shape, config, (start, end) = s.shape, s.config, s.shape.valid(b)
    block_q, block_k = config.block_size
    offset, dim, bits = shape.offset, shape.head_dim, config.rule.bits
    top, square_top, var_top = (7, 49, 15) if bits == 4 else (127, 126, 127)
    scanned = s.options.sub_block == 1

    def real(rows) -> list[int]:
        return [i for i in rows if i < shape.q_len and start <= offset + i < end]

    members = real(range(pooled_row * s.options.pool, (pooled_row + 1) * s.options.pool))
    if not members:
        return {}
    row = s.x.query[b, head, members[0]].float()
    for i in members[1:]:
        row = s.x.query[b, head, i].float() + (0 if s.options.sample else row)
    if not s.options.sample:
        row = (row * rounded(1 / len(members))).to(shape.dtype).float()
    position = offset + members[-1]
    block = pooled_row * s.options.pool // block_q
    low = offset + real(range(block * block_q, (block + 1) * block_q))[0]
    candidates = range(-(-(start + config.sink_tokens) // block_k), max(low - config.local_tokens + 1, 0) // block_k)

    kv_head = head // (shape.heads // shape.kv_heads)
    smooth = s.x.key[b, kv_head].float() - s.mean[b, kv_head]
    logits = (smooth.double() @ row.double() * s.scale).tolist()
    exact = sum(math.exp(logits[j]) for j in range(start, position + 1) if j // block_k not in candidates)
    if scanned:
        row = rotated(row)
    row_scale = rounded(float(row.abs().max()) / top)
    codes = [round(x) for x in (row * (torch.tensor(float(top)) / row.abs().max())).tolist()]
    squares = [c * c if bits == 4 else (c * c + 64) >> 7 for c in codes]
    square_scale = rounded(row_scale * row_scale) * (1 if bits == 4 else 128)
    unit = LOG2E * 2.0**16

    def term(product: int, of_row: float, constant: float, of_block: float, largest: int) -> int:
        """A product of codes in steps of 2**-16 octaves, in integers alone."""
        factor = min(rounded(rounded(of_row * rounded(constant)) * of_block), 2**29 // largest)
        if bits == 4:
            return product * round(factor)
        shift = min(max(12 - math.frexp(factor)[1], 4), 8) if factor else 8
        return (product >> shift) * round(factor * 2**shift) + (round(factor * 2**shift) >> 1)

    def of_mean(product: int) -> int:
        constant = s.scale / (dim if scanned else 1) * unit
        return term(product, row_scale, constant, rounded(float(mu_top) / top), dim * top * top)

    def of_var(product: int) -> int:
        constant = s.scale**2 / 2 * unit
        of_block = rounded(float(var_most) / var_top)
        return term(product, square_scale, constant, of_block, dim * square_top * var_top)

    bias = (rounded(127 - 0.0430 + math.log2(s.options.sub_block)) - math.log2(exact)) * 2**16
    bias = round(min(max(bias, -(2**29)), 2**29))
    sums = {}
    for j in candidates:
        keys = smooth[j * block_k : (j + 1) * block_k].unflatten(0, (-1, s.options.sub_block))
        mu = torch.zeros(keys.shape[0], dim)
        for member in keys.unbind(1):
            mu = mu + member
        mu = mu / s.options.sub_block
        var = torch.zeros_like(mu)
        for member in keys.unbind(1):
            var = var + (member - mu) ** 2
        var = var / s.options.sub_block
        if scanned:
            mu = torch.stack([rotated(each) for each in mu])
        mu_top, var_most = mu.abs().max(), var.max()
        total = 0.0
        for sub in range(len(mu)):
            mu_codes = [round(x) for x in (mu[sub] * (torch.tensor(float(top)) / mu_top)).tolist()]
            logit = of_mean(sum(c * d for c, d in zip(codes, mu_codes))) + bias
            if s.options.sub_block > 1:
                var_codes = [round(x) for x in (var[sub] * (torch.tensor(float(var_top)) / var_most)).tolist()]
                spread = of_var(sum(c * d for c, d in zip(squares, var_codes)))
                logit += min(spread, round(2 * (s.options.sub_block - 1) * LOG2E * 2**16))
            logit = min(max(logit, 0), 227 << 16)
            total += struct.unpack("f", struct.pack("I", logit << 7))[0]
        sums[j] = total
    return sums


@settings(max_examples=max(10, settings.default.max_examples // 3))
@given(
    shapes(max_tokens=330, min_tokens=200, batch=1, groups=(1, 3), head_dims=(32,), dtypes=DTYPES, chunked=False),
    seeds(),
    SELECTIVE,
    st.data(),
)
def test_row_masses_are_the_definition(shape, seed, config, data):
    s = stages(shape, seed, config)
    got = reference.row_masses(s.call, s.options)
    head = data.draw(st.integers(0, shape.heads - 1), label="head")
    rows = range(got.sums.shape[2])
    with_candidates = got.candidate[0, 0].any(-1).nonzero().flatten().tolist()
    event(f"rows with candidates: {len(with_candidates) > 0}")
    for row in {rows[-1], data.draw(st.sampled_from(with_candidates or rows), label="pooled row")}:
        expected = sums_by_definition(s, 0, head, row)
        assert got.candidate[0, 0, row].nonzero().flatten().tolist() == list(expected)
        sums = [float(got.sums[0, head, row, j]) for j in expected]
        assert sums == pytest.approx(list(expected.values()), rel=1e-12)
        assert float(got.total[0, head, row]) == pytest.approx(1 + sum(expected.values()), rel=1e-12)


@given(shapes(max_tokens=300, dtypes=DTYPES), seeds(), st.sampled_from([1, 2, 4, 8, 16]), st.booleans())
def test_a_pooled_row_is_the_mean_or_the_last_of_its_real_rows(shape, seed, pool, sample):
    query = random_inputs(shape, seed).query
    bounds = reference.make_bounds(shape.batch, shape.q_len, shape.kv_len, **shape.positions())
    rows, position = reference.pool_rows(query, bounds, 64, pool, sample)
    assert rows.shape[2] == -(-shape.q_len // 64) * 64 // pool
    for b in range(shape.batch):
        start, end = shape.valid(b)
        for r in range(rows.shape[2]):
            real = [i for i in range(r * pool, min(r * pool + pool, shape.q_len)) if start <= shape.offset + i < end]
            assert position[b, r] == (shape.offset + real[-1] if real else -1)
            if sample or not real:
                expected = query[b, :, real[-1]].float() if real else torch.zeros_like(rows[b, :, r])
                assert torch.equal(rows[b, :, r], expected)
            else:
                mean = query[b, :, real].double().mean(1)
                error = gamma(pool + 2) + unit_roundoff(shape.dtype) * (1 + gamma(pool + 2))
                assert torch.equal(rows[b, :, r].to(shape.dtype).float(), rows[b, :, r])
                assert ((rows[b, :, r] - mean).abs() <= error * query[b, :, real].double().abs().mean(1)).all()


def check_moments(implementation, shape, seed, config, special=None):
    """Assert that codes, scales and flags are the reference's, bit for bit, and what fills a tile is 0."""
    s = stages(shape, seed, config, special)
    arguments = s.x.key, s.mean, s.bounds, config.block_size[1], s.options.sub_block, config.rule.bits
    expected = reference.quantize_moments(*arguments)
    *got, nonfinite = implementation.quantize_moments(*arguments)
    subs = s.blocks * config.block_size[1] // s.options.sub_block
    assert got[0].shape[2] == -(-subs // 256) * 256
    for x, wanted in zip(got, expected):
        assert x.dtype == wanted.dtype
        assert torch.equal(x[:, :, : wanted.shape[2]], wanted)
        assert not x[:, :, wanted.shape[2] :].any()
    assert torch.equal(unpack_bits(nonfinite, s.blocks), expected.nonfinite)


SPECIALS = st.sampled_from([None, None, torch.nan, torch.inf])
SMALL = shapes(
    max_tokens=200,
    min_tokens=130,
    head_dims=(32, 80),
    kv_heads=(1,),
    groups=(1, 2),
    batch=1,
    dtypes=(torch.float32, torch.float16),
    chunked=False,
)

# The interpreter takes a second or two an example.
FEW = settings(max_examples=max(5, settings.default.max_examples // 5), phases=(Phase.explicit, Phase.generate))


@given(shapes(max_tokens=700, dtypes=DTYPES, head_dims=HEAD_DIMS), seeds(), CONFIGS, SPECIALS)
def test_moments_of_the_torch_path(shape, seed, config, special):
    check_moments(moments, shape, seed, config, special)


@FEW
@given(SMALL, seeds(), CONFIGS, SPECIALS)
def test_moments_of_the_kernel(shape, seed, config, special):
    check_moments(kernel("moments"), shape, seed, config, special)


def check_hits(implementation, s: SimpleNamespace, budget: int | None = None, within: float | None = None) -> int:
    """Assert that hits lie between the reference's with masses at their least and their most, and count what differs.

    `within` is how far float32 may move sums and totals, in nats, if not by `mass_error_bound`.
    """
    options, sizes = s.options, s.options.block_size
    codes = moments.quantize_moments(s.x.key, s.mean, s.bounds, sizes[1], options.sub_block, options.bits)
    words, dropped = plain_mass_hits(
        implementation, s.x.query, s.x.key, s.mean, codes, s.bounds, s.threshold, s.scale, options,
        near_of(s.config), s.blocks if budget is None else budget,
    )  # fmt: skip
    assert words.dtype == dropped.dtype == torch.int32
    assert words.shape == (*dropped.shape, -(-s.blocks // 32))
    found = unpack_bits(words, s.blocks)
    flagged = unpack_bits(codes.nonfinite, s.blocks).repeat_interleave(s.shape.heads // s.shape.kv_heads, 1)[:, :, None]
    masses = reference.row_masses(s.call, options)
    rows = sizes[0] // options.pool
    candidate = masses.candidate.unflatten(2, (-1, rows)).any(3)
    assert found[(candidate & flagged).expand_as(found)].all()

    factor = math.exp(mass_error_bound(s.x.query, s.x.key) if within is None else within)
    least, most = (
        reference.decide(
            masses._replace(sums=masses.sums * of_sums, total=masses.total / of_sums),
            s.threshold[:, None],
            flagged,
            rows,
            budget,
        )
        for of_sums in (1 / factor, factor)
    )
    # Where a count is on the edge of the budget, the cut may rise by one level more or less.
    clear = least.raised == most.raised
    asked = candidate & ~flagged & clear[..., None]
    assert not (least.hit & ~found & asked).any()
    assert not (found & ~most.hit & asked).any()
    few, many = (((x.hit | x.dropped) & asked).sum(-1) for x in (least, most))
    assert (clear.logical_not() | (dropped >= few - (most.hit & asked).sum(-1))).all()
    assert (clear.logical_not() | (dropped <= many - (least.hit & asked).sum(-1))).all()
    return int((most.hit ^ least.hit).sum())


@given(shapes(max_tokens=700, dtypes=DTYPES), seeds(), CONFIGS, SPECIALS)
def test_hits_of_the_torch_path(shape, seed, config, special):
    event(f"on the very threshold: {check_hits(mass, stages(shape, seed, config, special))}")


LONG = shapes(max_tokens=700, min_tokens=400, batch=1, chunked=False)


@given(LONG, seeds(), SELECTIVE, st.floats(1e-3, 0.3), st.integers(0, 4))
def test_hits_within_a_budget_of_the_torch_path(shape, seed, config, threshold, budget):
    check_hits(mass, stages(shape, seed, config.with_options(threshold=threshold)), budget)


# Not bfloat16: the interpreter keeps it as integers and multiplies those in a dot. test_gpu.py has it.
@FEW
@given(SMALL, seeds(), SELECTIVE, SPECIALS)
def test_hits_of_the_kernel(shape, seed, config, special):
    check_hits(kernel("mass"), stages(shape, seed, config, special))


@FEW
@given(SMALL, seeds(), SELECTIVE, st.floats(1e-3, 0.3), st.integers(0, 3))
def test_hits_within_a_budget_of_the_kernel(shape, seed, config, threshold, budget):
    check_hits(kernel("mass"), stages(shape, seed, config.with_options(threshold=threshold)), budget)


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("sub_block", [1, 4, 32])
def test_hits_of_every_block_size(block_size, sub_block):
    # Left padding that cuts a block, with and without a sink, and more heads than the tile holds at once.
    shape = Shape(600, 600, batch=2, heads=4, kv_heads=2, head_dim=32, kv_range=((0, 600), (37, 590)))
    for sink_tokens in (0, 5):
        config = SaleConfig(
            Mass.fast(threshold=0.1, sub_block=sub_block),
            block_size=block_size, sink_tokens=sink_tokens, local_tokens=8, min_length=0, smooth_tokens=100,
        )  # fmt: skip
        assert check_hits(mass, stages(shape, 3, config)) <= 2


@pytest.mark.parametrize("sub_block", [8, 1])
def test_hits_of_the_kernel_over_many_steps_and_groups_of_heads(sub_block):
    # Tiles of several query blocks, whose candidates end in different steps, and more than one head of keys.
    shape = Shape(1500, 1500, heads=4, kv_heads=2, head_dim=32)
    config = SaleConfig(
        Mass.fast(threshold=0.05, sub_block=sub_block),
        sink_tokens=4,
        local_tokens=8,
        min_length=0,
        smooth_tokens=100,
    )
    assert check_hits(kernel("mass"), stages(shape, 3, config)) <= 4


LARGEST = [(mass, dim, bits) for dim in HEAD_DIMS for bits in (4, 8)] + [("kernel", 80, 4), ("kernel", 256, 8)]


@pytest.mark.parametrize("sub_block", [8, 1])
@pytest.mark.parametrize(("implementation", "head_dim", "bits"), LARGEST)
def test_the_largest_codes_overflow_nothing(implementation, head_dim, bits, sub_block):
    # Every channel at +-amax, of numbers near the end of float32: products, factors and their sums are at their limits.
    shape = Shape(256, 256, head_dim=head_dim)
    sizes = {"pool": 1, "sink_tokens": 1, "local_tokens": 1, "smooth_tokens": 0}
    config = SaleConfig(Mass.fast()).with_options(sub_block=sub_block, bits=bits, min_length=0, **sizes)
    for magnitude in (1e3, 1e18):
        s = stages(shape, 0, config)
        s.x.query.copy_(s.x.query.sign() * magnitude)
        s.x.key.copy_(s.x.key.sign() * magnitude)
        s.x.key[:, :, 100] = s.x.query[:, :, 200]
        # All logarithms are cut off, on any side: nothing is left to rounding.
        assert check_hits(kernel("mass") if implementation == "kernel" else implementation, s, within=0.0) == 0


def test_the_comparison_has_something_to_compare():
    # The properties above would hold for a rule that keeps all or nothing; at these options it does neither.
    shape = Shape(700, 700, heads=6, kv_heads=2, head_dim=64)
    x = structured_inputs(shape, 0)
    for sub_block in (8, 1):
        config = SaleConfig(Mass.fast(threshold=0.12, sub_block=sub_block), min_length=0, local_tokens=32)
        expected = reference.keep_map(x.query, x.key, config)
        by_rule = expected.hit & ~expected.always
        assert 0.2 < by_rule.sum() / (expected.visible & ~expected.always).sum() < 0.8


def test_the_reference_takes_no_default_that_depends_on_a_device():
    x = random_inputs(Shape(100, 100, head_dim=32))
    with pytest.raises(ValueError, match=r"config\.min_length must be a number of tokens, got None"):
        reference.keep_map(x.query, x.key, SaleConfig(Mass.fast()))
