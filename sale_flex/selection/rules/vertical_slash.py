# SPDX-License-Identifier: BSD-3-Clause
"""Vertical and slash lines: MInference's main pattern (arXiv 2407.02490, section 3, "Vertical-Slash").

The last 64 queries attend to all keys. Sums of their probabilities down the columns say which keys matter to everybody
(vertical lines), sums along the diagonals which distances do (slash lines). The largest of each are kept.

Departures:

* The paper's kernel takes single columns between blocks of diagonals; here every block that a kept line crosses is
  kept, columns too. Between a real row and a valid key, that is: padding is crossed by no line.
* The authors' code always counts the first 30 columns and the last 100 diagonals among the kept lines; here sink and
  local window are kept besides (`SaleConfig.sink_tokens`, `local_tokens`), and lines compete by their sums alone.
* The threshold scales both budgets; the paper searches budgets per head.
* A line that none of the last queries sees is no line: nothing is known of it. So under a mask, blocks that these
  queries have no part in (another document's) are kept only where a line leads there.
* The paper's queries are causal and one sequence; here they are every batch row's last real ones, under the call's
  masks and after its score_mod. Those that are not finite, and logits that are not, are left out; blocks with a row or
  a key that is not finite are kept besides.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from sale_flex.blocks.geometry import spans
from sale_flex.kernels.arguments import Structure
from sale_flex.ops.fallback.visibility import scored, visible
from sale_flex.selection.rules.base import Rule, check_count, register_rule
from sale_flex.selection.rules.in_torch import mods_in_torch
from sale_flex.selection.rules.tokens import keep_nonfinite, usable_keys

if TYPE_CHECKING:
    from sale_flex.call.facts import Call


@register_rule
@dataclass(frozen=True, eq=False)
class VerticalSlash(Rule):
    """Keep the blocks that the heaviest columns and diagonals of the last queries' attention cross.

    The last queries of a call decide for all its rows. So a row's blocks depend on what follows it (the choice is not
    causal), and a prompt in chunks gets other blocks than the same prompt at once. Padding changes nothing.
    """

    threshold: float | Tensor = 0.5
    """Scales both budgets by (1 - threshold) / threshold: at 0.5 they are as given, at 0.1 nine times as large. 1 and
    more keep only what is always kept."""

    vertical: int = 1000
    """Columns that are kept at threshold 0.5, in keys, 0 or more."""

    slash: int = 6096
    """Diagonals that are kept at threshold 0.5, in distances, 0 or more."""

    last: int = 64
    """Real queries at the end that are looked at, in rows, 1 or more. Their probabilities are held for one KV head of
    one batch row at a time."""

    name: ClassVar[str] = "vertical_slash"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("vertical", self.vertical, 0, "keys")
        check_count("slash", self.slash, 0, "distances")
        check_count("last", self.last, 1, "rows")

    def scores(self, call: "Call", structure: Structure | None = None) -> Tensor:
        """The largest score of a line that crosses a block, float32 ``[B, Hq, nq, nk]``.

        The r-th heaviest of lines with a budget of n scores n / (n + r), r = 1, 2, ...
        """
        grid = call.grid
        columns, diagonals, newest = self._line_scores(call)
        of_keys = pad(columns, (0, grid.key_blocks * grid.block_k - grid.kv_len))
        of_keys = of_keys.unflatten(-1, (grid.key_blocks, -1)).amax(-1)
        return keep_nonfinite(torch.maximum(of_keys[:, :, None], _crossed(diagonals, newest, call)), call)

    def describe(self) -> str:
        """Options in a phrase."""
        return f"{self.name}: {self.vertical} keys and {self.slash} distances of the last {self.last} rows"

    def _line_scores(self, call: "Call") -> tuple[Tensor, Tensor, Tensor]:
        """Scores of all lines, and where the last real row stands, int64 ``[B, 1]``.

        Columns are ``[B, Hq, Skv]``, diagonals ``[B, Hq, Skv + L - 1]`` for the last L rows: line c is at distance
        ``newest - c`` before a row (after it, if negative).
        """
        query, key, grid = call.query, call.key, call.grid
        group, count = query.shape[1] // key.shape[1], min(self.last, grid.q_len)
        spec, score = mods_in_torch(call)
        usable = usable_keys(call)
        offset, start, end = call.bounds.long()[:, :, None].unbind(1)  # [B, 1] each
        after = torch.minimum(end - offset, end.new_full((), grid.q_len))
        at = after - count + torch.arange(count, device=query.device)
        at = torch.where((at >= 0) & (at + offset >= start), at, -1)  # [B, L]
        keys = torch.arange(grid.kv_len, dtype=torch.int32, device=query.device)[None]
        columns, diagonals = [], []
        for b in range(len(query)):
            rows = query[b, :, at[b].clamp_min(0)].float()
            index = at[b, :, None].int()
            finite = rows.isfinite().all(-1, keepdim=True)
            rows = torch.where(finite, rows, 0)
            for kv in range(key.shape[1]):
                heads = slice(kv * group, (kv + 1) * group)
                of_keys = torch.where(usable[b, kv, :, None], key[b, kv], 0).float()
                logits = scored(score, rows[heads] @ of_keys.T * call.scale, b, heads, index, keys, grid)
                sees = visible(spec, b, heads, index, keys, grid) & usable[b, kv] & finite[heads]
                seen = sees & logits.isfinite()
                weights = logits.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0.0)
                columns.append(_by_rank(weights.sum(-2), sees.any(-2), self.vertical))
                along = _on_diagonals(sees.to(weights.dtype)).sum(-2) > 0
                diagonals.append(_by_rank(_on_diagonals(weights).sum(-2), along, self.slash))
        lines = (torch.cat(x).unflatten(0, query.shape[:2]) for x in (columns, diagonals))
        return *lines, after - 1 + offset


def _on_diagonals(x: Tensor) -> Tensor:
    """``[..., L, S]`` with its diagonals as columns, ``[..., L, S + L - 1]``: the last row stays where it is."""
    rows, width = x.shape[-2], x.shape[-1] + x.shape[-2] - 1
    # Rows that are one element longer than what they are cut into begin one element further to the right each.
    return pad(x.flip(-2), (0, rows)).flatten(-2)[..., : rows * width].unflatten(-1, (rows, width))


def _by_rank(sums: Tensor, seen: Tensor, budget: int) -> Tensor:
    """Scores of lines by the order of their sums ``[..., N]``; 0 of those that are not seen, which come last."""
    order = sums.masked_fill(~seen, -1.0).argsort(dim=-1, descending=True, stable=True)
    place = torch.arange(1, sums.shape[-1] + 1, device=sums.device).expand_as(order)
    place = torch.empty_like(order).scatter_(-1, order, place)
    return torch.where(seen, budget / (budget + place), 0.0)


def _crossed(diagonals: Tensor, newest: Tensor, call: "Call") -> Tensor:
    """The largest score of a diagonal between a block's real rows and valid keys, ``[B, Hq, nq, nk]``; 0 if none.

    Args:
        diagonals: Scores ``[B, Hq, N]`` of diagonals by where they meet the last real row.
        newest: int64 ``[B, 1]``: where that stands.
        call: Positions.
    """
    grid, width = call.grid, diagonals.shape[-1]
    rows = spans(call.bounds, grid)
    key = torch.arange(grid.key_blocks, device=newest.device) * grid.block_k
    first_key = torch.maximum(key, call.bounds[:, 1:2])[:, None]
    last_key = torch.minimum(key + grid.block_k, call.bounds[:, 2:])[:, None] - 1
    # From the last row's first key to the first row's last one.
    first = (newest - rows.high)[..., None] + first_key
    last = ((newest - rows.low)[..., None] + last_key).clamp_max(width - 1)
    some = (first <= last) & (rows.low <= rows.high)[..., None] & (first_key <= last_key)
    first, last = (torch.where(some, x, 0)[:, None].flatten(2) for x in (first, last))  # [B, 1, nq * nk]
    # The maximum of a range is that of two powers of two that cover it.
    powers, level = [diagonals], torch.zeros_like(first)
    step = 1
    while 2 * step < grid.block_q + grid.block_k:
        powers.append(torch.maximum(powers[-1], pad(powers[-1], (0, step))[..., step:]))
        step *= 2
        level += last - first >= step - 1
    table = torch.stack(powers, 2).flatten(2)
    ends = (level * width + at for at in (first, last + 1 - (1 << level)))
    found = torch.maximum(*(table.gather(-1, at.expand(-1, table.shape[1], -1)) for at in ends))
    return found.unflatten(-1, (grid.query_blocks, grid.key_blocks)).masked_fill(~some[:, None], 0.0)
