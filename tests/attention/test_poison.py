# SPDX-License-Identifier: BSD-3-Clause
"""Memory that sale_flex leaves unwritten is noticed: the fixture of conftest.py that the other tests rely on."""

import pytest
import torch

ALLOCATIONS = {
    "empty": "torch.empty(4, dtype=dtype)",
    "empty_like": "torch.empty_like(given)",
    "empty_strided": "torch.empty_strided((2, 2), (1, 2), dtype=dtype)",
    "empty_permuted": "torch.empty_permuted((2, 2), (1, 0), dtype=dtype)",
    "new_empty": "given.new_empty(4)",
    "new_empty_strided": "given.new_empty_strided((2, 2), (1, 2))",
}
POISON = {torch.float32: float("nan"), torch.bfloat16: float("nan"), torch.int8: -128, torch.int32: -(2**31)}


def allocate(how: str, dtype: torch.dtype, module: str) -> torch.Tensor:
    """What an allocation gives to code of a module of that name."""
    return eval(
        ALLOCATIONS[how], {"__name__": module, "torch": torch, "dtype": dtype, "given": torch.zeros(4, dtype=dtype)}
    )


@pytest.mark.parametrize("dtype", POISON)
@pytest.mark.parametrize("how", ALLOCATIONS)
def test_allocations_of_the_package_are_poisoned(how, dtype):
    tensor = allocate(how, dtype, "sale_flex.kernels.scan")
    torch.testing.assert_close(tensor, torch.full_like(tensor, POISON[dtype]), rtol=0, atol=0, equal_nan=True)


def test_compiled_code_allocates_as_ever():
    source = "def allocate(x): return torch.empty(4).copy_(x)"
    module = {"__name__": "sale_flex.ops", "torch": torch}
    exec(source, module)
    compiled = torch.compile(module["allocate"], fullgraph=True, backend="eager")
    assert compiled(torch.ones(4)).equal(torch.ones(4))
