# SPDX-License-Identifier: BSD-3-Clause
"""Ready mods take the call's q_offset by themselves: chunks, rows of a batch at different places, combined masks."""

import pytest
import torch

from sale_flex import Mass, SaleConfig, create_sale_block_mask, mods, sale_attention
from sale_flex.testing import Shape, block_map, structured_inputs

pytestmark = pytest.mark.usefixtures("uncompiled_attention")

LENGTH = 640
SHAPE = Shape(LENGTH, LENGTH, batch=2, heads=4, kv_heads=2, head_dim=32)
CONFIG = SaleConfig(Mass(0.05), min_length=64, sink_tokens=4, local_tokens=16)
IDS = torch.arange(LENGTH) // 300
TABLE = torch.linspace(-2, 2, 4 * 200).view(4, 200)

MADE = {
    "causal": lambda at=None: {"mask_mod": mods.causal(at), "is_causal": False},
    "window": lambda at=None: {"mask_mod": mods.sliding_window(200, at)},
    "window, both ways": lambda at=None: {"mask_mod": mods.sliding_window(200, at, causal=False), "is_causal": False},
    "prefix": lambda at=None: {"mask_mod": mods.prefix_lm(100, at), "is_causal": False},
    "prefix by row": lambda at=None: {"mask_mod": mods.prefix_lm(torch.tensor([100, 30]), at), "is_causal": False},
    "documents": lambda at=None: {"mask_mod": mods.document(IDS, at)},
    "documents by row": lambda at=None: {"mask_mod": mods.document(torch.stack([IDS, IDS * 0]), at)},
    "neighborhood": lambda at=None: {"mask_mod": mods.neighborhood((20, 32), 9, q_offset=at), "is_causal": False},
    "alibi": lambda at=None: {"score_mod": mods.alibi(4, at)},
    "relative bias": lambda at=None: {"score_mod": mods.relative_bias(TABLE, at)},
    "bucketed bias": lambda at=None: {"score_mod": mods.bucketed_bias(TABLE[:, :32], at)},
    "both of two": lambda at=None: {
        "mask_mod": mods.and_masks(mods.causal(at), mods.document(IDS, at)),
        "is_causal": False,
    },
    "one of two": lambda at=None: {
        "mask_mod": mods.or_masks(mods.sliding_window(100, at), mods.prefix_lm(64, at)),
        "is_causal": False,
    },
}
every_mod = pytest.mark.parametrize("made", MADE.values(), ids=MADE)


@pytest.fixture(scope="module")
def inputs():
    return structured_inputs(SHAPE, 4)


@every_mod
def test_a_chunk_keeps_what_the_whole_does(made, inputs):
    query, key, _ = inputs
    whole = block_map(create_sale_block_mask(query, key, CONFIG, **made())).kept
    chunk = block_map(create_sale_block_mask(query[:, :, 448:], key, CONFIG, **made())).kept
    assert torch.equal(chunk, whole[:, :, 7:])
    assert 0 < chunk.sum() < chunk.numel()


@every_mod
@pytest.mark.parametrize("given", ["by the call", "by the mod too"])
def test_rows_of_a_batch_stand_at_different_places(made, given, inputs):
    query, key, _ = inputs
    at = torch.tensor([256, 320], dtype=torch.int32)
    rows = torch.stack([query[0, :, 256:512], query[1, :, 320:576]])
    options = made() if given == "by the call" else made(at)
    together = create_sale_block_mask(rows, key, CONFIG, q_offset=at, **options)
    found = block_map(together).kept
    whole = block_map(create_sale_block_mask(query, key, CONFIG, **made())).kept
    for n, first in enumerate((256, 320)):
        assert torch.equal(found[n], whole[n, :, first // 64 : first // 64 + 4])


@pytest.mark.parametrize("made", [MADE["one of two"], MADE["alibi"]], ids=["a mask", "a score"])
def test_attention_places_them_too(made, inputs):
    query, key, value = inputs
    whole = sale_attention(query, key, value, CONFIG, **made())
    torch.testing.assert_close(sale_attention(query[:, :, 448:], key, value, CONFIG, **made()), whole[:, :, 448:])
    at = torch.tensor([256, 320], dtype=torch.int32)
    rows = torch.stack([query[0, :, 256:512], query[1, :, 320:576]])
    output = sale_attention(rows, key, value, CONFIG, q_offset=at, **made())
    torch.testing.assert_close(output, torch.stack([whole[0, :, 256:512], whole[1, :, 320:576]]))


@every_mod
@pytest.mark.parametrize("at", [7, torch.tensor(7), torch.tensor([7, 90])], ids=["int", "tensor", "by row"])
def test_at_is_the_mod_made_with_that_offset(made, at):
    left_out, given = made(), made(at)
    b, h = torch.arange(2).view(2, 1, 1, 1), torch.arange(4).view(4, 1, 1)
    row, column = torch.arange(64)[:, None], torch.arange(300)
    for name in ("mask_mod", "score_mod"):
        if name not in given:
            continue
        score = (torch.zeros(()),) if name == "score_mod" else ()
        ours = left_out[name].at(at)(*score, b, h, row, column)
        assert torch.equal(ours, given[name](*score, b, h, row, column))
        shifted = left_out[name](*score, b, h, row + (at.view(-1, 1, 1, 1) if torch.is_tensor(at) else at), column)
        assert torch.equal(ours.expand(shifted.shape), shifted)
        assert not hasattr(given[name], "at")


def test_an_offset_that_was_given_stays():
    # Rows by number: a mask of the tensor's own rows, wherever the call says that they stand.
    mask = mods.and_masks(mods.sliding_window(100, 0, causal=False), mods.causal())
    row, column = torch.arange(64)[:, None], torch.arange(300)
    moved = mask.at(150)(0, 0, row, column)
    assert torch.equal(moved, ((column - row).abs() < 100) & (column <= row + 150))
    assert torch.equal(mods.sliding_window(100, 0)(0, 0, row, column), mods.sliding_window(100)(0, 0, row, column))


def test_a_mask_with_a_range_of_its_own_follows_if_its_mask_does():
    ranged = mods.with_key_range(mods.causal(), lambda b, h, first_q, last_q: (first_q * 0, last_q))
    first, last = ranged.at(100).key_range(0, 0, torch.tensor(3), torch.tensor(9))
    assert (int(first), int(last)) == (0, 109)
    assert not hasattr(mods.with_key_range(mods.causal(0), lambda b, h, x, y: (x * 0, y)), "at")


def test_offsets_are_refused_that_are_none():
    with pytest.raises(ValueError, match=r"an integer tensor \[\] or \[batch\], got shape \[1, 2\]"):
        mods.causal(torch.zeros(1, 2, dtype=torch.int32))
    with pytest.raises(TypeError, match=r"q_offset must be an integer tensor, got dtype torch\.float32"):
        mods.alibi(4, torch.zeros(2))
    with pytest.raises(TypeError, match=r"q_offset must be an int, or an integer tensor.*got str"):
        mods.sliding_window(4, "0")
