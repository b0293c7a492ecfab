# SPDX-License-Identifier: BSD-3-Clause
"""`sale_attention` from end to end: exact attention on the blocks that its mask keeps, whatever the path."""

from dataclasses import replace

import pytest
import torch
from hypothesis import event, given
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import flex_attention

import sale_flex
from sale_flex import SaleConfig, create_sale_block_mask, ops, sale_attention
from sale_flex.testing import (
    Inputs,
    Shape,
    any_in_block,
    assert_attention_close,
    block_map,
    causal_mask,
    expand_blocks,
    structured_inputs,
)
from sale_flex.testing.strategies import calls, seeds

uncompiled = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")

# A program is compiled for every batch, head count, head_dim, dtype and block size, some seconds each: these tests
# share theirs, and Hypothesis varies what a program takes as it comes, above all lengths, positions and options.
PROGRAM = {"batch": 2, "kv_heads": (2,), "groups": (3,), "head_dims": (32,)}


def seen_of(shape: Shape, block_mask) -> torch.Tensor:
    """What a query may attend to: visible, and in a kept block."""
    kept = expand_blocks(block_map(block_mask).kept, block_mask.BLOCK_SIZE, shape.q_len, shape.kv_len)
    return kept & causal_mask(shape)


@uncompiled
@given(
    calls(min_tokens=65, max_tokens=400, block_sizes=((64, 64),), max_window=60, max_min_length=100, **PROGRAM), seeds()
)
def test_output_is_attention_over_the_kept_blocks(call, seed):
    shape, config = call
    inputs = structured_inputs(shape, seed)
    mask = create_sale_block_mask(inputs.query, inputs.key, config, **shape.positions())
    seen = seen_of(shape, mask)
    output, stats = sale_attention(*inputs, config, stats=True, **shape.positions())
    event(stats.path)
    assert_attention_close(output, *inputs, seen)
    assert not output[~seen.any(-1).expand(output.shape[:3])].any()  # padding rows are 0, exactly
    # Uncompiled flex_attention ignores a BlockMask's indices; the mask_mod looks them up.
    eager = flex_attention(*inputs, block_mask=mask, enable_gqa=True)
    assert_attention_close(eager, *inputs, seen)


@given(
    calls(min_tokens=65, max_tokens=400, block_sizes=((64, 64),), max_min_length=0, **PROGRAM),
    seeds(),
    st.sampled_from([0.0, torch.zeros(6)]),
)
def test_threshold_zero_is_dense_attention(call, seed, threshold):
    shape, config = call
    inputs = structured_inputs(shape, seed)
    output = sale_attention(*inputs, replace(config, threshold=threshold), **shape.positions())
    assert_attention_close(output, *inputs, causal_mask(shape))


@pytest.mark.parametrize(
    ("dtype", "head_dim", "block_size", "heads", "kv_heads"),
    [
        (torch.bfloat16, 128, (64, 64), 4, 1),
        (torch.float16, 80, (64, 32), 5, 1),
        (torch.float32, 96, (128, 64), 7, 1),
        (torch.bfloat16, 192, (128, 128), 2, 2),
        (torch.float32, 256, (64, 64), 1, 1),
        (torch.float16, 64, (128, 64), 2, 1),
    ],
)
@pytest.mark.parametrize("bits", [4, 8])
def test_every_dtype_head_dim_and_block_size(dtype, head_dim, block_size, heads, kv_heads, bits):
    shape = Shape(450, 450, heads=heads, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype, kv_range=((3, 449),))
    inputs = structured_inputs(shape, 0)
    config = SaleConfig(
        metric="relative", threshold=0.3, min_length=0, local_tokens=32, block_size=block_size, bits=bits
    )
    mask, stats = create_sale_block_mask(inputs.query, inputs.key, config, stats=True, **shape.positions())
    if max(block_size) < 128:
        assert stats.density.mean() < 1
    # Not the default scale, as a model with another head_dim than it computes with has.
    output = sale_attention(*inputs, config, scale=0.1, **shape.positions())
    mask = create_sale_block_mask(inputs.query, inputs.key, config, scale=0.1, **shape.positions())
    assert_attention_close(output, *inputs, seen_of(shape, mask), scale=0.1)


