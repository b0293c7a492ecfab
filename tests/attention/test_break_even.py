# SPDX-License-Identifier: BSD-3-Clause
"""The cost model behind the default of `min_length`, and how it is resolved."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sale_flex import Mass, SaleConfig, create_sale_block_mask
from sale_flex.call.break_even import FAMILIES, KEPT_KEYS, LEAST, MOST, Costs, _solve, break_even_length, dense_prefix
from sale_flex.testing import Shape, any_in_block, block_map, causal_mask, structured_inputs


def times(costs: Costs, width: float, length: int) -> tuple[float, float]:
    """What the sparse and the dense path cost, by the model, written once more."""
    density = min(1.0, KEPT_KEYS / length)
    sparse = width * (costs.flex * density + costs.estimate) * length**2 + costs.per_token * length + costs.fixed
    return sparse, width * costs.dense * length**2


@given(
    st.builds(
        Costs,
        st.floats(1e-9, 1e-7),
        st.floats(1e-9, 1e-7),
        st.floats(1e-11, 1e-9),
        st.floats(1e-7, 1e-4),
        st.floats(0.01, 3),
    ),
    st.sampled_from([32, 64, 128, 256]),
)
def test_the_solution_is_the_first_length_that_pays(costs, head_dim):
    length = _solve(costs, head_dim)
    assert length % 1024 == 0
    assert LEAST <= length <= MOST
    sparse, dense = times(costs, head_dim / 128, length)
    assert sparse <= dense or length == MOST
    if length > LEAST:
        sparse, dense = times(costs, head_dim / 128, length - 1024)
        assert sparse > dense


def test_the_h200_keeps_eight_thousand_tokens_dense():
    assert _solve(FAMILIES[9], 128) == 9216
    assert all(_solve(costs, dim) >= 8192 for costs in FAMILIES.values() for dim in (64, 128, 256))


def test_a_processor_without_a_gpu_goes_sparse_early():
    assert break_even_length("cpu") == 1024
    query = torch.zeros(1, 1, 8, 64)
    assert dense_prefix(query, SaleConfig().min_length) == 1024
    assert dense_prefix(query, 77) == 77


def test_the_default_is_the_break_even_position():
    shape = Shape(1500, 1500, head_dim=32)
    inputs = structured_inputs(shape, 0)
    default, same = (
        block_map(create_sale_block_mask(inputs.query, inputs.key, SaleConfig(Mass(1.0), min_length=n))).kept
        for n in (None, 1024)
    )
    assert torch.equal(default, same)
    visible = any_in_block(causal_mask(shape), (64, 64))
    assert torch.equal(default[:, :, :16], visible[:, :, :16])
    assert not torch.equal(default, visible)


@pytest.mark.gpu
def test_short_prompts_are_dense_on_a_gpu():
    assert break_even_length("cuda") >= 8192
