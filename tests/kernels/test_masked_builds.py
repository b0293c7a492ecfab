# SPDX-License-Identifier: BSD-3-Clause
"""What the compiler makes of the kernels of calls under mods, on a machine without a GPU.

As in `test_builds`, this file is also a script: with a compute capability it compiles the kernels with mods in
them, and prints a line of JSON a build.
"""

import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton", reason="the kernels need triton")
tl = pytest.importorskip("triton.language")

from sale_flex.call.validation import HEAD_DIMS  # noqa: E402
from sale_flex.config import BLOCK_SIZES  # noqa: E402
from sale_flex.kernels import compact, masked_mass, mass, row_limits, scan, structure  # noqa: E402
from sale_flex.kernels.arguments import (  # noqa: E402
    BlockVisibility,
    CandidateBlocks,
    Grid,
    KeyMoments,
    MaskSpec,
    MassOptions,
    Near,
    Structure,
)
from sale_flex.selection.rules.mass import POOLS, SUB_BLOCKS  # noqa: E402


@triton.jit
def _window(b, h, q, kv, AUX):
    return (kv - q < AUX[0]) & (q - kv < AUX[0])


@triton.jit
def _documents(b, h, q, kv, AUX):
    return tl.load(AUX[0] + q) == tl.load(AUX[0] + kv)


@triton.jit
def _window_range(b, h, first, last, AUX):
    return first - AUX[0] + 1, last + AUX[0] - 1


@triton.jit
def _alibi(score, b, h, q, kv, AUX):
    return score + tl.load(AUX[0] + h) * (kv - q).to(tl.float32)


@triton.jit
def _soft_cap(score, b, h, q, kv, AUX):
    return 4.0 * (2.0 * tl.sigmoid(score * 0.5) - 1.0)


def launch_all(head_dim: int, dtype: torch.dtype, block_q: int, block_k: int, sub_block: int) -> None:
    """Launch every kernel for 16K tokens and 32 heads that share 8 heads of keys, without and with mods."""
    batch, heads, kv_heads, length = 1, 32, 8, 16384
    nq, nk, words = length // block_q, length // block_k, length // block_k // 32
    subs = length // sub_block

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(batch, *shape, dtype=dtype, device="meta")

    def ints(*shape: int) -> torch.Tensor:
        return empty(*shape, dtype=torch.int32)

    def codes(*shape: int) -> torch.Tensor:
        return empty(*shape, dtype=torch.int8)

    query, key, mean = (
        empty(heads, length, head_dim, dtype=dtype),
        empty(kv_heads, length, head_dim, dtype=dtype),
        empty(kv_heads, head_dim),
    )
    bounds, threshold, table = ints(3), empty(heads)[0], ints(length)[0]
    counts, lists, bits, ends = ints(1, nq, 3), ints(1, nq, nk), ints(1, nq, words), ints(1, 2, length)
    codes_of = codes(kv_heads, subs, head_dim), empty(kv_heads, nk)
    of_keys = KeyMoments(*codes_of, *codes_of, ints(kv_heads, words))
    seen_as = Structure(BlockVisibility(bits, bits, ends), CandidateBlocks(bits, counts, lists))
    grid, near = Grid(length, length, block_q, block_k), Near(64, 128, 1024)
    options = MassOptions(sub_block, 4, False, 8 if sub_block == 1 else 4)
    structure.candidate_blocks(seen_as.visibility, bounds, True, grid, near)
    compact.build_lists(
        ints(heads, nq, words), of_keys.nonfinite, bounds, seen_as.visibility, bits, kv_heads, grid, near, 9, 99, True,
        False,
    )  # fmt: skip
    mods = (
        ((_documents, (table,)), (_soft_cap, ()), ints(1, 128, 4)),
        ((_window, (4096,)), (_alibi, (empty(heads)[0],)), None),
        (None, None, None),
    )
    for mask, score, listed in mods if head_dim == 128 else mods[:1]:
        spec = MaskSpec(bounds, True, mask, listed, 128, 128)
        structure.block_structure(spec, (_window_range, (4096,)) if mask is not None else None, 1, grid)
        rest = threshold, 0.1, grid
        mass.mass_hits(query, key, mean, of_keys, spec, seen_as, score, *rest, options, near, 99)
        row_limits.row_limits(query, empty(heads, length), key, mean, spec, seen_as, score, *rest, near)
        scan.scan_max(
            codes(heads, length, head_dim), empty(heads, length), codes(kv_heads, length, head_dim),
            empty(kv_heads, nk), empty(heads, length), empty(heads, length), spec, seen_as, score, 0.1, grid, 128,
            False,
        )  # fmt: skip


