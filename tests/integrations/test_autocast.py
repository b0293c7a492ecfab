# SPDX-License-Identifier: BSD-3-Clause
"""Models of float32 weights under autocast: rotary embeddings and norms promote queries and keys; attention casts."""

import pytest
import torch
import transformers
from models_harness import (
    BY_NAME,
    LENGTH,
    PADDED,
    SELECTIVE,
    assert_calls,
    assert_sparse_paths,
    build,
    make_cache,
    outputs,
    padding_mask,
    prefill,
    shared,
    tokens,
)
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

import sale_flex.integrations.transformers as sale_hf
from sale_flex import Mass, SaleConfig, sale_attention
from sale_flex.bench.model import capture

pytestmark = pytest.mark.usefixtures("uncompiled_attention")

CHUNKS = (64, 64, 32)
LOW = torch.bfloat16
OLD = tuple(int(part) for part in transformers.__version__.split(".")[:2]) < (5, 24)
NAMES = ("Llama", "Qwen3", "Mistral", "Gemma2", "Gemma3", "GptOss", "Llama4", "Qwen3Next")
LLAMA = BY_NAME["Llama"]


@pytest.fixture
def casting(monkeypatch):
    """Makes attn_implementation="sale_flex" cast by hand, where there is no autocast."""

    def cast(dtype, device="cpu"):
        def attend(module, query, key, value, mask, **options):
            with torch.autocast(device, enabled=False):
                low = (x.to(dtype) for x in (query, key, value))
                return sale_hf.sale_flex_forward(module, *low, mask, **options)

        AttentionInterface.register(sale_hf.NAME, attend)

    yield cast
    sale_hf.register()


def attention_dtypes(model):
    """Of what comes out of every layer's attention, filled when the model runs."""
    found = []
    for layer in sale_hf.attention_layers(model).values():
        layer.o_proj.register_forward_pre_hook(lambda _, args: found.append(args[0].dtype))
    return found


def ran(model, dtype, kind="dynamic", padding="left", device="cpu"):
    """Outputs of a prompt in chunks and two decoding steps under autocast."""
    ids, mask = tokens(length=LENGTH + 2).to(device), padding_mask(padding)
    mask = mask if mask is None else mask.to(device)
    with torch.autocast(device, dtype):
        return prefill(model, ids, mask, make_cache(kind, model), CHUNKS, decode=2)


def far(output, exact):
    """Root mean square distance of the tokens that are no padding in any row."""
    return (output.float() - exact.float())[:, PADDED:].square().mean().sqrt()


def assert_as_good(output, expected, exact):
    """Assert that attention's own rounding shows no more than dense attention's: the rule of `low_precision_budget`."""
    assert output.dtype == expected.dtype
    assert far(output, exact) <= 2 * far(expected, exact)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("name", NAMES)
def test_a_model_computes_what_it_does_with_attention_cast_by_hand(name, kind, casting):
    if kind == "static" and OLD:
        pytest.skip("static caches of this transformers take keys and values of one dtype alone")
    family = BY_NAME[name]
    model, other = (build(family, sale_hf.NAME) for _ in range(2))
    dtypes = attention_dtypes(model)
    output = ran(model, LOW, kind)
    assert_calls(model, family, sparse=len(CHUNKS), decode=2)
    assert_sparse_paths(model)
    assert set(dtypes) == {LOW}
    assert_as_good(output, ran(shared(family), LOW, kind), ran_exactly(family, kind))
    casting(LOW)
    assert torch.equal(output, ran(other, LOW, kind))


def ran_exactly(family, kind="dynamic"):
    model = shared(family)
    ids = tokens(length=LENGTH + 2)
    return prefill(model, ids, padding_mask("left"), make_cache(kind, model), CHUNKS, decode=2)


@pytest.mark.parametrize("name", ["Llama", "Gemma2"])
def test_float16(name):
    family = BY_NAME[name]
    model = build(family, sale_hf.NAME)
    dtypes = attention_dtypes(model)
    assert_as_good(ran(model, torch.float16), ran(shared(family), torch.float16), ran_exactly(family))
    assert set(dtypes) == {torch.float16}


@torch.no_grad()
def test_an_encoder():
    family = BY_NAME["Bert"]
    model = build(family, sale_hf.NAME)
    exact = prefill(shared(family), tokens())
    with torch.autocast("cpu", LOW):
        output, expected = (prefill(each, tokens()) for each in (model, shared(family)))
    assert_as_good(output, expected, exact)
    assert_calls(model, family, sparse=1)


@pytest.mark.parametrize("name", ["Llama", "Gemma2", "GptOss"])
@pytest.mark.parametrize("bias", [False, True], ids=["bool", "float"])
def test_a_mask_tensor_of_the_users(name, bias):
    family = BY_NAME[name]
    model = build(family, sale_hf.NAME)
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()[None, None].expand(2, 1, -1, -1)
    added = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)

    @torch.no_grad()
    def logits(model, mask):
        return outputs(model(tokens(), attention_mask=mask, use_cache=False))

    with torch.autocast("cpu", LOW):
        output, expected = logits(model, added if bias else mask), logits(shared(family), added)
    assert_as_good(output, expected, logits(shared(family), added))
    assert_calls(model, family, sparse=0, dense=1)