def example(q_len: int = 500, kv_len: int = 500, **changes) -> tuple[Shape, Inputs]:
    shape = Shape(q_len, kv_len, batch=2, heads=6, kv_heads=2, head_dim=32, **changes)
    return shape, structured_inputs(shape, 4)


SPARSE = SaleConfig(metric="relative", threshold=0.3, min_length=64, local_tokens=32, smooth_tokens=128)


def test_the_users_own_compiled_flex_attention_gives_the_same():
    shape, inputs = example()
    mask = create_sale_block_mask(inputs.query, inputs.key, SPARSE)
    assert block_map(mask).kept.sum() < any_in_block(causal_mask(shape), (64, 64)).sum() * 6
    compiled = torch.compile(flex_attention, fullgraph=True)
    output = compiled(*inputs, block_mask=mask, enable_gqa=True)
    assert_attention_close(output, *inputs, seen_of(shape, mask))
    late = slice(SPARSE.min_length, None)  # the rows before are SDPA's
    assert torch.equal(output[:, :, late], sale_attention(*inputs, SPARSE)[:, :, late])


def test_an_offset_tensor_gives_the_same_output():
    _, inputs = example(q_len=300)
    outputs = [sale_attention(*inputs, SPARSE, q_offset=offset) for offset in (None, 200, torch.tensor(200))]
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])
    moved = sale_attention(*inputs, SPARSE, q_offset=100)
    assert not torch.equal(outputs[0], moved)


def test_chunked_prefill_gives_the_output_of_one_shot():
    shape, inputs = example()
    seen = seen_of(shape, create_sale_block_mask(inputs.query, inputs.key, SPARSE))
    outputs = []
    for begin, stop in ((0, 128), (128, 320), (320, 500)):
        chunk = (inputs.query[:, :, begin:stop], inputs.key[:, :, :stop], inputs.value[:, :, :stop])
        outputs.append(sale_attention(*chunk, SPARSE))
    assert_attention_close(torch.cat(outputs, 2), *inputs, seen)


