# SPDX-License-Identifier: BSD-3-Clause
"""A model's cache is known by what it is, under whatever name it comes; one that is missing or unknown is told of."""

import inspect

import pytest
import torch
from models_harness import BY_NAME, CACHE, DECODERS, LAYERS, build, make_cache, prefill, tokens
from transformers import DynamicCache, EncoderDecoderCache
from transformers.generation.continuous_batching.cache import PagedAttentionCache

import sale_flex.integrations.transformers as sale_hf
from sale_flex import SaleConfig
from sale_flex.integrations.transformers.caches import hand_over_cache, stores_of

pytestmark = pytest.mark.usefixtures("uncompiled_attention")

LLAMA = BY_NAME["Llama"]
CONFIG = SaleConfig(min_length=0, sink_tokens=16, local_tokens=32, smooth_tokens=64)


def llama():
    return build(LLAMA, sale_hf.NAME, CONFIG)


@pytest.mark.parametrize("family", DECODERS, ids=repr)
def test_codes_are_stored_of_every_layer_that_keeps_all_keys(family):
    model = build(family, sale_hf.NAME, CONFIG)
    # Layers with linear attention want a cache that knows of them.
    cache = make_cache("whole" if len(family.sparse_layers) == LAYERS else "dynamic", model)
    prefill(model, tokens(1, 192), None, cache, (64, 64, 64))
    assert {index: codes.length for index, codes in stores_of(cache).items()} == dict.fromkeys(
        family.sparse_layers, 192
    )


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_a_cache_is_found_under_every_name_that_a_release_takes(name):
    if name == "cache" != CACHE:
        pytest.skip("this release of transformers has one name for it")
    model, cache = llama(), DynamicCache()
    with torch.no_grad():
        for n in range(2):
            model(tokens(1, 128, seed=n), **{name: cache})
    assert [codes.length for codes in stores_of(cache).values()] == [256] * LAYERS


class AnyName(torch.nn.Module):
    """An attention module whose cache has a name of its own, or none."""

    layer_idx = 0

    def forward(self, hidden, *args, **kwargs):
        self.handed = kwargs
        return hidden


@pytest.mark.parametrize(
    "hand",
    [
        lambda module, cache: module(0, memory=cache),
        lambda module, cache: module(0, cache),
        lambda module, cache: module(0, state=EncoderDecoderCache(cache, DynamicCache())),
    ],
    ids=["another name", "by position", "self-attention of two"],
)
def test_a_cache_is_found_among_all_arguments(hand):
    module, cache = AnyName(), DynamicCache()
    hand_over_cache(module)
    hand(module, cache)
    assert any(isinstance(value, tuple) and value[0] is cache for value in module.handed.values())


class Requests:
    """Shaped as the paged caches of transformers are."""

    def update(self, *args): ...

    def free_blocks(self, request_id): ...

    def fill_block_table(self, *args): ...


def attend(**kwargs):
    layer = sale_hf.attention_layers(llama())[0]
    x = torch.zeros(1, 4, 64, 32)
    with torch.no_grad():
        return sale_hf.sale_flex_forward(layer, x, x, x, None, **kwargs)[0]


@pytest.mark.parametrize(
    "kwargs",
    [
        {"cache": Requests()},
        {"memory": Requests()},
        {"cache": PagedAttentionCache.__new__(PagedAttentionCache)},
        {"past_key_values": PagedAttentionCache.__new__(PagedAttentionCache)},
        {"cache": object()},
    ],
    ids=["cache", "another name", "transformers' own", "its own under another name", "unknown"],
)
def test_paged_and_unknown_caches_are_refused(kwargs):
    (name, value), *_ = kwargs.items()
    with pytest.raises(NotImplementedError, match=f"continuous batching.*got {name} of type {type(value).__name__}"):
        attend(**kwargs)
    module = AnyName()
    hand_over_cache(module)
    with pytest.raises(NotImplementedError, match="continuous batching"):
        module(0, **kwargs)


@pytest.mark.parametrize("kwargs", [{"cache": DynamicCache()}, {"past_key_values": DynamicCache()}, {"cache": None}])
def test_a_cache_that_is_none_of_those_is_no_reason_to_refuse(kwargs):
    assert attend(**kwargs).shape == (1, 64, 4, 32)


def test_a_later_chunk_without_a_cache_is_told_of():
    """As where a release hands it over in a way that nobody knows."""
    model, cache = llama(), DynamicCache()
    for module in sale_hf.attention_layers(model).values():
        module._forward_pre_hooks.clear()
        module._forward_pre_hooks_with_kwargs.clear()
    prefill(model, tokens(1, 128), None, cache)
    with pytest.warns(UserWarning, match=r"finds no KV cache .*arguments of LlamaAttention\.forward"):
        prefill(model, tokens(1, 128), None, cache)
    assert not stores_of(cache)


def test_every_attention_module_can_hand_its_cache_over():
    for family in DECODERS:
        for module in sale_hf.attention_layers(build(family)).values():
            kinds = {parameter.kind for parameter in inspect.signature(module.forward).parameters.values()}
            assert inspect.Parameter.VAR_KEYWORD in kinds
