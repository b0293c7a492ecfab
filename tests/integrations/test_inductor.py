# SPDX-License-Identifier: BSD-3-Clause
"""Models compiled to C++, a small covering set: the blocks of compiled attention, not its trace alone.

tests/integrations/test_compiled.py traces every family; here each kind of mask reaches Inductor once.
"""

import pytest
import torch
from models_harness import (
    BY_NAME,
    LENGTH,
    SELECTIVE,
    assert_calls,
    assert_close,
    build,
    make_cache,
    packed_positions,
    padding_mask,
    prefill,
    shared,
    tokens,
)
from torch._dynamo.testing import CompileCounterWithBackend

import sale_flex.integrations.transformers as sale_hf

pytestmark = [
    pytest.mark.compiles,
    # Llama 4 rotates queries and keys as complex numbers.
    pytest.mark.filterwarnings("ignore:Torchinductor does not support code generation for complex operators"),
]


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("name", "padding", "kind", "packed"),
    [
        pytest.param("Llama", "no padding", "dynamic", False, id="plain"),
        pytest.param("Llama", "left", "none", False, id="padded"),
        pytest.param("Llama", "no padding", "none", True, id="packed"),
        pytest.param("Gemma2", "no padding", "dynamic", False, id="window and soft cap"),
        pytest.param("Llama4", "left", "none", False, id="chunks"),
        pytest.param("Mistral", "no padding", "static", False, id="static cache"),
        # torch 2.13 computes flex_attention wrongly on a value that is a slice of what queries and keys are made of.
        pytest.param("Phi3", "no padding", "none", False, id="fused projections"),
    ],
)
def test_compiled_prompts_are_eagers(name, padding, kind, packed):
    family = BY_NAME[name]
    model = build(family, sale_hf.NAME)
    mask = padding_mask(padding)
    options = {"position_ids": packed_positions((100, 60), (33, 64, 63))} if packed else {}
    expected = prefill(shared(family), tokens(), mask, make_cache(kind, shared(family)), **options)
    if kind == "none":
        options["use_cache"] = False
    compiled = torch.compile(model, fullgraph=True)
    assert_close(prefill(compiled, tokens(), mask, make_cache(kind, model), **options), expected, mask)
    assert_calls(model, family, sparse=1)
    assert all(set(layer.density) == {1.0} for layer in sale_hf.stats(model).layers)


def test_lengths_share_a_program_that_drops_blocks():
    family = BY_NAME["Llama"]
    eager, model = (build(family, sale_hf.NAME, SELECTIVE) for _ in range(2))
    # Programs of attention alone run on Inductor over twenty lengths in tests/attention/test_compile.py.
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    lengths = (500, 640, 333)
    for length in lengths:
        ids = tokens(length=length)
        mask = padding_mask("left", length=length)
        assert_close(prefill(compiled, ids, mask, use_cache=False), prefill(eager, ids, mask), mask)
    assert counter.frame_count <= 2  # as sale_attention alone, in tests/attention/test_compile.py
    for one, other in zip(sale_hf.stats(model).layers, sale_hf.stats(eager).layers):
        assert (one.sparse_calls, one.density) == (len(lengths), other.density)
        assert max(one.density) < 1


def test_a_compiled_model_decodes_behind_a_compiled_prompt():
    family = BY_NAME["Mistral"]
    model = build(family, sale_hf.NAME)
    ids = tokens(length=LENGTH + 3)
    expected = prefill(shared(family), ids, cache=make_cache("static", shared(family)), decode=3)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_close(prefill(compiled, ids, cache=make_cache("static", model), decode=3), expected)
    assert_calls(model, family, sparse=1, decode=3)
