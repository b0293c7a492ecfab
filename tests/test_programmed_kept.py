# SPDX-License-Identifier: BSD-3-Clause
"""What the torch path of programmed calls makes of kept blocks: index lists, and attention to their values."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from sale_flex import reference
from sale_flex.blocks.bits import pack_bits
from sale_flex.ops.fallback.listed_compact import listed_compact
from sale_flex.ops.fallback.listed_rows import listed_rows
from sale_flex.testing import Shape, random_inputs
from sale_flex.testing.block_maps import decode_list
from sale_flex.testing.strategies import block_maps


@given(st.data(), st.integers(1, 3), st.integers(1, 2), st.integers(1, 3), st.integers(1, 4), st.integers(1, 40))
def test_lists_are_what_is_kept(data, batch, kv_heads, group, nq, nk):
    heads = kv_heads * group
    structure_heads = data.draw(st.sampled_from([1, heads]))
    hits = data.draw(block_maps(batch, heads, nq, nk))
    visible, full, always = (data.draw(block_maps(batch, structure_heads, nq, nk)) for _ in range(3))
    flags = data.draw(st.none() | block_maps(batch, 1, kv_heads, nk))
    widths = [data.draw(st.just(nk) | st.integers(0, nk + 4)) for _ in range(2)]
    want_kept = data.draw(st.booleans())
    words, *numbers, lists, dropped = listed_compact(
        pack_bits(hits), None if flags is None else pack_bits(flags[:, 0]),
        pack_bits(visible), pack_bits(full), pack_bits(always), kv_heads, *widths, nk, want_kept,
    )  # fmt: skip
    kept = hits | always
    if flags is not None:
        kept = kept | flags[:, 0].repeat_interleave(group, 1)[:, :, None]
    kept = kept & visible
    assert torch.equal(words, pack_bits(kept)) if want_kept else words.numel() == 0
    lost = torch.zeros_like(dropped)
    for number, entries, wanted, width in zip(numbers, lists.split(widths, -1), (kept & ~full, kept & full), widths):
        room = wanted & (wanted.cumsum(-1) <= width)
        assert number.dtype == entries.dtype == torch.int32
        assert torch.equal(decode_list(number, entries, nk), room)
        lost += (wanted & ~room).sum(-1).int()
    assert torch.equal(dropped, lost)


def test_a_row_takes_no_value_that_it_does_not_see():
    x = random_inputs(Shape(128, 128, head_dim=32))
    value = x.value.clone()
    value[0, 0, 100, 3] = torch.nan
    bounds = reference.make_bounds(1, 128, 128)
    kept = pack_bits(torch.ones(1, 1, 2, 2, dtype=torch.bool))
    output, _ = listed_rows(x.query, x.key, value, kept, bounds, True, None, None, 1, 1, None, 0.2, 64, 64)
    assert output[0, 0, 100:, 3].isnan().all()
    assert output[0, 0, :100].isfinite().all()
    assert output[..., :3].isfinite().all()
