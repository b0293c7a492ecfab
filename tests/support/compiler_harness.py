# SPDX-License-Identifier: BSD-3-Clause
"""Runs a mod in three ways: in torch as flex_attention does, by the bridge's graph, and by its Triton function."""

from typing import Any

import pytest
import torch
from torch import Tensor

from sale_flex.mods.compiler import describe, program, require_supported

triton = pytest.importorskip("triton", reason="mods become Triton functions, and triton is not installed")
tl = pytest.importorskip("triton.language")

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
MARKS = [pytest.mark.gpu] if HAS_GPU else []
"""The same tests check compiled functions where there is a GPU, and interpreted ones elsewhere."""

EPS = torch.finfo(torch.float32).eps
TANH = 2**-10.9 if HAS_GPU else 1e-6
"""Relative error of tanh: of the GPU's instruction (PTX ISA), and of the series for the interpreter."""


@triton.jit
def apply_mod(out, score, AUX, b, h, q_len, kv_len, BLOCK: tl.constexpr, KIND: tl.constexpr, MOD: tl.constexpr):
    q = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[:, None]
    kv = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = (q < q_len) & (kv < kv_len)
    place = q.to(tl.int64) * kv_len + kv
    q, kv = tl.minimum(q, q_len - 1), tl.minimum(kv, kv_len - 1)
    if KIND == "score":
        value = MOD(tl.load(score + place, mask=inside, other=0.0), b, h, q, kv, AUX)
    else:
        value = MOD(b, h, q, kv, AUX).to(tl.float32)
    tl.store(out + place, tl.zeros([BLOCK, BLOCK], tl.float32) + value, mask=inside)


def in_triton(mod: Any, kind: str, score: Tensor, b: int = 0, h: int = 0) -> Tensor:
    described = describe(mod, kind)
    require_supported(described.key, f"{kind}_mod")
    found = program(described.key)
    out = torch.empty_like(score)
    grid = tuple(-(-size // 16) for size in score.shape)
    apply_mod[grid](out, score, found.arguments(described.tensors), b, h, *score.shape, 16, kind, found.triton)
    return out if kind == "score" else out.bool()


def in_graph(mod: Any, kind: str, score: Tensor, b: int = 0, h: int = 0) -> Tensor:
    described = describe(mod, kind)
    heads = torch.tensor([[h]], device=score.device)
    q, kv = (torch.arange(size, device=score.device) for size in score.shape)
    given = [score] if kind == "score" else []
    result = program(described.key).evaluate(described.tensors, *given, b, heads, q[:, None], kv)
    assert result.dtype == (torch.float32 if kind == "score" else torch.bool)
    return result.expand(score.shape)


def in_torch(mod: Any, kind: str, score: Tensor, b: int = 0, h: int = 0) -> Tensor:
    """The mod as flex_attention runs it: on scalars, by vmap."""
    from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

    scalars = [torch.tensor(x, dtype=torch.int32, device=score.device) for x in (b, h)]

    def scalar_mod(s: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        value = mod(s, *scalars, q, kv) if kind == "score" else mod(*scalars, q, kv)
        return torch.as_tensor(value, device=score.device)

    q, kv = (torch.arange(size, dtype=torch.int32, device=score.device) for size in score.shape)
    with TransformGetItemToIndex():
        values = torch.vmap(torch.vmap(scalar_mod, (0, None, 0)), (0, 0, None))(score, q, kv)
    return values.to(torch.float32 if kind == "score" else torch.bool)


def scores(q_len: int, kv_len: int) -> Tensor:
    return torch.randn(q_len, kv_len, generator=torch.Generator().manual_seed(0), device="cpu").to(DEVICE) * 3


def assert_same(mod: Any, score: Tensor, rtol: float, atol: float = 0.0, **where: int) -> None:
    expected = in_torch(mod, "score", score, **where)
    for got in (in_graph(mod, "score", score, **where), in_triton(mod, "score", score, **where)):
        torch.testing.assert_close(got, expected, rtol=rtol, atol=atol, equal_nan=True)
