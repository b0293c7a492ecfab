# SPDX-License-Identifier: BSD-3-Clause
"""KeyCodes: chunks choose with stored codes what they choose without, and code new keys only."""

import copy
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from key_codes_harness import (
    RULE_OPTIONS,
    SHAPE,
    SPARSE,
    assert_chunks_agree,
    blocks_of,
    both_metrics,
    chunks,
    config_of,
    every_rule,
    filled,
)
from torch import Tensor

from sale_flex import AuxRequest, KeyCodes, mods, ops, pack_int4, sale_attention, unpack_int4
from sale_flex.call.facts import check_arguments, settle
from sale_flex.call.user_mods import UserMods
from sale_flex.testing import Inputs, Shape, structured_inputs
from sale_flex.testing.strategies import configs, seeds


@given(seeds(), configs(max_min_length=100, max_window=40), st.data())
def test_chunks_choose_what_they_choose_without_a_store(seed, config, data):
    length = data.draw(st.integers(150, 600), label="length")
    edges = sorted({0, length, *data.draw(st.lists(st.integers(1, length), max_size=5), label="edges")})
    smooth = data.draw(st.sampled_from([0, 50, 200]), label="smooth_tokens")
    config = replace(config, smooth_tokens=smooth)
    ranges = None
    if data.draw(st.booleans(), label="padded"):
        lefts = [data.draw(st.integers(0, 150), label="left padding") for _ in range(2)]
        ranges = [(left, data.draw(st.integers(left, length), label="end")) for left in lefts]
    most = 0 if ranges is None else max(left for left, _ in ranges)
    codes = KeyCodes(most + data.draw(st.sampled_from([0, 0, 9]), label="more than the most padding"))
    shape = Shape(length, length, heads=2, kv_heads=1, head_dim=32, batch=2)
    inputs = structured_inputs(shape, seed)
    assert_chunks_agree(inputs, edges, config, codes, ranges)


