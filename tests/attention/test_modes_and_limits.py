# SPDX-License-Identifier: BSD-3-Clause
"""Programs outlive what is switched on around their calls, and what torch guards them on."""

from functools import cache, partial

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from sale_flex import Relative, SaleConfig, create_sale_block_mask, sale_attention
from sale_flex.flex import run as flex
from sale_flex.testing import Inputs, Shape, block_map, structured_inputs

CONFIG = SaleConfig(Relative(0.3, bits=8), min_length=0, local_tokens=24, smooth_tokens=64)
SHAPE = Shape(300, 300, heads=2, head_dim=32)
PROGRAM = flex._program


class Dispatched(TorchDispatchMode):
    """A user's mode, which notes the ops it sees."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class Called(TorchFunctionMode):
    """A user's mode that no compiler could trace."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        open(__file__, "rb").close()
        return func(*args, **(kwargs or {}))


@pytest.fixture
def inputs() -> Inputs:
    return structured_inputs(SHAPE, 0)


@pytest.fixture(autouse=True)
def cheap(monkeypatch):
    """Programs of our own, of a backend that compiles at once, and attention that tells which blocks it was given."""

    def attend(query, key, value, *, score_mod, block_mask, scale, enable_gqa, kernel_options):
        assert torch.compiler.is_compiling()
        return query * (block_mask.kv_num_blocks.sum() + block_mask.full_kv_num_blocks.sum())

    monkeypatch.setattr(flex, "flex_attention", attend)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    monkeypatch.setattr(flex, "_program", cache(flex._program.__wrapped__))


def kept_blocks(inputs: Inputs) -> int:
    return int(block_map(create_sale_block_mask(*inputs[:2], CONFIG)).kept.sum())


def assert_attends(inputs: Inputs) -> None:
    assert torch.equal(sale_attention(*inputs, CONFIG), inputs.query * kept_blocks(inputs))


MODES = [lambda: FlopCounterMode(display=False), Dispatched, Called]


@pytest.mark.parametrize("mode", MODES, ids=["FLOP counter", "dispatch", "function"])
class TestModes:
    def test_on_in_the_first_call(self, mode, inputs):
        with mode():
            assert_attends(inputs)
        assert_attends(inputs)

    def test_on_in_a_later_call(self, mode, inputs):
        assert_attends(inputs)
        with mode():
            assert_attends(inputs)
        assert_attends(inputs)

    def test_on_twice_and_in_a_mode_of_another_kind(self, mode, inputs):
        with mode(), Dispatched() as inner, mode():
            assert_attends(inputs)
            assert torch.utils._python_dispatch._get_current_dispatch_mode_stack()
        assert inner.seen
        assert not torch.utils._python_dispatch._get_current_dispatch_mode_stack()
        assert_attends(inputs)

    def test_is_on_again_after_an_error(self, mode, inputs, monkeypatch):
        monkeypatch.setattr(flex, "flex_attention", None)
        with mode(), Dispatched() as inner:
            with pytest.raises(Exception, match="NoneType"):
                sale_attention(*inputs, CONFIG)
            before = len(inner.seen)
            torch.ones(1)
            assert len(inner.seen) > before

    def test_is_one_program_with_none(self, mode, inputs):
        for _ in range(10):
            with mode():
                sale_attention(*inputs, CONFIG)
            sale_attention(*inputs, CONFIG)
        assert flex._program.cache_info().currsize == 1


def test_flop_counters_count_the_blocks_that_are_kept(inputs):
    for _ in range(2):
        with FlopCounterMode(display=False) as counter:
            sale_attention(*inputs, CONFIG)
        # Two products of 64 x 64 elements and 32 channels a block, two operations each.
        assert counter.get_total_flops() == kept_blocks(inputs) * 64 * 64 * 32 * 2 * 2
    assert kept_blocks(inputs) < 2 * 15


def test_dispatch_modes_see_that_attention_ran(inputs):
    with Dispatched() as mode:
        sale_attention(*inputs, CONFIG)
    assert mode.seen.count("sale_flex.attended.default") == 1
    nums = torch.ones(1, 2, 5, dtype=torch.int32)
    torch.library.opcheck(torch.ops.sale_flex.attended.default, (inputs.query, inputs.value, nums, nums, 64, 64))


