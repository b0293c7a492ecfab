# SPDX-License-Identifier: BSD-3-Clause
"""On a CUDA device: the kernels against the reference, and what only a device can show."""

import warnings
from dataclasses import replace

import pytest
import torch
from gpu_harness import assert_selective, on_gpu, selective_inputs
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention.flex_attention import flex_attention

import sale_flex
from sale_flex import (
    AuxRequest,
    Mass,
    Relative,
    SaleConfig,
    create_sale_block_mask,
    ops,
    reference,
    sale_attention,
    unpack_int4,
)
from sale_flex.testing import (
    Inputs,
    Shape,
    assert_attention_close,
    assert_same_blocks,
    block_map,
    causal_mask,
    expand_blocks,
    mass_error_bound,
)

pytestmark = pytest.mark.gpu


# A chunk of a padded batch with groups of three: one program of flex_attention is compiled a variant.
CHUNK = Shape(700, 1000, batch=2, heads=6, kv_heads=2, kv_range=((0, 1000), (70, 951)))

VARIANTS = {
    "bf16 128": (replace(CHUNK, head_dim=128, dtype=torch.bfloat16), (64, 64), 4),
    "fp16 80": (replace(CHUNK, head_dim=80, dtype=torch.float16), (64, 32), 8),
    "fp32 256": (replace(CHUNK, head_dim=256), (64, 64), 4),
    "bf16 192": (replace(CHUNK, head_dim=192, dtype=torch.bfloat16), (128, 64), 8),
    "fp32 96": (replace(CHUNK, head_dim=96), (128, 128), 4),
    "bf16 32": (replace(CHUNK, head_dim=32, dtype=torch.bfloat16), (64, 32), 4),
}


@pytest.fixture(params=VARIANTS)
def variant(request):
    shape, block_size, bits = VARIANTS[request.param]
    config = SaleConfig(
        Relative(0.1, bits=bits), min_length=0, local_tokens=48, smooth_tokens=200, block_size=block_size
    )
    return shape, config, selective_inputs(shape, 1)


MOMENTS = {"pool_mode": "mean", "sub_block": 8}
MASS = {
    "default": {},
    "moments of 8": MOMENTS,
    "moments of 4, pools of 1": MOMENTS | {"pool": 1, "sub_block": 4},
    "moments of 32, pools of 16": MOMENTS | {"pool": 16, "sub_block": 32},
    "scan of means": {"pool_mode": "mean"},
    "scan, every 8th row": {"pool": 8, "pool_mode": "last"},
}


def seen_of(shape: Shape, mask) -> torch.Tensor:
    kept = expand_blocks(block_map(mask).kept.cpu(), mask.BLOCK_SIZE, shape.q_len, shape.kv_len)
    return kept & causal_mask(shape)


def test_codes_and_scales_are_the_references_bit_for_bit(variant):
    shape, config, inputs = variant
    query, key, _ = on_gpu(inputs)
    bounds = reference.make_bounds(shape.batch, shape.q_len, shape.kv_len, **shape.positions())
    mean = reference.key_mean(inputs.key, bounds, config.smooth_tokens)
    assert torch.equal(ops.key_mean(key, bounds.cuda(), config.smooth_tokens).cpu(), mean)

    codes, scale = reference.quantize_rows(inputs.query, config.rule.bits)
    got_codes, got_scale = ops.quantize_rows(query, config.rule.bits, False)
    assert torch.equal(got_codes[:, :, : shape.q_len].cpu(), codes)
    assert not got_codes[:, :, shape.q_len :].any()
    assert torch.equal(got_scale.cpu(), scale)

    group = config.block_size[1]
    codes, scale = reference.quantize_groups(inputs.key, mean, bounds, group, config.rule.bits)
    got_codes, got_scale = ops.quantize_groups(key, mean.cuda(), bounds.cuda(), group, config.rule.bits, False)
    assert torch.equal(got_codes[:, :, : shape.kv_len].cpu(), codes)
    assert torch.equal(got_scale[..., : scale.shape[2]].cpu(), scale)
    if config.rule.bits == 4:
        packed, _ = ops.quantize_groups(key, mean.cuda(), bounds.cuda(), group, 4, True)
        assert torch.equal(unpack_int4(packed), got_codes)


