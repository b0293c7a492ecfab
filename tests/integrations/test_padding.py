# SPDX-License-Identifier: BSD-3-Clause
"""A 2-D attention mask as first and one-past-last valid position."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sale_flex.integrations.transformers.padding import padding_of, valid_keys

pytestmark = pytest.mark.usefixtures("uncompiled_attention")

ROWS = st.integers(1, 12).flatmap(
    lambda length: st.lists(st.lists(st.booleans(), min_size=length, max_size=length), min_size=1, max_size=4)
)


def spans(rows):
    """First and one-past-last valid position of every row, by looking."""
    valid = [[at for at, is_valid in enumerate(row) if is_valid] for row in rows]
    return [[at[0], at[-1] + 1] if at else [0, 0] for at in valid]


@given(ROWS)
def test_spans_are_found_and_holes_told(rows):
    padding, expected = padding_of(torch.tensor(rows)), spans(rows)
    if all(map(all, rows)):
        assert padding is None
        return
    assert padding.valid.tolist() == expected
    assert padding.first_valid == max(first for first, _ in expected)
    assert padding.holes == any(sum(row) != stop - first for row, (first, stop) in zip(rows, expected))


@given(ROWS)
def test_checked_spans_are_the_same_or_an_error(rows):
    expected = spans(rows)
    if any(sum(row) != stop - first for row, (first, stop) in zip(rows, expected)):
        with pytest.raises(ValueError, match="must not have padding between valid tokens"):
            valid_keys(torch.tensor(rows), True)
    else:
        assert valid_keys(torch.tensor(rows), True).tolist() == expected


@pytest.mark.parametrize("check", [False, True])
def test_the_op_keeps_its_promises(check):
    mask = torch.tensor([[False, True, True], [True, True, False]])
    torch.library.opcheck(valid_keys.overload, (mask, check))
