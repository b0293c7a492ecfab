# SPDX-License-Identifier: BSD-3-Clause
"""Every query against the mean key of every block: FlashPrefill (arXiv 2603.06199).

A row's logits with the means it sees become exponentials relative to the row's largest. A block's energy is their sum
over the rows of a query block, and the block is kept where its energy reaches a share of the query block's largest one.
No softmax, no sorting and no running sum of shares is needed.

Departures:

* Exponentials are relative to the largest logit of their row. The authors' code takes one maximum for all rows of a
  query block, so that the rows with the largest logits decide alone.
* Sink, window and the first rows are `SaleConfig`'s; the authors keep two sink blocks, the last four blocks of a query
  block, and all blocks of the last two query blocks, whatever the energies. Their blocks are square.
* A block's mean is of its keys that are no padding; theirs counts none.
* Under mods a row sees the means of the blocks that some row of its query block sees; a score_mod is left out.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from sale_flex import ops
from sale_flex.kernels.arguments import Structure
from sale_flex.selection.rules.base import Rule, register_rule

if TYPE_CHECKING:
    from sale_flex.call.facts import Call


@register_rule
@dataclass(frozen=True, eq=False)
class BlockMean(Rule):
    """Keep a block whose mean key has `threshold` or more of the largest energy in its query block (FlashPrefill).

    A row of a causal call sees the mean of a block once it sees the block's last key. So a choice depends on no later
    key, and chunks that begin at a multiple of the query block choose as the whole prompt does. The means are rounded
    to the keys' dtype. A block whose mean is not finite, or with a row that is not, is kept.
    """

    threshold: float | Tensor = 0.1
    """A share of the query block's largest energy, the authors' alpha: 0.08 to 0.18 on the models that they name. At 1
    the block with the largest energy is kept."""

    name: ClassVar[str] = "block_mean"

    def scores(self, call: "Call", structure: Structure | None = None) -> Tensor:
        """Energies as shares of the query block's largest one, in [0, 1]; inf where they are not finite."""
        energies = ops.block_mean_energies(
            call.query,
            call.key,
            call.bounds,
            None if structure is None else structure.visibility.visible,
            call.spec.causal,
            call.scale,
            call.grid,
        )
        largest = energies.masked_fill(energies.isinf(), 0.0).amax(-1, keepdim=True)
        return energies / largest.masked_fill(largest == 0, 1.0)

    def remark(self, call: "Call") -> str:
        """Whether a score_mod is left out."""
        return "block means leave the score_mod out" if call.score.key else ""
