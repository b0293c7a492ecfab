# SPDX-License-Identifier: BSD-3-Clause
"""The reference of programmed calls: against the plain one where there is no mod, and against torch's own mods."""

import math

import torch
from hypothesis import event, given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

from sale_flex import Mass, Relative, SaleConfig, reference
from sale_flex.reference.programmed import programmed_attention, programmed_keep_map
from sale_flex.testing import Inputs, Shape, random_inputs, structured_inputs
from sale_flex.testing.strategies import configs, seeds, shapes


def soft_cap(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return 3 * (score / 3).tanh()


def test_the_reference_of_attention_with_a_sink_and_gradients():
    shape = Shape(40, 50, heads=2, head_dim=32, kv_range=((5, 48),))
    x = random_inputs(shape)
    query, key, value = (t.double().requires_grad_() for t in x)
    bounds = reference.make_bounds(1, 40, 50, **shape.positions())
    kept = torch.ones(1, 2, 1, 1, dtype=torch.bool)
    kept[0, 1] = False
    call = {"bounds": bounds, "block_size": (64, 64), "scale": 0.2, "score_mod": soft_cap}
    sink = torch.tensor([1.5, -2.0])
    plain, lse = programmed_attention(query, key, value, kept, **call)
    with_sink, same = programmed_attention(query, key, value, kept, sink_logits=sink, **call)
    torch.testing.assert_close(lse, same)
    # A sink takes its share of the probability from what is there.
    torch.testing.assert_close(with_sink[:, :1], plain[:, :1] * (lse - sink[0]).sigmoid()[:, :1, :, None])
    assert (with_sink[:, 1] == 0).all()
    at, column = torch.arange(40)[:, None] + 10, torch.arange(50)
    seen = (column <= at) & (column >= 5) & (column < 48) & (at < 48)
    logits = (3 * (query[:, :1] @ key[:, :1].mT * 0.2 / 3).tanh()).masked_fill(~seen, -1e30)
    dense = (logits.softmax(-1) * seen) @ value[:, :1]
    torch.testing.assert_close(plain[:, :1], dense)
    gradients = [torch.autograd.grad(y[:, :1].cos().sum(), (query, key, value)) for y in (plain, dense)]
    for got, wanted in zip(*gradients):
        torch.testing.assert_close(got, wanted)
    of_nothing = torch.autograd.grad(with_sink.sum(), (query, key, value))  # rows that see nothing are among them
    assert all(gradient.isfinite().all() for gradient in of_nothing)


PLAIN = shapes(max_tokens=400, groups=(1, 3), head_dims=(32,))
SMALL_BLOCKS = ((64, 64), (64, 32))


@given(PLAIN, seeds(), configs(kinds=(Relative,), block_sizes=SMALL_BLOCKS, max_window=60), st.booleans())
def test_without_mods_the_reference_of_the_relative_rule_is_the_plain_one(shape, seed, config, bad_value):
    x = structured_inputs(shape, seed)
    value = x.value.clone()
    if bad_value:
        value.view(-1)[seed % value.numel()] = torch.nan
    call = {**shape.positions(), "dtype": torch.float64}
    plain = reference.keep_map(x.query, x.key, config, value, **call)
    programmed = programmed_keep_map(x.query, x.key, config, value, **call)
    assert torch.equal(programmed.always, plain.always)
    assert torch.equal(programmed.visible, plain.visible.expand_as(plain.kept))
    assert torch.equal(programmed.full, plain.full.expand_as(plain.kept))
    # The plain rule compares smoothed logits, and this one whole ones. In float64 both are within 1e-9
    clear = ~(plain.margin.abs() <= 1e-6)
    assert torch.equal(programmed.kept & clear, plain.kept & clear)


def plain_mass_slack(inputs: Inputs, config: SaleConfig) -> float:
    """How far apart the plain mass rule and this one may be about a whole block, in nats.

    The plain one's exponentials are within 0.0431 octaves of the true ones, in a sum and in a total; it compares in
    eighths of an octave of a straight mantissa, rounded down, of which the widest is ln(9 / 8); 8-bit products, of
    means and of squares, lose up to 255 units in a sum and gain as much in a total. Fixed point and float32 are far
    below the 0.01 that is left for them.
    """
    query, key = float(inputs.query.abs().max()), 2 * float(inputs.key.abs().max())
    units = 0.0
    if config.rule.bits == 8:
        scale = inputs.query.shape[3] ** -0.5
        per_row, per_key, per_square = query / 127, key / 127, key * key / 127
        units = 255 * scale * (per_row * per_key + scale / 2 * 128 * per_row**2 * per_square)
    return 2 * 0.0431 * math.log(2) + math.log(9 / 8) + 2 * units + 0.01


@given(
    shapes(max_tokens=500, min_tokens=100, groups=(1, 2), head_dims=(32,)),
    seeds(),
    configs(kinds=(Mass,), block_sizes=SMALL_BLOCKS, max_window=30, max_min_length=40),
)
def test_without_mods_the_reference_of_the_mass_rule_is_the_plain_one(shape, seed, config):
    x = random_inputs(shape, seed)
    call = {**shape.positions(), "dtype": torch.float64}
    plain = reference.keep_map(x.query, x.key, config, x.value, **call)
    programmed = programmed_keep_map(x.query, x.key, config, x.value, **call)
    assert torch.equal(programmed.always, plain.always)
    assert torch.equal(programmed.visible, plain.visible.expand_as(plain.kept))
    assert torch.equal(programmed.full, plain.full.expand_as(plain.kept))
    # In query blocks with padding the plain rule takes codes for what this one weighs exactly.
    at = torch.arange(shape.q_len + -shape.q_len % 64)
    bounds = reference.make_bounds(shape.batch, shape.q_len, shape.kv_len, **shape.positions())
    position = at + bounds[:, :1]
    padding = ((position < bounds[:, 1:2]) | (position >= bounds[:, 2:])) & (at < shape.q_len)
    padded = padding.unflatten(1, (-1, 64)).any(-1)[:, None, :, None]  # [B, 1, nq, 1]
    whole = programmed.visible & ~programmed.always & programmed.full & ~padded
    clear = whole & ~(programmed.margin.abs() <= plain_mass_slack(x, config))
    assert torch.equal(programmed.hit & clear, plain.hit & clear)
    event(f"hit: {bool((plain.hit & clear).any())}, not hit: {bool((~plain.hit & clear).any())}")


def test_the_reference_sees_what_torch_says_a_mask_shows():
    # Against torch's own evaluation of a mask_mod, and of the lists that it makes of it.
    table = torch.rand(3, 5, 7, generator=torch.Generator().manual_seed(0)) < 0.4

    def mask(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return table[h, q // 32, kv // 32] & (q != b)

    block_mask = create_block_mask(mask, 2, 3, 150, 200, device="cpu", BLOCK_SIZE=(32, 64))
    bounds = reference.make_bounds(2, 150, 200)
    b, h, q, kv = torch.meshgrid(*(torch.arange(n) for n in (2, 3, 150, 200)), indexing="ij")
    expected = table[h, q // 32, kv // 32] & (q != b)
    for mods in ((mask, None), (None, block_mask), (mask, block_mask)):
        assert torch.equal(reference.programmed.seen_elements(bounds, 3, 150, 200, *mods, False), expected)
