# SPDX-License-Identifier: BSD-3-Clause
"""Sums of logits along antidiagonals: XAttention (arXiv 2503.16428, sections 2.1 and 2.2).

Every `stride` rows meet every `stride` keys in one product, the rows in reverse: the sum of the logits on the
antidiagonal of their square, which crosses every vertical in it and every other slash. Every row of sums goes through
a softmax; a block's share is the sum over its columns, averaged over its rows. A query block keeps the fewest blocks
whose shares add up to ``1 - threshold``, the largest first.

Departures:

* The threshold is what may be left out: 0.1 is the paper's 0.9. Here as everywhere a higher one keeps less.
* Sums are of float32, and are compared in it; the authors round them to the inputs' dtype and sort in float64.
* Sinks, the window and the first rows are `SaleConfig`'s. They have shares as other blocks do, as in the authors' code.
* Rows and keys of padding count as zeros in a sum, and a sum without a pair that is none counts nowhere.
* Under mods a block that no row sees counts nowhere; inside of others, sums do as without the mods. A score_mod is left
  out.
* One threshold for all heads, or one a head; the paper's search for the latter is `calibrate`'s.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from sale_flex import ops
from sale_flex.kernels.arguments import Structure
from sale_flex.selection.rules.base import Rule, check_one_of, register_rule
from sale_flex.selection.rules.shares import covering

if TYPE_CHECKING:
    from sale_flex.call.facts import Call

STRIDES = (8, 16)


@register_rule
@dataclass(frozen=True, eq=False)
class Antidiagonal(Rule):
    """Keep the fewest blocks whose antidiagonal sums take all but `threshold` of the softmax (XAttention).

    In a causal call a sum counts if one of its pairs is of a row and a key that the row sees; the others are in the sum
    all the same. So where rows do not stand at multiples of the stride, a query block's choice depends on up to
    ``stride - 1`` keys behind its last row. Chunks that begin and end at multiples of the query block choose as the
    whole prompt does. A block with a sum that is not finite is kept.
    """

    threshold: float | Tensor = 0.1
    """The share of a query block's softmax that may be left out: 1 less the paper's threshold. At 1 the block with the
    largest share is kept."""

    stride: int = 16
    """Rows, and keys, that one sum stands for: 8 or 16. Half the stride is twice the work."""

    name: ClassVar[str] = "antidiagonal"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_one_of("stride", self.stride, STRIDES, "rows")

    def scores(self, call: "Call", structure: Structure | None = None) -> Tensor:
        """1 less the shares of all larger blocks of the query block, in [0, 1]; inf where they are not finite."""
        shares = ops.antidiagonal_shares(
            call.query,
            call.key,
            call.bounds,
            None if structure is None else structure.visibility.visible,
            call.spec.causal,
            call.scale,
            call.grid,
            self.stride,
        )
        broken = shares.isinf()
        return covering(shares.masked_fill(broken, 0.0)).masked_fill(broken, torch.inf)

    def describe(self) -> str:
        """Options in a phrase."""
        return f"{self.name} sums of {self.stride}"

    def remark(self, call: "Call") -> str:
        """Whether a score_mod is left out."""
        return "antidiagonal sums leave the score_mod out" if call.score.key else ""
