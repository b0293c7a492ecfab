# SPDX-License-Identifier: BSD-3-Clause
"""The mask_mod that a block mask carries, in the hands of a user who compiles flex_attention."""

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from sale_flex import Relative, SaleConfig, create_sale_block_mask, sale_attention
from sale_flex.blocks.bits import unpack_bits
from sale_flex.call.mask_mods import kept_block
from sale_flex.kernels import lookup
from sale_flex.ops.fallback import lookup as fallback
from sale_flex.testing import Shape, structured_inputs

CONFIG = SaleConfig(Relative(0.3, bits=8), min_length=64, local_tokens=64, smooth_tokens=128)


@pytest.mark.parametrize("dynamic", [None, True])
def test_one_compiled_flex_attention_takes_masks_of_any_length(dynamic):
    # Sizes and strides of what the mask_mod captures must not become symbols: Inductor's C++ confuses their names.
    compiled = torch.compile(flex_attention, fullgraph=True, dynamic=dynamic)
    for length in (512, 700, 1100, 1536):
        inputs = structured_inputs(Shape(length, length, heads=4, kv_heads=2, head_dim=32), seed=length)
        mask, stats = create_sale_block_mask(inputs.query, inputs.key, CONFIG, stats=True)
        assert stats.density.mean() < 0.9
        output = compiled(*inputs, block_mask=mask, enable_gqa=True)
        # One kernel from two mask_mods that hide the same elements, but for the early rows, which are SDPA's.
        late = slice(CONFIG.min_length, None)
        assert output[:, :, late].equal(sale_attention(*inputs, CONFIG)[:, :, late]), length


@pytest.mark.parametrize(("block_q", "block_k"), [(64, 64), (64, 32), (128, 64), (128, 128)])
def test_the_lookup_finds_every_block(block_q, block_k):
    generator = torch.Generator().manual_seed(0)
    kept = torch.randint(-(2**31), 2**31, (2, 3, 5, 2), generator=generator).to(torch.int32)
    in_kept_block = kept_block(kept, block_q, block_k)
    expected = unpack_bits(kept, 64)
    for where in expected.long().add(1).nonzero()[::7]:
        b, h, i, j = where
        # Any row and key of the block will do.
        found = in_kept_block(b, h, i * block_q + block_q - 1, j * block_k + block_k // 2)
        assert found == expected[b, h, i, j], where


def test_the_kernel_makes_the_same_table():
    kept = torch.arange(2 * 3 * 5 * 2, dtype=torch.int32).view(2, 3, 5, 2)
    expected = fallback.kept_table(kept, 64, 32, 5000)
    for got, wanted in zip(lookup.kept_table(kept, 64, 32, 5000), expected, strict=True):
        assert got.equal(wanted)
    assert expected[0][:60].equal(kept.flatten())
    assert not expected[0][60:].any()
    assert expected[1].tolist() == [30, 10, 2, 6, 5]
