# SPDX-License-Identifier: BSD-3-Clause
"""Exact attention to kept blocks, in tiles of query blocks, with its log-sum-exp.

What uncompiled flex_attention would compute in memory that grows with the square of the length. Inference only.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from sale_flex.blocks.bits import unpack_bits
from sale_flex.kernels.arguments import Grid, MaskSpec
from sale_flex.ops.fallback.tiles import all_elements, any_block, keys_of, rows_of, tiles
from sale_flex.ops.fallback.visibility import Score, scored, visible


def attend_rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kept: Tensor,
    spec: MaskSpec,
    score: Score | None,
    scale: float,
    grid: Grid,
) -> tuple[Tensor, Tensor]:
    """Softmax attention to the elements that rows see in kept blocks.

    Args:
        query: ``[B, Hq, Sq, D]``.
        key: ``[B, Hkv, Skv, D]``.
        value: ``[B, Hkv, Skv, Dv]``. A row that attends to a value that is not finite gets NaN in its channels.
        kept: int32 bits ``[B, Hq, nq, words]``.
        spec: Who sees whom.
        score: Change of the logits, or None.
        scale: Softmax scale.
        grid: Lengths and kept blocks.

    Returns:
        The output ``[B, Hq, Sq, Dv]`` in the query's dtype, computed in float32, and the natural logarithm of the
        sum of exponentials, float32 ``[B, Hq, Sq]``. Rows with nothing to attend to have 0 and -inf.
    """
    heads, group = query.shape[1], query.shape[1] // key.shape[1]
    output = torch.zeros(*query.shape[:3], value.shape[3], dtype=query.dtype, device=query.device)
    lse = torch.full(query.shape[:3], -torch.inf, device=query.device)
    for b in range(len(query)):
        for head, block in tiles(heads, group, grid.query_blocks, all_elements(grid), query.device):
            lines, index = rows_of(block, grid, query.device)
            q = index.flatten()[:, None]
            flags = unpack_bits(kept[b, head, block], grid.key_blocks)  # [G, n, nk]
            chosen = any_block(flags)
            keys = keys_of(chosen, grid.block_k)
            there = keys.long().clamp_max(grid.kv_len - 1)
            part = query[b, head, lines].float()
            rows = part.shape[1]  # not those that fill the last block
            attended = flags[..., chosen].repeat_interleave(grid.block_k, -1).repeat_interleave(grid.block_q, 1)
            attended = attended & visible(spec, b, head, q, keys, grid)
            kv = head.start // group
            logits = (pad(part, (0, 0, 0, len(q) - rows)) @ key[b, kv, there].float().T) * scale
            logits = scored(score, logits, b, head, q, keys, grid).masked_fill(~attended, -torch.inf)
            total = logits.logsumexp(-1)
            weights = (logits - total.masked_fill(total == -torch.inf, 0.0)[..., None]).exp()
            values = value[b, kv, there].float()
            result = weights @ torch.where(values.isfinite(), values, 0.0)
            if not bool(values.isfinite().all()):
                result.masked_fill_(attended.float() @ (~values.isfinite()).float() > 0, torch.nan)
            output[b, head, lines] = result[:, :rows].to(query.dtype)
            lse[b, head, lines] = total[:, :rows]
    return output, lse
