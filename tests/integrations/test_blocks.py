# SPDX-License-Identifier: BSD-3-Clause
"""Blocks that models drop, and that the same tokens choose the same blocks in chunks, alone and in a batch.

Windows and chunks in caches that forget (a sliding cache) are not here: their keys begin anywhere in a block, so their
blocks are others. tests/integrations/test_local.py has their outputs.
"""

from contextlib import nullcontext

import pytest
import torch
from models_harness import (
    BY_NAME,
    SELECTIVE,
    allowed,
    assert_calls,
    assert_close,
    assert_sparse_paths,
    build,
    make_cache,
    padding_mask,
    prefill,
    tokens,
)

import sale_flex.integrations.transformers as sale_hf
from sale_flex import Mass, SaleConfig, create_sale_block_mask, sale_attention
from sale_flex.testing import block_map

pytestmark = pytest.mark.usefixtures("uncompiled_attention")

LONG = 1500
CHUNKS = (512, 512, 476)
OFFSET = 128
"""Tokens of padding: whole blocks, so that blocks hold the same tokens."""

WIDE = {"Llama": {}, "Mistral": {"sliding_window": 700}, "Llama4": {"attention_chunk_size": 700}}
"""Windows and chunks of more blocks than are always kept."""

CONFIG = SaleConfig(Mass(0.14), min_length=0, sink_tokens=16, local_tokens=32, smooth_tokens=512)
LOOSER, STRICTER = (CONFIG.with_threshold(CONFIG.rule.threshold * 2**octaves) for octaves in (-0.25, 0.25))
"""A quarter of an octave around it. Two runs differ in the last bits of a layer's inputs. That moves a block's level by
one, an eighth of an octave, or moves one code of a query by one: with heads of 32 channels, queries of 3 and keys of 1
by 3 / 7 / sqrt(32) nats, another eighth."""


def long_model(name, config=CONFIG):
    return build(BY_NAME[name], sale_hf.NAME, config, max_position_embeddings=2048, **WIDE[name])


def chosen(model, *args, **options):
    """Of every layer a list of its calls, each as the kept blocks under the three configs, ``[3, B, Hq, nq, nk]``."""
    calls = {}

    def look(call):
        maps = [
            block_map(create_sale_block_mask(call.query, call.key, config, value=call.value, **call.options)).kept
            for config in (CONFIG, LOOSER, STRICTER)
        ]
        calls.setdefault(call.layer, []).append(torch.stack(maps))
        return sale_attention(call.query, call.key, call.value, CONFIG, **call.options)

    with sale_hf.observe(model, look):
        prefill(model, *args, **options)
    return calls


def assert_same(kept, expected, dense):
    """Assert that blocks are the same, but for a few at the very threshold.

    Args:
        kept: bool ``[B, Hq, nq, nk]``.
        expected: bool ``[3, B, Hq, nq, nk]``, from `chosen`.
        dense: How many blocks are visible.
    """
    expected, looser, stricter = expected
    assert not (kept & ~looser).any()
    assert not (stricter & ~kept).any()
    assert (kept != expected).sum() <= max(1, 0.002 * dense)
    assert expected.sum() < 0.9 * dense


def visible_blocks(expected):
    """At least as many blocks as a causal row of blocks sees, for all heads."""
    _, heads, rows, columns = expected.shape[1:]
    assert rows == columns
    return heads * rows * (rows + 1) // 2


@pytest.mark.parametrize(
    ("name", "kind"), [("Llama", "dynamic"), ("Llama", "static"), ("Mistral", "whole"), ("Llama4", "whole")]
)
def test_chunks_choose_the_blocks_of_one_shot(name, kind):
    model, ids = long_model(name), tokens(1, LONG)
    at_once = chosen(model, ids)
    in_chunks = chosen(model, ids, None, make_cache(kind, model, LONG + 8), CHUNKS)
    assert set(at_once) == set(in_chunks) == set(BY_NAME[name].sparse_layers)
    for layer, (expected,) in at_once.items():
        parts = in_chunks[layer]
        assert len(parts) == len(CHUNKS)
        blocks = expected.shape[-1]
        kept = torch.cat([torch.nn.functional.pad(part[0], (0, blocks - part.shape[-1])) for part in parts], 2)
        assert_same(kept, expected, visible_blocks(expected))


