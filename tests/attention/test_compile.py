# SPDX-License-Identifier: BSD-3-Clause
"""Under torch.compile, and through the programs we compile: no break, few compilations, never silently dense."""

from dataclasses import replace
from functools import cache, partial

import pytest
import torch
from attention_harness import attend_listed, attention_by
from config_harness import as_rule
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention.flex_attention import flex_attention

from sale_flex import AuxRequest, Mass, Path, Relative, SaleConfig, create_sale_block_mask, sale_attention
from sale_flex.flex import run as flex
from sale_flex.testing import (
    Inputs,
    Shape,
    assert_attention_close,
    block_map,
    causal_mask,
    expand_blocks,
    structured_inputs,
)

CONFIG = SaleConfig(Relative(0.3, bits=8), min_length=64, local_tokens=24, smooth_tokens=64)


compile_cheaply = partial(torch.compile, backend="eager")
"""Tracing and guards are the real ones, and what they end in is not a C++ compiler."""


@pytest.fixture(autouse=True)
def no_program_compiled_before(monkeypatch):
    """Neither use the programs of other tests nor leave them what these compile."""
    monkeypatch.setattr(flex, "_program", cache(flex._program.__wrapped__))


def seen_of(shape: Shape, inputs: Inputs, config: SaleConfig = CONFIG) -> torch.Tensor:
    """What a query may attend to: visible, and in a kept block."""
    mask = create_sale_block_mask(inputs.query, inputs.key, config, **shape.positions())
    return expand_blocks(block_map(mask).kept, config.block_size, shape.q_len, shape.kv_len) & causal_mask(shape)


LENGTHS = [*range(300, 700, 40), 257, 333, 512, 640, 701, 768, 645, 1000, 900, 811]


# A rule is traced as the other is, and what a backend makes of the trace does not depend on the rule.
@pytest.mark.parametrize(("backend", "metric"), [("inductor", "mass"), ("aot_eager", "relative")])
def test_a_compiled_caller_has_one_graph_and_compiles_at_most_twice_over_twenty_lengths(backend, metric):
    config = as_rule(CONFIG, metric)
    assert len(set(LENGTHS)) == 20
    counter = CompileCounterWithBackend(backend)

    # As in a model, a product follows: torch's CPU template of flex_attention takes no pointwise operation after it.
    project = torch.eye(32)

    def model(query, key, value):
        return sale_attention(query * 1.0, key, value, config) @ project

    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    for length in LENGTHS:
        shape = Shape(length, length, heads=4, kv_heads=2, head_dim=32)
        inputs = structured_inputs(shape, length)
        output = compiled(*inputs)
        if length in LENGTHS[:3] or length == 811:
            seen = seen_of(shape, inputs, config)
            assert not torch.equal(seen, causal_mask(shape).expand_as(seen))
            assert_attention_close(output, *inputs, seen)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("metric", ["mass", "relative"])
def test_chunks_padding_and_stats_trace_without_a_break(metric):
    config = as_rule(CONFIG, metric)

    def model(query, key, value, offset, ranges):
        return sale_attention(
            query, key, value, config, q_offset=offset, kv_range=ranges, return_aux=AuxRequest(stats=True)
        )

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    for q_len, kv_len, offset in ((130, 400, 200), (200, 500, 300), (333, 444, 100), (150, 600, 0)):
        shape = Shape(q_len, kv_len, 2, 4, 2, 32, q_offset=offset, kv_range=((0, kv_len), (70, kv_len - 9)))
        inputs = structured_inputs(shape, kv_len)
        ranges = shape.positions()["kv_range"]
        output, (_, stats) = compiled(*inputs, torch.tensor(offset), ranges)
        with attention_by(attend_listed):
            expected = sale_attention(*inputs, config, return_aux=AuxRequest(stats=True), **shape.positions())[1].stats
        assert stats.describe() == expected.describe()
        assert (stats.path, stats.reason) == (Path.FLEX, "")
        assert torch.equal(stats.kept_blocks, expected.kept_blocks)
        assert torch.equal(stats.visible_blocks, expected.visible_blocks)
        assert_attention_close(output, *inputs, seen_of(shape, inputs, config))
    assert counter.frame_count <= 2


