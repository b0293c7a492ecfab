# SPDX-License-Identifier: BSD-3-Clause
"""Autocast: inputs are cast as scaled_dot_product_attention casts them, and what is computed is what they give cast."""

import contextlib
import re

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention

from sale_flex import AuxRequest, KeyCodes, Mass, Relative, SaleConfig, create_sale_block_mask, mods, sale_attention
from sale_flex.testing import Shape, block_map, structured_inputs

SPARSE = SaleConfig(Mass(0.1), min_length=0, sink_tokens=16, local_tokens=32, smooth_tokens=64)
DENSE = SaleConfig(min_length=10**6)
LOW = (torch.bfloat16, torch.float16)
SHAPE = Shape(300, 300, batch=2, heads=4, kv_heads=2, head_dim=32)


def promoted(dtype: torch.dtype, shape: Shape = SHAPE) -> tuple[torch.Tensor, ...]:
    """Inputs as a rotary embedding leaves them: query and key in float32, the value in autocast's dtype."""
    query, key, value = structured_inputs(shape, 0)
    return query, key, value.to(dtype)


@contextlib.contextmanager
def autocast_of_another_device():
    """Autocast of CUDA, whether there is a GPU or not."""
    before = torch.is_autocast_enabled("cuda")
    torch.set_autocast_enabled("cuda", True)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", before)


