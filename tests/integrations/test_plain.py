# SPDX-License-Identifier: BSD-3-Clause
"""Models that see all before a token, against eager attention: padding, caches, chunks, generate, packed rows.

Prompts in chunks without a cache, and packed rows with one or with a padding mask, are no combinations of
transformers': it finds packed rows where there is neither. An encoder has no cache.
"""

import pytest
import torch
from models_harness import (
    BY_NAME,
    DECODERS,
    LENGTH,
    PADDED,
    PADDINGS,
    assert_calls,
    assert_close,
    assert_sparse_paths,
    build,
    case_ids,
    check_generate,
    check_packed,
    check_prefill,
    check_second_turn,
    generate_cases,
    packed_positions,
    padding_mask,
    prefill,
    prefill_cases,
    shared,
    tokens,
)

import sale_flex.integrations.transformers as sale_hf

pytestmark = pytest.mark.usefixtures("uncompiled_attention")

PLAIN = tuple(family for family in DECODERS if not family.local)


@pytest.mark.parametrize(("family", "padding", "cache", "way"), case_ids(prefill_cases(PLAIN)))
def test_prompts_and_decoding_are_eagers(family, padding, cache, way):
    check_prefill(family, padding, cache, way)


@pytest.mark.parametrize(("family", "way", "padding"), case_ids(generate_cases(PLAIN)))
def test_generate_gives_eagers_tokens_and_logits(family, way, padding):
    check_generate(family, way, padding)


@pytest.mark.parametrize("name", ["Llama"])
def test_a_second_turn_goes_on_from_the_first(name):
    check_second_turn(BY_NAME[name])


@pytest.mark.parametrize("family", PLAIN, ids=str)
def test_packed_documents_do_not_see_each_other(family):
    check_packed(family, (100, 60), (33, 64, 63))


def test_one_packed_row():
    check_packed(BY_NAME["Llama"], (31, 1, 96, 32))


def test_packed_rows_of_other_lengths_one_after_another():
    """Sizes of what masks capture change then, beside the lengths of queries and keys."""
    family = BY_NAME["Llama"]
    model = build(family, sale_hf.NAME)
    for length in (320, 192, 256):
        ids, positions = tokens(1, length), packed_positions((100, length - 100))
        output, expected = (prefill(each, ids, position_ids=positions) for each in (model, shared(family)))
        assert_close(output, expected)
    assert_calls(model, family, sparse=3)


def test_heads_of_a_size_that_no_kernel_has():
    family = BY_NAME["Llama"]
    dense, model = (build(family, implementation, head_dim=24) for implementation in ("eager", sale_hf.NAME))
    assert_close(prefill(model, tokens()), prefill(dense, tokens()))
    assert_calls(model, family, sparse=1)
    assert_sparse_paths(model)


def test_padding_gets_zeros_from_attention_where_sdpa_lets_it_attend():
    outputs, mask = [], padding_mask("right")
    for implementation in (sale_hf.NAME, "sdpa"):
        model = build(BY_NAME["Llama"], implementation)
        model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(lambda _, args: outputs.append(args[0]))
        prefill(model, tokens(), mask)
    ours, theirs = outputs
    assert torch.equal(ours[0, LENGTH - PADDED :], torch.zeros(PADDED, 128))
    assert theirs[0, LENGTH - PADDED :].any(-1).all()
    assert_close(ours, theirs, mask)


@pytest.mark.parametrize("padding", PADDINGS)
def test_an_encoder_sees_both_ways(padding):
    family = BY_NAME["Bert"]
    model, mask = build(family, sale_hf.NAME), padding_mask(padding)
    assert_close(prefill(model, tokens(), mask), prefill(shared(family), tokens(), mask), mask)
    assert_calls(model, family, sparse=1)
    assert_sparse_paths(model)
