# SPDX-License-Identifier: BSD-3-Clause
"""Normalised queries that turn from token to token: the default keeps what they want, averages and moments do not."""

import pytest
import torch

from sale_flex import Mass, SaleConfig, create_sale_block_mask
from sale_flex.bench.generator import generate
from sale_flex.testing import block_map

LENGTH, FIRST = 4096, 1024


def missed(made, config: SaleConfig) -> tuple[float, float]:
    """The density, and the share of rows that miss more than 0.1 of their softmax in blocks of 0.05 and more each."""
    kept = block_map(create_sale_block_mask(made.query, made.key, config)).kept[0]
    rows = torch.arange(FIRST, LENGTH)
    heads, dim = made.query.shape[1], made.query.shape[3]
    shares = []
    for head in range(heads):
        logits = made.query[0, head, rows] @ made.key[0, head * made.key.shape[1] // heads].T * dim**-0.5
        logits.masked_fill_(torch.arange(LENGTH) > rows[:, None], -torch.inf)
        blocks = logits.softmax(-1).unflatten(-1, (-1, 64)).sum(-1)
        lost = torch.where((blocks >= 0.05) & ~kept[head, rows // 64], blocks, 0.0).sum(-1)
        shares.append(float((lost > 0.1).float().mean()))
    visible = torch.ones(LENGTH // 64, LENGTH // 64).tril().sum()
    return float(kept.sum() / visible / heads), max(shares)


@pytest.mark.parametrize("head_dim", [128, 256])
def test_the_default_keeps_what_turning_queries_want_and_moments_do_not(head_dim):
    made = generate(LENGTH, 2, 1, head_dim, turning=6)
    density, miss = missed(made, SaleConfig(min_length=256))
    fast_density, fast_miss = missed(made, SaleConfig(Mass.fast(), min_length=256))
    assert density == pytest.approx(fast_density, rel=0.15)
    assert miss < 0.03
    assert fast_miss > 0.15


def test_neither_misses_what_other_queries_want():
    made = generate(LENGTH, 2, 1, 128)
    for config in (SaleConfig(min_length=256), SaleConfig(Mass.fast(), min_length=256)):
        assert missed(made, config)[1] < 0.03


def test_turning_queries_have_one_length_and_seek_blocks_that_neighbours_share():
    made = generate(LENGTH, 2, 1, 128, turning=6)
    lengths = made.query.norm(dim=-1)
    torch.testing.assert_close(lengths, lengths[:, :, :1].expand_as(lengths))
    assert bool((made.needles >= 0).all())
    assert bool((made.needles <= torch.arange(LENGTH)).all())
    blocks = (made.needles // 64).unflatten(-1, (-1, 64))
    assert all(len(set(row.tolist())) <= 7 for row in blocks[0, 0])
    with pytest.raises(ValueError, match="turning must be 0 or a number of blocks, got -1"):
        generate(64, 1, 1, 32, turning=-1)
