# SPDX-License-Identifier: BSD-3-Clause
"""Positions on the grid of blocks, against whole masks of elements."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sale_flex.blocks.geometry import Grid, always_blocks, full_blocks, visible_blocks, visible_count
from sale_flex.config import BLOCK_SIZES
from sale_flex.reference import make_bounds
from sale_flex.testing import Shape, any_in_block, causal_mask
from sale_flex.testing.strategies import shapes

GRIDS = shapes(max_tokens=700, kv_heads=(1,), groups=(1,)), st.sampled_from(BLOCK_SIZES)


def grid_of(shape, block_size):
    bounds = make_bounds(shape.batch, shape.q_len, shape.kv_len, **shape.positions())
    return bounds, Grid(shape.q_len, shape.kv_len, *block_size)


@given(*GRIDS)
def test_visible_blocks_are_those_with_a_visible_element(shape, block_size):
    bounds, grid = grid_of(shape, block_size)
    visible = visible_blocks(bounds, grid)
    assert torch.equal(visible, any_in_block(causal_mask(shape), block_size)[:, 0])
    assert torch.equal(visible_count(bounds, grid), visible.sum((1, 2)))


@given(*GRIDS)
def test_full_blocks_are_those_without_a_hidden_element(shape, block_size):
    bounds, grid = grid_of(shape, block_size)
    seen = causal_mask(shape)
    hidden = any_in_block(~seen, block_size)
    assert torch.equal(full_blocks(bounds, grid), ~hidden[:, 0])


def check_always(shape, block_size, sink_tokens, local_tokens, min_length):
    bounds, grid = grid_of(shape, block_size)
    visible = visible_blocks(bounds, grid)
    always = always_blocks(bounds, grid, sink_tokens, local_tokens, min_length) & visible
    seen = causal_mask(shape)[:, 0]
    position = torch.arange(shape.q_len)[:, None] + shape.offset
    at = torch.arange(shape.kv_len)
    start = bounds[:, 1, None, None]
    near = seen & ((at < start + sink_tokens) | (at > position - local_tokens))
    real = seen.any(-1, keepdim=True)
    early = any_in_block(((position - start < min_length) & real).expand_as(seen), block_size)
    early = early.any(-1, keepdim=True) & visible
    assert torch.equal(always, any_in_block(near, block_size) | early)


@given(*GRIDS, st.integers(0, 200), st.integers(1, 300), st.integers(0, 300))
def test_always_kept_are_sink_local_diagonal_and_early(shape, block_size, sink_tokens, local_tokens, min_length):
    check_always(shape, block_size, sink_tokens, local_tokens, min_length)


@pytest.mark.parametrize("start", [0, 1, 37, 63, 64])
@pytest.mark.parametrize("shape", [Shape(256, 256), Shape(130, 300), Shape(65, 300, q_offset=100)], ids=repr)
def test_windows_end_at_the_very_token(shape, start):
    # A window is off by one for one length in 64 only, so every length is tried.
    shape = replace(shape, kv_range=((start, shape.kv_len),))
    for tokens in range(140):
        check_always(shape, (64, 64), tokens, 1, 0)
        check_always(shape, (64, 64), 0, 1 + tokens, 0)
        check_always(shape, (64, 64), 0, 1, tokens)
