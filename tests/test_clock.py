# SPDX-License-Identifier: BSD-3-Clause
"""The clock: laps add up by name, only where one runs, and copies of models may hold it."""

import copy
import pickle
import time

import pytest
import torch

from sale_flex import SaleConfig, clock, sale_attention
from sale_flex.clock import Clock, running
from sale_flex.testing import Shape, structured_inputs

CPU = torch.device("cpu")


def test_laps_add_up_by_name():
    one = Clock()
    one.mark(None, CPU)
    for name in ("mask", "attention", "mask"):
        time.sleep(0.01)
        one.mark(name, CPU)
    times = one.read()
    assert set(times) == {"mask", "attention"}
    assert times["mask"] >= 20
    assert times["attention"] >= 10
    one.reset()
    assert one.read() == {}


def test_a_lap_without_a_beginning_does_not_count():
    one = Clock()
    one.mark("mask", CPU)
    assert one.read() == {}


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_a_copy_has_the_times(copied):
    one = Clock()
    assert copied(one).read() == {}
    one.mark(None, CPU)
    one.mark("mask", CPU)
    assert copied(one).read() == one.read()


def test_the_inner_of_two_clocks_runs_and_none_outside():
    outer, inner = Clock(), Clock()
    with running(outer), running(inner):
        clock.mark(None, CPU)
        clock.mark("mask", CPU)
    clock.mark(None, CPU)
    clock.mark("mask", CPU)
    assert outer.read() == {}
    assert set(inner.read()) == {"mask"}


@pytest.mark.parametrize(("tokens", "laps"), [(600, {"mask", "attention"}), (100, {"attention"})])
def test_a_call_marks_its_halves(tokens, laps):
    inputs = structured_inputs(Shape(tokens, tokens, heads=2, kv_heads=1, head_dim=32), 0)
    one = Clock()
    with running(one):
        sale_attention(*inputs, SaleConfig(min_length=128))
    assert set(one.read()) == laps


@pytest.mark.gpu
def test_events_are_folded_and_copied():
    one, device = Clock(), torch.device("cuda")
    one.mark(None, device)
    for _ in range(600):
        torch.ones(1000, device=device).sum()
        one.mark("mask", device)
    assert len(one._laps) < 600
    assert 0 < copy.deepcopy(one).read()["mask"] == one.read()["mask"]
