# SPDX-License-Identifier: BSD-3-Clause
"""The largest row mass: the share of a pooled row's softmax that falls on a block.

A block is hit when that share, estimated in low bits from every key (``estimator="scan"``) or from the mean and the
variance of sub-blocks of keys (``"moments"``), passes the threshold in one of the query block's pooled rows.
"""

from torch import Tensor

from sale_flex import listed_ops, ops
from sale_flex.config import SaleConfig
from sale_flex.sight import Lists, Mod, Sight, Structure


def codes(
    query: Tensor, key: Tensor, bounds: Tensor, config: SaleConfig, every_key: bool = False
) -> tuple[Tensor, ...]:
    """The smoothing mean and the codes of the keys; pooled rows get theirs inside the estimate."""
    mean = ops.key_mean(key, bounds, config.smooth_tokens)
    sub_block = _sub_block(config, every_key)
    return mean, *ops.quantize_moments(key, mean, bounds, config.block_size[1], sub_block, config.bits)


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
) -> tuple[Tensor, Tensor]:
    """Hit bits, and hits given up for want of room; see `sale_flex.rules.Rule`. `from_zero` is of no use here."""
    return ops.mass_hits(
        query,
        key,
        *made,
        bounds,
        threshold,
        scale,
        *config.block_size,
        _sub_block(config, False),
        config.query_pool if config.query_stride is None else config.query_stride,
        config.query_stride is not None,
        config.bits,
        config.sink_tokens,
        config.local_tokens,
        budget,
    )


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
) -> tuple[Tensor, Tensor]:
    """Hit bits, and hits given up for want of room; see `sale_flex.rules.Rule`."""
    mean, *of_keys = made
    sub_block = _sub_block(config, every_key)
    pool = config.query_pool if config.query_stride is None else config.query_stride
    pooled = listed_ops.listed_pool(
        query,
        mean,
        sight.bounds,
        scale,
        config.block_size[0],
        pool,
        config.query_stride is not None,
        config.bits,
        sub_block > 1,
    )
    return listed_ops.listed_mass(
        key,
        *of_keys,
        *pooled,
        lists.counts,
        lists.blocks,
        structure.full,
        *sight,
        *score,
        threshold,
        scale,
        query.shape[2],
        *config.block_size,
        sub_block,
        pool,
        config.bits,
        budget,
    )


def _sub_block(config: SaleConfig, every_key: bool) -> int:
    return config.sub_block if config.estimator == "moments" and not every_key else 1
