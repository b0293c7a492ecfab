# SPDX-License-Identifier: BSD-3-Clause
"""Inside torch.compile(fullgraph=True) a mod has the program that it has outside, and new values need no new graph."""

import functools
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.nn.attention.flex_attention import and_masks, create_block_mask, flex_attention

from sale_flex.mods.compiler import conjunction, describe, facts, program, require_supported

WINDOW = 4
DOCUMENTS = torch.arange(20) // 5

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torch")


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Compiled:
    """A function as it is and compiled, which must agree; `graphs` counts compilations."""

    def __init__(self, function: Any, dynamic: bool | None = None) -> None:
        self.counter = CompileCounter()
        self.function = function
        self.compiled = torch.compile(function, fullgraph=True, backend=self.counter, dynamic=dynamic)

    def __call__(self, *args: Any) -> str:
        key, tensors = self.compiled(*args)
        expected, wanted = self.function(*args)
        assert key == expected
        assert [torch.equal(x, y) for x, y in zip(tensors, wanted)] == [True] * len(tensors) == [True] * len(wanted)
        return key

    @property
    def graphs(self) -> int:
        return self.counter.frame_count


def described(mod: Any, kind: str = "mask") -> tuple[str, list[Tensor]]:
    """The key, and the captured tensors changed a little, so that they must be inputs of the graph."""
    found = describe(mod, kind)
    assert facts(found.key).kind == kind
    return found.key, [x * 1 for x in found.tensors]


def near(q: Tensor, kv: Tensor) -> Tensor:
    return q - kv < WINDOW


def documents(table: Tensor, number: Any = 3) -> Any:
    return lambda b, h, q, kv: (table[q] == table[kv]) & (q - kv < number)


