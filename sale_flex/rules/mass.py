# SPDX-License-Identifier: BSD-3-Clause
"""The largest row mass: the share of a pooled row's softmax that falls on a block.

A block is hit when that share, estimated in low bits from every key (``estimator="scan"``) or from the mean and the
variance of sub-blocks of keys (``"moments"``), passes the threshold in one of the query block's pooled rows.
"""

from torch import Tensor

from sale_flex import ops
from sale_flex.config import SaleConfig


def select(
    query: Tensor,
    key: Tensor,
    bounds: Tensor,
    from_zero: bool,
    threshold: Tensor,
    scale: float,
    config: SaleConfig,
    budget: int,
) -> tuple[Tensor, Tensor]:
    """Hit bits of every block.

    Args:
        query: ``[B, Hq, Sq, D]``.
        key: ``[B, Hkv, Skv, D]``.
        bounds: int32 ``[B, 3]``.
        from_zero: Whether every batch row's first valid key is known to be key 0; of no use here.
        threshold: float32 ``[Hq]``, shares of probability.
        scale: Softmax scale.
        config: Estimator, pool, block size, bits, sink, local and smoothing lengths.
        budget: Hits that a query block's index list has room for.

    Returns:
        int32 ``[B, Hq, nq, ceil(nk / 32)]``; bits of always-kept and of hidden blocks mean nothing. And int32
        ``[B, Hq, nq]``: hits given up for want of room.
    """
    block_q, block_k = config.block_size
    sub_block = config.sub_block if config.estimator == "moments" else 1
    mean = ops.key_mean(key, bounds, config.smooth_tokens)
    moments = ops.quantize_moments(key, mean, bounds, block_k, sub_block, config.bits)
    return ops.mass_hits(
        query,
        key,
        mean,
        *moments,
        bounds,
        threshold,
        scale,
        block_q,
        block_k,
        sub_block,
        config.query_pool if config.query_stride is None else config.query_stride,
        config.query_stride is not None,
        config.bits,
        config.sink_tokens,
        config.local_tokens,
        budget,
    )
