# SPDX-License-Identifier: BSD-3-Clause
"""The custom ops keep the promises that torch.compile relies on: schema, fake, no aliasing, dynamic shapes."""

import sys
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch

from sale_flex import (
    Antidiagonal,
    AuxRequest,
    BlockMean,
    FlexPrefill,
    Mass,
    Relative,
    SaleConfig,
    create_sale_block_mask,
    mods,
    ops,
    sale_attention,
)
from sale_flex.blocks.mask_spec import Mod, causal_spec
from sale_flex.kernels.arguments import BlockVisibility, Grid, MassOptions, Near
from sale_flex.testing import Shape, block_map, structured_inputs
from sale_flex.testing.programs import PROGRAMS

PLAIN = [
    "antidiagonal_shares",
    "audit_rows",
    "block_mean_energies",
    "build_lists",
    "kept_table",
    "key_mean",
    "last_row_sums",
    "mass_hits",
    "nonfinite_blocks",
    "quantize_groups",
    "quantize_moments",
    "quantize_rows",
    "query_bounds",
    "row_limits",
    "scan_max",
]
"""Ops of plain causal calls."""

OPS = sorted([*PLAIN, "attend_rows", "block_mask_bits", "block_structure", "candidate_blocks"])

SHAPES = {
    "plain": Shape(200, 200, heads=6, kv_heads=2, head_dim=32),
    "chunk": Shape(70, 300, batch=2, heads=5, kv_heads=1, head_dim=80, dtype=torch.bfloat16, q_offset=130),
    "padded": Shape(130, 130, batch=2, heads=2, kv_heads=2, head_dim=64, kv_range=((3, 130), (64, 99))),
    "one row": Shape(1, 1, head_dim=32, dtype=torch.float16),
}

PROGRAM_NAMES = ["soft cap in documents", "a user's mask by head", "a finer block mask"]

Calls = dict[str, tuple[Any, ...]]
"""Name of an op -> what it is called with."""


def plain_calls(shape: Shape, transposed: bool) -> Calls:
    """What every op is called with in one plain call of each rule."""
    inputs = structured_inputs(shape, 0)
    if transposed:
        inputs = type(inputs)(*(x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs))
    query, key, value = inputs
    block_q, block_k = SaleConfig().block_size
    where = shape.positions()
    offset = None if where["q_offset"] is None else torch.tensor(where["q_offset"])
    calls: Calls = {}

    def call(name: str, *args: Any) -> Any:
        calls[name] = args
        return getattr(ops, name)(*args)

    grid, near = Grid(shape.q_len, shape.kv_len, block_q, block_k), Near(32, 64, 0)
    bounds = call("query_bounds", query, key, where["kv_range"], offset, shape.offset)
    mean = call("key_mean", key, bounds, 100)
    query_codes = call("quantize_rows", query, 4, False)
    key_codes = call("quantize_groups", key, mean, bounds, block_k, 4, False)
    tau = torch.full((shape.heads,), 0.05)
    of_call = causal_spec(bounds), None, Mod()
    limits = call("row_limits", query, query_codes[1], key, mean, *of_call, tau, 0.125, grid, near)
    no_left_padding = shape.kv_range is None
    hits = call("scan_max", *query_codes, *key_codes, *limits, *of_call, 0.125, grid, 64, no_left_padding)
    moments = call("quantize_moments", key, mean, bounds, block_k, 8, 4)
    call("mass_hits", query, key, mean, moments, *of_call, tau, 0.125, grid, MassOptions(8, 4, False, 4), near, 3)
    call("antidiagonal_shares", query, key, bounds, None, True, 0.125, grid, 16)
    call("block_mean_energies", query, key, bounds, None, True, 0.125, grid)
    call("last_row_sums", query, key, causal_spec(bounds), Mod(), 0.125, grid, 30, grid.key_blocks * block_k)
    nonfinite = call("nonfinite_blocks", value, bounds, block_k)
    call("audit_rows", query, key, hits, nonfinite, *of_call, 0.125, 0.05, grid, near)
    kept, *_ = call("build_lists", hits, nonfinite, bounds, None, None, shape.kv_heads, grid, near, 4, 9, True, False)
    call("kept_table", kept, block_q, block_k, kept.numel() + 7)
    return calls


