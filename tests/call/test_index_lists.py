# SPDX-License-Identifier: BSD-3-Clause
"""How wide index lists are: full where that costs little, bounded where it would not, and never silently short."""

from types import SimpleNamespace

import pytest
import torch

from sale_flex import Mass, Relative, SaleConfig, create_sale_block_mask
from sale_flex.blocks.geometry import Grid
from sale_flex.call.index_lists import LIST_BYTES, QUERY_SHARE, Room, plain_room
from sale_flex.testing import Shape, block_map, structured_inputs


def query_of(length: int, heads: int = 32, dim: int = 128, batch: int = 1, *, cuda: bool = True) -> SimpleNamespace:
    """What `plain_room` looks at, without the memory."""
    return SimpleNamespace(shape=(batch, heads, length, dim), is_cuda=cuda, element_size=lambda: 2)


def widths(length: int, config: SaleConfig | None = None, no_left_padding: bool = True, **of_query) -> Room:
    config = config or SaleConfig(Mass(0.01))
    grid = Grid(length, length, *config.block_size)
    return plain_room(query_of(length, **of_query), grid, config, 9216, no_left_padding)


@pytest.mark.parametrize("cuda", [False, True])
def test_short_calls_get_an_entry_per_key_block(cuda):
    assert widths(65536, cuda=cuda) == (1024, 1024, 1024)
    assert widths(130, cuda=cuda) == (3, 3, 3)


def test_a_processor_without_a_gpu_always_does():
    assert widths(131072, cuda=False) == (2048, 2048, 2048)


def test_long_calls_take_a_share_of_the_querys_memory():
    partial, full, budget = widths(131072)
    assert partial == 4  # the diagonal, and a full list that starts at 16 bytes
    assert full * 4 * 2048 * 32 <= QUERY_SHARE * 131072 * 32 * 128 * 2
    assert 0 < budget < full
    million = widths(2**20)
    assert million.full * 4 * 2**14 * 32 <= LIST_BYTES
    assert million.budget > 0


def test_what_may_be_dense_keeps_its_room():
    dense = SaleConfig(Mass(0.0))
    per_head = SaleConfig(Mass(torch.full((32,), 0.01)))
    relative = SaleConfig(Relative(0.01, bits=8))
    for config in (dense, per_head, relative):
        assert widths(131072, config) == (4, 2048, 2048)


def test_padding_may_make_every_block_partial():
    assert widths(131072, no_left_padding=False).partial == 2048


def test_too_little_room_is_refused():
    with pytest.raises(
        ValueError, match=r"config\.rule\.max_blocks must have room for the \d+ blocks .* got 40; raise"
    ):
        widths(65536, SaleConfig(Mass(max_blocks=40)))
    assert widths(65536, SaleConfig(Mass(max_blocks=400))).full == 400


def test_blocks_without_room_are_counted_and_the_heaviest_stay():
    shape = Shape(1400, 1400, heads=2, kv_heads=1, head_dim=64)
    inputs = structured_inputs(shape, 0)
    config = SaleConfig(Mass(1e-4), min_length=0, local_tokens=16, sink_tokens=4)
    free, counts = create_sale_block_mask(inputs.query, inputs.key, config, stats=True)
    assert not counts.dropped_blocks.any()
    tight = SaleConfig(Mass(1e-4, max_blocks=12), min_length=0, local_tokens=16, sink_tokens=4)
    mask, counts = create_sale_block_mask(inputs.query, inputs.key, tight, stats=True)
    kept, all_kept = block_map(mask).kept, block_map(free).kept
    assert counts.dropped_blocks.all()
    assert not (kept & ~all_kept).any()
    assert torch.equal((all_kept & ~kept).sum((2, 3)), counts.dropped_blocks)
    assert kept.sum(-1).max() <= 12 + 3