@pytest.mark.parametrize("estimate", MASS.values(), ids=MASS)
def test_moments_are_the_references_bit_for_bit(variant, estimate):
    shape, config, inputs = variant
    bounds = reference.make_bounds(shape.batch, shape.q_len, shape.kv_len, **shape.positions())
    mean = reference.key_mean(inputs.key, bounds, config.smooth_tokens)
    options = reference.mass_options(replace(config, rule=Mass(bits=config.rule.bits, **estimate)))
    sizes = options.block_size[1], options.sub_block, config.rule.bits
    expected = reference.quantize_moments(inputs.key, mean, bounds, *sizes)
    *got, _ = ops.quantize_moments(on_gpu(inputs).key, mean.cuda(), bounds.cuda(), *sizes)
    for x, wanted in zip(got, expected):
        assert torch.equal(x[:, :, : wanted.shape[2]].cpu(), wanted)
        assert not x[:, :, wanted.shape[2] :].any()


@pytest.mark.parametrize("estimate", MASS.values(), ids=MASS)
def test_blocks_of_the_mass_rule_are_the_references(variant, estimate, record_property):
    shape, config, inputs = variant
    config = replace(config, rule=Mass(0.05, bits=config.rule.bits, **estimate))
    expected = reference.keep_map(inputs.query, inputs.key, config, dtype=torch.float64, **shape.positions())
    query, key, _ = on_gpu(inputs)
    mask, stats = create_sale_block_mask(query, key, config, stats=True, **shape.positions("cuda"))
    assert_selective(stats.density)
    kept = block_map(mask).kept.cpu()
    differing = assert_same_blocks(kept, expected, mass_error_bound(inputs.query, inputs.key))
    record_property("blocks on the threshold that differ", differing)
    assert differing <= 3


@pytest.mark.parametrize("one_shot", [False, True])
def test_blocks_are_the_references(variant, one_shot, record_property):
    shape, config, inputs = variant
    if one_shot:  # the kernel's own way for keys that are valid from the first on
        shape = replace(shape, q_len=1000, kv_range=None)
        inputs = selective_inputs(shape, 2)
    value = inputs.value.clone()
    value[0, 1, 300] = torch.inf
    expected = reference.keep_map(inputs.query, inputs.key, config, value, dtype=torch.float64, **shape.positions())
    query, key, _ = on_gpu(inputs)
    mask, stats = create_sale_block_mask(query, key, config, value=value.cuda(), stats=True, **shape.positions("cuda"))
    assert_selective(stats.density)
    blocks = block_map(mask)
    differing = assert_same_blocks(blocks.kept.cpu(), expected)
    record_property("blocks on the threshold that differ", differing)
    assert differing <= 2  # of several hundred; more would mean a systematic error, however small
    assert torch.equal(blocks.full.cpu() & expected.kept, expected.full & blocks.kept.cpu() & expected.kept)


def test_output_is_attention_over_the_kept_blocks(variant):
    shape, config, inputs = variant
    device = on_gpu(inputs)
    where = shape.positions("cuda")
    mask, stats = create_sale_block_mask(device.query, device.key, config, stats=True, **where)
    assert_selective(stats.density)
    seen = seen_of(shape, mask)
    output, (_, same) = sale_attention(*device, config, return_aux=AuxRequest(stats=True), **where)
    assert same.path is stats.path is sale_flex.Path.FLEX
    assert_attention_close(output.cpu(), *inputs, seen)
    assert not output.cpu()[~seen.any(-1).expand(output.shape[:3])].any()
    # Through the same program: everything.
    dense = sale_attention(*device, config.with_threshold(0.0), **where)
    assert_attention_close(dense.cpu(), *inputs, causal_mask(shape))


FIRST = VARIANTS["bf16 128"][0]
CONFIG = SaleConfig(Relative(0.1, bits=8), min_length=0, local_tokens=48, smooth_tokens=200)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
def test_uncompiled_flex_attention_gives_the_sparse_answer_too():
    inputs = selective_inputs(FIRST, 1)
    device = on_gpu(inputs)
    mask, stats = create_sale_block_mask(device.query, device.key, CONFIG, stats=True, **FIRST.positions("cuda"))
    assert_selective(stats.density)
    seen = seen_of(FIRST, mask)
    eager = flex_attention(*device, block_mask=mask, enable_gqa=True)
    assert_attention_close(eager.cpu(), *inputs, seen)


@pytest.mark.parametrize("where", ["query", "key", "value"])
@pytest.mark.parametrize("special", [torch.nan, torch.inf])
def test_nonfinite_numbers_show_where_dense_attention_shows_them(where, special):
    inputs = selective_inputs(FIRST, 3)
    getattr(inputs, where)[0, 1, 400, 7] = special
    device = on_gpu(inputs)
    positions = FIRST.positions("cuda")
    sparse, dense = (sale_attention(*device, CONFIG.with_threshold(threshold), **positions) for threshold in (0.5, 0.0))
    assert not dense.isfinite().all()
    assert torch.equal(sparse.isnan(), dense.isnan())
    assert torch.equal(sparse.isinf(), dense.isinf())


