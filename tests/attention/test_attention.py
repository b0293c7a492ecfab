# SPDX-License-Identifier: BSD-3-Clause
"""`sale_attention` from end to end: exact attention on the blocks that its mask keeps, whatever the path."""

from dataclasses import replace

import pytest
import torch
from config_harness import as_rule
from hypothesis import event, given
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import flex_attention

import sale_flex
from sale_flex import AuxRequest, Path, Relative, SaleConfig, create_sale_block_mask, ops, sale_attention
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
    output, (_, stats) = sale_attention(*inputs, config, return_aux=AuxRequest(stats=True), **shape.positions())
    event(stats.describe())
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
    output = sale_attention(*inputs, config.with_options(threshold=threshold), **shape.positions())
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
    config = SaleConfig(Relative(0.3, bits=bits), min_length=0, local_tokens=32, block_size=block_size)
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


SPARSE = SaleConfig(Relative(0.3, bits=8), min_length=64, local_tokens=32, smooth_tokens=128)


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


PLACES = (0, 300, 650)
"""Key indices of the first queries of three batch rows."""
PASSAGES = torch.arange(900) // 400


def at_places(q_len: int = 250) -> tuple[Inputs, list[Shape]]:
    """Inputs of a batch whose rows stand at different places, and the shapes of its rows alone."""
    rows = [Shape(q_len, 900, heads=2, kv_heads=1, head_dim=32, q_offset=place) for place in PLACES]
    inputs = [structured_inputs(row, seed) for seed, row in enumerate(rows)]
    return Inputs(*(torch.cat(x) for x in zip(*inputs))), rows


def by_passage(places: torch.Tensor):
    def mask(b, h, q_idx, kv_idx):
        return PASSAGES[q_idx + places[b]] == PASSAGES[kv_idx]

    return mask


