# SPDX-License-Identifier: BSD-3-Clause
"""Mods and block masks on a CUDA device: the kernels against the reference, gradients, sinks, many programs."""

import warnings
from dataclasses import replace

import pytest
import torch
from gpu_harness import SPARSE_PROGRAMS as PROGRAMS
from gpu_harness import assert_selective, on_gpu, selective_inputs
from torch.nn.attention.flex_attention import and_masks, create_block_mask, flex_attention

from sale_flex import AuxRequest, Mass, Relative, SaleConfig, create_sale_block_mask, mods, reference, sale_attention
from sale_flex.testing import (
    Inputs,
    Shape,
    assert_same_blocks,
    block_map,
    dense_attention,
    expand_blocks,
    rounding_band,
)

pytestmark = pytest.mark.gpu

SPARSE = SaleConfig(Mass.fast(threshold=0.1), min_length=0, local_tokens=24, sink_tokens=8, smooth_tokens=100)

RULES = {
    "moments": Mass.fast(0.1),
    "default": Mass(0.1),
    "moments of 4, 8 bits": Mass.fast(0.1, sub_block=4, bits=8),
    "scan": Mass.fast(0.1, sub_block=1, pool=1),
    "every 8th row": Mass.fast(0.1, pool=8, pool_mode="last"),
    "relative": Relative(0.4),
}


def within(shape: Shape) -> float:
    """How close to the threshold, in nats, float32 may decide otherwise: see test_under_mods; the GPU's exp2, log2 and
    division have 2 units in the last place more, and tanh 2**-20 of a cap of 5."""
    u = 2.0**-24
    return 4 * 32 * (shape.head_dim + 2) * u + 4 * (shape.kv_len + shape.head_dim) * u + 64 * u + 10 * 2.0**-20


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("program", PROGRAMS)
def test_kept_blocks_are_the_references(program, rule):
    shape = Shape(700, 900, batch=2, heads=4, kv_heads=2, head_dim=64, kv_range=((0, 900), (37, 890)))
    if program.startswith("neighborhood"):
        shape = replace(shape, q_len=900)
    config = replace(SPARSE, rule=RULES[rule])
    inputs = selective_inputs(shape, 3)
    query, key, value = on_gpu(inputs)
    where = shape.positions("cuda")
    mask, stats = create_sale_block_mask(
        query, key, config, value=value, stats=True, **where, **PROGRAMS[program](shape, "cuda")
    )
    if "every key" in stats.reason:
        config = config.with_options(sub_block=1)
    expected = reference.keep_map(
        inputs.query, inputs.key, config, inputs.value, **shape.positions(), **PROGRAMS[program](shape, "cpu")
    )
    assert_selective(stats.density)
    made = block_map(mask)
    assert_same_blocks(made.kept.cpu(), expected, within(shape))
    assert torch.equal(made.full.cpu(), made.kept.cpu() & expected.full)
    assert torch.equal(stats.kept_blocks, made.kept.sum((-2, -1)))
    assert torch.equal(stats.visible_blocks.cpu(), expected.visible.expand(2, 4, -1, -1).sum((-2, -1)))


@pytest.mark.parametrize(
    ("head_dim", "dtype", "block_size", "heads", "kv_heads"),
    [
        (128, torch.bfloat16, (64, 64), 8, 2),
        (128, torch.float16, (64, 32), 6, 2),
        (80, torch.bfloat16, (128, 64), 3, 1),
        (256, torch.bfloat16, (128, 128), 2, 2),
        (256, torch.float32, (64, 64), 4, 1),
        (32, torch.float16, (64, 64), 7, 7),
        (192, torch.bfloat16, (64, 64), 16, 1),
    ],
)
@pytest.mark.parametrize("program", ["soft cap in documents", "a user's mask by head", "relative bias"])
@pytest.mark.parametrize("rule", [Mass.fast(0.2), Relative(0.4)], ids=["mass", "relative"])
def test_shapes_and_dtypes(program, rule, head_dim, dtype, block_size, heads, kv_heads):
    shape = Shape(1000, 1300, heads=heads, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype)
    config = replace(SPARSE, rule=rule, block_size=block_size)
    inputs = selective_inputs(shape, 3)
    query, key, value = on_gpu(inputs)
    mask, stats = create_sale_block_mask(
        query, key, config, value=value, stats=True, **PROGRAMS[program](shape, "cuda")
    )
    assert_selective(stats.density)
    if "every key" in stats.reason:
        config = config.with_options(sub_block=1)
    expected = reference.keep_map(inputs.query, inputs.key, config, inputs.value, **PROGRAMS[program](shape, "cpu"))
    assert_same_blocks(block_map(mask).kept.cpu(), expected, within(shape))


