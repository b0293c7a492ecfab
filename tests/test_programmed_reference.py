# SPDX-License-Identifier: BSD-3-Clause
"""The reference of programmed calls: against the plain one where there is no mod, and against torch's own mods."""

from dataclasses import replace

import torch
from hypothesis import event, given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

from sale_flex import Mass, Relative, SaleConfig, reference
from sale_flex.config import BLOCK_SIZES
from sale_flex.mods import causal
from sale_flex.reference.programmed import programmed_attention, programmed_keep_map
from sale_flex.testing import Shape, random_inputs, structured_inputs
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


@given(
    shapes(max_tokens=500, min_tokens=100, groups=(1, 2), head_dims=(32,)),
    seeds(),
    configs(heads=2, kinds=(Mass,), block_sizes=BLOCK_SIZES, max_window=30, max_min_length=40),
    st.none() | st.integers(0, 3),
    st.booleans(),
    st.sampled_from([torch.float32, torch.float64]),
    st.sampled_from([None, None, torch.nan, torch.inf, 1e30]),
)
def test_without_a_score_mod_the_mass_rule_is_the_plain_one(shape, seed, config, budget, masked, dtype, special):
    # To the bit, margins too: by positions or by a mask_mod, padded, in chunks, with numbers that no sum survives.
    shape = replace(shape, heads=2, kv_heads=min(shape.kv_heads, 2))
    x = structured_inputs(shape, seed)
    if special is not None:
        for tensor in (x.query, x.key)[seed % 2 :]:
            tensor.view(-1)[seed % tensor.numel()] = special
    call = {**shape.positions(), "dtype": dtype, "budget": budget}
    mods = {"is_causal": False, "mask_mod": causal(shape.offset)} if masked else {}
    plain = reference.keep_map(x.query, x.key, config, x.value, **call)
    programmed = programmed_keep_map(x.query, x.key, config, x.value, **call, **mods)
    assert torch.equal(programmed.always, plain.always)
    assert torch.equal(programmed.visible, plain.visible.expand_as(plain.kept))
    assert torch.equal(programmed.full, plain.full.expand_as(plain.kept))
    assert torch.equal(programmed.kept, plain.kept)
    assert torch.equal(programmed.dropped, plain.dropped & ~plain.always)
    candidate = programmed.visible & ~programmed.always
    assert torch.equal(programmed.margin[candidate], plain.margin[candidate])
    for hit in (True, False):
        event(f"hit: {hit}, some: {bool((candidate & (programmed.hit == hit)).any())}")


def test_a_row_that_sees_nothing_next_to_it_counts_in_what_it_sees():
    # Rows hide their own and all near keys from themselves; those of one block see but half of the others' candidates.
    shape = Shape(384, 384, heads=2, head_dim=32)
    x = structured_inputs(shape, 1)
    config = SaleConfig(Mass(0.6, pool=1, pool_mode="last"), sink_tokens=0, local_tokens=1, min_length=0)

    def mask(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return ((q // 64 != kv // 64) & ((q % 64 < 32) | (kv < 192))) | (q == 0)

    made = programmed_keep_map(x.query, x.key, config, mask_mod=mask, is_causal=False, dtype=torch.float64)
    candidate = made.visible & ~made.always
    assert candidate[:, :, 1:].sum() == 2 * 5 * 5
    at = torch.arange(384)
    seen = mask(None, None, at[:, None], at)
    shares = (x.query.double() @ x.key.double().mT * 32**-0.5).masked_fill(~seen, -torch.inf).softmax(-1)
    largest = reference.common.block_max(shares.unflatten(-1, (6, 64)).sum(-1), 64, 1)
    # Codes and levels may keep what is a quarter below the threshold, and what is as far above is never lost.
    assert (made.hit | ~candidate)[largest > 0.75].all()
    assert not (made.hit & candidate)[largest < 0.45].any()
    assert 0.1 < (made.hit & candidate).sum() / candidate.sum() < 0.9


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
