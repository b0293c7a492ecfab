# SPDX-License-Identifier: BSD-3-Clause
"""Plain causal calls as kernels and the torch path take them, for tests of one stage."""

from typing import Any

from torch import Tensor

from sale_flex.kernels.arguments import Grid, KeyMoments, MaskSpec, MassOptions, Near


def plain_spec(bounds: Tensor) -> MaskSpec:
    """Causal attention without mods."""
    return MaskSpec(bounds, True, None, None, 1, 1)


def near_of(config: Any) -> Near:
    """What a config keeps whatever the rule says."""
    return Near(config.sink_tokens, config.local_tokens, config.min_length)


def plain_mass_hits(
    implementation: Any,
    query: Tensor,
    key: Tensor,
    mean: Tensor,
    moments: KeyMoments,
    bounds: Tensor,
    threshold: Tensor,
    scale: float,
    options: Any,
    near: Near,
    budget: int,
) -> tuple[Tensor, Tensor]:
    """Hit bits and hits given up, with the options of the reference."""
    grid = Grid(query.shape[2], key.shape[2], *options.block_size)
    of_rule = MassOptions(options.sub_block, options.pool, options.sample, options.bits)
    return implementation.mass_hits(
        query, key, mean, moments, plain_spec(bounds), None, None, threshold, scale, grid, of_rule, near, budget
    )
