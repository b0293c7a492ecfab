# SPDX-License-Identifier: BSD-3-Clause
"""How every test runs: kernels interpreted without a GPU, memory poisoned, Hypothesis profiles."""

import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import settings

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    # Triton reads this when a kernel is decorated, so it has to be there before any kernel is imported.
    os.environ["TRITON_INTERPRET"] = "1"

# Inductor reads this when it is imported. Debug information takes a compiler of C++ a third of its time.
os.environ.setdefault("AOT_INDUCTOR_ENABLE_LINE_TABLES", "0")

# No deadline anywhere: the first example of a property compiles what the others reuse.
settings.register_profile("dev", max_examples=25, deadline=None)
settings.register_profile("ci", max_examples=25, deadline=None, derandomize=True, database=None, print_blob=True)
settings.register_profile("thorough", max_examples=1000, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if "CI" in os.environ else "dev"))

if "PYTEST_XDIST_WORKER" in os.environ:
    workers = int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    torch.set_num_threads(max(1, torch.get_num_threads() // workers))


QUICK = {
    "attention/attention", "attention/bad_input", "attention/nonfinite", "blocks/geometry", "call/audit",
    "call/audit_captured", "call/index_lists", "call/mask_mods", "console/stored", "docs/result_pages",
    "integrations/audit", "integrations/measured", "ops/torch_path", "package/imports",
    "reference/reference", "selection/kept_record", "selection/key_codes_stale", "selection/turning",
}  # fmt: skip
"""Files of ``pytest -m quick``, without ``test_``: every stage against the reference, and what users meet first."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if f"{item.path.parent.name}/{item.path.stem.removeprefix('test_')}" in QUICK:
            item.add_marker(pytest.mark.quick)
    if HAS_GPU:
        return
    skip = pytest.mark.skip(reason="needs a CUDA device, and this machine has none")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    # At once: a long run may be interrupted, and over several processes pytest names nothing before its end.
    if report.failed and "PYTEST_XDIST_WORKER" not in os.environ:
        print(f"\nfailed: {report.nodeid}", file=sys.stderr, flush=True)


def poison(tensor: torch.Tensor) -> torch.Tensor:
    """Fill a fresh allocation with what no kernel writes: NaN, or an integer out of every range."""
    if type(tensor) is not torch.Tensor or tensor.is_meta:
        return tensor  # fake and meta tensors have no memory
    if tensor.is_floating_point() or tensor.is_complex():
        return tensor.fill_(float("nan"))
    if tensor.dtype == torch.bool:
        return tensor.fill_(True)
    # Negative where there is a sign: no index, no count and no code (those end at -127) looks like it.
    info = torch.iinfo(tensor.dtype)
    return tensor.fill_(info.min if info.min < 0 else info.max)


def poisoning(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """`allocate`, poisoning what it returns to a caller inside sale_flex."""

    def allocate_poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = allocate(*args, **kwargs)
        if torch.compiler.is_compiling():
            return tensor
        caller = sys._getframe(1).f_globals.get("__name__", "")
        return poison(tensor) if caller.split(".")[0] == "sale_flex" else tensor

    return allocate_poisoned


@pytest.fixture(scope="session", autouse=True)
def poisoned_allocations() -> Iterator[None]:
    """Make memory that sale_flex allocates and forgets to write show up in results.

    Once a session, not once a test: compiled code may hold on to the functions replaced here.
    """
    with pytest.MonkeyPatch.context() as patch:
        for name in ("empty", "empty_like", "empty_strided", "empty_permuted"):
            patch.setattr(torch, name, poisoning(getattr(torch, name)))
        patch.setattr(torch.Tensor, "new_empty", poisoning(torch.Tensor.new_empty))
        patch.setattr(torch.Tensor, "new_empty_strided", poisoning(torch.Tensor.new_empty_strided))
        yield


@pytest.fixture(scope="session", autouse=True)
def original_reduction() -> Iterator[Any]:
    """Let interpreted kernels reduce by slices; the fixture is what Triton has for it, or None without Triton."""
    try:
        from triton.runtime.interpreter import ReduceOps
    except ImportError:
        yield None
        return
    from interpreter_harness import fold_slices

    with pytest.MonkeyPatch.context() as patch:
        original = ReduceOps.generic_reduce
        patch.setattr(ReduceOps, "generic_reduce", fold_slices)
        yield original


@pytest.fixture(scope="module")
def uncompiled_attention() -> Iterator[None]:
    """Attention by index lists in plain torch: a program of flex_attention takes Inductor many seconds.

    For whole files (``pytestmark = pytest.mark.usefixtures("uncompiled_attention")``), since it lasts as long as one.
    """
    from attention_harness import attend_listed, attention_by  # here: it imports kernels

    with attention_by(attend_listed):
        yield
