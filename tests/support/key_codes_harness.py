# SPDX-License-Identifier: BSD-3-Clause
"""Chunked prompts with and without stored codes, for the tests of KeyCodes."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from config_harness import as_rule
from torch import Tensor

from sale_flex import KeyCodes, Mass, SaleConfig, create_sale_block_mask
from sale_flex.testing import BlockMap, Inputs, Shape, block_map

SPARSE = SaleConfig(Mass.fast(threshold=0.02), min_length=0, sink_tokens=16, local_tokens=32, smooth_tokens=100)
RULE_OPTIONS: dict[str, dict[str, Any]] = {
    "moments": {},
    "moments, 8 bits": {"bits": 8},
    "scan": {"sub_block": 1},
    "default": {"threshold": 0.05, "pool": 4, "pool_mode": "last", "sub_block": 1, "bits": 8},
    "relative": {"rule": "relative", "threshold": 0.2},
    "relative, 8 bits": {"rule": "relative", "threshold": 0.2, "bits": 8},
}
SHAPE = Shape(640, 640, heads=4, kv_heads=2, head_dim=32, batch=2)

every_rule = pytest.mark.parametrize("rule", RULE_OPTIONS)
both_metrics = pytest.mark.parametrize("rule", ["moments", "relative"])


def changed(config: SaleConfig, rule: str | None = None, **options: Any) -> SaleConfig:
    """A copy with other options and, where one is named, of another rule, which takes over threshold and bits."""
    return (config if rule is None else as_rule(config, rule)).with_options(**options)


def config_of(rule: str, **changes: Any) -> SaleConfig:
    return changed(SPARSE, **RULE_OPTIONS[rule] | changes)


def blocks_of(query: Tensor, key: Tensor, config: SaleConfig, codes: KeyCodes | None = None, **options) -> BlockMap:
    return block_map(create_sale_block_mask(query, key, config, key_codes=codes, **options))


def chunks(inputs: Inputs, edges: list[int], ranges=None) -> Iterator[tuple[Tensor, Tensor, dict[str, Tensor]]]:
    """Query, key and options of every chunk; ranges of the whole prompt end where the chunk does."""
    for begin, stop in pairwise(edges):
        where = {} if ranges is None else {"kv_range": torch.tensor(ranges).clamp_max(stop)}
        yield inputs.query[:, :, begin:stop], inputs.key[:, :, :stop], where


def assert_chunks_agree(inputs: Inputs, edges: list[int], config: SaleConfig, codes: KeyCodes, ranges=None):
    """Every chunk keeps the same blocks, partial and full, with the store and without."""
    for query, key, where in chunks(inputs, edges, ranges):
        with_store = blocks_of(query, key, config, codes, **where)
        for ours, expected in zip(with_store, blocks_of(query, key, config, **where)):
            assert torch.equal(ours, expected)


def filled(config: SaleConfig, inputs: Inputs, keys: int = 384, **options: Any) -> KeyCodes:
    codes = KeyCodes(**options)
    blocks_of(inputs.query[:, :, :keys], inputs.key[:, :, :keys], config, codes)
    assert codes.length == keys
    return codes


def next_chunk(inputs: Inputs) -> tuple[Tensor, Tensor]:
    return inputs.query[:, :, 384:], inputs.key
