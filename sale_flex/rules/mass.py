# SPDX-License-Identifier: BSD-3-Clause
"""The largest row mass: the share of a pooled row's softmax that falls on a block.

A block is hit when that share, estimated in low bits from every key (``estimator="scan"``) or from the mean and the
variance of sub-blocks of keys (``"moments"``), passes the threshold in one of the query block's pooled rows.
"""

import torch
from torch import Tensor

from sale_flex import listed_ops, ops
from sale_flex.bits import pack_bits, unpack_bits
from sale_flex.config import SaleConfig
from sale_flex.key_codes import Coded, Form, Reuse, code_rest
from sale_flex.sight import Lists, Mod, Sight, Structure


def codes(
    key: Tensor, bounds: Tensor, config: SaleConfig, every_key: bool = False, reuse: Reuse | None = None
) -> tuple[Tensor, ...]:
    """The smoothing mean and the codes of the keys; pooled rows get theirs inside the estimate."""
    mean = ops.key_mean(key, bounds, config.smooth_tokens)
    sub_block = _sub_block(config, every_key)
    if reuse is None:
        return mean, *ops.quantize_moments(key, mean, bounds, config.block_size[1], sub_block, config.bits)
    return mean, *_codes_of_both(reuse, key, mean, bounds, config, sub_block)


def _codes_of_both(
    reuse: Reuse, key: Tensor, mean: Tensor, bounds: Tensor, config: SaleConfig, sub_block: int
) -> tuple[Tensor, ...]:
    """What `ops.quantize_moments` returns, from stored codes and from keys. NaN scales are the store's flags."""
    block_k = config.block_size[1]
    moments = sub_block > 1

    def quantize(part: Tensor, where: Tensor) -> list[Coded]:
        *made, nonfinite = ops.quantize_moments(part, mean, where, block_k, sub_block, config.bits)
        blocks = -(-part.shape[2] // block_k)
        made[1][..., :blocks].masked_fill_(unpack_bits(nonfinite, blocks), torch.nan)
        return [Coded(*made[:2]), Coded(*made[2:])][: 1 + moments]

    made_with: dict[str, object] = {"metric": "mass", "estimator": "moments" if moments else "scan"}
    made_with |= {name: getattr(config, name) for name in ("block_size", "bits", "smooth_tokens")}
    made_with |= {"sub_block": sub_block} if moments else {}
    form = Form(made_with, (block_k // sub_block,) * (1 + moments), (True, False)[: 1 + moments], 256, by_group=False)
    made, stale = code_rest(reuse, key, mean, bounds, form, quantize)
    flags = made[0].scale.isnan()
    of_means = made[0]._replace(scale=made[0].scale.masked_fill(flags, 0.0))
    none = key.new_empty(*key.shape[:2], 0, key.shape[3], dtype=torch.int8)
    of_variances = made[1] if moments else Coded(none, none.new_empty(none.shape[:3], dtype=torch.float32))
    flags = flags[..., : -(-key.shape[2] // block_k)]
    if stale is not None:
        # One block's sum is a part of every row's total: a wrong one could lose the others.
        flags = flags | stale.any(-1, keepdim=True)
    return *of_means, *of_variances, pack_bits(flags)


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
