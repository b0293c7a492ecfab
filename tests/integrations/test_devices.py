# SPDX-License-Identifier: BSD-3-Clause
"""Where a layer runs is where its counts and thresholds are: offloaded, not loaded yet, moved; and inference mode."""

from contextlib import nullcontext

import pytest
import torch
import transformers
from models_harness import (
    BY_NAME,
    EVERYTHING,
    LAYERS,
    LENGTH,
    SELECTIVE,
    assert_calls,
    assert_close,
    build,
    make_cache,
    prefill,
    shared,
    tokens,
)

import sale_flex.integrations.transformers as sale_hf
from sale_flex import Mass, SaleConfig
from sale_flex.integrations.transformers.layers import layer_states

pytestmark = pytest.mark.usefixtures("uncompiled_attention")

LLAMA = BY_NAME["Llama"]
PER_HEAD = SaleConfig(
    Mass(torch.tensor([0.3, 0.1, 0.2, 0.0])), min_length=0, sink_tokens=16, local_tokens=32, smooth_tokens=64
)
CONFIGS = pytest.mark.parametrize("config", [SELECTIVE, PER_HEAD], ids=["a number", "per head"])
LONG = 500

PARTS = ("model.embed_tokens", "model.rotary_emb", "model.layers.0", "model.layers.1", "model.norm", "lm_head")
MAPS = {
    "a layer on disk": dict.fromkeys(PARTS, "cpu") | {"model.layers.1": "disk"},
    "all layers on disk": dict.fromkeys(PARTS, "cpu") | {"model.layers.0": "disk", "model.layers.1": "disk"},
    "everything on disk": {"": "disk"},
}


def expected_of(config):
    """Outputs and counts of a model that is where it is from the start."""
    model = build(LLAMA, sale_hf.NAME, config)
    return prefill(model, tokens(length=LONG)), sale_hf.stats(model)


def assert_runs_as(model, expected):
    """Assert outputs, counts, and counts again from 0."""
    output, counted = expected
    before = sale_hf.stats(model)
    assert all(layer.sparse_calls == layer.dense_calls == layer.decode_calls == 0 for layer in before.layers)
    for _ in range(2):
        assert torch.equal(prefill(model, tokens(length=LONG)), output)
        assert [layer.density for layer in sale_hf.stats(model).layers] == [layer.density for layer in counted.layers]
        assert_calls(model, LLAMA, sparse=1)
        sale_hf.reset_stats(model)
    assert min(counted.layers[0].density) < 1


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    shared(LLAMA).save_pretrained(folder)
    return folder


@CONFIGS
@pytest.mark.parametrize("where", MAPS.values(), ids=MAPS)
def test_layers_on_disk(saved, tmp_path, where, config):
    pytest.importorskip("accelerate")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        saved, attn_implementation=sale_hf.NAME, device_map=where, offload_folder=tmp_path
    )
    assert any(p.is_meta for p in model.model.layers[1].self_attn.parameters())
    sale_hf.configure(model, config)
    assert_runs_as(model, expected_of(config))


@CONFIGS
def test_layers_that_are_fetched_from_the_hosts_memory(config):
    accelerate = pytest.importorskip("accelerate")
    model = build(LLAMA, sale_hf.NAME)
    accelerate.cpu_offload(model, torch.device("cpu"))
    assert all(p.is_meta for p in model.parameters())
    sale_hf.configure(model, config)
    assert_runs_as(model, expected_of(config))


@CONFIGS
@pytest.mark.parametrize("loaded", ["to_empty", "assign"])
def test_a_model_that_is_loaded_after_it_was_configured(loaded, config):
    model = build(LLAMA, sale_hf.NAME).to("meta")
    with torch.device("meta"):
        sale_hf.configure(model, config)
    if loaded == "to_empty":
        model.to_empty(device="cpu")
    model.load_state_dict(shared(LLAMA).state_dict(), assign=loaded == "assign")
    model.model.rotary_emb = shared(LLAMA).model.rotary_emb  # its frequencies are in no state
    assert_runs_as(model, expected_of(config))


def test_a_dry_run_on_the_meta_device_counts_nothing():
    model = build(LLAMA, sale_hf.NAME, PER_HEAD)
    layer = sale_hf.attention_layers(model)[0]
    for length in (1, 64):
        query, key = (torch.empty(2, heads, length, 32, device="meta") for heads in (4, 2))
        assert sale_hf.sale_flex_forward(layer, query, key, key, None)[0].shape == (2, length, 4, 32)
    assert_runs_as(model, expected_of(PER_HEAD))


def test_thresholds_without_values_are_refused():
    with torch.device("meta"):
        config = SaleConfig(Mass(torch.full((4,), 0.1)))
    with pytest.raises(ValueError, match=r"config\.rule\.threshold must have values, got a tensor on the meta device"):
        sale_hf.configure(build(LLAMA, sale_hf.NAME), config)


def test_thresholds_are_the_layers_own():
    given = torch.full((4,), 0.1)
    model = build(LLAMA, sale_hf.NAME, SaleConfig(Mass(given)))
    given.fill_(0.9)
    assert all(bool((state.config.rule.threshold == 0.1).all()) for state in layer_states(model).values())


