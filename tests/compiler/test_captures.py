# SPDX-License-Identifier: BSD-3-Clause
"""A mod is known by its code and by what it captures, and found again without running it."""

import functools
import math
import types
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import and_masks, or_masks

from sale_flex.mods.compiler import describe, identity, program, recognise

WINDOW = 4
DOCUMENTS = torch.arange(20) // 5


def near(q: Tensor, kv: Tensor) -> Tensor:
    return q - kv < WINDOW


@pytest.fixture
def traces(monkeypatch):
    """Counts how often a mod is traced, with nothing known at first."""
    counted: list[Any] = []

    def trace(mod, *args):
        counted.append(mod)
        return real(mod, *args)

    real = recognise.trace
    monkeypatch.setattr(recognise, "trace", trace)
    monkeypatch.setattr(recognise, "_memo", {})
    return counted


def shown(mod: Any, size: int = 20) -> Tensor:
    """What a mask shows, by its program."""
    described = describe(mod, "mask")
    index = torch.arange(size)
    return program(described.key).evaluate(described.tensors, 0, 0, index[:, None], index).expand(size, size)


def by_closure(table, number):
    return lambda b, h, q, kv: (table[q] == table[kv]) & (q - kv < number)


def by_default(table, number):
    def mod(b, h, q, kv, table=table, *, number=number):
        return (table[q] == table[kv]) & (q - kv < number)

    return mod


def by_partial(table, number):
    return functools.partial(lambda t, b, h, q, kv, n: (t[q] == t[kv]) & (q - kv < n), table, n=number)


def by_container(table, number):
    kept = {"table": [table], "numbers": (number, "unused", None, torch.int32)}
    return lambda b, h, q, kv: (kept["table"][0][q] == kept["table"][0][kv]) & (q - kv < kept["numbers"][0])


def by_inner_function(table, number):
    def document(i):
        return table[i]

    return lambda b, h, q, kv: (document(q) == document(kv)) & (q - kv < number)


def by_torchs_masks(table, number):
    same, close = (lambda b, h, q, kv: table[q] == table[kv]), (lambda b, h, q, kv: q - kv < number)
    return and_masks(same, or_masks(close, close))


class Owner:
    def __init__(self, table, number):
        self.table = table
        self.number = number

    def mask(self, b, h, q, kv):
        return (self.table[q] == self.table[kv]) & (q - kv < self.number)

    def __call__(self, b, h, q, kv):
        return self.mask(b, h, q, kv)


KNOWN = [by_closure, by_default, by_partial, by_container, by_inner_function, by_torchs_masks]
OPAQUE = [lambda table, number: Owner(table, number).mask, Owner, lambda *a: lambda *i: Owner(*a).mask(*i)]


@pytest.mark.parametrize("make", KNOWN)
def test_new_values_need_no_trace(make, traces):
    keys = set()
    for step in range(1, 6):
        table = torch.arange(15 + step) // step
        described = describe(make(table, 3), "mask")
        assert [x is table for x in described.tensors] == [True]
        keys.add(described.key)
        assert torch.equal(shown(make(table, 3), 15), shown(by_closure(table, 3), 15))
    assert len(keys) == 1
    assert len({id(mod.__code__) for mod in traces if isinstance(mod, types.FunctionType)}) <= 2
    assert len(traces) == (1 if make is by_closure else 2)


@pytest.mark.parametrize("make", KNOWN + OPAQUE)
def test_numbers_are_part_of_the_program(make):
    table = torch.arange(20) // 5
    for number in (3, 5, -2, 3, 3.5, True, math.inf):
        index = torch.arange(20)
        expected = (table[:, None] == table) & (index[:, None] - index < number)
        assert torch.equal(shown(make(table, number)), expected)


