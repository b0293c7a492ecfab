# SPDX-License-Identifier: BSD-3-Clause
"""Every kernel compiles for every supported GPU generation, on a machine without one.

The launchers themselves run, on meta tensors and with Triton's driver replaced by one that names a target and has no
device, so what is compiled is what a launch on that GPU compiles. Run as a script with a compute capability, this
file does that and prints a line of JSON a build. The tests run it so, in a process of its own: theirs interprets
kernels, and Triton settles that once and for all when a kernel is imported.
"""

import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from sale_flex.info import int8_instruction

SHARED_LIMIT = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
"""Compute capability -> KiB of shared memory that a program may have (CUDA C++ Programming Guide)."""

KERNELS = {
    name
    for path in (Path(__file__).resolve().parents[2] / "kernels").glob("*.py")
    if not path.stem.startswith(("masked_", "structure"))
    for name in re.findall(r"^@triton\.jit\ndef (\w+_kernel)\(", path.read_text(encoding="utf-8"), re.MULTILINE)
    if name != "_pool_rows_kernel"
}
"""Every kernel in the sources, but those of calls under mods: they are built in test_masked_builds."""

VARIANTS = (
    ("bfloat16", 128, 64, 64),
    ("bfloat16", 128, 64, 32),
    ("float16", 80, 128, 64),
    ("bfloat16", 256, 128, 128),
    ("float32", 32, 64, 64),
    ("float32", 256, 64, 64),
)
"""(dtype, head_dim, query rows, keys): every block size and dtype, and the smallest, an odd and the largest head."""

TILED_FOR = 90
"""The generation that tiles are chosen for. Others are built for what is common, and for what takes most memory."""

ELSEWHERE = VARIANTS[0], VARIANTS[3], VARIANTS[5]


def launch_all(dtype: str, dim: int, block_q: int, block_k: int) -> None:
    """Make masks for 32K tokens and 32 heads that share 8 heads of keys, by every rule, and pack codes."""
    from sale_flex import Antidiagonal, BlockMean, Mass, Relative, SaleConfig, create_sale_block_mask, ops
    from sale_flex.kernels import antidiagonal, audit, block_mean, last_rows
    from sale_flex.kernels.arguments import Grid, MaskSpec, Near

    query, key = (torch.empty(1, heads, 32768, dim, dtype=getattr(torch, dtype), device="meta") for heads in (32, 8))
    sizes = {"block_size": (block_q, block_k), "min_length": 1024}
    relative = SaleConfig(Relative(bits=8), **sizes)
    create_sale_block_mask(query, key, relative, value=key)
    create_sale_block_mask(query, key, relative, kv_range=torch.empty(1, 2, dtype=torch.int32, device="meta"))
    for rule in (Mass(), Mass(bits=4), Mass.fast(), Antidiagonal(), BlockMean()):
        create_sale_block_mask(query, key, SaleConfig(rule, **sizes))
    ops.quantize_rows(query, 4, True)
    bits = torch.empty(1, 32, 32768 // block_q, 32768 // block_k // 32, dtype=torch.int32, device="meta")
    bounds = torch.empty(1, 3, dtype=torch.int32, device="meta")
    spec = MaskSpec(bounds, True, None, None, 1, 1)
    grid, near = Grid(32768, 32768, block_q, block_k), Near(32, 128, 1024)
    antidiagonal.antidiagonal_shares(query, key, bounds, bits[:, :1], False, 0.1, grid, 8)
    block_mean.block_mean_energies(query, key, bounds, bits[:, :1], False, 0.1, grid)
    audit.audit_rows(query, key, bits, bits[:, :8, 0], spec, None, None, 0.1, 0.05, grid, near)
    last_rows.last_row_sums(query[:, :, :4096], key[:, :, :4096], spec, None, 0.1, grid, 128, 4096)


def bypass_dispatch() -> None:
    """Let the ops be the launchers themselves: for a meta tensor the dispatcher would run the op's fake."""
    from sale_flex import kernels, ops
    from sale_flex.ops.define import Op

    for module in pkgutil.iter_modules(kernels.__path__, "sale_flex.kernels."):
        for name, function in vars(importlib.import_module(module.name)).items():
            if isinstance(getattr(ops, name, None), Op):
                setattr(ops, name, function)


def build_all(capability: int) -> None:
    """Compile every variant for one compute capability and print a line of JSON a build."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    class BuildDriver:
        """As much of a driver as compiling needs."""

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", capability, 32)

    run = JITFunction.run

    def build(self: Any, *args: Any, warmup: bool, **kwargs: Any) -> None:
        report = describe(run(self, *args, warmup=True, **kwargs))
        print(json.dumps({"kernel": self.__name__, "variant": variant, **report}))

    driver.set_active(BuildDriver())
    JITFunction.run = build
    bypass_dispatch()
    for variant in VARIANTS if capability == TILED_FOR else ELSEWHERE:
        launch_all(*variant)


def describe(compiled: Any) -> dict[str, Any]:
    """What the machine code of one build needs: registers and spilled bytes a thread, shared memory a program."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", cubin.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    instructions = re.findall(r"\b(?:tcgen05\.mma|wgmma\.mma_async\.sync|mma\.sync)\.[\w.:]+", compiled.asm["ptx"])
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "spills": int(re.search(r"STACK:(\d+)", usage)[1]),
        "shared": compiled.metadata.shared,
        "matrix_instructions": sorted(set(instructions)),
    }


@pytest.fixture(scope="module", params=sorted(SHARED_LIMIT), ids=lambda number: f"sm_{number}")
def builds(request: pytest.FixtureRequest) -> tuple[int, list[dict[str, Any]]]:
    pytest.importorskip("triton", reason="kernels are compiled with triton, which is not installed")
    compiling = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(Path(__file__)), str(request.param)],
        capture_output=True,
        text=True,
        env=compiling,
    )
    assert done.returncode == 0, done.stderr
    return request.param, [json.loads(line) for line in done.stdout.splitlines()]


def test_every_kernel_is_built(builds, record_property):
    capability, reports = builds
    record_property("builds", reports)
    for report in reports:
        print(f"sm_{capability}", *(f"{name}={value}" for name, value in report.items()))
    assert {report["kernel"] for report in reports} == KERNELS != set()


def test_shared_memory_fits_the_generation(builds):
    capability, reports = builds
    limit = SHARED_LIMIT[capability] * 1024
    assert [report for report in reports if report["shared"] > limit] == []


def test_scan_uses_the_int8_matrix_instruction(builds):
    capability, reports = builds
    expected = int8_instruction(divmod(capability, 10))
    for report in reports:
        if report["kernel"] in ("_mass_hits_kernel", "_scan_max_kernel"):
            assert report["matrix_instructions"], report
            for instruction in report["matrix_instructions"]:
                assert instruction.startswith(tuple(expected.split(" or "))), report
                assert re.search(r"\.s8\.s8|kind::i8", instruction), report


@pytest.mark.parametrize("builds", [90], ids=["sm_90"], indirect=True)
def test_scan_keeps_its_accumulators_in_registers(builds):
    # Its tiles are chosen for sm_90; where a thread has the same registers but mma.sync, some bytes are spilled.
    for report in builds[1]:
        if report["kernel"] == "_scan_max_kernel":
            assert report["spills"] == 0, report


if __name__ == "__main__":
    build_all(int(sys.argv[1]))