def masked_calls(shape: Shape, program: str, monkeypatch: pytest.MonkeyPatch) -> Calls:
    """What every op is called with in a call of each rule under a program, and in one that wants the log-sum-exp."""
    calls: Calls = {}

    def record(name: str, op: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            calls[name] = args
            return op(*args)

        return call

    with monkeypatch.context() as patch:
        for name in OPS:
            patch.setattr(ops, name, record(name, getattr(ops, name)))
        inputs, options = structured_inputs(shape, 0), PROGRAMS[program](shape, "cpu")
        config = SaleConfig(Mass.fast(), min_length=0, local_tokens=16, sink_tokens=4, smooth_tokens=50)
        for rule in (Mass.fast(), Relative(), Antidiagonal(), BlockMean(), FlexPrefill()):
            create_sale_block_mask(
                *inputs[:2],
                replace(config, rule=rule),
                value=inputs.value,
                stats=True,
                **shape.positions(),
                **options,
            )
        sale_attention(*inputs, config, return_aux=AuxRequest(lse=True), **shape.positions(), **options)
    return calls


def test_the_list_of_ops_is_complete():
    # That of padding is tested in integrations/test_padding, that of captured tensors in test_captured_sizes, and what
    # dispatch modes see in test_modes_and_limits.
    of_others = {"attended", "held", "mod_tables", "valid_keys"}
    defined = {
        name.split("::")[1].split(".")[0] for name in torch._C._dispatch_get_all_op_names() if "sale_flex::" in name
    }
    assert sorted(defined - of_others) == OPS


def check(calls: Calls) -> None:
    """Assert that opcheck finds nothing."""
    for name, args in calls.items():
        op = getattr(ops, name)
        result = torch.library.opcheck(op.overload, tuple(op.flat(*args)))
        assert set(result.values()) == {"SUCCESS"}, name
        assert len(result) == 4


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_opcheck_of_plain_calls(shape, transposed):
    calls = plain_calls(shape, transposed)
    assert sorted(calls) == PLAIN
    check(calls)


@pytest.mark.parametrize("program", PROGRAM_NAMES)
@pytest.mark.parametrize("shape", ["plain", "chunk", "padded"])
def test_opcheck_under_mods(shape, program, monkeypatch):
    calls = masked_calls(SHAPES[shape], program, monkeypatch)
    missing = {"block_mask_bits"} if program != "a finer block mask" else set()
    assert set(calls) == set(OPS) - missing
    check(calls)


def test_opcheck_of_the_packed_form():
    calls = plain_calls(SHAPES["padded"], False)
    check({name: (*calls[name][:-1], True) for name in ("quantize_rows", "quantize_groups")})


def test_opcheck_without_values_and_kept_bits():
    hits, _, *rest, _want_kept, leave_early = plain_calls(SHAPES["plain"], False)["build_lists"]
    check({"build_lists": (hits, None, *rest, False, leave_early)})


@pytest.mark.parametrize("program", [None, "a finer block mask"])
def test_results_are_fresh_and_inputs_untouched(program, monkeypatch):
    shape = replace(SHAPES["padded"], q_offset=0)
    calls = plain_calls(shape, False) if program is None else masked_calls(shape, program, monkeypatch)
    for name, args in calls.items():
        op = getattr(ops, name)
        flat = op.flat(*args)
        tensors = [x for x in flat if isinstance(x, torch.Tensor)]
        before = [x.clone() for x in tensors]
        results = op.overload(*flat)
        results = [results] if isinstance(results, torch.Tensor) else results
        for tensor, copy in zip(tensors, before):
            assert torch.equal(tensor.nan_to_num(), copy.nan_to_num()), name
        inputs = {x.untyped_storage().data_ptr() for x in tensors if x.numel()}
        fresh = [x.untyped_storage().data_ptr() for x in results if x.numel()]
        assert len(set(fresh)) == len(fresh), name
        assert inputs.isdisjoint(fresh), name


def test_kernels_get_contiguous_tensors_but_for_queries_keys_and_values(monkeypatch):
    # Bits, counts, scales and thresholds are read by their shape: one number expanded to many was read beyond its end.
    got: list[Any] = []
    module = ModuleType("sale_flex.kernels.nothing")
    module.attend_rows = lambda *args: got.extend(args)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    x = torch.zeros(1, 8, 4, 32).transpose(1, 2)
    bits = torch.zeros(1, 1, 1, 1, dtype=torch.int32).expand(1, 4, 8, 2)
    bounds = torch.tensor([[0, 0, 8]], dtype=torch.int32).expand(3, 3)
    args = x, x, x, bits, causal_spec(bounds), Mod(), 0.1, Grid(8, 64, 64, 32)
    ops.attend_rows._of("nothing")["CUDA"](*ops.attend_rows.flat(*args))
    assert all(tensor is x for tensor in got[:3])
    assert torch.equal(got[3], bits)
    assert got[3].is_contiguous()
    assert torch.equal(got[4].bounds, bounds)
    assert got[4].bounds.is_contiguous()
    assert got[4][1:] == (True, None, None, 1, 1)
    assert got[5:] == [None, 0.1, Grid(8, 64, 64, 32)]


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
    ends, bounds = bits.new_zeros(1, 1, 2, 1024), bits.new_zeros(1, 3)
    found = BlockVisibility(shown, shown, ends), bits[:, :1].contiguous()
    grid, near = Grid(1024, 4096, 64, 64), Near(0, 1, 0)
    kept, *_ = ops.build_lists(hits, None, bounds, *found, 2, grid, near, 64, 64, True, False)
    assert not kept.any()
