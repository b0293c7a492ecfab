# SPDX-License-Identifier: BSD-3-Clause
"""What a choice of blocks missed, by rows that are asked exactly (docs/semantics.md, "Audit")."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from sale_flex.reference.common import scaled_products
from sale_flex.reference.visibility import Mod, modified

GROUPS = ((0, 64), (4096, 128), (8192, 256))
"""From which position on one row of how many is audited."""


class AuditedRows(NamedTuple):
    """A slot for every group of positions from the one of the first query on, ``[B, Hq, R]``."""

    asked: Tensor
    """bool: whether its row was."""
    wanted: Tensor
    """float64: probability on blocks that the row wants."""
    missed: Tensor
    """float64: of that, what is on blocks that were not kept."""


def audited_positions(tokens: int) -> list[int]:
    """The audited position of every group that begins within the first `tokens`, counted from the first valid key.

    Of group g, the one at ``frac(g * phi)`` of its length, phi the golden ratio in 32 bits.
    """
    golden = round(2**32 * (math.sqrt(5) - 1) / 2)  # 2654435769
    firsts = []
    for (first, size), (stop, _) in zip(GROUPS, (*GROUPS[1:], (tokens, 0))):
        firsts += [(at, size) for at in range(first, min(stop, tokens), size)]
    return [at + (number * golden % 2**32) * size // 2**32 for number, (at, size) in enumerate(firsts)]


def audit_rows(
    query: Tensor,
    key: Tensor,
    kept: Tensor,
    always: Tensor,
    visible: Tensor,
    early: Tensor,
    bounds: Tensor,
    scale: float,
    block_size: tuple[int, int],
    score_mod: Mod | None = None,
    least: float = 0.05,
) -> AuditedRows:
    """Ask one row of every group of positions.

    Args:
        query: ``[B, Hq, Sq, D]``.
        key: ``[B, Hkv, Skv, D]``.
        kept: bool ``[B, Hq, nq, nk]``: the choice, whatever it is made of.
        always: bool ``[B, Hq, nq, nk]``: blocks that are kept in any case, and that nobody can want.
        visible: bool ``[B, 1 or Hq, Sq, Skv]``: which key each row sees.
        early: bool ``[B, 1 or Hq, Sq]``: rows that keep all they see.
        bounds: int32 ``[B, 3]``.
        scale: Softmax scale.
        block_size: (query rows, keys) of a block.
        score_mod: As flex_attention takes it. Logits that are not finite count as absent.
        least: Share of the softmax from which on a row wants a block.
    """
    batch, heads, q_len, _ = query.shape
    row = torch.arange(q_len, device=query.device).expand(batch, -1)
    logits = scaled_products(query, key.double(), scale)
    logits = modified(score_mod, logits, row, torch.arange(key.shape[2], device=key.device))
    logits = logits.masked_fill(~(visible & logits.isfinite()), -torch.inf)
    shares = logits.softmax(-1).nan_to_num(0.0)
    shares = torch.nn.functional.pad(shares, (0, -shares.shape[-1] % block_size[1]))
    shares = shares.unflatten(-1, (-1, block_size[1])).sum(-1)  # [B, Hq, Sq, nk]
    # As many as a call of this length may meet, wherever it begins.
    slots = (batch, heads, len(audited_positions(q_len - q_len % 64)) + 2)
    asked = torch.zeros(slots, dtype=torch.bool, device=query.device)
    wanted, missed = (torch.zeros(slots, dtype=torch.float64, device=query.device) for _ in range(2))
    for b, (offset, start, _) in enumerate(bounds.tolist()):
        before = max(offset - start, 0)
        met = audited_positions(before + q_len)
        skipped = len(audited_positions(before + 1)) - 1  # groups that end before the first query
        for slot, at in enumerate(met[skipped:]):
            index = start + at - offset
            if not 0 <= index < q_len:
                continue
            asked[b, :, slot] = visible[b, :, index].any(-1) & ~early[b, :, index]
            block = index // block_size[0]
            wants = ~always[b, :, block] & (shares[b, :, index] >= least) & asked[b, :, slot, None]
            wanted[b, :, slot] = (shares[b, :, index] * wants).sum(-1)
            missed[b, :, slot] = (shares[b, :, index] * (wants & ~kept[b, :, block])).sum(-1)
    return AuditedRows(asked, wanted, missed)
