# SPDX-License-Identifier: BSD-3-Clause
"""Top-k of pooled means: the block-sparse pattern of MInference (arXiv 2407.02490, section 3, "Block-Sparse").

The mean query of a block of rows meets the mean key of every block it sees; the largest of the softmax are kept, as
many in every query block.

Departures:

* The paper keeps 100 blocks of 64 by 64 whatever the length; here a share of the visible blocks is left out, so that
  one threshold suits every length. `blocks` is the paper's number.
* Blocks that are always kept are ranked with the others, as in the paper, and kept besides.
* Means leave out padding, and keys that are not finite. A mask decides which blocks are ranked; a block's mean is of
  all its valid keys, seen or not, as the paper's is on the diagonal. A score_mod does not reach means, and is left out.
* Blocks with a row or a key that is not finite are kept besides.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from sale_flex.kernels.arguments import Structure
from sale_flex.selection.rules.base import Rule, check_count, register_rule
from sale_flex.selection.rules.tokens import block_means, keep_nonfinite, real_rows, usable_keys

if TYPE_CHECKING:
    from sale_flex.call.facts import Call


@register_rule
@dataclass(frozen=True, eq=False)
class TopK(Rule):
    """Keep the same share of the visible blocks in every query block: those whose mean key suits its mean query best.

    A query block decides for all its rows by all of them, and by whole key blocks up to its last row: a row's blocks
    may depend on rows and keys behind it, but on none behind its block. Chunks choose as the whole prompt does if they
    begin and end between blocks.
    """

    threshold: float | Tensor = 0.9
    """The share of a query block's visible blocks that is left out, rounded to whole blocks; 0 leaves out none, 1 and
    more all but what is always kept. With `blocks` only whether it is 0 matters."""

    blocks: int | None = None
    """How many blocks every query block keeps, instead of a share; the paper's number is 100. None: the share."""

    name: ClassVar[str] = "top_k"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.blocks is not None:
            check_count("blocks", self.blocks, 1, "blocks")

    def scores(self, call: "Call", structure: Structure | None = None) -> Tensor:
        """Share of the visible blocks that rank behind a block, and half of the block itself: ``[B, Hq, nq, nk]``.

        With `blocks`, infinite for so many blocks, and 0 for others. Float32.
        """
        grid, group = call.grid, call.query.shape[1] // call.key.shape[1]
        rows = real_rows(call)[:, None] & call.query.isfinite().all(-1)
        of_rows = block_means(call.query, rows, grid.block_q)
        of_keys = block_means(call.key, usable_keys(call), grid.block_k)
        logits = (of_rows.unflatten(1, (-1, group)) @ of_keys.mT[:, :, None]).flatten(1, 2) * call.scale
        seen = call.visible_blocks(structure)
        # The order of logits is that of their softmax, which could underflow.
        order = logits.masked_fill(~seen, -torch.inf).argsort(dim=-1, descending=True, stable=True)
        rank = torch.arange(grid.key_blocks, device=order.device).expand_as(order)
        rank = torch.empty_like(order).scatter_(-1, order, rank)
        if self.blocks is None:
            count = seen.sum(-1, keepdim=True)
            # Half a block off, shares are rounded to whole blocks. Of a hidden block a score means nothing.
            scores = (count - rank - 0.5) / count.clamp_min(1)
        else:
            scores = torch.zeros_like(logits).masked_fill_(rank < self.blocks, torch.inf)
        return keep_nonfinite(scores, call)

    def describe(self) -> str:
        """Options in a phrase."""
        return f"{self.name}: {'a share' if self.blocks is None else self.blocks} of the blocks, by means"

    def remark(self, call: "Call") -> str:
        """Whether a score_mod is left out."""
        return "blocks are ranked without the score_mod" if call.score.key else ""