def test_an_observer_sees_what_attention_computes_with():
    model, seen = build(LLAMA, sale_hf.NAME, SELECTIVE), []

    def look(call):
        seen.append({call.query.dtype, call.key.dtype, call.value.dtype})
        # As a calibration does: its own arithmetic is none that autocast may round.
        assert (call.query.float() @ call.query.float().mT).dtype == torch.float32
        return sale_attention(call.query, call.key, call.value, SELECTIVE, **call.options)

    expected = ran(model, LOW)
    with sale_hf.observe(model, look):
        assert torch.equal(ran(model, LOW), expected)
    assert seen == [{LOW}] * 2 * len(CHUNKS)


def test_a_prompt_may_go_on_under_autocast_and_without():
    """Keys that were cached in float32 are cast; those of autocast's are promoted by the cache."""
    for under in ((False, False, False, True), (True, True, True, False)):
        config = SaleConfig(Mass(0.0), min_length=0, sink_tokens=0, local_tokens=1, smooth_tokens=32)
        results = []
        for model in (build(LLAMA, sale_hf.NAME, config), build(LLAMA, "sdpa")):
            cache, at = make_cache("dynamic", model), 0
            for step, autocast in zip((64, 64, 32, 40), under):
                with torch.no_grad(), torch.autocast("cpu", LOW, enabled=autocast):
                    result = prefill(model, tokens(length=200)[:, at : at + step], cache=cache)
                at += step
            results.append(result)
        exact = prefill(shared(LLAMA), tokens(length=200))[:, 160:]
        assert results[0].dtype == results[1].dtype
        assert (results[0] - exact).square().mean() <= 4 * (results[1] - exact).square().mean()


def test_a_region_without_autocast_inside_of_one_is_exact():
    model = build(LLAMA, sale_hf.NAME)
    with torch.autocast("cpu", LOW), torch.autocast("cpu", enabled=False):
        output = prefill(model, tokens())
    assert output.dtype == torch.float32
    assert torch.equal(output, prefill(model, tokens()))


def test_weights_of_mixed_dtypes_without_autocast_stay_an_error():
    model = build(LLAMA, sale_hf.NAME)
    query, key = (torch.randn(1, heads, 64, 32) for heads in (4, 2))
    with pytest.raises(TypeError, match=r"value must have the query's dtype torch\.float32, got torch\.bfloat16"):
        sale_hf.sale_flex_forward(sale_hf.attention_layers(model)[0], query, key, key.to(LOW), None)


def test_a_layer_that_nobody_configured():
    query, key = (torch.randn(1, heads, 64, 32) for heads in (4, 2))
    with torch.autocast("cpu", LOW):
        output, _ = sale_hf.sale_flex_forward(torch.nn.Module(), query, key, key.to(LOW), None)
        expected = scaled_dot_product_attention(query, key, key.to(LOW), is_causal=True, enable_gqa=True)
    assert torch.equal(output, expected.transpose(1, 2))


def test_gradients_of_a_dense_prompt_are_sdpas():
    grads = []
    for name in (sale_hf.NAME, "sdpa"):
        model = build(LLAMA, name, SaleConfig(min_length=10**6))
        with torch.autocast("cpu", LOW):
            output = outputs(model(tokens(), use_cache=False))
        output.float().square().mean().backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert grads[0].dtype == torch.float32
    assert torch.equal(*grads)


def test_captured_tensors_are_of_one_dtype():
    model = build(LLAMA, "sdpa")
    with torch.autocast("cpu", LOW):
        captured = capture(model, tokens(1), [0])[0]
    assert {captured.query.dtype, captured.key.dtype, captured.value.dtype} == {LOW}


# Queries, keys and values are cast before any mod: a plain model, and one with another step behind attention.
@pytest.mark.compiles
@pytest.mark.parametrize("name", ["Llama", "GptOss"])
def test_a_compiled_model(name):
    family = BY_NAME[name]
    model = build(family, sale_hf.NAME)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled.config = model.config
    exact = ran_exactly(family)[:, :LENGTH]
    for padding in ("left", "right"):
        mask = padding_mask(padding)
        with torch.autocast("cpu", LOW):
            output = prefill(compiled, tokens(length=LENGTH + 2)[:, :LENGTH], mask)
            expected = prefill(shared(family), tokens(length=LENGTH + 2)[:, :LENGTH], mask)
        if padding == "left":
            assert_as_good(output, expected, exact)
    assert_calls(model, family, sparse=2)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["Llama", "Qwen3", "Mistral", "Gemma2", "GptOss", "Llama4"])
def test_a_model_on_a_gpu_computes_what_it_does_with_attention_cast_by_hand(name, dtype, casting):
    family = BY_NAME[name]
    model, other = (build(family, sale_hf.NAME).cuda() for _ in range(2))
    dtypes = attention_dtypes(model)
    output = ran(model, dtype, device="cuda")
    assert_calls(model, family, sparse=len(CHUNKS), decode=2)
    assert set(dtypes) == {dtype}
    casting(dtype, "cuda")
    assert torch.equal(output, ran(other, dtype, device="cuda"))


@pytest.mark.gpu
@pytest.mark.compiles
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")
@pytest.mark.filterwarnings(r"ignore:\s*Online softmax is disabled")
@pytest.mark.parametrize("name", ["Llama", "GptOss"])
@torch.no_grad()
def test_a_compiled_model_on_a_gpu(name):
    family = BY_NAME[name]
    model, dense = build(family, sale_hf.NAME).cuda(), build(family).cuda()
    torch._dynamo.reset()
    compiled, ids = torch.compile(model, fullgraph=True), tokens().cuda()
    exact = prefill(dense, ids)
    with torch.autocast("cuda", LOW):
        output, expected = prefill(compiled, ids, use_cache=False), prefill(dense, ids)
    assert_as_good(output, expected, exact)
    assert_calls(model, family, sparse=1)