@pytest.mark.parametrize("make", OPAQUE)
def test_what_is_not_understood_is_looked_at_every_time(make, traces):
    mod = make(torch.arange(20) // 5, 3)
    first = shown(mod)
    assert torch.equal(first, shown(mod))
    assert len(traces) == 2


@pytest.mark.parametrize("make", [by_closure, by_torchs_masks])
def test_kinds_of_tensors_are_part_of_the_program(make, traces):
    tables = torch.arange(20), torch.arange(20).int(), torch.arange(20.0), torch.nn.Parameter(torch.arange(20.0))
    keys = [describe(make(table, 3), "mask").key for table in tables]
    assert keys[2] == keys[3]
    assert len(set(keys)) == 3
    assert len(traces) == 3


def test_globals_are_looked_up_every_time(monkeypatch, traces):
    def mod(b, h, q, kv):
        return near(q, kv) & (DOCUMENTS[q] == DOCUMENTS[kv])

    def make():
        return (lambda: lambda b, h, q, kv: DOCUMENTS[q] > kv)()

    before = shown(mod), shown(make())
    monkeypatch.setitem(globals(), "DOCUMENTS", torch.arange(20) // 3)
    after = shown(mod), shown(make())
    assert len(traces) == 2
    index = torch.arange(20)
    distance = index[:, None] - index
    for (ours, other), width in ((before, 5), (after, 3)):
        documents = index // width
        assert torch.equal(ours, (distance < 4) & (documents[:, None] == documents))
        assert torch.equal(other, documents[:, None] > index)
    monkeypatch.setitem(globals(), "WINDOW", 7)
    assert torch.equal(shown(mod), (distance < 7) & (documents[:, None] == documents))
    monkeypatch.setitem(globals(), "near", lambda q, kv: q > kv)
    assert torch.equal(shown(mod), (distance > 0) & (documents[:, None] == documents))


def test_one_tensor_twice_is_not_two_tensors(traces):
    def make(one, other):
        return lambda b, h, q, kv: one[q] > other[kv]

    table = torch.arange(20)
    once, twice = make(table, table), make(table, table.flip(0))
    assert [len(describe(mod, "mask").tensors) for mod in (once, twice, make(table, table))] == [1, 2, 1]
    assert not torch.equal(shown(once), shown(twice))
    assert len(traces) == 2


def test_sizes_are_looked_at_only_where_the_mod_does(traces):
    def make(table):
        return lambda b, h, q, kv: table[kv % table.shape[0]] > q

    for size in (5, 7, 5, 7, 5):
        table = torch.arange(size)
        index = torch.arange(20)
        assert torch.equal(shown(make(table)), table[index % size] > index[:, None])
    assert len(traces) == 2


def test_the_default_dtype_matters(traces):
    def mod(s, b, h, q, kv):
        return q / 3 + torch.tensor(0.1)

    keys = [describe(mod, "score").key]
    torch.set_default_dtype(torch.float64)
    try:
        keys.append(describe(mod, "score").key)
    finally:
        torch.set_default_dtype(torch.float32)
    assert keys[0] != keys[1]
    assert describe(mod, "score").key == keys[0]


def test_functions_that_hold_themselves_do_not_hang():
    def mod(b, h, q, kv):
        return cell[0](q, kv) if kept else mod(b, h, q, kv)

    kept: list[Any] = [1]
    kept.append(kept)
    cell = [lambda q, kv: q > kv]
    cell.append(mod)
    table = {"self": kept}
    kept.append(table)
    assert shown(mod).sum() == 190
    assert identity(mod) == identity(mod)


def test_empty_cells_are_harmless():
    def outer():
        mod = lambda b, h, q, kv: q > kv if True else late  # noqa: E731
        described = describe(mod, "mask")
        late = 3
        return described, late

    assert outer()[0].tensors == []


def test_same_code_is_the_same_program_everywhere():
    one, other = (lambda b, h, q, kv: q >= kv), (lambda b, h, q_idx, kv_idx: q_idx >= kv_idx)
    assert describe(one, "mask").key == describe(other, "mask").key
    assert identity(one) != identity(other)


def test_identities_tell_code_and_numbers_apart_but_not_values():
    table = torch.arange(20)
    base = identity(by_closure(table, 3))
    assert hash(base) == hash(identity(by_closure(torch.arange(9), 3)))
    assert base == identity(by_closure(torch.arange(9), 3))
    assert base == describe(by_closure(table, 3), "mask").identity
    others = [by_closure(table, 4), by_closure(table, 3.0), by_closure(table.int(), 3), by_closure(table[None], 3)]
    assert all(base != identity(mod) for mod in [*others, by_default(table, 3)])
    assert identity(None) is None
    one, other = Owner(table, 3), Owner(table, 3)
    assert identity(one) == identity(one) != identity(other)


def test_a_known_mod_is_found_in_microseconds():
    import timeit

    mod = by_torchs_masks(torch.arange(20), 3)
    describe(mod, "mask")
    seconds = min(timeit.repeat(lambda: describe(mod, "mask"), number=100, repeat=5)) / 100
    assert seconds < 500e-6  # it is some 20; a trace takes milliseconds


def test_the_memo_is_bounded(monkeypatch, traces):
    monkeypatch.setattr(recognise, "_MEMO_SIZE", 10)
    for number in range(25):
        describe(lambda b, h, q, kv, number=number: q > kv + number, "mask")
    assert len(recognise._memo) <= 11
