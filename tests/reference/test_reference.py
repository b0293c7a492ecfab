# SPDX-License-Identifier: BSD-3-Clause
"""The oracle: against the definition of docs/semantics.md, written out element by element, and against torch's masks.

What the mass rule adds is in test_mass.py.
"""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from sale_flex import Mass, Relative, SaleConfig, reference
from sale_flex.config import BLOCK_SIZES
from sale_flex.mods import causal, sliding_window
from sale_flex.testing import (
    Shape,
    assert_same_blocks,
    causal_mask,
    dense_attention,
    expand_blocks,
    mod_mask,
    random_inputs,
    structured_inputs,
)
from sale_flex.testing.programs import PROGRAMS
from sale_flex.testing.strategies import configs, seeds, shapes


def soft_cap(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return 3 * (score / 3).tanh()


def decide_by_definition(shape: Shape, query, key, config) -> dict[tuple[int, int, int, int], tuple[bool, float, int]]:
    """(batch, head, row, column) of every visible block -> is it always kept, its margin, and how many elements it has.

    Elements are those that a row sees. The margin is that of the largest of them.
    """
    block_q, block_k = config.block_size
    top = 2 ** (config.rule.bits - 1) - 1
    scale = shape.head_dim**-0.5
    blocks: dict[tuple[int, int, int, int], tuple[bool, float, int]] = {}
    for b in range(shape.batch):
        start, end = shape.valid(b)
        for head in range(shape.heads):
            keys = key[b, head // (shape.heads // shape.kv_heads)].double()
            prefix = keys[start : min(end, start + config.smooth_tokens)]
            mean = prefix.mean(0).float().double() if len(prefix) else torch.zeros(shape.head_dim).double()
            smooth = keys - mean
            key_scale = {}
            for first in range(start, end, block_k):
                group = smooth[first : min(first + block_k, end)].float()
                for j in range(first, min(first + block_k, end)):
                    key_scale[j] = float(group.abs().max()) / top or 1.0  # 0 where a key is its own smoothing prefix
            threshold = config.rule.threshold
            tau = threshold if isinstance(threshold, float) else float(threshold[head])
            for i in range(shape.q_len):
                p = shape.offset + i
                if not start <= p < end:
                    continue
                row = query[b, head, i].double()
                row_scale = float(row.abs().max()) / top or 1.0
                near = [j for j in range(start, p + 1) if j < start + config.sink_tokens or j > p - config.local_tokens]
                exact = [scale * float(row @ smooth[j]) for j in near]
                m = max(exact)
                norm = sum(math.exp(s - m) for s in exact)
                early = p - start < config.min_length or 2 * shape.q_len < block_q
                for j in range(start, p + 1):
                    codes = (row / row_scale).round(), (smooth[j] / key_scale[j]).round()
                    estimate = scale * row_scale * key_scale[j] * float(codes[0] @ codes[1])
                    margin = estimate - (m + math.log(norm) + (math.log(tau) if tau else -math.inf))
                    at = (b, head, i // block_q, j // block_k)
                    always, largest, elements = blocks.get(at, (False, -math.inf, 0))
                    blocks[at] = always or early or j in near or j == p, max(largest, margin), elements + 1
    # A query block with an early row is early as a whole.
    for b, head, row, column in list(blocks):
        start, _ = shape.valid(b)
        first = max(shape.offset + row * block_q, start)
        if first - start < config.min_length:
            at = (b, head, row, column)
            blocks[at] = True, *blocks[at][1:]
    return blocks


@settings(max_examples=12)
@given(
    shapes(max_tokens=150, min_tokens=64, batch=1, kv_heads=(1,), groups=(1, 2), head_dims=(32,)),
    seeds(),
    configs(kinds=(Relative,), max_min_length=80),
)
def test_keep_map_is_the_definition(shape, seed, config):
    if isinstance(config.rule.threshold, torch.Tensor):
        return
    query, key, _ = structured_inputs(shape, seed)
    expected = decide_by_definition(shape, query, key, config)
    result = reference.keep_map(query, key, config, dtype=torch.float64, **shape.positions())
    assert {(b, row, column) for b, _, row, column in expected} == {
        tuple(x) for x in result.visible[:, 0].nonzero().tolist()
    }
    rounded_otherwise = 0
    for at, (always, margin, elements) in expected.items():
        b, _, row, column = at
        inside = [
            min(size, length - n * size)
            for n, size, length in zip((row, column), config.block_size, (shape.q_len, shape.kv_len))
        ]
        assert bool(result.full[b, 0, row, column]) == (elements == math.prod(inside)), at
        assert bool(result.always[at]) == always, at
        got = float(result.margin[at])
        if always:
            assert (bool(result.kept[at]), bool(result.hit[at]), got) == (True, False, -math.inf), at
        elif got != margin and not math.isclose(got, margin, abs_tol=1e-6):
            rounded_otherwise += 1
        elif abs(margin) > 1e-6:
            assert bool(result.kept[at]) == (margin >= 0), at
    # Codes are rounded in float32 there and in float64 here: one in a million falls on the other side of a tie.
    assert rounded_otherwise <= 1 + len(expected) // 20


def test_keep_map_of_a_row_worked_out_by_hand():
    # All keys are 0 but key 0, the sink, with a logit of 2, and key 70, with one of -1. The last row's sink-local keys
    # are the sink and 64 zeros; keys 64 to 127 stand in neither window, and their largest logit is 0.
    query, key = torch.zeros(1, 1, 256, 32), torch.zeros(1, 1, 256, 32)
    query[..., 0] = 7.0
    key[0, 0, 0, 0] = 2.0
    key[0, 0, 70, 0] = -1.0
    scale = 1 / 7
    options = {"min_length": 0, "smooth_tokens": 0, "sink_tokens": 1, "local_tokens": 64}
    total = math.exp(2) + 64
    for share, kept in ((1.001, False), (0.999, True)):
        config = SaleConfig(Relative(share / total, bits=8), **options)
        result = reference.keep_map(query, key, config, scale=scale, dtype=torch.float64)
        assert bool(result.kept[0, 0, 3, 1]) is kept
        assert result.kept[0, 0, 3].tolist() == [True, kept, True, True]  # sink, in question, local, diagonal
        margin = math.log(1 / share)
        assert math.isclose(float(result.margin[0, 0, 3, 1]), margin, abs_tol=1e-9)


@given(
    shapes(max_tokens=500, min_tokens=100, groups=(1, 2), head_dims=(32,)),
    seeds(),
    configs(heads=2, block_sizes=BLOCK_SIZES, max_window=30, max_min_length=40),
    st.none() | st.integers(0, 3),
    st.sampled_from([torch.float32, torch.float64]),
    st.sampled_from([None, None, torch.nan, torch.inf, 1e30]),
)
def test_a_causal_mask_keeps_the_blocks_of_a_causal_call(shape, seed, config, budget, dtype, special):
    # To the bit, margins too: padded, in chunks, with numbers that no sum survives.
    shape = replace(shape, heads=2, kv_heads=min(shape.kv_heads, 2))
    x = structured_inputs(shape, seed)
    if special is not None:
        for tensor in x[seed % 3 :]:
            tensor.view(-1)[seed % tensor.numel()] = special
    call = {**shape.positions(), "dtype": dtype, "budget": budget}
    plain = reference.keep_map(x.query, x.key, config, x.value, **call)
    mask = {"mask_mod": causal(shape.offset), "is_causal": False}
    masked = reference.keep_map(x.query, x.key, config, x.value, **call, **mask)
    for of_mask, of_plain in zip(masked, plain):
        torch.testing.assert_close(of_mask, of_plain.expand_as(of_mask), rtol=0, atol=0, equal_nan=True)
    candidate = masked.visible & ~masked.always
    for hit in (True, False):
        event(f"{config.rule.name}, hit: {hit}, some: {bool((candidate & (masked.hit == hit)).any())}")


@given(
    shapes(max_tokens=400, groups=(1, 3), head_dims=(32,)),
    seeds(),
    configs(kinds=(Relative,), block_sizes=((64, 64), (64, 32)), max_window=60),
    st.booleans(),
)
def test_a_score_mod_that_changes_nothing_leaves_the_relative_rule_its_blocks(shape, seed, config, window):
    # Without one, logits of smoothed keys are compared, and with one whole ones. In float64 both are within 1e-9.
    x = structured_inputs(shape, seed)
    call = {**shape.positions(), "dtype": torch.float64} | (
        {"mask_mod": sliding_window(90, shape.offset)} if window else {}
    )
    plain = reference.keep_map(x.query, x.key, config, **call)
    same = reference.keep_map(x.query, x.key, config, **call, score_mod=lambda s, b, h, q, kv: s)
    assert_same_blocks(same.kept, plain, 1e-6)
    assert torch.equal(same.always, plain.always)


RULES = {"mass": Mass(0.05), "moments": Mass.fast(0.05), "relative": Relative(0.1)}


@pytest.mark.parametrize("program", ["plain", "a score by head", "a mask by head"])
@pytest.mark.parametrize("rule", RULES)
def test_batch_rows_begin_where_their_own_offset_says(rule, program):
    offsets, ranges = torch.tensor([250, 0, 201]), torch.tensor([[0, 400], [37, 390], [0, 333]])
    x = structured_inputs(Shape(150, 400, batch=3, heads=4, kv_heads=2, head_dim=32), 2)
    config = SaleConfig(RULES[rule], sink_tokens=4, local_tokens=8, min_length=0, smooth_tokens=50)
    mods = {
        "plain": {},
        "a score by head": {"score_mod": lambda s, b, h, q, kv: s * (1.5 + h)},
        "a mask by head": {"mask_mod": lambda b, h, q, kv: kv % 7 != h, "is_causal": False},
    }
    call = mods[program] | {"dtype": torch.float64}
    together = reference.keep_map(*x[:2], config, x.value, **call, q_offset=offsets, kv_range=ranges)
    for b, offset in enumerate(offsets):
        row = [t[b : b + 1] for t in x]
        for said in (int(offset), offset, offset[None]):
            alone = reference.keep_map(*row[:2], config, row[2], **call, q_offset=said, kv_range=ranges[b : b + 1])
            assert_same_blocks(together.kept[b : b + 1], alone)
            for name in ("always", "visible", "full"):
                assert torch.equal(getattr(together, name)[b : b + 1], getattr(alone, name))
    assert 0.1 < together.kept.sum() / together.visible.expand_as(together.kept).sum() < 0.9


def test_a_row_that_sees_nothing_next_to_it_counts_in_what_it_sees():
    # Rows hide their own and all near keys from themselves; those of one block see but half of the others' candidates.
    shape = Shape(384, 384, heads=2, head_dim=32)
    x = structured_inputs(shape, 1)
    config = SaleConfig(Mass(0.6, pool=1, pool_mode="last"), sink_tokens=0, local_tokens=1, min_length=0)

    def mask(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return ((q // 64 != kv // 64) & ((q % 64 < 32) | (kv < 192))) | (q == 0)

    made = reference.keep_map(x.query, x.key, config, mask_mod=mask, is_causal=False, dtype=torch.float64)
    candidate = made.visible & ~made.always
    assert candidate[:, :, 1:].sum() == 2 * 5 * 5
    at = torch.arange(384)
    visible = mask(None, None, at[:, None], at)
    shares = (x.query.double() @ x.key.double().mT * 32**-0.5).masked_fill(~visible, -torch.inf).softmax(-1)
    largest = reference.common.block_max(shares.unflatten(-1, (6, 64)).sum(-1), 64, 1)
    # Codes and levels may keep what is a quarter below the threshold, and what is as far above is never lost.
    assert (made.hit | ~candidate)[largest > 0.75].all()
    assert not (made.hit & candidate)[largest < 0.45].any()
    assert 0.1 < (made.hit & candidate).sum() / candidate.sum() < 0.9


def test_rows_see_what_torch_says_a_mask_shows():
    # Against torch's own evaluation of a mask_mod, and the lists that it makes of it, with the mask_mod and alone.
    table = torch.rand(3, 5, 7, generator=torch.Generator().manual_seed(0)) < 0.4

    def mask(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return table[h, q // 32, kv // 32] & (q != b)

    block_mask = create_block_mask(mask, 2, 3, 150, 200, device="cpu", BLOCK_SIZE=(32, 64))
    bounds = reference.make_bounds(2, 150, 200)
    b, h, q, kv = torch.meshgrid(*(torch.arange(n) for n in (2, 3, 150, 200)), indexing="ij")
    expected = table[h, q // 32, kv // 32] & (q != b)
    for mods in ((mask, None), (None, block_mask), (mask, block_mask)):
        assert torch.equal(reference.visible_elements(bounds, 3, 150, 200, *mods, False), expected)
    lists = (block_mask.kv_num_blocks, block_mask.kv_indices, block_mask.full_kv_num_blocks, block_mask.full_kv_indices)
    alone = BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=(32, 64), seq_lengths=(150, 200), compute_q_blocks=False)
    listed = expand_blocks(block_mask.to_dense() > 0, (32, 64), 150, 200)
    assert torch.equal(reference.visible_elements(bounds, 3, 150, 200, None, alone, False), listed)
    assert not torch.equal(listed, expected)


def visible_by_torch(shape: Shape, program: dict) -> Tensor:
    """Which key each row sees, bool ``[B, Hq, Sq, Skv]``: masks evaluated by broadcasting."""
    visible = causal_mask(shape)
    if not program.get("is_causal", True):
        at, key = torch.arange(shape.q_len)[:, None] + shape.offset, torch.arange(shape.kv_len)
        ranges = [shape.valid(b) for b in range(shape.batch)]
        visible = torch.stack([(at >= s) & (at < e) & (key >= s) & (key < e) for s, e in ranges])[:, None]
    visible = visible.expand(-1, shape.heads, -1, -1)
    block_mask = program.get("block_mask")
    for mask in (program.get("mask_mod"), block_mask and block_mask.mask_mod):
        if mask is not None:
            visible = visible & mod_mask(mask, shape.batch, shape.heads, shape.q_len, shape.kv_len)
    return visible


ANY_LENGTH = [name for name in PROGRAMS if not name.startswith("neighborhood")]


@given(shapes(max_tokens=100), seeds(), st.sampled_from(["plain", *ANY_LENGTH]))
def test_attention_over_all_blocks_is_dense_attention(shape, seed, program):
    query, key, value = random_inputs(shape, seed)
    options = {} if program == "plain" else PROGRAMS[program](shape, "cpu")
    bounds = reference.make_bounds(shape.batch, shape.q_len, shape.kv_len, **shape.positions())
    kept = torch.ones(shape.batch, shape.heads, -(-shape.q_len // 64), -(-shape.kv_len // 64), dtype=torch.bool)
    how = {"bounds": bounds, "block_size": (64, 64), "scale": shape.head_dim**-0.5}
    got, _ = reference.masked_attention(query, key, value, kept, **how, **options)
    visible = visible_by_torch(shape, options)
    dense = dense_attention(query, key, value, visible, score_mod=options.get("score_mod"))
    torch.testing.assert_close(got, dense, rtol=1e-12, atol=1e-12)


def test_attention_with_a_sink_and_gradients():
    shape = Shape(40, 50, heads=2, head_dim=32, kv_range=((5, 48),))
    x = random_inputs(shape)
    query, key, value = (t.double().requires_grad_() for t in x)
    bounds = reference.make_bounds(1, 40, 50, **shape.positions())
    kept = torch.ones(1, 2, 1, 1, dtype=torch.bool)
    kept[0, 1] = False
    call = {"bounds": bounds, "block_size": (64, 64), "scale": 0.2, "score_mod": soft_cap}
    sink = torch.tensor([1.5, -2.0])
    plain, lse = reference.masked_attention(query, key, value, kept, **call)
    with_sink, same = reference.masked_attention(query, key, value, kept, sink_logits=sink, **call)
    torch.testing.assert_close(lse, same)
    # A sink takes its share of the probability from what is there.
    torch.testing.assert_close(with_sink[:, :1], plain[:, :1] * (lse - sink[0]).sigmoid()[:, :1, :, None])
    assert (with_sink[:, 1] == 0).all()
    at, column = torch.arange(40)[:, None] + 10, torch.arange(50)
    visible = (column <= at) & (column >= 5) & (column < 48) & (at < 48)
    logits = (3 * (query[:, :1] @ key[:, :1].mT * 0.2 / 3).tanh()).masked_fill(~visible, -1e30)
    dense = (logits.softmax(-1) * visible) @ value[:, :1]
    torch.testing.assert_close(plain[:, :1], dense)
    gradients = [torch.autograd.grad(y[:, :1].cos().sum(), (query, key, value)) for y in (plain, dense)]
    for got, wanted in zip(*gradients):
        torch.testing.assert_close(got, wanted)
    of_nothing = torch.autograd.grad(with_sink.sum(), (query, key, value))  # rows that see nothing are among them
    assert all(gradient.isfinite().all() for gradient in of_nothing)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_float32_and_float64_agree_off_the_threshold(dtype):
    shape = Shape(512, 512, heads=4, kv_heads=2, head_dim=32)
    query, key, _ = structured_inputs(shape, 3)
    config = SaleConfig(Relative(0.05, bits=8), min_length=0, local_tokens=64)
    exact = reference.keep_map(query, key, config, dtype=torch.float64)
    got = reference.keep_map(query, key, config, dtype=dtype)
    assert 0.2 < exact.kept.sum() / (4 * exact.visible.sum()) < 0.8  # the rule decides something here
    assert (exact.margin[got.kept != exact.kept].abs() <= 1e-5).all()


@given(st.integers(0, 3), seeds())
def test_a_keys_mean_ignores_what_lies_outside_its_prefix(where, seed):
    shape = Shape(8, 40, head_dim=32, kv_range=((5, 30),))
    key = random_inputs(shape, seed).key
    bounds = reference.make_bounds(1, 8, 40, **shape.positions())
    mean = reference.key_mean(key, bounds, 12)
    torch.testing.assert_close(mean[0], key[0, :, 5:17].double().mean(1).float(), rtol=1e-6, atol=1e-7)
    key[:, :, [0, 4, 17, 39][where]] = torch.nan
    assert torch.equal(reference.key_mean(key, bounds, 12), mean)
