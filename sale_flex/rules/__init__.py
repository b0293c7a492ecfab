# SPDX-License-Identifier: BSD-3-Clause
"""Selection rules: a file each. A rule turns queries and keys into hit bits; the mask builder does the rest."""

from collections.abc import Callable

from torch import Tensor

from sale_flex.config import SaleConfig
from sale_flex.rules import relative

Rule = Callable[[Tensor, Tensor, Tensor, bool, Tensor, float, SaleConfig], Tensor]
"""``rule(query, key, bounds, from_zero, threshold [Hq], scale, config)`` -> int32 ``[B, Hq, nq, ceil(nk / 32)]``."""

RULES: dict[str, Rule] = {"relative": relative.select}
