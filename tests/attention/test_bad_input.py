# SPDX-License-Identifier: BSD-3-Clause
"""What bad input gets: an error that names the argument, the rule, what came and what to do."""

from dataclasses import FrozenInstanceError, fields, replace

import pytest
import torch

import sale_flex
from sale_flex import Mass, Relative, SaleConfig, create_sale_block_mask, sale_attention
from sale_flex.call.validation import HEAD_DIMS
from sale_flex.config import BLOCK_SIZES


def tensors(**changes) -> dict:
    """Good arguments of `sale_attention`, with changes."""
    good = {
        "query": torch.randn(2, 6, 100, 64),
        "key": torch.randn(2, 2, 200, 64),
        "value": torch.randn(2, 2, 200, 64),
        "config": SaleConfig(min_length=0),
    }
    return good | changes


BAD_CALLS = {
    "query of the wrong type": ({"query": [1.0]}, TypeError, "query must be a torch.Tensor, got list"),
    "query of rank 3": ({"query": torch.randn(6, 100, 64)}, ValueError, r"query must have 4 dim.*\[6, 100, 64\].*unsq"),
    "key of rank 5": ({"key": torch.randn(1, 2, 2, 200, 64)}, ValueError, "key must have 4 dimensions"),
    "integer query": ({"query": torch.ones(2, 6, 100, 64).int()}, TypeError, r"query must be float.*int32.*query\.to"),
    "float64 inputs": (
        {name: torch.randn(2, 6, 100, 64).double() for name in ("query", "key", "value")},
        TypeError,
        "query must be float32, float16 or bfloat16, got torch.float64",
    ),
    "key of another dtype": ({"key": torch.randn(2, 2, 200, 64).half()}, TypeError, "key must have the query's dtype"),
    "value of another dtype": ({"value": torch.randn(2, 2, 200, 64).half()}, TypeError, "value must have the query's"),
    "key on another device": (
        {"key": torch.empty(2, 2, 200, 64, device="meta")},
        ValueError,
        "key must be on the query's device cpu, got meta",
    ),
    "no queries": ({"query": torch.randn(2, 6, 0, 64)}, ValueError, r"query must not be empty.*\[2, 6, 0, 64\].*skip"),
    "no keys": ({"key": torch.randn(2, 2, 0, 64)}, ValueError, "key must not be empty"),
    "no batch": ({"query": torch.randn(0, 6, 100, 64)}, ValueError, "query must not be empty"),
    "key of another batch": ({"key": torch.randn(3, 2, 200, 64)}, ValueError, "key must have the query's batch size 2"),
    "value of another batch": ({"value": torch.randn(1, 2, 200, 64)}, ValueError, "value must have the query's batch"),
    "key of another head_dim": (
        {"key": torch.randn(2, 2, 200, 32)},
        ValueError,
        "key must have the query's head_dim 64",
    ),
    "head_dim not supported": (
        {name: torch.randn(2, 2, 100, 48) for name in ("query", "key", "value")},
        ValueError,
        r"query must have a head_dim .*of \(32, .*\), got 48; pad",
    ),
    "heads that do not divide": (
        {"query": torch.randn(2, 5, 100, 64)},
        ValueError,
        "query must have a number of heads that is a multiple of the key's, got 5 query heads and 2 key heads",
    ),
    "value of another length": ({"value": torch.randn(2, 2, 199, 64)}, ValueError, r"value must have the key's shape"),
    "value of other heads": ({"value": torch.randn(2, 1, 200, 64)}, ValueError, r"value must have the key's shape"),
    "config of the wrong type": ({"config": {"threshold": 0.1}}, TypeError, "config must be a sale_flex.SaleConfig"),
    "thresholds of too few heads": (
        {"config": SaleConfig(Mass(torch.zeros(2)))},
        ValueError,
        r"config.rule.threshold must be .*shape \[6\].*got \[2\]",
    ),
    "thresholds on another device": (
        {"config": SaleConfig(Mass(torch.zeros(6, device="meta")))},
        ValueError,
        "config.rule.threshold must be on the query's device cpu, got meta; move",
    ),
    "more queries than keys": (
        {"query": torch.randn(2, 6, 201, 64)},
        ValueError,
        r"query must not be longer than key \(201 > 200\) when q_offset is left out",
    ),
    "negative q_offset": ({"q_offset": -1}, ValueError, "q_offset must place all queries at keys.*q_offset -1"),
    "q_offset too large": ({"q_offset": 101}, ValueError, "q_offset must place all queries at keys.*101 with 100 q"),
    "q_offset of the wrong type": (
        {"q_offset": 1.0},
        TypeError,
        "q_offset must be an int or an integer tensor, got float",
    ),
    "q_offset a bool": ({"q_offset": True}, TypeError, "q_offset must be an int or an integer tensor, got bool"),
    "q_offset of another batch": (
        {"q_offset": torch.zeros(3).int()},
        ValueError,
        r"q_offset must be .*shape \[\] or \[2\], one per batch row, got shape \[3\]",
    ),
    "q_offset of one row": ({"q_offset": torch.zeros(1).int()}, ValueError, r"q_offset must be .*got shape \[1\]"),
    "q_offset a matrix": ({"q_offset": torch.zeros(2, 1).int()}, ValueError, r"q_offset must be .*shape \[2, 1\]"),
    "q_offset a float tensor": ({"q_offset": torch.zeros(())}, ValueError, r"q_offset must be .*float32"),
    "q_offset a bool tensor": ({"q_offset": torch.zeros(2).bool()}, ValueError, "q_offset must be .*torch.bool"),
    "q_offset per row on another device": (
        {"q_offset": torch.zeros(2, device="meta").int()},
        ValueError,
        "q_offset must be on the query's device cpu if there is one per batch row, got meta",
    ),
    "q_offset tensor too large": ({"q_offset": torch.tensor(101)}, ValueError, "q_offset must place .*got 101"),
    "q_offset tensor negative": ({"q_offset": torch.tensor(-1)}, ValueError, "q_offset must place .*got -1"),
    "kv_range of the wrong type": ({"kv_range": [[0, 200]] * 2}, TypeError, "kv_range must be an integer tensor"),
    "kv_range of the wrong shape": (
        {"kv_range": torch.tensor([0, 200])},
        ValueError,
        r"kv_range must have shape \[2, 2\], got \[2\]",
    ),
    "kv_range of floats": ({"kv_range": torch.tensor([[0.0, 200.0]] * 2)}, TypeError, "kv_range must hold integers"),
    "kv_range of bools": ({"kv_range": torch.ones(2, 2).bool()}, TypeError, "kv_range must hold integers"),
    "kv_range on another device": (
        {"kv_range": torch.zeros(2, 2, device="meta").int()},
        ValueError,
        "kv_range must be on the query's device",
    ),
    "kv_range past the keys": (
        {"kv_range": torch.tensor([[0, 200], [0, 201]])},
        ValueError,
        r"kv_range must hold .*key.shape\[2\] = 200; got \[\[0, 200\], \[0, 201\]\]",
    ),
    "kv_range before the keys": ({"kv_range": torch.tensor([[-1, 200]] * 2)}, ValueError, "kv_range must hold .*-1"),
    "kv_range backwards": ({"kv_range": torch.tensor([[9, 8]] * 2)}, ValueError, "kv_range must hold .*first <= last"),
    "scale of the wrong type": ({"scale": "0.1"}, TypeError, "scale must be a float or None.*got str"),
    "scale of zero": ({"scale": 0.0}, ValueError, "scale must be a finite number above 0.*got 0.0"),
    "scale not finite": ({"scale": float("nan")}, ValueError, "scale must be a finite number above 0.*nan"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_sale_attention_refuses(case):
    changes, error, message = BAD_CALLS[case]
    with pytest.raises(error, match=f"(?s){message}"):
        sale_attention(**tensors(**changes))


@pytest.mark.parametrize("case", BAD_CALLS)
def test_create_sale_block_mask_refuses(case):
    changes, error, message = BAD_CALLS[case]
    with pytest.raises(error, match=f"(?s){message}"):
        create_sale_block_mask(**tensors(**changes))


def test_the_value_may_be_left_out_of_a_mask():
    arguments = tensors()
    del arguments["value"]
    assert create_sale_block_mask(**arguments).shape == (2, 6, 100, 200)


def test_padding_that_is_all_of_a_row_is_no_error():
    output = sale_attention(**tensors(kv_range=torch.tensor([[0, 200], [0, 0]])))
    assert output[0].abs().min() > 0
    assert not output[1].any()


BAD_RULES = {
    "threshold": [
        ("0.1", TypeError, "float or a float tensor .*got str"),
        (True, TypeError, "got bool"),
        (-0.1, ValueError, "0 or more and finite, got -0.1"),
        (float("nan"), ValueError, "0 or more and finite, got nan"),
        (float("inf"), ValueError, "0 or more and finite, got inf"),
        (torch.tensor([0.1, -0.1]), ValueError, "0 or more and finite for every head"),
        (torch.tensor([0.1, torch.nan]), ValueError, "0 or more and finite for every head"),
        (torch.tensor(0.1), ValueError, r"shape \[Hq\], got a tensor of shape \[\]"),
        (torch.zeros(2, 2), ValueError, r"shape \[2, 2\]"),
        (torch.zeros(2).int(), ValueError, "floating-point tensor.*int32"),
    ],
    "pool": [
        (3, ValueError, "one of .*16.* rows, got 3"),
        (32, ValueError, "rows, got 32"),
        (None, ValueError, "got None"),
        (True, ValueError, "got True"),
    ],
    "pool_mode": [("max", ValueError, "one of .*'last', 'mean'.*got 'max'"), (None, ValueError, "got None")],
    "sub_block": [(2, ValueError, "one of .*64.* keys, got 2"), (128, ValueError, "keys, got 128")],
    "bits": [(2, ValueError, "one of .*4, 8.*, got 2"), (16, ValueError, "got 16"), (8.0, ValueError, "got 8.0")],
    "max_blocks": [(0, ValueError, "at least 1 blocks, got 0"), (2.0, TypeError, "an int .*blocks.*got 2.0")],
}

BAD_CONFIGS = {
    "rule": [
        (None, TypeError, "a sale_flex.Rule, .*got None"),
        ("mass", TypeError, "got 'mass'"),
        (Mass, TypeError, "got <class .*Mass'>"),
    ],
    "on_miss": [("raise", ValueError, "one of .*'report', 'dense'.*got 'raise'"), (None, ValueError, "got None")],
    "miss_bound": [
        (1.5, ValueError, r"a share in \[0, 1\], got 1.5"),
        (-0.1, ValueError, "got -0.1"),
        (float("nan"), ValueError, "got nan"),
        ("0.2", TypeError, "a float, got '0.2'"),
        (True, TypeError, "a float, got True"),
    ],
    "block_size": [((32, 32), ValueError, r"\(64, 64\).*got \(32, 32\)"), ((64,), ValueError, "query rows, keys")],
    "sink_tokens": [(-1, ValueError, "at least 0 tokens, got -1"), (1.5, TypeError, "an int .*got 1.5")],
    "local_tokens": [(0, ValueError, "at least 1 tokens, got 0"), (None, TypeError, "an int .*got None")],
    "min_length": [(-1, ValueError, "at least 0 tokens, got -1"), (True, TypeError, "an int .*got True")],
    "smooth_tokens": [(-5, ValueError, "at least 0 tokens, got -5"), ("1k", TypeError, "an int .*got '1k'")],
}


@pytest.mark.parametrize("field", BAD_CONFIGS)
def test_config_refuses(field):
    for value, error, message in BAD_CONFIGS[field]:
        with pytest.raises(error, match=f"{field} must .*{message}"):
            SaleConfig(**{field: value})
        with pytest.raises(error, match=f"{field} must "):
            replace(SaleConfig(), **{field: value})


@pytest.mark.parametrize(("rule", "field"), [(rule, x.name) for rule in (Mass, Relative) for x in fields(rule)])
def test_rules_refuse(rule, field):
    for value, error, message in BAD_RULES[field]:
        with pytest.raises(error, match=f"{field} must .*{message}"):
            rule(**{field: value})
        with pytest.raises(error, match=f"{field} must "):
            SaleConfig(rule()).with_options(**{field: value})
        with pytest.raises(error, match=f"{field} must "):
            SaleConfig.from_options(rule.name, **{field: value})


def test_flat_options_name_the_known_ones():
    with pytest.raises(
        ValueError, match=r"fields of rule 'mass', bits, max_blocks, .*, or of SaleConfig, .*got 'bitz'"
    ):
        SaleConfig.from_options(bitz=4)
    with pytest.raises(ValueError, match=r"fields of rule 'relative', bits, threshold, or .*got 'pool'"):
        SaleConfig.from_options("relative", pool=4)
    with pytest.raises(ValueError, match=r"rule must be one of .*'mass'.*'relative'.*got 'max'"):
        SaleConfig.from_options("max")
    assert SaleConfig.from_options(pool=8, sink_tokens=3) == SaleConfig(Mass(pool=8), sink_tokens=3)


def test_a_sub_block_must_fit_its_block():
    with pytest.raises(ValueError, match=r"sub_block must be at most the 32 keys of a block, got 64; take a smaller"):
        replace(SaleConfig(Mass(sub_block=64)), block_size=(64, 32))


def test_index_lists_must_have_room_for_what_is_always_kept():
    config = SaleConfig(Mass(max_blocks=4), min_length=200)
    with pytest.raises(
        ValueError, match=r"max_blocks must have room for the \d+ blocks that are kept in any case.*got 4"
    ):
        create_sale_block_mask(**tensors(config=config, key=torch.randn(2, 2, 600, 64), value=None))


def test_every_option_is_checked():
    assert set(BAD_CONFIGS) == {x.name for x in fields(SaleConfig)}
    assert set(BAD_RULES) == {x.name for rule in (Mass, Relative) for x in fields(rule)}


def test_config_is_frozen_and_compares_by_value():
    config = SaleConfig(Mass(torch.tensor([0.1, 0.2])), block_size=[64, 32])
    assert config.block_size == (64, 32)
    with pytest.raises(FrozenInstanceError):
        config.rule.bits = 8
    with pytest.raises(FrozenInstanceError):
        config.rule = Mass()
    assert config == SaleConfig(Mass(torch.tensor([0.1, 0.2])), block_size=(64, 32))
    assert config != config.with_options(threshold=torch.tensor([0.1, 0.3]))
    assert config != config.with_options(threshold=0.1)
    assert config != "config"
    assert len({SaleConfig(), SaleConfig(), SaleConfig(Mass(bits=4))}) == 2


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_every_supported_head_dim_and_block_size_is_taken(head_dim, block_size):
    query = torch.randn(1, 1, 200, head_dim)
    mask = create_sale_block_mask(query, query, SaleConfig(block_size=block_size))
    assert tuple(mask.BLOCK_SIZE) == block_size


def test_packing_refuses_other_dtypes_and_odd_channels():
    with pytest.raises(TypeError, match=r"codes must be int8, got torch\.int32"):
        sale_flex.pack_int4(torch.zeros(2, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"codes must have an even last dimension.*\[4, 3\]"):
        sale_flex.pack_int4(torch.zeros(4, 3, dtype=torch.int8))
    with pytest.raises(TypeError, match=r"packed must be uint8, got torch\.int8"):
        sale_flex.unpack_int4(torch.zeros(2, dtype=torch.int8))