def test_a_short_prompt_traces_to_dense_attention():
    compiled = torch.compile(
        lambda *x: sale_attention(*x, CONFIG, return_aux=AuxRequest(stats=True)), fullgraph=True, backend="aot_eager"
    )
    shape = Shape(60, 60, heads=4, kv_heads=2, head_dim=32)
    inputs = structured_inputs(shape, 0)
    output, (_, stats) = compiled(*inputs)
    assert (stats.path, stats.reason) == (Path.DENSE_SDPA, "no more keys than min_length")
    assert_attention_close(output, *inputs, causal_mask(shape))


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_a_compiled_caller_may_return_what_ran_and_ask_for_it(backend):
    shape = Shape(300, 300, heads=4, kv_heads=2, head_dim=32)
    inputs = structured_inputs(shape, 0)
    ahead = replace(CONFIG, min_length=300)

    def model(query, key, value):
        output, aux = sale_attention(query, key, value, CONFIG, return_aux=AuxRequest(stats=True))
        dense, of_dense = sale_attention(query, key, value, ahead, return_aux=AuxRequest(stats=True))
        if aux.stats.ran_dense or not of_dense.stats.path.is_dense or of_dense.stats.path is not Path.DENSE_SDPA:
            output = output * torch.nan
        return output, aux, dense, of_dense

    output, aux, dense, of_dense = torch.compile(model, fullgraph=True, backend=backend)(*inputs)
    with attention_by(attend_listed):
        _, expected = sale_attention(*inputs, CONFIG, q_offset=0, return_aux=AuxRequest(stats=True))
    assert (type(aux), type(aux.stats)) == (type(expected), type(expected.stats))
    assert aux.lse is None
    # The rows of the dense prefix are of the one program, and are computed apart outside of it.
    assert (aux.stats.path, aux.stats.reason, aux.stats.dense_rows) == (Path.FLEX, "", 0)
    assert aux.stats.path is Path.FLEX
    assert aux.stats.describe() == expected.stats.describe() == "flex_attention"
    assert (of_dense.stats.path, of_dense.stats.reason) == (Path.DENSE_SDPA, "no more keys than min_length")
    assert torch.equal(aux.stats.kept_blocks, expected.stats.kept_blocks)
    assert torch.equal(of_dense.stats.kept_blocks, of_dense.stats.visible_blocks)
    assert_attention_close(output, *inputs, seen_of(shape, inputs))
    assert_attention_close(dense, *inputs, causal_mask(shape))


OWN = {"min_length": 64, "local_tokens": 24, "smooth_tokens": 64}
MADE = {
    "mass": lambda: SaleConfig(Mass(0.1, pool=2), **OWN),
    "relative": lambda: SaleConfig(Relative(0.3, bits=8), **OWN),
    "fast": lambda: SaleConfig(Mass.fast(0.1), **OWN),
    "the default rule at another threshold": lambda: SaleConfig(**OWN).with_threshold(0.1),
    "flat options": lambda: SaleConfig.from_options("mass", threshold=0.1, **OWN),
    "a changed copy": lambda: CONFIG.with_options(threshold=0.2, smooth_tokens=32),
    "another rule": lambda: replace(CONFIG, rule=Mass(0.1)),
}
"""Name -> how a user makes a config."""


@pytest.mark.parametrize("make", MADE.values(), ids=MADE)
def test_a_config_may_be_made_in_a_compiled_function(make):
    shape = Shape(300, 300, heads=4, kv_heads=2, head_dim=32)
    inputs = structured_inputs(shape, 0)
    output = torch.compile(lambda *x: sale_attention(*x, make()), fullgraph=True, backend="aot_eager")(*inputs)
    seen = seen_of(shape, inputs, make())
    assert not torch.equal(seen, causal_mask(shape).expand_as(seen))
    assert_attention_close(output, *inputs, seen)


def test_a_block_mask_made_in_a_compiled_function_serves_outside():
    shape = Shape(300, 300, heads=4, kv_heads=2, head_dim=32)
    inputs = structured_inputs(shape, 0)

    def model(query, key, value):
        mask = create_sale_block_mask(query, key, CONFIG)
        return flex_attention(query, key, value, block_mask=mask, enable_gqa=True)

    output = torch.compile(model, fullgraph=True, backend="aot_eager")(*inputs)
    assert_attention_close(output, *inputs, seen_of(shape, inputs))


def test_bad_input_raises_while_tracing_too():
    compiled = torch.compile(lambda q, k, v: sale_attention(q, k, v, CONFIG), fullgraph=True, backend="eager")
    with pytest.raises(Exception, match="head_dim"):
        compiled(*(torch.zeros(1, 1, 100, 33) for _ in range(3)))


def forty_variants() -> list[tuple[torch.dtype, int, tuple[int, int], int]]:
    sizes = ((64, 64), (64, 32), (128, 64), (128, 128))
    variants = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for dim in (32, 64, 80, 96):
            variants += [(dtype, dim, size, 1 + len(variants) % 3) for size in sizes]
    return variants[:40]


