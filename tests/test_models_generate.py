# SPDX-License-Identifier: BSD-3-Clause
"""`generate()`: caches, prompts in chunks, beams, a second turn; tokens and logits are those of eager attention."""

import sys
from pathlib import Path

import pytest
import torch
import transformers

import sale_flex.integrations.transformers as sale_hf

sys.path.append(str(Path(__file__).resolve().parent))
from models_harness import (
    BY_NAME,
    DECODERS,
    LENGTH,
    WINDOW,
    assert_calls,
    assert_close,
    assert_sparse_paths,
    build,
    case_ids,
    padding_mask,
    shared,
    tokens,
)

NEW = 4

WAYS = {
    "dynamic": ({}, 1),
    "static": ({"cache_implementation": "static"}, 1),
    "dynamic, in chunks": ({"prefill_chunk_size": 64}, 3),
    "static, in chunks": ({"cache_implementation": "static", "prefill_chunk_size": 64}, 3),
    "beams": ({"num_beams": 2}, 1),
}
"""Options of generate, and how many calls the prompt takes."""

CASES = [
    (family, way)
    for family in DECODERS
    for way in WAYS
    # generate of transformers 5.17 fails for Llama 4 with a static cache, whatever its attention.
    if not (transformers.__version__.startswith("5.17.") and family.name == "Llama4" and way.startswith("static"))
]


def generated(model, ids, mask, **options):
    """Token ids, logits ``[rows, NEW, vocabulary]``, and the cache."""
    result = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=NEW,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        disable_compile=True,  # of decoding steps, which are dense
        **options,
    )
    return result.sequences, torch.stack(result.logits, 1), result.past_key_values


@pytest.mark.parametrize("padding", ["no padding", "left"])
@pytest.mark.parametrize(("family", "way"), case_ids(CASES))
def test_tokens_and_logits_are_eagers(family, way, padding):
    options, calls = WAYS[way]
    mask = padding_mask(padding)
    mask = torch.ones_like(tokens()) if mask is None else mask
    model = build(family, sale_hf.NAME)
    (sequences, logits, _), (expected, wanted, _) = (
        generated(each, tokens(), mask, **options) for each in (model, shared(family))
    )
    assert torch.equal(sequences, expected)
    assert_close(logits, wanted)
    assert_calls(model, family, sparse=calls, decode=NEW - 1)
    assert_sparse_paths(model)


@pytest.mark.parametrize("name", ["Llama", "Mistral", "Gemma3"])
def test_a_second_turn_goes_on_from_the_first(name):
    family = BY_NAME[name]
    model, more = build(family, sale_hf.NAME), tokens(length=WINDOW, seed=2)
    results = []
    for each in (model, shared(family)):
        ids, _, cache = generated(each, tokens(), torch.ones_like(tokens()))
        ids = torch.cat([ids, more], 1)
        results.append(generated(each, ids, torch.ones_like(ids), past_key_values=cache)[:2])
    (ids, logits), (expected, wanted) = results
    assert torch.equal(ids, expected)
    assert_close(logits, wanted)
    # The last token of the first turn had no step of its own, so the second turn's call has it too.
    assert ids.shape[1] == LENGTH + NEW + WINDOW + NEW
    assert_calls(model, family, sparse=2, decode=2 * (NEW - 1))
    assert_sparse_paths(model)
