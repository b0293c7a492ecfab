# SPDX-License-Identifier: BSD-3-Clause
"""KeyCodes: no stale code is trusted, and codes of other options and keys are refused."""

from dataclasses import replace

import pytest
import torch
from key_codes_harness import (
    SHAPE,
    SPARSE,
    assert_chunks_agree,
    blocks_of,
    changed,
    chunks,
    config_of,
    every_rule,
    filled,
    next_chunk,
)

from sale_flex import KeyCodes, SaleConfig, create_sale_block_mask, sale_attention
from sale_flex.testing import Inputs, block_map, structured_inputs


def assert_spoiled(inputs: Inputs, config: SaleConfig, codes: KeyCodes, rows, heads, columns=slice(0, 5), **where):
    """More than the right blocks are kept: those named, and nothing is missed or changed elsewhere."""
    query, key = next_chunk(inputs)
    expected = blocks_of(query, key, config, **where).kept
    kept = blocks_of(query, key, config, codes, **where).kept
    assert bool((kept >= expected).all())
    assert kept[rows, heads][..., columns].all()
    assert not expected[rows, heads][..., columns].all()
    untouched = torch.ones_like(kept)
    untouched[rows, heads] = False
    assert torch.equal(kept[untouched], expected[untouched])


@every_rule
def test_permuted_batch_rows_miss_nothing(rule):
    inputs, config = structured_inputs(SHAPE, 8), config_of(rule)
    codes = filled(config, inputs)
    swapped = Inputs(*(x.flip(0) for x in inputs))
    assert_spoiled(swapped, config, codes, slice(None), slice(None))


@every_rule
def test_an_overwritten_key_that_is_a_sample_is_noticed(rule):
    inputs, config = structured_inputs(SHAPE, 8), config_of(rule)
    codes = filled(config, inputs)
    inputs.key[1, 0, 255] += 1.0
    # Of the relative rule the block of that key is kept, of the mass rule all of the head's.
    columns = slice(3, 4) if config.rule.name == "relative" else slice(0, 7)
    query, key = next_chunk(inputs)
    kept = blocks_of(query, key, config, codes).kept
    expected = blocks_of(query, key, config).kept
    assert bool((kept >= expected).all())
    assert kept[1, :2, 1:, columns].all()
    assert not expected[1, :2, 1:, columns].all()
    others = torch.ones_like(kept)
    others[1, :2, :, columns if config.rule.name == "relative" else slice(None)] = False
    assert torch.equal(kept[others], expected[others])


def test_all_groups_of_a_stale_block_are_spoiled():
    # Groups of 64 from key 37 on: those from 165 to 228 and from 229 to 292 share the block of key 255.
    inputs, config = structured_inputs(SHAPE, 8), config_of("relative")
    codes, padding = KeyCodes(37), {"kv_range": torch.tensor([[0, 640], [37, 640]])}
    chunk = inputs.query[:, :, :384], inputs.key[:, :, :384]
    blocks_of(*chunk, config, codes, kv_range=torch.tensor([[0, 384], [37, 384]]))
    inputs.key[1, 0, 192:256] += 1.0
    assert_spoiled(inputs, config, codes, slice(1, 2), slice(0, 2), slice(2, 5), **padding)


@every_rule
def test_padding_may_hold_anything(rule):
    inputs, config, codes = structured_inputs(SHAPE, 8), config_of(rule), KeyCodes(130)
    for n, (query, key, where) in enumerate(chunks(inputs, [0, 300, 450, 640], [(130, 640), (0, 200)])):
        key = key.clone()
        key[0, :, :130] = key[1, :, 200:] = float(n)
        kept = blocks_of(query, key, config, codes, **where).kept
        assert torch.equal(kept, blocks_of(query, key, config, **where).kept)
    assert codes.length >= 576


@every_rule
def test_another_smoothing_mean_is_noticed(rule):
    inputs, config = structured_inputs(SHAPE, 8), config_of(rule)
    codes = filled(config, inputs)
    inputs.key[0, 1, 10] += 3.0  # no sample
    assert_spoiled(inputs, config, codes, slice(0, 1), slice(2, 4))


@every_rule
def test_other_padding_is_noticed(rule):
    inputs, config = structured_inputs(SHAPE, 8), config_of(rule, smooth_tokens=0)
    codes = KeyCodes(first_valid=64)
    before = {"kv_range": torch.tensor([[0, 384], [0, 200]])}
    blocks_of(inputs.query[:, :, :384], inputs.key[:, :, :384], config, codes, **before)
    assert codes.length >= 320
    # A row that ended in a block and goes on now: the keys behind were padding when they were coded. The last valid key
    # of a block is not what tells it.
    inputs.key[1, :, 255] = inputs.key[1, :, 319] = inputs.key[1, :, 199]
    after = {"kv_range": torch.tensor([[0, 640], [0, 640]])}
    columns = slice(3, 5) if config.rule.name == "relative" else slice(0, 5)
    assert_spoiled(inputs, config, codes, slice(1, 2), slice(None), columns, **after)
    # A row whose first valid key is another.
    codes.clear()
    blocks_of(inputs.query[:, :, :384], inputs.key[:, :, :384], config, codes)
    after = {"kv_range": torch.tensor([[0, 640], [64, 640]])}
    assert_spoiled(inputs, config, codes, slice(1, 2), slice(None), slice(1, 5), **after)


