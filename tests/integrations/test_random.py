# SPDX-License-Identifier: BSD-3-Clause
"""Random paddings, lengths and chunks: a model with a causal view and one with windows are eager's."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models_harness import BY_NAME, assert_calls, assert_close, build, make_cache, prefill, shared, tokens

import sale_flex.integrations.transformers as sale_hf
from sale_flex.integrations.transformers.masks import DENSE_QUERIES

pytestmark = pytest.mark.usefixtures("uncompiled_attention")

EDGES = (31, 32, 33, 63, 64, 65, 127, 128, 129, 190)
"""Beside the shortest call that is sparse, and beside edges of blocks."""


@st.composite
def padded_batches(draw, length):
    """A padding mask of two rows, each with a first and a last token anywhere, or None."""
    if draw(st.booleans()):
        return None
    mask = torch.zeros(2, length, dtype=torch.int64)
    for row in mask:
        start = draw(st.just(0) | st.integers(0, length - 1))
        stop = draw(st.just(length) | st.integers(start + 1, length))
        row[start:stop] = 1
    return mask


@st.composite
def splits(draw, length):
    """Lengths of chunks."""
    cuts = draw(st.lists(st.sampled_from(EDGES) | st.integers(1, length), max_size=3, unique=True))
    return tuple(b - a for a, b in pairwise([0, *sorted(cut for cut in cuts if cut < length), length]))


@pytest.mark.parametrize(("name", "kinds"), [("Llama", ("none", "static")), ("Mistral", ("none", "dynamic"))])
@settings(max_examples=12)
@given(st.data(), st.sampled_from(EDGES), st.integers(0, 2**16))
def test_logits_are_eagers(name, kinds, data, length, seed):
    kind = data.draw(st.sampled_from(kinds), label="cache")
    family = BY_NAME[name]
    mask = data.draw(padded_batches(length), label="mask")
    chunks = (length,) if kind == "none" else data.draw(splits(length), label="chunks")
    ids = tokens(length=length, seed=seed)
    model = build(family, sale_hf.NAME)
    output, expected = (
        prefill(each, ids, mask, make_cache(kind, each, 200), chunks) for each in (model, shared(family))
    )
    assert_close(output, expected, mask)
    sparse = sum(chunk >= DENSE_QUERIES for chunk in chunks)
    assert_calls(model, family, sparse=sparse, decode=len(chunks) - sparse)
