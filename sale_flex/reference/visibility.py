# SPDX-License-Identifier: BSD-3-Clause
"""Who sees whom: positions, valid keys, mask_mods and block masks, element by element.

Mods are called as they are, by torch.vmap over (b, h, q_idx, kv_idx).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

from sale_flex.reference.common import real_rows, valid_keys

Mod = Callable[..., Tensor]


def make_bounds(
    batch: int,
    q_len: int,
    kv_len: int,
    q_offset: int | Tensor | None = None,
    kv_range: Tensor | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """(q_offset, start, end) of every batch row, int32 ``[B, 3]``.

    Args:
        batch: Batch rows.
        q_len: Query rows.
        kv_len: Keys.
        q_offset: Key index of the first query, a number or int ``[B]``; by default ``Skv - Sq``.
        kv_range: int ``[B, 2]``, first and one-past-last valid key; by default all.
        device: Where the result goes.
    """
    offset = torch.as_tensor(kv_len - q_len if q_offset is None else q_offset, device=device)
    if kv_range is None:
        kv_range = torch.tensor([[0, kv_len]], device=device).expand(batch, 2)
    return torch.cat([offset.expand(batch)[:, None], kv_range.to(device)], dim=1).to(torch.int32)


def visible_elements(
    bounds: Tensor,
    heads: int,
    q_len: int,
    kv_len: int,
    mask_mod: Mod | None = None,
    block_mask: Any = None,
    is_causal: bool = True,
) -> Tensor:
    """Which key each row sees, bool ``[B, Hq, Sq, Skv]``; without a mask ``[B, 1, Sq, Skv]``."""
    row, key = (torch.arange(n, device=bounds.device) for n in (q_len, kv_len))
    visible = real_rows(bounds, q_len)[:, None, :, None] & valid_keys(bounds, kv_len)[:, None, None]
    if is_causal:
        visible = visible & (key <= bounds[:, 0, None, None, None].long() + row[:, None])
    masks = [mask_mod]
    if block_mask is not None:
        masks.append(block_mask.mask_mod)
        visible = visible & _listed(block_mask, q_len, kv_len)
    for mask in masks:
        if mask is not None:
            batches, head = (torch.arange(n, device=bounds.device) for n in (len(bounds), heads))
            # A row of indices per batch row, because pooled rows need it.
            visible = visible & _vmapped(mask)(batches, head, row.expand(len(bounds), -1), key)
    return visible


def _listed(block_mask: Any, q_len: int, kv_len: int) -> Tensor:
    """Elements in the blocks that a BlockMask lists, bool ``[1 or B, 1 or Hq, Sq, Skv]``."""
    size_q, size_k = block_mask.BLOCK_SIZE
    shape = (*block_mask.kv_num_blocks.shape[:2], q_len, kv_len)
    listed = torch.zeros(shape, dtype=torch.bool, device=block_mask.kv_num_blocks.device)
    lists = [(block_mask.kv_num_blocks, block_mask.kv_indices)]
    if block_mask.full_kv_num_blocks is not None:
        lists.append((block_mask.full_kv_num_blocks, block_mask.full_kv_indices))
    for counts, indices in lists:
        for b in range(shape[0]):
            for h in range(shape[1]):
                for block in range(counts.shape[2]):
                    rows = slice(block * size_q, (block + 1) * size_q)
                    for other in indices[b, h, block, : int(counts[b, h, block])].tolist():
                        listed[b, h, rows, other * size_k : (other + 1) * size_k] = True
    return listed


def _vmapped(mod: Mod, score: bool = False) -> Mod:
    """A mod over b ``[B]``, h ``[H]``, q_idx ``[B, M]``, kv_idx ``[N]`` and, before them, a score ``[B, H, M, N]``."""
    for of_b, of_h, of_q, of_kv in (
        (None, None, None, 0),
        (None, None, 0, None),
        (None, 0, None, None),
        (0, None, 0, None),
    ):
        mod = torch.vmap(mod, in_dims=(0, of_b, of_h, of_q, of_kv) if score else (of_b, of_h, of_q, of_kv))

    def call(*arguments: Tensor) -> Tensor:
        with TransformGetItemToIndex():
            return mod(*arguments)

    return call


def modified(score_mod: Mod | None, logits: Tensor, rows: Tensor, keys: Tensor) -> Tensor:
    """Logits ``[B, H, M, N]`` after the score_mod, in their own dtype.

    Args:
        score_mod: As flex_attention takes it.
        logits: ``[B, H, M, N]``.
        rows: int64 ``[B, M]``: which query row each one is.
        keys: int64 ``[N]``: which key each column is.
    """
    if score_mod is None:
        return logits
    b, h = (torch.arange(n, device=logits.device) for n in logits.shape[:2])
    return _vmapped(score_mod, score=True)(logits, b, h, rows, keys).to(logits.dtype)


def near_elements(visible: Tensor, bounds: Tensor, is_causal: bool, sink_tokens: int, local_tokens: int) -> Tensor:
    """Sink and local keys of the rows that see something, visible or not, bool as `visible_elements`."""
    key = torch.arange(visible.shape[3], device=visible.device)
    at = torch.arange(visible.shape[2], device=visible.device)[:, None] + bounds[:, 0, None, None, None].long()
    first, _ = _ends(visible)
    sink = (key >= first) & (key < first + sink_tokens)
    distance = at - key if is_causal else (at - key).abs()
    local = (distance >= 0) & (distance < local_tokens)
    return (sink | local) & visible.any(-1, keepdim=True)


def early_elements(visible: Tensor, min_length: int) -> Tensor:
    """All from the first to the last key of the rows that see less than `min_length` further than their first key."""
    key = torch.arange(visible.shape[3], device=visible.device)
    first, last = _ends(visible)
    return visible.any(-1, keepdim=True) & (last - first < min_length) & (key >= first) & (key <= last)


def _ends(visible: Tensor) -> tuple[Tensor, Tensor]:
    """First and last key that each row sees, int64 ``[B, H, Sq, 1]``; they mean nothing where there is none."""
    flags = visible.byte()
    return flags.argmax(-1, keepdim=True), visible.shape[3] - 1 - flags.flip(-1).argmax(-1, keepdim=True)