def test_forty_programs_in_one_process_hit_no_recompile_limit(monkeypatch):
    # torch counts compilations by code object, and stops after 8. What is compiled is replaced by what is cheap to
    # compile; that each variant is traced anew, and none runs uncompiled, is what matters here.
    traced: list[bool] = []

    def cheap(query, key, value, *, score_mod, block_mask, scale, enable_gqa, kernel_options):
        traced.append(torch.compiler.is_compiling())
        return query * (block_mask.kv_num_blocks.sum() + block_mask.full_kv_num_blocks.sum())

    monkeypatch.setattr(flex, "flex_attention", cheap)
    monkeypatch.setattr(torch, "compile", compile_cheaply)
    for dtype, dim, size, heads in forty_variants():
        shape = Shape(300, 300, heads=heads, head_dim=dim, dtype=dtype)
        config = replace(CONFIG, block_size=size, min_length=0)
        inputs = structured_inputs(shape, 0)
        output = sale_attention(*inputs, config)
        kept = block_map(create_sale_block_mask(*inputs[:2], config)).kept.sum()
        assert torch.equal(output, inputs.query * kept)
    assert traced == [True] * 40


def laid_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    if layout == "transposed":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "slice of a cache":
        return torch.cat([x, x], 2)[:, :, : x.shape[2]]
    return x


def test_lengths_and_layouts_of_one_model_hit_no_recompile_limit(monkeypatch):
    # The compiler specialises on lengths of one block, on equal lengths, and on strides. All combinations through one
    # program would be more than its 8 compilations.
    monkeypatch.setattr(torch, "compile", compile_cheaply)
    config = replace(CONFIG, min_length=0)
    lengths = ((300, 300), (128, 300), (100, 130), (64, 64), (40, 64), (40, 40), (65, 65), (64, 2300), (50, 400))
    for of_query, of_key in (("plain", "plain"), ("transposed", "transposed"), ("plain", "slice of a cache")):
        for q_len, kv_len in lengths:
            inputs = structured_inputs(Shape(q_len, kv_len, batch=2, heads=4, kv_heads=2, head_dim=32), 0)
            views = Inputs(laid_out(inputs.query, of_query), *(laid_out(x, of_key) for x in inputs[1:]))
            assert sale_attention(*views, config).shape == inputs.query.shape


def test_switched_off_compilation_is_refused_and_not_run_densely():
    inputs = structured_inputs(Shape(300, 300, head_dim=32), 0)
    with torch.compiler.set_stance("force_eager"), pytest.raises(RuntimeError, match=r"torch\.compile"):
        sale_attention(*inputs, CONFIG)


def test_a_fused_projection_with_a_rotary_embedding_is_read_right_by_inductor():
    """Torch's C++ template for flex_attention misreads such values, which are views of a product (torch 2.13)."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 160, 64, generator=generator)
    weight, turn = torch.randn(64, 8 * 32, generator=generator) / 8, torch.rand(160, 32, generator=generator)
    project = torch.randn(4 * 32, 64, generator=generator) / 8
    config = as_rule(CONFIG, "mass")

    def rotated(x):
        first, second = x.chunk(2, -1)
        return x * turn + torch.cat([-second, first], -1) * turn

    def layer(hidden):
        parts = (hidden @ weight).split((4 * 32, 2 * 32, 2 * 32), -1)
        query, key, value = (x.view(1, 160, heads, 32).transpose(1, 2) for x, heads in zip(parts, (4, 2, 2)))
        output = sale_attention(rotated(query), rotated(key), value, config.with_options(threshold=0.0))
        return output.transpose(1, 2).reshape(1, 160, -1) @ project

    with torch.no_grad():
        output = torch.compile(layer, fullgraph=True)(hidden)
        with attention_by(attend_listed):
            expected = layer(hidden)
    # Sums of 160 float32 products in another order; a misread value is off by its own size.
    assert float((output - expected).abs().max()) < 160 * torch.finfo(torch.float32).eps * float(expected.abs().max())


def test_a_scale_that_is_a_modules_number_is_taken_with_dynamic_shapes():
    class Layer(torch.nn.Module):
        def __init__(self, scaling):
            super().__init__()
            self.scaling = scaling

        def forward(self, query, key, value):
            return sale_attention(query, key, value, CONFIG, scale=self.scaling)

    counter = CompileCounterWithBackend("eager")
    for scaling in (0.25, 0.125):
        layer = Layer(scaling)
        compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
        for length in (300, 420, 500):
            inputs = structured_inputs(Shape(length, length, heads=4, kv_heads=2, head_dim=32), length)
            output = compiled(*inputs)
            with attention_by(attend_listed):
                torch.testing.assert_close(output, layer(*inputs), atol=1e-5, rtol=1e-5)
    assert counter.frame_count == 2
