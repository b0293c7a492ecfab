# SPDX-License-Identifier: BSD-3-Clause
"""The clock: laps add up by name, only where one runs, and copies of models may hold it."""

import copy
import pickle
import threading
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


def in_threads(*works):
    """Run them at a time, each to its end."""
    failed = []

    def guarded(work):
        try:
            work()
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=guarded, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed, failed


def test_threads_that_overlap_run_their_own_clocks():
    one, other, step = Clock(), Clock(), threading.Barrier(2, timeout=60)

    def first():
        with running(one):
            step.wait()  # the other begins within the first
            step.wait()
            clock.mark(None, CPU)
            clock.mark("mask", CPU)
        step.wait()  # and goes on behind it

    def second():
        step.wait()
        with running(other):
            step.wait()
            step.wait()
            clock.mark(None, CPU)
            clock.mark("attention", CPU)

    in_threads(first, second)
    assert set(one.read()) == {"mask"}
    assert set(other.read()) == {"attention"}
    clock.mark(None, CPU)
    clock.mark("later", CPU)
    in_threads(lambda: clock.mark(None, CPU), lambda: clock.mark("later", CPU))
    assert "later" not in one.read().keys() | other.read().keys()


def test_laps_of_threads_on_one_clock_do_not_mix():
    one, step = Clock(), threading.Barrier(2, timeout=60)

    def long():
        with running(one):
            clock.mark(None, CPU)
            step.wait()
            step.wait()
            time.sleep(0.2)
            clock.mark("long", CPU)

    def short():
        with running(one):
            step.wait()
            clock.mark("none", CPU)  # it began no lap
            clock.mark("short", CPU)
            step.wait()
            time.sleep(0.2)

    in_threads(long, short)
    times = one.read()
    assert set(times) == {"long", "short"}
    assert times["short"] < 200 <= times["long"]


def test_a_thread_begins_without_its_parents_clock():
    one = Clock()

    def child():
        clock.mark(None, CPU)
        clock.mark("child", CPU)

    with running(one):
        in_threads(child)
    assert one.read() == {}


def test_an_error_stops_the_clock():
    one = Clock()

    def failing():
        with running(one):
            clock.mark(None, CPU)
            raise KeyError

    with pytest.raises(KeyError):
        failing()
    clock.mark("mask", CPU)
    one.mark("mask", CPU)  # the lap that the error ended has no end of its own
    assert one.read() == {}


def test_a_clock_that_ran_within_another_gives_back():
    outer, inner = Clock(), Clock()
    with running(outer):
        with pytest.raises(KeyError), running(inner):
            raise KeyError
        clock.mark(None, CPU)
        clock.mark("mask", CPU)
    assert set(outer.read()) == {"mask"}
    assert inner.read() == {}


@pytest.mark.gpu
def test_events_are_folded_and_copied():
    one, device = Clock(), torch.device("cuda")
    one.mark(None, device)
    for _ in range(600):
        torch.ones(1000, device=device).sum()
        one.mark("mask", device)
    assert len(one._laps) < 600
    assert 0 < copy.deepcopy(one).read()["mask"] == one.read()["mask"]
