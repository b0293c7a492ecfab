# SPDX-License-Identifier: BSD-3-Clause
"""A model's layers say what they missed, head by head, and act on it where they are told to."""

import json
import math
from dataclasses import replace

import pytest
import torch

pytest.importorskip("transformers")
from models_harness import BY_NAME, CACHE, LENGTH, SELECTIVE, assert_close, build, prefill, shared, tokens
from transformers import DynamicCache

import sale_flex.integrations.transformers as sale_hf
from sale_flex import AuxRequest, sale_attention

pytestmark = pytest.mark.usefixtures("uncompiled_attention")

BLIND = SELECTIVE.with_options(threshold=1.0, sink_tokens=0, local_tokens=1)
"""Keeps the diagonal alone: of random models, whose attention is spread evenly, much is missed."""

NAMES = ["Llama", "Mistral", "Gemma2", "GptOss"]
"""Nothing but causality, a window, a soft cap, sinks."""


def configured(name, config):
    model = build(BY_NAME[name])
    model.set_attn_implementation(sale_hf.NAME)
    sale_hf.configure(model, config)
    return model


@pytest.mark.parametrize("name", NAMES)
def test_stats_are_what_the_calls_said(name):
    model = configured(name, BLIND)
    said = {}

    def listen(call):
        wanted = AuxRequest(stats=True)
        output, aux = sale_attention(call.query, call.key, call.value, BLIND, return_aux=wanted, **call.options)
        said[call.layer] = aux.stats.audit
        return output

    with sale_hf.observe(model, listen):
        prefill(model, tokens())
    prefill(model, tokens())
    counted = sale_hf.stats(model)
    assert any(layer.miss[0] > 0.01 for layer in counted.layers)
    for layer in counted.layers:
        audit = said[layer.layer]
        rows = audit.rows.sum(0)
        wanted, squares = audit.wanted_mass.sum(0), audit.missed_squares.sum(0)
        assert layer.audited_rows == int(rows[0]) > 0
        assert layer.miss == pytest.approx((squares / (wanted + 1)).tolist())
        assert layer.wanted_mass == pytest.approx((wanted / rows).tolist())
        assert layer.missed_mass == pytest.approx((audit.missed_mass.sum(0) / rows).tolist())
        assert layer.made_dense == (0, 0, 0, 0)
    assert counted.miss == max(max(layer.miss) for layer in counted.layers)


def test_chunks_add_up_to_one_prompt():
    whole, chunked = configured("Llama", BLIND), configured("Llama", BLIND)
    chunked.load_state_dict(whole.state_dict())
    prefill(whole, tokens())
    cache = DynamicCache()
    with torch.inference_mode():
        for part in tokens().split(64, dim=1):
            chunked(part, **{CACHE: cache})
    for one, other in zip(sale_hf.stats(whole).layers, sale_hf.stats(chunked).layers):
        assert one.audited_rows == other.audited_rows
        assert one.miss == pytest.approx(other.miss, rel=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_dense_on_a_miss_is_dense_and_counted(name):
    family = BY_NAME[name]
    model = configured(name, replace(BLIND, on_miss="dense", miss_bound=0.0))
    assert_close(prefill(model, tokens()), prefill(shared(family), tokens()))
    counted = sale_hf.stats(model)
    for layer in counted.layers:
        assert all(miss > 0 for miss in layer.miss)
        assert layer.made_dense == (2, 2, 2, 2)  # in either row of the batch
        assert layer.density == (1.0,) * 4
        assert layer.sparse_calls == 1


def test_nobody_is_asked_unless_somebody_wants_to_know():
    model = configured("Llama", replace(BLIND, on_miss="ignore"))
    prefill(model, tokens())
    for layer in sale_hf.stats(model).layers:
        assert layer.audited_rows == 0
        assert all(math.isnan(value) for value in (*layer.miss, *layer.wanted_mass, *layer.missed_mass))
    assert math.isnan(sale_hf.stats(model).miss)
    told = json.loads(json.dumps(sale_hf.stats(model).as_dict(), allow_nan=False))
    assert told["layers"][0]["miss"] == [None] * 4


def test_counts_begin_again():
    model = configured("Llama", BLIND)
    prefill(model, tokens(length=LENGTH))
    assert sale_hf.stats(model).miss > 0
    assert f"{sale_hf.stats(model).miss:.2f}" in str(sale_hf.stats(model))
    sale_hf.reset_stats(model)
    assert math.isnan(sale_hf.stats(model).miss)
