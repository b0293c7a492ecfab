# SPDX-License-Identifier: BSD-3-Clause
"""Nothing of the size of queries times keys is ever allocated, neither for masks nor in attention."""

from types import SimpleNamespace

import pytest
import torch
from models_harness import (
    BY_NAME,
    LAYERS,
    build,
    config_of,
    make_cache,
    packed_positions,
    padding_mask,
    prefill,
    tokens,
)
from torch.profiler import ProfilerActivity, profile
from transformers.masking_utils import (
    create_causal_mask,
    create_chunked_causal_mask,
    create_sliding_window_causal_mask,
)

import sale_flex.integrations.transformers as sale_hf
from sale_flex import Mass, SaleConfig

MANY = 131_072
SOME = 6144
"""Tokens whose square is more than twice what the torch path has alive at a time."""
CONFIG = SaleConfig(Mass(0.02), min_length=0)


def largest(call) -> int:
    """Bytes of the largest single allocation of torch's while `call` runs, compiled code and custom ops included."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    sizes = [event.nbytes() for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(sizes, default=0)


def test_the_measure_sees_what_it_should():
    assert largest(lambda: torch.zeros(3, 1000).bool() & True) == 12_000
    square = largest(lambda: prefill(build(BY_NAME["Llama"]), tokens(2, 512)))
    assert square >= 4 * 2 * 4 * 512 * 512


@pytest.mark.parametrize("padding", ["no padding", "left", "right"])
@pytest.mark.parametrize(
    ("name", "create"),
    [
        ("Llama", create_causal_mask),
        ("Mistral", create_sliding_window_causal_mask),
        ("Llama4", create_chunked_causal_mask),
    ],
)
def test_masks_of_long_prompts_take_some_bytes_a_token(name, create, padding):
    config = config_of(BY_NAME[name], max_position_embeddings=MANY)
    config._attn_implementation = sale_hf.NAME
    embeddings = torch.empty(2, MANY, 0)
    mask = padding_mask(padding, length=MANY)
    made = []
    size = largest(lambda: made.append(create(config, embeddings, mask, None)))
    if name == "Llama" and padding == "no padding":
        assert made == [None]
    else:
        assert isinstance(made[0], sale_hf.ModelMask)
    # 8 bytes, the widest number of a token, twice over.
    assert size <= 16 * 2 * MANY


@pytest.mark.parametrize("name", ["Llama", "Mistral", "Llama4"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_masks_of_a_later_chunk_take_some_bytes_a_token(name, kind):
    config = config_of(BY_NAME[name], max_position_embeddings=MANY)
    config._attn_implementation = sale_hf.NAME
    chunk = 4096
    cache = make_cache(kind, SimpleNamespace(config=config), MANY)
    # One head of one channel: what counts is where the cache stands.
    state = torch.zeros(2, 1, MANY - chunk, 1)
    for layer in range(LAYERS):
        cache.update(state, state, layer)
    create = {"Llama": create_causal_mask, "Mistral": create_sliding_window_causal_mask}
    made = []
    mask = padding_mask("left", length=MANY)
    embeddings = torch.empty(2, chunk, 0)
    size = largest(lambda: made.append(create.get(name, create_chunked_causal_mask)(config, embeddings, mask, cache)))
    assert isinstance(made[0], sale_hf.ModelMask)
    assert made[0].seq_lengths[0] == chunk
    assert size <= 16 * 2 * MANY


def test_masks_of_packed_rows_take_some_bytes_a_token():
    config = config_of(BY_NAME["Llama"], max_position_embeddings=MANY)
    config._attn_implementation = sale_hf.NAME
    positions = packed_positions((100_000, MANY - 100_000))
    embeddings = torch.empty(1, MANY, 0)
    assert largest(lambda: create_causal_mask(config, embeddings, None, None, positions)) <= 16 * MANY


@pytest.mark.parametrize(
    ("name", "padding", "kind", "packed"),
    [
        pytest.param("Llama", "no padding", "none", False, id="causal"),
        pytest.param("Llama", "no padding", "none", True, id="packed"),
        pytest.param("Mistral", "left", "static", False, id="padded window in a static cache"),
        pytest.param("Llama4", "no padding", "none", False, id="chunks"),
        pytest.param("GptOss", "no padding", "none", False, id="sinks"),
    ],
)
def test_attention_is_smaller_than_one_bit_mask_of_a_head(name, padding, kind, packed):
    model = build(BY_NAME[name], sale_hf.NAME, CONFIG, max_position_embeddings=2 * SOME)
    mask = padding_mask(padding, 1, SOME)
    options = {"position_ids": packed_positions((4000, SOME - 4000))} if packed else {}
    size = largest(lambda: prefill(model, tokens(1, SOME), mask, make_cache(kind, model, SOME + 8), **options))
    # A byte per query and key, where the torch path works in pieces of 16 MiB at any length.
    assert size < SOME * SOME
    assert sum(layer.sparse_calls for layer in sale_hf.stats(model).layers) == LAYERS
