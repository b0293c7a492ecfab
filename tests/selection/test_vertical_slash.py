# SPDX-License-Identifier: BSD-3-Clause
"""Vertical and slash lines: budgets, blocks that lines cross, and the reference's choice."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import event, given
from hypothesis import strategies as st
from rules_harness import SMALL, check_choice, kept, logit_error, ruled, scores, settled, spoiled_inputs

from sale_flex import VerticalSlash
from sale_flex.config import BLOCK_SIZES
from sale_flex.testing import Inputs, Shape, any_in_block, causal_mask, gamma, structured_inputs
from sale_flex.testing.programs import PROGRAMS
from sale_flex.testing.strategies import lengths, paddings, seeds, thresholds

RULES = st.builds(
    VerticalSlash, thresholds(1e-2, 1.5), st.integers(0, 30), st.integers(0, 100), st.sampled_from([1, 7, 64, 300])
)
SHAPE = Shape(500, 500, batch=2, heads=4, kv_heads=2, head_dim=32, kv_range=((0, 500), (37, 490)))


def line_error(shape, inputs, config, **mods):
    """Of the distance between logarithms of two lines' sums: four logits, and sums and quotients of exponentials."""
    terms = shape.kv_len + config.rule.last + 16
    return 4 * logit_error(shape, inputs, config, **mods) + 2 * gamma(terms)


@given(ruled(RULES), seeds(), st.sampled_from([None, None, torch.nan, torch.inf]))
def test_the_references_blocks_are_kept(call, seed, special):
    shape, config = call
    inputs = spoiled_inputs(shape, seed, special)
    expected, differ = check_choice(shape, inputs, config, line_error(shape, inputs, config))
    event(f"decided otherwise: {differ}, asked for: {bool((expected.hit & ~expected.always).any())}")


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_references_blocks_are_kept_under_mods(program):
    mods = PROGRAMS[program](SHAPE, "cpu")
    inputs = structured_inputs(SHAPE, 4)
    for rule in (VerticalSlash(0.5, 10, 40), VerticalSlash(0.4, 0, 30, last=20), VerticalSlash(0.4, 5, 0)):
        config = replace(SMALL, rule=rule)
        check_choice(SHAPE, inputs, config, line_error(SHAPE, inputs, config, **mods), **mods)


def inputs_that_look_back(shape: Shape, distance: int) -> Inputs:
    """Queries with a logit of 30 for the key so far before their position."""
    generator = torch.Generator().manual_seed(0)
    # Codes of 1 and -1 in so many channels that other keys' logits are far below.
    key = torch.randint(2, (1, 1, shape.kv_len, shape.head_dim), generator=generator).float() * 2 - 1
    query = torch.zeros(1, 1, shape.q_len, shape.head_dim)
    for row in range(shape.q_len):
        at = row + shape.offset - distance
        if 0 <= at < shape.kv_len:
            query[0, 0, row] = key[0, 0, at] * 30 * shape.head_dim**-0.5
    return Inputs(query, key, key)


@given(
    lengths(400, least=130),
    st.data(),
    st.sampled_from(BLOCK_SIZES),
    st.booleans(),
)
def test_a_slash_keeps_every_block_that_it_crosses(length, data, block_size, chunked):
    padding = data.draw(paddings(length), label="padding")
    q_len = data.draw(st.integers(130, length), label="queries") if chunked else length
    shape = Shape(q_len, length, head_dim=128, kv_range=(padding,))
    first, stop = max(padding[0], shape.offset), padding[1]
    distance = data.draw(st.integers(0, max(0, length - 1)), label="distance")
    config = replace(SMALL, rule=VerticalSlash(0.5, vertical=0, slash=1), block_size=block_size)
    inputs = inputs_that_look_back(shape, distance)
    found = scores(inputs, config, shape.positions()) >= 0.5
    seen = causal_mask(shape)
    row = torch.arange(q_len)[:, None] + shape.offset
    line = row - torch.arange(length) == distance
    looked_at = seen & line & (row >= stop - 64)
    # The last rows agree on the line only if it is within their keys; it has a budget of one, and others are light.
    if stop - first >= 64 and int(looked_at.sum()) >= 40:
        crossed = any_in_block(line & seen, block_size)
        visible = any_in_block(seen, block_size)
        assert torch.equal(found & visible, crossed)
        event("a line")


def test_a_slash_straddles_two_blocks_of_keys():
    shape = Shape(640, 640, head_dim=128)
    inputs = inputs_that_look_back(shape, 200)
    found = kept(inputs, replace(SMALL, rule=VerticalSlash(0.5, vertical=0, slash=1), sink_tokens=0, local_tokens=1))
    expected = torch.eye(10, dtype=torch.bool)
    for block in range(3, 10):
        expected[block, [block - 4, block - 3]] = True if block > 3 else torch.tensor([False, True])
    assert torch.equal(found[0, 0], expected)


