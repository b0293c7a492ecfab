# SPDX-License-Identifier: BSD-3-Clause
"""Exact attention of a programmed call over its kept blocks, in tiles of query blocks, with its log-sum-exp.

What uncompiled flex_attention would compute in memory that grows with the square of the length. Inference only.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from sale_flex.blocks.bits import unpack_bits
from sale_flex.blocks.geometry import Grid
from sale_flex.ops.fallback.structure import Mask, Score, Sight, keys_of, rows_of, scored, tiles


def listed_rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kept: Tensor,
    bounds: Tensor,
    causal: bool,
    mask: Mask | None,
    listed: Tensor | None,
    listed_q: int,
    listed_k: int,
    score: Score | None,
    scale: float,
    block_q: int,
    block_k: int,
) -> tuple[Tensor, Tensor]:
    """Softmax attention to the elements that rows see in kept blocks.

    Args:
        query: ``[B, Hq, Sq, D]``.
        key: ``[B, Hkv, Skv, D]``.
        value: ``[B, Hkv, Skv, Dv]``. A row that attends to a value that is not finite gets NaN in its channels.
        kept: int32 bits ``[B, Hq, nq, words]``.
        bounds: int32 ``[B, 3]``.
        causal: Whether keys after a row are hidden.
        mask: See `sale_flex.ops.fallback.structure`; so is `score`.
        listed: Bits of a block mask, or None.
        listed_q: Query rows of its blocks.
        listed_k: Keys of its blocks.
        score: Change of the logits, or None.
        scale: Softmax scale.
        block_q: Query rows of kept blocks.
        block_k: Keys of kept blocks.

    Returns:
        The output ``[B, Hq, Sq, Dv]`` in the query's dtype, computed in float32, and the natural logarithm of the
        sum of exponentials, float32 ``[B, Hq, Sq]``. Rows with nothing to attend to have 0 and -inf.
    """
    heads, q_len = query.shape[1:3]
    group = heads // key.shape[1]
    grid = Grid(q_len, key.shape[2], block_q, block_k)
    sight = Sight(bounds, causal, mask, listed, listed_q, listed_k)
    output = torch.zeros(*query.shape[:3], value.shape[3], dtype=query.dtype, device=query.device)
    lse = torch.full(query.shape[:3], -torch.inf, device=query.device)
    for b in range(len(query)):
        for head, block in tiles(heads, group, grid):
            lines, index = rows_of(block, block_q, query.device)
            flags = unpack_bits(kept[b, head, block], grid.key_blocks)  # [G, n, nk]
            chosen = flags.flatten(0, 1).any(0).nonzero()[:, 0]
            keys = keys_of(chosen, block_k)
            there = keys.long().clamp_max(grid.kv_len - 1)
            part = query[b, head, lines].float()
            rows = part.shape[1]  # not those that fill the last block
            attended = flags[..., chosen].repeat_interleave(block_k, -1).repeat_interleave(block_q, 1)
            attended = attended & sight.seen(b, head, index, keys, grid)
            kv = head.start // group
            logits = (pad(part, (0, 0, 0, len(index) - rows)) @ key[b, kv, there].float().T) * scale
            logits = scored(score, logits, b, head, index, keys, grid).masked_fill(~attended, -torch.inf)
            total = logits.logsumexp(-1)
            weights = (logits - total.masked_fill(total == -torch.inf, 0.0)[..., None]).exp()
            values = value[b, kv, there].float()
            result = weights @ torch.where(values.isfinite(), values, 0.0)
            if not bool(values.isfinite().all()):
                result.masked_fill_(attended.float() @ (~values.isfinite()).float() > 0, torch.nan)
            output[b, head, lines] = result[:, :rows].to(query.dtype)
            lse[b, head, lines] = total[:, :rows]
    return output, lse