MODES = {
    "configure": (torch.inference_mode, torch.no_grad, torch.enable_grad, nullcontext),
    "the first call": (nullcontext, torch.inference_mode, torch.no_grad, torch.enable_grad),
    "calls between": (nullcontext, torch.no_grad, torch.inference_mode, torch.enable_grad),
    "all of it": (torch.inference_mode,) * 4,
}


@CONFIGS
@pytest.mark.parametrize("modes", MODES.values(), ids=MODES)
def test_modes_may_change_from_call_to_call(modes, config):
    model = build(LLAMA, sale_hf.NAME).requires_grad_(False)
    expected, _ = expected_of(config)
    with modes[0]():
        sale_hf.configure(model, config)
    for mode in modes[1:]:
        with mode():
            assert torch.equal(model(tokens(length=LONG), use_cache=False).logits, expected)
    assert_calls(model, LLAMA, sparse=3)
    with modes[0]():
        sale_hf.reset_stats(model)
    with torch.no_grad():
        model(tokens(length=8), use_cache=False)
    assert_calls(model, LLAMA, sparse=0, decode=1)


def test_gradients_after_inference_mode():
    model = build(LLAMA, sale_hf.NAME)
    with torch.inference_mode():
        sale_hf.configure(model, SaleConfig(Mass(torch.full((4,), 0.1)), min_length=LENGTH))
        model(tokens(), use_cache=False)
    model(tokens(), use_cache=False).logits.square().mean().backward()
    assert_calls(model, LLAMA, sparse=0, dense=2)
    assert all(p.grad is not None for p in model.parameters())


def test_what_follows_a_layer_in_inference_mode_can_change_outside():
    model = build(LLAMA, sale_hf.NAME, PER_HEAD)
    for state in layer_states(model).values():
        with torch.inference_mode():
            state.move(torch.device("cpu"))
        assert not any(x.is_inference() for x in (state.calls, state.blocks, state.config.rule.threshold))
    prefill(model, tokens())
    assert_calls(model, LLAMA, sparse=1)


@pytest.mark.compiles
def test_a_compiled_model_that_was_configured_in_inference_mode():
    model = build(LLAMA, sale_hf.NAME).requires_grad_(False)
    with torch.inference_mode():
        sale_hf.configure(model, EVERYTHING)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected = expected_of(EVERYTHING)[0]
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            assert_close(compiled(tokens(length=LONG), use_cache=False).logits, expected)
    assert_calls(model, LLAMA, sparse=2)


@pytest.mark.gpu
@CONFIGS
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_model_that_goes_to_a_gpu_after_it_was_configured(mode, config):
    model = build(LLAMA, sale_hf.NAME, config)
    with mode():
        prefill(model, tokens(length=LONG))
        model.cuda()
        prefill(model, tokens(length=LONG).cuda())
    assert_calls(model, LLAMA, sparse=2)
    with torch.no_grad():
        prefill(model, tokens(length=LONG).cuda(), cache=make_cache("dynamic", model), decode=2)
    assert_calls(model, LLAMA, sparse=3, decode=2)
    for state in layer_states(model).values():
        assert state.calls.device.type == state.blocks.device.type == "cuda"
        assert not any(x.is_inference() for x in (state.calls, state.blocks))
    model.cpu()
    prefill(model, tokens(length=LONG))
    assert_calls(model, LLAMA, sparse=4, decode=2)


@pytest.mark.gpu
@pytest.mark.compiles
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")
@pytest.mark.filterwarnings(r"ignore:\s*Online softmax is disabled")
@CONFIGS
@torch.no_grad()
def test_a_model_that_is_compiled_where_it_was_not_configured(config):
    model, other = build(LLAMA, sale_hf.NAME, config).cuda(), build(LLAMA, sale_hf.NAME).cuda()
    sale_hf.configure(other, config)
    torch._dynamo.reset()
    compiled, ids = torch.compile(model, fullgraph=True), tokens(length=LONG).cuda()
    for _ in range(3):
        # Without a cache transformers takes a compiled prompt for packed, and masks are estimated in other steps.
        assert_close(prefill(compiled, ids, cache=make_cache("dynamic", model)), prefill(other, ids))
    assert_calls(model, LLAMA, sparse=3)
    for one, same in zip(sale_hf.stats(model).layers, sale_hf.stats(other).layers):
        assert one.density == same.density


@pytest.mark.gpu
@CONFIGS
@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_layers_that_are_fetched_to_a_gpu(saved, tmp_path, where, config):
    pytest.importorskip("accelerate")
    places = dict.fromkeys(PARTS, 0) | {f"model.layers.{n}": where for n in range(LAYERS)}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        saved, attn_implementation=sale_hf.NAME, device_map=places, offload_folder=tmp_path
    )
    sale_hf.configure(model, config)
    assert sale_hf.stats(model).layers[0].sparse_calls == 0
    other = build(LLAMA, sale_hf.NAME).cuda()
    sale_hf.configure(other, config)
    ids = tokens(length=LONG).cuda()
    assert_close(prefill(model, ids), prefill(other, ids))
    assert_calls(model, LLAMA, sparse=1)
    assert all(state.calls.is_cuda for state in layer_states(model).values())
    for one, same in zip(sale_hf.stats(model).layers, sale_hf.stats(other).layers):
        assert one.density == same.density