@pytest.mark.parametrize(
    ("q_len", "kv_len", "min_length", "path"),
    [
        (150, 150, 150, "dense sdpa: no more keys than min_length"),
        (100, 150, 1024, "dense sdpa: no more keys than min_length"),
        (1, 500, 0, "dense sdpa: fewer queries than half a block"),
        (31, 500, 0, "dense sdpa: fewer queries than half a block"),
        (32, 500, 0, "torch scan + flex"),
        (150, 150, 149, "torch scan + flex"),
    ],
)
@pytest.mark.parametrize("padded", [False, True])
def test_short_prompts_and_decoding_are_dense_and_say_so(q_len, kv_len, min_length, path, padded):
    kv_range = ((0, kv_len), (kv_len // 3, kv_len - 2)) if padded else None
    shape, inputs = example(q_len, kv_len, kv_range=kv_range)
    config = replace(SPARSE, threshold=1e6, min_length=min_length, local_tokens=8, sink_tokens=4, smooth_tokens=32)
    output, stats = sale_attention(*inputs, config, stats=True, **shape.positions())
    assert stats.path == path
    if path.startswith("dense"):
        assert_attention_close(output, *inputs, causal_mask(shape))
        assert torch.equal(stats.kept_blocks, stats.visible_blocks)
        visible = any_in_block(causal_mask(shape), (64, 64)).sum((1, 2, 3))
        assert torch.equal(stats.visible_blocks, visible[:, None].expand(2, 6))
        assert (stats.density == 1).all()
    else:
        mask = create_sale_block_mask(inputs.query, inputs.key, config, **shape.positions())
        assert_attention_close(output, *inputs, seen_of(shape, mask))


def test_early_rows_are_dense_whoever_computes_them():
    shape, inputs = example(500, 500)
    config = replace(SPARSE, threshold=1e6, min_length=100, local_tokens=8, sink_tokens=4, smooth_tokens=32)
    output, stats = sale_attention(*inputs, config, stats=True)
    assert stats.path == "dense sdpa on the first 128 rows, torch scan + flex on the others"
    mask, of_mask = create_sale_block_mask(inputs.query, inputs.key, config, stats=True)
    assert_attention_close(output, *inputs, seen_of(shape, mask))
    assert torch.equal(stats.kept_blocks, of_mask.kept_blocks)
    # Through an offset flex computes them all.
    same = sale_attention(*inputs, config, q_offset=0)
    assert_attention_close(same, *inputs, seen_of(shape, mask))


def test_a_decoding_step_too_long_for_an_explicit_mask_keeps_all_its_blocks(monkeypatch):
    monkeypatch.setattr(sale_flex.attention, "_DENSE_MASK_LIMIT", 1000)
    shape, inputs = example(31, 500, kv_range=((0, 500), (70, 495)))
    output, stats = sale_attention(*inputs, replace(SPARSE, threshold=1e6), stats=True, **shape.positions())
    assert stats.path == "torch scan + flex"
    assert (stats.density == 1).all()
    assert_attention_close(output, *inputs, causal_mask(shape))


def test_one_head_may_be_dense_beside_sparse_ones():
    shape, inputs = example()
    config = replace(SPARSE, threshold=torch.tensor([0.0, 0.3, 1e6, 0.0, 0.3, 1e6]))
    output, stats = sale_attention(*inputs, config, stats=True)
    dense = torch.tensor([0, 3])
    assert (stats.density[:, dense] == 1).all()
    assert (stats.density[:, [2, 5]] < stats.density[:, [1, 4]]).all()
    mask = create_sale_block_mask(inputs.query, inputs.key, config)
    seen = seen_of(shape, mask)
    assert torch.equal(seen[:, dense], causal_mask(shape).expand(2, 2, -1, -1))
    assert_attention_close(output, *inputs, seen)


@pytest.mark.parametrize("metric", ["mass", "relative"])
def test_strided_views_are_taken_as_they_are(metric, monkeypatch):
    config = replace(SPARSE, metric=metric)
    shape, inputs = example(300, 300)
    views = Inputs(*(x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs))
    received: dict[str, list[torch.Tensor]] = {}

    def watch(module, name, parameters: list[int]) -> None:
        function = getattr(module, name)

        def call(*arguments):
            received[name] = [arguments[n] for n in parameters]
            return function(*arguments)

        monkeypatch.setattr(module, name, call)

    own = {
        "mass": {"quantize_moments": [0], "mass_hits": [0, 1]},
        "relative": {"quantize_rows": [0], "quantize_groups": [0], "row_limits": [0, 1]},
    }[metric]
    watched = {"key_mean": [0], "nonfinite_blocks": [0]} | own
    for name, parameters in watched.items():
        watch(ops, name, parameters)
    watch(sale_flex.attention, "run_flex", [0, 1, 2])
    output = sale_attention(*views, config)
    assert received.keys() == {*watched, "run_flex"}
    originals = {x.data_ptr(): x.stride() for x in views}
    for name, tensors in received.items():
        for tensor in tensors:
            assert originals.get(tensor.data_ptr()) == tensor.stride(), f"{name} got a copy"
    monkeypatch.undo()
    mask = create_sale_block_mask(inputs.query, inputs.key, config)
    assert torch.equal(block_map(mask).kept, block_map(create_sale_block_mask(*views[:2], config)).kept)
    assert_attention_close(output, *inputs, seen_of(shape, mask))


def test_rows_of_one_batch_do_not_change_each_other():
    shape, inputs = example(kv_range=((0, 500), (70, 430)))
    output = sale_attention(*inputs, SPARSE, **shape.positions())
    alone = replace(shape, batch=1, kv_range=((70, 430),))
    row = Inputs(*(x[1:] for x in inputs))
    mask = create_sale_block_mask(row.query, row.key, SPARSE, **alone.positions())
    assert_attention_close(output[1:], *row, seen_of(alone, mask))
