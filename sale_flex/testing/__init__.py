# SPDX-License-Identifier: BSD-3-Clause
"""What sale_flex's own tests are made of, for testing other attention kernels too.

A property test of a kernel ``my_attention(query, key, value)``, causal and grouped::

    from hypothesis import given
    from sale_flex.testing import assert_attention_close, causal_mask, random_inputs
    from sale_flex.testing.strategies import seeds, shapes

    @given(shapes(padded=False), seeds())
    def test_my_attention(shape, seed):
        query, key, value = random_inputs(shape, seed)
        output = my_attention(query, key, value)
        assert_attention_close(output, query, key, value, causal_mask(shape))

Everywhere: query and output ``[B, Hq, Sq, D]``, key and value ``[B, Hkv, Skv, D]``, query head h on KV head
``h // (Hq // Hkv)``, dtype float32, float16 or bfloat16; oracles answer in float64. Query i stands at key
``q_offset + i``, by default aligned bottom-right, and sees the valid keys up to there.

* `inputs`: `Shape`, and factories of `Inputs`: noise, exactly summable numbers, structure with low density, needles.
* `oracles`: dense attention for any mask and score_mod, with a policy for NaN.
* `block_maps`: bool block maps to BlockMasks and back, with every list checked.
* `tolerances`: error bounds that are derived, for outputs, logits, codes, estimates and masses.
* `strategies` (needs Hypothesis, import it by name): shapes, GQA groups, lengths, offsets, paddings, mods, block maps,
  options.

What SALE itself should decide is in `sale_flex.reference`.
"""

from sale_flex.testing.block_maps import (
    BlockMap,
    any_in_block,
    assert_same_blocks,
    block_map,
    decode_list,
    expand_blocks,
    to_block_mask,
)
from sale_flex.testing.inputs import Inputs, Shape, grid_inputs, plant_needle, random_inputs, structured_inputs
from sale_flex.testing.oracles import causal_mask, dense_attention, mod_mask
from sale_flex.testing.tolerances import (
    assert_attention_close,
    attention_error_bound,
    code_error_bound,
    estimate_error_bound,
    gamma,
    logit_error_bound,
    low_precision_budget,
    mass_error_bound,
    moment_error_bound,
    rounding_band,
    unit_roundoff,
)

__all__ = [
    "BlockMap",
    "Inputs",
    "Shape",
    "any_in_block",
    "assert_attention_close",
    "assert_same_blocks",
    "attention_error_bound",
    "block_map",
    "causal_mask",
    "code_error_bound",
    "decode_list",
    "dense_attention",
    "estimate_error_bound",
    "expand_blocks",
    "gamma",
    "grid_inputs",
    "logit_error_bound",
    "low_precision_budget",
    "mass_error_bound",
    "mod_mask",
    "moment_error_bound",
    "plant_needle",
    "random_inputs",
    "rounding_band",
    "structured_inputs",
    "to_block_mask",
    "unit_roundoff",
]
