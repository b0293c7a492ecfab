# SPDX-License-Identifier: BSD-3-Clause
"""The largest row mass: the share of a pooled row's softmax that falls on a block.

A block is hit when that share, estimated in low bits from every key (``estimator="scan"``) or from the mean and the
variance of sub-blocks of keys (``"moments"``), passes the threshold in one of the query block's pooled rows.
"""

from torch import Tensor

from sale_flex import ops
from sale_flex.config import SaleConfig


def codes(query: Tensor, key: Tensor, bounds: Tensor, config: SaleConfig) -> tuple[Tensor, ...]:
    """The smoothing mean and the codes of the keys; pooled rows get theirs inside the estimate."""
    mean = ops.key_mean(key, bounds, config.smooth_tokens)
    return mean, *ops.quantize_moments(key, mean, bounds, config.block_size[1], _sub_block(config), config.bits)


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
        _sub_block(config),
        config.query_pool if config.query_stride is None else config.query_stride,
        config.query_stride is not None,
        config.bits,
        config.sink_tokens,
        config.local_tokens,
        budget,
    )


def _sub_block(config: SaleConfig) -> int:
    return config.sub_block if config.estimator == "moments" else 1