BY_PLACE = {
    "plain": lambda places: {},
    "mask of rows": lambda places: {"mask_mod": lambda b, h, q_idx, kv_idx: (kv_idx // 50 + q_idx // 70) % 4 > 0},
    "documents": lambda places: {"mask_mod": by_passage(places)},
    "documents, both ways": lambda places: {"mask_mod": by_passage(places), "is_causal": False},
    "rough score": lambda places: {"score_mod": lambda score, b, h, q_idx, kv_idx: score - 0.01 * (kv_idx % 100)},
}
"""Name -> options of a call whose batch rows stand at these places."""


def row_of(n: int, inputs: Inputs, options, ranges: torch.Tensor | None = None) -> tuple[Inputs, dict]:
    """What a row of `at_places` is called with alone."""
    where = {"q_offset": PLACES[n]} | ({} if ranges is None else {"kv_range": ranges[n : n + 1]})
    return Inputs(*(x[n : n + 1] for x in inputs)), where | options(torch.tensor(PLACES[n : n + 1]))


@pytest.mark.parametrize("options", BY_PLACE.values(), ids=BY_PLACE)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("metric", "threshold"), [("mass", 0.15), ("relative", 1.0)])
def test_batch_rows_at_different_places_keep_what_each_keeps_alone(metric, threshold, padded, options):
    inputs, _ = at_places()
    config = as_rule(SPARSE, metric).with_options(threshold=threshold, min_length=0, sink_tokens=4, local_tokens=8)
    ranges = torch.tensor([[0, 240], [40, 540], [130, 900]]) if padded else None
    places = torch.tensor(PLACES)
    mask, stats = create_sale_block_mask(
        *inputs[:2], config, q_offset=places, kv_range=ranges, stats=True, **options(places)
    )
    assert 0.1 < float(stats.density.mean()) < 0.9
    for n in range(3):
        own, here = row_of(n, inputs, options, ranges)
        alone, counts = create_sale_block_mask(*own[:2], config, stats=True, **here)
        for ours, theirs in zip(block_map(mask), block_map(alone)):
            assert torch.equal(ours[n : n + 1], theirs)
        for ours, theirs in zip((*stats[:3], stats.audit.rows), (*counts[:3], counts.audit.rows)):
            assert torch.equal(ours[n : n + 1], theirs)


@pytest.mark.parametrize("name", ["plain", "mask of rows", "documents"])
def test_batch_rows_at_different_places_give_what_each_gives_alone(name):
    (inputs, _), options, places = at_places(), BY_PLACE[name], torch.tensor(PLACES)
    config = SPARSE.with_options(threshold=1.0, min_length=0, sink_tokens=4, local_tokens=8)
    wanted = AuxRequest(stats=True), AuxRequest(lse=True)
    together = [sale_attention(*inputs, config, q_offset=places, return_aux=aux, **options(places)) for aux in wanted]
    for n in range(3):
        own, here = row_of(n, inputs, options)
        alone = [sale_attention(*own, config, return_aux=aux, **here) for aux in wanted]
        for (output, _), (expected, _) in zip(together, alone):
            torch.testing.assert_close(output[n : n + 1], expected)
        (_, (_, stats)), (_, (lse, _)) = together
        (_, (_, counts)), (_, (expected, _)) = alone
        torch.testing.assert_close(lse[n : n + 1], expected)
        assert torch.equal(stats.kept_blocks[n : n + 1], counts.kept_blocks)
        assert (stats.path, stats.reason) == (counts.path, counts.reason) == (Path.FLEX, "")


@pytest.mark.parametrize(("q_len", "min_length"), [(250, 900), (5, 0)], ids=["short prompt", "decoding"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_dense_calls_of_batch_rows_at_different_places(q_len, min_length, dtype):
    inputs, rows = at_places(q_len)
    config = replace(SPARSE, min_length=min_length)
    places = torch.tensor(PLACES, dtype=dtype)
    output, (_, stats) = sale_attention(*inputs, config, q_offset=places, return_aux=AuxRequest(stats=True))
    assert stats.path is Path.DENSE_SDPA
    assert_attention_close(output, *inputs, torch.cat([causal_mask(row) for row in rows]))
    visible = torch.stack([any_in_block(causal_mask(row), (64, 64)).sum() for row in rows])
    assert torch.equal(stats.visible_blocks, visible[:, None].expand(3, 2))


@pytest.mark.parametrize("call", [sale_attention, lambda q, k, v, *x, **y: create_sale_block_mask(q, k, *x, **y)])
@pytest.mark.parametrize(
    ("places", "message"),
    [
        (
            torch.tensor([0, 300, 650, 0]),
            r"q_offset must be an int or an integer tensor of shape \[\] or \[3\].*\[4\]",
        ),
        (torch.tensor([[0, 300, 650]]), r"q_offset must be an int or .*, got shape \[1, 3\]"),
        (torch.tensor([0.0, 300.0, 650.0]), r"q_offset must be an int or .* dtype torch\.float32"),
        (torch.tensor([0, 300, 651]), r"q_offset must place all queries at keys.* = 900; got \[0, 300, 651\]"),
        (torch.tensor([0, -1, 650]), r"q_offset must place all queries at keys.* = 900; got \[0, -1, 650\]"),
    ],
    ids=["four rows", "matrix", "floats", "too far", "negative"],
)
@pytest.mark.parametrize("masked", [False, True])
def test_places_of_batch_rows_that_are_none_are_refused(call, places, message, masked):
    inputs, _ = at_places()
    options = {"mask_mod": lambda b, h, q_idx, kv_idx: kv_idx % 5 > 0} if masked else {}
    with pytest.raises(ValueError, match=message):
        call(*inputs, SPARSE, q_offset=places, **options)


def test_chunked_prefill_gives_the_output_of_one_shot():
    shape, inputs = example()
    seen = seen_of(shape, create_sale_block_mask(inputs.query, inputs.key, SPARSE))
    outputs = []
    for begin, stop in ((0, 128), (128, 320), (320, 500)):
        chunk = (inputs.query[:, :, begin:stop], inputs.key[:, :, :stop], inputs.value[:, :, :stop])
        outputs.append(sale_attention(*chunk, SPARSE))
    assert_attention_close(torch.cat(outputs, 2), *inputs, seen)


@pytest.mark.parametrize(
    ("q_len", "kv_len", "min_length", "path", "reason"),
    [
        (150, 150, 150, Path.DENSE_SDPA, "no more keys than min_length"),
        (100, 150, 1024, Path.DENSE_SDPA, "no more keys than min_length"),
        (1, 500, 0, Path.DENSE_SDPA, "fewer queries than half a block"),
        (31, 500, 0, Path.DENSE_SDPA, "fewer queries than half a block"),
        (32, 500, 0, Path.FLEX, ""),
        (150, 150, 149, Path.FLEX, ""),
    ],
)
@pytest.mark.parametrize("padded", [False, True])
def test_short_prompts_and_decoding_are_dense_and_say_so(q_len, kv_len, min_length, path, reason, padded):
    kv_range = ((0, kv_len), (kv_len // 3, kv_len - 2)) if padded else None
    shape, inputs = example(q_len, kv_len, kv_range=kv_range)
    config = SPARSE.with_options(threshold=1e6, min_length=min_length, local_tokens=8, sink_tokens=4, smooth_tokens=32)
    output, (_, stats) = sale_attention(*inputs, config, return_aux=AuxRequest(stats=True), **shape.positions())
    assert (stats.path, stats.reason, stats.dense_rows) == (path, reason, 0)
    assert stats.ran_dense == path.is_dense
    if path.is_dense:
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
    config = SPARSE.with_options(threshold=1e6, min_length=100, local_tokens=8, sink_tokens=4, smooth_tokens=32)
    output, (_, stats) = sale_attention(*inputs, config, return_aux=AuxRequest(stats=True))
    assert (stats.path, stats.reason, stats.dense_rows) == (Path.FLEX, "", 128)
    assert stats.describe() == "flex_attention after 128 dense rows"
    mask, of_mask = create_sale_block_mask(inputs.query, inputs.key, config, stats=True)
    assert_attention_close(output, *inputs, seen_of(shape, mask))
    assert torch.equal(stats.kept_blocks, of_mask.kept_blocks)
    # Through an offset flex computes them all.
    same = sale_attention(*inputs, config, q_offset=0)
    assert_attention_close(same, *inputs, seen_of(shape, mask))


def test_a_decoding_step_too_long_for_an_explicit_mask_keeps_all_its_blocks(monkeypatch):
    monkeypatch.setattr(sale_flex.attention, "_DENSE_MASK_LIMIT", 1000)
    shape, inputs = example(31, 500, kv_range=((0, 500), (70, 495)))
    output, (_, stats) = sale_attention(
        *inputs, SPARSE.with_options(threshold=1e6), return_aux=AuxRequest(stats=True), **shape.positions()
    )
    assert (stats.path, stats.reason, stats.dense_rows) == (Path.FLEX, "", 0)
    assert (stats.density == 1).all()
    assert_attention_close(output, *inputs, causal_mask(shape))


def test_one_head_may_be_dense_beside_sparse_ones():
    shape, inputs = example()
    config = SPARSE.with_options(threshold=torch.tensor([0.0, 0.3, 1e6, 0.0, 0.3, 1e6]))
    output, (_, stats) = sale_attention(*inputs, config, return_aux=AuxRequest(stats=True))
    dense = torch.tensor([0, 3])
    assert (stats.density[:, dense] == 1).all()
    assert (stats.density[:, [2, 5]] < stats.density[:, [1, 4]]).all()
    mask = create_sale_block_mask(inputs.query, inputs.key, config)
    seen = seen_of(shape, mask)
    assert torch.equal(seen[:, dense], causal_mask(shape).expand(2, 2, -1, -1))
    assert_attention_close(output, *inputs, seen)


@pytest.mark.parametrize("metric", ["mass", "relative"])
def test_strided_views_are_taken_as_they_are(metric, monkeypatch):
    config = as_rule(SPARSE, metric)
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
        "relative": {"quantize_rows": [0], "quantize_groups": [0], "row_limits": [0, 2]},
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
