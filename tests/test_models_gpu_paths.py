# SPDX-License-Identifier: BSD-3-Clause
"""Models on a GPU beyond one eager prompt: every family, compiled programs, chunks, no wait for the host, two GPUs."""

import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AttentionInterface, DynamicCache

import sale_flex.integrations.transformers as sale_hf
from sale_flex.integrations.transformers.layers import layer_states

sys.path.append(str(Path(__file__).resolve().parent))
from models_harness import BY_NAME, DECODERS, EVERYTHING, FAMILIES, assert_close, build, outputs, tokens
from test_models_parallel import check_two_processes_against_one

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores"),
]


def on_gpu(family, implementation, config=EVERYTHING):
    model = build(family, implementation, config).cuda()
    if implementation == sale_hf.NAME:
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
        assert all(path.startswith("triton") and path.endswith("flex") for path in one.paths)
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
        options = {"past_key_values": DynamicCache(config=model.config)} if cached else {"use_cache": False}
        got = outputs(torch.compile(model, fullgraph=True)(ids, **options))
    assert_close(got, expected)
    assert all((one.sparse_calls, one.dense_calls) == (1, 0) for one in sale_hf.stats(model).layers)


@pytest.mark.parametrize("kind", [{"cache_implementation": "static"}, {"prefill_chunk_size": 64}], ids=str)
@pytest.mark.parametrize("family", DECODERS, ids=repr)
def test_a_prompt_for_generation_has_eagers_logits(family, kind):
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


def test_chunks_choose_the_blocks_of_one_shot():
    config = replace(EVERYTHING, threshold=0.05, sink_tokens=16, local_tokens=32, smooth_tokens=64)
    ids = tokens(length=1280).cuda()
    kept = []
    for sizes in ((1280,), (320, 320, 640)):
        model = build(BY_NAME["Llama"], "sale_flex", config, max_position_embeddings=2048).cuda()
        sale_hf.configure(model, config)
        cache, first = DynamicCache(config=model.config), 0
        with torch.no_grad():
            for size in sizes:
                model(ids[:, first : first + size], past_key_values=cache)
                first += size
        kept.append([state.blocks.clone() for state in layer_states(model).values()])
    # The first layer's keys and queries are products of the same rows; those of later layers have passed attention,
    # whose sums are in another order, so that a block at the threshold may fall to the other side.
    assert torch.equal(kept[0][0], kept[1][0])
    for whole, chunked in zip(*kept):
        assert bool((whole[0] < whole[1]).all())
        assert torch.equal(whole[1], chunked[1])
        assert bool(((whole[0] - chunked[0]).abs() <= whole[1] // 100).all())


@pytest.mark.parametrize("name", ["Llama", "Gemma2", "GptOss", "Llama4"])
def test_nobody_waits_for_the_host(name):
    model, ids = on_gpu(BY_NAME[name], "sale_flex"), tokens().cuda()
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
    assert all(one.sparse_calls == 2 for one in sale_hf.stats(model).layers)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_generate_what_one_does(tmp_path):
    check_two_processes_against_one(tmp_path)