@pytest.mark.parametrize("dynamic", [None, True])
class TestMadeOutside:
    def test_new_tensors_need_no_new_graph(self, dynamic):
        ask = Compiled(lambda x, mod: described(mod), dynamic)
        for fill in (1, 2, 3):
            ask(torch.ones(3), documents(torch.full((20,), fill)))
        assert ask.graphs == 1
        for size in (21, 22, 23, 500):
            ask(torch.ones(3), documents(torch.arange(size)))
        assert ask.graphs == (1 if dynamic else 2)

    @pytest.mark.parametrize(
        "numbers",
        [(3, 4, 5, -6, 1, 0), (3.5, 4.5, -1.25, 1.0, 0.0, math.inf), (True, False)],
        ids=["int", "float", "bool"],
    )
    def test_changed_numbers_change_the_key(self, dynamic, numbers):
        ask = Compiled(lambda x, mod: described(mod), dynamic)
        table = torch.arange(20)
        keys = [ask(torch.ones(3), documents(table, number)) for number in (*numbers, *numbers)]
        assert keys[: len(numbers)] == keys[len(numbers) :]
        assert len(set(keys)) == ask.graphs == len(numbers)

    def test_mods_that_call_mods(self, dynamic):
        ask = Compiled(lambda x, mod: described(mod), dynamic)
        for size in (10, 11, 12):
            ask(torch.ones(3), and_masks(documents(torch.arange(size)), documents(torch.arange(size) // 2, 5)))
        assert ask.graphs <= 2
        before = ask.graphs
        ask(torch.ones(3), and_masks(documents(torch.arange(size)), documents(torch.arange(size) // 2, 6)))
        assert ask.graphs == before + 1

    def test_partial_functions_and_defaults(self, dynamic):
        def of_table(t, b, h, q, kv, *, n):
            return (t[q] == t[kv]) & (q - kv < n)

        def make(table, number):
            def mod(b, h, q, kv, table=table, *, number=number):
                return (table[q] == table[kv]) & (q - kv < number)

            return mod

        for maker in (make, lambda table, number: functools.partial(of_table, table, n=number)):
            ask = Compiled(lambda x, mod: described(mod), dynamic)
            keys = [ask(torch.ones(3), maker(torch.arange(9) + n, n)) for n in (2, 3, 2)]
            assert keys[0] == keys[2] != keys[1]


class TestGuards:
    def test_of_globals(self, monkeypatch):
        def mod(b, h, q, kv):
            return near(q, kv) & (DOCUMENTS[q] == DOCUMENTS[kv])

        ask = Compiled(lambda x: described(mod))
        first = ask(torch.ones(3))
        monkeypatch.setitem(globals(), "DOCUMENTS", torch.arange(20) // 3)
        assert ask(torch.ones(3)) == first
        monkeypatch.setitem(globals(), "WINDOW", 7)
        second = ask(torch.ones(3))
        assert second != first
        monkeypatch.setitem(globals(), "near", lambda q, kv: q > kv)
        assert ask(torch.ones(3)) not in (first, second)

    def test_of_functions_that_capture_nothing(self):
        def make(inner):
            return lambda b, h, q, kv: inner(q, kv)

        ask = Compiled(lambda x, mod: described(mod))
        keys = [ask(torch.ones(3), make(inner)) for inner in (lambda q, kv: q > kv, lambda q, kv: q < kv)]
        assert keys[0] != keys[1]

    def test_of_sizes_that_the_mod_reads(self):
        def make(table):
            return lambda b, h, q, kv: table[kv % table.shape[0]] > q

        for dynamic in (None, True):
            ask = Compiled(lambda x, mod: described(mod), dynamic)
            keys = [ask(torch.ones(3), make(torch.arange(size))) for size in (5, 7, 9, 5)]
            assert len(set(keys)) == 3
            assert keys[0] == keys[3]

    def test_of_the_override(self):
        def mod(s, b, h, q, kv):
            return s + DOCUMENTS[kv]

        def ask(x):
            found = describe(mod, "score")
            return x + 1 if facts(found.key).rough else x - 1

        mod.rough = True
        compiled = torch.compile(ask, fullgraph=True, backend="eager")
        assert compiled(torch.zeros(1)) == 1
        mod.rough = False
        assert compiled(torch.zeros(1)) == -1


def test_attributes_of_masks_and_block_masks_are_reached():
    mask = documents(torch.arange(256) // 7)
    starts = torch.arange(256) // 7 * 7
    mask.key_range = lambda b, h, first, last: (starts[first], last)
    block_mask = create_block_mask(mask, None, None, 256, 256, device="cpu")
    Compiled(lambda x, block_mask: described(block_mask.mask_mod))(torch.ones(3), block_mask)
    Compiled(lambda x, block_mask: described(block_mask.mask_mod.key_range, "range"))(torch.ones(3), block_mask)


def test_conjunctions_and_facts_are_constants():
    def ask(one, other):
        keys = [describe(mod, "mask").key for mod in (one, other)]
        both = conjunction(*keys)
        require_supported(both, "mask_mod")
        x = torch.zeros(1)
        return both, [x + 1 if facts(both).uses_head else x]

    compiled = Compiled(ask)
    compiled(documents(torch.arange(9)), documents(torch.arange(5)))
    compiled(documents(torch.arange(9)), lambda b, h, q, kv: h > 2)
    assert compiled.graphs == 2


class TestMadeInside:
    @pytest.mark.parametrize("dynamic", [None, True])
    def test_new_tensors_need_no_new_graph_and_numbers_a_new_key(self, dynamic):
        def ask(table, number, factor):
            def mod(s, b, h, q, kv):
                return s * factor + table[kv] * number + near(q, kv)

            return described(mod, "score")

        compiled = Compiled(ask, dynamic)
        for size in (5, 6, 7, 8):
            compiled(torch.arange(size), 3, 2.5)
        assert compiled.graphs <= 2
        keys = [compiled(torch.arange(8), *numbers) for numbers in ((4, 2.5), (5, 2.5), (5, 3.5), (5, 4.5), (3, 2.5))]
        assert len(set(keys)) == 5

    def test_from_mods_of_all_kinds(self):
        def ask(table, outside, flag):
            def own(i):
                return table[i]

            def mod(b, h, q, kv, *, least=0):
                for part in parts:
                    flagged = part(b, h, q, kv) if flag is None else flag
                return (own(q) > least) & flagged & (DOCUMENTS[q] == DOCUMENTS[kv]) & near(q, kv) & (q + some[0] > kv)

            parts = (outside, outside)
            some = [3, None, "text", 1.5]
            return described(mod)

        compiled = Compiled(ask)
        first = compiled(torch.arange(9), documents(torch.arange(5)), None)
        assert compiled(torch.arange(9) + 1, documents(torch.arange(5) + 1), None) == first
        assert compiled.graphs == 1
        assert compiled(torch.arange(9), documents(torch.arange(5), 7), None) != first
        assert len({first, compiled(torch.arange(9), documents(torch.arange(5)), True)}) == 2

    def test_that_capture_nothing(self):
        Compiled(lambda x: described(lambda b, h, q, kv: (q >= kv) & near(q, kv)))(torch.ones(3))

    def test_that_read_sizes(self):
        def ask(table):
            def mod(b, h, q, kv):
                return table[kv % table.shape[0]] > q

            return described(mod)

        for dynamic in (None, True):
            compiled = Compiled(ask, dynamic)
            assert len({compiled(torch.arange(size)) for size in (5, 7, 9)}) == 3

    def test_with_a_key_range_beside_them(self):
        def ask(table):
            def mod(b, h, q, kv):
                return table[q] <= kv

            def key_range(b, h, first, last):
                return table[first], last

            mod.key_range = key_range
            one, two = describe(mod, "mask"), describe(mod.key_range, "range")
            return one.key + two.key, [*one.tensors, *two.tensors]

        Compiled(ask)(torch.arange(5))

    def test_by_torchs_own_factories(self):
        def ask(table, number):
            return described(and_masks(documents(table, number), lambda b, h, q, kv: q >= kv))

        compiled = Compiled(ask)
        keys = [compiled(torch.arange(size), number) for size, number in ((5, 3), (6, 3), (7, 3), (7, 4), (7, 5))]
        assert keys[0] == keys[1] == keys[2]
        assert len(set(keys)) == 3

    def test_with_defaults(self):
        def ask(table, number):
            def mod(b, h, q, kv, least=3, *, most=7):
                return (table[q] > least) & (kv < most)

            return described(mod)

        Compiled(ask)(torch.arange(5), 3)


@pytest.mark.parametrize("where", ["inside", "outside"])
@pytest.mark.parametrize("order", ["described first", "described last"])
def test_flex_attention_runs_the_mods_that_were_described(where, order):
    def ask(q, table, mod):
        if where == "inside":
            mod = documents(table, 50)
        first = describe(mod, "mask").key if order == "described first" else None
        block_mask = create_block_mask(mod, None, None, q.shape[2], q.shape[2], device="cpu")
        out = flex_attention(q, q, q, block_mask=block_mask)
        found = describe(block_mask.mask_mod, "mask")
        assert first in (None, found.key)
        return out, [x * 1 for x in found.tensors]

    q = torch.randn(1, 2, 128, 16, generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(ask, fullgraph=True, backend="eager")
    for width in (9, 13):
        table = torch.arange(128) // width
        out, tensors = compiled(q, table, documents(table, 50))
        expected = torch.nn.functional.scaled_dot_product_attention(q, q, q, table[:, None] == table)
        torch.testing.assert_close(out, expected)
        assert [x.tolist() for x in tensors] == [table.tolist()]


class TestRefused:
    def test_objects_that_torch_can_not_watch(self):
        class Owner:
            number = 3

            def __call__(self, b, h, q, kv):
                return q > kv + self.number

        def outside(b, h, q, kv):
            return q > kv + owner.number

        owner = Owner()
        asked = (
            lambda x, mod: described(outside),
            lambda x, mod: described(lambda b, h, q, kv: q > kv + owner.number),
            lambda x, mod: described(mod),
        )
        for ask in asked:
            with pytest.raises(
                Exception, match=r"captures an object of type .*Owner, .*Capture the tensors and numbers"
            ):
                Compiled(ask)(torch.ones(3), owner)

    def test_ops_outside_the_table(self):
        def ask(x, mod):
            require_supported(describe(mod, "mask").key, "mask_mod")
            return x

        with pytest.raises(Exception, match=r'mask_mod uses aten\.lgamma.*estimate_mods="ignore"'):
            torch.compile(ask, fullgraph=True, backend="eager")(
                torch.ones(3), lambda b, h, q, kv: torch.lgamma(q / 2) > kv
            )

    def test_mods_that_do_not_run(self):
        with pytest.raises(Exception, match=r"ValueError: the mask mod .* must run on 0-d tensors"):
            Compiled(lambda x, mod: described(mod))(torch.ones(3), lambda q, kv: q > kv)


def test_what_is_found_inside_is_found_again_outside():
    def ask(x, mod):
        return describe(mod, "mask").key

    mod = documents(torch.arange(5), 12)
    key = torch.compile(ask, fullgraph=True, backend="eager")(torch.ones(3), mod)
    assert describe(mod, "mask").key == key
    assert program(key).evaluate([torch.arange(5)], 0, 0, torch.arange(5), torch.arange(5)).all()