@pytest.mark.parametrize("name", ["Llama", "Mistral", "Llama4"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_prompt_chooses_its_blocks_alone_and_padded_in_a_batch(name, side):
    model, ids = long_model(name), tokens(1, LONG)
    total = LONG + OFFSET
    both = tokens(2, total, seed=2)
    first = OFFSET if side == "left" else 0
    both[:1, first : first + LONG] = ids
    mask = padding_mask(side, 2, total, OFFSET)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    alone = chosen(model, ids)
    padded = chosen(model, both, mask, position_ids=positions)
    rows = slice(first // 64, first // 64 + -(-LONG // 64))
    for layer, (expected,) in alone.items():
        (kept,) = padded[layer]
        assert_same(kept[0, :1, :, rows, rows], expected, visible_blocks(expected))
        assert kept[0, 0].sum() == kept[0, 0, :, rows, rows].sum()


@pytest.mark.parametrize(("name", "padding"), [("Llama", "no padding"), ("Mistral", "no padding"), ("Llama", "left")])
def test_a_high_threshold_drops_blocks(name, padding):
    length = 640
    mask = padding_mask(padding, length=length)
    options = {"Mistral": {"sliding_window": 400}}.get(name, {})
    family = BY_NAME[name]
    model, dense = (
        build(family, implementation, SELECTIVE, max_position_embeddings=1024, **options)
        for implementation in (sale_hf.NAME, "eager")
    )
    output, expected = (prefill(each, tokens(length=length), mask) for each in (model, dense))
    live = slice(None) if mask is None else mask.bool()
    assert output.isfinite().all()
    assert (output - expected)[live].abs().max() > 100 * allowed(expected)
    assert_calls(model, family, sparse=1)
    assert_sparse_paths(model)
    for layer in sale_hf.stats(model).layers:
        assert all(0 < density < 0.95 for density in layer.density)


@pytest.mark.parametrize(("name", "kind"), [("Llama", "dynamic"), ("Llama", "static"), ("Mistral", "whole")])
def test_chunks_attend_to_as_many_blocks_as_one_shot(name, kind):
    # Not observed: codes of keys are kept beside the cache, and only new keys are coded.
    model, ids = long_model(name), tokens(1, LONG)
    densities = []
    for cache, chunks in ((None, None), (make_cache(kind, model, LONG + 8), CHUNKS)):
        sale_hf.reset_stats(model)
        prefill(model, ids, None, cache, chunks)
        assert_calls(model, BY_NAME[name], sparse=len(chunks or [0]))
        densities.append(torch.tensor([layer.density for layer in sale_hf.stats(model).layers]))
    at_once, in_chunks = densities
    assert at_once.max() < 0.9
    assert (at_once - in_chunks).abs().max() <= 0.004  # a block of a head's 300


def crop(cache):
    cache.crop(-320)


def reorder(cache):
    cache.reorder_cache(torch.tensor([1, 0]))


def select(cache):
    cache.batch_select_indices(torch.tensor([1, 1]))


def empty(cache):
    cache.reset()


def long_run(model, kind, change, watch=nullcontext):
    """Outputs of a prompt's last 640 tokens, two chunks after two others and a change of the cache, under `watch`."""
    cache = make_cache(kind, model, LONG)
    with torch.no_grad():
        prefill(model, tokens(2, 640), None, cache, (320, 320))  # the second chunk is the first to keep codes
        change(cache)
        sale_hf.reset_stats(model)
        with watch():
            return prefill(model, tokens(2, 640, seed=2), None, cache, (320, 320))


def without_codes(model):
    """What `long_run` watches with: calls that know their keys alone."""
    return lambda: sale_hf.observe(model, lambda call: sale_attention(*call[1:4], CONFIG, **call.options))


@pytest.mark.parametrize(
    ("kind", "change"),
    [("dynamic", crop), ("static", empty), ("dynamic", reorder), ("dynamic", select), ("static", reorder)],
)
def test_codes_of_keys_follow_a_cache_that_changes(kind, change):
    model = long_model("Llama")
    output = long_run(model, kind, change)
    assert all(layer.sparse_calls == 2 and max(layer.density) < 1 for layer in sale_hf.stats(model).layers)
    assert_close(output, long_run(model, kind, change, without_codes(model)))
