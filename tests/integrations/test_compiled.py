# SPDX-License-Identifier: BSD-3-Clause
"""Models in one graph: torch.compile(fullgraph=True) traces every family, with every kind of mask and cache.

What is traced ends in a backend that compiles no C++, so that attention is dense under the mask of the kept blocks;
test_inductor.py has the blocks themselves. Mostly that is Dynamo's graph as it is, since Dynamo counts
programs and breaks; where a cache is written AOTAutograd follows it too, for a family with windows and one without.
One program serves all paddings of a shape, and packed rows beside plain ones: traced without a cache, transformers
takes every batch without a mask for one that may be packed.
"""

from typing import Any

import pytest
import torch
from models_harness import (
    BY_NAME,
    DECODERS,
    FAMILIES,
    LENGTH,
    Family,
    assert_calls,
    assert_close,
    build,
    case_ids,
    make_cache,
    packed_positions,
    padding_mask,
    prefill,
    shared,
    tokens,
)
from torch._dynamo.testing import CompileCounterWithBackend

import sale_flex.integrations.transformers as sale_hf

pytestmark = pytest.mark.compiles


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    torch._dynamo.reset()


REPEATED = ("Qwen3", "Mixtral", "Qwen2", "Gemma3")
"""Families whose attention calls are another's here: Llama's, or Gemma 2's without its soft cap."""
DIFFERENT = tuple(family for family in FAMILIES if family.name not in REPEATED)


def traced(family: Family, backend: str = "eager") -> tuple[Any, torch.nn.Module, CompileCounterWithBackend]:
    """A compiled model, the model, and who counts its programs."""
    model = build(family, sale_hf.NAME)
    counter = CompileCounterWithBackend(backend)
    return torch.compile(model, fullgraph=True, backend=counter), model, counter


@pytest.mark.parametrize("family", DIFFERENT, ids=str)
def test_one_program_for_all_paddings(family):
    compiled, model, counter = traced(family)
    masks = [padding_mask("left"), padding_mask("right"), torch.ones(2, LENGTH, dtype=torch.int64)]
    for mask in masks:
        options = {"use_cache": False} if family.decoder else {}
        assert_close(prefill(compiled, tokens(), mask, **options), prefill(shared(family), tokens(), mask), mask)
    assert counter.frame_count == 1
    assert_calls(model, family, sparse=len(masks))


@pytest.mark.parametrize("family", [family for family in DIFFERENT if family.decoder], ids=str)
def test_one_program_for_plain_and_packed_rows(family):
    compiled, model, counter = traced(family)
    layouts = [((LENGTH,), (LENGTH,)), ((100, 60), (33, 64, 63))]
    for layout in layouts:
        positions = packed_positions(*layout)
        expected = prefill(shared(family), tokens(), position_ids=positions)
        assert_close(prefill(compiled, tokens(), position_ids=positions, use_cache=False), expected)
    assert counter.frame_count == 1
    assert_calls(model, family, sparse=len(layouts))


def test_an_encoder_without_a_mask():
    family = BY_NAME["Bert"]
    compiled, model, counter = traced(family)
    assert_close(prefill(compiled, tokens()), prefill(shared(family), tokens()))
    assert counter.frame_count == 1
    assert_calls(model, family, sparse=1)


@pytest.mark.parametrize(
    ("family", "kind"),
    case_ids(
        (family, kind)
        for family in DECODERS
        for kind in ("dynamic", "static")
        if kind == "dynamic" or family in DIFFERENT
    ),
)
def test_a_prompt_with_a_cache(family, kind):
    compiled, model, _ = traced(family, "aot_eager" if family.name in ("Llama", "Gemma2") else "eager")
    expected = prefill(shared(family), tokens(), cache=make_cache(kind, shared(family)))
    assert_close(prefill(compiled, tokens(), cache=make_cache(kind, model)), expected)
    assert_calls(model, family, sparse=1)


@pytest.mark.parametrize("name", ["Llama", "Gemma2"])
def test_a_model_compiled_in_place_generates_over_many_lengths_with_four_programs(name):
    """A prompt, a step, and each once more when their lengths turn out to change; so with transformers' sdpa too."""
    family, counter = BY_NAME[name], CompileCounterWithBackend("eager")
    dense, model = shared(family), build(family, sale_hf.NAME)
    model.compile(fullgraph=True, backend=counter)
    options = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    lengths = (160, 170, 181, 203)
    for length in lengths:
        ids = tokens(length=length)
        mask = torch.ones_like(ids)
        with torch.no_grad():
            expected, result = (each.generate(ids, attention_mask=mask, **options) for each in (dense, model))
        assert torch.equal(result.sequences, expected.sequences)
        assert_close(torch.stack(result.logits, 1), torch.stack(expected.logits, 1))
    assert counter.frame_count == 4
    assert_calls(model, family, sparse=len(lengths), decode=3 * len(lengths))
