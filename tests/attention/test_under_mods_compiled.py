# SPDX-License-Identifier: BSD-3-Clause
"""Mods under torch.compile: no graph break, no stale values, few compilations, never a silent dense run."""

from dataclasses import replace
from functools import cache

import pytest
import torch
from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention.flex_attention import flex_attention

from sale_flex import Mass, SaleConfig, create_sale_block_mask, mods, reference, sale_attention
from sale_flex.flex import run as flex
from sale_flex.testing import Inputs, Shape, block_map, dense_attention, expand_blocks, structured_inputs
from sale_flex.testing.programs import PROGRAMS

CONFIG = SaleConfig(Mass.fast(threshold=0.03), min_length=0, local_tokens=24, sink_tokens=8, smooth_tokens=100)
SHAPE = Shape(300, 300, heads=4, kv_heads=2, head_dim=32)


@pytest.fixture(autouse=True)
def no_program_compiled_before(monkeypatch):
    """Neither use the programs of other tests nor leave them what these compile."""
    torch._dynamo.reset()
    monkeypatch.setattr(flex, "_program", cache(flex._program.__wrapped__))


def exact(inputs: Inputs, config: SaleConfig, options: dict) -> torch.Tensor:
    """Attention over the blocks that an uncompiled call keeps."""
    query, key, value = inputs
    mask = create_sale_block_mask(query, key, config, value=value, **options)
    bounds = reference.make_bounds(query.shape[0], query.shape[2], key.shape[2])
    masks = options.get("mask_mod"), options.get("block_mask"), options.get("is_causal", True)
    seen = reference.visible_elements(bounds, query.shape[1], query.shape[2], key.shape[2], *masks)
    seen = seen & expand_blocks(block_map(mask).kept, config.block_size, query.shape[2], key.shape[2])
    return dense_attention(*inputs, seen, score_mod=options.get("score_mod"))


def assert_close(output: torch.Tensor, expected: torch.Tensor) -> None:
    """In float32, a thousandth of what a block more or less changes."""
    assert float((output - expected).abs().max()) < 1e-5


@pytest.mark.parametrize("program", PROGRAMS)
def test_mask_and_attention_trace_into_one_graph(program):
    inputs, options = structured_inputs(SHAPE, 1), PROGRAMS[program](SHAPE, "cpu")

    def model(query, key, value):
        mask = create_sale_block_mask(query, key, CONFIG, **options)
        return flex_attention(query, key, value, score_mod=options.get("score_mod"), block_mask=mask, enable_gqa=True)

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_close(compiled(*inputs), exact(inputs, CONFIG, options))


@pytest.mark.parametrize("program", ["documents", "soft cap in documents", "a user's score", "a user's mask by head"])
def test_sale_attention_compiled_by_inductor(program):
    inputs, options = structured_inputs(SHAPE, 1), PROGRAMS[program](SHAPE, "cpu")
    project = torch.eye(32)
    compiled = torch.compile(lambda *x: sale_attention(*x, CONFIG, **options) @ project, fullgraph=True)
    assert_close(compiled(*inputs), exact(inputs, CONFIG, options))


READY = {
    "causal": lambda x: {"mask_mod": mods.causal(), "is_causal": False},
    "window": lambda x: {"mask_mod": mods.sliding_window(90)},
    "prefix": lambda x: {"mask_mod": mods.prefix_lm(x["prefix"]), "is_causal": False},
    "documents": lambda x: {"mask_mod": mods.document(x["ids"])},
    "window and documents": lambda x: {"mask_mod": mods.and_masks(mods.sliding_window(90), mods.document(x["ids"]))},
    "alibi": lambda x: {"score_mod": mods.alibi(x["slopes"])},
    "soft cap": lambda x: {"score_mod": mods.softcap(5.0)},
    "relative bias": lambda x: {"score_mod": mods.relative_bias(x["table"])},
    "neighborhood": lambda x: {"mask_mod": mods.neighborhood((20, 15), 5), "is_causal": False},
}


def captured(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "prefix": torch.tensor([40 + 30 * seed]),
        "ids": (torch.arange(300) >= 100 + 50 * seed).int()[None],
        "slopes": torch.rand(4, generator=generator),
        "table": torch.randn(4, 64, generator=generator),
    }


@pytest.mark.parametrize("program", READY)
def test_ready_mods_may_be_made_inside_and_new_values_are_used_without_recompiling(program):
    inputs = structured_inputs(SHAPE, 1)
    counter = CompileCounterWithBackend("aot_eager")

    def model(query, key, value, x):
        return sale_attention(query, key, value, CONFIG, **READY[program](x))

    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for seed in range(3):
        x = captured(seed)
        assert_close(compiled(*inputs, x), exact(inputs, CONFIG, READY[program](x)))
    assert counter.frame_count == 1


