# SPDX-License-Identifier: BSD-3-Clause
"""Exact masses: what estimates of masses are measured against.

The share of a row's softmax that falls on a block, from every key as it is and after the score_mod, element by element
of the mask. It costs what attention costs, in float32 and without a fused kernel: a yardstick, not a method.

Which rows are scored, and what they see, is as in the mass rule (docs/semantics.md, "The mass rule"): the last real
row of every `pool`, or their mean, rounded to the query's dtype; either sees what one of its rows sees, and stands at
the last of them where a score_mod asks for `q_idx`. Unlike there, nothing is coded, no level rounds a comparison, and
always kept blocks are weighed like all others.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from sale_flex.kernels.arguments import Structure
from sale_flex.ops.fallback.padding import row_positions
from sale_flex.ops.fallback.pool import pool_rows
from sale_flex.ops.fallback.tiles import all_elements, any_in_block, rows_of, tiles
from sale_flex.ops.fallback.visibility import scored, visible
from sale_flex.selection.rules.base import Rule, check_one_of, register_rule
from sale_flex.selection.rules.in_torch import mods_in_torch
from sale_flex.selection.rules.mass import POOL_MODES, POOLS
from sale_flex.selection.rules.tokens import keep_nonfinite, usable_keys

if TYPE_CHECKING:
    from sale_flex.call.facts import Call


@register_rule
@dataclass(frozen=True, eq=False)
class Exact(Rule):
    """Keep a block that takes `threshold` or more of some scored row's exact softmax. As dear as dense attention.

    Blocks with a row or a key that is not finite are kept, as are those with a logit of +inf or NaN; other blocks are
    weighed without such logits. A scored row decides by what it sees: chunks that begin and end between pools of rows
    score the same rows. Under torch.compile strips are unrolled into the graph, and another length is another graph.
    """

    threshold: float | Tensor = 0.01
    """A share of a row's probability; above 1 only what is always kept is left."""

    pool: int = 4
    """Adjacent queries that one scored row stands for, in rows: 1 (every row is scored), 2, 4, 8 or 16."""

    pool_mode: str = "last"
    """``"last"``: it is the last of them, alone. ``"mean"``: it is their mean, which is flatter than any of them."""

    name: ClassVar[str] = "exact"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_one_of("pool", self.pool, POOLS, "rows")
        check_one_of("pool_mode", self.pool_mode, POOL_MODES)

    def scores(self, call: "Call", structure: Structure | None = None) -> Tensor:
        """The largest share among the scored rows of a query block, float32 ``[B, Hq, nq, nk]``.

        Strips of query blocks are weighed one after the other: one strip's logits are in memory at a time.
        """
        query, key, grid = call.query, call.key, call.grid
        heads, group = query.shape[1], query.shape[1] // key.shape[1]
        spec, score = mods_in_torch(call)
        usable = usable_keys(call)
        _, real = row_positions(call.bounds, grid)
        keys = torch.arange(grid.kv_len, dtype=torch.int32, device=query.device)[None]
        elements = all_elements(grid) if structure is not None else all_elements(grid) // self.pool
        shape = (*query.shape[:2], grid.query_blocks, grid.key_blocks)
        found = torch.zeros(shape, dtype=torch.float32, device=query.device)
        for b in range(len(query)):
            for head, blocks in tiles(heads, group, grid.query_blocks, elements, query.device):
                lines, index = rows_of(blocks, grid, query.device)
                here = real[b, lines].view_as(index)
                kv = head.start // group
                rows = pool_rows(query[b, head, lines], here.flatten(), self.pool, self.pool_mode == "last")
                last = torch.where(here, index, -1).unflatten(1, (-1, self.pool)).amax(-1)  # [n, R]
                rows = rows.unflatten(1, last.shape)
                of_keys = torch.where(usable[b, kv, :, None], key[b, kv], 0).float()
                logits = scored(score, rows @ of_keys.T * call.scale, b, head, last[..., None], keys, grid)
                # Without mods a pool's last row sees all that the others see.
                asked = last if structure is None else torch.where(here, index, -1)
                sees = visible(spec, b, head if structure is not None else slice(0, 1), asked[..., None], keys, grid)
                sees = sees.unflatten(2, (last.shape[1], -1)).any(3) & usable[b, kv]
                bad = sees & ~(logits < torch.inf)
                weights = logits.masked_fill(~sees | bad, -torch.inf).softmax(-1)
                missing = grid.key_blocks * grid.block_k - grid.kv_len
                # A row that sees nothing has no softmax.
                weights, bad = pad(weights.nan_to_num(0.0), (0, missing)), pad(bad, (0, missing))
                shares = weights.unflatten(-1, (-1, grid.block_k)).sum(-1).amax(2).clamp_max(1.0)
                found[b, head, blocks] = shares.masked_fill(any_in_block(bad, grid.block_k), torch.inf)
        return keep_nonfinite(found, call)

    def describe(self) -> str:
        """Options in a phrase."""
        rows = f"every {self.pool}th row" if self.pool_mode == "last" else f"means of {self.pool} rows"
        return f"{self.name} masses, {'every row' if self.pool == 1 else rows}"
