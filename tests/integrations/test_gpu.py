# SPDX-License-Identifier: BSD-3-Clause
"""Models on a GPU: kernels and compiled attention instead of the torch path, gpt-oss's sinks on the sparse path too."""

import pytest
import torch
from gpu_harness import assert_selective
from models_harness import (
    BY_NAME,
    LENGTH,
    assert_calls,
    assert_close,
    build,
    make_cache,
    padding_mask,
    prefill,
    tokens,
)
from models_structure import passages, plant_topics

import sale_flex.integrations.transformers as sale_hf
from sale_flex import Mass, SaleConfig
from sale_flex.stats import Path as Ran

pytestmark = [
    pytest.mark.gpu,
    # What the compiler says about other parts of a model than attention.
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores"),
    pytest.mark.filterwarnings(r"ignore:\s*Online softmax is disabled"),
]


def on_gpu(tensor):
    return None if tensor is None else tensor.cuda()


@pytest.mark.parametrize("padding", ["no padding", "left"])
@pytest.mark.parametrize("name", ["Llama", "Mistral", "Gemma2", "GptOss", "Llama4"])
def test_prompts_and_decoding_are_eagers(name, padding):
    family = BY_NAME[name]
    model, dense = build(family, sale_hf.NAME).cuda(), build(family).cuda()
    ids, mask = on_gpu(tokens(length=LENGTH + 2)), on_gpu(padding_mask(padding))
    output, expected = (prefill(each, ids, mask, make_cache("dynamic", each), decode=2) for each in (model, dense))
    assert_close(output, expected, mask)
    assert_calls(model, family, sparse=1, decode=2)
    for layer in sale_hf.stats(model).layers:
        assert set(layer.density) == {1.0}
        assert set(layer.paths) == {Ran.FLEX.value}, layer.paths


@pytest.mark.parametrize("name", ["Llama", "GptOss"])
@torch.no_grad()
def test_a_compiled_prompt_drops_the_blocks_of_an_eager_one(name):
    family = BY_NAME[name]
    config = SaleConfig(Mass(0.05), min_length=64, local_tokens=32, smooth_tokens=64)
    model, other = (
        plant_topics(build(family, sale_hf.NAME, config, max_position_embeddings=2048)).cuda() for _ in range(2)
    )
    ids = passages(2, 1280).cuda()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True)
    assert_close(prefill(compiled, ids, cache=make_cache("dynamic", model)), prefill(other, ids))
    layers = sale_hf.stats(model).layers, sale_hf.stats(other).layers
    for one, same in zip(*layers):
        assert one.density == same.density
    # A window of less than a block leaves no choice; the layer of the last index has none.
    assert_selective(sum(layers[0][-1].density) / len(layers[0][-1].density))