def test_fake_and_meta_tensors_give_shapes(inputs):
    with FakeTensorMode() as mode:
        output = sale_attention(*(mode.from_tensor(x) for x in inputs), CONFIG)
    assert (output.shape, output.dtype) == (inputs.query.shape, inputs.query.dtype)
    assert sale_attention(*(x.to("meta") for x in inputs), CONFIG).shape == inputs.query.shape


@pytest.mark.parametrize("tracing", ["real", "fake"])
def test_make_fx_is_refused_and_leaves_no_constant(inputs, tracing):
    with pytest.raises(NotImplementedError, match=r"ProxyTorchDispatchMode.*torch\.export"):
        make_fx(lambda *x: sale_attention(*x, CONFIG), tracing_mode=tracing)(*inputs)


def test_switched_off_compilation_is_refused_until_it_is_on(inputs):
    for _ in range(2):
        with torch.compiler.set_stance("force_eager"), pytest.raises(RuntimeError, match=r"torch\.compile"):
            sale_attention(*inputs, CONFIG)
        assert_attends(inputs)
        torch.compiler.reset()
        assert_attends(inputs)


def test_a_first_call_with_dynamo_disabled_leaves_nothing(inputs):
    with torch._dynamo.config.patch(disable=True), pytest.raises(RuntimeError, match=r"torch\.compile"):
        sale_attention(*inputs, CONFIG)
    assert_attends(inputs)


def test_a_failed_first_call_leaves_nothing(inputs, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(flex, "flex_attention", lambda *x, **options: torch._dynamo.graph_break())
        with pytest.raises(Exception, match="graph_break"):
            sale_attention(*inputs, CONFIG)
    assert_attends(inputs)


def register_class() -> None:
    own = type("Own", (), {})
    pytree.register_pytree_node(own, lambda x: ([], None), lambda items, context: own())


def test_registered_pytree_nodes_end_no_program(inputs, monkeypatch):
    def attend(query, key, value, *, block_mask, **options):
        # Reading the registry makes torch guard on its length, as flex_attention does.
        assert len(pytree.SUPPORTED_NODES) > 0
        return query * (block_mask.kv_num_blocks.sum() + block_mask.full_kv_num_blocks.sum())

    monkeypatch.setattr(flex, "flex_attention", attend)
    made = []
    run = flex.CompiledProgram.__call__
    monkeypatch.setattr(flex.CompiledProgram, "__call__", lambda self, *x: (made.append(self), run(self, *x))[1])
    for _ in range(20):
        register_class()
        assert_attends(inputs)
    assert len(set(map(id, made))) == 1
    # 8 compilations each.
    assert made[0].made == 3


@pytest.mark.parametrize("limit", [1, 2])
def test_a_program_is_made_anew_where_torch_allows_fewer_compilations(inputs, limit):
    with torch._dynamo.config.patch(recompile_limit=limit):
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float32, torch.float64):
            torch.set_default_dtype(dtype)
            try:
                output = sale_attention(*inputs, CONFIG)
            finally:
                torch.set_default_dtype(torch.float32)
            assert torch.equal(output, inputs.query * kept_blocks(inputs))


def test_state_of_the_process_ends_no_program(inputs):
    threads = torch.get_num_threads()
    try:
        for n in range(12):
            torch.set_num_threads(1 + n % 3)
            torch.use_deterministic_algorithms(n % 2 == 1)
            torch.set_float32_matmul_precision(("highest", "high", "medium")[n % 3])
            torch.set_default_dtype((torch.float32, torch.float64)[n % 2])
            with torch.device("cpu"), torch.inference_mode(n % 2 == 0):
                assert_attends(inputs)
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(False)
        torch.set_float32_matmul_precision("highest")
        torch.set_default_dtype(torch.float32)


def test_programs_are_bounded():
    assert PROGRAM.cache_parameters()["maxsize"] == flex._PROGRAMS