def seen_of(kept: torch.Tensor, config: SaleConfig, shape: Shape, options: dict) -> torch.Tensor:
    bounds = reference.make_bounds(shape.batch, shape.q_len, shape.kv_len, device="cuda")
    masks = options.get("mask_mod"), options.get("block_mask"), options.get("is_causal", True)
    seen = reference.visible_elements(bounds, shape.heads, shape.q_len, shape.kv_len, *masks)
    return seen & expand_blocks(kept, config.block_size, shape.q_len, shape.kv_len)


def assert_output(output, inputs: Inputs, seen, score_mod=None) -> None:
    """Twice the error of the same computation in the inputs' dtype, the rule of the FlashAttention tests."""
    dtype = inputs.query.dtype
    exact, eager = (dense_attention(*inputs, seen, score_mod=score_mod, dtype=x) for x in (torch.float64, dtype))
    allowed = 2 * float((eager - exact).abs().max()) + rounding_band(exact, dtype)
    assert float((output - exact).abs().max()) <= allowed


@pytest.mark.parametrize("program", ["documents", "alibi", "neighborhood 2-d", "a finer block mask", "relative bias"])
def test_attention_is_exact_on_the_kept_blocks(program):
    shape = Shape(1000, 1000, heads=4, kv_heads=2, head_dim=128, dtype=torch.bfloat16)
    inputs, options = on_gpu(selective_inputs(shape, 1)), PROGRAMS[program](shape, "cuda")
    output, (lse, stats) = sale_attention(*inputs, SPARSE, return_aux=AuxRequest(lse=True, stats=True), **options)
    mask = create_sale_block_mask(inputs.query, inputs.key, SPARSE, value=inputs.value, **options)
    assert_selective(stats.density)
    made = block_map(mask)
    assert torch.equal(stats.kept_blocks, made.kept.sum((-2, -1)))
    seen = seen_of(made.kept, SPARSE, shape, options)
    assert_output(output, inputs, seen, options.get("score_mod"))
    how = {"bounds": reference.make_bounds(1, 1000, 1000, device="cuda"), "block_size": (64, 64), "scale": 128**-0.5}
    _, exact = reference.masked_attention(*inputs, made.kept, **how, **options)
    assert torch.equal(lse.isinf(), exact.isinf())
    assert float((lse - exact).masked_fill(exact.isinf(), 0).abs().max()) < 1e-3
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "flex_attention called without torch.compile")
        eager = flex_attention(*inputs, score_mod=options.get("score_mod"), block_mask=mask, enable_gqa=True)
    assert_output(eager, inputs, seen, options.get("score_mod"))


@pytest.mark.parametrize(
    "program",
    ["window", "alibi", "soft cap in documents", "relative bias", "neighborhood 2-d, dilated", "a finer block mask"],
)
def test_threshold_zero_is_flex_attention_with_the_mod(program):
    shape = Shape(1000, 1000, heads=4, kv_heads=2, head_dim=64, dtype=torch.bfloat16)
    inputs, options = on_gpu(selective_inputs(shape, 1)), PROGRAMS[program](shape, "cuda")
    output, (_, stats) = sale_attention(
        *inputs, SPARSE.with_threshold(0.0), return_aux=AuxRequest(stats=True), **options
    )
    assert torch.equal(stats.kept_blocks, stats.visible_blocks)
    masks = [options.get("mask_mod"), getattr(options.get("block_mask"), "mask_mod", None)]
    masks += [mods.causal()] if options.get("is_causal", True) else []
    mask_mod = and_masks(*(mask for mask in masks if mask is not None))
    block_mask = create_block_mask(mask_mod, None, None, 1000, 1000, device="cuda")
    score_mod = options.get("score_mod")
    compiled = torch.compile(flex_attention, fullgraph=True)
    # Torch's own tiles, 128 by 128, leave no room for the biases in shared memory.
    tiles = {"BLOCK_M": 64, "BLOCK_N": 64}
    dense = compiled(*inputs, score_mod=score_mod, block_mask=block_mask, enable_gqa=True, kernel_options=tiles)
    seen = seen_of(torch.ones(1, 4, 16, 16, dtype=torch.bool, device="cuda"), SPARSE, shape, options)
    for either in (output, dense):
        assert_output(either, inputs, seen, score_mod)


