# SPDX-License-Identifier: BSD-3-Clause
"""The threshold that gives a density."""

import math
from typing import NamedTuple

from sale_flex.bench.inputs import Inputs
from sale_flex.block_mask import create_sale_block_mask
from sale_flex.config import SaleConfig

STEPS = 20
CLOSE = 0.003
"""Largest distance from the density asked for, as a share of it, at which the search stops before `STEPS`."""


class Kept(NamedTuple):
    """What a config keeps of a call."""

    density: float
    """Kept over visible blocks, of all batch rows and heads."""
    dropped: int
    """Blocks that passed the threshold and did not fit into the index lists."""


def count_kept(inputs: Inputs, config: SaleConfig) -> Kept:
    """What a config keeps, from a block mask that is dropped again."""
    query, key, value, scale = inputs
    stats = create_sale_block_mask(query, key, config, value=value, scale=scale, stats=True).stats
    density = (stats.kept_blocks.sum() / stats.visible_blocks.sum()).item()
    return Kept(density, int(stats.dropped_blocks.sum()))


def find_threshold(inputs: Inputs, config: SaleConfig, density: float) -> SaleConfig:
    """`config` with the threshold that keeps about `density` of the visible blocks, by bisection in its logarithm.

    What is always kept may be more than that, and what passes the smallest threshold less: then it is what comes
    closest.
    """
    low, high = map(math.log, config.rule.threshold_range)
    for _ in range(STEPS):
        middle = (low + high) / 2
        config = config.with_threshold(math.exp(middle))
        got = count_kept(inputs, config).density
        if abs(got - density) <= CLOSE * density:
            break
        low, high = (low, middle) if got < density else (middle, high)
    return config
