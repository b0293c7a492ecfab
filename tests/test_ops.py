# SPDX-License-Identifier: BSD-3-Clause
"""The custom ops keep the promises that torch.compile relies on: schema, fake, no aliasing, dynamic shapes."""

import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch

from sale_flex import Relative, SaleConfig, create_sale_block_mask, mods, ops
from sale_flex.ops import listed as listed_ops
from sale_flex.testing import Shape, block_map, structured_inputs

OPS = [
    "build_lists",
    "kept_table",
    "key_mean",
    "mass_hits",
    "nonfinite_blocks",
    "quantize_groups",
    "quantize_moments",
    "quantize_rows",
    "query_bounds",
    "row_limits",
    "scan_max",
]

SHAPES = {
    "plain": Shape(200, 200, heads=6, kv_heads=2, head_dim=32),
    "chunk": Shape(70, 300, batch=2, heads=5, kv_heads=1, head_dim=80, dtype=torch.bfloat16, q_offset=130),
    "padded": Shape(130, 130, batch=2, heads=2, kv_heads=2, head_dim=64, kv_range=((3, 130), (64, 99))),
    "one row": Shape(1, 1, head_dim=32, dtype=torch.float16),
}


def arguments(shape: Shape, transposed: bool) -> dict[str, tuple]:
    """What every op is called with in one call of each rule."""
    inputs = structured_inputs(shape, 0)
    if transposed:
        inputs = type(inputs)(*(x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs))
    query, key, value = inputs
    block_q, block_k = SaleConfig().block_size
    where = shape.positions()
    offset = None if where["q_offset"] is None else torch.tensor(where["q_offset"])
    calls: dict[str, tuple] = {}

    def call(name, *args):
        calls[name] = args
        return getattr(ops, name)(*args)

    bounds = call("query_bounds", query, key, where["kv_range"], offset, shape.offset)
    mean = call("key_mean", key, bounds, 100)
    query_codes, query_scale = call("quantize_rows", query, 4)
    key_codes, key_scale = call("quantize_groups", key, mean, bounds, block_k, 4)
    tau = torch.full((shape.heads,), 0.05)
    limit = call("row_limits", query, key, mean, query_scale, bounds, tau, 0.125, 32, 64)
    lengths = shape.q_len, shape.kv_len, block_q, block_k
    hits = call("scan_max", query_codes, limit, key_codes, key_scale, bounds, *lengths, 64, shape.kv_range is None)
    moments = call("quantize_moments", key, mean, bounds, block_k, 8, 4)
    sizes = block_q, block_k, 8, 4, False, 4  # of blocks, sub-blocks and pools, and the width of codes
    call("mass_hits", query, key, mean, *moments, bounds, tau, 0.125, *sizes, 32, 64, 3)
    nonfinite = call("nonfinite_blocks", value, bounds, block_k)
    kept, *_ = call("build_lists", hits, nonfinite, bounds, shape.kv_heads, *lengths, 32, 64, 0, 4, 9, True, False)
    call("kept_table", kept, block_q, block_k, kept.numel() + 7)
    return calls


def test_the_list_of_ops_is_complete():
    # Those of programmed calls are tested in test_listed_ops, that of padding in test_models_padding, that of captured
    # tensors in test_captured_sizes, and what dispatch modes see in test_modes_and_limits.
    of_others = {
        "attended",
        "held",
        "mod_tables",
        "valid_keys",
        *(name for name, x in vars(listed_ops).items() if isinstance(x, torch._ops.OpOverload)),
    }
    defined = {
        name.split("::")[1].split(".")[0] for name in torch._C._dispatch_get_all_op_names() if "sale_flex::" in name
    }
    assert sorted(defined - of_others) == OPS


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_opcheck(name, shape, transposed):
    args = arguments(shape, transposed)[name]
    result = torch.library.opcheck(getattr(ops, name), args)
    assert set(result.values()) == {"SUCCESS"}
    assert len(result) == 4


@pytest.mark.parametrize("name", ["quantize_rows", "quantize_groups"])
def test_opcheck_of_the_packed_form(name):
    args = (*arguments(SHAPES["padded"], False)[name], True)
    assert set(torch.library.opcheck(getattr(ops, name), args).values()) == {"SUCCESS"}


def test_opcheck_without_values_and_kept_bits():
    hits, _, *rest, _want_kept, leave_early = arguments(SHAPES["plain"], False)["build_lists"]
    without = hits, None, *rest, False, leave_early
    assert set(torch.library.opcheck(ops.build_lists, without).values()) == {"SUCCESS"}


@pytest.mark.parametrize("name", OPS)
def test_results_are_fresh_and_inputs_untouched(name):
    args = arguments(replace(SHAPES["padded"], q_offset=0), False)[name]
    tensors = [x for x in args if isinstance(x, torch.Tensor)]
    before = [x.clone() for x in tensors]
    results = getattr(ops, name)(*args)
    results = [results] if isinstance(results, torch.Tensor) else results
    for tensor, copy in zip(tensors, before):
        assert torch.equal(tensor, copy)
    storages = [x.untyped_storage().data_ptr() for x in (*tensors, *results)]
    assert len(set(storages)) == len({id(x) for x in tensors}) + len(results)


def test_kernels_get_contiguous_tensors_but_for_queries_keys_and_values(monkeypatch):
    # Bits, counts, scales and thresholds are read by their shape: one number expanded to many was read beyond its end.
    got = []
    module = ModuleType("sale_flex.kernels.nothing")
    module.nothing = lambda *args: got.extend(args)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    query = torch.zeros(1, 8, 4, 32).transpose(1, 2)
    bits = torch.zeros(1, 1, 1, 1, dtype=torch.int32).expand(1, 4, 8, 2)
    threshold = torch.tensor([0.1]).expand(4)
    ops._lazy(module.__name__, "nothing", ops._contiguous)(query, bits, threshold, None, 3, "key", [bits])
    assert got[0] is query
    assert torch.equal(got[1], bits)
    assert torch.equal(got[2], threshold)
    assert got[1].is_contiguous()
    assert got[2].is_contiguous()
    assert got[3:6] == [None, 3, "key"]


@pytest.mark.gpu
@pytest.mark.parametrize("config", [SaleConfig(min_length=0), SaleConfig(Relative(0.1, bits=8), min_length=0)])
def test_expanded_tensors_are_what_they_show_on_a_gpu(config):
    shape = Shape(700, 700, heads=4, kv_heads=2, head_dim=64)
    query, key, _ = (x.cuda() for x in structured_inputs(shape, 0))
    one = torch.tensor([0.1], device="cuda")
    for mod in (None, mods.causal()):
        expected = create_sale_block_mask(query, key, config.with_options(threshold=one.repeat(4)), mask_mod=mod)
        got = create_sale_block_mask(query, key, config.with_options(threshold=one.expand(4)), mask_mod=mod)
        assert torch.equal(block_map(got).kept, block_map(expected).kept)


@pytest.mark.gpu
def test_a_dense_call_under_a_mask_reads_no_bits_that_nobody_wrote_on_a_gpu():
    garbage = torch.full((2**20,), -1, dtype=torch.int32, device="cuda")
    bits = torch.zeros(1, 4, 16, 2, dtype=torch.int32, device="cuda")
    del garbage
    hits = bits.new_zeros(1, 1, 1, 1).expand(1, 4, 16, 2)
    shown = torch.full_like(bits[:, :1], -1)
    kept, *_ = listed_ops.listed_compact(hits, None, shown, shown, bits[:, :1].contiguous(), 2, 64, 64, 64, True)
    assert not kept.any()
