# SPDX-License-Identifier: BSD-3-Clause
"""The relative attention score of single elements: SALE as published (arXiv 2505.24179, section 3.2).

A block is hit when one of its elements, estimated in 4 bits, reaches ``m_i + ln(threshold * l_i)``, with m and l the
exact softmax statistics of the row's sink and local keys.
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
) -> tuple[Tensor, None]:
    """Hit bits of every block.

    Args:
        query: ``[B, Hq, Sq, D]``.
        key: ``[B, Hkv, Skv, D]``.
        bounds: int32 ``[B, 3]``.
        from_zero: Whether every batch row's first valid key is known to be key 0.
        threshold: float32 ``[Hq]``.
        scale: Softmax scale.
        config: Block size, bits, sink, local and smoothing lengths.
        budget: Of no use here: lists are as wide as the map.

    Returns:
        int32 ``[B, Hq, nq, ceil(nk / 32)]``; bits of always-kept and of hidden blocks mean nothing. And
        None: no hit is given up.
    """
    block_q, block_k = config.block_size
    mean = ops.key_mean(key, bounds, config.smooth_tokens)
    query_codes, query_scale = ops.quantize_rows(query, config.bits)
    key_codes, key_scale = ops.quantize_groups(key, mean, bounds, block_k, config.bits)
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
        block_q,
        block_k,
        config.local_tokens,
        from_zero,
    )
    return hits, None
