# SPDX-License-Identifier: BSD-3-Clause
"""The mask of packed sequences: rows see their own document."""

import torch
from torch import Tensor

from sale_flex.mods.arguments import check_integer
from sale_flex.mods.held import held, held_table
from sale_flex.mods.placed import placed_mask
from sale_flex.mods.ready import MaskMod, ready


def document(ids: Tensor, q_offset: int | Tensor | None = None) -> MaskMod:
    """Rows see the keys of their own document, of several in one sequence (Krell et al. 2021, arXiv 2107.02027).

    A document is a run of neighbouring tokens with equal ids, whatever the numbers; an id that comes again after
    another one begins a new document. Rows whose position is outside the ids see nothing. The mask is not causal:
    combine it with `causal`, or leave that to sale_attention.

    Args:
        ids: The document each key belongs to: an integer tensor ``[Skv]``, or ``[B, Skv]`` for batch rows packed each
            in its own way, as long as key and value. Copied: later changes in place are not seen.
        q_offset: Key position of query row 0; None: that of the call (`sale_flex.mods`, "Positions").

    Example:
        ``mask_mod=and_masks(causal(), document(torch.arange(len(lengths)).repeat_interleave(lengths)))``
    """
    check_integer("ids", ids)
    if ids.dim() not in (1, 2) or ids.numel() == 0:
        raise ValueError(
            f"ids must have the shape [keys] or [batch, keys] and not be empty, got {list(ids.shape)}; "
            "there is no dimension of heads."
        )
    if ids.dim() == 2 and ids.shape[0] == 1:
        ids = ids[0]
    # The length as a tensor: as a number it would be part of the program, which then compiled for every length.
    length = held(torch.full((), ids.shape[-1], dtype=torch.int32, device=ids.device))
    # Tables by key: a row's position may lie outside of them.
    first, last = _spans(ids)

    if ids.dim() == 1:

        def document_mask(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            return (first[kv_idx] <= q_idx) & (q_idx <= last[kv_idx])

        def key_range(b: Tensor, h: Tensor, first_q: Tensor, last_q: Tensor) -> tuple[Tensor, Tensor]:
            low, high = first_q.clamp(min=0), last_q.clamp(min=0)
            return first[low.minimum(length - 1)], last[high.minimum(length - 1)]

        return placed_mask(ready(document_mask, key_range=key_range), q_offset)

    def batch_mask(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        place = b * length + kv_idx
        return (first[place] <= q_idx) & (q_idx <= last[place])

    def batch_range(b: Tensor, h: Tensor, first_q: Tensor, last_q: Tensor) -> tuple[Tensor, Tensor]:
        low, high = first_q.clamp(min=0), last_q.clamp(min=0)
        return first[b * length + low.minimum(length - 1)], last[b * length + high.minimum(length - 1)]

    return placed_mask(ready(batch_mask, key_range=batch_range), q_offset)


def _spans(ids: Tensor) -> tuple[Tensor, Tensor]:
    """First and last position of the run of equal ids that each token lies in: two int32 tables, rows end to end."""
    position = torch.arange(ids.shape[-1], dtype=torch.int32, device=ids.device).expand(ids.shape)
    border = ids[..., 1:] != ids[..., :-1]
    edge = torch.ones_like(ids[..., :1], dtype=torch.bool)
    first = torch.where(torch.cat([edge, border], -1), position, 0).cummax(-1).values
    last = torch.where(torch.cat([border, edge], -1), position, ids.shape[-1]).flip(-1).cummin(-1).values.flip(-1)
    return held_table(first), held_table(last)
