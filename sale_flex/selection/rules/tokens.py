# SPDX-License-Identifier: BSD-3-Clause
"""Which rows and keys of a call are no padding, and which are not finite: for rules in plain torch."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

if TYPE_CHECKING:
    from sale_flex.call.facts import Call


def real_rows(call: "Call") -> Tensor:
    """Query rows that are no padding, bool ``[B, Sq]``."""
    offset, start, end = call.bounds[:, :, None].unbind(1)
    at = torch.arange(call.grid.q_len, device=call.query.device) + offset
    return (at >= start) & (at < end)


def valid_keys(call: "Call") -> Tensor:
    """Keys that are no padding, bool ``[B, Skv]``."""
    _, start, end = call.bounds[:, :, None].unbind(1)
    at = torch.arange(call.grid.kv_len, device=call.key.device)
    return (at >= start) & (at < end)


def usable_keys(call: "Call") -> Tensor:
    """Keys that are no padding and finite in every channel, bool ``[B, Hkv, Skv]``."""
    return valid_keys(call)[:, None] & call.key.isfinite().all(-1)


def keep_nonfinite(scores: Tensor, call: "Call") -> Tensor:
    """Scores ``[B, Hq, nq, nk]``, infinite where a row of the block, or a key, is not finite: it is kept everywhere.

    Padding does not count. What such a row or key does to the scores of other blocks is the rule's own business.
    """
    grid = call.grid
    rows = real_rows(call)[:, None] & ~call.query.isfinite().all(-1)
    keys = valid_keys(call)[:, None] & ~call.key.isfinite().all(-1)
    of_rows = _any_in_block(rows, grid.query_blocks, grid.block_q)[..., None]
    of_keys = _any_in_block(keys, grid.key_blocks, grid.block_k)[:, :, None]
    of_keys = of_keys.repeat_interleave(call.query.shape[1] // call.key.shape[1], 1)
    return scores.masked_fill(of_rows | of_keys, torch.inf)


def block_means(x: Tensor, used: Tensor, size: int) -> Tensor:
    """Means of the vectors that are `used`, bool ``[B, 1 or H, S]``, block by block: float32 ``[B, H, n, D]``."""
    missing = -x.shape[2] % size
    x = pad(x.masked_fill(~used[..., None], 0.0), (0, 0, 0, missing))
    count = pad(used, (0, missing)).unflatten(2, (-1, size)).sum(3).clamp_min(1)
    return x.unflatten(2, (-1, size)).sum(3, dtype=torch.float32) / count[..., None]


def _any_in_block(flags: Tensor, blocks: int, size: int) -> Tensor:
    """bool ``[B, H, S]`` to ``[B, H, blocks]``."""
    return pad(flags, (0, blocks * size - flags.shape[2])).unflatten(2, (blocks, size)).any(3)
