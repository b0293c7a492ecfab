# SPDX-License-Identifier: BSD-3-Clause
"""Calls with mods and block masks from end to end: the blocks of the reference, and exact attention on them."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import and_masks, create_block_mask, flex_attention

from sale_flex import (
    AuxRequest,
    Mass,
    Path,
    Relative,
    SaleConfig,
    create_sale_block_mask,
    mods,
    reference,
    sale_attention,
)
from sale_flex.testing import (
    Inputs,
    Shape,
    assert_same_blocks,
    block_map,
    dense_attention,
    expand_blocks,
    rounding_band,
    structured_inputs,
)
from sale_flex.testing.programs import PROGRAMS
from sale_flex.testing.strategies import seeds, shapes

uncompiled = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")

SPARSE = SaleConfig(Mass.fast(threshold=0.02), min_length=0, local_tokens=24, sink_tokens=8, smooth_tokens=100)

RULES = {
    "moments": Mass.fast(0.02),
    "default": Mass(0.02),
    "moments of 4, 8 bits": Mass.fast(0.02, sub_block=4, bits=8),
    "scan": Mass.fast(0.02, sub_block=1, pool=1),
    "every 8th row": Mass.fast(0.02, pool=8, pool_mode="last"),
    "relative": Relative(0.2),
    "relative, 8 bits": Relative(0.2, bits=8),
}


def reference_map(inputs: Inputs, config: SaleConfig, shape: Shape, options: dict, reason: str):
    if "every key" in reason:  # what the score_mod needs
        config = config.with_options(sub_block=1)
    return reference.keep_map(inputs.query, inputs.key, config, inputs.value, **shape.positions(), **options)


def within(shape: Shape) -> float:
    """How close to the threshold, in nats, float32 may decide otherwise.

    Sums of at most Skv exponentials, whose logits are below 32 in magnitude and sums of D products: their errors are
    (D + 2) u of 32 each for element and total, (Skv + D) u for the sums, and as much for the mod.
    """
    u = 2.0**-24
    return 4 * 32 * (shape.head_dim + 2) * u + 4 * (shape.kv_len + shape.head_dim) * u


def seen_of(inputs: Inputs, kept: torch.Tensor, config: SaleConfig, shape: Shape, options: dict) -> torch.Tensor:
    bounds = reference.make_bounds(shape.batch, shape.q_len, shape.kv_len, **shape.positions())
    seen = reference.visible_elements(
        bounds,
        shape.heads,
        shape.q_len,
        shape.kv_len,
        options.get("mask_mod"),
        options.get("block_mask"),
        options.get("is_causal", True),
    )
    return seen & expand_blocks(kept, config.block_size, shape.q_len, shape.kv_len)


def assert_output(output, inputs: Inputs, seen, score_mod=None, scale=None, sink_logits=None) -> None:
    """Twice the error of the same computation in float32, the rule of the FlashAttention tests."""
    how = {"score_mod": score_mod, "scale": scale}
    exact, eager = (dense_attention(*inputs, seen, **how, dtype=x) for x in (torch.float64, torch.float32))
    allowed = 2 * float((eager - exact).abs().max()) + rounding_band(exact, torch.float32)
    assert float((output - exact).abs().max()) <= allowed


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("program", PROGRAMS)
def test_kept_blocks_are_the_references(program, rule):
    shape = Shape(333, 400, batch=2, heads=4, kv_heads=2, head_dim=32, kv_range=((0, 400), (37, 390)))
    if program.startswith("neighborhood"):
        shape = replace(shape, q_len=400)
    config = replace(SPARSE, rule=RULES[rule])
    inputs, options = structured_inputs(shape, 3), PROGRAMS[program](shape, "cpu")
    mask, stats = create_sale_block_mask(
        inputs.query, inputs.key, config, value=inputs.value, stats=True, **shape.positions(), **options
    )
    expected = reference_map(inputs, config, shape, options, stats.reason)
    made = block_map(mask)
    assert_same_blocks(made.kept, expected, within(shape))
    assert torch.equal(made.full, made.kept & expected.full)
    assert not (made.kept & ~expected.visible).any()
    assert torch.equal(stats.kept_blocks, made.kept.sum((-2, -1)))
    assert torch.equal(stats.visible_blocks, expected.visible.expand_as(made.kept).sum((-2, -1)))


@given(
    shapes(max_tokens=300, head_dims=(32,)),
    st.sampled_from(list(PROGRAMS)),
    st.sampled_from(list(RULES)),
    st.sampled_from([(64, 64), (64, 32), (128, 64), (128, 128)]),
    st.sampled_from([0.0, 0.003, 0.05, 1.0]),
    seeds(),
)
def test_kept_blocks_are_the_references_over_shapes(shape, program, rule, block_size, threshold, seed):
    if program.startswith("neighborhood") and shape.kv_len < 64:
        program = "window"
    config = replace(SPARSE, rule=RULES[rule].with_threshold(threshold), block_size=block_size)
    inputs, options = structured_inputs(shape, seed), PROGRAMS[program](shape, "cpu")
    mask, stats = create_sale_block_mask(
        inputs.query, inputs.key, config, value=inputs.value, stats=True, **shape.positions(), **options
    )
    expected = reference_map(inputs, config, shape, options, stats.reason)
    made = block_map(mask)
    assert_same_blocks(made.kept, expected, within(shape))
    assert torch.equal(made.full, made.kept & expected.full)


@uncompiled
@pytest.mark.parametrize("program", PROGRAMS)
def test_uncompiled_flex_attention_attends_to_the_kept_blocks(program):
    shape = Shape(300, 300, heads=4, kv_heads=2, head_dim=32)
    inputs, options = structured_inputs(shape, 1), PROGRAMS[program](shape, "cpu")
    mask = create_sale_block_mask(inputs.query, inputs.key, SPARSE, **options)
    seen = seen_of(inputs, block_map(mask).kept, SPARSE, shape, options)
    score_mod = options.get("score_mod")
    output = flex_attention(*inputs, score_mod=score_mod, block_mask=mask, enable_gqa=True)
    assert_output(output, inputs, seen, score_mod)


COMPILED = ["documents", "neighborhood 2-d", "soft cap in documents", "a finer block mask", "relative bias"]
"""Some seconds of C++ compiler each."""


@pytest.mark.parametrize("program", COMPILED)
def test_sale_attention_is_exact_on_the_kept_blocks(program):
    shape = Shape(300, 300, heads=4, kv_heads=2, head_dim=32)
    inputs, options = structured_inputs(shape, 1), PROGRAMS[program](shape, "cpu")
    output, (_, stats) = sale_attention(*inputs, SPARSE, return_aux=AuxRequest(stats=True), scale=0.2, **options)
    mask = create_sale_block_mask(inputs.query, inputs.key, SPARSE, value=inputs.value, scale=0.2, **options)
    made = block_map(mask)
    assert torch.equal(stats.kept_blocks, made.kept.sum((-2, -1)))
    seen = seen_of(inputs, made.kept, SPARSE, shape, options)
    assert_output(output, inputs, seen, options.get("score_mod"), 0.2)
    assert stats.path is Path.FLEX


@pytest.mark.parametrize("program", ["window", "alibi", "relative bias", "neighborhood 2-d, dilated"])
def test_threshold_zero_is_flex_attention_with_the_mod(program):
    shape = Shape(300, 300, heads=4, kv_heads=2, head_dim=32)
    inputs, options = structured_inputs(shape, 1), PROGRAMS[program](shape, "cpu")
    score_mod, masks = options.get("score_mod"), [options.get("mask_mod")]
    masks += [mods.causal()] if options.get("is_causal", True) else []
    mask_mod = and_masks(*(mask for mask in masks if mask is not None))
    compiled = torch.compile(flex_attention, fullgraph=True)
    block_mask = create_block_mask(mask_mod, None, None, 300, 300, device="cpu")
    dense = compiled(*inputs, score_mod=score_mod, block_mask=block_mask, enable_gqa=True)
    output = sale_attention(*inputs, SPARSE.with_threshold(0.0), **options)
    everything = torch.ones(1, 4, 5, 5, dtype=torch.bool)
    seen = seen_of(inputs, everything, SPARSE, shape, options)
    for either in (output, dense):
        assert_output(either, inputs, seen, score_mod)


@pytest.mark.parametrize("program", PROGRAMS)
def test_threshold_zero_keeps_all_that_is_visible(program):
    shape = Shape(300, 300, heads=4, kv_heads=2, head_dim=32)
    inputs, options = structured_inputs(shape, 1), PROGRAMS[program](shape, "cpu")
    for rule in (Mass.fast(0.0), Relative(0.0)):
        config = replace(SPARSE, rule=rule)
        _, stats = create_sale_block_mask(inputs.query, inputs.key, config, stats=True, **options)
        assert torch.equal(stats.kept_blocks, stats.visible_blocks)


@pytest.mark.parametrize("program", [None, "alibi", "documents", "a block mask"])
def test_log_sum_exp_and_sinks(program):
    shape = Shape(300, 300, heads=4, kv_heads=2, head_dim=32)
    inputs = structured_inputs(shape, 1)
    options = {} if program is None else PROGRAMS[program](shape, "cpu")
    sinks = torch.tensor([-torch.inf, 0.0, 3.0, 40.0])
    plain, (lse, stats) = sale_attention(*inputs, SPARSE, return_aux=AuxRequest(lse=True, stats=True), **options)
    assert stats.path is Path.TORCH_ROWS
    made = block_map(create_sale_block_mask(inputs.query, inputs.key, SPARSE, value=inputs.value, **options))
    assert not made.kept.all()
    bounds = reference.make_bounds(1, 300, 300)
    how = {"bounds": bounds, "block_size": (64, 64), "scale": 32**-0.5, **options}
    exact, exact_lse = reference.masked_attention(*inputs, made.kept, **how)
    assert torch.allclose(plain.double(), exact, atol=1e-5, rtol=0)
    assert torch.allclose(lse.double(), exact_lse, atol=1e-4, rtol=0)
    output = sale_attention(*inputs, SPARSE, sink_logits=sinks, **options)
    with_sinks, _ = reference.masked_attention(*inputs, made.kept, **how, sink_logits=sinks)
    assert torch.allclose(output.double(), with_sinks, atol=1e-5, rtol=0)
    assert torch.equal(output[:, 0], plain[:, 0])
    assert float(output[:, 3].abs().max()) < 1e-6


def test_a_short_call_with_a_mod_is_dense_and_says_so():
    shape = Shape(60, 60, heads=4, kv_heads=2, head_dim=32)
    inputs, options = structured_inputs(shape, 1), PROGRAMS["alibi"](shape, "cpu")
    output, (_, stats) = sale_attention(
        *inputs, replace(SPARSE, min_length=64), return_aux=AuxRequest(stats=True), **options
    )
    assert (stats.path, stats.reason) == (Path.DENSE_FLEX, "no more keys than min_length")
    assert stats.ran_dense
    seen = seen_of(inputs, torch.ones(1, 4, 1, 1, dtype=torch.bool), SPARSE, shape, options)
    assert_output(output, inputs, seen, options["score_mod"])


class TestIgnore:
    """``estimate_mods="ignore"``."""

    SHAPE = Shape(300, 300, heads=4, kv_heads=2, head_dim=32)

    @staticmethod
    def i0e(score, b, h, q_idx, kv_idx):
        return torch.special.i0e(score) * 4

    @staticmethod
    def i0e_mask(b, h, q_idx, kv_idx):
        return torch.special.i0e((kv_idx - 30).float()) > 0.1

    @pytest.mark.parametrize("name", ["score_mod", "mask_mod"])
    def test_an_op_outside_the_table_is_named_with_the_way_out(self, name):
        inputs = structured_inputs(self.SHAPE, 1)
        mod = self.i0e if name == "score_mod" else self.i0e_mask
        with pytest.raises(NotImplementedError, match=f'(?s){name}.*i0e.*estimate_mods="ignore"'):
            create_sale_block_mask(inputs.query, inputs.key, SPARSE, **{name: mod})

    @uncompiled
    @pytest.mark.parametrize("name", ["score_mod", "mask_mod"])
    def test_what_the_estimate_ignores_attention_applies(self, name):
        inputs = structured_inputs(self.SHAPE, 1)
        options = {name: self.i0e if name == "score_mod" else self.i0e_mask}
        mask = create_sale_block_mask(inputs.query, inputs.key, SPARSE, estimate_mods="ignore", **options)
        made = block_map(mask)
        plain = block_map(
            create_sale_block_mask(inputs.query, inputs.key, SPARSE, is_causal=True, score_mod=lambda s, b, h, q, k: s)
        )
        assert torch.equal(made.kept, plain.kept)
        # Of a mask that is not looked at, no block is known to be full.
        assert torch.equal(made.full, plain.full if name == "score_mod" else torch.zeros_like(plain.full))
        output = flex_attention(*inputs, score_mod=options.get("score_mod"), block_mask=mask, enable_gqa=True)
        seen = seen_of(inputs, made.kept, SPARSE, self.SHAPE, options)
        assert_output(output, inputs, seen, options.get("score_mod"))


def test_the_sink_is_the_documents_own():
    # Two documents; the second's first keys are kept for all its rows, the buffer's first for none of them.
    shape = Shape(512, 512, heads=2, kv_heads=1, head_dim=32)
    inputs = structured_inputs(shape, 0)
    ids = (torch.arange(512) >= 192).int()
    config = SPARSE.with_options(threshold=1.0, local_tokens=1)
    kept = block_map(create_sale_block_mask(inputs.query, inputs.key, config, mask_mod=mods.document(ids))).kept[0, 0]
    columns = [row.nonzero().flatten().tolist() for row in kept]
    assert columns == [[0], [0, 1], [0, 2], [3], [3, 4], [3, 5], [3, 6], [3, 7]]


def test_a_document_chooses_the_blocks_that_it_chooses_alone():
    shape = Shape(256, 256, heads=2, kv_heads=1, head_dim=32)
    parts = [structured_inputs(shape, seed) for seed in (0, 1)]
    packed = Inputs(*(torch.cat(x, 2) for x in zip(*parts)))
    # Without smoothing, whose mean is the buffer's.
    config = replace(SPARSE, smooth_tokens=0)
    ids = (torch.arange(512) >= 256).int()
    together = block_map(create_sale_block_mask(packed.query, packed.key, config, mask_mod=mods.document(ids))).kept
    first, second = (
        block_map(create_sale_block_mask(x.query, x.key, config, mask_mod=mods.causal())).kept for x in parts
    )
    assert torch.equal(together[:, :, :4, :4], first)
    assert torch.equal(together[:, :, 4:, 4:], second)
    assert not together[:, :, 4:, :4].any()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"score_mod": 3}, TypeError, "score_mod must be a callable.*got int"),
        ({"mask_mod": torch.ones(3)}, TypeError, "mask_mod must be a callable.*got Tensor"),
        ({"is_causal": 1}, TypeError, "is_causal must be True or False, got 1"),
        ({"estimate_mods": "no"}, ValueError, "estimate_mods must be one of.*'no'"),
        ({"block_mask": torch.ones(3)}, TypeError, "block_mask must be a .*BlockMask.*Tensor"),
        ({"sink_logits": torch.zeros(3)}, ValueError, r"sink_logits must .*shape \[4\].*got shape \[3\]"),
        ({"sink_logits": 1.0}, TypeError, "sink_logits must be a tensor"),
    ],
)
def test_bad_mods_are_named(change, error, message):
    inputs = structured_inputs(Shape(100, 100, heads=4, kv_heads=2, head_dim=32), 0)
    with pytest.raises(error, match=f"(?s){message}"):
        sale_attention(*inputs, replace(SPARSE, min_length=0), **change)


@pytest.mark.parametrize(
    ("shape", "block_size", "message"),
    [
        (Shape(100, 128, heads=4), (64, 64), r"lengths of query and key, \(100, 100\), got \(100, 128\)"),
        (Shape(100, 100, heads=3), (128, 128), "1 or 4 heads.*3"),
        (Shape(100, 100), (96, 64), "multiple or a divisor"),
        (Shape(100, 100), (192, 32), "powers of two"),
    ],
)
def test_bad_block_masks_are_named(shape, block_size, message):
    inputs = structured_inputs(Shape(100, 100, heads=4, kv_heads=2, head_dim=32), 0)
    heads = None if shape.heads == 1 else shape.heads
    block_mask = create_block_mask(
        mods.causal(), None, heads, shape.q_len, shape.kv_len, device="cpu", BLOCK_SIZE=block_size
    )
    with pytest.raises(ValueError, match=f"(?s)block_mask.*{message}"):
        create_sale_block_mask(inputs.query, inputs.key, SPARSE, block_mask=block_mask)


@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_gradients_on_a_cpu_are_refused_with_the_way_out(name):
    inputs = structured_inputs(Shape(200, 200, heads=4, kv_heads=2, head_dim=32), 0)
    arguments = inputs._asdict()
    arguments[name] = arguments[name].requires_grad_()
    with pytest.raises(NotImplementedError, match=r"no gradients on cpu.*no_grad"):
        sale_attention(**arguments, config=SPARSE)
    with torch.no_grad():
        sale_attention(**arguments, config=SPARSE)
    # The choice has no gradient, and needs none.
    mask = create_sale_block_mask(arguments["query"], arguments["key"], SPARSE)
    assert (mask.q_indices is not None) == (name != "value")
