# SPDX-License-Identifier: BSD-3-Clause
"""Selection rules: a file each. A rule turns queries and keys into hit bits; the mask builder does the rest."""

from collections.abc import Callable

from torch import Tensor

from sale_flex.config import SaleConfig
from sale_flex.rules import mass, relative

Rule = Callable[[Tensor, Tensor, Tensor, bool, Tensor, float, SaleConfig, int], tuple[Tensor, Tensor | None]]
"""``rule(query, key, bounds, from_zero, threshold [Hq], scale, config, budget)`` -> hit bits int32
``[B, Hq, nq, ceil(nk / 32)]``, and hits given up for `budget`, the room in a query block's list, int32 ``[B, Hq, nq]``;
None from a rule that gives up none."""

RULES: dict[str, Rule] = {"mass": mass.select, "relative": relative.select}