def call_of(inputs: Inputs):
    """A call whose arguments are all tensors on the device, and made before."""
    positions = FIRST.positions("cuda") | {"q_offset": torch.tensor(300, device="cuda")}
    config = CONFIG.with_threshold(torch.full((6,), 0.1, device="cuda"))

    def call() -> tuple[torch.Tensor, ...]:
        output, (_, stats) = sale_attention(*inputs, config, return_aux=AuxRequest(stats=True), **positions)
        mask = create_sale_block_mask(inputs.query, inputs.key, config, value=inputs.value, **positions)
        return output, stats.density, mask.kv_num_blocks, mask.full_kv_num_blocks

    return call


def test_nothing_waits_for_the_device():
    call = call_of(on_gpu(selective_inputs(FIRST, 4)))
    call()
    torch.cuda.synchronize()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
        torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_cuda_graph_captures_the_call_and_replays_it_on_new_numbers():
    inputs = on_gpu(selective_inputs(FIRST, 5))
    call = call_of(inputs)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    for seed in (6, 7):
        for tensor, fresh in zip(inputs, selective_inputs(FIRST, seed)):
            tensor.copy_(fresh)
        graph.replay()
        torch.cuda.synchronize()
        expected = call()
        assert_selective(expected[1])
        for got, wanted in zip(captured, expected):
            assert torch.equal(got, wanted)


def test_a_compiled_caller_compiles_at_most_twice():
    counter = CompileCounterWithBackend("inductor")

    def model(query, key, value):
        return sale_attention(query, key, value, CONFIG) * 2.0

    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    for length in (300, 700, 1000, 1111, 2048):
        shape = Shape(length, length, heads=6, kv_heads=2, head_dim=128, dtype=torch.bfloat16)
        inputs = selective_inputs(shape, length)
        device = on_gpu(inputs)
        output = compiled(*device)
        mask, stats = create_sale_block_mask(device.query, device.key, CONFIG, stats=True)
        if length > 512:  # of fewer keys, every block is the sink's or a row's own
            assert_selective(stats.density)
        assert_attention_close(output.cpu() / 2, *inputs, seen_of(shape, mask))
    assert counter.frame_count <= 2


def test_memory_beyond_inputs_and_output_is_at_most_one_and_a_half_times_the_query():
    shape = Shape(32768, 32768, heads=32, kv_heads=8, head_dim=128, dtype=torch.bfloat16)
    generator = torch.Generator("cuda").manual_seed(0)
    sizes = (shape.heads, shape.kv_heads, shape.kv_heads)
    inputs = [
        torch.randn(1, heads, shape.kv_len, 128, device="cuda", dtype=shape.dtype, generator=generator)
        for heads in sizes
    ]
    config = SaleConfig(Relative(1.0, bits=8), min_length=1024)
    sale_attention(*inputs, config)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    output = sale_attention(*inputs, config)
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - before - output.nbytes
    assert extra <= 1.5 * inputs[0].nbytes


def test_memory_of_the_default_rule_is_below_a_quarter_of_the_query_at_128_thousand_tokens():
    shape = Shape(131072, 131072, heads=32, kv_heads=8, head_dim=128, dtype=torch.bfloat16)
    generator = torch.Generator("cuda").manual_seed(0)
    inputs = [
        torch.randn(1, heads, shape.kv_len, 128, device="cuda", dtype=shape.dtype, generator=generator)
        for heads in (shape.heads, shape.kv_heads, shape.kv_heads)
    ]
    sale_attention(*inputs, SaleConfig())
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    output = sale_attention(*inputs, SaleConfig())
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - before - output.nbytes
    assert extra <= 0.25 * inputs[0].nbytes


def test_offsets_beyond_two_to_the_31_elements():
    if torch.cuda.get_device_properties(0).total_memory < 16 * 2**30:
        pytest.skip("needs tensors of 4 GiB")
    shape = Shape(600, 600, heads=2, kv_heads=2, head_dim=64, dtype=torch.bfloat16)
    inputs = on_gpu(selective_inputs(shape, 8))
    storage = torch.zeros(2**31 + 600 * 64, dtype=torch.bfloat16, device="cuda")
    far = storage.as_strided((1, 2, 600, 64), (0, 2**31, 64, 1))
    far.copy_(inputs.key)
    near, distant = (
        block_map(create_sale_block_mask(far if q else inputs.query, far, CONFIG, value=far)).kept
        for q in (False, True)
    )
    copy = far.clone()
    assert_selective(near.sum() / near.new_ones(near.shape).tril().sum())
    assert torch.equal(near, block_map(create_sale_block_mask(inputs.query, copy, CONFIG, value=copy)).kept)
    assert torch.equal(distant, block_map(create_sale_block_mask(copy, copy, CONFIG, value=copy)).kept)