def build_all(capability: int) -> None:
    """Compile what `launch_all` launches for one compute capability and print a line of JSON a build."""
    from triton import knobs
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
        compiled = run(self, *args, warmup=True, **kwargs)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
            cubin.write(compiled.asm["cubin"])
            cubin.flush()
            code = subprocess.run(
                [knobs.nvidia.nvdisasm.path, "-c", cubin.name], capture_output=True, text=True, check=True
            )
        report = {
            "kernel": self.__name__,
            "variant": variant,
            "shared": compiled.metadata.shared,
            "loops": matrix_loops(code.stdout),
        }
        print(json.dumps(report, default=str))

    driver.set_active(BuildDriver())
    JITFunction.run = build
    variants = (
        (128, torch.bfloat16, 64, 64, 8),
        (256, torch.float32, 128, 128, 8),
        (256, torch.bfloat16, 128, 128, 1),
        (128, torch.bfloat16, 128, 64, 1),
        (80, torch.float16, 64, 32, 8),
    )
    # Tiles are chosen for sm_90; elsewhere what takes most memory has to fit.
    for variant in variants if capability == 90 else variants[:3]:
        launch_all(*variant)


def matrix_loops(code: str) -> list[list[str]]:
    """Instructions of all innermost loops with an integer matrix instruction, in a program's machine code."""
    labels, instructions, loops = {}, [], []
    for line in code.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.match(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\d+ )?(.*?)\s*;?\s*$", line):
            instructions.append(instruction[1])
    inside = 0  # where the last innermost loop ends: a loop that begins before is around it
    for end, instruction in enumerate(instructions):
        target = re.search(r"BRA.*(\.L_x_\d+)", instruction)
        begin = labels.get(target[1], end) if target else end
        if inside <= begin < end:
            inside = end
            body = instructions[begin : end + 1]
            if any(re.match(r"IGMMA|IMMA", x) for x in body):
                loops.append([x.split()[0] for x in body])
    return loops


@pytest.fixture(scope="module", params=[86, 90], ids=lambda number: f"sm_{number}")
def builds(request: pytest.FixtureRequest) -> tuple[int, list[dict[str, Any]]]:
    compiling = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__)), str(request.param)]
    done = subprocess.run(command, capture_output=True, text=True, env=compiling)
    assert done.returncode == 0, done.stderr
    return request.param, [json.loads(line) for line in done.stdout.splitlines()]


def test_builds_fit_the_generation(builds):
    capability, reports = builds
    limit = {86: 99, 90: 227}[capability] * 1024
    assert [report for report in reports if report["shared"] > limit] == []
    assert len({report["kernel"] for report in reports}) == 7


@pytest.mark.parametrize("builds", [90], ids=["sm_90"], indirect=True)
def test_the_estimate_keeps_to_registers_and_few_instructions(builds):
    # With a soft cap, with ALiBi, without mods: 64 rows times 64 sub-blocks or 128 keys, 32 or 64 estimates a thread
    # and step. Without a score_mod the first loop looks for largest logits, and is for rows with nothing near.
    reports = [x for x in builds[1] if x["kernel"] == "_masked_mass_kernel" and x["variant"][0] == 128]
    for sub_block, estimates, most in ((8, 32, (31, 19, 14)), (1, 64, (22, 14, 8))):
        of_size = [x["loops"] for x in reports if x["variant"][4] == sub_block]
        assert len(of_size) == 3
        for loops, instructions, hot in zip(of_size, most, (0, 0, 1)):
            assert len(loops[hot]) <= instructions * estimates
            # What a tile keeps besides is spilled, and two such values may be read in a step.
            assert len([x for x in loops[hot] if x.startswith("LDL")]) <= 2 * (hot == 0)
            assert not [x for x in loops[hot] if x.startswith("STL")]


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_tiles_of_all_calls_are_whole(block_size, dtype):
    # What the kernel's compile-time arithmetic divides has to come out even, and every shape is a power of two.
    block_q, block_k = block_size
    subs = [block_k // size for size in SUB_BLOCKS if size <= block_k]
    for dim, count, pool, group in itertools.product(HEAD_DIMS, subs, POOLS, (1, 2, 3, 4, 7, 8)):
        rows = block_q // pool
        together = masked_mass.heads_together(group, rows)
        options = masked_mass.tile_options(dim, dtype.itemsize, rows, together, count, block_k)
        channels = triton.next_power_of_2(dim)
        sizes = [options[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_E", "CHUNK_D")]
        assert all(size & (size - 1) == 0 for size in (*sizes, together))
        assert group % together == 0
        assert options["BLOCK_M"] >= max(16, rows * together)
        assert options["BLOCK_M"] % rows == 0
        assert 16 <= options["BLOCK_E"] <= block_k  # a product takes no fewer keys
        assert 16 <= options["CHUNK_D"] <= channels
        # A step has whole key blocks, and four threads share its sub-blocks evenly: `PART` and `SETS` of the loop.
        assert options["BLOCK_N"] >= max(16, count)
        part = count if options["BLOCK_N"] >= 4 * count else options["BLOCK_N"] // 4
        blocks, sets = options["BLOCK_N"] // count, options["BLOCK_N"] // (4 * part)
        assert sets * 4 == blocks * (count // part)
        assert part == 1 or part % 2 == 0


if __name__ == "__main__":
    build_all(int(sys.argv[1]))