@pytest.mark.parametrize("config", [DENSE, SPARSE], ids=["dense", "sparse"])
@pytest.mark.parametrize("given", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_the_dtype_is_that_of_scaled_dot_product_attention(dtype, given, config):
    query, key, value = (x.to(given) for x in structured_inputs(SHAPE, 0))
    with torch.autocast("cpu", dtype):
        expected = scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        output = sale_attention(query, key, value, config)
    assert output.dtype == expected.dtype == dtype
    assert torch.equal(output, sale_attention(query.to(dtype), key.to(dtype), value.to(dtype), config))


def test_float64_is_not_cast_and_so_refused():
    query, key, value = (x.double() for x in structured_inputs(SHAPE, 0))
    with torch.autocast("cpu", torch.bfloat16):
        assert scaled_dot_product_attention(query, key, value, enable_gqa=True).dtype == torch.float64
        for name in ("query", "key", "value"):
            mixed = {"query": query.float(), "key": key.float(), "value": value.float()}
            mixed[name] = mixed[name].double()
            with pytest.raises(TypeError, match=rf"{name} must be float32, float16 or bfloat16, got torch\.float64"):
                sale_attention(**mixed)


CALLS = {
    "plain": {},
    "log-sum-exp": {"return_aux": AuxRequest(lse=True, stats=True)},
    "sinks": {"sink_logits": torch.tensor([0.5, -1.0, 2.0, 0.0])},
    "soft cap": {"score_mod": mods.softcap(2.0)},
    "window": {"mask_mod": mods.sliding_window(100)},
    "both ways": {"is_causal": False},
    "padding": {"kv_range": torch.tensor([[40, 300], [0, 250]])},
    "relative": {"config": SaleConfig(Relative(0.05, bits=8), min_length=0, local_tokens=32, smooth_tokens=64)},
    "scan": {"config": SaleConfig(Mass(0.1, sub_block=1), min_length=0, local_tokens=32, smooth_tokens=64)},
    "8 bits": {"config": SaleConfig(Mass(0.1, bits=8), min_length=0, local_tokens=32, smooth_tokens=64)},
    "early rows": {"config": SaleConfig(Mass(0.1), min_length=100, local_tokens=32, smooth_tokens=64)},
    "dense": {"config": DENSE, "sink_logits": torch.zeros(4)},
}


@pytest.mark.parametrize("options", CALLS.values(), ids=CALLS)
def test_a_call_is_what_its_inputs_give_cast(options):
    dtype = torch.bfloat16
    inputs, options = promoted(dtype), {"config": SPARSE, "return_aux": AuxRequest(stats=True)} | options
    with torch.autocast("cpu", dtype):
        output, aux = sale_attention(*inputs, **options)
    expected, of_expected = sale_attention(*(x.to(dtype) for x in inputs), **options)
    assert output.dtype == dtype
    assert torch.equal(output, expected)
    assert torch.equal(aux.stats.kept_blocks, of_expected.stats.kept_blocks)
    assert aux.stats.describe() == of_expected.stats.describe()
    if options["return_aux"].lse:
        assert aux.lse.dtype == torch.float32
        assert torch.equal(aux.lse, of_expected.lse)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
@pytest.mark.parametrize("name", ["plain", "soft cap", "window", "both ways", "padding", "relative", "scan", "8 bits"])
def test_a_block_mask_is_that_of_inputs_cast(name):
    # Rounded inputs, because what is kept of them differs: a mask of the inputs as they come would be another.
    dtype = torch.bfloat16
    query, key, value = promoted(dtype, Shape(1200, 1200, batch=1, heads=4, kv_heads=2, head_dim=32))
    options = {"config": SPARSE} | CALLS[name]
    if "kv_range" in options:
        options["kv_range"] = torch.tensor([[40, 1100]])
    with torch.autocast("cpu", dtype):
        mask = create_sale_block_mask(query, key, value=value, **options)
        assert flex_attention(query, key, value, block_mask=mask, enable_gqa=True).dtype == dtype
    expected = create_sale_block_mask(query.to(dtype), key.to(dtype), value=value.to(dtype), **options)
    assert torch.equal(block_map(mask).kept, block_map(expected).kept)
    assert not block_map(mask).kept.all()


def test_chunks_keep_their_codes():
    dtype = torch.bfloat16
    inputs, codes, parts = promoted(dtype), KeyCodes(), []
    for first, stop in ((0, 128), (128, 256), (256, 300)):
        query, key, value = inputs[0][:, :, first:stop], inputs[1][:, :, :stop], inputs[2][:, :, :stop]
        with torch.autocast("cpu", dtype):
            parts.append(sale_attention(query, key, value, SPARSE, key_codes=codes))
        assert torch.equal(parts[-1], sale_attention(query.to(dtype), key.to(dtype), value, SPARSE))
    assert codes.length == 256


@pytest.mark.parametrize("function", [sale_attention, create_sale_block_mask])
def test_a_region_without_autocast_inside_of_one_casts_nothing(function):
    query, key, value = promoted(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
        with pytest.raises(TypeError, match=r"value must have the query's dtype torch\.float32, got torch\.bfloat16"):
            function(query, key, value=value)
        assert sale_attention(query, key, value.float()).dtype == torch.float32


def test_the_innermost_region_decides():
    inputs = promoted(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", torch.float16):
        assert sale_attention(*inputs, SPARSE).dtype == torch.float16


def test_autocast_of_another_device_type_does_not_count():
    query, key, value = promoted(torch.bfloat16)
    with autocast_of_another_device():
        assert scaled_dot_product_attention(query, key, value.float(), enable_gqa=True).dtype == torch.float32
        assert sale_attention(query, key, value.float(), SPARSE).dtype == torch.float32
        with pytest.raises(TypeError, match="value must have the query's dtype"):
            sale_attention(query, key, value, SPARSE)


def test_without_autocast_mixed_dtypes_stay_an_error():
    with pytest.raises(TypeError, match=r"value must have the query's dtype torch\.float32, got torch\.bfloat16"):
        sale_attention(*promoted(torch.bfloat16), SPARSE)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": [1.0]}, "query must be a torch.Tensor, got list"),
        ({"key": None}, "key must be a torch.Tensor, got NoneType"),
        (
            {"key": torch.ones(2, 2, 300, 32, dtype=torch.int64)},
            "key must be float32, float16 or bfloat16",
        ),
        ({"value": torch.ones(2, 2, 300, 32, device="meta")}, "value must be on the query's device cpu, got meta"),
    ],
    ids=["no tensor", "none", "integers", "another device"],
)
def test_bad_input_is_named_as_without_autocast(changes, message):
    good = dict(zip(("query", "key", "value"), structured_inputs(SHAPE, 0)))
    with torch.autocast("cpu", torch.bfloat16), pytest.raises((TypeError, ValueError), match=re.escape(message)):
        sale_attention(**good | changes)


def test_tensors_on_no_device_are_no_matter_of_autocast():
    inputs = [x.to("meta") for x in structured_inputs(SHAPE, 0)]
    with torch.autocast("cpu", torch.bfloat16):
        assert sale_attention(*inputs, DENSE).dtype == torch.float32


def test_gradients_are_those_of_scaled_dot_product_attention():
    results = []
    for attend in (
        lambda *inputs: sale_attention(*inputs, DENSE),
        lambda *inputs: scaled_dot_product_attention(*inputs, is_causal=True, enable_gqa=True, scale=32**-0.5),
    ):
        inputs = [x.clone().requires_grad_() for x in promoted(torch.bfloat16)]
        with torch.autocast("cpu", torch.bfloat16):
            output = attend(*inputs)
        output.float().square().sum().backward()
        results.append([x.grad for x in inputs])
    for grad, expected, given in zip(*results, promoted(torch.bfloat16)):
        assert grad.dtype == given.dtype
        assert torch.equal(grad, expected)


def around(*inputs):
    return sale_attention(*inputs, SPARSE, return_aux=AuxRequest(stats=True))


def inside(*inputs):
    with torch.autocast("cpu", torch.bfloat16):
        output, aux = sale_attention(*inputs, SPARSE, return_aux=AuxRequest(stats=True))
        with torch.autocast("cpu", enabled=False):
            exact = sale_attention(*(x.float() for x in inputs), SPARSE)
    return output, aux, exact


@pytest.mark.compiles
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compiled_programs_cast_too(backend):
    dtype = torch.bfloat16
    inputs = promoted(dtype)
    expected, (_, counts) = sale_attention(*(x.to(dtype) for x in inputs), SPARSE, return_aux=AuxRequest(stats=True))
    bound = 4 * torch.finfo(dtype).eps * expected.abs().amax()  # weights and outputs rounded, in either run
    torch._dynamo.reset()
    compiled = torch.compile(around, fullgraph=True, backend=backend)
    with torch.autocast("cpu", dtype):
        one = compiled(*inputs)
    other = torch.compile(inside, fullgraph=True, backend=backend)(*inputs)
    for output, (_, stats) in (one, other[:2]):
        assert output.dtype == dtype
        assert (output - expected).abs().amax() <= bound
        assert torch.equal(stats.kept_blocks, counts.kept_blocks)
    assert other[2].dtype == torch.float32
    # The same program, once autocast is off: its inputs are an error again.
    with pytest.raises(Exception, match="value must have the query's dtype"):
        compiled(*inputs)


@pytest.mark.gpu
@pytest.mark.parametrize("options", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_a_call_on_a_gpu_is_what_its_inputs_give_cast(dtype, options):
    inputs = [x.cuda() for x in promoted(dtype)]
    options = {"config": SPARSE, "return_aux": AuxRequest(stats=True)} | options
    options = {name: x.cuda() if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    with torch.autocast("cuda", dtype):
        output, (_, stats) = sale_attention(*inputs, **options)
        wanted = scaled_dot_product_attention(*inputs, enable_gqa=True).dtype
        mask = create_sale_block_mask(inputs[0], inputs[1], SPARSE)
    expected, (_, counts) = sale_attention(*(x.to(dtype) for x in inputs), **options)
    assert output.dtype == wanted == dtype
    assert torch.equal(output, expected)
    assert torch.equal(stats.kept_blocks, counts.kept_blocks)
    cast = create_sale_block_mask(inputs[0].to(dtype), inputs[1].to(dtype), SPARSE)
    assert torch.equal(block_map(mask).kept, block_map(cast).kept)


@pytest.mark.gpu
def test_a_gpus_calls_do_not_follow_the_autocast_of_cpus():
    query, key, value = (x.cuda() for x in structured_inputs(SHAPE, 0))
    with torch.autocast("cpu", torch.bfloat16):
        assert sale_attention(query, key, value, SPARSE).dtype == torch.float32
    with torch.autocast("cuda", torch.bfloat16):
        cpu = [x.cpu() for x in (query, key, value)]
        assert sale_attention(*cpu, SPARSE).dtype == torch.float32


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # from torch 2.11's compiler
def test_gradients_on_a_gpu_have_the_dtypes_of_the_inputs():
    config = SaleConfig(Mass(0.1), min_length=0, block_size=(64, 64), local_tokens=32, smooth_tokens=64)
    query, key, value = (x.cuda().requires_grad_() for x in structured_inputs(SHAPE, 0))
    with torch.autocast("cuda", torch.bfloat16):
        output = sale_attention(query, key, value, config)
    output.float().square().sum().backward()
    cast = [x.detach().bfloat16().requires_grad_() for x in (query, key, value)]
    sale_attention(*cast, config).float().square().sum().backward()
    for given, low in zip((query, key, value), cast):
        assert given.grad.dtype == torch.float32
        # The backward pass adds up keys' and values' gradients of a group of heads in no fixed order.
        bound = 4 * torch.finfo(torch.bfloat16).eps * low.grad.float().abs().amax()
        assert (given.grad - low.grad.float()).abs().amax() <= bound


@pytest.mark.gpu
@pytest.mark.compiles
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_compiled_programs_on_a_gpu_cast_too(dtype):
    inputs = [x.cuda() for x in promoted(dtype)]
    expected, (_, counts) = sale_attention(*(x.to(dtype) for x in inputs), SPARSE, return_aux=AuxRequest(stats=True))
    torch._dynamo.reset()
    with torch.autocast("cuda", dtype):
        output, (_, stats) = torch.compile(around, fullgraph=True)(*inputs)
    assert output.dtype == dtype
    assert (output - expected).abs().amax() <= 4 * torch.finfo(dtype).eps * expected.abs().amax()
    assert torch.equal(stats.kept_blocks, counts.kept_blocks)
