# SPDX-License-Identifier: BSD-3-Clause
"""FlexPrefill: verticals and slashes, or pooled blocks, chosen head by head (arXiv 2502.20766, sections 3 and 4).

The last rows' softmax over all keys is summed by key (verticals) and by distance (slashes), and each pattern gets as
many blocks as its largest sums need to cover gamma = 1 - threshold. A head is *query-aware* where pooled attention of
the last rows is close enough to their true attention, by the root of the Jensen-Shannon divergence: it gets the least
budget of verticals and slashes, and the blocks of its whole pooled map that add up to gamma of it.

Departures from the authors' code (github.com/bytedance/FlexPrefill):

* Blocks of any size, where theirs has blocks of 128 x 128. A group of distances has as many as a block has keys, and
  is counted from distance 0; theirs from the farthest key. It keeps the blocks that the diagonal of its shortest
  distance crosses: one a query block where blocks are square and lie on the grid, which is theirs; more in chunks that
  begin within a block.
* ``0 log 0`` is 0 in the divergence. Theirs is NaN, and the head is not query-aware wherever a share underflows.
* Padding, rows that a mask hides everything from, and rows and keys that are not finite have no say. Query blocks and
  blocks of keys that are not finite are kept, and all of a head whose last rows are no use.
* What is as large as the last pooled block that is kept is kept too. Theirs depends on the order of a sort.
* Nothing is dense for its length alone: that is `SaleConfig.min_length`.
* Without causality slashes have distances to both sides.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from sale_flex.blocks.bits import pack_bits
from sale_flex.kernels.arguments import Structure
from sale_flex.selection.rules.base import Rule, Selection, check_count, register_rule
from sale_flex.selection.rules.flexprefill_levels import kept_levels
from sale_flex.selection.rules.ladder import LADDER, no_scores, scores_of

if TYPE_CHECKING:
    from sale_flex.call.facts import Call


@register_rule
@dataclass(frozen=True, eq=False)
class FlexPrefill(Rule):
    """Keep key blocks and block diagonals that cover 1 - `threshold` of the last rows' softmax, as FlexPrefill does.

    The last rows decide for all: the same tokens in chunks, or with tokens behind them, choose other blocks, and a
    row's blocks depend on rows that come after it.

    A mask_mod hides keys from the last rows and blocks from the pooled map. A score_mod changes the logits of the last
    rows; pooled queries and keys meet without it, and `SaleStats.reason` says so.
    """

    threshold: float | Tensor = 0.05
    """What may be left out of a softmax's sum, 1 - gamma of the paper; from 1 on, `min_budget` is kept all the same."""

    tau: float = 0.1
    """Distance of pooled from true attention below which a head is query-aware, in [0, 1]; 0: no head is."""

    min_budget: int = 1024
    """Least verticals, and least slashes, in tokens."""

    max_budget: int | None = None
    """Most verticals, and most slashes, in tokens; None for all."""

    last: int = 128
    """Rows that decide, the last ones of every batch row that are no padding; the authors take a block's."""

    name: ClassVar[str] = "flexprefill"

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.tau, bool) or not isinstance(self.tau, (int, float)):
            raise TypeError(f"tau must be a float, got {self.tau!r}.")
        if not 0 <= self.tau <= 1:
            raise ValueError(f"tau must be from 0 to 1, got {self.tau!r}.")
        check_count("min_budget", self.min_budget, 1, "tokens")
        if self.max_budget is not None:
            check_count("max_budget", self.max_budget, self.min_budget, "tokens (min_budget)")
        check_count("last", self.last, 1, "rows")

    def select(self, call: "Call", codes: tuple[Any, ...], structure: Structure | None) -> Selection:
        """Hit bits; see `Rule.select`."""
        share = (1 - call.threshold.double())[:, None]
        bits = [pack_bits(levels > 0) for _, levels in kept_levels(self, call, structure, share)]
        return Selection(torch.cat(bits, 1))

    def scores(self, call: "Call", structure: Structure | None = None) -> Tensor:
        """Scores on `sale_flex.selection.rules.ladder.LADDER`; see `Rule.scores`."""
        scores = no_scores(call.query, call.grid)
        # 2 stands for every threshold above 1.
        steps = torch.tensor([0.0, *LADDER, 2.0], dtype=torch.float64, device=call.query.device)
        for heads, levels in kept_levels(self, call, structure, (1 - steps)[None]):
            scores[:, heads] = scores_of(levels)
        return scores

    def remark(self, call: "Call") -> str:
        """Where a score_mod is left out."""
        return "pooled queries and keys meet without the score_mod" if call.score.key else ""
