# SPDX-License-Identifier: BSD-3-Clause
"""The relative attention score of single elements: SALE as published (arXiv 2505.24179, section 3.2).

A block is hit when one of its elements, estimated in 4 bits, reaches ``m_i + ln(threshold * l_i)``, with m and l the
exact softmax statistics of the row's sink and local keys.
"""

from torch import Tensor

from sale_flex import listed_ops, ops
from sale_flex.config import SaleConfig
from sale_flex.sight import Lists, Mod, Sight, Structure


def codes(
    query: Tensor, key: Tensor, bounds: Tensor, config: SaleConfig, every_key: bool = False
) -> tuple[Tensor, ...]:
    """The smoothing mean, and codes and scales of the queries and of the keys; every key has its own in any case."""
    mean = ops.key_mean(key, bounds, config.smooth_tokens)
    of_keys = ops.quantize_groups(key, mean, bounds, config.block_size[1], config.bits)
    return mean, *ops.quantize_rows(query, config.bits), *of_keys


def estimate(
    query: Tensor,
    key: Tensor,
    made: tuple[Tensor, ...],
    bounds: Tensor,
    from_zero: bool,
    threshold: Tensor,
    scale: float,
    config: SaleConfig,
    budget: int,
) -> tuple[Tensor, None]:
    """Hit bits; see `sale_flex.rules.Rule`. Lists are as wide as the map: `budget` is of no use, no hit is given up."""
    mean, query_codes, query_scale, key_codes, key_scale = made
    limit = ops.row_limits(
        query, key, mean, query_scale, bounds, threshold, scale, config.sink_tokens, config.local_tokens
    )
    hits = ops.scan_max(
        query_codes,
        limit,
        key_codes,
        key_scale,
        bounds,
        query.shape[2],
        key.shape[2],
        *config.block_size,
        config.local_tokens,
        from_zero,
    )
    return hits, None


def estimate_listed(
    query: Tensor,
    key: Tensor,
    made: tuple[Tensor, ...],
    structure: Structure,
    lists: Lists,
    sight: Sight,
    score: Mod,
    threshold: Tensor,
    scale: float,
    config: SaleConfig,
    budget: int,
    every_key: bool,
) -> tuple[Tensor, None]:
    """Hit bits; see `sale_flex.rules.Rule`. `budget` is of no use: what finds no room is counted with the lists."""
    mean, query_codes, query_scale, key_codes, key_scale = made
    limit, shift = listed_ops.listed_limits(
        query,
        key,
        mean,
        lists.counts,
        lists.blocks,
        structure.rows,
        *sight,
        *score,
        threshold,
        scale,
        *config.block_size,
        config.sink_tokens,
        config.local_tokens,
    )
    hits = listed_ops.listed_scan(
        query_codes,
        query_scale,
        key_codes,
        key_scale,
        limit,
        shift,
        lists.counts,
        lists.blocks,
        *sight,
        *score,
        scale,
        query.shape[2],
        key.shape[2],
        *config.block_size,
    )
    return hits, None
