# SPDX-License-Identifier: BSD-3-Clause
"""Neighborhood attention, against neighbours that are found by sorting distances."""

from itertools import product
from math import prod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_mask

from sale_flex.mods import neighborhood


def neighbors(x, length, window, dilation, causal):
    """The nearest tokens of one axis, of those a multiple of `dilation` away; of two as near the one before `x`."""
    group = [y for y in range(length) if (y - x) % dilation == 0 and (y <= x or not causal)]
    return sorted(group, key=lambda y: (abs(y - x), y > x))[:window]


def dense(shape, window, dilation, causal):
    """Bool ``[tokens, tokens]``."""
    mask = torch.zeros(*shape, *shape, dtype=torch.bool)
    for query in product(*(range(length) for length in shape)):
        axes = [neighbors(*axis) for axis in zip(query, shape, window, dilation, causal)]
        for key in product(*axes):
            mask[(*query, *key)] = True
    return mask.reshape(prod(shape), prod(shape))


def shown(mask_mod, q_len, kv_len):
    return create_mask(mask_mod, 1, 1, q_len, kv_len, device="cpu")[0, 0]


@st.composite
def grids(draw, longest=(30, 9, 5)):
    """(shape, window, dilation, causal) of a grid, a tuple each; `longest` axis of a grid of one, two, three."""
    grid = []
    count = draw(st.integers(1, 3))
    for _ in range(count):
        length = draw(st.integers(1, longest[count - 1]))
        dilation = draw(st.integers(1, max(1, length // 2)))
        grid.append((length, draw(st.integers(1, length // dilation)), dilation, draw(st.booleans())))
    return tuple(zip(*grid))


@given(grids())
def test_neighborhood(grid):
    shape, window, dilation, causal = grid
    tokens = prod(shape)
    mask = shown(neighborhood(shape, window, dilation, causal), tokens, tokens)
    assert mask.equal(dense(*grid))
    if not any(causal):
        assert (mask.sum(-1) == prod(window)).all()


def test_windows_are_shifted_at_the_borders():
    rows = [[0, 1, 2], [0, 1, 2], [1, 2, 3], [2, 3, 4], [2, 3, 4]]
    assert [row.nonzero().flatten().tolist() for row in shown(neighborhood(5, 3), 5, 5)] == rows
    # An even window reaches farther back.
    assert shown(neighborhood(8, 4), 8, 8)[4].nonzero().flatten().tolist() == [2, 3, 4, 5]
    # Odd coordinates are a group of three, even ones of four.
    dilated = shown(neighborhood(7, 3, 2), 7, 7)
    rows = [[0, 2, 4], [1, 3, 5], [0, 2, 4], [1, 3, 5], [2, 4, 6], [1, 3, 5], [2, 4, 6]]
    assert [row.nonzero().flatten().tolist() for row in dilated] == rows


def test_ints_hold_for_all_axes():
    assert shown(neighborhood((6, 8), 3, 2, True), 48, 48).equal(dense((6, 8), (3, 3), (2, 2), (True, True)))


@given(grids(), st.integers(-5, 40), st.booleans())
def test_rows_and_keys_outside_the_grid(grid, offset, as_tensor):
    shape, window, dilation, causal = grid
    tokens, q_len, kv_len = prod(shape), 12, prod(shape) + 7
    q_offset = torch.tensor(offset) if as_tensor else offset
    mask = shown(neighborhood(shape, window, dilation, causal, q_offset=q_offset), q_len, kv_len)
    expected = torch.zeros(q_len, kv_len, dtype=torch.bool)
    whole = dense(*grid)
    for row in range(q_len):
        if 0 <= row + offset < tokens:
            expected[row, :tokens] = whole[row + offset]
    assert mask.equal(expected)


@given(grids(longest=(30, 7, 4)), st.integers(-5, 20), st.data())
def test_key_range(grid, offset, data):
    shape, window, dilation, causal = grid
    tokens = prod(shape)
    mask_mod = neighborhood(shape, window, dilation, causal, q_offset=offset)
    mask = shown(mask_mod, tokens, tokens)
    inner = tokens // shape[0]
    for first_q in range(tokens):
        last_q = data.draw(st.integers(first_q, tokens - 1))
        rows = [torch.tensor(n, dtype=torch.int32) for n in (0, 0, first_q, last_q)]
        first, last = (int(n) for n in mask_mod.key_range(*rows))
        seen = mask[first_q : last_q + 1].any(0).nonzero().flatten()
        if len(seen):
            # From the first token with the lowest coordinate of axis 0 to the last token with the highest.
            lowest, highest = int(seen[0]) // inner, int(seen[-1]) // inner
            assert (first, last) == (lowest * inner, highest * inner + inner - 1)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: neighborhood(8, 5, 2),
            ValueError,
            r"window \* dilation .* 5 \* 2 for axis 0 of length 8; .* at most 4",
        ),
        (lambda: neighborhood((8, 4), (3, 5)), ValueError, r"5 \* 1 for axis 1 of length 4"),
        (lambda: neighborhood((8, 4), (3,)), ValueError, r"window must be .* each of the 2 axes of shape, got \(3,\)"),
        (lambda: neighborhood((8, 4), 3, (1, 1, 1)), ValueError, "dilation must be .* each of the 2 axes"),
        (lambda: neighborhood(8, 0), ValueError, "window of axis 0 must be an int of at least 1, got 0"),
        (lambda: neighborhood(8, 3, 1.0), TypeError, "dilation must be an int, or an int for each .* got float"),
        (lambda: neighborhood((8, 0), 3), ValueError, "shape of axis 1 must be an int of at least 1, got 0"),
        (lambda: neighborhood((), 3), ValueError, "shape must have an axis"),
        (lambda: neighborhood(8.0, 3), TypeError, "shape must be an int, or a tuple of ints, got float"),
        (lambda: neighborhood(8, 3, causal=(True, False)), ValueError, "causal must be .* each of the 1 axes"),
        (lambda: neighborhood((8, 8), 3, causal=1), TypeError, "causal must be a bool, or a bool for each .* got int"),
        (lambda: neighborhood(8, 3, q_offset=0.5), TypeError, "q_offset must be an int"),
    ],
)
def test_bad_arguments(make, error, message):
    with pytest.raises(error, match=message):
        make()
