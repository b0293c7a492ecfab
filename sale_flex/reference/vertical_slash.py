# SPDX-License-Identifier: BSD-3-Clause
"""Vertical and slash lines (MInference, arXiv 2407.02490, section 3, "Vertical-Slash")."""

from typing import Any

import torch
from torch import Tensor

from sale_flex.reference.call import Call, exact_logits
from sale_flex.reference.common import Choice, block_any, block_max, nonfinite_blocks, real_rows, valid_keys


def last_probabilities(call: Call, last: int) -> tuple[Tensor, Tensor]:
    """Softmax of the last real rows, ``[B, Hq, Sq, Skv]`` with 0 in other rows, and what those see, bool."""
    real = real_rows(call.bounds, call.query.shape[2])
    behind = real.flip(1).cumsum(1).flip(1)  # real rows from this one on
    chosen = (real & (behind <= last))[:, None] & call.query.isfinite().all(-1)
    row = torch.arange(call.query.shape[2], device=call.key.device).expand(len(call.query), -1)
    finite = call.key.isfinite().all(-1).repeat_interleave(call.query.shape[1] // call.key.shape[1], 1)
    sees = call.elements & chosen[..., None] & finite[:, :, None]
    logits = exact_logits(call, call.query, row)
    return logits.masked_fill(~(sees & logits.isfinite()), -torch.inf).softmax(-1).nan_to_num(0.0), sees


def kept_lines(sums: Tensor, seen: Tensor, budget: int, threshold: Tensor) -> tuple[Tensor, Tensor]:
    """Which lines of ``[B, Hq, N]`` are among the first ``budget * (1 - t) / t``, and how far they are from changing.

    Args:
        sums: Probabilities of each line.
        seen: bool: which lines there are.
        budget: Lines at threshold 0.5.
        threshold: float32 ``[Hq, 1]``.

    Returns:
        bool ``[B, Hq, N]``, and margins: logarithms of a line's sum over that of the nearest one on the other side.
    """
    place = sums.masked_fill(~seen, -1.0).argsort(dim=-1, descending=True, stable=True).argsort(dim=-1) + 1
    kept = seen & (budget / (budget + place) >= threshold)  # in float32, as the threshold is
    least = sums.masked_fill(~kept, torch.inf).amin(-1, keepdim=True)
    most = sums.masked_fill(kept | ~seen, 0.0).amax(-1, keepdim=True)
    margin = (sums.log() - torch.where(kept, most, least).log()).nan_to_num(nan=0.0, posinf=torch.inf)
    return kept, margin.masked_fill(~seen, -torch.inf)


def vertical_slash_choice(call: Call, config: Any) -> Choice:
    """The candidates that a kept column or diagonal crosses, between real rows and valid keys."""
    rule, heads, (q_len, kv_len) = config.rule, call.query.shape[1], call.elements.shape[2:]
    threshold = torch.as_tensor(rule.threshold, dtype=torch.float32, device=call.key.device).expand(heads)[:, None]
    weights, sees = last_probabilities(call, rule.last)
    verticals = kept_lines(weights.sum(2), sees.any(2), rule.vertical, threshold)

    row, key = torch.arange(q_len)[:, None], torch.arange(kv_len)
    line = (row - key + kv_len - 1).to(weights.device)  # diagonals from the upper right corner on

    def along(x: Tensor) -> Tensor:
        sums = x.new_zeros(*x.shape[:2], q_len + kv_len - 1)
        return sums.index_add_(2, line.flatten(), x.flatten(2))

    slashes = kept_lines(along(weights), along(sees.to(weights.dtype)) > 0, rule.slash, threshold)
    crossed = real_rows(call.bounds, q_len)[:, None, :, None] & valid_keys(call.bounds, kv_len)[:, None, None]
    kept = (verticals[0][:, :, None] | slashes[0][:, :, line]) & crossed
    margin = torch.maximum(verticals[1][:, :, None], slashes[1][:, :, line]).masked_fill(~crossed, -torch.inf)
    unasked = (threshold == 0)[..., None] | nonfinite_blocks(call.query, call.key, call.bounds, config.block_size)
    hit = call.candidate & (block_any(kept, *config.block_size) | unasked)
    margin = block_max(margin, *config.block_size).masked_fill(unasked, torch.inf)
    return Choice(hit, margin.masked_fill(~call.candidate, -torch.inf), torch.zeros_like(hit))
