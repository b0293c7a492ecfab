# SPDX-License-Identifier: BSD-3-Clause
"""What a mod may capture and return, and what the bridge knows of it."""

from typing import Any

import pytest
import torch
from compiler_harness import DEVICE, EPS, MARKS, apply_mod, assert_same, in_graph, in_torch, in_triton, scores
from torch import Tensor

from sale_flex.mods.compiler import conjunction, describe, facts, program, require_supported

pytestmark = MARKS

INF = float("inf")


class TestCaptures:
    @pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int8, torch.int16, torch.float16, torch.float64])
    def test_of_every_dtype_and_rank(self, dtype):
        generator = torch.Generator().manual_seed(1)
        sizes = (), (7,), (3, 7), (2, 3, 7), (2, 2, 3, 7)
        tables = [torch.randint(0, 2, size, generator=generator).to(DEVICE, dtype) for size in sizes]

        def mod(s: Tensor, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
            none, one, two, three, four = tables
            parts = none, one[kv % 7], two[h, q % 7], three[b, h, kv % 7], four[1, b, h, q % 7]
            return s + sum(part.float() * 2**i for i, part in enumerate(parts))

        assert_same(mod, scores(9, 20), rtol=2 * EPS, atol=16 * EPS, b=1, h=2)

    def test_indices_wrap_as_torchs_do(self):
        table = torch.arange(10.0, device=DEVICE)
        assert_same(lambda s, b, h, q, kv: table[q - 5] + table[-1 - kv], torch.zeros(10, 10, device=DEVICE), rtol=0)

    def test_indices_stay_inside(self):
        table = torch.arange(1.0, 11.0, device=DEVICE)[2:8]

        def mod(s: Tensor, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
            return table[q * 1000 - 3000] + table[kv * 2**20]

        score = torch.zeros(7, 3, device=DEVICE)
        for got in (in_graph(mod, "score", score), in_triton(mod, "score", score)):
            assert got.aminmax() == (3 + 3, 8 + 8)

    def test_of_no_elements_is_never_read(self):
        table = torch.empty(0, 5, device=DEVICE)
        described = describe(lambda s, b, h, q, kv: s + table[q, kv], "score")
        aux = program(described.key).arguments(described.tensors)
        assert [x if isinstance(x, int) else x.numel() for x in aux] == [1, 1, 5]

    def test_parts_and_turned_views_are_followed(self):
        table = torch.arange(24.0, device=DEVICE).view(2, 3, 4)

        def mod(s: Tensor, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
            turned = table.permute(2, 0, 1)[q, b]
            return table[b][h][q] + table[1, h][kv] * 100 + turned[h] * 1e4 + table[:, 1][b, q] + table.mT[0, q][h]

        assert_same(mod, torch.zeros(4, 4, device=DEVICE), rtol=0, b=1, h=2)
        described = describe(mod, "score")
        assert [x is table for x in described.tensors] == [True]

    def test_what_torch_makes_of_them_alone_is_left_to_torch(self):
        lengths = torch.tensor([3, 5], device=DEVICE)
        table = torch.arange(8.0, device=DEVICE)

        def mod(s: Tensor, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
            return s + table.flip(0).view(2, 4)[b, kv] * lengths.cumsum(0)[b] + lengths.max() + (table * 2).sum()

        assert_same(mod, scores(4, 4), rtol=2 * EPS, b=1)

    def test_that_are_not_contiguous_or_require_a_gradient(self):
        parameter = torch.nn.Parameter(torch.arange(40.0, device=DEVICE).view(8, 5).t())
        assert_same(lambda s, b, h, q, kv: s + parameter[q, kv], scores(5, 8), rtol=2 * EPS)
        assert not in_graph(lambda s, b, h, q, kv: s + parameter[q, kv], "score", scores(5, 8)).requires_grad

    def test_sizes_that_the_mod_reads_are_of_this_call(self):
        def make(table: Tensor) -> Any:
            return lambda b, h, q, kv: table[kv % len(table)] > table.shape[0] // 2

        for length in (4, 7, 4, 9):
            mod = make(torch.arange(length, device=DEVICE))
            score = torch.zeros(12, 12, device=DEVICE)
            expected = in_torch(mod, "mask", score)
            assert torch.equal(in_triton(mod, "mask", score), expected)
            assert torch.equal(in_graph(mod, "mask", score), expected)


class TestResults:
    @pytest.mark.parametrize("value", [True, False, 1, 0.0])
    def test_may_be_a_constant(self, value):
        score = scores(5, 20)
        for kind in ("mask", "score"):
            mod = (lambda b, h, q, kv: value) if kind == "mask" else (lambda s, b, h, q, kv: value)
            wanted = torch.full_like(score, float(value)).to(torch.bool if kind == "mask" else torch.float32)
            assert torch.equal(in_triton(mod, kind, score), wanted)
            assert torch.equal(in_graph(mod, kind, score), wanted)

    def test_of_a_mask_are_bool_whatever_it_returns(self):
        for mod in (lambda b, h, q, kv: (q - kv) & 3, lambda b, h, q, kv: (q - kv) * 0.5):
            expected = in_torch(mod, "mask", scores(9, 9))
            assert torch.equal(in_triton(mod, "mask", scores(9, 9)), expected)
            assert torch.equal(in_graph(mod, "mask", scores(9, 9)), expected)

    def test_of_a_range_are_two_integers(self):
        starts = torch.tensor([0, 0, 0, 3, 3], device=DEVICE)
        described = describe(lambda b, h, first, last: (starts[first] - 1, last // 2 + 2**20), "range")
        first, last = torch.arange(4, device=DEVICE), torch.arange(1, 5, device=DEVICE)
        got = program(described.key).evaluate(described.tensors, 0, 0, first, last)
        assert [x.dtype for x in got] == [torch.int32] * 2
        assert [x.tolist() for x in got] == [[-1, -1, -1, 2], [2**20, 2**20 + 1, 2**20 + 1, 2**20 + 2]]
        with pytest.raises(ValueError, match="must return integers"):
            describe(lambda b, h, first, last: (first / 2, last), "range")
        with pytest.raises(ValueError, match="must return 2"):
            describe(lambda b, h, first, last: first, "range")

    def test_of_one_column_cost_one_column(self):
        table = torch.arange(50, device=DEVICE)
        described = describe(lambda b, h, q, kv: table[q] > 3, "mask")
        found = program(described.key)
        assert found.evaluate(described.tensors, 0, 0, torch.arange(9, device=DEVICE)[:, None], table).shape == (9, 1)


def test_wrong_mods_are_the_callers_error():
    def two_arguments(q, kv):
        return q >= kv

    with pytest.raises(ValueError, match=r"the mask mod .*two_arguments must run on 0-d tensors.*TypeError"):
        describe(two_arguments, "mask")
    with pytest.raises(ValueError, match="must return 0-d tensors or numbers"):
        describe(lambda b, h, q, kv: None, "mask")


UNSUPPORTED = {
    "aten.lgamma": lambda t: lambda b, h, q, kv: torch.lgamma(q * 1.0) > kv,
    "Tensor.item": lambda t: lambda b, h, q, kv: q > t[0].item(),
    "Tensor.__bool__": lambda t: lambda b, h, q, kv: q >= kv if q > 3 else kv > 1,
    "Tensor.__index__": lambda t: lambda b, h, q, kv: [1, 2, 3][q] > kv,
    "several numbers made inside": lambda t: lambda b, h, q, kv: torch.tensor([1, 2])[q % 2] > kv,
    "aten.stack": lambda t: lambda b, h, q, kv: t[torch.stack([q, kv])].sum() > 1,
    "aten.add": lambda t: lambda b, h, q, kv: (t + q).sum() > 1,
    "the exponent 13": lambda t: lambda b, h, q, kv: q**13 > 2,
    "aten.rand": lambda t: lambda b, h, q, kv: torch.rand((), device=q.device) > 0.5,
    "dtype torch.complex64": lambda t: lambda b, h, q, kv: (q.to(torch.complex64) * 2 == 2) & (kv > 1),
}


@pytest.mark.parametrize("what", UNSUPPORTED)
def test_ops_outside_the_table_are_named(what):
    key = describe(UNSUPPORTED[what](torch.arange(20, device=DEVICE)), "mask").key
    assert facts(key).unsupported is not None
    for ask in (lambda: program(key).triton, lambda: program(key).evaluate([], 0, 0, 0, 0)):
        with pytest.raises(NotImplementedError, match="has no program"):
            ask()
    with pytest.raises(
        NotImplementedError, match=rf'(?s)^mask_mod uses .*({what}).*estimate_mods="ignore".*still applies'
    ):
        require_supported(key, "mask_mod")


TABLE = torch.arange(100)
SLOPES = torch.rand(4)

ROUGH = {
    "alibi": (False, lambda s, b, h, q, kv: s + SLOPES[h] * (kv - q)),
    "soft cap": (False, lambda s, b, h, q, kv: 20 * torch.tanh(s / 20)),
    "scaled": (False, lambda s, b, h, q, kv: s * 2),
    "scaled by row": (False, lambda s, b, h, q, kv: s * torch.log(q + 2.0)),
    "distance": (
        False,
        lambda s, b, h, q, kv: s - torch.log1p((q - kv).abs().float()) if False else s - (q - kv).abs(),
    ),
    "clamped distance": (False, lambda s, b, h, q, kv: s + 0.1 * torch.clamp(q - kv, -8, 8)),
    "wider integers": (False, lambda s, b, h, q, kv: s + (kv.long() - q) * 0.5),
    "squared": (False, lambda s, b, h, q, kv: s - ((q - kv) / 64) ** 2),
    "by head": (False, lambda s, b, h, q, kv: torch.where(h < 2, s, s + 0.01 * kv)),
    "by row and head": (False, lambda s, b, h, q, kv: torch.where(q % 2 == h, s, s * 2)),
    "constant": (False, lambda s, b, h, q, kv: 1.0),
    "table of distances": (True, lambda s, b, h, q, kv: s + TABLE[q - kv]),
    "table of keys": (True, lambda s, b, h, q, kv: s * TABLE[kv]),
    "hidden keys": (True, lambda s, b, h, q, kv: torch.where(kv < 5, s, -INF)),
    "by the score": (True, lambda s, b, h, q, kv: torch.where(s > 0, s, 2 * s)),
    "modulo": (True, lambda s, b, h, q, kv: s + (q - kv) % 7),
    "buckets": (True, lambda s, b, h, q, kv: s + (q - kv) // 16),
    "shifts": (True, lambda s, b, h, q, kv: s + (kv >> 4)),
    "bits": (True, lambda s, b, h, q, kv: s + (kv & 4)),
    "floor": (True, lambda s, b, h, q, kv: torch.floor(s)),
    "a comparison as a number": (True, lambda s, b, h, q, kv: s + (q == kv)),
    "rounded": (True, lambda s, b, h, q, kv: s + (kv * 0.1).int()),
}


@pytest.mark.parametrize("name", ROUGH)
def test_rough_scores_are_known(name):
    rough, mod = ROUGH[name]
    assert facts(describe(mod, "score").key).rough is rough


def test_rough_may_be_said():
    def mod(s, b, h, q, kv):
        return s + TABLE[kv]

    keys = [describe(mod, "score").key]
    for rough in (False, True, None):
        mod.rough = rough
        keys.append(describe(mod, "score").key)
    assert [facts(key).rough for key in keys] == [True, False, True, True]
    assert keys[0] == keys[2] == keys[3]
    mod.rough = "very"
    with pytest.raises(TypeError, match="rough must be True, False or None"):
        describe(mod, "score")


def test_arguments_that_are_read_are_known():
    read = {
        (False, False): lambda b, h, q, kv: q >= kv,
        (True, False): lambda b, h, q, kv: TABLE[b] > kv,
        (False, True): lambda b, h, q, kv: (h > 2) & (q > kv),
        (True, True): lambda b, h, q, kv: b + h > kv,
    }
    for wanted, mod in read.items():
        found = facts(describe(mod, "mask").key)
        assert (found.uses_batch, found.uses_head) == wanted


@pytest.mark.parametrize("constant", [None, True, False])
def test_conjunction_shows_what_both_show(constant):
    documents, limits = torch.tensor([0, 0, 1, 1, 1, 2, 2], device=DEVICE), torch.tensor([2, 4], device=DEVICE)

    def one(b, h, q, kv):
        return documents[q] == documents.flip(0)[kv]

    def other(b, h, q, kv):
        return (q - kv < limits.cumsum(0)[h]) * documents[kv] if constant is None else constant

    described = [describe(mod, "mask") for mod in (one, other)]
    both = program(conjunction(described[0].key, described[1].key))
    tensors = [*described[0].tensors, *described[1].tensors]
    score = torch.zeros(7, 7, device=DEVICE)
    expected = in_torch(one, "mask", score, h=1) & in_torch(other, "mask", score, h=1)
    q = torch.arange(7, device=DEVICE)
    assert torch.equal(both.evaluate(tensors, 0, torch.tensor(1, device=DEVICE), q[:, None], q).expand(7, 7), expected)
    out = torch.empty_like(score)
    apply_mod[1, 1](out, score, both.arguments(tensors), 0, 1, 7, 7, 16, "mask", both.triton)
    assert torch.equal(out.bool(), expected)
    assert both.uses_head == (constant is None)