@pytest.mark.parametrize("program", ["documents", "alibi", "relative bias", "window and documents"])
def test_a_new_closure_over_new_values_does_not_recompile(program):
    inputs = structured_inputs(SHAPE, 1)
    counter = CompileCounterWithBackend("aot_eager")

    def model(query, key, value, options):
        return sale_attention(query, key, value, CONFIG, **options)

    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for seed in range(3):
        options = READY[program](captured(seed))
        assert_close(compiled(*inputs, options), exact(inputs, CONFIG, options))
    assert counter.frame_count == 1


def test_a_number_that_a_mod_captures_is_not_remembered_beyond_its_value():
    inputs = structured_inputs(SHAPE, 1)

    def model(query, key, value, options):
        return sale_attention(query, key, value, CONFIG, **options)

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for window, cap in ((40, 5.0), (150, 5.0), (40, 2.0), (90, 9.0)):
        options = {"mask_mod": mods.sliding_window(window), "score_mod": mods.softcap(cap)}
        assert_close(compiled(*inputs, options), exact(inputs, CONFIG, options))


@pytest.mark.parametrize("program", ["window", "alibi", "soft cap", "documents", "relative bias"])
def test_a_changing_length_compiles_at_most_twice(program):
    counter = CompileCounterWithBackend("aot_eager")

    def model(query, key, value, x):
        return sale_attention(query, key, value, CONFIG, **READY[program](x))

    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    for length in (300, 333, 257, 512, 401, 640, 390, 333):
        inputs = structured_inputs(replace(SHAPE, q_len=length, kv_len=length), length)
        x = captured(1) | {"ids": (torch.arange(length) >= length // 3).int()[None]}
        output = compiled(*inputs, x)
        if length in (300, 512, 640):
            assert_close(output, exact(inputs, CONFIG, READY[program](x)))
    assert counter.frame_count <= 2


@pytest.mark.parametrize("program", ["documents", "relative bias"])
def test_inductor_takes_captured_tensors_of_changing_length(program):
    project = torch.eye(32)

    def model(query, key, value, x):
        return sale_attention(query, key, value, CONFIG, **READY[program](x)) @ project

    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for length in (300, 401):
        inputs = structured_inputs(replace(SHAPE, q_len=length, kv_len=length), length)
        x = captured(1) | {"ids": (torch.arange(length) >= length // 3).int()[None]}
        assert_close(compiled(*inputs, x), exact(inputs, CONFIG, READY[program](x)))


def forty_programs():
    """Mods of forty codes, over changing lengths, head counts and block sizes."""
    blocks = ((64, 64), (64, 32), (128, 64), (128, 128))
    for n in range(40):
        source = (
            f"def mod(score, b, h, q_idx, kv_idx):\n    return score * {1 + n / 40} - (kv_idx % {n + 2} == 0) * 0.25\n"
        )
        names: dict = {}
        exec(source, names)
        heads = (4, 2, 8)[n % 3]
        length = (300, 333, 257, 401)[n % 4]
        yield names["mod"], Shape(length, length, heads=heads, kv_heads=2, head_dim=(32, 64)[n % 2]), blocks[n % 4]


def test_forty_programs_in_one_process_all_work_and_stay_sparse(monkeypatch):
    # Torch counts compilations by code object, and stops after 8. What is compiled is replaced by what is cheap to
    # compile and shows the block mask; that each program is traced anew, and none runs uncompiled, is what matters.
    traced: list[bool] = []

    def cheap(query, key, value, *, score_mod, block_mask, scale, enable_gqa, kernel_options):
        traced.append(torch.compiler.is_compiling())
        place = torch.zeros((), dtype=torch.int32)
        with TransformGetItemToIndex():
            bias = score_mod(torch.zeros(()), place, place, place, place)
        return query * (block_mask.kv_num_blocks.sum() + block_mask.full_kv_num_blocks.sum() + 0 * bias)

    compile_ = torch.compile
    monkeypatch.setattr(flex, "flex_attention", cheap)
    monkeypatch.setattr(torch, "compile", lambda *args, **how: compile_(*args, **how, backend="eager"))
    sparse = 0
    for mod, shape, block_size in forty_programs():
        config = replace(CONFIG, block_size=block_size)
        inputs = structured_inputs(shape, 1)
        output = sale_attention(*inputs, config, score_mod=mod)
        mask, stats = create_sale_block_mask(*inputs[:2], config, value=inputs.value, score_mod=mod, stats=True)
        assert torch.equal(output, inputs.query * block_map(mask).kept.sum())
        sparse += int((stats.density < 1).all())
    assert traced == [True] * 40
    assert sparse > 30
