# SPDX-License-Identifier: BSD-3-Clause
"""Ready FlexAttention mods: masks and scores of common attention variants.

A factory returns a plain function that torch's flex_attention, create_block_mask and sale_attention take.

| factory | a row at position `p` sees key `kv` if, or a score `s` becomes |
| --- | --- |
| `causal` | ``kv <= p`` |
| `sliding_window` | ``p - window < kv <= p``, or ``abs(kv - p) < window`` |
| `prefix_lm` | ``kv <= p or kv < prefix_length[b]`` |
| `document` | `kv` and `p` lie in the same run of equal ids |
| `neighborhood` | `kv` is one of the `window` nearest tokens of `p` along each axis of a grid |
| `and_masks`, `or_masks` | all, or one, of several masks say so |
| `with_key_range` | as a user's own mask says, which promises where its keys lie |
| `alibi` | ``s + slopes[h] * (kv - p)`` |
| `softcap` | ``cap * tanh(s / cap)`` |
| `relative_bias` | ``s + table[h, clamp(p - kv + center)]`` |
| `bucketed_bias` | ``s + table[h, bucket(p - kv)]``, the buckets of T5 |

**Positions.** Mods are given the row `q_idx` of the query tensor. Its position is ``p = q_offset + q_idx``: `q_offset`,
the key position of row 0, is 0 where queries and keys are the same tokens, and the number of cached keys in chunked
prefill. Left out, a mod follows the call: sale_attention and create_sale_block_mask place it with their own `q_offset`.
flex_attention does not know that; where a mod goes to it by itself, in chunks, its offset has to be given: an int,
which becomes part of the compiled program, or an int32 tensor ``[]`` or ``[B]`` on the query's device, which compiles
once and may be changed in place. ``mod.at(q_offset)`` makes such a one of one that follows the call. Torch's own
and_masks and or_masks hide from the call what they are made of: take those of this module.

**Key ranges.** Every mask mod made here has an attribute `key_range`, a function of `b`, `h` and two rows:
``first_kv, last_kv = mask_mod.key_range(b, h, first_q, last_q)``. It promises that rows `first_q` to `last_q` see no
key outside ``[first_kv, last_kv]``, so that the blocks outside need no look. The range may reach over the ends of the
tensor, and is empty where ``first_kv > last_kv``.

Captured tensors must be on the query's device. All factories may be called inside torch.compile(fullgraph=True); none
reads a value of a tensor.
"""

from sale_flex.mods.bias import alibi, bucketed_bias, relative_bias, softcap
from sale_flex.mods.combine import and_masks, or_masks, with_key_range
from sale_flex.mods.document import document
from sale_flex.mods.neighborhood import neighborhood
from sale_flex.mods.positions import causal, prefix_lm, sliding_window
from sale_flex.mods.ready import KeyRange, MaskMod, ScoreMod

__all__ = [
    "KeyRange",
    "MaskMod",
    "ScoreMod",
    "alibi",
    "and_masks",
    "bucketed_bias",
    "causal",
    "document",
    "neighborhood",
    "or_masks",
    "prefix_lm",
    "relative_bias",
    "sliding_window",
    "softcap",
    "with_key_range",
]
