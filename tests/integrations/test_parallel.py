# SPDX-License-Identifier: BSD-3-Clause
"""Tensor parallelism: two processes give the tokens of one, and each has the thresholds of its own heads."""

import pytest
import torch
from parallel_harness import check_two_processes_against_one

import sale_flex.integrations.transformers as sale_hf
from sale_flex import Mass, SaleConfig


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")
def test_two_processes_generate_what_one_does(tmp_path):
    check_two_processes_against_one(tmp_path)


class Model(torch.nn.Module):
    """The parts of a parallel model that `configure` reads."""

    def __init__(self, heads: int, size: int) -> None:
        super().__init__()
        self.attention = torch.nn.Linear(1, 1)
        self.attention.layer_idx, self.attention.is_causal, self.attention.num_attention_heads = 0, True, heads
        self._tp_size = size


def test_heads_that_can_not_be_shared_out_are_refused():
    with pytest.raises(ValueError, match=r"3 tensor parallel processes divide, got 4"):
        sale_hf.configure(Model(4, 3), SaleConfig(Mass(torch.ones(4))))


def test_a_size_without_a_mesh_is_refused():
    with pytest.raises(ValueError, match="no device mesh"):
        sale_hf.configure(Model(4, 2), SaleConfig(Mass(torch.ones(4))))
