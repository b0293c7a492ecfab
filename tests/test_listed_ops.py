# SPDX-License-Identifier: BSD-3-Clause
"""The custom ops of programmed calls keep the promises that torch.compile relies on."""

from dataclasses import replace

import pytest
import torch

from sale_flex import AuxRequest, Mass, Relative, SaleConfig, create_sale_block_mask, sale_attention
from sale_flex.ops import listed as listed_ops
from sale_flex.testing import Shape, structured_inputs
from sale_flex.testing.programs import PROGRAMS

OPS = [
    "audit_rows",
    "block_lists",
    "block_structure",
    "listed_bits",
    "listed_compact",
    "listed_limits",
    "listed_mass",
    "listed_pool",
    "listed_rows",
    "listed_scan",
]

SHAPES = {
    "plain": Shape(200, 200, heads=6, kv_heads=2, head_dim=32),
    "chunk": Shape(70, 300, batch=2, heads=5, kv_heads=1, head_dim=80, dtype=torch.bfloat16, q_offset=130),
    "padded": Shape(130, 130, batch=2, heads=2, kv_heads=2, head_dim=64, kv_range=((3, 130), (64, 99))),
}

CALLS = ["soft cap in documents", "a user's mask by head", "a finer block mask"]


def recorded(shape: Shape, program: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple]:
    """What every op is called with in a call of each rule, and in one that wants the log-sum-exp."""
    calls: dict[str, tuple] = {}

    def record(name, op):
        def call(*args):
            calls[name] = args
            return op(*args)

        return call

    with monkeypatch.context() as patch:
        for name in OPS:
            patch.setattr(listed_ops, name, record(name, getattr(listed_ops, name)))
        inputs, options = structured_inputs(shape, 0), PROGRAMS[program](shape, "cpu")
        config = SaleConfig(Mass.fast(), min_length=0, local_tokens=16, sink_tokens=4, smooth_tokens=50)
        for rule in (Mass.fast(), Relative()):
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


@pytest.mark.parametrize("program", CALLS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_opcheck(shape, program, monkeypatch):
    calls = recorded(shape, program, monkeypatch)
    assert sorted(calls) == [name for name in OPS if name != "listed_bits" or program == "a finer block mask"]
    for name, args in calls.items():
        result = torch.library.opcheck(getattr(listed_ops, name), args)
        assert set(result.values()) == {"SUCCESS"}, name
        assert len(result) == 4


def test_results_are_fresh_and_inputs_untouched(monkeypatch):
    for name, args in recorded(SHAPES["padded"], "a finer block mask", monkeypatch).items():
        tensors = [x for x in args if isinstance(x, torch.Tensor)]
        before = [x.clone() for x in tensors]
        results = getattr(listed_ops, name)(*args)
        results = [results] if isinstance(results, torch.Tensor) else results
        for tensor, copy in zip(tensors, before):
            assert torch.equal(tensor.nan_to_num(), copy.nan_to_num()), name
        inputs = {x.untyped_storage().data_ptr() for x in tensors if x.numel()}
        fresh = [x.untyped_storage().data_ptr() for x in results if x.numel()]
        assert len(set(fresh)) == len(fresh), name
        assert inputs.isdisjoint(fresh), name