@every_rule
@pytest.mark.parametrize("block_size", [(64, 64), (64, 32), (128, 128)])
@pytest.mark.parametrize("ranges", [None, [(0, 700), (37, 640)], [(130, 700), (64, 300)], [(130, 700), (64, 100)]])
def test_codes_with_a_store_are_the_codes_without(rule, block_size, ranges):
    config = config_of(rule, block_size=block_size)
    shape = Shape(700, 700, heads=2, kv_heads=2, head_dim=32, batch=2)
    inputs, codes = structured_inputs(shape, 3), KeyCodes(130 if ranges else 0)
    lengths = []
    for query, key, where in chunks(inputs, [0, 200, 333, 384, 700], ranges):
        past = key.shape[2] - query.shape[2]
        given = check_arguments(query, key, None, config, UserMods(), None, where.get("kv_range"), None, codes)
        assert codes.length <= past
        ours = config.rule.codes(settle(given))
        expected = config.rule.codes(settle(given._replace(reuse=None)))
        if config.rule.name == "relative":
            # The scales of groups behind the last key mean nothing.
            blocks = -(-key.shape[2] // block_size[1])
            ours, expected = ((*x[:2], x[2][..., :blocks]) for x in (ours, expected))
        else:
            ours, expected = ((mean, *moments) for mean, moments in (ours, expected))
        assert len(ours) == len(expected)
        for got, wanted in zip(ours, expected):
            assert got.dtype == wanted.dtype
            assert torch.equal(got, wanted)
        lengths.append(codes.length)
    assert lengths[-1] >= 640 - block_size[1]


def test_one_shot_and_chunks_with_a_store_choose_the_same_blocks():
    # Chunks of whole tiles: their sums are taken in the order of the one shot, so that no margin is needed.
    inputs = structured_inputs(SHAPE, 5)
    for rule in RULE_OPTIONS:
        config, codes = config_of(rule), KeyCodes()
        whole = blocks_of(inputs.query, inputs.key, config)
        for (query, key, _), (begin, stop) in zip(chunks(inputs, [0, 256, 384, 640]), [(0, 4), (4, 6), (6, 10)]):
            chunk = blocks_of(query, key, config, codes)
            assert torch.equal(chunk.kept, whole.kept[:, :, begin:stop, :stop])
        assert whole.kept.float().mean() < 0.5  # of 0.55 that are visible


@every_rule
@pytest.mark.parametrize(
    "options",
    [
        {"score_mod": mods.softcap(5.0)},
        {"mask_mod": mods.sliding_window(200)},
        {"is_causal": False},
        {"score_mod": lambda score, b, h, q_idx, kv_idx: score + (kv_idx % 7) * 0.1},
    ],
    ids=["soft cap", "window", "not causal", "rough"],
)
def test_chunks_under_mods_choose_what_they_choose_without_a_store(rule, options):
    inputs, codes = structured_inputs(SHAPE, 2), KeyCodes(64)
    edges, ranges = [0, 192, 330, 640], [(0, 640), (37, 600)]
    for begin, (query, key, where) in zip(edges, chunks(inputs, edges, ranges)):
        if "mask_mod" in options:
            options = {"mask_mod": mods.sliding_window(200, begin)}  # rows are counted from the chunk's first
        with_store = blocks_of(query, key, config_of(rule), codes, **where, **options)
        assert torch.equal(with_store.kept, blocks_of(query, key, config_of(rule), **where, **options).kept)
    assert codes.length >= 576


def test_outputs_are_the_same():
    inputs, codes = structured_inputs(SHAPE, 7), KeyCodes()
    for query, key, _ in chunks(inputs, [0, 256, 640]):
        value = inputs.value[:, :, : key.shape[2]]
        aux = AuxRequest(stats=True)
        output, (_, stats) = sale_attention(query, key, value, SPARSE, key_codes=codes, return_aux=aux)
        expected, (_, counts) = sale_attention(query, key, value, SPARSE, return_aux=aux)
        assert torch.equal(output, expected)
        assert torch.equal(stats.kept_blocks, counts.kept_blocks)
        assert stats.describe() == counts.describe()


def watch(monkeypatch, name: str) -> list[Tensor]:
    """The first arguments of an op's calls."""
    seen, op = [], getattr(ops, name)

    def call(x: Tensor, *rest: Any) -> Any:
        seen.append(x)
        return op(x, *rest)

    monkeypatch.setattr(ops, name, call)
    return seen


@every_rule
def test_only_keys_that_are_not_stored_are_coded(rule, monkeypatch):
    inputs, config, codes = structured_inputs(SHAPE, 1), config_of(rule), KeyCodes()
    coded = watch(monkeypatch, "quantize_groups" if config.rule.name == "relative" else "quantize_moments")
    expected = []
    for query, key, _ in chunks(inputs, [0, 90, 200, 290, 300, 640]):
        expected.append((key.shape[2] - codes.length, key.data_ptr() + codes.length * key.stride(2) * 4))
        blocks_of(query, key, config, codes)
    # 90 keys are fewer than those of the smoothing mean: nothing is stored yet.
    assert [n for n, _ in expected] == [90, 200, 290 - 192, 300 - 256, 640 - 256]
    assert [(x.shape[2], x.data_ptr()) for x in coded] == expected


def test_codes_are_packed():
    # Per key block: 8 sub-blocks of means and variances or 64 keys, scales, one key and two bytes of its padding.
    inputs = structured_inputs(replace(SHAPE, batch=1, kv_heads=1), 0)
    per_prompt = 32 * 4 + 4  # the smoothing mean and the first valid key
    for rule, per_block in {
        "moments": 2 * 8 * 16 + 2 * 4,
        "moments, 8 bits": 2 * 8 * 32 + 2 * 4,
        "scan": 64 * 16 + 4,
        "relative": 64 * 16 + 4,
        "relative, 8 bits": 64 * 32 + 4,
    }.items():
        codes = filled(config_of(rule), inputs, 640)
        assert codes.nbytes == 10 * (per_block + 32 * 4 + 2) + per_prompt
        assert repr(codes) == f"KeyCodes(640 keys, {codes.nbytes} bytes)"
        codes.clear()
        assert (codes.length, codes.nbytes) == (0, 0)


def test_buffers_grow_by_half():
    inputs, codes = structured_inputs(Shape(1024, 1024, head_dim=32), 0), KeyCodes()
    sizes = []
    for query, key, _ in chunks(inputs, list(range(0, 1025, 64))):
        blocks_of(query, key, SPARSE, codes)
        sizes.append(codes.nbytes)
    # With 100 tokens of smoothing, two blocks come first; then there is room for 2, 3, 4, 6, 9, 13 and 19.
    of_block = (sizes[1] - (32 * 4 + 4)) / 2
    rooms = [round((size - (32 * 4 + 4)) / of_block) for size in sizes[1:]]
    assert rooms == [2, 3, 4, 6, 6, 9, 9, 9, 13, 13, 13, 13, 19, 19, 19]


@pytest.mark.parametrize("values", [range(-8, 8), range(16)])
def test_packed_codes_come_back_signed_or_not(values):
    codes = torch.cartesian_prod(*[torch.tensor(values, dtype=torch.int8)] * 2)
    back = unpack_int4(pack_int4(codes), signed=min(values) < 0)
    assert back.dtype == torch.int8
    assert torch.equal(back, codes)


@both_metrics
@pytest.mark.parametrize(
    ("length", "left", "padded"),
    [
        (1000, 384, 320),
        (384, 384, 320),
        (383, 320, 320),
        (382, 320, 256),
        (128, 128, 0),
        (100, 64, 0),
        (99, 0, 0),
        (0, 0, 0),
    ],
)
def test_truncating_leaves_what_does_not_depend_on_the_rest(rule, length, left, padded):
    inputs, config = structured_inputs(SHAPE, 0), config_of(rule)
    codes = filled(config, inputs)
    codes.truncate(length)
    assert codes.length == left
    # With left padding of at most 37, a mean of the first 137 keys, and groups that end up to 63 keys later.
    codes = KeyCodes(37)
    blocks_of(inputs.query[:, :, :384], inputs.key[:, :, :384], config, codes)
    codes.truncate(length)
    assert codes.length == (padded if rule == "relative" else left if length >= 137 else 0)


@both_metrics
@given(seeds(), st.integers(100, 400), st.integers(100, 400))
def test_going_back_and_on_with_other_keys_is_right(rule, seed, back, on):
    shape = Shape(800, 800, heads=2, kv_heads=1, head_dim=32)
    first, second = structured_inputs(shape, seed), structured_inputs(shape, seed + 1)
    config, codes = config_of(rule), KeyCodes()
    assert_chunks_agree(first, [0, 300, 400], config, codes)
    mixed = Inputs(*(torch.cat([x[:, :, :back], y[:, :, back:]], 2) for x, y in zip(first, second)))
    assert_chunks_agree(mixed, [back, back + on], config, codes)


@both_metrics
def test_dense_calls_forget_what_they_may_have_changed(rule):
    inputs, config = structured_inputs(SHAPE, 0), config_of(rule)
    key, value = inputs.key.clone(), inputs.value
    # A decoding step at key 200.
    codes = filled(config, inputs)
    sale_attention(inputs.query[:, :, :1], key[:, :, :201], value[:, :, :201], config, key_codes=codes)
    assert codes.length == 192
    # No more keys than min_length.
    codes = filled(config, inputs)
    longer = replace(config, min_length=500)
    sale_attention(inputs.query[:, :, :100], key[:, :, :400], value[:, :, :400], longer, key_codes=codes)
    assert codes.length == 256
    # A new prompt.
    codes = filled(config, inputs)
    sale_attention(inputs.query[:, :, :100], key[:, :, :100], value[:, :, :100], longer, key_codes=codes)
    assert (codes.length, codes.nbytes) == (0, 0)


@every_rule
def test_a_static_cache_stores_what_is_written(rule):
    # The buffer is longer than the prompt; what is behind the last query is not written yet.
    inputs, config, codes = structured_inputs(SHAPE, 4), config_of(rule), KeyCodes()
    cache = torch.full_like(inputs.key, torch.nan)
    for begin, stop in pairwise([0, 80, 200, 330, 640]):
        cache[:, :, begin:stop] = inputs.key[:, :, begin:stop]
        query = inputs.query[:, :, begin:stop]
        where = {"q_offset": begin, "kv_range": torch.tensor([[0, stop]] * 2)}
        assert torch.equal(
            blocks_of(query, cache, config, codes, **where).kept, blocks_of(query, cache, config, **where).kept
        )
        assert codes.length == (stop // 64 * 64 if stop >= 100 else 0)


@every_rule
def test_nonfinite_keys_are_what_they_are_without_a_store(rule):
    inputs = structured_inputs(SHAPE, 6)
    inputs.key[0, 0, 70, 3] = torch.nan
    inputs.key[0, 1, 191, 5] = torch.inf  # the last key of its block: a sample
    inputs.key[1, 0, 255] = torch.nan
    codes = KeyCodes()
    for query, key, _ in chunks(inputs, [0, 300, 640]):
        kept = blocks_of(query, key, config_of(rule), codes).kept
        assert torch.equal(kept, blocks_of(query, key, config_of(rule)).kept)
    assert kept[0, :2, :, 1].all()
    assert kept[0, 2:, :, 2].all()
    assert not kept.all(-1).all()


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@both_metrics
def test_the_kernels_take_what_is_left_of_the_keys(rule, monkeypatch):
    pytest.importorskip("triton", reason="the kernels need triton")
    from sale_flex.kernels import key_mean, moments, quantize

    inputs, config, codes = structured_inputs(SHAPE, 9), config_of(rule), KeyCodes(45)
    ranges, edges = [(0, 400), (45, 250)], [0, 160, 330, 400]
    expected = [blocks_of(query, key, config, **where).kept for query, key, where in chunks(inputs, edges, ranges)]
    monkeypatch.setattr(ops, "key_mean", key_mean.key_mean)
    monkeypatch.setattr(ops, "quantize_moments", moments.quantize_moments)
    monkeypatch.setattr(ops, "quantize_groups", quantize.quantize_groups)
    # As a cache lays keys out: heads inside tokens.
    keys = inputs.key.transpose(1, 2).contiguous().transpose(1, 2)
    for (query, key, where), wanted in zip(chunks(inputs._replace(key=keys), edges, ranges), expected):
        assert torch.equal(blocks_of(query, key, config, codes, **where).kept, wanted)
    assert codes.length >= 320


@every_rule
@pytest.mark.parametrize("first", [True, False])
def test_chunks_under_inference_mode_and_not_share_a_store(rule, first):
    inputs, config, codes = structured_inputs(SHAPE, 3), config_of(rule), KeyCodes()
    for n, (query, key, _) in enumerate(chunks(inputs, [0, 192, 300, 420, 520, 640])):
        with torch.inference_mode((n % 2 == 0) == first):
            key = key.clone()  # made in the mode of its call
            kept = blocks_of(query, key, config, codes).kept
            assert torch.equal(kept, blocks_of(query, key, config).kept)
    assert codes.length == 640


@both_metrics
def test_copies_are_independent(rule):
    inputs, config = structured_inputs(SHAPE, 3), config_of(rule)
    codes = filled(config, inputs)
    copied = copy.deepcopy(codes)
    other = Inputs(*(torch.cat([x[:, :, :384], y[:, :, 384:]], 2) for x, y in zip(inputs, structured_inputs(SHAPE, 4))))
    assert_chunks_agree(other, [384, 500], config, copied)
    assert_chunks_agree(inputs, [384, 640], config, codes)
    assert_chunks_agree(other, [500, 640], config, copied)
    assert codes.length == copied.length == 640