def test_padding_is_crossed_by_no_line():
    # Real rows are 100 to 319 and end inside blocks, where a line goes on through rows and keys that are none.
    shape = Shape(500, 500, head_dim=128, kv_range=((100, 320),))
    for distance in (30, 70, 100, 150):
        rule = VerticalSlash(0.5, vertical=0, slash=1, last=40)
        config = replace(SMALL, rule=rule, block_size=(128, 64))
        found = scores(inputs_that_look_back(shape, distance), config, shape.positions()) >= 0.5
        line = torch.arange(500)[:, None] - torch.arange(500) == distance
        assert torch.equal(found, any_in_block(causal_mask(shape) & line, (128, 64)))


@pytest.mark.parametrize(
    ("threshold", "count"), [(0.9, 0), (0.7, 0), (2 / 3, 1), (0.5, 2), (0.4, 3), (1 / 3, 4), (0.26, 5)]
)
def test_the_threshold_scales_budgets(threshold, count):
    # Columns by weight: their blocks are 1, 3, 2, 5, 4 and 6.
    columns = [70, 200, 150, 330, 270, 400]
    query, key = torch.zeros(1, 1, 640, 256), torch.zeros(1, 1, 640, 256)
    for n, column in enumerate(columns):
        query[..., n] = (30 - 0.5 * n) * 256**0.5
        key[0, 0, column, n] = 1.0
    inputs = Inputs(query, key, key)
    config = replace(SMALL, rule=VerticalSlash(threshold, vertical=2, slash=0), sink_tokens=0, local_tokens=1)
    found = kept(inputs, config)[0, 0]
    kept_columns = torch.zeros(640, dtype=torch.bool)
    kept_columns[columns[:count]] = True
    at = torch.arange(640)
    expected = any_in_block((at <= at[:, None]) & (kept_columns | (at == at[:, None])), (64, 64))
    assert torch.equal(found, expected)


@given(st.integers(0, 20), st.integers(0, 80), st.floats(0.125, 0.984375, width=32), seeds())
def test_as_many_lines_reach_a_threshold_as_the_budgets_say(vertical, slash, threshold, seed):
    shape = Shape(300, 300, head_dim=32)
    rule = VerticalSlash(threshold, vertical, slash)
    inputs = structured_inputs(shape, seed)
    columns, diagonals, newest = rule._line_scores(settled(inputs, replace(SMALL, rule=rule)))
    assert int(newest) == 299
    for lines, budget in ((columns, vertical), (diagonals, slash)):
        most = budget * (1 - threshold) / threshold
        if abs(most - round(most)) > 1e-3:
            assert int((lines >= threshold).sum()) == min(math.floor(most), 300)
        positive = lines[lines > 0]
        assert len(positive.unique()) == len(positive)


def test_last_rows_decide_for_all():
    inputs = structured_inputs(replace(SHAPE, batch=1, kv_range=None), 1)
    config = replace(SMALL, rule=VerticalSlash(0.5, 10, 30))
    query = inputs.query.clone()
    query[:, :, :436] = torch.randn(1, 4, 436, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(kept(inputs._replace(query=query), config), kept(inputs, config))
    query[:, :, 436:] = torch.randn(1, 4, 64, 32, generator=torch.Generator().manual_seed(1))
    assert not torch.equal(kept(inputs._replace(query=query), config), kept(inputs, config))


def test_what_none_of_the_last_rows_sees_is_no_line():
    shape = Shape(640, 640, heads=2, head_dim=32)
    ids = (torch.arange(640) >= 384).int()

    def mask_mod(b, h, q_idx, kv_idx):
        return ids[q_idx] == ids[kv_idx]

    # Budgets for every line there is: of the first document, those diagonals are kept that the second one has too.
    config = replace(SMALL, rule=VerticalSlash(0.5, 640, 640), sink_tokens=0, local_tokens=1)
    found = kept(structured_inputs(shape, 0), config, mask_mod=mask_mod)
    at = torch.arange(640)
    distance = at[:, None] - at
    line = (ids == 1) | (distance <= 639 - 384)
    seen = (distance >= 0) & (ids[:, None] == ids)
    assert torch.equal(found, any_in_block(line & seen, (64, 64)).expand_as(found))
    assert not torch.equal(found, any_in_block(seen, (64, 64)).expand_as(found))


def test_options_are_checked_and_described():
    with pytest.raises(ValueError, match="vertical must be at least 0 keys, got -1"):
        VerticalSlash(vertical=-1)
    with pytest.raises(TypeError, match="slash must be an int"):
        VerticalSlash(slash=0.5)
    with pytest.raises(ValueError, match="last must be at least 1 rows, got 0"):
        VerticalSlash(last=0)
    assert VerticalSlash().describe() == "vertical_slash: 1000 keys and 6096 distances of the last 64 rows"