def test_sinks_take_their_share():
    shape = Shape(1000, 1000, heads=4, kv_heads=2, head_dim=64)
    inputs = on_gpu(selective_inputs(shape, 1))
    sinks = torch.tensor([-torch.inf, 0.0, 3.0, 40.0], device="cuda")
    for options in ({}, PROGRAMS["alibi"](shape, "cuda")):
        output, (_, stats) = sale_attention(
            *inputs, SPARSE, sink_logits=sinks, return_aux=AuxRequest(stats=True), **options
        )
        assert_selective(stats.density)
        made = block_map(create_sale_block_mask(inputs.query, inputs.key, SPARSE, value=inputs.value, **options))
        how = {"bounds": reference.make_bounds(1, 1000, 1000, device="cuda"), "block_size": (64, 64), "scale": 0.125}
        exact, _ = reference.masked_attention(*inputs, made.kept, **how, sink_logits=sinks, **options)
        assert torch.allclose(output.double(), exact, atol=2e-3, rtol=0)  # TF32 products
        assert float(output[:, 3].abs().max()) < 1e-6


@pytest.mark.parametrize("program", [None, "documents", "alibi", "soft cap"])
def test_gradients_are_those_of_dense_attention_under_the_mask(program):
    shape = Shape(1000, 1000, heads=4, kv_heads=2, head_dim=128, dtype=torch.bfloat16)
    config = SPARSE.with_options(threshold=0.2, block_size=(128, 128))
    options = {} if program is None else PROGRAMS[program](shape, "cuda")
    inputs = on_gpu(selective_inputs(shape, 1))
    # About as large as rows' log-sum-exps, so that sinks take a share: gradients of next to nothing are all rounding.
    sinks = torch.tensor([10.0, 12.0, 11.0, 13.0], device="cuda")
    upstream = torch.randn(inputs.query.shape, generator=torch.Generator().manual_seed(0)).cuda()

    def gradients(attend, dtype):
        leaves = [x.detach().to(dtype).requires_grad_() for x in (*inputs, sinks)]
        output = attend(*leaves)
        (output.to(torch.float64) * upstream).sum().backward()
        return [leaf.grad.double() for leaf in leaves]

    mask, stats = create_sale_block_mask(inputs.query, inputs.key, config, value=inputs.value, stats=True, **options)
    assert_selective(stats.density)
    made = block_map(mask)
    how = {
        "bounds": reference.make_bounds(1, 1000, 1000, device="cuda"),
        "block_size": (128, 128),
        "scale": 128**-0.5,
        **options,
    }

    def sparse(query, key, value, sinks):
        return sale_attention(query, key, value, config, sink_logits=sinks.float(), **options)

    def dense(query, key, value, sinks):
        return reference.masked_attention(query, key, value, made.kept, sink_logits=sinks, **how)[0]

    exact = gradients(dense, torch.float64)
    for got, wanted in zip(gradients(sparse, torch.bfloat16), exact):
        # A handful of roundings to bfloat16 on the way back.
        assert float((got - wanted).norm() / wanted.norm()) < 8 * 2.0**-9


def test_gradients_for_blocks_that_this_torch_can_not_differentiate_are_refused():
    if tuple(int(x) for x in torch.__version__.split(".")[:2]) >= (2, 14):
        pytest.skip("this torch fits its tiles to small blocks")
    inputs = on_gpu(selective_inputs(Shape(700, 700, heads=2, head_dim=128, dtype=torch.bfloat16), 1))
    inputs.query.requires_grad_()
    with pytest.raises(NotImplementedError, match=r"multiples of 128.*\(64, 64\).*\(128, 128\)"):
        sale_attention(*inputs, SPARSE)


def ten_programs(part: int):
    """Mods of ten codes, over changing lengths, head counts and block sizes."""
    blocks = ((64, 64), (64, 32), (128, 64), (128, 128))
    for n in range(10 * part, 10 * part + 10):
        source = (
            f"def mod(score, b, h, q_idx, kv_idx):\n    return score * {1 + n / 40} - (kv_idx % {n + 2} == 0) * 0.25\n"
        )
        names: dict = {}
        exec(source, names)
        heads = (4, 2, 8)[n % 3]
        length = (700, 733, 657, 1001)[n % 4]
        yield names["mod"], Shape(length, length, heads=heads, kv_heads=2, head_dim=(32, 64)[n % 2]), blocks[n % 4]


