# SPDX-License-Identifier: BSD-3-Clause
"""The relative attention score of single elements: SALE as published (arXiv 2505.24179, section 3.2).

A block is hit when one of its elements, estimated in 4 bits, reaches ``m_i + ln(threshold * l_i)``, with m and l the
exact softmax statistics of the row's sink and local keys.
"""

import torch
from torch import Tensor

from sale_flex import listed_ops, ops
from sale_flex.config import SaleConfig
from sale_flex.key_codes import Coded, Form, Reuse, code_rest
from sale_flex.sight import Lists, Mod, Sight, Structure


def codes(
    key: Tensor, bounds: Tensor, config: SaleConfig, every_key: bool = False, reuse: Reuse | None = None
) -> tuple[Tensor, ...]:
    """The smoothing mean, codes and scales of the keys; every key has its code in any case."""
    mean = ops.key_mean(key, bounds, config.smooth_tokens)
    block_k = config.block_size[1]

    def quantize(part: Tensor, where: Tensor) -> list[Coded]:
        return [Coded(*ops.quantize_groups(part, mean, where, block_k, config.bits))]

    if reuse is None:
        return mean, *quantize(key, bounds)[0]
    made_with = {name: getattr(config, name) for name in ("metric", "block_size", "bits", "smooth_tokens")}
    form = Form(made_with, (block_k,), (True,), 128, by_group=True)
    (of_keys,), stale = code_rest(reuse, key, mean, bounds, form, quantize)
    if stale is None:
        return mean, *of_keys
    return mean, of_keys.codes, _spoil(of_keys.scale, stale, bounds[:, 1], block_k)


def _spoil(scale: Tensor, stale: Tensor, start: Tensor, block_k: int) -> Tensor:
    """Scales ``[B, Hkv, G]`` with NaN, which keeps a block, in groups that reach into stale blocks ``[B, Hkv, N]``.

    Groups are counted from the first valid key, `start` int32 ``[B]``, and blocks from key 0. Where all blocks are
    stale, the count itself may be wrong.
    """
    group = torch.arange(scale.shape[2], device=scale.device)
    beyond = stale.shape[2]
    flags = torch.cat([stale, torch.zeros_like(stale[..., :1])], -1)
    spoiled = stale.all(-1, keepdim=True)
    for shift in (start // block_k, (start + block_k - 1) // block_k):
        block = (group + shift[:, None]).clamp_max(beyond)[:, None].expand_as(scale)
        spoiled = spoiled | flags.gather(2, block)
    return scale.masked_fill(spoiled, torch.nan)


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
    mean, key_codes, key_scale = made
    query_codes, query_scale = ops.quantize_rows(query, config.bits)
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
    mean, key_codes, key_scale = made
    query_codes, query_scale = ops.quantize_rows(query, config.bits)
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
