# SPDX-License-Identifier: BSD-3-Clause
"""What mods capture may have another size in every call, and attention is right for each."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention.flex_attention import create_block_mask

from sale_flex import Mass, SaleConfig, sale_attention
from sale_flex.flex import run as flex
from sale_flex.mods.compiler import describe, program, sized
from sale_flex.mods.compiler.sized import mod_tables
from sale_flex.testing import assert_attention_close

CONFIG = SaleConfig()
LENGTHS = (160, 320, 97, 480)

compile_cheaply = partial(torch.compile, backend="eager")


def same(ids: Tensor, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
    return ids[q] == ids[kv]


def beyond(ids: Tensor, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
    return ids[q + 150] == ids[kv]


class Documents:
    """Captures as an object's attribute: by a bound method, or as the object itself."""

    def __init__(self, length: int) -> None:
        self.ids = torch.arange(length) // 50

    def mask(self, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return self.ids[q] == self.ids[kv]

    __call__ = mask


def batch_rows(length: int) -> Any:
    ids = (torch.arange(2 * length) // 50).reshape(2, length)
    return lambda b, h, q, kv: ids[b, q] == ids[b, kv]


def two_ranks(length: int) -> Any:
    ids, shown = torch.arange(length) // 50, torch.arange(2 * length).reshape(2, length) % 7 != 3
    return lambda b, h, q, kv: (ids[q] == ids[kv]) & shown[b, kv] & (q - kv < length // 2)


def sizes_read(length: int) -> Any:
    ids = torch.arange(length) // 50
    return lambda b, h, q, kv: ids[q - ids.shape[0]] == ids.flip(0)[-1 - kv]


def nested(length: int) -> Any:
    inner = partial(same, torch.arange(length) // 50)
    return lambda b, h, q, kv, most=40: inner(b, h, q, kv) | (q - kv < most)


MASKS: dict[str, Callable[[int], Any]] = {
    "closure": lambda length: (lambda ids: lambda b, h, q, kv: ids[q] == ids[kv])(torch.arange(length) // 50),
    "partial": lambda length: partial(same, torch.arange(length) // 50),
    "bound method": lambda length: Documents(length).mask,
    "object": Documents,
    "batch rows": batch_rows,
    "two ranks and a number": two_ranks,
    "sizes read, ops on captures": sizes_read,
    "nested, with a default": nested,
}


def whole(mod: Any, length: int, scores: Tensor | None = None) -> Tensor:
    """A mod of every element, ``[2, 2, length, length]``."""
    places = [
        torch.arange(n).view([-1 if i == dim else 1 for i in range(4)]) for dim, n in enumerate((2, 2, length, length))
    ]
    value = mod(*places) if scores is None else mod(scores, *places)
    return value.expand(2, 2, length, length)


def tensors(length: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(length)
    return [torch.randn(2, 2, length, 32, generator=generator) for _ in range(3)]


def dense(inputs: list[Tensor], seen: Tensor, score_mod: Any = None) -> Tensor:
    query, key, value = (x.double() for x in inputs)
    scores = query @ key.mT * 32**-0.5
    if score_mod is not None:
        scores = whole(score_mod, query.shape[2], scores)
    return (scores.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num() @ value).float()


@pytest.fixture
def programs(monkeypatch) -> Any:
    """No program of other tests, and a count of those made here."""
    fresh = cache(flex._program.__wrapped__)
    monkeypatch.setattr(flex, "_program", fresh)
    return fresh


@pytest.mark.parametrize("make", MASKS.values(), ids=MASKS)
def test_a_mod_for_any_size_shows_the_same(make):
    for length in LENGTHS:
        mask = make(length)
        seen = torch.vmap(sized(mask, "mask").mod, (None, None, None, 0))
        seen = torch.vmap(seen, (None, None, 0, None))
        seen = torch.vmap(torch.vmap(seen, (None, 0, None, None)), (0, None, None, None))
        places = [torch.arange(n, dtype=torch.int32) for n in (2, 2, length, length)]
        from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

        with TransformGetItemToIndex():
            got = seen(*places)
        assert torch.equal(got, whole(mask, length))


@pytest.mark.parametrize(
    "make", [MASKS["closure"], MASKS["object"], batch_rows], ids=["closure", "object", "batch rows"]
)
def test_one_program_serves_all_sizes(make, programs, monkeypatch):
    monkeypatch.setattr(torch, "compile", compile_cheaply)
    for length in LENGTHS:
        sale_attention(*tensors(length), CONFIG, mask_mod=make(length), is_causal=False)
    assert programs.cache_info().currsize == 1


def test_the_op_of_captured_tensors():
    for make in (two_ranks, sizes_read):
        key, captured, _ = describe(make(160), "mask")
        torch.library.opcheck(torch.ops.sale_flex.mod_tables.default, (key, captured))
        *tables, sizes = mod_tables(key, captured)
        for table in tables:
            assert len(table) == 2**16
        assert sizes.tolist() == [size for x in program(key).graph.make_tables(captured) for size in x.shape]


def test_a_constant_index_is_followed_inside_torch_compile():
    def model(table):
        return describe(lambda b, h, q, kv: (table[3] > kv) | (table[99] < q), "mask").key

    table = torch.arange(100)
    assert torch.compile(model, fullgraph=True, backend="eager")(table) == model(table)


def test_tensors_of_one_size_are_captured_as_they_are():
    table = torch.arange(9)
    torch._dynamo.mark_static(table)
    mod = lambda b, h, q, kv: table[q % 9] > kv  # noqa: E731
    assert sized(mod, "mask").mod is mod
    offset = torch.tensor(3)
    mod = lambda b, h, q, kv: q + offset > kv  # noqa: E731
    assert sized(mod, "mask").mod is mod


def test_a_bias_that_wants_a_gradient_is_captured_as_it_is():
    bias = torch.zeros(9, requires_grad=True)
    mod = lambda score, b, h, q, kv: score + bias[kv % 9]  # noqa: E731
    assert sized(mod, "score").mod is mod
    with torch.no_grad():
        assert sized(mod, "score").mod is not mod


class TestOnInductor:
    """The kernels themselves: torch's C++ template is what confuses sizes."""

    def test_masks_and_scores(self, programs):
        for length in LENGTHS:
            ids, bias, table = torch.arange(length) // 50, torch.randn(2, length), torch.randn(5)

            def mask(b, h, q, kv, ids=ids):
                return ids[q] == ids[kv]

            def score(s, b, h, q, kv, bias=bias, table=table):
                return s + bias[h, kv] * table[(q - kv) % 5]

            inputs = tensors(length)
            output = sale_attention(*inputs, CONFIG, mask_mod=mask, score_mod=score, is_causal=False)
            torch.testing.assert_close(output, dense(inputs, whole(mask, length), score), atol=2e-5, rtol=1e-5)
        assert programs.cache_info().currsize == 1

    def test_a_block_mask_of_the_users_and_objects(self, programs):
        for length in LENGTHS[:3]:
            inputs = tensors(length)
            mask = MASKS["closure"](length)
            block_mask = create_block_mask(mask, None, None, length, length, device="cpu", BLOCK_SIZE=64)
            mine = Documents(length)
            output = sale_attention(*inputs, CONFIG, block_mask=block_mask, mask_mod=mine, is_causal=False)
            assert_attention_close(output, *inputs, whole(mask, length))
        assert programs.cache_info().currsize == 1

    def test_a_mod_that_the_bridge_can_not_follow_has_a_program_per_size(self, programs):
        for length in (160, 320):
            ids = torch.arange(length) // 50

            def mask(b, h, q, kv, ids=ids):
                return (ids[q] == ids[kv]) & (torch.lgamma(ids[q] + 1.0) > -1)

            inputs = tensors(length)
            output = sale_attention(*inputs, CONFIG, mask_mod=mask, is_causal=False, estimate_mods="ignore")
            assert_attention_close(output, *inputs, whole(mask, length))
        assert programs.cache_info().currsize == 2

    def test_inside_a_callers_program(self):
        project = torch.eye(32)

        def layer(query, key, value, ids):
            twice = ids * 2

            def mask(b, h, q, kv):
                return (ids[q] == ids[kv]) & (twice[q] >= twice[kv])

            return sale_attention(query, key, value, CONFIG, mask_mod=mask, is_causal=False) @ project

        counter = CompileCounterWithBackend("inductor")
        compiled = torch.compile(layer, fullgraph=True, backend=counter)
        for length in LENGTHS:
            inputs, ids = tensors(length), torch.arange(length) // 50
            seen = (ids[:, None] == ids).expand(2, 2, length, length)
            assert_attention_close(compiled(*inputs, ids), *inputs, seen)
        assert counter.frame_count <= 2

    def test_an_index_out_of_bounds_is_an_error_as_ever(self):
        for length in (160, 200):
            ids = torch.arange(length) // 50
            with pytest.raises(Exception, match="out of bounds"):
                sale_attention(*tensors(length), CONFIG, mask_mod=partial(beyond, ids), is_causal=False)


@pytest.mark.gpu
def test_captured_sizes_change_on_a_gpu_too():
    config = SaleConfig(Mass(0.0), min_length=0)
    for length in LENGTHS:
        ids = torch.arange(length, device="cuda") // 50
        inputs = [torch.randn(1, 2, length, 32, generator=torch.Generator().manual_seed(n)) for n in range(3)]
        on_gpu = (x.cuda() for x in inputs)
        output = sale_attention(
            *on_gpu, config, mask_mod=lambda b, h, q, kv, ids=ids: ids[q] == ids[kv], is_causal=False
        )
        assert_attention_close(output.cpu(), *inputs, (ids[:, None] == ids).cpu()[None, None])
