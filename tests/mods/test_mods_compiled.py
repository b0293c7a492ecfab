# SPDX-License-Identifier: BSD-3-Clause
"""The ready mods under torch.compile: made outside and inside, with lengths, offsets and numbers that change."""

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from sale_flex import mods
from sale_flex.testing import attention_error_bound, dense_attention, mod_mask

HEADS, DIM = 2, 32


def inputs(q_len, kv_len, batch=1):
    generator = torch.Generator().manual_seed(q_len)
    return [torch.randn(batch, HEADS, length, DIM, generator=generator) for length in (q_len, kv_len, kv_len)]


def assert_attends(output, query, key, value, mask_mod, score_mod=None):
    mask = mod_mask(mask_mod, query.shape[0], HEADS, query.shape[2], key.shape[2])
    if score_mod is None:
        bound = attention_error_bound(query, key, value, mask)
    else:
        # Whatever the weights become, an output is at most the largest value. The score mods here pass on no more than
        # the error they get, and add their own: eight roundings, say, of numbers below 32. An error d of the logits
        # moves an output by at most 2 d times the largest value.
        largest = value.abs().max()
        bound = attention_error_bound(query, key, value * 0 + largest, mask) + 2 * (8 * 32 * 2.0**-24) * largest
    error = (output - dense_attention(query, key, value, mask, score_mod=score_mod)).abs()
    assert (error <= bound).all(), f"off by {error.max()}, at most {bound.max()} expected"


@pytest.fixture
def compiled():
    torch.compiler.reset()
    yield lambda function, **options: torch.compile(function, fullgraph=True, **options)
    torch.compiler.reset()


@torch.no_grad()
def test_made_outside(compiled):
    attend = compiled(flex_attention, dynamic=True)
    for length, cap in ((256, 3.0), (320, 4.5), (500, 6.0)):
        query, key, value = inputs(length, length)
        ids = torch.arange(length) // 70
        mask_mod = mods.and_masks(mods.causal(), mods.document(ids))
        score_mod = mods.softcap(cap)
        block_mask = create_block_mask(mask_mod, None, None, length, length, device="cpu")
        output = attend(query, key, value, score_mod=score_mod, block_mask=block_mask)
        assert_attends(output, query, key, value, mask_mod, score_mod)


@torch.no_grad()
def test_neighborhood_made_outside(compiled):
    shape = (6, 10, 8)
    query, key, value = inputs(480, 480)
    mask_mod = mods.neighborhood(shape, (3, 5, 3), (2, 1, 2), (True, False, False))
    block_mask = create_block_mask(mask_mod, None, None, 480, 480, device="cpu")
    assert_attends(compiled(flex_attention)(query, key, value, block_mask=block_mask), query, key, value, mask_mod)


@torch.no_grad()
def test_made_inside(compiled):
    def made(ids, q_offset, table):
        """All factories that make or convert a tensor."""
        packed = mods.document(ids, q_offset)
        window = mods.or_masks(mods.sliding_window(40, q_offset), mods.prefix_lm(ids[:, 0] + 3, q_offset))
        near = mods.with_key_range(packed, packed.key_range)
        bias, lines = mods.bucketed_bias(table, q_offset), mods.alibi(HEADS, q_offset)
        return mods.and_masks(near, window), lambda score, *where: lines(bias(score, *where), *where)

    def attend(query, key, value, ids, q_offset, table):
        mask_mod, score_mod = made(ids, q_offset, table)
        assert mask_mod.key_range is not None
        block_mask = create_block_mask(mask_mod, 2, None, query.shape[2], key.shape[2], device="cpu")
        return flex_attention(query, key, value, score_mod=score_mod, block_mask=block_mask)

    attend = compiled(attend)
    # Whole blocks of rows: Inductor (torch 2.13) cannot compile create_block_mask for others on a CPU.
    for q_len in (256, 384):
        query, key, value = inputs(q_len, q_len + 30, batch=2)
        ids = torch.stack([torch.arange(q_len + 30) // 90, torch.arange(q_len + 30) // 55])
        arguments = ids, torch.tensor(30), torch.linspace(-1, 1, 16).expand(HEADS, 16).double()
        output = attend(query, key, value, *arguments)
        assert_attends(output, query, key, value, *made(*arguments))
