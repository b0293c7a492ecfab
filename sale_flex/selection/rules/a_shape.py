# SPDX-License-Identifier: BSD-3-Clause
"""A-shape: sink and local window, and nothing else (MInference, arXiv 2407.02490, section 3; StreamingLLM, 2309.17453).

Departures: sink and window are those that every rule of sale_flex keeps, `SaleConfig.sink_tokens` and `local_tokens`
(MInference: 1024 and 4096 tokens), and whole blocks of them. Early rows (`SaleConfig.min_length`) and blocks with a
value that is not finite are kept besides, as with every rule.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from sale_flex.kernels.arguments import Structure
from sale_flex.selection.rules.base import Rule, Selection, register_rule

if TYPE_CHECKING:
    from sale_flex.call.facts import Call


@register_rule
@dataclass(frozen=True, eq=False)
class AShape(Rule):
    """Keep what every rule keeps: sink and local window. Looks at no query and no key, not even whether it is finite.

    Rows decide by their place alone: causal, and chunks, padding and batches choose the same keys up to whole blocks.
    """

    threshold: float | Tensor = 1.0
    """0 makes a head dense; all others are the same."""

    name: ClassVar[str] = "a_shape"

    def select(self, call: "Call", codes: tuple[Any, ...], structure: Structure | None) -> Selection:
        """All blocks of heads with threshold 0, none of others; see `Rule.select`."""
        grid = call.grid
        words = torch.where(call.threshold > 0, 0, -1).to(torch.int32)[None, :, None, None]
        return Selection(words.expand(len(call.query), -1, grid.query_blocks, grid.words))

    def scores(self, call: "Call", structure: Structure | None = None) -> Tensor:
        """0 everywhere, float32 ``[B, Hq, nq, nk]``."""
        shape = (*call.query.shape[:2], call.grid.query_blocks, call.grid.key_blocks)
        return torch.zeros(shape, dtype=torch.float32, device=call.query.device)

    def describe(self) -> str:
        """In a phrase."""
        return f"{self.name}: sink and local window"