@every_rule
def test_more_padding_than_promised_misses_nothing(rule):
    inputs, codes = structured_inputs(SHAPE, 8), KeyCodes()
    for smooth in (0, 100):
        config = config_of(rule, smooth_tokens=smooth)
        codes.clear()
        for query, key, where in chunks(inputs, [0, 128, 300, 640], [(0, 640), (100, 640)]):
            used = codes.length > 0
            kept, expected = (blocks_of(query, key, config, x, **where).kept for x in (codes, None))
            assert bool((kept >= expected).all())
            assert torch.equal(kept[0], expected[0])
            if used and config.rule.name == "relative":  # whose groups are counted from another key than was promised
                assert torch.equal(kept[1], blocks_of(query, key, config.with_options(threshold=0.0), **where).kept[1])
    codes.first_valid = 100
    assert codes.length == 0
    assert_chunks_agree(inputs, [0, 128, 300, 640], config, codes, [(0, 640), (100, 640)])


def test_a_list_has_room_for_all_blocks_where_stored_codes_are_stale():
    inputs = structured_inputs(SHAPE, 8)
    config = SPARSE.with_options(max_blocks=8)
    codes = filled(config, inputs)
    assert_chunks_agree(inputs, [384, 640], config, codes)
    codes = filled(config, inputs)
    inputs.key[0, 0, 63] += 1.0
    mask = create_sale_block_mask(*next_chunk(inputs), config, key_codes=codes)
    assert block_map(mask).full[0, :2, -1, :9].all()  # one more than there is room for otherwise


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rule": "relative"}, "rule mass, sub_block 8 while the call has rule relative"),
        ({"sub_block": 1}, "sub_block 8 while the call has sub_block 1"),
        ({"block_size": (128, 64)}, r"block_size \(64, 64\) while the call has block_size \(128, 64\)"),
        ({"bits": 8}, "bits 4 while the call has bits 8"),
        ({"sub_block": 16}, "sub_block 8 while the call has sub_block 16"),
        ({"smooth_tokens": 50}, "smooth_tokens 100 while the call has smooth_tokens 50"),
    ],
)
def test_codes_of_another_config_are_refused(change, message):
    inputs = structured_inputs(SHAPE, 0)
    codes = filled(SPARSE, inputs)
    with pytest.raises(ValueError, match=f"key_codes must .*{message}; call its clear"):
        blocks_of(*next_chunk(inputs), changed(SPARSE, **change), codes)
    assert codes.length == 384
    codes.clear()
    assert_chunks_agree(inputs, [384, 640], changed(SPARSE, **change), codes)
    renewed = filled(SPARSE, inputs, renew=True)
    assert_chunks_agree(inputs, [384, 640], changed(SPARSE, **change), renewed)
    assert renewed.length == 640


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch": 1}, "batch 2 while the call has batch 1"),
        ({"kv_heads": 4}, "key heads 2 while the call has key heads 4"),
        ({"head_dim": 64}, "head_dim 32 while the call has head_dim 64"),
        ({"dtype": torch.bfloat16}, "dtype torch.float32 while the call has dtype torch.bfloat16"),
    ],
)
def test_codes_of_other_keys_are_refused(change, message):
    codes, other = filled(SPARSE, structured_inputs(SHAPE, 0)), structured_inputs(replace(SHAPE, **change), 0)
    with pytest.raises(ValueError, match=f"key_codes must .*{message}; call its clear"):
        blocks_of(*next_chunk(other), SPARSE, codes)
    renewed = filled(SPARSE, structured_inputs(SHAPE, 0), renew=True)
    assert_chunks_agree(other, [384, 640], SPARSE, renewed)
    assert renewed.length == 640


def test_codes_for_a_rough_score_mod_are_others():
    inputs = structured_inputs(SHAPE, 0)
    codes = filled(SPARSE, inputs)
    query, key = next_chunk(inputs)
    with pytest.raises(ValueError, match="sub_block 8 while the call has sub_block 1;"):
        blocks_of(query, key, SPARSE, codes, score_mod=lambda score, b, h, q_idx, kv_idx: score + kv_idx % 7)


def test_what_else_is_refused():
    inputs, codes = structured_inputs(SHAPE, 0), KeyCodes()
    query, key = next_chunk(inputs)
    with pytest.raises(TypeError, match=r"key_codes must be a sale_flex.KeyCodes or None, got dict"):
        create_sale_block_mask(query, key, SPARSE, key_codes={})
    for call in (create_sale_block_mask, lambda *x, **options: sale_attention(*x[:2], key, *x[2:], **options)):
        with pytest.raises(ValueError, match=r"q_offset must be an int beside key_codes.*leave key_codes out"):
            call(query, key, SPARSE, key_codes=codes, q_offset=torch.tensor(384))
    for wrong, error in ((-1, ValueError), (1.0, TypeError), (True, TypeError), (torch.tensor(1), TypeError)):
        with pytest.raises(error, match="first_valid must be"):
            KeyCodes(wrong)
        with pytest.raises(error, match="first_valid must be"):
            codes.first_valid = wrong
        with pytest.raises(error, match="length must be"):
            codes.truncate(wrong)


def test_under_torch_compile_a_store_is_refused():
    inputs, codes = structured_inputs(SHAPE, 0), KeyCodes()
    query, key = next_chunk(inputs)
    compiled = torch.compile(
        lambda *x: create_sale_block_mask(*x, SPARSE, key_codes=codes).kv_indices, fullgraph=True, backend="eager"
    )
    with pytest.raises(Exception, match="leave it out there"):
        compiled(query, key)