# Ten are more than the recompilations that torch allows a function, and take a minute or two. Forty in one process are
# compiled on a CPU, in test_under_mods_compiled.
@pytest.mark.parametrize("part", range(4))
def test_ten_programs_in_one_process_all_work_and_stay_sparse(part):
    followed = 0
    for mod, shape, block_size in ten_programs(part):
        config = replace(SPARSE, block_size=block_size)
        inputs = on_gpu(selective_inputs(shape, 1))
        output = sale_attention(*inputs, config, score_mod=mod)
        mask = create_sale_block_mask(*inputs[:2], config, value=inputs.value, score_mod=mod)
        seen = seen_of(block_map(mask).kept, config, shape, {})
        exact = dense_attention(*inputs, seen, score_mod=mod)
        assert float((output - exact).abs().max()) < 5e-3  # TF32 products
        dense = dense_attention(
            *inputs, seen_of(torch.ones_like(block_map(mask).kept), config, shape, {}), score_mod=mod
        )
        followed += int(float((output - dense).abs().max()) > 1e-2)
    assert followed > 7


def test_no_stage_waits_for_the_host():
    shape = Shape(1000, 1000, heads=4, kv_heads=2, head_dim=64, dtype=torch.bfloat16)
    inputs = on_gpu(selective_inputs(shape, 1))
    for program in ("soft cap in documents", "alibi", "relative bias", "a user's mask by head", "a block mask"):
        options = PROGRAMS[program](shape, "cuda")
        for rule in (SPARSE.rule, Relative(0.1)):
            config = replace(SPARSE, rule=rule)
            _, aux = sale_attention(*inputs, config, return_aux=AuxRequest(stats=True), **options)
            assert_selective(aux.stats.density)
            torch.cuda.synchronize()
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
                torch.cuda.set_sync_debug_mode("error")
            try:
                sale_attention(*inputs, config, **options)
            finally:
                torch.cuda.set_sync_debug_mode("default")


def test_a_cuda_graph_holds_a_programmed_call():
    shape = Shape(1000, 1000, heads=4, kv_heads=2, head_dim=64, dtype=torch.bfloat16)
    inputs, others = (on_gpu(selective_inputs(shape, seed)) for seed in (1, 2))
    options = PROGRAMS["soft cap in documents"](shape, "cuda")
    static = Inputs(*(x.clone() for x in inputs))
    _, aux = sale_attention(*static, SPARSE, return_aux=AuxRequest(stats=True), **options)
    assert_selective(aux.stats.density)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = sale_attention(*static, SPARSE, **options)
    for mine, new in zip(static, others):
        mine.copy_(new)
    graph.replay()
    assert torch.equal(output, sale_attention(*others, SPARSE, **options))


@pytest.mark.parametrize("program", ["documents", "alibi", "relative bias", "a user's mask by head"])
def test_a_compiled_caller(program):
    shape = Shape(1000, 1000, heads=4, kv_heads=2, head_dim=64, dtype=torch.bfloat16)
    inputs, options = on_gpu(selective_inputs(shape, 1)), PROGRAMS[program](shape, "cuda")
    compiled = torch.compile(lambda *x: sale_attention(*x, SPARSE, **options), fullgraph=True)
    output = compiled(*inputs)
    mask, stats = create_sale_block_mask(inputs.query, inputs.key, SPARSE, value=inputs.value, stats=True, **options)
    assert_selective(stats.density)
    assert_output(output, inputs, seen_of(block_map(mask).kept, SPARSE, shape, options), options.get("score_mod"))


def test_a_window_at_length_has_bounded_lists_and_drops_nothing():
    length = 80_000
    generator = torch.Generator("cuda").manual_seed(0)
    query, key = (
        torch.randn(1, heads, length, 64, device="cuda", dtype=torch.bfloat16, generator=generator) for heads in (4, 1)
    )
    # A window of 64 blocks: some rows have an eighth of an octave more than 1/64 of their mass in one.
    config = SPARSE.with_threshold(0.0187)
    mask, stats = create_sale_block_mask(query, key, config, mask_mod=mods.sliding_window(4096), stats=True)
    assert mask.kv_indices.shape[3] < length // 64
    assert int(stats.dropped_blocks.sum()) == 0
    assert_selective(stats.density)
