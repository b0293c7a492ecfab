# SPDX-License-Identifier: BSD-3-Clause
"""Models on a GPU beyond one eager prompt: every family, compiled programs, chunks, no wait for the host, two GPUs."""

import warnings

import pytest
import torch
import transformers
from gpu_harness import assert_selective
from models_harness import BY_NAME, CACHE, DECODERS, EVERYTHING, FAMILIES, assert_close, build, outputs, tokens
from models_structure import passages, plant_topics
from parallel_harness import check_two_processes_against_one
from transformers import AttentionInterface, DynamicCache

import sale_flex.integrations.transformers as sale_hf
from sale_flex import KeyCodes, Mass, SaleConfig, create_sale_block_mask, sale_attention
from sale_flex.integrations.transformers.caches import stores_of
from sale_flex.stats import Path as Ran
from sale_flex.testing import block_map

pytestmark = [
    pytest.mark.gpu,
    # What the compiler says about other parts of a model than attention.
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores"),
    pytest.mark.filterwarnings(r"ignore:\s*Online softmax is disabled"),
    pytest.mark.filterwarnings("ignore:Torchinductor does not support code generation for complex operators"),
    pytest.mark.filterwarnings("ignore:The CUDA Graph is empty"),
]


def on_gpu(family, implementation, config=EVERYTHING):
    model = build(family, implementation, config).cuda()
    if implementation == sale_hf.NAME:
        sale_hf.configure(model, config)
    return model


def with_topics(name, config):
    """A model on the GPU that drops blocks of `passages`, with room for 2,048 tokens."""
    model = plant_topics(build(BY_NAME[name], "sale_flex", config, max_position_embeddings=2048)).cuda()
    sale_hf.configure(model, config)
    return model


@pytest.mark.parametrize("family", FAMILIES, ids=repr)
def test_a_batch_with_right_padding_has_eagers_logits_and_times(family):
    ids, mask = tokens().cuda(), torch.ones(2, 160, dtype=torch.int64, device="cuda")
    mask[0, -40:] = 0
    with torch.no_grad():
        expected = outputs(on_gpu(family, "eager")(ids, attention_mask=mask))
        model = on_gpu(family, "sale_flex")
        got = outputs(model(ids, attention_mask=mask))
    assert_close(got, expected, mask)
    for one in sale_hf.stats(model).layers:
        assert (one.sparse_calls, one.dense_calls) == (1, 0)
        assert set(one.paths) == {Ran.FLEX.value}
        assert one.mask_ms > 0
        assert one.attention_ms > 0


@pytest.mark.parametrize("cached", [False, True], ids=["no cache", "cache"])
@pytest.mark.parametrize("name", ["Llama", "Gemma2", "GptOss", "Llama4", "Phi3"])
def test_a_compiled_model_has_eagers_logits(name, cached):
    family, ids = BY_NAME[name], tokens().cuda()
    torch._dynamo.reset()
    with torch.no_grad():
        expected = outputs(on_gpu(family, "eager")(ids, use_cache=False))
        model = on_gpu(family, "sale_flex")
        options = {CACHE: DynamicCache(config=model.config)} if cached else {"use_cache": False}
        got = outputs(torch.compile(model, fullgraph=True)(ids, **options))
    assert_close(got, expected)
    assert all((one.sparse_calls, one.dense_calls) == (1, 0) for one in sale_hf.stats(model).layers)


@pytest.mark.parametrize("kind", [{"cache_implementation": "static"}, {"prefill_chunk_size": 64}], ids=str)
@pytest.mark.parametrize("family", DECODERS, ids=repr)
def test_a_prompt_for_generation_has_eagers_logits(family, kind):
    if "cache_implementation" in kind and family.name == "Llama4" and transformers.__version__.startswith("5.17."):
        pytest.skip("generate of transformers 5.17 fails for Llama 4 with a static cache, whatever its attention")
    ids = tokens().cuda()
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 3, "do_sample": False} | kind
    first = []
    for implementation in ("eager", "sale_flex"):
        model = on_gpu(family, implementation)
        with torch.no_grad():
            out = model.generate(ids, output_logits=True, return_dict_in_generate=True, **options)
        first.append(out.logits[0])
    assert_close(first[1][:, None], first[0][:, None])
    assert all(one.sparse_calls > 0 and one.decode_calls == 2 for one in sale_hf.stats(model).layers)


@pytest.mark.parametrize(("metric", "threshold"), [("mass", 0.05), ("relative", 0.2)])
def test_chunks_with_stored_codes_choose_the_blocks_of_one_shot(metric, threshold):
    options = {"threshold": threshold, "bits": 8, "min_length": 64, "local_tokens": 32, "smooth_tokens": 64}
    config = SaleConfig.from_options(metric, **options)
    model = with_topics("Llama", config)
    calls = []

    def watched(call):
        calls.append(call)
        return sale_attention(call.query, call.key, call.value, config, **call.options)

    with torch.no_grad(), sale_hf.observe(model, watched):
        model(passages(2, 1280).cuda())
    assert len(calls) == 2
    for call in calls:
        mask, stats = create_sale_block_mask(call.query, call.key, config, stats=True, **call.options)
        assert_selective(stats.density)
        whole = block_map(mask).kept
        codes = KeyCodes()
        for first, stop in ((0, 320), (320, 640), (640, 1280)):
            query, key = call.query[:, :, first:stop], call.key[:, :, :stop]
            mask = create_sale_block_mask(query, key, config, key_codes=codes, **call.options)
            assert torch.equal(block_map(mask).kept, whole[:, :, first // 64 : stop // 64, : stop // 64])
        assert codes.length == 1280


def test_chunks_of_a_model_keep_codes_with_its_cache_and_choose_the_blocks_of_one_shot():
    config = SaleConfig(Mass(0.05), min_length=64, local_tokens=32, smooth_tokens=64)
    model, ids = with_topics("Llama", config), passages(2, 1280).cuda()
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        for first in range(0, 1280, 320):
            model(ids[:, first : first + 320], **{CACHE: cache})
        chunked = sale_hf.stats(model).layers
        sale_hf.reset_stats(model)
        model(ids)
    assert [codes.length for codes in stores_of(cache).values()] == [1280, 1280]
    for one, same in zip(chunked, sale_hf.stats(model).layers):
        assert one.density == same.density
        assert_selective(sum(one.density) / len(one.density))


@pytest.mark.parametrize("name", ["Llama", "Gemma2", "GptOss", "Llama4"])
def test_nobody_waits_for_the_host(name):
    model = with_topics(name, SaleConfig(Mass(0.05), min_length=64, local_tokens=32, smooth_tokens=64))
    ids = passages(2, 1280).cuda()
    waits = []
    plain = sale_hf.sale_flex_forward

    def watched(*args, **kwargs):
        torch.cuda.set_sync_debug_mode("error")
        try:
            return plain(*args, **kwargs)
        except RuntimeError as error:
            waits.append(str(error))
            raise
        finally:
            torch.cuda.set_sync_debug_mode("default")

    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
        model(ids)
        AttentionInterface.register("sale_flex", watched)
        try:
            model(ids)
        finally:
            AttentionInterface.register("sale_flex", plain)
    assert not waits
    layers = sale_hf.stats(model).layers
    assert all(one.sparse_calls == 2 for one in layers)
    assert_selective(sum(layers[-1].density) / len(layers[-1].density))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_generate_what_one_does(tmp_path):
    check_two_processes_against_one(tmp_path)
